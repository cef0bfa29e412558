"""Running statistics of a layer, and calibration."""

import copy

import numpy as np
import pytest
from layers import CHANNELS, assert_close, batch, everything, raw, statistics, trained

import bnfast
from bnfast import BatchNorm, Moments, moments

# --- running statistics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.75, 1.0])
def test_exponential_statistics_by_hand(momentum, unbiased):
    bn = BatchNorm(1, momentum=momentum, unbiased_running_var=unbiased, dtype=np.float64)
    bn(np.array([[1.0], [3.0]]))  # mean 2, sum of squared deviations 2
    bn(np.array([[4.0], [5.0], [9.0], [10.0]]))  # mean 7, sum of squared deviations 26
    var_1, var_2 = (2 / 1, 26 / 3) if unbiased else (2 / 2, 26 / 4)
    kept = 1 - momentum
    assert_close(bn.running_mean, [kept * (kept * 0.0 + momentum * 2.0) + momentum * 7.0])
    assert_close(bn.running_var, [kept * (kept * 1.0 + momentum * var_1) + momentum * var_2])
    assert bn.num_batches_tracked == 2


@pytest.mark.parametrize("unbiased", [True, False])
def test_cumulative_statistics_are_the_average_of_all_batches(unbiased):
    bn = BatchNorm(1, momentum=None, unbiased_running_var=unbiased, dtype=np.float64)
    batches = [[1.0, 3.0], [4.0, 5.0, 9.0, 10.0], [7.0, 7.0, 7.0]]
    for values in batches:
        bn(np.array(values)[:, None])
    assert_close(bn.running_mean, [(2.0 + 7.0 + 7.0) / 3])
    assert_close(bn.running_var, [(2.0 + 26 / 3 + 0.0) / 3 if unbiased else (1.0 + 26 / 4 + 0.0) / 3])
    assert bn.num_batches_tracked == 3


def test_normalisation_itself_uses_the_population_variance():
    unbiased, population = BatchNorm(CHANNELS), BatchNorm(CHANNELS, unbiased_running_var=False)
    np.testing.assert_array_equal(unbiased(batch()), population(batch()))


def test_statistics_are_float64_whatever_the_data():
    bn = BatchNorm(CHANNELS)
    assert bn(batch(dtype=np.float32)).dtype == np.float32
    assert (bn.running_mean.dtype, bn.running_var.dtype) == (np.float64, np.float64)


def test_a_reference_to_running_statistics_is_a_snapshot():
    bn = trained()
    mean, var = bn.running_mean, bn.running_var
    before = raw(mean), raw(var)
    bn(batch(seed=1, dtype=np.float32))
    assert (raw(mean), raw(var)) == before
    assert raw(bn.running_mean) != before[0]


def test_running_statistics_can_be_set_and_are_copied():
    bn, mean, var = BatchNorm(2), np.array([1.0, 2.0], np.float32), [3.0, 4.0]
    bn.running_mean, bn.running_var = mean, var
    mean[:] = 99
    assert (bn.running_mean.tolist(), bn.running_var.tolist()) == ([1.0, 2.0], [3.0, 4.0])
    assert bn.running_mean.dtype == np.float64


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize(
    ("value", "error"),
    [([1.0], ValueError), ([[1.0] * 3], ValueError), (list("123"), TypeError), (None, TypeError)],
)
def test_wrong_running_statistics_are_refused(name, value, error):
    bn = trained()
    before = everything(bn)
    with pytest.raises(error, match=name):
        setattr(bn, name, value)
    assert everything(bn) == before


def test_resets():
    bn = trained()
    gamma, beta = bn.gamma, bn.beta
    bn.reset_running_stats()
    assert statistics(bn)[2:] == statistics(BatchNorm(CHANNELS))[2:]
    assert gamma.tolist() == [0.5, 1.0, 2.0]
    bn(batch(dtype=np.float32))
    bn.reset_parameters()
    assert statistics(bn) == statistics(BatchNorm(CHANNELS))
    assert bn.gamma is gamma
    assert bn.beta is beta


# --- calibrate -----------------------------------------------------------------------------------------------

UNEQUAL_BATCHES = [batch(n, seed=n, mean=1e4, std=1.0) for n in (1, 2, 3, 50, 7, 400)]


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_calibrate_gives_the_statistics_of_the_concatenated_data(training, unbiased):
    bn = trained(dtype=np.float64, unbiased_running_var=unbiased).train(training)
    batches = UNEQUAL_BATCHES[1:] if training else UNEQUAL_BATCHES  # training needs two values a channel
    with bn.calibrate() as entered:
        for x in batches:
            bn(x)
    whole = np.concatenate(batches)
    expected = moments(whole)
    assert entered is bn
    np.testing.assert_allclose(bn.running_mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(bn.running_var, expected.var(ddof=int(unbiased)), rtol=1e-12)
    np.testing.assert_allclose(bn.running_var, whole.astype(np.longdouble).var(0, ddof=int(unbiased)), rtol=1e-11)
    assert bn.num_batches_tracked == len(batches)
    assert bn.training is training


def test_calibrate_is_not_an_average_of_variances():
    bn = BatchNorm(1, dtype=np.float64, unbiased_running_var=False)
    with bn.calibrate():
        bn(np.array([[0.0], [2.0]]))
        bn(np.array([[10.0], [12.0]]))
    assert bn.running_var.tolist() == [26.0]  # the average would be 1


@pytest.mark.parametrize("training", [True, False])
def test_inside_calibrate_statistics_stay_and_the_layer_normalises_with_the_batch(training):
    bn, twin, x = trained().train(training), trained(), batch(seed=1, dtype=np.float32)
    before = statistics(bn)
    expected = twin(x), twin.backward(np.sin(x))
    with bn.calibrate():
        np.testing.assert_array_equal(bn(x), expected[0])
        np.testing.assert_array_equal(bn.backward(np.sin(x)), expected[1])
        assert statistics(bn) == before
    assert statistics(bn) != before
    assert bn.training is training


@pytest.mark.parametrize("training", [True, False])
def test_small_batches_inside_calibrate(training):
    """One value a channel is gathered and normalised with the statistics in use; an empty batch passes."""
    bn, x = trained(dtype=np.float64).train(training), batch(dtype=np.float64)
    expected = trained(dtype=np.float64).eval()(x[:1])
    with bn.calibrate():
        bn(x[1:])
        assert bn(x[:0]).shape == (0, CHANNELS)
        np.testing.assert_array_equal(bn(x[:1]), expected)
    assert bn.num_batches_tracked == 2
    assert_close(bn.running_mean, x.mean(0))
    assert_close(bn.running_var, x.var(0, ddof=1))


@pytest.mark.parametrize("rows", [1, 4])
def test_a_batch_is_gathered_as_it_was_where_out_is_x(rows):
    bn, x = BatchNorm(1, dtype=np.float64), np.arange(8.0).reshape(8, 1)
    bn.running_mean, bn.running_var = [100.0], [4.0]
    with bn.calibrate():
        for part in np.split(x.copy(), 8 // rows):
            bn(part, out=part)
    assert_close(bn.running_mean, x.mean(0))
    assert_close(bn.running_var, x.var(0, ddof=1))


def test_a_forward_that_began_before_a_calibration_loses_nothing_of_it(monkeypatch):
    """It commits inside the block, from another thread; here from inside its own step."""
    bn, x, forward_of = BatchNorm(1, dtype=np.float64), np.array([[100.0], [104.0]]), bnfast.layer._core.forward_of

    def slow(*arguments):
        with bn.calibrate():
            bn(x)
            found = forward_of(*arguments)
            bn(x - 100)
        return found

    monkeypatch.setattr(bnfast.layer._core, "forward_of", slow)
    bn.forward(x)
    assert (bn.running_mean.tolist(), bn.num_batches_tracked) == ([52.0], 2)


def test_what_one_calibration_gathered_is_not_of_the_next():
    bn, x = BatchNorm(1, dtype=np.float64), np.array([[100.0], [104.0]])
    again = bn.calibrate()
    with pytest.raises(ZeroDivisionError), again:  # noqa: PT012
        bn(x)
        1 / 0  # noqa: B018
    with pytest.raises(RuntimeError, match="at least 2 values"), again:
        pass


def test_a_calibration_entered_twice_goes_on_and_ends():
    bn, x = BatchNorm(1, dtype=np.float64), np.array([[1.0], [3.0]])
    twice = bn.calibrate()
    with twice:
        with pytest.raises(RuntimeError, match="calibrated already"):
            twice.__enter__()
        bn(x)
    assert bn.running_mean.tolist() == [2.0]
    calibrated_again = bn.calibrate()
    with calibrated_again:
        bn(x + 1)
    assert bn.running_mean.tolist() == [3.0]


def test_a_forward_in_eval_mode_inside_calibrate_leaves_gradients_alone():
    bn = trained().eval()
    before = raw(bn.grad_gamma)
    with bn.calibrate():
        bn(batch(dtype=np.float32))
    assert raw(bn.grad_gamma) == before is not None


def test_a_look_inside_calibrate_is_not_gathered():
    bn, x = BatchNorm(CHANNELS, dtype=np.float64), batch()
    with bn.calibrate():
        bn(x + 100, update=False)
        bn(x)
    assert_close(bn.running_mean, x.mean(0))


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_exception_inside_calibrate_leaves_the_statistics(error):
    def calibrate_and_fail():
        with bn.calibrate():
            bn(batch(dtype=np.float32))
            raise error

    bn = trained()
    before = statistics(bn)
    with pytest.raises(error):
        calibrate_and_fail()
    assert statistics(bn) == before
    bn(batch(dtype=np.float32))
    assert bn.num_batches_tracked == before[-1] + 1  # and it is over
    with bn.calibrate():
        bn(batch(4, seed=3, dtype=np.float32))
    np.testing.assert_allclose(bn.running_mean, batch(4, seed=3, dtype=np.float32).mean(0), rtol=1e-6)


def test_a_batch_that_is_refused_inside_calibrate_does_not_count():
    bn, x = BatchNorm(CHANNELS, dtype=np.float64), batch()
    with bn.calibrate():
        bn(x)
        with pytest.raises(ValueError, match="channels"):
            bn(batch(channels=4))
        with pytest.raises(TypeError, match="dtype"):
            bn(x.astype(complex))
    assert bn.num_batches_tracked == 1
    assert_close(bn.running_mean, x.mean(0))


def test_nested_calibrate_is_an_error_and_the_outer_one_goes_on():
    bn, x = BatchNorm(CHANNELS, dtype=np.float64), batch()
    with bn.calibrate():
        bn(x)
        with pytest.raises(RuntimeError, match="calibrated already"), bn.calibrate():
            pytest.fail("entered")
        bn(x)
    assert bn.num_batches_tracked == 2
    assert_close(bn.running_mean, x.mean(0))


def test_a_nested_calibrate_that_ends_the_outer_one_leaves_the_statistics():
    bn = trained()
    before = statistics(bn)
    with pytest.raises(RuntimeError, match="calibrated already"), bn.calibrate(), bn.calibrate():
        pytest.fail("entered")
    assert statistics(bn) == before


@pytest.mark.parametrize("rows", [None, 0, 1])
def test_calibrate_with_too_little_data_is_an_error(rows):
    def calibrate():
        with bn.calibrate():
            if rows is not None:
                bn(batch(rows, dtype=np.float32))

    bn = trained().eval()
    before = statistics(bn)
    with pytest.raises(RuntimeError, match="at least 2 values"):
        calibrate()
    assert statistics(bn) == before
    bn.train()(batch(dtype=np.float32))
    assert bn.num_batches_tracked == before[-1] + 1


def test_calibrate_without_running_statistics_is_an_error():
    bn = BatchNorm(CHANNELS, track_running_stats=False)
    with pytest.raises(RuntimeError, match="track_running_stats=False"), bn.calibrate():
        pytest.fail("entered")


def test_training_goes_on_from_calibrated_statistics():
    bn, x = BatchNorm(1, momentum=None, dtype=np.float64), np.array([[1.0], [3.0]])
    with bn.calibrate():
        for _ in range(3):
            bn(x)
    bn(x + 4)
    assert_close(bn.running_mean, [(3 * 2.0 + 6.0) / 4])


# --- several layers at once ----------------------------------------------------------------------------------


def network(depth=7, width=24):
    """Weights and layers of a deep network of arrays, some of whose running statistics are of other data."""
    rng = np.random.default_rng(0)
    weights = [rng.normal(0, 1.5 / np.sqrt(width), (width, width)) for _ in range(depth)]
    return weights, [BatchNorm(width, dtype=np.float64).eval() for _ in range(depth)]


def run(weights, layers, x):
    for w, bn in zip(weights, layers, strict=True):
        x = np.maximum(bn(x @ w), 0)
    return x


def test_calibrating_a_deep_network_gives_what_each_layer_will_see():
    """Each in its own block, in eval mode, layers would gather what the old statistics before them give."""
    weights, layers = network()
    batches = [np.random.default_rng(i).normal(3.0, 2.0, (64, 24)) for i in range(4)]
    with bnfast.calibrate(layers) as entered:
        for x in batches:
            run(weights, layers, x)
    assert entered == layers
    x = np.concatenate(batches)
    for w, bn in zip(weights, layers, strict=True):
        inputs = x @ w
        # the batches' own statistics vary around those of all data, the deeper the more
        error = np.abs(bn.running_mean - inputs.mean(0)) / inputs.std(0)
        ratio = bn.running_var / inputs.var(0)
        assert error.max() < 0.2
        assert 0.6 < ratio.min() <= ratio.max() < 1.6
        assert (bn.statistics_in_use, bn.num_batches_tracked) == ("exact", 4)
        x = np.maximum(bn(inputs), 0)
    again = [bn.running_mean for bn in layers]
    with bnfast.calibrate(dict(enumerate(layers))):
        for x in batches:
            run(weights, layers, x)
    for bn, mean in zip(layers, again, strict=True):  # it depends on the data alone
        np.testing.assert_array_equal(bn.running_mean, mean)


def test_calibrate_of_layers_commits_all_or_none():
    layers, x = [BatchNorm(CHANNELS, dtype=np.float64) for _ in range(3)], batch()
    before = [statistics(bn) for bn in layers]
    words = r"at least 2 values .*layer 1 of 3, BatchNorm"
    with pytest.raises(RuntimeError, match=words), bnfast.calibrate(layers):  # noqa: PT012
        layers[0](x)
        layers[2](x)
    assert [statistics(bn) for bn in layers] == before
    with pytest.raises(ZeroDivisionError), bnfast.calibrate(layers):  # noqa: PT012
        for bn in layers:
            bn(x)
        1 / 0  # noqa: B018
    assert [statistics(bn) for bn in layers] == before
    with bnfast.calibrate(layers):
        for bn in layers:
            bn(x)
    assert all(bn.statistics_in_use == "exact" for bn in layers)
    with bnfast.calibrate(layers) as entered:  # the list is the caller's
        for bn in entered:
            bn(x + 1)
        entered.clear()
    assert_close(layers[2].running_mean, x.mean(0) + 1)
    with bnfast.calibrate(layers[0]):  # one will do
        layers[0](x)
    assert_close(layers[0].running_mean, x.mean(0))


def test_calibrate_of_layers_refuses_what_it_cannot_do():
    a, b = BatchNorm(CHANNELS), BatchNorm(CHANNELS)
    bare = BatchNorm(CHANNELS, track_running_stats=False)
    for layers, error, words in [
        ([a, a], ValueError, "one of them twice"), ([], ValueError, "got none"), ([a, 3], TypeError, "got int"),
        ([a, bare], RuntimeError, "track_running_stats=False"), (3, TypeError, "int"),
    ]:  # fmt: skip
        with pytest.raises(error, match=words), bnfast.calibrate(layers):
            pytest.fail("entered")
    with b.calibrate():
        with pytest.raises(RuntimeError, match="calibrated already"), bnfast.calibrate([a, b]):
            pytest.fail("entered")
        b(batch())
    with a.calibrate():  # it was let go of
        a(batch())


# --- switches ------------------------------------------------------------------------------------------------


def test_a_look_changes_neither_statistics_nor_counts():
    """First a = (0, 2), the same once more without update, then b = a + 1: the mean of both is 3/2."""
    bn, a = BatchNorm(1, momentum=None, dtype=np.float64), np.array([[0.0], [2.0]])
    bn(a)
    before = statistics(bn)
    y = bn(a, update=False)
    np.testing.assert_array_equal(y, BatchNorm(1, dtype=np.float64)(a))
    assert statistics(bn) == before
    bn.backward(y)  # the record is as usual
    bn.vjp(a, update=False)
    assert statistics(bn) == before
    bn(a + 1)
    assert bn.running_mean.tolist() == [1.5]
    assert bn.num_batches_tracked == 2


def test_the_cumulative_average_weighs_by_what_it_averaged():
    """A batch of weight 0 counts as one that came by, as in PyTorch, and not as averaged."""
    bn, a = BatchNorm(1, momentum=None, dtype=np.float64), np.array([[0.0], [2.0]])
    bn(a)
    bn.momentum = 0
    bn(a + 100)
    bn(a + 100)
    bn.momentum = None
    bn(a + 1)
    assert (bn.running_mean.tolist(), bn.num_batches_tracked) == ([1.5], 4)
    bn(a + 3)
    assert_close(bn.running_mean, [(1 + 2 + 4) / 3])


NOT_FINITE = [np.nan, np.inf, -np.inf]


def spoilt(value, channel=1):
    x = batch(seed=9)
    x[2, channel] = value
    return x


@pytest.mark.parametrize("value", NOT_FINITE)
def test_weights_of_0_and_1_protect_by_themselves(value):
    bn = trained(momentum=0.0, dtype=np.float64)
    before = raw(bn.running_mean), raw(bn.running_var)
    bn(spoilt(value))
    assert (raw(bn.running_mean), raw(bn.running_var)) == before
    bn = trained(momentum=0.5, dtype=np.float64)
    bn(spoilt(value))
    assert not np.isfinite(bn.running_mean[1])
    bn.momentum = 1.0
    bn(batch())
    assert_close(bn.running_mean, batch().mean(0))
    assert_close(bn.running_var, batch().var(0, ddof=1))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("value", NOT_FINITE)
def test_skip_leaves_a_batch_out_where_it_is_not_finite(value, momentum):
    bn, usual = (BatchNorm(3, momentum=momentum, nonfinite=n, dtype=np.float64) for n in ("skip", "propagate"))
    twin = BatchNorm(3, momentum=momentum, dtype=np.float64)  # never sees the batch
    for layer in (bn, usual, twin):
        layer(batch())
    np.testing.assert_array_equal(bn(spoilt(value)), usual(spoilt(value)))
    assert bn.num_batches_skipped.tolist() == [0, 1, 0]
    for layer in (bn, usual, twin):
        layer(batch(seed=3))
    assert bn.num_batches_tracked == 3
    good = [0, 2]
    np.testing.assert_array_equal(bn.running_mean[good], usual.running_mean[good])
    np.testing.assert_array_equal(bn.running_var[good], usual.running_var[good])
    assert (bn.running_mean[1], bn.running_var[1]) == (twin.running_mean[1], twin.running_var[1])
    assert usual.num_batches_skipped.tolist() == [0, 0, 0]
    assert np.isfinite(bn.eval()(batch())).all()
    bn.reset_running_stats()
    assert bn.num_batches_skipped.tolist() == [0, 0, 0]


def test_a_variance_beyond_float64_is_not_finite():
    x = np.array([[1e200, 1.0], [-1e200, 2.0]])
    bn = BatchNorm(2, nonfinite="skip", dtype=np.float64)
    bn(x)
    assert bn.num_batches_skipped.tolist() == [1, 0]
    with pytest.raises(FloatingPointError, match="channel 0"):
        BatchNorm(2, nonfinite="raise", dtype=np.float64)(x)


def test_counts_of_what_was_skipped_belong_to_all_statistics():
    bn, x = BatchNorm(3, nonfinite="skip", dtype=np.float64), batch()
    for _ in range(2):
        with bn.calibrate():
            bn(x)
            bn(spoilt(np.nan))
    for which in ("running", "exact"):
        assert bn.use_statistics(which).num_batches_skipped.tolist() == [0, 2, 0]
    bn.running_mean = bn.running_mean + 1
    assert bn.num_batches_skipped.tolist() == [0, 2, 0]


def test_skip_in_a_calibration_leaves_out_the_whole_batch():
    bn, x = BatchNorm(3, nonfinite="skip", dtype=np.float64), batch()
    with bn.calibrate():
        bn(x)
        bn(spoilt(np.nan))
    assert_close(bn.running_mean, x.mean(0))
    assert (bn.num_batches_tracked, bn.num_batches_skipped.tolist()) == (1, [0, 1, 0])


@pytest.mark.parametrize("value", NOT_FINITE)
def test_raise_raises_before_anything_has_changed(value):
    bn = trained(nonfinite="raise", dtype=np.float64)
    before = everything(bn)
    for call in (bn, bn.vjp):
        with pytest.raises(FloatingPointError, match=r"x: expected a batch with finite statistics .* in channel 1"):
            call(spoilt(value))
        assert everything(bn) == before
    for mode in (True, False):
        for rows in (slice(None), slice(2, 3)):  # a batch of one value, too
            with pytest.raises(FloatingPointError), bn.train(mode).calibrate():
                bn(spoilt(value)[rows])
    with pytest.raises(RuntimeError, match="at least 2 values"), bn.calibrate():
        bn(spoilt(value), update=False)  # a look
    bare = BatchNorm(CHANNELS, track_running_stats=False, nonfinite="raise").eval()
    bare(spoilt(value))
    bn.eval()(spoilt(value))  # in training forwards only
    assert statistics(bn) == before[0]


def test_the_last_batch_is_there_to_look_at():
    bn, x = BatchNorm(CHANNELS, dtype=np.float64), batch()
    assert bn.batch_mean is bn.batch_var is None
    for forward in (bn, lambda x: bn(x, update=False), bn.vjp):
        forward(x)
        assert_close(bn.batch_mean, x.mean(0))
        assert_close(bn.batch_var, x.var(0))
        x = x + 1
    before = raw(bn.batch_mean)
    bn.eval()(x + 5)
    assert raw(bn.batch_mean) == before
    for layer in (bn, BatchNorm(3), copy.copy(bn), bn.use_statistics(moments(x))):
        layer.running_mean = layer.running_mean
        for name in ("batch_mean", "batch_var", "running_mean", "running_var"):
            if getattr(layer, name) is not None:
                with pytest.raises(ValueError, match="read-only"):
                    getattr(layer, name)[0] = 1.0


def test_exact_statistics_that_cannot_be_used_are_refused():
    bn = trained()
    before = everything(bn)
    for mean, m2 in (([np.nan, 0, 0], [1, 1, 1]), ([0, 0, 0], [np.inf, 1, 1])):
        with pytest.raises(ValueError, match="channel 0"):
            bn.use_statistics(Moments(4, mean, m2))
    with pytest.raises(ValueError, match="count"):
        bn.use_statistics(Moments(2**63, [0, 0, 0], [1, 1, 1]))
    assert everything(bn) == before


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
@pytest.mark.parametrize("value", NOT_FINITE)
def test_statistics_that_cannot_be_used_are_not_set(name, value):
    bn = trained()
    before = everything(bn)
    with pytest.raises(ValueError, match=f"{name}: expected finite values.* got {value} in channel 2"):
        setattr(bn, name, [1.0, 2.0, value])
    assert everything(bn) == before


def test_the_count_of_what_was_skipped_stays_at_its_end():
    bn, most = BatchNorm(CHANNELS, nonfinite="skip", dtype=np.float64), np.full(CHANNELS, 2**63 - 1)
    kept = {**bn.__getstate__(), "counts": (None, most)}
    bn.__setstate__(kept)
    bn(spoilt(np.nan))
    assert (bn.num_batches_skipped == most).all()
    with bn.calibrate():
        bn(spoilt(np.nan))
        bn(batch())
    assert (bn.num_batches_skipped == most).all()


def test_the_count_of_batches_stays_at_its_end():
    """An int64 in state dictionaries."""
    bn = BatchNorm(CHANNELS, momentum=None, nonfinite="skip")
    most = 2**63 - 1
    bn.load_state_dict({**bn.state_dict(), "num_batches_tracked": most})
    for x in (batch(), spoilt(np.nan), batch()):
        bn(x)
        assert bn.num_batches_tracked == most
        assert bn.state_dict()["num_batches_tracked"] == most
