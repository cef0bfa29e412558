"""`BatchNorm`: modes, running statistics, calibration, state, and what an exception may leave behind."""

import copy
import dis
import gc
import os
import pickle
import sys
import threading
import tracemalloc
import weakref

import numpy as np
import pytest
from campaign import short_and_long
from scripts import run_script

import bnfast
from bnfast import BatchNorm, StateError, moments

CHANNELS = 3
EPS = 1e-5


def batch(n_rows=8, seed=0, mean=5.0, std=2.0, dtype=np.float64, channels=CHANNELS):
    """(n_rows, channels), a different mean and spread in each channel."""
    values = np.random.default_rng(seed).normal(mean, std, (n_rows, channels))
    return (values * np.arange(1, channels + 1)).astype(dtype)


def trained(**options):
    """A layer that nothing is left at its default in: parameters, statistics, gradients."""
    bn = BatchNorm(CHANNELS, **options)
    if bn.gamma is not None:
        bn.gamma[:], bn.beta[:] = [0.5, 1.0, 2.0], [-1.0, 0.25, 3.0]
    x = batch(dtype=bn.dtype)
    bn(x)
    bn.backward(np.cos(x))
    return bn


def raw(array):
    return None if array is None else (array.dtype.str, array.shape, array.tobytes())


def statistics(bn):
    """Parameters and running statistics, bit for bit."""
    return raw(bn.gamma), raw(bn.beta), raw(bn.running_mean), raw(bn.running_var), bn.num_batches_tracked


def everything(bn):
    """All that a call could change, bit for bit, and which arrays the layer holds."""
    held = (bn.gamma, bn.beta, bn.grad_gamma, bn.grad_beta, bn._contents.value.forward)
    return statistics(bn), raw(bn.grad_gamma), raw(bn.grad_beta), bn.training, [id(thing) for thing in held]


def normalised(x, mean, var, gamma=1.0, beta=0.0):
    return gamma * (x - mean) / np.sqrt(var + EPS) + beta


# float64 throughout: some roundings of values of the order of 10
def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


# --- modes ---------------------------------------------------------------------------------------------------


def test_a_new_layer_is_in_training_mode_and_changes_nothing_in_eval_mode():
    bn = BatchNorm(CHANNELS, dtype=np.float64)
    assert bn.training is True
    assert (bn.gamma.tolist(), bn.beta.tolist()) == ([1.0] * CHANNELS, [0.0] * CHANNELS)
    assert (bn.running_mean.tolist(), bn.running_var.tolist()) == ([0.0] * CHANNELS, [1.0] * CHANNELS)
    assert bn.num_batches_tracked == 0
    assert_close(bn.eval()(batch()), normalised(batch(), 0.0, 1.0))


def test_train_and_eval_switch_the_mode_and_return_the_layer():
    bn = BatchNorm(CHANNELS)
    for call, mode in ((bn.eval, False), (bn.train, True), (lambda: bn.train(False), False)):
        assert call() is bn
        assert bn.training is mode


def test_training_normalises_with_the_statistics_of_the_batch():
    bn, x = trained(dtype=np.float64), batch(seed=1)
    assert_close(bn(x), normalised(x, x.mean(0), x.var(0), bn.gamma, bn.beta))


def test_eval_normalises_with_the_running_statistics_and_leaves_them():
    bn, x = trained(dtype=np.float64).eval(), batch(seed=1)
    before = statistics(bn)
    assert_close(bn(x), normalised(x, bn.running_mean, bn.running_var, bn.gamma, bn.beta))
    assert_close(bn(x[:1]), normalised(x[:1], bn.running_mean, bn.running_var, bn.gamma, bn.beta))
    assert statistics(bn) == before


def test_training_backward_flows_through_the_statistics():
    bn, x, dy = trained(dtype=np.float64), batch(seed=1), np.sin(batch(seed=2))
    bn(x)
    dx = bn.backward(dy)
    inv_std = 1 / np.sqrt(x.var(0) + EPS)
    x_hat = (x - x.mean(0)) * inv_std
    assert_close(bn.grad_beta, dy.sum(0))
    assert_close(bn.grad_gamma, (dy * x_hat).sum(0))
    assert_close(dx, bn.gamma * inv_std * (dy - dy.mean(0) - x_hat * (dy * x_hat).mean(0)))


def test_frozen_backward_takes_the_statistics_as_constants():
    bn, x, dy = trained(dtype=np.float64).eval(), batch(seed=1), np.sin(batch(seed=2))
    bn(x)
    inv_std = 1 / np.sqrt(bn.running_var + EPS)
    assert_close(bn.backward(dy), bn.gamma * inv_std * dy)
    assert_close(bn.grad_beta, dy.sum(0))
    assert_close(bn.grad_gamma, (dy * (x - bn.running_mean) * inv_std).sum(0))


def test_backward_belongs_to_the_mode_of_its_forward():
    bn, x, dy = trained(dtype=np.float64).eval(), batch(seed=1), np.sin(batch(seed=2))
    bn(x)
    frozen = bn.backward(dy)
    bn.train()
    np.testing.assert_array_equal(bn.backward(dy), frozen)


def test_backward_uses_the_statistics_of_its_forward():
    bn, x, dy = trained(dtype=np.float64).eval(), batch(seed=1), np.sin(batch(seed=2))
    bn(x)
    expected = bn.backward(dy)
    bn.running_var = bn.running_var * 100
    np.testing.assert_array_equal(bn.backward(dy), expected)


def test_backward_may_be_repeated():
    bn, x = trained(), batch(dtype=np.float32)
    bn(x)
    np.testing.assert_array_equal(bn.backward(x), bn.backward(x))


@pytest.mark.parametrize("shape_and_axis", [((4, 3), -1), ((3, 4), 0), ((4, 3, 5), 1), ((2, 4, 5, 3), -1)])
def test_axis_may_be_any(shape_and_axis):
    shape, axis = shape_and_axis
    bn, x = BatchNorm(3, axis=axis, dtype=np.float64), np.random.default_rng(0).normal(3.0, 2.0, shape)
    others = tuple(i for i in range(len(shape)) if i != axis % len(shape))
    mean, var = x.mean(others, keepdims=True), x.var(others, keepdims=True)
    assert_close(bn(x), normalised(x, mean, var))
    assert_close(bn.running_mean, 0.1 * mean.ravel())


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
    ("value", "error"), [([1.0], ValueError), ([[1.0] * 3], ValueError), ([1, 2, 3], TypeError), (None, TypeError)]
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


# --- without parameters, without statistics ------------------------------------------------------------------


def test_without_affine_there_are_no_parameters():
    bn, x = trained(affine=False, dtype=np.float64), batch(seed=1)
    assert bn.gamma is bn.beta is bn.grad_gamma is bn.grad_beta is None
    assert bn.parameters() == bn.gradients() == {}
    assert list(bn.state_dict()) == ["running_mean", "running_var", "num_batches_tracked"]
    assert_close(bn(x), normalised(x, x.mean(0), x.var(0)))
    with_ones = BatchNorm(CHANNELS, dtype=np.float64)
    with_ones(x)
    np.testing.assert_array_equal(bn.backward(np.sin(x)), with_ones.backward(np.sin(x)))
    bn.reset_parameters()
    assert statistics(bn) == statistics(BatchNorm(CHANNELS, affine=False))


def test_without_running_statistics_eval_normalises_with_the_batch():
    bn, x = trained(track_running_stats=False, dtype=np.float64), batch(seed=1)
    assert bn.running_mean is bn.running_var is None
    assert bn.num_batches_tracked == 0
    assert list(bn.state_dict()) == ["weight", "bias"]
    in_training = bn(x), bn.backward(np.sin(x))
    bn.eval()
    for found, expected in zip((bn(x), bn.backward(np.sin(x))), in_training, strict=True):
        np.testing.assert_array_equal(found, expected)
    for name in ("running_mean", "running_var"):
        with pytest.raises(AttributeError, match="track_running_stats=False"):
            setattr(bn, name, np.ones(CHANNELS))


# --- parameters and gradients --------------------------------------------------------------------------------


@pytest.mark.parametrize("layer_dtype", [np.float32, np.float64])
@pytest.mark.parametrize("data_dtype", [np.float32, np.float64])
def test_results_have_the_dtype_of_the_data_and_gradients_that_of_the_layer(layer_dtype, data_dtype):
    bn, x = BatchNorm(CHANNELS, dtype=layer_dtype), batch(dtype=data_dtype)
    for mode in (True, False):
        bn.train(mode)
        assert bn(x).dtype == data_dtype
        assert bn.backward(x).dtype == data_dtype
        assert (bn.gamma.dtype, bn.grad_gamma.dtype, bn.grad_beta.dtype) == (layer_dtype,) * 3


def test_parameters_are_the_layers_own_arrays_under_the_names_of_the_gradients():
    bn = BatchNorm(CHANNELS)
    assert bn.gradients() == {}
    assert bn.grad_gamma is bn.grad_beta is None
    bn.backward(bn(batch(dtype=np.float32)))
    assert list(bn.parameters()) == list(bn.gradients()) == ["gamma", "beta"]
    assert bn.parameters()["gamma"] is bn.gamma
    assert bn.parameters()["beta"] is bn.beta
    assert bn.gradients()["gamma"] is bn.grad_gamma
    assert bn.gradients()["beta"] is bn.grad_beta


@pytest.mark.parametrize("training", [True, False])
def test_an_optimisers_update_in_place_is_used_by_the_next_forward_and_backward(training):
    bn, x = BatchNorm(CHANNELS, dtype=np.float64), batch()
    parameters = bn.parameters()  # taken once, as optimisers do
    bn.train(training)
    bn.backward(np.sin(bn(x)))
    for name, gradient in bn.gradients().items():
        parameters[name] -= 0.1 * gradient
    mean, var = (x.mean(0), x.var(0)) if training else (bn.running_mean, bn.running_var)
    assert bn.gamma.tolist() != [1.0] * CHANNELS
    assert_close(bn(x), normalised(x, mean, var, parameters["gamma"], parameters["beta"]))
    ones = BatchNorm(CHANNELS, affine=False, dtype=np.float64)
    ones.running_mean, ones.running_var = bn.running_mean, bn.running_var
    ones.train(training)(x)
    assert_close(bn.backward(np.sin(x)), parameters["gamma"] * ones.backward(np.sin(x)))


def test_gradients_are_replaced_and_not_added_up():
    bn, x = BatchNorm(CHANNELS), batch(dtype=np.float32)
    bn(x)
    bn.backward(x)
    first, kept = raw(bn.grad_beta), bn.grad_beta
    bn.backward(x)
    assert raw(bn.grad_beta) == first
    bn.backward(2 * x)
    assert raw(kept) == first
    np.testing.assert_array_equal(bn.grad_beta, 2 * kept)


# --- x, its memory, and backward -----------------------------------------------------------------------------


def test_backward_before_forward_is_an_error():
    bn = BatchNorm(CHANNELS)
    with pytest.raises(RuntimeError, match="expected a forward"):
        bn.backward(batch())
    assert bn.grad_gamma is None


@pytest.mark.parametrize("training", [True, False])
def test_backward_after_forward_into_x_is_an_error(training):
    bn, x = trained().train(training), batch(dtype=np.float32)
    expected = trained().train(training)(x.copy())
    assert bn(x, out=x) is x
    np.testing.assert_array_equal(x, expected)
    before = everything(bn)
    with pytest.raises(RuntimeError, match="x is gone"):
        bn.backward(x)
    assert everything(bn) == before
    bn(batch(dtype=np.float32))
    bn.backward(x)


@pytest.mark.parametrize("training", [True, False])
def test_second_backward_after_one_into_x_is_an_error(training):
    bn, x, dy = trained().train(training), batch(dtype=np.float32), np.sin(batch(dtype=np.float32))
    bn(x)
    expected = bn.backward(dy)
    assert bn.backward(dy, out=x) is x
    np.testing.assert_array_equal(x, expected)
    before = everything(bn)
    with pytest.raises(RuntimeError, match="x is gone"):
        bn.backward(dy)
    assert everything(bn) == before


def test_backward_into_dy_can_be_repeated_with_another_dy():
    bn, x, dy = trained(), batch(dtype=np.float32), np.sin(batch(dtype=np.float32))
    bn(x)
    expected = bn.backward(dy.copy())
    assert bn.backward(dy, out=dy) is dy
    np.testing.assert_array_equal(dy, expected)
    bn.backward(x)


def test_backward_after_forward_into_a_part_of_x_is_an_error():
    bn, buffer = trained(), np.zeros((9, CHANNELS), np.float32)
    buffer[:8] = batch(dtype=np.float32)
    bn(buffer[:8], out=buffer[1:])
    with pytest.raises(RuntimeError, match="x is gone"):
        bn.backward(batch(dtype=np.float32))


def test_out_beside_x_in_one_buffer_leaves_x_for_backward():
    bn, other = trained(), trained()
    buffer, dy = np.zeros((8, 2 * CHANNELS), np.float32), np.sin(batch(dtype=np.float32))
    buffer[:, :CHANNELS] = batch(dtype=np.float32)
    x, y = buffer[:, :CHANNELS], buffer[:, CHANNELS:]
    assert not np.shares_memory(x, y)
    bn(x, out=y)
    other(x)
    np.testing.assert_array_equal(bn.backward(dy), other.backward(dy))


@pytest.mark.parametrize("view", [np.s_[:], np.s_[::2], np.s_[::-1]], ids=["dense", "with_gaps", "reversed"])
@pytest.mark.parametrize("training", [True, False])
def test_x_is_kept_by_reference_and_not_copied(view, training):
    """White box: what the layer keeps is in `_state.forward.x`."""
    bn, x = BatchNorm(CHANNELS).train(training), batch(16, dtype=np.float32)[view]
    bn(x)
    assert bn._state.value.forward.x is x


def test_x_is_let_go_by_the_next_forward():
    bn = BatchNorm(CHANNELS)
    x = batch(dtype=np.float32)
    gone = weakref.ref(x)
    bn(x)
    del x
    gc.collect()
    assert gone() is not None
    bn(batch(dtype=np.float32))
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("training", [True, False])
def test_training_needs_no_memory_but_that_of_its_results(training):
    bn, x = BatchNorm(CHANNELS).train(training), batch(100_000, dtype=np.float32)
    bn.backward(bn(x))
    tracemalloc.start()
    try:
        y = bn(x)
        dx = bn.backward(y)
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert used < y.nbytes + dx.nbytes + 20_000


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
def test_inside_calibrate_statistics_stay_and_the_layer_normalises_as_its_mode_says(training):
    bn, twin, x = trained().train(training), trained().train(training), batch(seed=1, dtype=np.float32)
    before = statistics(bn)
    expected = twin(x), twin.backward(np.sin(x))
    with bn.calibrate():
        np.testing.assert_array_equal(bn(x), expected[0])
        np.testing.assert_array_equal(bn.backward(np.sin(x)), expected[1])
        assert statistics(bn) == before
    assert statistics(bn) != before


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
        with pytest.raises(ValueError, match="more than 1 value"):
            bn(x[:1])
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


# --- state_dict ----------------------------------------------------------------------------------------------


def test_state_dict_has_pytorchs_names_and_copies():
    bn = trained()
    state = bn.state_dict()
    assert {name: (value.dtype, value.shape) for name, value in state.items()} == {
        "weight": (np.float32, (CHANNELS,)),
        "bias": (np.float32, (CHANNELS,)),
        "running_mean": (np.float64, (CHANNELS,)),
        "running_var": (np.float64, (CHANNELS,)),
        "num_batches_tracked": (np.int64, ()),
    }
    before = everything(bn)
    for value in state.values():
        value[...] = 77
    assert everything(bn) == before


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": np.float64}, {"affine": False}, {"track_running_stats": False}],
    ids=["usual", "float64", "no_parameters", "no_statistics"],
)
def test_state_dict_round_trip_is_exact(options):
    bn, other = trained(**options), BatchNorm(CHANNELS, **options)
    other.load_state_dict(bn.state_dict())
    assert statistics(other) == statistics(bn)
    x = batch(seed=4, dtype=np.float32)
    np.testing.assert_array_equal(other.eval()(x), bn.eval()(x))


def test_loading_copies_and_takes_lists():
    bn = BatchNorm(2)
    source = {"weight": np.array([2.0, 3.0]), "bias": [0.5, 1.5], "running_mean": [7.0, 8.0], "running_var": [1.0, 0.0]}
    bn.load_state_dict({**source, "num_batches_tracked": 5})
    source["weight"][:] = 99
    assert (bn.gamma.tolist(), bn.beta.tolist()) == ([2.0, 3.0], [0.5, 1.5])
    assert bn.gamma.dtype == np.float32
    assert (bn.running_mean.tolist(), bn.running_var.tolist()) == ([7.0, 8.0], [1.0, 0.0])
    assert bn.num_batches_tracked == 5


def test_loading_keeps_the_arrays_an_optimiser_holds():
    bn, other = BatchNorm(CHANNELS, dtype=np.float64), trained(dtype=np.float64)
    gamma, beta = bn.gamma, bn.beta
    bn.load_state_dict(other.state_dict())
    assert bn.gamma is gamma
    assert bn.beta is beta
    gamma += 1.0
    x = batch()
    assert_close(bn(x), normalised(x, x.mean(0), x.var(0), other.gamma + 1.0, other.beta))


def test_backward_after_loading_uses_the_new_gamma():
    bn, x = BatchNorm(CHANNELS, dtype=np.float64), batch()
    bn(x)
    dx = bn.backward(np.sin(x))
    bn.load_state_dict({**bn.state_dict(), "weight": np.full(CHANNELS, 2.0)})
    np.testing.assert_array_equal(bn.backward(np.sin(x)), 2 * dx)


class _RefusesToBeAnArray:
    def __array__(self, dtype=None, copy=None):
        raise LookupError("no array today")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": None}, ["weight", "floating", "object"]),
        ({"weight": [1, 2, 3]}, ["weight", "floating", "int64"]),
        ({"weight": [1j, 2j, 3j]}, ["weight", "floating", "complex128"]),
        ({"weight": [1.0, 2.0]}, ["weight", "(3,)", "(2,)"]),
        ({"weight": [[1.0, 2.0, 3.0]]}, ["weight", "(3,)", "(1, 3)"]),
        ({"weight": [1.0, -1e300, 3.0]}, ["weight", "float32 can hold", "-1e+300", "index 1"]),
        ({"bias": 1.0}, ["bias", "(3,)", "()"]),
        ({"bias": _RefusesToBeAnArray()}, ["bias", "no array today"]),
        ({"bias": [[1.0], [2.0, 3.0]]}, ["bias"]),
        ({"running_mean": ["a", "b", "c"]}, ["running_mean", "floating"]),
        ({"running_mean": [1.0] * 4}, ["running_mean", "(3,)", "(4,)"]),
        ({"running_var": [1.0, -1.0, 1.0]}, ["running_var", "at least 0"]),
        ({"running_var": [1.0, np.nan, 1.0]}, ["running_var", "at least 0"]),
        ({"num_batches_tracked": -1}, ["num_batches_tracked", "-1"]),
        ({"num_batches_tracked": 1.0}, ["num_batches_tracked", "1.0"]),
        ({"num_batches_tracked": [1, 2]}, ["num_batches_tracked", "[1, 2]"]),
        ({"num_batches_tracked": None}, ["num_batches_tracked", "None"]),
        ({"num_batches_tracked": True}, ["num_batches_tracked", "True"]),
        ({"num_batches_tracked": [[1], [2, 3]]}, ["num_batches_tracked"]),
        ({"num_batches_tracked": _RefusesToBeAnArray()}, ["num_batches_tracked"]),
        ({"num_batches_tracked": 2**63}, ["num_batches_tracked"]),  # would not fit into state_dict's int64
        ({"extra": 1.0}, ["unknown", "extra"]),
        ({7: 1.0}, ["unknown", "7"]),
    ],
)
def test_a_wrong_state_is_refused_and_the_layer_stays(change, words):
    bn = trained()
    gamma, before = bn.gamma, everything(bn)
    with pytest.raises(StateError) as caught:
        bn.load_state_dict({**BatchNorm(CHANNELS).state_dict(), **change})
    for word in words:
        assert word in str(caught.value)
    assert everything(bn) == before
    assert bn.gamma is gamma
    bn.state_dict()


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"])
def test_a_missing_key_is_refused_and_the_layer_stays(name):
    bn, state = trained(), BatchNorm(CHANNELS).state_dict()
    before = everything(bn)
    del state[name]
    with pytest.raises(StateError, match=f"missing.*{name}"):
        bn.load_state_dict(state)
    assert everything(bn) == before


@pytest.mark.parametrize("state", [None, [], "weight", 1])
def test_a_state_that_is_no_mapping_is_refused(state):
    with pytest.raises(StateError, match="mapping"):
        BatchNorm(CHANNELS).load_state_dict(state)


def test_the_keys_follow_the_layers_options():
    with pytest.raises(StateError, match=r"unknown.*bias"):
        BatchNorm(CHANNELS, affine=False).load_state_dict(trained().state_dict())
    with pytest.raises(StateError, match=r"unknown.*running_mean"):
        BatchNorm(CHANNELS, track_running_stats=False).load_state_dict(trained().state_dict())


@pytest.mark.parametrize("name", ["gamma", "beta"])
def test_an_array_set_as_a_parameter_is_kept_itself(name):
    """An optimiser may hold all parameters in one array, with views of it in the layers."""
    flat, bn, twin = np.linspace(1, 2, 2 * CHANNELS, dtype=np.float32), BatchNorm(CHANNELS), BatchNorm(CHANNELS)
    view = flat[1 : 1 + CHANNELS]
    setattr(bn, name, view)
    flat *= 3
    getattr(twin, name)[...] = view
    assert getattr(bn, name) is view
    x = np.arange(4.0 * CHANNELS, dtype=np.float32).reshape(4, CHANNELS)
    np.testing.assert_array_equal(bn(x), twin(x))


@pytest.mark.parametrize("name", ["gamma", "beta"])
@pytest.mark.parametrize(
    ("value", "error", "words"),
    [
        (np.ones(CHANNELS + 1, np.float32), ValueError, r"shape \(3,\), got \(4,\)"),
        (np.ones((CHANNELS, 1), np.float32), ValueError, r"shape \(3,\), got \(3, 1\)"),
        (np.ones(CHANNELS), TypeError, "float32, got dtype float64"),
        (np.ones(CHANNELS, ">f4"), TypeError, "float32, got dtype >f4"),
        (np.array([None, 1, 2]), TypeError, "float32, got dtype object"),
        ([1.0] * CHANNELS, TypeError, "float32, got list"),
        (None, TypeError, "float32, got NoneType"),
        (np.ma.masked_array(np.ones(CHANNELS, np.float32), [0, 1, 0]), TypeError, "without a mask"),
        (np.ones(2 * CHANNELS, np.float32)[::2], ValueError, "contiguous"),
        (np.broadcast_to(np.float32(1), CHANNELS), ValueError, "writeable"),
        (np.frombuffer(bytes(4 * CHANNELS), np.float32), ValueError, "writeable"),
    ],
)
def test_what_is_no_parameter_is_refused_when_it_is_set(name, value, error, words):
    bn = trained()
    before = everything(bn)
    with pytest.raises(error, match=f"{name}: .*{words}"):
        setattr(bn, name, value)
    assert everything(bn) == before


@pytest.mark.parametrize("value", ["no", 0, None])
def test_the_mode_is_a_bool(value):
    bn = trained()
    with pytest.raises(TypeError, match="training: expected a bool"):
        bn.training = value
    assert bn.training is True
    bn.training = False
    assert bn.train().training is True


@pytest.mark.parametrize("name", ["gamma", "beta"])
def test_a_layer_without_parameters_gets_none_later(name):
    bn = BatchNorm(CHANNELS, affine=False)
    with pytest.raises(AttributeError, match=f"{name}: .*affine=False"):
        setattr(bn, name, np.ones(CHANNELS, np.float32))
    assert getattr(bn, name) is None


def test_state_error_is_a_value_error():
    assert issubclass(StateError, ValueError)


def test_a_gamma_that_cannot_be_written_leaves_the_layer_as_it_was():
    bn = trained()
    bn.beta.flags.writeable = False
    before = everything(bn)
    for call in (lambda: bn.load_state_dict(BatchNorm(CHANNELS).state_dict()), bn.reset_parameters):
        with pytest.raises(ValueError, match="beta"):
            call()
        assert everything(bn) == before


def test_state_goes_to_pytorch_and_back():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: nothing to exchange states with")
    rng = np.random.default_rng(0)
    x = rng.normal(3.0, 2.0, (4, CHANNELS, 5, 6)).astype(np.float32)
    theirs = torch.nn.BatchNorm2d(CHANNELS)
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
        theirs.bias.copy_(torch.tensor([-1.0, 0.0, 1.0]))
    for _ in range(3):
        theirs(torch.from_numpy(rng.normal(3.0, 2.0, x.shape).astype(np.float32)))

    ours = BatchNorm(CHANNELS)
    ours.load_state_dict(theirs.state_dict())
    assert ours.num_batches_tracked == 3
    back = torch.nn.BatchNorm2d(CHANNELS)
    back.load_state_dict({name: torch.as_tensor(value) for name, value in ours.state_dict().items()})
    for name, value in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name

    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(x)).numpy()
        assert torch.equal(back.eval()(torch.from_numpy(x)), torch.from_numpy(expected))
    # PyTorch computes x * scale + shift in float32: a few roundings of values below 10
    np.testing.assert_allclose(ours.eval()(x), expected, rtol=0, atol=3e-6)


# --- pickle and copies ---------------------------------------------------------------------------------------


class Named(BatchNorm):
    """At module level, so that pickle finds it."""

    def __init__(self, label):
        super().__init__(CHANNELS, momentum=None, axis=-1, dtype=np.float64)
        self.label = label
        self.history = [1, 2]


def unpickled(protocol):
    return lambda bn: pickle.loads(pickle.dumps(bn, protocol))


WAYS = {f"pickle_{n}": unpickled(n) for n in range(2, 6)} | {"copy": copy.copy, "deepcopy": copy.deepcopy}
OPTIONS = {
    "usual": {},
    "none_usual": {
        "axis": -1, "eps": 1e-3, "momentum": None, "unbiased_running_var": False, "dtype": np.float64,
    },
    "no_parameters": {"affine": False},
    "no_statistics": {"track_running_stats": False},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("training", [True, False])
def test_a_copy_is_the_same_layer_bit_for_bit(way, options, training):
    bn = trained(**options).train(training)
    other = way(bn)
    assert type(other) is BatchNorm
    assert statistics(other) == statistics(bn)
    assert repr(other) == repr(bn)
    assert other.training is training
    x = batch(seed=5)
    np.testing.assert_array_equal(other(x), bn(x))
    assert statistics(other) == statistics(bn)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_copy_shares_nothing_that_changes(way):
    bn = trained()
    other = way(bn)
    before = everything(bn)
    for name in ("gamma", "beta", "running_mean", "running_var"):
        assert not np.shares_memory(getattr(bn, name), getattr(other, name))
        getattr(other, name)[:] = 9.0
    other(batch(seed=6, dtype=np.float32))
    assert everything(bn) == before


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_copy_has_no_forward_behind_it(way):
    other = way(trained())
    assert other.gradients() == {}
    with pytest.raises(RuntimeError, match="expected a forward"):
        other.backward(batch(dtype=np.float32))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_subclass_and_extra_attributes_survive(way):
    bn = Named("first")
    bn.added_later = {"a": 1}
    bn(batch())
    other = way(bn)
    assert type(other) is Named
    assert (other.label, other.history, other.added_later) == ("first", [1, 2], {"a": 1})
    assert statistics(other) == statistics(bn)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_layer_that_has_met_nan_can_still_be_copied(way):
    bn, x = trained(), batch(dtype=np.float32)
    x[0, 1] = np.nan
    bn(x)
    assert np.isnan(bn.running_var[1])
    assert statistics(way(bn)) == statistics(bn)


def tampered(change):
    state = trained().__getstate__()
    changed = change(state)
    return state if changed is None else changed


TAMPERINGS = {
    "nothing": lambda s: {},
    "none": lambda s: [],
    "no_attributes": lambda s: s.pop("attributes") and None,
    "no_state": lambda s: s.pop("state") and None,
    "attributes_a_list": lambda s: {**s, "attributes": [1, 2]},
    "state_none": lambda s: {**s, "state": None},
    "no_num_features": lambda s: s["attributes"].pop("num_features") and None,
    "no_eps": lambda s: s["attributes"].pop("eps") and None,
    "other_num_features": lambda s: s["attributes"].update(num_features=CHANNELS + 1),
    "num_features_a_string": lambda s: s["attributes"].update(num_features="3"),
    "num_features_zero": lambda s: s["attributes"].update(num_features=0),
    "num_features_too_large": lambda s: s["attributes"].update(num_features=2**62),
    "eps_negative": lambda s: s["attributes"].update(eps=-1.0),
    "eps_too_large": lambda s: s["attributes"].update(eps=10**400),
    "momentum_out_of_range": lambda s: s["attributes"].update(momentum=2.0),
    "dtype_int": lambda s: s["attributes"].update(dtype=np.dtype(int)),
    "dtype_unknown": lambda s: s["attributes"].update(dtype="no such"),
    "affine_changed": lambda s: s["attributes"].update(affine=False),
    "weight_too_long": lambda s: s["state"].update(weight=np.ones(CHANNELS + 1)),
    "weight_of_int": lambda s: s["state"].update(weight=np.ones(CHANNELS, int)),
    "var_negative": lambda s: s["state"].update(running_var=-np.ones(CHANNELS)),
    "batches_negative": lambda s: s["state"].update(num_batches_tracked=-1),
    "missing_key": lambda s: s["state"].pop("running_mean") is None or None,
    "extra_key": lambda s: s["state"].update(extra=1),
}


@pytest.mark.parametrize("change", TAMPERINGS.values(), ids=TAMPERINGS.keys())
def test_a_tampered_pickle_is_refused(change):
    state = tampered(change)
    with pytest.raises(StateError):
        BatchNorm.__new__(BatchNorm).__setstate__(state)


def test_an_untampered_pickle_is_accepted():
    bn = BatchNorm.__new__(BatchNorm)
    bn.__setstate__(tampered(lambda s: None))
    assert statistics(bn) == statistics(trained())


# --- repr ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "BatchNorm(3, axis=1, eps=1e-05, momentum=0.1)"),
        (
            {"axis": -1, "eps": 0.001, "momentum": None, "dtype": np.float64},
            "BatchNorm(3, axis=-1, eps=0.001, momentum=None, dtype=float64)",
        ),
        (
            {"affine": False, "track_running_stats": False, "unbiased_running_var": False},
            "BatchNorm(3, axis=1, eps=1e-05, momentum=0.1, affine=False, track_running_stats=False, "
            "unbiased_running_var=False)",
        ),
    ],
)
def test_repr_says_what_was_asked_for(options, expected):
    assert repr(BatchNorm(CHANNELS, **options)) == expected


def test_repr_names_the_subclass():
    assert repr(Named("a")).startswith("Named(3, ")


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
    "forward_kernel": (CORE, "forward_with_batch", lambda bn, x: bn(x)),
    "forward_commit": (CORE, "commit_training", lambda bn, x: bn(x)),
    "eval_kernel": (CORE, "forward_with_running", lambda bn, x: bn.eval()(x)),
    "eval_commit": (CORE, "commit_forward", lambda bn, x: bn.eval()(x)),
    "backward_kernel": (
        CORE,
        "backward_of",
        lambda bn, x: (bn._forward(x, None, False, CORE.KEEP_LAST), bn.backward(x)),
    ),
    "calibrate_in_training": (CORE, "forward_with_batch", calibration),
    "calibrate_in_eval": (CORE, "moments", lambda bn, x: calibration(bn.eval(), x)),
    "calibrate_at_its_end": (CORE, "update_all", calibration),
    "load_state_dict": (STATE, "with_statistics", lambda bn, x: bn.load_state_dict(BatchNorm(CHANNELS).state_dict())),
    "reset_parameters": (LAYER, "with_statistics", lambda bn, x: bn.reset_parameters()),
}


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize(("owner", "function", "action"), FAILURES.values(), ids=FAILURES.keys())
def test_a_failure_inside_leaves_the_layer_as_it_was(monkeypatch, owner, function, action, error):
    def fail(*arguments):
        raise error

    bn = trained()
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


def interrupted_at(point, action):
    """Runs `action` with a KeyboardInterrupt at the n-th point where CPython may run a signal handler.

    Those are the start of a Python function, the end of a call, and a jump backward. Returns whether there was such
    a point. Frames of this file do not count.
    """
    points, call_ended, code_bytes = 0, {}, {}

    def trace(frame, event, argument):
        nonlocal points
        if frame.f_code.co_filename == __file__:
            return None
        frame.f_trace_opcodes = True
        here = event == "call"
        if event == "opcode":
            here = call_ended.get(frame, False)
            code = code_bytes.setdefault(frame.f_code, frame.f_code.co_code)
            call_ended[frame] = dis.opname[code[frame.f_lasti]].startswith(("CALL", "JUMP_BACKWARD"))
        if here:
            points += 1
            if points == point:
                raise KeyboardInterrupt
        return trace

    previous = sys.gettrace()
    gc.disable()  # other packages' collection callbacks would swallow the interrupt
    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(previous)
        gc.enable()
        call_ended.clear()  # frames hold `trace`, and so themselves
    return False


INTERRUPTED = {
    "forward": lambda bn, x: bn(x),
    "forward_in_eval_mode": lambda bn, x: bn.eval()(x),
    "cumulative_forward": lambda bn, x: bn(x),
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
    before = trained(**options)
    after = trained(**options)
    action(after, x)
    allowed = [(statistics(bn), gradients(bn)) for bn in (before, after)]
    point, interrupted, faults = 0, True, []
    while interrupted:
        point += 1
        bn = trained(**options)
        interrupted = interrupted_at(point, lambda bn=bn: action(bn, x))
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


def in_threads(functions):
    """Runs the functions at once, one thread each; raises the first exception of any."""
    errors, start = [], threading.Barrier(len(functions))

    def run(function):
        try:
            start.wait(300)
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,), daemon=True) for function in functions]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
    finally:
        sys.setswitchinterval(interval)
    assert not any(thread.is_alive() for thread in threads), "hangs"
    if errors:
        raise errors[0]


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
    name = {"forward": "batch_norm", "backward": "batch_norm_backward"}[call]
    kernel = getattr(bnfast.layer._core, name)

    def interrupted(*arguments):
        kernel(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bnfast.layer._core, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            getattr(bn, call)(x if call == "forward" else dy, out=x)
    with pytest.raises(RuntimeError, match=f"interrupted {call}"):
        bn.backward(dy)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("track_running_stats", False),
        ("affine", False),
        ("num_features", 4),
        ("running_var", -np.ones(3)),
        ("unbiased_running_var", "no"),
    ],
)
@pytest.mark.parametrize("keep", [pickle.dumps, copy.copy, copy.deepcopy])
def test_what_could_not_be_restored_is_not_pickled(name, value, keep):
    """It is refused when it is written, not when it is too late."""
    bn = bnfast.BatchNorm(3)
    setattr(bn, name, value)
    with pytest.raises(bnfast.StateError, match="cannot be pickled or copied"):
        keep(bn)
