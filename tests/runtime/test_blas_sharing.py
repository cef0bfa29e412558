"""share_blas_threads: OpenBLAS's jobs on the threads of bnfast. Results stay, nothing hangs, and it can be undone.

Every case runs in a process of its own with a time limit; `hangs` and crashes make it fail. Where a guard prevents
something, a case without the guard shows that.
"""

import contextlib
import importlib.util
import os
import subprocess
import sys
import threading

import pytest
from scripts import CHILDREN, CPUS, environ, needs_fork, needs_libgomp

import bnfast
from bnfast.runtime import blas

COPIES = blas.blas_copies()
CAN_SHARE = bnfast._core.blas_supported() and any(copy.addresses is not None for copy in COPIES)
needs_sharing = pytest.mark.skipif(
    not (CAN_SHARE and importlib.util.find_spec("threadpoolctl")),
    reason=f"no OpenBLAS here can share its threads, or threadpoolctl is not installed: {COPIES}",
)

TIME_LIMIT = 300

HEAD = """
import faulthandler, hashlib, os, sys, threading, time, traceback, warnings
faulthandler.dump_traceback_later(250)
warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
import numpy as np
import threadpoolctl
import bnfast
from bnfast import _core, functional as F
from bnfast.runtime import blas

def set_blas_threads():
    "to BLAS_THREADS: OPENBLAS_NUM_THREADS cannot say more than there are CPUs"
    threadpoolctl.threadpool_limits(int(os.environ["BLAS_THREADS"]), user_api="blas")

set_blas_threads()
rng = np.random.default_rng(0)
a, b = rng.standard_normal((2, 400, 400))
x = rng.standard_normal((32, 64, 28, 28), np.float32)

def product():
    return a @ b

def product_bits():
    return bits(product())

def bits(*arrays):
    return hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays)).hexdigest()

def calls():
    "(state, calls on a team, calls on threads of their own) of NumPy's copy of OpenBLAS"
    return _core.blas_state(blas.blas_copies()[0].addresses[0])

def goes_through(work=product):
    "whether work() runs jobs on a team of bnfast's"
    before = calls()[1]
    work()
    return calls()[1] > before

EXPECTED = bits(product())
print("ready", flush=True)
"""


def run_script(body, tmp_path, *, fails=False, seconds=TIME_LIMIT, blas_threads=2, **environment):
    """What a script printed, "hangs" (`seconds` after its imports), or, if it may fail, "crashes"."""
    file = tmp_path / "script.py"
    file.write_text(HEAD + body)
    with subprocess.Popen(
        [sys.executable, "-W", "error", str(file)],
        env=environ(BLAS_THREADS=str(blas_threads), **environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,  # so that reading a line takes no more than that
    ) as process:
        with killing(process, TIME_LIMIT):
            ready = process.stdout.readline()
        try:
            output, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            print(process.communicate()[1].decode())  # where it was
            return "hangs"
    assert ready == b"ready\n", errors.decode()
    if process.returncode and fails:
        return "crashes"
    assert process.returncode == 0, errors.decode()
    return output.decode().strip()


@contextlib.contextmanager
def killing(process, seconds):
    """The process, if what is inside takes longer."""
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# --- results, and the way back ---------------------------------------------------------------------------------


@needs_sharing
def test_results_are_the_same_and_the_jobs_run_on_the_team(tmp_path):
    body = """
matrices = [a[:200, :200].astype(dtype) for dtype in (np.float32, np.float64, np.complex128)]
def everything():
    results = [product()]
    for m in matrices:
        q, r = np.linalg.qr(m)
        results += [m @ m, m @ m.T, m @ m[0], *np.linalg.svd(m), np.linalg.solve(m, m[:, :5]), np.linalg.inv(m), q, r]
        results += [np.linalg.cholesky(m @ m.T.conj() + 200 * np.eye(200)), *np.linalg.eigh(m + m.T.conj())]
    return bits(*results)
expected = everything()
with bnfast.share_blas_threads():
    assert everything() == expected
    assert goes_through()
    F.batch_norm(x)
    assert everything() == expected
assert everything() == expected
print(calls()[0], goes_through())
"""
    assert run_script(body, tmp_path) == "off False"


@needs_sharing
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_any_number_of_blas_threads(tmp_path, threads):
    body = """
with bnfast.share_blas_threads():
    assert all(bits(product()) == EXPECTED for _ in range(20))
    print(goes_through())
"""
    assert run_script(body, tmp_path, blas_threads=threads) == str(threads > 1)


@needs_sharing
def test_threadpoolctl_limits_blas_as_before(tmp_path):
    body = """
import threadpoolctl
with bnfast.share_blas_threads():
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        print(goes_through(), end=" ")
    with threadpoolctl.threadpool_limits(4, user_api="blas"):
        print(goes_through())
"""
    assert run_script(body, tmp_path) == "False True"


@needs_sharing
def test_nested_and_closed_in_any_order(tmp_path):
    body = """
states = [goes_through()]
first = bnfast.share_blas_threads()
second = bnfast.share_blas_threads()
states.append(goes_through())
first.close()
first.close()
states.append(goes_through())
with bnfast.share_blas_threads() as third:
    second.close()
    states.append(goes_through())
states.append(goes_through())
bnfast.share_blas_threads()  # the object is dropped: it stays
states.append(goes_through())
print(*map(int, states))
"""
    assert run_script(body, tmp_path) == "0 1 1 1 0 1"


@needs_sharing
def test_an_exception_in_the_block_ends_it(tmp_path):
    body = """
try:
    with bnfast.share_blas_threads():
        raise KeyError
except KeyError:
    print(calls()[0])
"""
    assert run_script(body, tmp_path) == "off"


@needs_sharing
def test_the_configuration_says_whose_threads(tmp_path):
    body = """
def threads():
    return bnfast.config()["blas"][0]["threads"]
print(threads())
with bnfast.share_blas_threads():
    print(threads())
    bnfast.show_config()
"""
    output = run_script(body, tmp_path).splitlines()
    assert output[:2] == ["its own threads", "shares bnfast's threads"]
    assert any("BLAS" in line and "shares bnfast's threads" in line for line in output[2:])


@needs_sharing
def test_the_copy_of_scipy(tmp_path):
    """It is a library of its own; loaded after the first call it is not shared until the next."""
    pytest.importorskip("scipy", reason="SciPy is not installed")
    body = """
sharing = bnfast.share_blas_threads()
import scipy.linalg.blas
set_blas_threads()
def states():
    return [_core.blas_state(copy.addresses[0])[0] for copy in blas.blas_copies()]
if len(states()) == 1:
    print("one copy for both")
else:
    expected = bits(scipy.linalg.blas.dgemm(1, a, b))
    assert states() == ["shared", "off"], states()
    with bnfast.share_blas_threads():
        assert states() == ["shared", "shared"]
        assert bits(scipy.linalg.blas.dgemm(1, a, b)) == expected and bits(product()) == EXPECTED
        assert all(_core.blas_state(copy.addresses[0])[1] for copy in blas.blas_copies())
    print(*states())
"""
    assert run_script(body, tmp_path) in ("shared off", "one copy for both")


# --- fewer threads than jobs ------------------------------------------------------------------------------------


def break_and_multiply(what):
    return f"""
_core.blas_break({what})
with bnfast.share_blas_threads():
    right = [bits(product()) == EXPECTED for _ in range(5)]
    state, on_team, on_threads = calls()
    print(all(right), state, on_team > 0, on_threads > 0)
"""


@needs_sharing
def test_jobs_one_after_another_wait_for_each_other_for_ever(tmp_path):
    """Negative control for what follows."""
    assert run_script(break_and_multiply(4), tmp_path, seconds=6) == "hangs"


@needs_sharing
@pytest.mark.parametrize("environment", [{"OMP_THREAD_LIMIT": "1"}, {"OMP_DYNAMIC": "true", "OMP_THREAD_LIMIT": "2"}])
def test_a_team_that_is_too_small(tmp_path, environment):
    body = break_and_multiply(0)
    assert run_script(body, tmp_path, blas_threads=3, **environment) == "True shared False True"


@needs_sharing
def test_without_any_team_the_jobs_get_threads_of_their_own(tmp_path):
    assert run_script(break_and_multiply(1), tmp_path) == "True shared False True"


@needs_sharing
def test_without_any_threads_the_calls_are_given_back(tmp_path):
    body = (
        break_and_multiply(3)
        + """
_core.blas_break(0)
print(blas.blas_copies()[0].threads(), calls()[0], goes_through())
with bnfast.share_blas_threads():
    print(calls()[0], goes_through())
"""
    )
    lines = run_script(body, tmp_path).splitlines()
    assert lines == ["True given back False False", "its own threads off False", "shared True"]


@needs_sharing
def test_after_the_number_of_blas_threads_has_been_raised_too_far(tmp_path):
    """The last places would be those of OpenBLAS's own threads."""
    body = """
import threadpoolctl
set_callback, _, _, _, places = blas.blas_copies()[0].addresses
with bnfast.share_blas_threads():
    threadpoolctl.threadpool_limits(places, user_api="blas")
    large = np.ones((3000, 300), np.float32)
    assert ((large @ large.T) == 300).all()
    print(_core.blas_state(set_callback)[0])
try:
    bnfast.share_blas_threads()
except RuntimeError as error:
    print("OPENBLAS_NUM_THREADS" in str(error))
"""
    assert run_script(body, tmp_path).splitlines() == ["given back", "True"]


# --- several threads, fork ----------------------------------------------------------------------------------------

FROM_SEVERAL_THREADS = """
def matrices():
    return bits(product(), np.linalg.svd(a)[1], a[0] @ b, F.batch_norm(x)[0])
def solution():
    return bits(np.linalg.solve(a, b))
def repeat(work, expected):
    rounds = 0
    try:
        while rounds < 5 or time.monotonic() < end:
            right.append(work() == expected)
            rounds += 1
    except BaseException as error:
        right.append(repr(error))
tasks = [(work, work()) for work in (matrices, product_bits, solution, solution)]
right, end = [], time.monotonic() + 1.5
_core.blas_break(BREAK)
with bnfast.share_blas_threads():
    threads = [threading.Thread(target=repeat, args=task) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
print({True} == set(right))
"""


@needs_sharing
def test_several_python_threads_at_once(tmp_path):
    assert run_script(FROM_SEVERAL_THREADS.replace("BREAK", "0"), tmp_path) == "True"


@needs_sharing
def test_in_the_places_of_the_threads_of_openblas_they_spoil_each_other(tmp_path):
    """Negative control: LU factorisation goes on using OpenBLAS's own threads."""
    script = FROM_SEVERAL_THREADS.replace("BREAK", "8")
    assert run_script(script, tmp_path, fails=True, seconds=8) in ("hangs", "crashes", "False")


@needs_sharing
def test_switched_on_and_off_while_others_multiply(tmp_path):
    body = """
stop, wrong = threading.Event(), []
def repeat():
    while not stop.is_set():
        wrong.extend([1] * (bits(product()) != EXPECTED))
threads = [threading.Thread(target=repeat) for _ in range(2)]
for thread in threads:
    thread.start()
for _ in range(300):
    with bnfast.share_blas_threads():
        time.sleep(0.001)
stop.set()
for thread in threads:
    thread.join()
print(len(wrong), calls()[0])
"""
    assert run_script(body, tmp_path) == "0 off"


CHILD = (
    CHILDREN
    + """
def child_status(work, seconds=100):
    return end_of(start_child(work), seconds)
def fine():
    return goes_through() and bits(product()) == EXPECTED and F.batch_norm(x)[0].shape == x.shape
"""
)


@needs_sharing
@needs_fork
def test_parent_children_and_grandchildren_go_on_sharing(tmp_path):
    body = """
sharing = bnfast.share_blas_threads()
assert fine()
for _ in range(5):
    assert child_status(fine) == 0
assert child_status(lambda: fine() and child_status(fine) == 0) == 0
def undone():
    sharing.close()
    return bits(product()) == EXPECTED and not goes_through()
print(child_status(undone), fine())
"""
    assert run_script(CHILD + body, tmp_path) == "0 True"


@needs_sharing
@needs_fork
@needs_libgomp
def test_without_the_fork_handler_of_the_team_the_child_hangs(tmp_path):
    """Negative control: the team is a libgomp team like any other."""
    body = "bnfast.share_blas_threads(); assert fine(); _core.handle_fork(False); print(child_status(fine, 1.5))"
    assert run_script(CHILD + body, tmp_path) == "hangs"


@needs_sharing
@needs_fork
def test_forks_while_other_threads_multiply(tmp_path):
    """A child's own products could find OpenBLAS's lock taken, sharing or not; the parent's must stay right.

    Before a fork OpenBLAS frees the buffers of all places, and the next small product, which needs no turn, takes one.
    """
    body = """
stop, wrong = threading.Event(), []
large, small = np.ones((700, 700)), np.full((50, 50), 2.0)
def repeat(m):
    right = m @ m.T
    while not stop.is_set():
        wrong.extend([1] * (not np.array_equal(m @ m.T, right)))
with bnfast.share_blas_threads():
    threads = [threading.Thread(target=repeat, args=(m,), daemon=True) for m in (large, small, small)]
    for thread in threads:
        thread.start()
    for _ in range(100):
        assert child_status(lambda: True) == 0
    stop.set()
    for thread in threads:
        thread.join()
    print(len(wrong), fine())
"""
    assert run_script(CHILD + body, tmp_path) == "0 True"


# --- where it cannot work -----------------------------------------------------------------------------------------


def refusal():
    with pytest.raises(RuntimeError, match="share_blas_threads: ") as info:
        bnfast.share_blas_threads()
    return str(info.value)


@pytest.fixture
def linux(monkeypatch):
    monkeypatch.setattr(bnfast._core, "blas_supported", lambda: True)


def test_without_openblas(monkeypatch, linux):
    monkeypatch.setattr(blas, "_mapped_libraries", list)
    assert refusal().endswith("got none")


def test_beside_another_library(monkeypatch, linux):
    """MKL and others have none of OpenBLAS's functions."""
    monkeypatch.setattr(blas, "_address", lambda library, name: 0)
    monkeypatch.setattr(blas, "_mapped_libraries", lambda: [bnfast._core.__file__])
    assert "another library" in refusal()
    assert "only OpenBLAS can share" in bnfast.config()["blas"][0]["threads"]


@needs_sharing
@pytest.mark.parametrize("name", ["openblas_set_threads_callback_function", "exec_blas", "blas_num_threads"])
def test_an_openblas_without_the_symbols(monkeypatch, name):
    right = blas._address
    monkeypatch.setattr(blas, "_address", lambda library, asked: 0 if asked == name else right(library, asked))
    assert name in refusal()
    assert name in bnfast.config()["blas"][0]["threads"]
    monkeypatch.undo()
    assert all(copy.threads() == "its own threads" for copy in blas.blas_copies())


@needs_sharing
def test_an_openblas_that_is_too_old(monkeypatch):
    monkeypatch.setattr(blas, "_OLDEST", (0, 4, 0))
    assert "or later" in refusal()


def test_on_another_system(monkeypatch):
    monkeypatch.setattr(bnfast._core, "blas_supported", lambda: False)
    assert "Linux" in refusal()


@needs_sharing
def test_beside_another_package_that_runs_the_jobs(tmp_path):
    """Its function stays."""
    body = """
import ctypes
copy = blas.blas_copies()[0]
set_callback, _, callback, _, _ = copy.addresses
mine = ctypes.CFUNCTYPE(None)(lambda: None)
address = ctypes.cast(mine, ctypes.c_void_p).value
ctypes.CFUNCTYPE(None, ctypes.c_void_p)(set_callback)(address)
try:
    bnfast.share_blas_threads()
except RuntimeError as error:
    print("another package" in str(error), ctypes.c_void_p.from_address(callback).value == address)
ctypes.CFUNCTYPE(None, ctypes.c_void_p)(set_callback)(None)
"""
    assert run_script(body, tmp_path) == "True True"


# --- by default: beside threads that spin ------------------------------------------------------------------------


@needs_sharing
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="this system does not list tasks in /proc")
@pytest.mark.skipif(CPUS != 2, reason=f"reckoned for two CPUs, and there are {CPUS}")
def test_cpus_that_other_threads_use_are_left_to_them(tmp_path):
    """OpenBLAS's threads spin for a tenth of a second after a product."""
    body = """
few, many = 1 << 20, 1 << 40
def beside_blas():
    "teams for few and for many elements, looking while OpenBLAS's thread spins"
    product()
    _core.team_for(few)
    time.sleep(0.02)
    return _core.team_for(few), _core.team_for(many)
def quiet():
    time.sleep(0.3)
    _core.team_for(few)
    time.sleep(0.02)
    return _core.team_for(few)
def seen(work, expected):
    return any(work() == expected for _ in range(10))
print(seen(beside_blas, (1, 2)), seen(quiet, 2), end=" ")
bnfast.set_num_threads(2)
print(beside_blas() == (2, 2), end=" ")
bnfast.set_num_threads(None)
with bnfast.share_blas_threads():
    print(seen(beside_blas, (2, 2)))
"""
    assert run_script(body, tmp_path) == "True True True True"
