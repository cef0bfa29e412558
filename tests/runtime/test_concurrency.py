"""Any number of Python threads may call at once: the bits stay, the threads stay few and end, nothing hangs."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from campaign import short_and_long
from places import TESTS
from scripts import CPUS, needs_openmp, needs_proc, run_script

import bnfast
from bnfast import _core

HEAD = """
import faulthandler, hashlib, os, random, sys, threading, time
faulthandler.dump_traceback_later(1200, exit=True)
import numpy as np
import bnfast
from bnfast import functional as F

def tasks():
    return len(os.listdir("/proc/self/task"))

def digest(arrays):
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()

rng = np.random.default_rng(0)
SHAPES = [(16, 3), (64, 32), (8, 5, 7, 7), (300, 70, 2, 2), (16, 24, 20, 20), (40_001, 3), (4, 3, 128, 128)]
INPUTS = [rng.standard_normal(shape).astype(dtype) for shape in SHAPES for dtype in (np.float32, np.float64)]
INPUTS += [np.asfortranarray(x) for x in INPUTS[4:]]
for x in INPUTS:
    x.flags.writeable = False # shared by all

def mean_and_inv_std(x):
    return F.batch_norm(x)[1:]

bnfast.set_num_threads(1)
SAVED = [mean_and_inv_std(x) for x in INPUTS]
CALLS = []
for x, (mean, inv_std) in zip(INPUTS, SAVED):
    CALLS += [
        lambda x=x: F.batch_norm(x),
        lambda x=x: [bnfast.moments(x).mean, bnfast.moments(x).m2],
        lambda x=x, m=mean: [F.batch_norm_eval(x, m, m * m)],
        lambda x=x, m=mean, s=inv_std: F.batch_norm_backward(x, x, m, s),
        lambda x=x, m=mean, s=inv_std: F.batch_norm_backward(x, x, m, s, training=False),
        lambda x=x, m=mean, s=inv_std: [F.batch_norm_jvp(x, x, m, s)],
        lambda x=x, m=mean, s=inv_std: F.batch_norm_backward(x, x, m, s, out=np.empty_like(x)),
    ]
BITS = [digest(call()) for call in CALLS]
bnfast.set_num_threads(None)

def at_once(functions):
    errors, start = [], threading.Barrier(len(functions))
    def run(function):
        try:
            start.wait()
            function()
        except BaseException as error:
            errors.append(repr(error))
    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    return threads, errors
"""


# --- bits, hangs, threads ------------------------------------------------------------------------------------


@pytest.mark.parametrize("runs", short_and_long(1, 10))
def test_mixed_calls_of_32_threads_on_shared_inputs_give_the_serial_bits(runs):
    """200 calls each, on teams of 1 to 16."""
    body = """
n_threads, n_calls, runs, wrong = 32, 200, int(sys.argv[1]), []
def work(seed):
    choose = random.Random(seed)
    for _ in range(n_calls):
        i = choose.randrange(len(CALLS))
        with bnfast.num_threads(choose.choice([1, 2, 3, 4, 8, 16])):
            if digest(CALLS[i]()) != BITS[i]:
                wrong.append(i)
sys.setswitchinterval(1e-4)
for run in range(runs):
    threads, errors = at_once([lambda seed=run * n_threads + i: work(seed) for i in range(n_threads)])
    for thread in threads:
        thread.join()
    assert not errors and not wrong, (errors, wrong)
print(runs * n_threads * n_calls)
"""
    assert run_script(HEAD + body, runs, timeout=300 + 60 * runs) == str(runs * 32 * 200)


@needs_openmp
@needs_proc
@pytest.mark.parametrize("seconds", short_and_long(1.5, 30))
def test_a_storm_of_64_callers_keeps_its_threads_few_and_they_end(seconds):
    """At work: no more than callers and budget. Asleep in their pools: 64 at most."""
    body = """
budget, n_callers, seconds = 16, 64, float(sys.argv[1])
bnfast.set_num_threads(budget)
start = tasks()
large = [call for call in range(len(CALLS)) if INPUTS[call // 7].size >= 2**16]
go = threading.Event() # without a GIL, 64 threads at work keep the one that starts them from a CPU for seconds
def work(seed):
    go.wait()
    choose, end = random.Random(seed), time.monotonic() + seconds
    while time.monotonic() < end:
        i = choose.choice(large)
        assert digest(CALLS[i]()) == BITS[i]
threads, errors = at_once([lambda seed=seed: work(seed) for seed in range(n_callers)])
go.set()
most = tasks() - start
while any(thread.is_alive() for thread in threads):
    most = max(most, tasks() - start)
    time.sleep(0.0005)
for thread in threads:
    thread.join()
deadline = time.monotonic() + 100
while tasks() > start + 1 and time.monotonic() < deadline:
    time.sleep(0.005)
assert not errors, errors
print(most, tasks() - start)
"""
    most, left = map(int, run_script(HEAD + body, seconds, timeout=300 + 3 * seconds).split())
    budget, n_callers, asleep = 16, 64, 64
    assert n_callers <= most <= n_callers + budget + asleep
    assert left <= 1


@needs_openmp
@needs_proc
def test_threads_that_call_in_turn_keep_their_pools_up_to_a_limit():
    """A pool that sleeps belongs to its thread, and no other can use it."""
    body = """
bnfast.set_num_threads(16)
x = rng.standard_normal((64, 32, 32, 32)).astype(np.float32)
start, found = tasks(), []
turns = [threading.Semaphore(0) for _ in range(8)]
back = threading.Semaphore(0)
def work(turn):
    for _ in range(3):
        turn.acquire()
        bnfast.moments(x)
        back.release()
threads = [threading.Thread(target=work, args=(turn,)) for turn in turns]
for thread in threads:
    thread.start()
for _ in range(3):
    for turn in turns:
        turn.release()
        back.acquire()
        asleep = lambda: tasks() - start - sum(t.is_alive() for t in threads)
        deadline = time.monotonic() + 100 # threads of a pool that was given back have to end
        while asleep() > 64 and time.monotonic() < deadline:
            time.sleep(0.005)
        found.append(asleep())
for thread in threads:
    thread.join()
print(*found)
"""
    asleep = list(map(int, run_script(HEAD + body).split()))
    assert asleep[:4] == [15, 30, 45, 60]
    assert max(asleep) <= 64


@needs_openmp
@pytest.mark.parametrize("seconds", short_and_long(1.0, 30))
def test_ten_times_more_threads_than_cpus_are_only_slower(seconds):
    body = """
end = time.monotonic() + float(sys.argv[1])
many = int(sys.argv[2])
rounds = 0
while time.monotonic() < end or not rounds:
    for i, call in enumerate(CALLS):
        with bnfast.num_threads(many):
            assert digest(call()) == BITS[i], i
    rounds += 1
print("right")
"""
    assert run_script(HEAD + body, seconds, 10 * CPUS, timeout=300 + seconds) == "right"


# --- one layer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", short_and_long(1.5, 60))
def test_one_layer_that_threads_train_evaluate_and_change_is_never_corrupt(seconds):
    """Every state seen is one that some order of the calls gives; a call works, or raises and says why."""
    body = """
C = 24
layers = [bnfast.BatchNorm(C, momentum=momentum, unbiased_running_var=False) for momentum in (0.1, None)]
batches = []
for i, shape in enumerate([(16, C, 20, 20), (64, C), (8, C, 5, 5), (30, C, 60, 60)]):
    z = np.random.default_rng(i).standard_normal(shape)
    rest = tuple(axis for axis in range(z.ndim) if axis != 1)
    mean = np.linspace(1, 9, C).reshape(1, C, *[1] * (z.ndim - 2))
    z = (z - z.mean(rest, keepdims=True)) / z.std(rest, keepdims=True)
    batches.append(mean + np.sqrt(mean) * z)
end, counts = time.monotonic() + float(sys.argv[1]), {}
# The variance of every batch is its mean, the same in all batches. So in all that an order of calls can lead to,
# running variance and mean differ by the same number in every channel; not so where they are of different steps.
def check(state):
    mean, var = state["running_mean"], state["running_var"]
    difference = var - mean
    assert mean.shape == var.shape == (C,)
    assert np.ptp(difference) < 1e-9 and -1e-9 < difference[0] < 1 + 1e-9, (difference, state["num_batches_tracked"])
def train(bn, choose):
    x = choose.choice(batches)
    y = bn(x)
    assert y.shape == x.shape
def backward(bn, choose):
    try:
        dx = bn.backward(choose.choice(batches))
    except (RuntimeError, ValueError, TypeError): # no forward yet, or one of another dtype or shape
        return
    gradients = bn.gradients() # none, if another thread has trained meanwhile
    assert set(gradients) in (set(), {"gamma", "beta"}) and all(np.isfinite(g).all() for g in gradients.values())
def look(bn, choose):
    check(bn.state_dict())
def reset(bn, choose):
    bn.reset_running_stats()
def load(bn, choose):
    state = bn.state_dict()
    check(state)
    bn.load_state_dict(state)
def calibrate(bn, choose):
    try:
        with bn.calibrate():
            bn(choose.choice(batches))
    except RuntimeError as error: # another thread is calibrating it, or ended this calibration
        assert "calibrat" in str(error), error
def evaluate(bn, choose):
    import copy
    other = copy.deepcopy(bn).eval()
    check(other.state_dict())
    assert np.isfinite(other(choose.choice(batches))).all()
WORK = [train] * 6 + [backward] * 4 + [look] * 3 + [reset, load, calibrate, evaluate]
def work(seed):
    choose = random.Random(seed)
    while time.monotonic() < end or (len(counts) < len(set(WORK)) and time.monotonic() < end + 60):
        function = choose.choice(WORK)
        function(choose.choice(layers), choose)
        counts[function.__name__] = counts.get(function.__name__, 0) + 1
sys.setswitchinterval(1e-5)
threads, errors = at_once([lambda seed=seed: work(seed) for seed in range(8)])
for thread in threads:
    thread.join()
assert not errors, errors[:3]
assert len(counts) == len(set(WORK)), counts
for bn in layers: # and they work on
    bn.reset_running_stats()
    bn.train()
    bn(batches[0])
    new = bnfast.BatchNorm(C, momentum=bn.momentum, unbiased_running_var=False)
    new(batches[0])
    assert bn.running_mean.tobytes() == new.running_mean.tobytes()
    assert bn.running_var.tobytes() == new.running_var.tobytes()
print("never corrupt")
"""
    assert run_script(HEAD + body, seconds, timeout=300 + 3 * seconds) == "never corrupt"


LOADER = """
import itertools
states = [bn.state_dict() | {"weight": np.full(C, k, dtype), "bias": np.full(C, 10 * k, dtype),
                             "running_mean": np.full(C, float(k))} for k in (1, 2)]
bn.load_state_dict(states[0])
seen, stop = set(), threading.Event()
def load():
    for state in itertools.cycle(states):
        if stop.is_set():
            break
        bn.load_state_dict(state)
loader = threading.Thread(target=load, daemon=True)
loader.start()
end = time.monotonic() + 280
while len(seen) < 2 or calls > 0 and time.monotonic() < end - 260:
    look()
    calls -= 1
    assert time.monotonic() < end, seen
stop.set()
loader.join()
print(sorted(seen))
"""


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("shape", "calls"), [((32, 256, 14, 14), 40), ((2, 20_000), 1500)], ids=["large", "small"])
def test_a_forward_takes_the_parameters_of_one_moment(shape, calls, dtype):
    """Another thread loads new ones meanwhile; no y has some channels of these and some of those."""
    body = f"""
shape, calls, dtype = {shape}, {calls}, "{dtype}"
C = shape[1]
x = np.empty(shape, dtype)
x[::2], x[1::2] = 1, -1
bn = bnfast.BatchNorm(C, dtype=dtype)
rest = tuple(axis for axis in range(len(shape)) if axis != 1)
def look():
    y = bn(x)
    of_channels = set(zip(np.rint(y.max(rest)).tolist(), np.rint(y.min(rest)).tolist()))
    assert len(of_channels) == 1, of_channels
    seen.update(of_channels)
"""
    assert run_script(HEAD + body + LOADER) == "[(11.0, 9.0), (22.0, 18.0)]"


def test_a_state_is_of_one_moment():
    body = """
C, calls, dtype = 2000, 1500, "float32"
bn = bnfast.BatchNorm(C)
def look():
    state = bn.state_dict()
    found = {float(k) for k in (*np.unique(state["weight"]), *np.unique(state["bias"]) / 10, *state["running_mean"])}
    assert len(found) == 1, found
    seen.update(found)
"""
    assert run_script(HEAD + body + LOADER) == "[1.0, 2.0]"


def test_a_reference_loses_no_exchange():
    """What a layer's state is behind, without the layer's work between, so that threads meet in it all the time."""
    body = """
from bnfast._core import AtomicReference
reference, rounds = AtomicReference((0,)), 20_000
def count():
    for _ in range(rounds):
        reference.update(lambda found, more: (found[0] + more,), 1)
threads, errors = at_once([count] * 4)
for thread in threads:
    thread.join()
print(errors, reference.value[0])
"""
    assert run_script(HEAD + body) == "[] 80000"


# --- stopped, moved, ended -----------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="this system has no SIGSTOP")
@pytest.mark.parametrize("stops", short_and_long(20, 500))
def test_stopped_and_continued_in_the_middle_of_kernels(tmp_path, stops):
    body = """
rounds = 0
while not os.path.exists(sys.argv[1]):
    for i in range(len(CALLS) - 14, len(CALLS)):
        with bnfast.num_threads(3):
            assert digest(CALLS[i]()) == BITS[i], i
    rounds += 1
    if rounds == 1:
        print("begin", flush=True)
print("right")
"""
    flag = tmp_path / "end"
    command = [sys.executable, "-W", "error", "-c", HEAD + body, str(flag)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "begin\n", process.communicate()
        for i in range(stops):
            time.sleep(0.001 * (1 + i % 7))
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.001 * (i % 5))
            process.send_signal(signal.SIGCONT)
        flag.touch()
        output, errors = process.communicate(timeout=300)
    assert output == "right\n", errors


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity on this system")
@pytest.mark.parametrize("seconds", short_and_long(2.5, 30))
def test_the_affinity_may_change_between_calls_and_during_them(seconds):
    body = """
cpus, end, stop = sorted(os.sched_getaffinity(0)), time.monotonic() + float(sys.argv[1]), threading.Event()
def move():
    choose = random.Random(0)
    while not stop.is_set():
        for tid in map(int, os.listdir("/proc/self/task")):
            try:
                os.sched_setaffinity(tid, choose.sample(cpus, choose.randint(1, len(cpus))))
            except OSError: # it has ended
                pass
        time.sleep(0.001)
mover = threading.Thread(target=move)
mover.start()
while time.monotonic() < end:
    for i in range(len(CALLS) - 14, len(CALLS)):
        assert digest(CALLS[i]()) == BITS[i], i
stop.set()
mover.join()
for allowed in ([cpus[0]], cpus):
    os.sched_setaffinity(0, allowed)
    time.sleep(1.05)
    assert bnfast.get_num_threads() <= len(allowed), (allowed, bnfast.config()["threads_why"])
print("right")
"""
    assert run_script(HEAD + body, seconds, timeout=300 + 2 * seconds) == "right"


@pytest.mark.parametrize("runs", short_and_long(5, 200))
def test_the_interpreter_ends_while_daemon_threads_are_in_kernels(runs):
    body = """
import sys, threading
import numpy as np
import bnfast
bnfast.set_num_threads(2)
x = np.random.default_rng(0).standard_normal((64, 32, 32, 32)).astype(np.float32)
bn, started = bnfast.BatchNorm(32), threading.Semaphore(0)
def work():
    while True:
        bn(x)
        started.release()
        bnfast.moments(x)
for _ in range(4):
    threading.Thread(target=work, daemon=True).start()
for _ in range(4):
    started.acquire()
print("end")
"""
    for _ in range(runs):
        assert run_script(body) == "end"


# --- the suite itself ----------------------------------------------------------------------------------------


@pytest.mark.campaign
def test_the_suite_in_eight_threads_at_once():
    """pytest-run-parallel runs each test in 8 threads. Left out: tests that change the process (environment, warnings,
    tracing, standard output), and those that start processes or threads of their own."""
    pytest.importorskip("pytest_run_parallel", reason="pytest-run-parallel is not installed")
    names = ["test_functional", "statistics/test_moments", "gradients/test_gradients", "kernels/test_golden"]
    # CPython 3.11's ast.parse, which rewrites what Hypothesis imports late, is not thread-safe
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--assert=plain"]
    # doctest changes sys.stdout; where the reference takes the place of the kernels, it is for all threads
    command += ["--parallel-threads=8", "-k", "not docstrings and not reference_writes_into_out"]
    command += [str(TESTS / f"{name}.py") for name in names]
    run = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert run.returncode == 0, run.stdout[-4000:]


def test_the_instruction_set_may_change_while_threads_compute():
    """As the fixtures do: each call takes one set of kernels as a whole."""
    x = np.random.default_rng(0).standard_normal((16, 8, 40, 40)).astype(np.float32)
    names = [name for name, (_, supported) in _core.isas().items() if supported]
    before, expected, right, stop = _core.isa(), bnfast.moments(x), [], threading.Event()

    def work():
        while not stop.is_set():
            right.append(bnfast.moments(x) == expected)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for i in itertools.count():
            if (i >= 200 and len(right) >= 20) or not all(thread.is_alive() for thread in threads):
                break
            _core.select_isa(names[i % len(names)])
            time.sleep(0.0005)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        _core.select_isa(before)
    assert len(right) >= 20
    assert all(right)
