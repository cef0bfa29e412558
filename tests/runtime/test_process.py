"""The process that imports bnfast: nothing in it changes, and whatever state it is in does no harm."""

import itertools
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from campaign import short_and_long
from scripts import FREE_THREADED, SANITIZED, completed, needs_libgomp, run_script

import bnfast

BASE = Path(bnfast.__file__).parent.parent
needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="as on Linux")

USE = """
import numpy as np
import bnfast
x = np.random.default_rng(0).standard_normal((64, 32, 32, 32)).astype(np.float32)
def bits(team):
    with bnfast.num_threads(team):
        y, mean, inv_std = bnfast.functional.batch_norm(x)
        results = y, mean, inv_std, *bnfast.functional.batch_norm_backward(x, x, mean, inv_std)
    return b"".join(a.tobytes() for a in results)
def right():
    bn = bnfast.BatchNorm(32)
    bn(x)
    return bits(1) == bits(2) and bn.num_batches_tracked == 1
"""


# --- import leaves no trace ----------------------------------------------------------------------------------


@needs_linux
@needs_libgomp
def test_import_and_calls_leave_other_copies_of_openmp_alone(tmp_path):
    library = bnfast.config()["openmp_library"]
    copy = shutil.copy(Path(library).resolve(), tmp_path / "libother.so")
    body = """
import ctypes, sys
import numpy as np
others = [ctypes.CDLL(path) for path in sys.argv[1:]]
def look():
    names = "omp_get_max_threads", "omp_get_dynamic", "omp_get_thread_limit", "omp_get_num_procs"
    return [[getattr(other, name)() for name in names] for other in others]
others[0].omp_set_num_threads(3)
before = look()
assert before[0][0] == 3
import bnfast
assert look() == before
bnfast.set_num_threads(2)
with bnfast.num_threads(4):
    bnfast.moments(np.ones((300, 1000)))
assert look() == before
print("alone")
"""
    assert run_script(body, copy, library) == "alone"


@needs_linux
def test_import_starts_no_thread_and_opens_no_file():
    body = """
import os, sys
import numpy as np
tasks = lambda: sorted(os.listdir("/proc/self/task"))
files = lambda: sorted(os.readlink(f"/proc/self/fd/{n}") for n in os.listdir("/proc/self/fd") if int(n) > 2
                       and os.path.exists(f"/proc/self/fd/{n}"))
import threading, warnings, random, locale
def look():
    generators = random.getstate(), np.random.get_state()[1].tobytes()
    return tasks(), files(), generators, locale.setlocale(locale.LC_ALL), sys.path[:]
before = look()
import bnfast
assert before == look()
print("none")
"""
    assert run_script(body) == "none"


@pytest.mark.skipif(not FREE_THREADED, reason="this Python has a GIL that cannot be off")
def test_the_gil_stays_off():
    script = "import sys, numpy; before = sys._is_gil_enabled(); import bnfast; print(before, sys._is_gil_enabled())"
    assert run_script(script) == "False False"


# --- where the process stands --------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [["-S"], ["-E"], ["-I"], ["-S", "-E", "-I"], ["-OO"], ["-X", "dev"]], ids=" ".join)
def test_options_of_the_interpreter(options):
    where = {str(BASE), str(Path(np.__file__).parent.parent)}
    script = f"import sys; sys.path[:0] = {sorted(where)!r}\n{USE}\nprint(right())"
    assert run_script(script, options=options) == "True"


def test_no_standard_streams():
    script = f"""
import os
for n in (0, 1, 2):
    os.close(n)
{USE}
os._exit(17 if right() else 1)
"""
    assert completed(script).returncode == 17


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a folder in use cannot be removed here")
def test_the_current_folder_is_gone(tmp_path):
    script = f"""
import os, sys
os.rmdir(os.getcwd())
sys.path[:] = [p for p in sys.path if p]
{USE}
print(right(), bool(bnfast.config()))
"""
    folder = tmp_path / "gone"
    folder.mkdir()
    assert run_script(script, cwd=folder) == "True True"


@pytest.mark.parametrize("locale", ["C", "POSIX", "C.UTF-8", "de_DE.UTF-8", "nonsense"])
def test_locales(locale):
    script = f"""
import locale
try:
    locale.setlocale(locale.LC_ALL, "")
except locale.Error:
    pass
{USE}
print(right())
"""
    assert run_script(script, LC_ALL=locale, LANG=locale) == "True"


BAD_VALUES = {
    "OMP_NUM_THREADS": ["abc", "0", "99999", "-1", "2,x", " "],
    "OMP_THREAD_LIMIT": ["abc", "0", "-1"],
    "OMP_DYNAMIC": ["true", "maybe"],
    "OMP_SCHEDULE": ["guided,7", "nothing"],
    "OMP_PROC_BIND": ["true", "maybe"],
    "OMP_PLACES": ["cores", "{0}", "{99}", "garbage"],
    "OMP_STACKSIZE": [*([] if SANITIZED else ["16k"]), "abc", "1G"],  # its frames are larger
    "OMP_WAIT_POLICY": ["active", "maybe"],
    "OMP_MAX_ACTIVE_LEVELS": ["0", "x"],
    "GOMP_SPINCOUNT": ["abc", "infinite", "0"],
    "GOMP_CPU_AFFINITY": ["0", "77", "x"],
    "BNFAST_NUM_THREADS": ["", " ", "2"],
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_values_of_the_environment_that_are_wrong_or_unusual(name):
    for value in BAD_VALUES[name]:
        run = completed(USE + "print(right(), bnfast.get_num_threads() >= 1)", **{name: value})
        assert (run.returncode, run.stdout) == (0, "True True\n"), (value, run.returncode, run.stderr)


# One call of each kind of loop that gathers something for many columns or channels: long and short rows, columns.
DEEPEST = """
from hashlib import sha256
from itertools import product
import numpy as np
import bnfast
from bnfast import _core
def results(x, axis):
    bn = bnfast.BatchNorm(x.shape[axis], axis=axis, activation="relu", dtype=np.result_type(x, np.float32))
    for data in [x, np.full_like(x, np.nan)]:  # not finite: summed once more
        y, pull = bn.vjp(data, residual=x)
        yield from (y, *pull(data))
        _, mean, inv_std = bnfast.functional.batch_norm(data, axis=axis)
        yield from bnfast.functional.batch_norm_backward(x, data, mean, inv_std, axis=axis)
        found = bnfast.moments(data, axis=axis)
        yield from (found.mean, found.m2)
def digest(team):
    found = sha256()
    for (shape, axis), dtype in product([((64, 64, 14, 14), 1), ((64, 64, 7, 7), 1), ((64, 64, 5, 5), 1),
                                         ((4096, 512), 1), ((8, 65536), 1)], ["float32", "float64", "float16"]):
        x = np.random.default_rng(0).standard_normal(shape).astype(dtype)
        for plan in [{}, {"near": False, "in_order": True}]:
            _core.force_plan(**plan)
            with bnfast.num_threads(team):
                for result in results(x, axis):
                    found.update(np.ascontiguousarray(result))
    return found.hexdigest()
print(digest(2) == digest(1))
"""


@pytest.mark.skipif(SANITIZED, reason="a sanitizer's frames are larger")
def test_a_small_stack_is_enough():
    run = completed(DEEPEST, OMP_STACKSIZE="64k")  # musl's threads have 128
    assert (run.returncode, run.stdout) == (0, "True\n"), (run.returncode, run.stderr)


@pytest.mark.parametrize("value", ["abc", "0", "99999999999999999999999", "1.5"])
def test_bnfast_num_threads_that_is_wrong_is_named(value):
    run = completed(
        "import warnings; warnings.simplefilter('default')\n" + USE + "print(right())", BNFAST_NUM_THREADS=value
    )
    assert (run.returncode, run.stdout) == (0, "True\n"), run.stderr
    if value != "99999999999999999999999":  # a number, if a large one
        assert "BNFAST_NUM_THREADS" in run.stderr


# --- imported again ------------------------------------------------------------------------------------------


def test_reload():
    script = (
        USE
        + """
import importlib, sys
before, bn = bits(2), bnfast.BatchNorm(32)
bn(x)
importlib.reload(bnfast)
for name in [name for name in sys.modules if name.startswith("bnfast.") and name != "bnfast._core"]:
    if sys.modules[name].__spec__: # those of names_of_0_1.py come from no file
        importlib.reload(sys.modules[name])
bn(x)
print(right(), bits(2) == before, bn.num_batches_tracked)
"""
    )
    assert run_script(script) == "True True 2"


def test_import_after_all_modules_were_forgotten():
    """It works, or says clearly that it cannot."""
    script = (
        USE
        + """
import sys
before = bits(2)
for name in [name for name in sys.modules if name.partition(".")[0] == "bnfast"]:
    del sys.modules[name]
try:
    import bnfast
except ImportError as error:
    assert str(error)
    print("True")
else:
    print(bits(2) == before and right())
"""
    )
    assert run_script(script) == "True"


def test_sub_interpreters():
    """NumPy allows one interpreter a process; the second import is a clean ImportError, or works."""
    script = (
        USE
        + """
import warnings
try:
    import _xxsubinterpreters as interpreters
except ImportError:
    import _interpreters as interpreters
before = bits(2)
interpreter = interpreters.create()
code = '''
import warnings
warnings.simplefilter("ignore")
try:
    import bnfast, numpy
    assert bnfast.moments(numpy.ones((3, 2))).count == 3
except ImportError as error:
    assert str(error)
'''
failure = interpreters.run_string(interpreter, code)
assert failure is None, failure
interpreters.destroy(interpreter)
print(bits(2) == before and right())
"""
    )
    pytest.importorskip(
        "_xxsubinterpreters" if sys.version_info < (3, 13) else "_interpreters", reason="no module for it"
    )
    run = completed(script, options=["-W", "ignore"])
    assert (run.returncode, run.stdout) == (0, "True\n"), run.stderr


# --- another CPU ---------------------------------------------------------------------------------------------


@needs_linux
def test_a_cpu_without_avx2():
    """In an emulator, if there is one. tests/kernels/test_bits.py has the bits of the forced baseline."""
    if SANITIZED:
        pytest.skip("the emulator has no room for the sanitizer's shadow memory")
    emulator = shutil.which("qemu-x86_64")
    if emulator is None or "baseline" not in bnfast.config()["isa_compiled"]:
        pytest.skip("there is no qemu-x86_64 (Debian: qemu-user)")
    script = """
import hashlib, numpy as np, bnfast
x = np.linspace(-3, 5, 7000, dtype=np.float32).reshape(100, 70)
y, mean, inv_std = bnfast.functional.batch_norm(x)
dx = bnfast.functional.batch_norm_backward(x, x, mean, inv_std)
print(bnfast.config()["isa"], hashlib.sha256(b"".join(a.tobytes() for a in (y, mean, inv_std, *dx))).hexdigest())
"""
    environment = {"OPENBLAS_CORETYPE": "Nehalem", "OPENBLAS_NUM_THREADS": "1", "OPENBLAS_L2_SIZE": "262144"}
    here = run_script(script).split()
    run = completed(script, timeout=240, command=[emulator, "-cpu", "Nehalem"], **environment)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.split() == ["baseline", here[1]]


# --- beside other libraries ----------------------------------------------------------------------------------

KERNELS = {
    "torch": "import torch; torch.set_num_threads(2); a = torch.ones(64, 32, 32, 32, requires_grad=True)\n"
    "(torch.nn.BatchNorm2d(32)(a) ** 2).sum().backward()",
    "sklearn": "from sklearn.cluster import KMeans\n"
    "KMeans(8, n_init=1, max_iter=5, random_state=0).fit(np.random.default_rng(0).random((4000, 8)))",
    "numba": "import numba\n@numba.njit(parallel=True)\ndef total(v):\n    t = 0.0\n"
    "    for i in numba.prange(v.size):\n        t += v[i]\n    return t\nassert total(np.ones(10**5)) == 10**5",
    "bnfast": "assert __import__('bnfast') and right()",
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("orders", short_and_long(2, 24))
def test_other_libraries_in_every_order_then_a_fork(orders):
    """Imported in one order, a kernel of each in the same, then a child that uses bnfast."""
    present = [
        name
        for name in KERNELS
        if name == "bnfast" or completed(f"import {name}", options=["-W", "ignore"]).returncode == 0
    ]
    if len(present) < 2:
        pytest.skip("none of PyTorch, scikit-learn and Numba is installed")
    every = list(itertools.permutations(present))
    for order in every if orders >= len(every) else [every[0], every[-1]][:orders]:
        imports = "\n".join(f"import {name}" for name in order)
        kernels = "\n".join(KERNELS[name] for name in order)
        script = f"""
import warnings
warnings.simplefilter("ignore")
import os, time, numpy as np
{imports}
{USE}
{kernels}
expected = bits(1)
pid = os.fork()
if pid == 0:
    os._exit(0 if right() and bits(2) == expected else 1)
deadline = time.monotonic() + 200
while time.monotonic() < deadline:
    done, status = os.waitpid(pid, os.WNOHANG)
    if done:
        break
    time.sleep(0.01)
else:
    os.kill(pid, 9)
    status = "hangs"
assert status == 0, status
{kernels}
assert bits(2) == expected
print("fine")
"""
        assert run_script(script, options=["-W", "ignore"]) == "fine", order
