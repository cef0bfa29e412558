"""Where memory is refused or a signal arrives, a layer is as before the call or as after it, never between.

tests/test_layer_atomic.py interrupts at every point of the Python code and with a timer; here every allocation fails in
turn, and signals come from outside.
"""

import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from campaign import short_and_long
from scripts import FREE_THREADED, SANITIZED, c_library, run_script

import bnfast

needs_posix = pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs POSIX signals")

# What is tried: name -> action on a trained layer. `look` is everything of it that a user sees.
HEAD = """
import copy, gc, os, signal, sys, threading, time
import numpy as np
import bnfast
from bnfast import BatchNorm, functional as F

def batch(channels, rows, dtype, seed):
    return np.random.default_rng(seed).normal(5, 2, (rows, channels)).astype(dtype)

def trained(channels, rows, dtype, **options):
    bn = BatchNorm(channels, dtype=dtype, **options)
    x = batch(channels, rows, dtype, 1)
    bn(x)
    bn.backward(x)
    with bn.calibrate():
        bn(x)
    bn.use_statistics("running")
    return bn

def look(bn):
    raw = lambda a: None if a is None else a.tobytes()
    exact = bn.exact_statistics
    return (
        [raw(a) for a in (bn.gamma, bn.beta, bn.grad_gamma, bn.grad_beta, bn.running_mean, bn.running_var)],
        bn.num_batches_tracked, bn.statistics_in_use, exact and (exact.count, raw(exact.mean), raw(exact.m2)),
        bn._calibration.value is None, bn.training,
    )

def calibrate(bn, x):
    with bn.calibrate():
        bn(x)

def calibrate_two(bn, x):
    other = BatchNorm(bn.num_features)
    with bnfast.calibrate([bn, other]):
        bn(x)
        other(x)

def frozen(bn, x):
    bn.training = False
    bn(x)

other_state = {}
ACTIONS = {
    "forward": lambda bn, x: bn(x),
    "forward_into_out": lambda bn, x: bn(x, np.empty_like(x)),
    "fortran": lambda bn, x: bn(np.asfortranarray(x)),
    "gaps": lambda bn, x: bn(np.repeat(x, 2, 0)[::2]),
    "backward": lambda bn, x: bn.backward(x),
    "accumulate": lambda bn, x: bn.backward(x, accumulate=True),
    "vjp": lambda bn, x: bn.vjp(x),
    "calibrate_two": lambda bn, x: calibrate_two(bn, x),
    "calibrate": calibrate,
    "load_state_dict": lambda bn, x: bn.load_state_dict(
        {name: np.asarray(value) + 1 for name, value in bn.state_dict().items()}),
    "reset_parameters": lambda bn, x: bn.reset_parameters(),
    "reset_running_stats": lambda bn, x: bn.reset_running_stats(),
    "use_statistics": lambda bn, x: bn.use_statistics("exact"),
    "use_moments": lambda bn, x: bn.use_statistics(bnfast.moments(x)),
    "copy": lambda bn, x: copy.deepcopy(bn),
}
"""

# --- no memory -----------------------------------------------------------------------------------------------

PYTHONS_ALLOCATIONS = (
    HEAD
    + """
import _testcapi
tries, torn, refused, wrong = 0, [], 0, []
wanted = int(sys.argv[1])
cases = [(c, r, t, o) for c in (3, 700) for r in (16, 300) for t in (np.float32, np.float64)
         for o in ({}, {"momentum": None})]
gc.disable() # a collection would allocate at other points
for channels, rows, dtype, options in cases if wanted > 1000 else cases[:1]:
    x = batch(channels, rows, dtype, 2)
    for name, action in ACTIONS.items():
        after = trained(channels, rows, dtype, **options)
        action(after, x)
        before = trained(channels, rows, dtype, **options)
        allowed = [look(before), look(after)]
        n, done, quiet = 0, False, 0
        while not done:
            bn = trained(channels, rows, dtype, **options)
            try:
                _testcapi.set_nomemory(n, n + 1)
                action(bn, x)
            except (MemoryError, SystemError): # NumPy's reductions: "error return without exception set"
                _testcapi.remove_mem_hooks()
                refused += 1
                quiet = 0
            else:
                _testcapi.remove_mem_hooks()
                quiet += 1 # a refusal that does no harm (a cache), or beyond the last allocation
                done = quiet > (40 if wanted > 1000 else 15)
            tries += 1
            n += 1
            found = look(bn)
            if found not in allowed:
                torn.append((name, n))
            bn.reset_running_stats() # it works on
            bn.reset_parameters()
            bn.train()
            bn(x)
            new = BatchNorm(channels, dtype=dtype, **options)
            new(x)
            if look(bn)[0][4:] != look(new)[0][4:]:
                wrong.append((name, n))
assert not wrong, wrong
print(tries, refused, len(torn), torn[:5])
"""
)


@pytest.mark.skipif(
    FREE_THREADED and sys.version_info < (3, 14),
    reason="CPython 3.13t corrupts its memory when a list display finds none (seen without bnfast)",
)
@pytest.mark.parametrize("tries", short_and_long(100, 10_000))
def test_every_allocation_of_python_refused_in_turn(tries):
    """_testcapi lets the n-th allocation of the interpreter fail, those of the extension among them."""
    pytest.importorskip("_testcapi", reason="this Python was built without _testcapi")
    done, refused, torn, first = run_script(PYTHONS_ALLOCATIONS, tries, timeout=300 + tries / 10).split(maxsplit=3)
    assert int(torn) == 0, first
    assert int(done) >= tries
    assert int(refused) > tries // 3  # otherwise nothing was tried


# Fails the n-th allocation (counted from 1 once `armed`) that a library whose path contains one of two words asks for.
REFUSING = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>
extern void *__libc_malloc(size_t), *__libc_calloc(size_t, size_t), *__libc_realloc(void *, size_t);
long armed, count, refused;
static int fails(void *caller)
{
    Dl_info info;
    if (!armed || !dladdr(caller, &info) || !info.dli_fname ||
        !(strstr(info.dli_fname, "_multiarray_umath") || strstr(info.dli_fname, "bnfast/_core")))
        return 0;
    if (++count != armed)
        return 0;
    refused++;
    errno = ENOMEM;
    return 1;
}
void *malloc(size_t n) { return fails(__builtin_return_address(0)) ? NULL : __libc_malloc(n); }
void *calloc(size_t n, size_t m) { return fails(__builtin_return_address(0)) ? NULL : __libc_calloc(n, m); }
void *realloc(void *p, size_t n) { return fails(__builtin_return_address(0)) ? NULL : __libc_realloc(p, n); }
"""

NUMPYS_ALLOCATIONS = (
    HEAD
    + """
import ctypes
shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
armed, count, refusals = (ctypes.c_long.in_dll(shim, name) for name in ("armed", "count", "refused"))
tries, torn, refused = 0, [], 0
for channels, rows, dtype in ((700, 300, np.float32), (300, 700, np.float64), (700, 16, np.float64))[:int(sys.argv[1])]:
    x = batch(channels, rows, dtype, 2) # statistics of more than 1024 bytes: NumPy keeps smaller ones in a cache
    for team in (1, 3):
        bnfast.set_num_threads(team)
        for name, action in ACTIONS.items():
            after = trained(channels, rows, dtype)
            action(after, x)
            allowed = [look(trained(channels, rows, dtype)), look(after)]
            n, done = 1, False
            while not done:
                bn = trained(channels, rows, dtype)
                count.value = refusals.value = 0
                armed.value = n
                try:
                    action(bn, x)
                except MemoryError:
                    refused += 1
                finally:
                    armed.value = 0
                done = refusals.value == 0
                tries += 1
                n += 1
                if look(bn) not in allowed:
                    torn.append((name, n))
                bn(x)
                action(bn, x) # it works on
print(tries, refused, len(torn), torn[:5])
"""
)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="preloading as on Linux with glibc")
@pytest.mark.skipif(SANITIZED, reason="the sanitizer's malloc comes before the one that refuses")
@pytest.mark.parametrize("cases", short_and_long(1, 3))
def test_every_allocation_of_numpy_and_the_extension_refused_in_turn(tmp_path, cases):
    shim = c_library(tmp_path, REFUSING, "-O1", "-ldl")
    _, refused, torn, first = run_script(NUMPYS_ALLOCATIONS, cases, LD_PRELOAD=shim).split(maxsplit=3)
    assert int(torn) == 0, first
    assert int(refused) >= 50 * cases


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs /proc and RLIMIT_AS")
def test_no_room_for_a_large_result():
    body = """
import resource
x = np.ones((64, 64, 64, 64), np.float32)
x[0] = 2
bnfast.set_num_threads(2)
bn = BatchNorm(64)
bn(x)
before, state = resource.getrlimit(resource.RLIMIT_AS), look(bn)
size = int(open("/proc/self/statm").read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
for room in (0, 2**20, 2**25):
    resource.setrlimit(resource.RLIMIT_AS, (size + room, before[1]))
    for action in (bn, bn.backward):
        try:
            action(x)
            print("there was room")
        except MemoryError:
            assert look(bn) == state
    resource.setrlimit(resource.RLIMIT_AS, before)
bn(x)
print(bn.num_batches_tracked)
"""
    assert run_script("import warnings\n" + HEAD + body, options=["-W", "ignore"]) == "2"


# --- signals -------------------------------------------------------------------------------------------------

SIGINT_STORM = (
    HEAD
    + """
# Ctrl-C from another process, every half millisecond; Python's own handler raises KeyboardInterrupt.
import subprocess
armed = False
def handle(number, frame):
    global armed, hits
    if armed:
        armed = False
        hits += 1
        raise KeyboardInterrupt
signal.signal(signal.SIGINT, handle)
sender = subprocess.Popen([sys.executable, "-c", '''
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
try:
    while os.getppid() == int(sys.argv[1]):
        os.kill(int(sys.argv[1]), signal.SIGINT)
        time.sleep(0.0005)
except ProcessLookupError:
    pass
''', str(os.getpid())])
wanted, hits, steps, torn = int(sys.argv[1]), 0, 0, []
layers = []
for rows, team in ((16, 1), (3000, 1), (3000, 3)):
    x = batch(40, rows, np.float32, 3)
    states, bn = [], BatchNorm(40)
    for _ in range(60):
        states.append((look(bn)[0][4:], bn.num_batches_tracked))
        bn(x)
    bn.reset_running_stats()
    layers.append((bn, x, team, states))
deadline = time.monotonic() + float(sys.argv[2])
while steps < wanted or hits < wanted // 20:
    assert time.monotonic() < deadline, (steps, hits)
    for bn, x, team, states in layers:
        before = bn.num_batches_tracked
        try:
            armed = True
            with bnfast.num_threads(team):
                bn(x)
                bn.backward(x)
            armed = False
        except KeyboardInterrupt:
            pass
        finally:
            armed = False
        steps += 1
        n = bn.num_batches_tracked
        if n not in (before, before + 1) or (look(bn)[0][4:], n) != states[n]:
            torn.append((steps, before, n))
        if n == len(states) - 1:
            bn.reset_running_stats()
        bnfast.runtime.threads._context.set(None) # what an interrupt between `with` and its body leaves
sender.kill()
sender.wait()
print(steps, hits, len(torn), torn[:5])
"""
)


@needs_posix
@pytest.mark.parametrize("steps", short_and_long(500, 200_000))
def test_a_storm_of_ctrl_c_from_outside(steps):
    seconds = 300 + steps / 200
    done, hits, torn, first = run_script(SIGINT_STORM, steps, seconds, timeout=seconds + 30).split(maxsplit=3)
    assert int(torn) == 0, first
    assert int(done) >= steps
    assert int(hits) >= steps // 20


@pytest.fixture
def _ctrl_c_raises():
    """Also where the suite runs in the background of a shell, which ignores Ctrl-C there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)


@needs_posix
@pytest.mark.usefixtures("_ctrl_c_raises")
def test_ctrl_c_waits_for_one_kernel_at_most():
    """It arrives in the middle of a kernel, and no further one begins."""
    x = np.random.default_rng(0).standard_normal((128, 64, 56, 56)).astype(np.float32)
    bn, out, main = bnfast.BatchNorm(64), np.empty_like(x), threading.main_thread().ident
    bn(x, out)
    for delay in (0.005, 0.02, 0.05):
        sent, begun, begin = [], [], threading.Event()

        def interrupt(delay=delay, sent=sent, begin=begin):
            begin.wait()
            time.sleep(delay)
            before = time.perf_counter()
            signal.pthread_kill(main, signal.SIGINT)
            sent.extend([before, time.perf_counter()])

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            begin.set()
            while len(begun) < 10_000:
                begun.append(time.perf_counter())
                bn(x, out)
        thread.join()
        assert sum(start > sent[1] for start in begun) <= 1


@needs_posix
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="signals to single threads by tgkill, as on Linux")
@pytest.mark.parametrize("seconds", short_and_long(1.0, 30))
def test_signals_to_the_workers_and_from_children(seconds):
    """Handlers run in the main thread; neither results nor waits are disturbed."""
    body = """
import ctypes, platform, subprocess
tgkill = {"x86_64": 234, "aarch64": 131}[platform.machine()]
libc, main = ctypes.CDLL(None, use_errno=True), threading.get_ident()
seen, stop, sent = {signal.SIGUSR1: 0, signal.SIGCHLD: 0}, threading.Event(), 0
def handle(number, frame):
    assert threading.get_ident() == main
    seen[number] += 1
for number in seen:
    signal.signal(number, handle)
x = batch(40, 30_000, np.float32, 3)
bnfast.set_num_threads(4)
expected = F.batch_norm(x)[0].tobytes()
main_tid = threading.get_native_id()
def send():
    global sent
    me = threading.get_native_id()
    while not stop.is_set():
        for tid in map(int, os.listdir("/proc/self/task")):
            if tid not in (me, main_tid):
                libc.syscall(tgkill, os.getpid(), tid, int(signal.SIGUSR1))
                sent += 1
        time.sleep(0.0005)
sender = threading.Thread(target=send)
sender.start()
enough = lambda: sent > 50 and seen[signal.SIGUSR1] > 20 and seen[signal.SIGCHLD] > 1
begin = time.monotonic()
while time.monotonic() < begin + float(sys.argv[1]) or not enough():
    assert time.monotonic() < begin + float(sys.argv[1]) + 60, (sent, seen)
    child = subprocess.Popen(["true"])
    for _ in range(20):
        assert F.batch_norm(x)[0].tobytes() == expected
    child.wait()
stop.set()
sender.join()
print("undisturbed")
"""
    assert run_script(HEAD + body, seconds, timeout=300 + seconds) == "undisturbed"


@needs_posix
def test_sigterm_in_the_middle_of_training_finds_what_a_step_left():
    """A handler that turns SIGTERM into SystemExit, and atexit that looks at the layer."""
    body = """
import atexit
x = batch(40, 3000, np.float32, 3)
bn, states = BatchNorm(40), []
for _ in range(300):
    states.append(look(bn)[0][4:])
    bn(x)
bn.reset_running_stats()
@atexit.register
def at_the_end():
    print(look(bn)[0][4:] == states[bn.num_batches_tracked], flush=True)
bn(x)
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
print("begin", flush=True)
while True:
    bn(x)
    bn.backward(x)
    if bn.num_batches_tracked == 299:
        bn.reset_running_stats()
"""
    for delay in (0.01, 0.05, 0.1):
        command = [sys.executable, "-W", "error", "-c", HEAD + body]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "begin\n", process.communicate()
            time.sleep(delay)
            process.terminate()
            output, errors = process.communicate(timeout=300)
        assert (process.returncode, output) == (0, "True\n"), errors
