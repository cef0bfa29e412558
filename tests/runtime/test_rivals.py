"""CPUs that other threads of the process are using are left to them; the workers of a shared pool are no others.

Who is busy is what clocks of threads say. So each case repeats until what it waits for has been seen, and each script
decides by itself who spins: OpenBLAS's threads (for a tenth of a second after a product), a pool of the same OpenMP
runtime that was told to spin for ever, or a Python thread.
"""

import os

import numpy as np
import pytest
from scripts import CPUS, TEAM_LIBRARY, c_library, needs_libgomp, run_script

pytestmark = [
    pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="this system does not list tasks in /proc"),
    pytest.mark.skipif(CPUS != 2, reason=f"reckoned for two CPUs, and there are {CPUS}"),
    needs_libgomp,
]

HEAD = """
import ctypes, os, sys, threading, time
import numpy as np
FEW, MANY = 1 << 20, 1 << 40

def team_seen(n, elements=FEW, tries=400):
    "whether a call would, sooner or later, take n threads"
    _core.set_patience(10**9)  # nobody is late: other processes have no say here
    for _ in range(tries):
        if _core.team_for(elements) == n:
            return True
        time.sleep(0.005)
    return False

def call():
    "a large one, which runs in a team if it may"
    _core.set_patience(10**9)
    bnfast.moments(np.ones((16_384, 64), np.float32))
"""


def has_openblas():
    """Whether NumPy's products run on threads of OpenBLAS."""
    found = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return "openblas" in found.get("name", "").lower()


@pytest.mark.skipif(not has_openblas(), reason="NumPy is not on OpenBLAS here")
def test_cpus_that_other_threads_use_are_left_to_them():
    body = """
import bnfast
from bnfast import _core
a = np.ones((400, 400))
def beside_blas(elements):
    "the team for them, looking while OpenBLAS's thread spins"
    a @ a
    call()  # the first one finds out that it is no worker of ours
    a @ a
    _core.team_for(elements)
    time.sleep(0.02)
    return _core.team_for(elements)
print(any(beside_blas(FEW) == 1 for _ in range(20)), any(beside_blas(MANY) == 2 for _ in range(20)), end=" ")
time.sleep(0.3)
print(team_seen(2), end=" ")
bnfast.set_num_threads(2)
print(beside_blas(FEW) == 2)
"""
    assert run_script(HEAD + body, OPENBLAS_NUM_THREADS="2") == "True True True True"


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    return c_library(tmp_path_factory.mktemp("team"), TEAM_LIBRARY, "-fopenmp")


ONE_POOL = """
def runtimes():
    with open("/proc/self/maps") as maps:
        return {line.split()[-1] for line in maps if "gomp" in line}
if len(runtimes()) > 1:
    print("two runtimes")
    sys.exit()
"""


@pytest.mark.parametrize("first", ["another package", "bnfast"])
def test_workers_of_a_shared_pool_are_no_rivals(team, first):
    """They spin, here for ever, from the other package's region on, and may have been in no team of ours yet."""
    imports = "import bnfast\nfrom bnfast import _core\n"
    other = "other = ctypes.CDLL(sys.argv[1])\nassert other.team() == 2\n"
    body = (imports + other if first == "bnfast" else other + imports) + ONE_POOL
    body += """
time.sleep(0.05)
_core.team_for(FEW)
time.sleep(0.05)
call()
print(all(team_seen(2, tries=1) or time.sleep(0.02) for _ in range(20)))
"""
    printed = run_script(HEAD + body, team, OPENBLAS_NUM_THREADS="1", OMP_WAIT_POLICY="active")
    if printed == "two runtimes":
        pytest.skip("this build has an OpenMP runtime of its own")
    assert printed == "True"


def test_the_pool_of_another_thread_is_a_rival(team):
    """Only the calling thread's own workers help it. After one call beside them they are known."""
    body = """
import bnfast
from bnfast import _core
other = ctypes.CDLL(sys.argv[1])
"""
    body += ONE_POOL
    body += """
def use():
    other.team()
    done.set()
    leave.wait()
done, leave = threading.Event(), threading.Event()
thread = threading.Thread(target=use, daemon=True)
thread.start()
done.wait()
time.sleep(0.02)
first = _core.team_for(FEW)
call()
print(first, team_seen(1))
leave.set()
"""
    printed = run_script(HEAD + body, team, OPENBLAS_NUM_THREADS="1", OMP_WAIT_POLICY="active")
    if printed == "two runtimes":
        pytest.skip("this build has an OpenMP runtime of its own")
    assert printed == "2 True"


def test_a_thread_that_appears_later_is_found_out_by_one_call():
    """A call of ours runs beside it, as if it were a worker of a shared pool; from then on it is a rival."""
    body = """
import bnfast
from bnfast import _core
call()
assert team_seen(2)
stop = False
def spin():
    while not stop:
        pass
thread = threading.Thread(target=spin)
thread.start()
sys.setswitchinterval(1e-4)
before = team_seen(1, tries=1)
time.sleep(1.1)  # the list of threads is a second old
seen = []
for _ in range(200):
    call()
    time.sleep(0.01)
    seen.append(_core.team_for(FEW))
stop = True
thread.join()
print(1 in seen, team_seen(2))
"""
    assert run_script(HEAD + body, OPENBLAS_NUM_THREADS="1") == "True True"
