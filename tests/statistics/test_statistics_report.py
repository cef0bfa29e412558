"""Statistics at test time: the averages collected in training, the exact ones, how far apart they are, both at hand."""

import copy
import pickle

import numpy as np
import pytest
from scripts import run_script

import bnfast
from bnfast import BatchNorm, Moments, StateError, moments

CHANNELS = 3


def batches(n=5, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.normal([1.0, -20.0, 300.0], [0.5, 2.0, 40.0], (16, CHANNELS)) for _ in range(n)]


def both(**options):
    """A layer after training and calibration, its running statistics from before, and the exact ones."""
    bn = BatchNorm(CHANNELS, dtype=np.float64, **options)
    for x in batches():
        bn(x)
    running = shown(bn)
    with bn.calibrate():
        for x in batches(3, seed=1):
            bn(x)
    return bn, running, shown(bn)


def shown(bn):
    return bn.running_mean.tobytes(), bn.running_var.tobytes(), bn.num_batches_tracked


def state(bn):
    """All statistics there are."""
    averages, exact = bn._contents.value.averages, bn._contents.value.exact
    aside = None if averages is None else (averages.mean.tobytes(), averages.var.tobytes(), averages.batches)
    return shown(bn), exact, aside


# --- either at eval time, without losing the other -------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"unbiased_running_var": False}, {"momentum": None}])
def test_either_may_be_used_without_losing_the_other(options):
    bn, running, exact = both(**options)
    assert running != exact
    assert bn.statistics_in_use == "exact"
    x = batches(1, seed=2)[0]
    for _ in range(2):
        for which, expected in (("running", running), ("running", running), ("exact", exact), ("exact", exact)):
            assert bn.use_statistics(which) is bn
            assert bn.statistics_in_use == which
            assert shown(bn) == expected
            y = bnfast.functional.batch_norm_eval(x, bn.running_mean, bn.running_var, bn.gamma, bn.beta)
            np.testing.assert_array_equal(bn.eval()(x), y)
            bn.train()


def test_the_exact_ones_are_those_of_all_data():
    bn, _, _ = both()
    whole = moments(np.concatenate(batches(3, seed=1)))
    assert bn.exact_statistics.count == whole.count == 48
    np.testing.assert_allclose(bn.exact_statistics.mean, whole.mean, rtol=1e-14)
    np.testing.assert_allclose(bn.running_var, whole.var(ddof=1), rtol=1e-13)


def test_state_dict_holds_what_is_in_use_under_the_usual_keys():
    bn, running, exact = both()
    for which, (mean, var, n) in (("running", running), ("exact", exact)):
        saved = bn.use_statistics(which).state_dict()
        assert list(saved) == ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
        assert (saved["running_mean"].tobytes(), saved["running_var"].tobytes()) == (mean, var)
        assert saved["num_batches_tracked"] == n
        other = BatchNorm(CHANNELS, dtype=np.float64)
        other.load_state_dict(saved)
        assert shown(other) == shown(bn)
        assert (other.statistics_in_use, other.exact_statistics) == ("running", None)


def test_a_second_calibration_keeps_the_averages():
    bn, running, exact = both()
    with bn.calibrate():
        bn(batches(1, seed=7)[0])
    assert shown(bn) != exact
    assert shown(bn.use_statistics("running")) == running


@pytest.mark.parametrize("which", ["running", "exact"])
def test_training_goes_on_from_the_ones_in_use(which):
    bn, *_ = both()
    bn.use_statistics(which)
    expected, x = BatchNorm(CHANNELS, dtype=np.float64), batches(1, seed=3)[0]
    expected.load_state_dict(bn.state_dict())
    exact = bn.exact_statistics
    expected(x)
    bn(x)
    assert shown(bn) == shown(expected)
    assert bn.statistics_in_use == "running"
    assert bn.exact_statistics is exact  # for comparison, and to go back to
    assert bn.use_statistics("exact").running_mean.tobytes() == exact.mean.tobytes()
    assert shown(bn.use_statistics("running")) == shown(expected)


def test_setting_a_statistic_makes_running_ones():
    bn, _, (mean, var, n) = both()
    bn.running_mean = np.zeros(CHANNELS)
    assert bn.statistics_in_use == "running"
    assert shown(bn) == (np.zeros(CHANNELS).tobytes(), var, n)
    assert shown(bn.use_statistics("exact")) == (mean, var, n)


@pytest.mark.parametrize("forget", ["load_state_dict", "reset_running_stats", "reset_parameters"])
def test_load_and_reset_forget_both(forget):
    bn, *_ = both()
    arguments = [BatchNorm(CHANNELS, dtype=np.float64).state_dict()] if forget == "load_state_dict" else []
    getattr(bn, forget)(*arguments)
    assert state(bn) == state(BatchNorm(CHANNELS, dtype=np.float64))


def test_statistics_from_elsewhere():
    bn, running, _ = both()
    elsewhere = moments(batches(1, seed=9)[0])
    bn.use_statistics("running").use_statistics(elsewhere)
    assert bn.exact_statistics is elsewhere
    assert shown(bn) == (elsewhere.mean.tobytes(), elsewhere.var(ddof=1).tobytes(), running[2])
    assert shown(bn.use_statistics("running")) == running
    fresh = BatchNorm(CHANNELS).use_statistics(elsewhere)
    assert fresh.num_batches_tracked == 1  # a cumulative average does not forget them at once


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda bn: pickle.loads(pickle.dumps(bn))])
@pytest.mark.parametrize("which", ["running", "exact"])
def test_copies_have_both(how, which):
    bn, running, exact = both()
    again = how(bn.use_statistics(which))
    assert state(again) == state(bn)
    assert shown(again.use_statistics("running")) == running
    assert shown(again.use_statistics("exact")) == exact


def test_a_pickle_without_them_loads():
    bn, *_ = both()
    pickled = {key: value for key, value in bn.__getstate__().items() if key not in ("exact", "averages")}
    again = BatchNorm.__new__(BatchNorm)
    again.__setstate__(pickled)
    assert shown(again) == shown(bn)
    assert again.exact_statistics is None


@pytest.mark.parametrize(
    "damage",
    [
        {"exact": 1},
        {"exact": (None, 1)},
        {"exact": (Moments(4, [1.0], [1.0]), 1)},
        {"exact": (moments(batches()[0]), -1)},
        {"exact": None},  # what are the averages aside for?
        {"averaged": (np.zeros(3), np.full(3, -1.0), 0)},
        {"averaged": (np.zeros(2), np.ones(3), 0)},
        {"averaged": (np.zeros(3), np.ones(3), 0.5)},
    ],
)
def test_a_damaged_pickle_is_refused(damage):
    bn, *_ = both()
    again = BatchNorm.__new__(BatchNorm)
    with pytest.raises(StateError):
        again.__setstate__({**bn.__getstate__(), **damage})


@pytest.mark.parametrize(
    ("which", "error", "words"),
    [
        (
            "exact",
            RuntimeError,
            r"use_statistics: expected exact statistics, from calibrate\(\) or as Moments; got none",
        ),
        ("both", ValueError, "which: expected 'running', 'exact' or Moments, got 'both'"),
        (1, TypeError, "which: expected 'running', 'exact' or Moments, got int"),
        (Moments(9, [1.0], [1.0]), ValueError, "which: expected Moments of 3 channels, got 1"),
        (Moments(1, [1.0] * 3, [0.0] * 3), ValueError, "which: expected Moments of at least 2 values a channel, got 1"),
    ],
)
def test_use_statistics_refuses_what_it_cannot_use(which, error, words):
    bn = BatchNorm(CHANNELS)
    before = state(bn)
    with pytest.raises(error, match=words):
        bn.use_statistics(which)
    assert state(bn) == before


def test_a_layer_without_running_statistics_has_none_to_choose():
    bn = BatchNorm(CHANNELS, track_running_stats=False)
    for call in (lambda: bn.use_statistics("running"), bn.statistics_report):
        with pytest.raises(
            RuntimeError, match="expected a layer with running statistics, got track_running_stats=False"
        ):
            call()


def test_a_look_while_another_thread_switches_never_mixes_the_two():
    """A mean of one with a variance of the other would be seen in a state_dict."""
    import threading

    bn, running, exact = both()
    seen, stop = set(), threading.Event()

    def look():
        while not stop.is_set():
            saved = bn.state_dict()
            key = saved["running_mean"].tobytes(), saved["running_var"].tobytes(), int(saved["num_batches_tracked"])
            seen.add(key)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(2000):
        bn.use_statistics("running")
        bn.use_statistics("exact")
    stop.set()
    for thread in threads:
        thread.join()
    assert seen
    assert seen <= {running, exact}


# --- the report ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unbiased", [True, False])
def test_the_report_is_in_units_of_std(unbiased):
    bn = BatchNorm(CHANNELS, unbiased_running_var=unbiased, eps=1e-12)
    exact = Moments(10, [1.0, 2.0, 3.0], [90.0, 40.0, 10.0])
    var = exact.var(ddof=1 if unbiased else 0)
    bn.running_mean = exact.mean + np.sqrt(var) * [0.5, -2.0, 0.0]
    bn.running_var = var * np.square([1.0, 3.0, 0.1])
    report = bn.statistics_report(exact)
    np.testing.assert_allclose(report.mean_error, [0.5, -2.0, 0.0], rtol=1e-10)
    np.testing.assert_allclose(report.std_ratio, [1.0, 3.0, 0.1], rtol=1e-10)
    assert report.worst_channel == 2  # a tenth of the std is worse than a mean off by two of them: log(10) = 2.3
    lines = str(report).splitlines()
    assert lines == [
        "running statistics of 3 channels: mean off by up to 2 std, std 0.1 to 3 times the exact one",
        "channel  mean error / std  std ratio",
        "      2                 0        0.1",
        "      1                -2          3",
        "      0               0.5          1",
    ]
    assert repr(report) == str(report)
    assert report._repr_html_().startswith("<table><caption>running statistics of 3 channels")


def test_the_report_is_on_the_averages_whichever_are_in_use():
    bn, *_ = both()
    with_exact = bn.statistics_report()
    bn.use_statistics("running")
    report = bn.statistics_report()
    np.testing.assert_array_equal(with_exact.mean_error, report.mean_error)
    exact = bn.exact_statistics
    std = np.sqrt(exact.var(ddof=1) + bn.eps)
    np.testing.assert_allclose(report.mean_error, (bn.running_mean - exact.mean) / std, rtol=1e-12)
    assert np.abs(report.mean_error).max() > 0.5  # five batches with momentum 0.1 are still far from there
    other = bn.statistics_report(moments(batches(1, seed=9)[0]))
    assert not np.array_equal(other.mean_error, report.mean_error)


def test_the_report_shrinks_as_training_goes_on():
    bn, errors = BatchNorm(CHANNELS, dtype=np.float64), []
    exact = moments(np.concatenate(batches(60)))
    for x in batches(60):
        bn(x)
        errors.append(np.abs(bn.statistics_report(exact).mean_error).max())
    assert errors[0] > 5
    assert errors[-1] < 0.3


def test_a_report_of_many_channels_stays_short():
    bn = BatchNorm(1000)
    report = bn.statistics_report(moments(np.random.default_rng(0).normal(size=(50, 1000))))
    assert len(str(report).splitlines()) == 7
    assert str(report).splitlines()[2].split()[0] == str(report.worst_channel)


def test_a_constant_channel_and_nan():
    bn = BatchNorm(CHANNELS)
    bn.running_var = [0.0, 1.0, 1.0]
    report = bn.statistics_report(Moments(4, [0.0, np.nan, 0.0], [0.0, np.nan, 4.0]))
    assert (report.mean_error[0], report.std_ratio[0]) == (0, 1)
    assert report.worst_channel == 1
    assert "nan" in str(report)


def test_a_report_cannot_be_changed():
    report = both()[0].statistics_report()
    with pytest.raises(ValueError, match="read-only"):
        report.mean_error[0] = 1


@pytest.mark.parametrize(
    ("exact", "error", "words"),
    [
        (None, RuntimeError, "statistics_report: expected exact statistics"),
        (np.ones(3), TypeError, "exact: expected Moments, got ndarray"),
        (Moments(9, [1.0], [1.0]), ValueError, "exact: expected Moments of 3 channels, got 1"),
        (Moments(0, [0.0] * 3, [0.0] * 3), ValueError, "exact: expected Moments of at least 2 values a channel, got 0"),
    ],
)
def test_the_report_refuses_what_is_not_exact_statistics(exact, error, words):
    with pytest.raises(error, match=words):
        BatchNorm(CHANNELS).statistics_report(exact)


# --- exact statistics from several processes -------------------------------------------------------------------

PROCESSES = """
import multiprocessing, sys
import numpy as np, bnfast

def shard(i):
    return np.random.default_rng(i).normal([1.0, -20.0, 300.0], [0.5, 2.0, 40.0], (100 + 50 * i, 3))

def gather(bn_and_i):
    bn, i = bn_and_i
    with bn.calibrate():
        for x in np.array_split(shard(i), 3):
            bn(x)
    return bn.exact_statistics

if __name__ == "__main__":
    bn = bnfast.BatchNorm(3, dtype=np.float64)
    with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
        parts = pool.map(gather, [(bn, i) for i in range(4)])
    bn.use_statistics(sum(parts))
    whole = np.concatenate([shard(i) for i in range(4)])
    assert bn.exact_statistics.count == len(whole) == 700
    np.testing.assert_allclose(bn.running_mean, whole.mean(0), rtol=1e-13)
    np.testing.assert_allclose(bn.running_var, whole.var(0, ddof=1), rtol=1e-12)
    np.testing.assert_allclose(bn.eval()(whole).mean(0), 0, atol=1e-12)
    assert sum(parts[::-1]).count == 700
    print("merged")
"""


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_exact_statistics_of_several_processes_merge(tmp_path, method):
    assert run_script(PROCESSES, method, folder=tmp_path) == "merged"
