"""Arrays of more than 2^31 elements: offsets that do not fit into 32 bits.

Only the long form reaches them: offsets are computed in the kernels alone, which take dense arrays (a broadcast view is
copied before), so nothing smaller than the memory itself shows them. In every run the compiler stands in: sizes and
offsets are `ptrdiff_t`, and it says where one becomes narrower. The long form needs 12 GiB of memory, in a process of
its own: a float32 array, normalised in place, compared with a reference that is computed piece by piece.
"""

import shutil
import subprocess
import sys

import pytest
from places import KERNELS, needs_sources
from scripts import run_script

SCRIPT = """
import sys
import numpy as np
import bnfast
from bnfast import functional as F

shape, axis = eval(sys.argv[1]), int(sys.argv[2])
assert np.prod(shape, dtype=np.int64) > 2**31
channels = shape[axis]
x = np.empty(shape, np.float32)
rng = np.random.default_rng(0)
block = rng.integers(-8, 9, (1 << 20) + 7).astype(np.float32)  # of a length that fits no axis
flat = x.reshape(-1)
for start in range(0, flat.size, block.size):
    flat[start:start + block.size] = block[:flat.size - start]
flat[-1] = 12  # where only 64 bits reach

others = tuple(i for i in range(x.ndim) if i != axis % x.ndim)
def pieces():  # along the longest of the other axes
    along = max(others, key=lambda i: shape[i])
    step = max(1, shape[along] // 128)
    for start in range(0, shape[along], step):
        yield tuple(slice(start, start + step) if i == along else slice(None) for i in range(x.ndim))

# small integers: their sums are exact in float64, in any order
count = flat.size // channels
total, squares = np.zeros(channels), np.zeros(channels)
for piece in pieces():
    wide = x[piece].astype(np.float64)
    total += wide.sum(others)
    squares += (wide * wide).sum(others)
mean = total / count
var = squares / count - mean**2

m = bnfast.moments(x, axis=axis)
assert m.count == count
assert (abs(m.mean - mean) <= 1e-7 * np.sqrt(var)).all(), (m.mean, mean)
assert (abs(m.var() - var) <= 2e-7 * var).all(), (m.var(), var)
assert m.mean.tobytes() == bnfast.moments(x, axis=axis).mean.tobytes()

gamma, beta = np.linspace(0.5, 2, channels), np.linspace(-1, 1, channels)
y = F.batch_norm_eval(x, mean, var, gamma, beta, axis=axis, out=x)
assert y is x
# in place: what x was is known from the block
at = np.arange(0, flat.size, 65_537)
at = np.concatenate([at, np.arange(flat.size - 5000, flat.size), np.arange(2**31 - 5000, 2**31 + 5000)])
at = at[at < flat.size]
was = block[at % block.size].astype(np.float64)
was[at == flat.size - 1] = 12
c = np.unravel_index(at, shape)[axis]
x_hat = (was - mean[c]) / np.sqrt(var[c] + 1e-5)
expected = gamma[c] * x_hat + beta[c]
assert (abs(flat[at] - expected) <= 2e-7 * (gamma[c] * (1 + abs(x_hat)) + abs(beta[c]))).all()

m = bnfast.moments(x, axis=axis)
assert (abs(m.mean - beta) <= 1e-6 * gamma).all()
assert (abs(m.std() - gamma * np.sqrt(var / (var + 1e-5))) <= 1e-6 * gamma).all()
print("right", flat.size)
"""

SHAPES = {
    "planar": ((3, 4, 2**14, 11_000), 1),
    "planar_one_row": ((1, 2, 2**30 + 17), 1),
    "interleaved": ((2**22, 513), 1),
    "interleaved_few": ((2**30 + 17, 2), 1),
}


def memory_available():
    """Bytes; 0 where it is not known."""
    try:
        with open("/proc/meminfo") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) * 1024
    except OSError:
        return 0


@pytest.mark.campaign
@pytest.mark.parametrize(("shape", "axis"), SHAPES.values(), ids=SHAPES)
def test_more_than_2_to_the_31_elements(shape, axis):
    if memory_available() < 12 << 30:
        pytest.skip("needs 12 GiB of free memory")
    assert run_script(SCRIPT, shape, axis, timeout=1800).startswith("right")


def narrowings(source, folder):
    """What the compiler says about integers made narrower in a C file."""
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None or sys.maxsize < 2**32:
        pytest.skip("needs GCC or clang, and 64 bits")
    options = ["-fsyntax-only", "-std=gnu11", "-Wconversion", "-Wno-sign-conversion", "-Wno-float-conversion"]
    command = [compiler, *options, f"-I{KERNELS}", "-x", "c", str(source)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert run.returncode == 0, run.stderr
    return [line for line in run.stderr.splitlines() if "warning:" in line]


@needs_sources
def test_no_size_becomes_narrower_in_the_kernels(tmp_path):
    sources = sorted(KERNELS.glob("*.c"))
    assert sources
    for source in sources:
        assert narrowings(source, tmp_path) == []
    narrow = tmp_path / "narrow.c"
    narrow.write_text('#include "job.h"\nint narrow(const bnfast_job *job) { return job->outer * job->inner; }\n')
    assert len(narrowings(narrow, tmp_path)) == 1, "the compiler says nothing: this test cannot fail"
