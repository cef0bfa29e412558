"""`BatchNorm`: modes, parameters and gradients, forwards and their backwards."""

import asyncio
import contextvars
import copy
import gc
import pickle
import sys
import threading
import time
import tracemalloc
import warnings
import weakref
from contextlib import nullcontext

import numpy as np
import pytest
from layers import CHANNELS, EPS, assert_close, batch, everything, in_threads, normalised, raw, statistics, trained
from tolerances import assert_same_bits

import bnfast
from bnfast import BatchNorm, moments
from bnfast import functional as F

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


@pytest.mark.parametrize("channels", [3, 1000])
def test_gradients_of_float32_parameters_are_rounded_to_float32_whatever_the_data_are(channels):
    rng = np.random.default_rng(0)
    x, dy = rng.normal(3.0, 2.0, (8, channels)), rng.normal(size=(8, channels))
    bn = BatchNorm(channels)
    bn(x)
    bn.backward(dy)
    _, mean, inv_std = F.batch_norm(x, bn.gamma, bn.beta)
    _, dgamma, dbeta = F.batch_norm_backward(dy, x, mean, inv_std, bn.gamma)
    assert dgamma.dtype == np.float64
    assert_same_bits(bn.grad_gamma, dgamma.astype(np.float32))
    assert_same_bits(bn.grad_beta, dbeta.astype(np.float32))


def test_backward_belongs_to_the_mode_of_its_forward():
    bn, x, dy = trained(dtype=np.float64).eval(), batch(seed=1), np.sin(batch(seed=2))
    bn(x)
    frozen = bn.backward(dy)
    bn(x)
    np.testing.assert_array_equal(bn.train().backward(dy), frozen)


@pytest.mark.parametrize("shape_and_axis", [((4, 3), -1), ((3, 4), 0), ((4, 3, 5), 1), ((2, 4, 5, 3), -1)])
def test_axis_may_be_any(shape_and_axis):
    shape, axis = shape_and_axis
    bn, x = BatchNorm(3, axis=axis, dtype=np.float64), np.random.default_rng(0).normal(3.0, 2.0, shape)
    others = tuple(i for i in range(len(shape)) if i != axis % len(shape))
    mean, var = x.mean(others, keepdims=True), x.var(others, keepdims=True)
    assert_close(bn(x), normalised(x, mean, var))
    assert_close(bn.running_mean, 0.1 * mean.ravel())


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
    for name in ("grad_gamma", "grad_beta"):
        with pytest.raises(AttributeError, match=f"{name}: .*affine=False"):
            setattr(bn, name, np.ones(CHANNELS))
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
    bn(x)
    bn.backward(x)
    assert raw(bn.grad_beta) == first
    bn(x)
    bn.backward(2 * x)
    assert raw(kept) == first
    np.testing.assert_array_equal(bn.grad_beta, 2 * kept)


def test_accumulated_gradients_are_the_sum_although_forwards_hide_them():
    bn, x, dy = BatchNorm(CHANNELS, dtype=np.float64), batch(), np.sin(batch(seed=2))
    parts = []
    for seed in range(3):
        bn(x + seed)
        bn.backward(dy * (seed + 1))
        parts.append((bn.grad_gamma, bn.grad_beta))
    bn.grad_gamma = bn.grad_beta = None
    for seed in range(3):
        bn(x + seed)
        assert bn.gradients() == {}
        bn.backward(dy * (seed + 1), accumulate=True)  # the first time there is nothing to add to
    gamma, beta = (parts[0][i] + parts[1][i] + parts[2][i] for i in range(2))
    assert (raw(bn.grad_gamma), raw(bn.grad_beta)) == (raw(gamma), raw(beta))
    bn(x)
    bn.backward(dy)  # without it they are replaced
    assert raw(bn.grad_beta) == raw(parts[0][1])


def test_stale_gradients_are_never_seen():
    """A skipped backward, a load or a reset leaves none to an optimiser."""
    bn, x = trained(), batch(dtype=np.float32)
    assert list(bn.gradients()) == ["gamma", "beta"]
    bn(x)
    assert bn.gradients() == {}
    assert bn.grad_gamma is bn.grad_beta is None
    bn.backward(x)
    for clear in (
        lambda: bn.load_state_dict(bn.state_dict()),
        bn.reset_parameters,
        bn.reset_running_stats,
        lambda: (setattr(bn, "grad_gamma", None), setattr(bn, "grad_beta", None)),
    ):
        bn(x)
        bn.backward(x)
        expected = raw(bn.grad_beta)
        clear()
        assert bn.gradients() == {}
        bn(x)
        bn.backward(x, accumulate=True)  # nothing is left to add to
        assert raw(bn.grad_beta) == expected


@pytest.mark.parametrize("forward", ["eval", "no_grad", "vjp", "update"])
def test_which_forwards_leave_gradients_alone(forward):
    bn, x = trained(), batch(dtype=np.float32)
    before = raw(bn.grad_gamma), raw(bn.grad_beta)
    if forward == "eval":
        bn.eval()(x)
    elif forward == "no_grad":
        with bnfast.no_grad():
            bn(x)
    elif forward == "vjp":
        bn.vjp(x)
    else:
        bn(x, update=False)  # a training forward like any other
        before = None, None
    assert (raw(bn.grad_gamma), raw(bn.grad_beta)) == before


def test_adding_to_a_gradient_in_place_works():
    bn, more = trained(), np.arange(CHANNELS, dtype=np.float32)
    expected = bn.grad_gamma + more
    bn.grad_gamma += more
    np.testing.assert_array_equal(bn.grad_gamma, expected)
    bn.grad_beta = [1, 2, 3]
    assert (bn.grad_beta.dtype, bn.grad_beta.tolist()) == (np.float32, [1.0, 2.0, 3.0])
    for wrong, error in ((np.ones(CHANNELS + 1), ValueError), ("no", TypeError), ([1j] * CHANNELS, TypeError)):
        with pytest.raises(error, match="grad_beta"):
            bn.grad_beta = wrong
    x = batch(dtype=np.float32)
    bn(x)
    bn.backward(np.zeros_like(x), accumulate=True)
    np.testing.assert_array_equal(bn.grad_gamma, expected)
    assert bn.grad_beta.tolist() == [1.0, 2.0, 3.0]


def test_gradients_of_a_float64_layer_are_not_rounded_to_the_data_first():
    """As dy = 3e38 in 500 rows."""
    bn, x = BatchNorm(1, dtype=np.float64), np.zeros((500, 1), np.float32)
    x[::2] = 1
    bn(x)
    bn.backward(np.full_like(x, 3e38))
    assert bn.grad_beta[0] == 500 * float(np.float32(3e38))


@pytest.mark.parametrize("affine", ["gamma", "beta"])
def test_one_parameter_without_the_other(affine):
    """Everything follows."""
    bn, x, dy = BatchNorm(CHANNELS, affine=affine, dtype=np.float64), batch(), np.sin(batch(seed=2))
    other = {"gamma": "beta", "beta": "gamma"}[affine]
    full = BatchNorm(CHANNELS, dtype=np.float64)
    for layer in (bn, full):
        getattr(layer, affine)[:] = [0.5, -1.0, 2.0]
    np.testing.assert_array_equal(bn(x), full(x))
    np.testing.assert_array_equal(bn.backward(dy), full.backward(dy))
    assert raw(getattr(bn, f"grad_{affine}")) == raw(getattr(full, f"grad_{affine}"))
    assert getattr(bn, other) is getattr(bn, f"grad_{other}") is None
    assert list(bn.parameters()) == list(bn.gradients()) == [affine]
    assert [name for name in bn.state_dict() if not name.startswith(("running", "num"))] == [
        {"gamma": "weight", "beta": "bias"}[affine]
    ]
    with pytest.raises(AttributeError, match=f"{other}: .*affine='{affine}'"):
        setattr(bn, other, np.ones(CHANNELS))
    assert repr(bn) == f"BatchNorm(3, axis=1, eps=1e-05, momentum=0.1, affine='{affine}', dtype=float64)"
    bn.reset_parameters()
    assert getattr(bn, affine).tolist() == ([1.0] * CHANNELS if affine == "gamma" else [0.0] * CHANNELS)


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
def test_a_backward_into_x_uses_it_up_for_pullbacks_too(training):
    bn, x, dy = trained().train(training), batch(dtype=np.float32), np.sin(batch(dtype=np.float32))
    _, pullback = bn.vjp(x)
    bn(x)
    expected = pullback(dy)
    assert bn.backward(dy, out=x) is x
    np.testing.assert_array_equal(x, expected)
    before = everything(bn)
    with pytest.raises(RuntimeError, match="x is gone: the backward's out"):
        pullback(dy)
    assert everything(bn) == before


def test_backward_into_dy_is_that_of_a_copy():
    bn, x, dy = trained(), batch(dtype=np.float32), np.sin(batch(dtype=np.float32))
    _, pullback = bn.vjp(x)
    expected = pullback(dy.copy())
    assert pullback(dy, out=dy) is dy
    np.testing.assert_array_equal(dy, expected)


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
    """White box: what the layer keeps is in `_contents.value.forward.x`, a view whose shape nobody else can change."""
    bn, x = BatchNorm(CHANNELS).train(training), batch(16, dtype=np.float32)[view]
    bn(x)
    kept = bn._contents.value.forward.x
    assert kept is not x
    assert (kept.__array_interface__, kept.strides) == (x.__array_interface__, x.strides)


@pytest.mark.parametrize("release", ["forward", "backward", "no_grad", "pullback"])
def test_x_is_let_go(release):
    """By the next forward, its backward, or never held at all; by the end of a pullback."""
    bn = BatchNorm(CHANNELS)
    x = batch(dtype=np.float32)
    gone, dy = weakref.ref(x), np.sin(x)
    pullback = None
    if release == "no_grad":
        with bnfast.no_grad():
            bn.eval()(x)
    elif release == "pullback":
        _, pullback = bn.vjp(x)
    else:
        bn(x)
    del x
    gc.collect()
    assert (gone() is None) == (release == "no_grad")
    if release == "forward":
        bn(batch(dtype=np.float32))
    elif release == "backward":
        bn.backward(dy)
    elif release == "pullback":
        pullback(dy)
        assert gone() is not None
        del pullback
        bn._living_forwards()
    gc.collect()
    assert gone() is None
    assert not bn._living


def test_inference_under_no_grad_keeps_no_memory():
    layers = [BatchNorm(CHANNELS).eval() for _ in range(20)]
    x = batch(50_000, dtype=np.float32)
    tracemalloc.start()
    try:
        with bnfast.no_grad():
            for bn in layers:
                x = bn(x)
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert used < 2 * x.nbytes


@pytest.mark.parametrize("training", [True, False])
def test_training_needs_no_memory_but_that_of_its_results(training):
    bn, x = BatchNorm(CHANNELS).train(training), batch(100_000, dtype=np.float32)
    bn.backward(bn(x))
    tracemalloc.start()
    try:
        y = bn(x)
        bn.backward(y)
        y = bn(x)
        dx = bn.backward(y)
        used = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert used < y.nbytes + dx.nbytes + 20_000


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
        ({"nonfinite": "skip"}, "BatchNorm(3, axis=1, eps=1e-05, momentum=0.1, nonfinite='skip')"),
    ],
)
def test_repr_says_what_was_asked_for(options, expected):
    assert repr(BatchNorm(CHANNELS, **options)) == expected


class Named(BatchNorm):
    """A subclass."""


def test_a_call_goes_through_a_forward_of_ones_own():
    class Doubled(bnfast.BatchNorm):
        def forward(self, x, out=None, *, update=True):
            return 2 * super().forward(x, out, update=update)

    class Another:
        def forward(self, x, out=None, *, update=True):
            return "another's"

    class Mixed(Another, bnfast.BatchNorm):
        pass

    x = np.random.default_rng(0).normal(size=(8, 3))
    plain, doubled, own = bnfast.BatchNorm(3), Doubled(3), bnfast.BatchNorm(3)
    y = plain(x)
    assert_same_bits(y, bnfast.BatchNorm(3).forward(x))
    assert_same_bits(doubled(x), 2 * y)
    assert_same_bits(doubled.running_mean, plain.running_mean)
    assert Mixed(3)(x) == "another's"
    own.forward = lambda x: -x  # as hooks do
    assert_same_bits(own(x), -x)


@pytest.mark.parametrize("how", ["plain", "no_grad", "calibrating", "eval", "update", "out"])
def test_a_call_is_its_forward(how):
    x = np.random.default_rng(0).normal(size=(8, 3))
    called, forwarded = bnfast.BatchNorm(3), bnfast.BatchNorm(3)
    for layer, forward in ((called, called), (forwarded, forwarded.forward)):
        more = {"update": {"update": False}, "out": {"out": np.empty_like(x)}}.get(how, {})
        layer.train(how != "eval")
        with bnfast.no_grad() if how == "no_grad" else layer.calibrate() if how == "calibrating" else nullcontext():
            layer.y = forward(x, **more)
    assert_same_bits(called.y, forwarded.y)
    assert_same_bits(called.running_mean, forwarded.running_mean)
    assert called.num_batches_tracked == forwarded.num_batches_tracked
    assert (called._contents.value.forward is None) == (forwarded._contents.value.forward is None) == (how == "no_grad")


def test_repr_names_the_subclass():
    assert repr(Named(3)).startswith("Named(3, ")


# --- one forward, one backward -------------------------------------------------------------------------------


def test_two_forwards_before_two_backwards():
    """A discriminator's real and generated batch."""
    real, fake, dy = batch(), batch(seed=1), np.sin(batch(seed=2))
    bn, twin = BatchNorm(CHANNELS, dtype=np.float64), BatchNorm(CHANNELS, dtype=np.float64)
    twin(fake)
    at_fake = twin.backward(dy)
    bn(fake)
    bn(real)
    bn.backward(dy)
    before = everything(bn)
    with pytest.raises(RuntimeError, match=r"whose backward has been called; vjp"):
        bn.backward(dy)
    assert everything(bn) == before
    _, back_fake = bn.vjp(fake)
    _, back_real = bn.vjp(real)
    back_real(dy)
    gamma_real, beta_real = bn.grad_gamma, bn.grad_beta
    for _ in range(2):  # in any order, any number of times
        np.testing.assert_array_equal(back_fake(dy), at_fake)
    assert (raw(bn.grad_gamma), raw(bn.grad_beta)) == (raw(twin.grad_gamma), raw(twin.grad_beta))
    back_real(dy, accumulate=True)
    np.testing.assert_array_equal(bn.grad_gamma, twin.grad_gamma + gamma_real)
    np.testing.assert_array_equal(bn.grad_beta, twin.grad_beta + beta_real)


def test_a_validation_pass_between_forward_and_backward():
    """Said, instead of a gradient that is not the loss's."""
    bn, x, other, dy = BatchNorm(CHANNELS), *(batch(seed=i, dtype=np.float32) for i in range(3))
    bn(x)
    bn.eval()(other)
    bn.eval()(other)
    bn.train()
    before = everything(bn)
    with pytest.raises(RuntimeError, match=r"eval mode took the place.*vjp"):
        bn.backward(dy)
    assert everything(bn) == before
    bn.eval().backward(dy)  # of a frozen layer, which is still in eval mode, it is what was asked for
    bn(other)
    bn.train().backward(dy)  # nothing was waiting
    bn(x)
    bn.eval()(other)
    bn.train()(x)
    bn.backward(dy)  # and a new forward is waiting


@pytest.mark.parametrize("training", [True, False])
def test_the_gradient_is_that_of_the_forward_that_was(training):
    """Whatever has changed in the layer since."""
    x, dy = batch(seed=1), np.sin(batch(seed=2))
    bn, twin = trained(dtype=np.float64).train(training), trained(dtype=np.float64).train(training)
    twin(x)
    expected = twin.backward(dy), raw(twin.grad_gamma), raw(twin.grad_beta)
    _, pullback = bn.vjp(x)
    bn(x)
    bn.gamma *= 3
    bn.beta = np.ones(CHANNELS)
    bn.eps = 0.5
    bn.momentum = 0.9
    bn.load_state_dict(BatchNorm(CHANNELS).state_dict())
    bn.running_var = [9.0, 9.0, 9.0]
    bn.use_statistics(moments(x))
    bn.reset_parameters()
    for backward in (bn.backward, pullback):
        np.testing.assert_array_equal(backward(dy), expected[0])
        assert (raw(bn.grad_gamma), raw(bn.grad_beta)) == expected[1:]


@pytest.mark.parametrize("give", ["dense", "strided", "channels_last"])
def test_x_that_was_changed_meanwhile_is_noticed(give):
    x = np.random.default_rng(0).normal(size=(8, CHANNELS, 6, 10))
    x = {"dense": x, "strided": x[:, :, ::2], "channels_last": x.transpose(0, 3, 1, 2)[:, :3]}[give]
    bn = BatchNorm(x.shape[1])
    for change in (lambda: np.multiply(x, 2, out=x), lambda: np.maximum(x, 0, out=x), lambda: x.fill(np.nan)):
        _, pullback = bn.vjp(x)
        pullback(x)  # nothing has changed
        bn(x)
        kept, dy = x.copy(), np.ones_like(x)
        change()
        for backward in (bn.backward, pullback):
            with pytest.raises(RuntimeError, match="x has changed since its forward"):
                backward(dy)
        x[...] = kept
        bn.backward(dy)  # it was x alone


@pytest.mark.filterwarnings("ignore:Setting the shape:DeprecationWarning")
@pytest.mark.parametrize("shape", [(CHANNELS, 8), (24, 1), (2, 12), (24,), (2, 4, CHANNELS)])
def test_x_may_be_reshaped_in_place(shape):
    bn, x, dy = BatchNorm(CHANNELS), batch(), np.sin(batch())
    bn(x)
    expected = bn.backward(dy)
    _, pullback = bn.vjp(x)
    bn(x)
    x.shape = shape
    for backward in (bn.backward, pullback):
        np.testing.assert_array_equal(backward(dy), expected)


class Reshapes:
    """Changes another array while it is converted."""

    def __init__(self, x, shape):
        self.x, self.shape = x, shape

    def __array__(self, dtype=None, copy=None):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            self.x.shape = self.shape
        return np.ones(self.shape)


@pytest.mark.filterwarnings("ignore:Setting the shape:DeprecationWarning")
def test_an_argument_that_reshapes_x_during_the_call_does_no_harm():
    x = np.random.default_rng(0).normal(size=(2000, 3, 1))
    bn = BatchNorm(3)
    bn(x)
    with pytest.raises(ValueError, match=r"dy: expected shape \(2000, 3, 1\)"):
        bn.backward(Reshapes(x, (3, 2000, 1)))
    x.shape = (2000, 3, 1)
    _, mean, inv_std = F.batch_norm(x)
    with pytest.raises((RuntimeError, ValueError), match="shape"):
        F.batch_norm_backward(Reshapes(x, (3, 2000, 1)), x, mean, inv_std)
    x.shape = (2000, 3, 1)
    with pytest.raises((RuntimeError, ValueError), match=r"shape|got"):
        F.batch_norm(x, Reshapes(x, (6000,)))


@pytest.mark.parametrize("place", [0, -1, "all"])
def test_the_ends_of_x_are_watched(place):
    for size in (1, 2, 15, 16, 17, 31, 32, 33, 1000):
        x = np.arange(2.0 * size).reshape(2, size)
        bn = BatchNorm(size)
        bn(x)
        x.reshape(-1)[slice(None) if place == "all" else place] += 1
        with pytest.raises(RuntimeError, match="x has changed"):
            bn.backward(x)


@pytest.mark.parametrize("shape", [(64, 3), (64, 32), (128, 64), (256, 20), (32, 16, 8, 8), (16, 1024)])
def test_a_change_of_an_eighth_of_the_channels_is_noticed(shape):
    """No row's length is in step with the sample."""
    for first in range(8):
        x = np.random.default_rng(0).normal(size=shape)
        bn = BatchNorm(shape[1])
        bn(x)
        x[:, first :: 8 if shape[1] >= 8 else shape[1]] += 1
        if first < shape[1]:
            with pytest.raises(RuntimeError, match="x has changed"):
                bn.backward(x)


@pytest.mark.parametrize("size", [4, 6, 10, 13, 15, 16, 31, 32])
def test_every_element_of_a_small_x_is_watched(size):
    for i in range(size):
        x = np.arange(1.0, size + 1).reshape(-1, 1)
        bn = BatchNorm(1)
        bn(x)
        x[i] += 1
        with pytest.raises(RuntimeError, match="x has changed"):
            bn.backward(x)


def test_an_out_into_the_x_of_a_living_forward_is_always_found():
    """However few elements: not by the sample."""
    bn, buffer = BatchNorm(CHANNELS), np.random.default_rng(0).normal(size=(4001, CHANNELS))
    x, part = buffer[:4000], buffer[1:3]  # elements 3 to 9 of x
    _, first = bn.vjp(x)
    bn(x)
    bn.vjp(batch(2), out=part)
    for backward in (first, bn.backward):
        with pytest.raises(RuntimeError, match="x is gone: the forward's out"):
            backward(x)


def test_a_pullback_shows_its_gradients_whatever_waits():
    bn, x = BatchNorm(CHANNELS), batch(dtype=np.float32)
    bn(x)
    _, pullback = bn.vjp(x)
    assert bn.gradients() == {}
    pullback(x)
    shown = raw(bn.grad_gamma), raw(bn.grad_beta)
    assert None not in shown
    bn.backward(x)
    assert (raw(bn.grad_gamma), raw(bn.grad_beta)) == shown


def test_a_training_forward_replaced_under_no_grad_and_in_eval_mode_is_not_forgotten():
    bn, x, v = BatchNorm(CHANNELS), batch(dtype=np.float32), batch(seed=1, dtype=np.float32)
    bn(x)
    with bnfast.no_grad():
        bn(v)
    bn.eval()(v)
    with pytest.raises(RuntimeError, match="eval mode took the place"):
        bn.train().backward(x)
    bn(x)
    bn.backward(x)


def test_vjp_into_x_is_refused_at_once():
    bn, x = trained(), batch(dtype=np.float32)
    before = everything(bn), raw(x)
    for out in (x, x[::-1]):
        with pytest.raises(ValueError, match="out: expected memory that is not x's"):
            bn.vjp(x, out=out)
    assert (everything(bn), raw(x)) == before
    y = np.empty_like(x)
    assert bn.vjp(x, y)[0] is y


def test_a_pullback_and_the_last_forward_do_not_touch_each_other():
    bn, x, other = BatchNorm(CHANNELS), batch(dtype=np.float32), batch(seed=1, dtype=np.float32)
    twin = BatchNorm(CHANNELS)
    twin(x)
    bn(x)
    _, pullback = bn.vjp(other)
    np.testing.assert_array_equal(bn.backward(x), twin.backward(x))
    with pytest.raises(RuntimeError, match="whose backward has been called"):
        bn.backward(x)
    pullback(x)
    assert repr(pullback) == f"<backward of a forward of (8, 3) through {bn!r}>"


@pytest.mark.parametrize(("bad", "error"), [((7, 3), ValueError), ("float64", TypeError)])
def test_a_backward_that_is_refused_leaves_the_forward_waiting(bad, error):
    bn, x = BatchNorm(CHANNELS), batch(dtype=np.float32)
    bn(x)
    before = everything(bn)
    with pytest.raises(error):
        bn.backward(np.ones(bad, np.float32) if isinstance(bad, tuple) else x.astype(bad))
    assert everything(bn) == before
    bn.backward(x)


def test_backward_belongs_to_one_of_two_threads():
    bn, x, outcomes = BatchNorm(CHANNELS), batch(40_000, dtype=np.float32), []

    def backward():
        try:
            bn.backward(x)
            outcomes.append("done")
        except RuntimeError as error:
            outcomes.append("refused" if "vjp" in str(error) else str(error))

    for _ in range(20):
        outcomes.clear()
        bn(x)
        in_threads([backward] * 4)
        assert sorted(outcomes) == ["done", "refused", "refused", "refused"]


def test_pullbacks_of_threads():
    bn, found = BatchNorm(CHANNELS, dtype=np.float64), {}
    batches = [batch(seed=i) for i in range(8)]
    expected = []
    for x in batches:
        bn(x)
        expected.append(bn.backward(np.sin(x)))

    def work(i):
        _, pullback = bn.vjp(batches[i])
        found[i] = [pullback(np.sin(batches[i])) for _ in range(20)]

    in_threads([lambda i=i: work(i) for i in range(8)])
    for i, results in found.items():
        for dx in results:
            np.testing.assert_array_equal(dx, expected[i])


# --- no_grad -------------------------------------------------------------------------------------------------


def test_there_is_no_backward_under_no_grad():
    bn, x = BatchNorm(CHANNELS), batch(dtype=np.float32)
    bn(x)
    with bnfast.no_grad():
        y = bn(x)  # it trains all the same
        assert bn.num_batches_tracked == 2
        _, pullback = bn.vjp(x)
    with pytest.raises(RuntimeError, match=r"a forward under no_grad; vjp"):
        bn.backward(y)
    pullback(y)
    bn(x)
    bn.backward(y)


def test_no_grad_nests_and_decorates():
    bn, x = BatchNorm(CHANNELS), batch(dtype=np.float32)

    def keeps():
        bn(x)
        return bn._contents.value.forward is not None

    guard = bnfast.no_grad()
    with guard:
        with guard:
            assert not keeps()
        assert not keeps()
    assert keeps()
    assert not bnfast.no_grad()(keeps)()
    with pytest.raises(ZeroDivisionError), bnfast.no_grad():
        1 / 0  # noqa: B018
    assert keeps()


def test_no_grad_decorates_functions_only():
    def generator():
        yield

    async def coroutine():
        pass

    async def both():
        yield

    for function in (generator, coroutine, both):
        with pytest.raises(TypeError, match="no_grad: expected a function"):
            bnfast.no_grad()(function)


def test_a_generator_that_is_closed_elsewhere_leaves_no_grad_as_it_is_there():
    bn, x = BatchNorm(CHANNELS), batch(dtype=np.float32)

    def inside():
        with bnfast.no_grad():
            yield

    generator = inside()
    contextvars.copy_context().run(next, generator)
    generator.close()
    bn(x)
    bn.backward(x)
    with bnfast.no_grad():
        bn(x)
    with pytest.raises(RuntimeError, match="under no_grad"):
        bn.backward(x)


def test_no_grad_is_of_its_context():
    """What Python's context variables do in threads and tasks."""

    def keeps():
        bn = BatchNorm(CHANNELS)
        bn(batch())
        return bn._contents.value.forward is not None

    async def inside():
        with bnfast.no_grad():
            await asyncio.sleep(0)
            child = asyncio.create_task(elsewhere())
            return keeps(), await child

    async def elsewhere():
        await asyncio.sleep(0)
        return keeps()

    async def both():
        return await asyncio.gather(inside(), elsewhere())

    assert asyncio.run(both()) == [(False, False), True]
    found = []
    with bnfast.no_grad():
        threading.Thread(target=lambda: found.append(keeps()), daemon=True).start()
        while not found:
            time.sleep(0.001)
        contextvars.copy_context().run(lambda: found.append(keeps()))
    assert found == [not getattr(sys.flags, "thread_inherit_context", 0), False]


# --- options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_features", 4), ("axis", -1), ("affine", False), ("track_running_stats", False),
        ("unbiased_running_var", False), ("nonfinite", "skip"), ("dtype", np.float64),
    ],
)  # fmt: skip
def test_options_are_fixed(name, value):
    bn = trained()
    before = everything(bn), getattr(bn, name)
    with pytest.raises(AttributeError, match=f"{name}: fixed when the layer was made"):
        setattr(bn, name, value)
    assert (everything(bn), getattr(bn, name)) == before


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("weight", "gamma"), ("bias", "beta"), ("epsilon", "eps"), ("moving_mean", "running_mean"),
        ("moving_variance", "running_var"),
    ],
)  # fmt: skip
def test_names_of_other_libraries_are_refused_with_the_right_one(theirs, ours):
    bn = trained()
    before = everything(bn)
    with pytest.raises(AttributeError, match=f"{theirs}: here this is {ours}"):
        setattr(bn, theirs, np.ones(CHANNELS))
    assert not hasattr(bn, theirs)
    assert everything(bn) == before
    bn.my_own = 3  # attributes of the user's own stay possible
    assert bn.my_own == 3


def test_options_cannot_be_deleted_nor_pullbacks_copied():
    bn = trained()
    with pytest.raises(AttributeError, match="axis: fixed when the layer was made"):
        del bn.axis
    for keep in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="a pullback belongs to one forward"):
            keep(bn.vjp(batch())[1])


def test_gamma_and_beta_do_not_share_memory():
    flat, bn = np.ones(2 * CHANNELS, np.float32), BatchNorm(CHANNELS)
    bn.gamma = flat[:CHANNELS]
    before = everything(bn)
    with pytest.raises(ValueError, match="beta: expected memory of its own"):
        bn.beta = flat[CHANNELS - 1 : 2 * CHANNELS - 1]
    assert everything(bn) == before
    bn.beta = flat[CHANNELS:]


def test_eps_and_momentum_belong_to_the_next_forward():
    bn, x = BatchNorm(CHANNELS, dtype=np.float64), batch()
    bn.eps = 2.0
    assert_close(bn(x), (x - x.mean(0)) / np.sqrt(x.var(0) + 2.0))
    for name, value, error in [
        ("eps", -1.0, ValueError), ("eps", np.nan, ValueError), ("eps", "small", TypeError),
        ("momentum", 1.5, ValueError), ("momentum", "all", TypeError),
    ]:  # fmt: skip
        with pytest.raises(error, match=name):
            setattr(bn, name, value)
    assert (bn.eps, bn.momentum) == (2.0, 0.1)


def test_eps_may_be_zero_in_eval_mode():
    bn = BatchNorm(2, eps=0, dtype=np.float64)
    bn.running_var = [4.0, 0.25]
    np.testing.assert_array_equal(bn.eval()(np.array([[2.0, 1.0]])), [[1.0, 2.0]])
    with pytest.raises(ValueError, match=r"eps: expected a positive number when training, got 0"):
        bn.train()(np.array([[2.0, 1.0], [1.0, 0.0]]))
    assert bn.num_batches_tracked == 0


def test_a_variance_slightly_below_zero_may_be_used_with_eps():
    """At x = 1, mean 0, var -9.9998e-6, eps 1.5e-5."""
    bn = BatchNorm(1, eps=1.5e-5, dtype=np.float64)
    bn.running_var = [-9.9998e-6]
    assert_close(bn.eval()(np.array([[1.0]])), [[1 / np.sqrt(5.0002e-6)]])
    bn.eps = 1e-6
    with pytest.raises(ValueError, match=r"running_var: expected finite .*-9.9998e-06 in channel 0"):
        bn(np.array([[1.0]]))


@pytest.mark.parametrize(
    ("option", "value", "error"),
    [
        ("affine", "both", ValueError), ("affine", 1, TypeError), ("affine", None, TypeError),
        ("nonfinite", "ignore", ValueError), ("nonfinite", None, TypeError), ("nonfinite", True, TypeError),
    ],
)  # fmt: skip
def test_a_choice_that_is_none_is_refused(option, value, error):
    with pytest.raises(error, match=f"{option}: expected .*got"):
        BatchNorm(3, **{option: value})


# --- out= ------------------------------------------------------------------------------------------------------------


def test_the_short_way_with_out(rng, monkeypatch):
    """`layer(x, out=y)` has no frame of Python's, and what is overwritten is told so."""
    x, other = rng.normal(size=(2, 20, 3)).astype(np.float32)
    bn = BatchNorm(3)
    _, pullback = bn.vjp(x)
    monkeypatch.setattr(BatchNorm, "_forward", None)  # the long way
    y = np.empty_like(x)
    assert bn(x, out=y) is y
    bn(other, out=x)
    with pytest.raises(RuntimeError, match="x is gone"):
        pullback(y)
    bn(other, out=other)
    with pytest.raises(RuntimeError, match="x is gone"):
        bn.backward(y)
