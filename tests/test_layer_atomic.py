"""What exceptions, interrupts, signal handlers and threads may leave of a layer: before or after, never between."""

import copy
import os
import pickle
import sys
import threading

import numpy as np
import pytest
from campaign import short_and_long
from interrupts import interrupted_at
from layers import CHANNELS, assert_close, batch, everything, in_threads, raw, statistics, trained
from scripts import run_script

import bnfast
from bnfast import BatchNorm, moments

# --- exceptions ----------------------------------------------------------------------------------------------


def calibration(bn, x):
    with bn.calibrate():
        bn(x)


def test_a_calibration_begins_anew():
    """What a block that failed has gathered does not count in the next one."""
    bn = BatchNorm(1, dtype=np.float64)
    again = bn.calibrate()
    with pytest.raises(ZeroDivisionError), again:
        bn(np.array([[100.0], [300.0]])) / (0 // 0)
    with again:
        bn(np.array([[1.0], [3.0]]))
    assert (bn.running_mean.tolist(), bn.running_var.tolist()) == ([2.0], [2.0])


def test_a_calibration_ends_with_its_object():
    """A signal handler may raise between `__enter__` and the block; then there is no `__exit__`."""
    bn = BatchNorm(1, dtype=np.float64)
    lost = bn.calibrate()
    lost.__enter__()
    bn(np.array([[100.0], [300.0]]))
    with pytest.raises(RuntimeError, match="already"), bn.calibrate():
        pass
    del lost
    with bn.calibrate():
        bn(np.array([[1.0], [3.0]]))
    assert bn.running_mean.tolist() == [2.0]


@pytest.mark.parametrize("keep", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_calibration_is_of_its_layer_alone(keep):
    with pytest.raises(TypeError):
        keep(BatchNorm(1).calibrate())


CORE, LAYER, STATE = bnfast.layer._core, bnfast.layer, bnfast.state.layer_state
FAILURES = {
    "forward": (CORE, "forward_of", lambda bn, x: bn.forward(x)),
    "eval": (CORE, "forward_of", lambda bn, x: bn.eval().forward(x)),
    "backward_kernel": (CORE, "backward_of", lambda bn, x: bn.backward(x)),
    "backward_commit": (CORE, "commit_backward", lambda bn, x: bn.backward(x)),
    "calibrate": (CORE, "forward_in_calibration", calibration),
    "calibrate_in_eval": (CORE, "forward_in_calibration", lambda bn, x: calibration(bn.eval(), x)),
    "calibrate_gathering": (LAYER, "gather", calibration),
    "load_state_dict": (STATE, "with_statistics", lambda bn, x: bn.load_state_dict(BatchNorm(CHANNELS).state_dict())),
    "reset_parameters": (LAYER, "with_statistics", lambda bn, x: bn.reset_parameters()),
}


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize(("owner", "function", "action"), FAILURES.values(), ids=FAILURES.keys())
def test_a_failure_inside_leaves_the_layer_as_it_was(monkeypatch, owner, function, action, error):
    def fail(*arguments, **named):
        raise error

    bn = trained()
    bn(batch(dtype=np.float32))  # a forward waits
    mode = bn.training
    before = everything(bn)
    with monkeypatch.context() as patch:
        patch.setattr(owner, function, fail)
        with pytest.raises(error):
            action(bn, batch(seed=1, dtype=np.float32))
    bn.train(mode)
    assert everything(bn) == before
    batches = bn.num_batches_tracked
    bn(batch(dtype=np.float32))
    assert bn.num_batches_tracked == batches + 1


def test_no_memory_leaves_the_layer_as_it_was():
    huge = np.broadcast_to(np.float32(1), (2**24, CHANNELS, 2**22))  # more than the address space holds
    for mode in (True, False):
        bn = trained().train(mode)
        before = everything(bn)
        with pytest.raises(MemoryError):
            bn(huge)
        assert everything(bn) == before


INTERRUPTED = {
    "forward": lambda bn, x: bn.forward(x),
    "forward_in_eval_mode": lambda bn, x: bn.eval()(x),
    "cumulative_forward": lambda bn, x: bn.forward(x),
    "backward": lambda bn, x: bn.backward(x),
    "calibrate": calibration,
    "calibrate_in_eval_mode": lambda bn, x: calibration(bn.eval(), x),
    "load_state_dict": lambda bn, x: bn.load_state_dict(BatchNorm(CHANNELS).state_dict()),
    "reset_parameters": lambda bn, x: bn.reset_parameters(),
    "reset_running_stats": lambda bn, x: bn.reset_running_stats(),
    "use_statistics": lambda bn, x: bn.use_statistics(moments(x)),
    "set_running_var": lambda bn, x: setattr(bn, "running_var", [1.0, 2.0, 3.0]),
}


@pytest.mark.skipif(sys.gettrace() is not None, reason="needs sys.settrace, which a debugger or coverage is using")
@pytest.mark.parametrize("name", INTERRUPTED)
def test_an_interrupt_anywhere_leaves_the_layer_before_or_after(name):
    action, x = INTERRUPTED[name], batch(seed=1, dtype=np.float32)
    options = {"momentum": None} if name == "cumulative_forward" else {}
    gradients = lambda bn: (raw(bn.grad_gamma), raw(bn.grad_beta))  # noqa: E731

    def made():
        bn = trained(**options)
        if name == "backward":
            bn(x)
        return bn

    before, after = made(), made()
    action(after, x)
    allowed = [(statistics(bn), gradients(bn)) for bn in (before, after)]
    if "calibrate" in name:  # a training forward inside hides the gradients, the end of the block sets the statistics
        allowed.append((statistics(before), (None, None)))
    point, interrupted, faults = 0, True, []
    while interrupted:
        point += 1
        bn = made()
        interrupted = interrupted_at(point, lambda bn=bn: action(bn, x), __file__.__ne__)
        if bn._calibration.value is not None:
            faults.append(f"point {point}: the layer thinks it is being calibrated")
        elif (statistics(bn), gradients(bn)) not in allowed:
            faults.append(f"point {point}: between before and after")
    assert point > 3
    assert not faults, faults


STORM = '''
import signal, sys, time
import numpy as np, bnfast

class Storm:
    """Raises KeyboardInterrupt wherever the main thread is, every 0.5 ms, while armed."""
    def __init__(self):
        self.armed, self.hits = False, 0
        signal.signal(signal.SIGALRM, self.strike)
    def strike(self, number, frame):
        if self.armed:
            self.armed = False
            self.hits += 1
            raise KeyboardInterrupt
    def run(self, action):
        try:
            self.armed = True
            action()
            self.armed = False
        except KeyboardInterrupt:
            pass

def state(bn):
    return bn.num_batches_tracked, bn.running_mean.tobytes(), bn.running_var.tobytes()

def torn(bn, expected):
    batches, mean, var = state(bn)
    return expected[batches] != (mean, var)

rng = np.random.default_rng(0)
small, large = rng.normal(5, 2, (16, 3)), np.tile(rng.normal(5, 2, (16, 3)), (2048, 1))  # large: lets go of the GIL
storm = Storm()
end, wanted, faults = time.monotonic() + float(sys.argv[2]), int(sys.argv[3]), 0
'''

TRAINING_STORM = (
    STORM
    + """
RESET = 500  # before the running statistics stop changing
layers = []
for x in (small, large):
    bn = bnfast.BatchNorm(3, momentum=0.01, dtype=np.float64)
    expected = {0: state(bn)[1:]}
    for _ in range(RESET + 1):
        bn(x)
        expected[bn.num_batches_tracked] = state(bn)[1:]
    assert len(set(expected.values())) == RESET + 2
    bn.reset_running_stats()
    layers.append((bn, x, expected))
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
while time.monotonic() < end or storm.hits < wanted:
    for bn, x, expected in layers:
        def step():
            bn(x)
            bn.backward(x)
        storm.run(step)
        faults += torn(bn, expected)
        step() # undisturbed, for on a slow machine the large layer would never get through one
        if bn.num_batches_tracked >= RESET:
            bn.reset_running_stats()
signal.setitimer(signal.ITIMER_REAL, 0)
print(storm.hits, faults)
"""
)

CALIBRATION_STORM = (
    STORM
    + """
bn = bnfast.BatchNorm(3, dtype=np.float64)
moments = bnfast.moments(small)
two = moments + moments
allowed = [(0, np.zeros(3).tobytes(), np.ones(3).tobytes()), (2, two.mean.tobytes(), two.var(ddof=1).tobytes())]
def calibrate():
    with bn.calibrate():
        bn(small)
        bn(small)
signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
while time.monotonic() < end or storm.hits < wanted:
    storm.run(calibrate)
    if bn._calibration.value is not None or state(bn) not in allowed:
        faults += 1
        bn = bnfast.BatchNorm(3, dtype=np.float64)
    bn.reset_running_stats()
signal.setitimer(signal.ITIMER_REAL, 0)
print(storm.hits, faults)
"""
)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX interval timers")
@pytest.mark.parametrize("length", short_and_long((1.5, 200), (60.0, 10_000)))
@pytest.mark.parametrize("script", [TRAINING_STORM, CALIBRATION_STORM], ids=["training", "calibrating"])
def test_a_storm_of_interrupts_never_tears_the_statistics(script, length, tmp_path):
    """For some seconds, and on until enough of them arrived."""
    seconds, wanted = length
    printed = run_script(script, "storm", seconds, wanted, timeout=300 + 4 * seconds, folder=tmp_path)
    hits, faults = map(int, printed.split())
    assert faults == 0, f"{faults} faults in {hits} interrupts"


SIGNAL_HANDLER = """
import faulthandler, signal
faulthandler.dump_traceback_later(250, exit=True)
import numpy as np, bnfast

x = np.random.default_rng(0).normal(5, 2, (16, 3))
bn, other, hits, steps = bnfast.BatchNorm(3), bnfast.BatchNorm(3), 0, 0
def handle(number, frame):
    global hits
    bn(x)
    other(x)
    other.load_state_dict(other.state_dict())
    bn.state_dict()
    hits += 1
    if hits < 500: # else it would never end where a step takes longer than that
        signal.setitimer(signal.ITIMER_REAL, 0.0003)
signal.signal(signal.SIGALRM, handle)
signal.setitimer(signal.ITIMER_REAL, 0.0003)
while hits < 500:
    bn(x)
    bn.backward(x)
    steps += 1
print(other.num_batches_tracked == hits, bn.num_batches_tracked == steps + hits)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs POSIX interval timers")
def test_a_signal_handler_may_use_a_layer_whatever_it_interrupts():
    """A handler that trains or saves runs in the main thread, between any two steps of what that was doing."""
    assert run_script(SIGNAL_HANDLER) == "True True"


# --- threads -------------------------------------------------------------------------------------------------


N_THREADS, N_CALLS = 8, 25


@pytest.mark.parametrize("n_rows", [8, 30_000], ids=["small", "large"])
def test_threads_that_train_one_layer_lose_no_batch(n_rows):
    bn = BatchNorm(CHANNELS, momentum=None, dtype=np.float64)
    batches = [batch(n_rows, seed=i, mean=float(i)) for i in range(N_THREADS)]

    def train(x):
        for _ in range(N_CALLS):
            bn(x)

    in_threads([lambda x=x: train(x) for x in batches])
    assert bn.num_batches_tracked == N_THREADS * N_CALLS
    assert_close(bn.running_mean, np.mean([x.mean(0) for x in batches], 0))
    assert_close(bn.running_var, np.mean([x.var(0, ddof=1) for x in batches], 0))


def test_threads_that_calibrate_one_layer_lose_no_batch():
    bn = BatchNorm(CHANNELS, dtype=np.float64)
    batches = [batch(seed=i, mean=float(i)) for i in range(N_THREADS * N_CALLS)]

    def pass_batches(i):
        for x in batches[i::N_THREADS]:
            bn(x)

    with bn.calibrate():
        in_threads([lambda i=i: pass_batches(i) for i in range(N_THREADS)])
    whole = np.concatenate(batches)
    assert bn.num_batches_tracked == len(batches)
    assert_close(bn.running_mean, whole.mean(0))
    assert_close(bn.running_var, whole.var(0, ddof=1))


def test_a_state_dict_taken_while_others_train_is_one_snapshot():
    bn, x, steps = BatchNorm(CHANNELS, momentum=0.01, dtype=np.float64), batch(), 400
    expected = {}
    for n in range(1, steps + 1):
        bn(x)
        expected[n] = raw(bn.running_mean), raw(bn.running_var)
    bn.reset_running_stats()
    done, seen = threading.Event(), []

    def train():
        for _ in range(steps):
            bn(x)
        done.set()

    def look():
        while not done.is_set():
            seen.append(bn.state_dict())

    in_threads([train, look, look])
    for state in seen:
        n = int(state["num_batches_tracked"])
        if n:
            assert (raw(state["running_mean"]), raw(state["running_var"])) == expected[n]


@pytest.mark.parametrize("call", ["forward", "backward"])
def test_an_interrupt_after_the_kernel_has_written_into_x_leaves_no_wrong_gradient(monkeypatch, call):
    """x is gone then, although the call did not take effect."""
    bn, x = BatchNorm(CHANNELS), batch(dtype=np.float32)
    dy = np.sin(x)
    bn(x)
    name = {"forward": "forward_of", "backward": "backward_of"}[call]
    kernel = getattr(bnfast.layer._core, name)

    def interrupted(*arguments):
        kernel(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bnfast.layer._core, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            getattr(bn, call)(x if call == "forward" else dy, out=x)
    with pytest.raises(RuntimeError, match=f"x is gone: the {call}'s out"):
        bn.backward(dy)


def test_a_calibration_that_fails_at_its_end_leaves_the_statistics(monkeypatch):
    layers, x = [BatchNorm(CHANNELS), BatchNorm(CHANNELS)], batch(dtype=np.float32)
    before = [statistics(bn) for bn in layers]
    for error in (MemoryError, KeyboardInterrupt):

        def fail(*arguments, error=error):
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(bnfast.statistics.running._core, "update_all", fail)
            with pytest.raises(error), bnfast.calibrate(layers):  # noqa: PT012
                for bn in layers:
                    bn(x)
        assert [statistics(bn) for bn in layers] == before


@pytest.mark.skipif(sys.gettrace() is not None, reason="needs sys.settrace, which a debugger or coverage is using")
def test_an_interrupt_anywhere_calibrates_all_layers_or_none():
    x = batch(dtype=np.float32)

    def calibrate(layers):
        with bnfast.calibrate(layers):
            for bn in layers:
                bn(x)

    after = [trained() for _ in range(3)]
    calibrate(after)
    allowed = [[statistics(trained())] * 3, [statistics(bn) for bn in after]]
    point, interrupted, seen = 0, True, set()
    while interrupted:
        point += 1
        layers = [trained() for _ in range(3)]
        interrupted = interrupted_at(point, lambda layers=layers: calibrate(layers), __file__.__ne__)
        seen.add(allowed.index([statistics(bn) for bn in layers]))
        assert all(bn._calibration.value is None for bn in layers)
    assert seen == {0, 1}
