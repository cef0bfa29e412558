"""PyTorch and bnfast in one process, whichever is imported first: one runtime, one team, nobody's settings changed.

The times that this stands for are measured by benchmarks/beside_torch.py and benchmarks/torch_steps.py.
"""

import os
import re
import subprocess
import sys

import pytest
import torch_layers  # noqa: F401 (without PyTorch it leaves out all that is here)
from scripts import CPUS, needs_libgomp, needs_openmp, needs_proc

from bnfast.runtime import loading

ORDERS = {
    "torch alone": "import torch",
    "torch, then bnfast": "import torch; import bnfast.torch",
    "bnfast, then torch": "import bnfast; import torch; import bnfast.torch",
    "bnfast.torch": "import bnfast.torch; import torch",
}

WORK = """
import os, sys
torch.set_num_threads(2)
model = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16), torch.nn.ReLU())
seen = set()
if "bnfast" in sys.modules:
    import bnfast
    from bnfast.torch import calls
    bnfast.torch.convert(model)
    original = calls.ours.batch_norm
    calls.ours.batch_norm = lambda *a, **k: seen.add(bnfast.get_num_threads()) or original(*a, **k)
for _ in range(3):
    model(torch.randn(8, 3, 80, 80)).sum().backward()
with open("/proc/self/maps") as maps:
    gomps = {os.path.realpath(line.split(maxsplit=5)[5].strip()) for line in maps if "gomp" in line}
print(len(gomps), len(os.listdir("/proc/self/task")), torch.get_num_threads(), sorted(seen))
"""


def run(order):
    """(copies of libgomp, threads of the process, PyTorch's number, bnfast's numbers; turns that idle threads spin)."""
    environment = {name: value for name, value in os.environ.items() if not re.match("BNFAST_|OMP_|GOMP_", name)}
    environment["OMP_DISPLAY_ENV"] = "verbose"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ORDERS[order] + WORK], capture_output=True, text=True, timeout=240,
        env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    counts = [int(count) for count in re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)]
    return done.stdout.split(maxsplit=3), counts


@needs_openmp
@needs_libgomp
@needs_proc
@pytest.mark.skipif(CPUS < 2, reason="one CPU: there are no teams")
@pytest.mark.skipif(loading._is_private(), reason="a wheel has a libgomp of its own")
def test_one_runtime_and_one_team_in_every_order_of_import():
    alone, spin = run("torch alone")
    assert alone[3].strip() == "[]"
    for order in list(ORDERS)[1:]:
        found, counts = run(order)
        assert found[:3] == alone[:3], order  # no second runtime, no more threads than PyTorch alone has
        assert found[3].strip() == "[2]", order  # and bnfast has as many of them as PyTorch
        assert counts == spin, order  # which wait as long as they do with PyTorch alone


def test_importing_it_changes_nothing_of_pytorchs():
    script = """
import torch
before = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
import bnfast.torch
assert before == (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


def test_bnfast_alone_does_not_import_pytorch():
    script = "import sys, bnfast; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=120).returncode == 0
