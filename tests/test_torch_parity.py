"""The same values as PyTorch, which most users know: functions, layers, running statistics, gradients.

Tolerances are for PyTorch's rounding, not for ours (test_accuracy.py judges that against float64). In the data's
precision PyTorch computes y as x * scale + shift, with shift = beta - mean * scale, so its error grows with
|mean| / std: some eps * |gamma| * (1 + |x_hat| + |mean| / std) + eps * |beta|. It sums gradients in chains whose
length depends on the layout, so dx, dgamma and dbeta are compared relative to the sizes of what is added up.
"""

import os

import numpy as np
import pytest

from bnfast import BatchNorm
from bnfast import functional as F

if os.environ.get("BNFAST_REQUIRE_TORCH"):
    import torch  # one CI job has to have it: there a missing PyTorch is an error, not a skip
else:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: there is nothing to compare with")

EPS = 1e-5
ROUNDINGS = 8  # of y: 3 operations of PyTorch's, its rounded mean and inv_std; ours
GRADIENT_ROUNDINGS = 16  # of the mean size of a term: sums of some thousand terms, in lanes, and the map after them

SHAPES = {  # a module of PyTorch's, and shapes it takes
    "1d": (torch.nn.BatchNorm1d, [(64, 7), (16, 5, 33)]),
    "2d": (torch.nn.BatchNorm2d, [(8, 6, 9, 10), (2, 3, 1, 5), (32, 16, 7, 7)]),
    "3d": (torch.nn.BatchNorm3d, [(4, 5, 3, 6, 7)]),
}
CASES = [
    pytest.param(module, shape, id=f"{name}_{'x'.join(map(str, shape))}")
    for name, (module, shapes) in SHAPES.items()
    for shape in shapes
]
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])
LAYOUTS = pytest.mark.parametrize("layout", ["contiguous", "channels_last"])


def data(shape, dtype, layout="contiguous", seed=0):
    """Values with a different mean and spread in each channel, in the memory order `layout`."""
    rng = np.random.default_rng(seed)
    per_channel = (1, shape[1], *[1] * (len(shape) - 2))
    x = rng.normal(rng.uniform(-4, 4, per_channel), rng.uniform(0.5, 3, per_channel), shape).astype(dtype)
    if layout == "channels_last":
        x = np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1)
    return x


def parameters(channels, dtype):
    rng = np.random.default_rng(7)
    return rng.uniform(0.5, 2, channels).astype(dtype), rng.normal(size=channels).astype(dtype)


def to_torch(array):
    """A tensor on the same memory, of the same strides."""
    return torch.from_numpy(array)


def along(channel_values, x):
    return np.asarray(channel_values, np.float64).reshape(1, -1, *[1] * (x.ndim - 2))


def assert_y_agrees(ours, theirs, x, mean, inv_std, gamma, beta):
    theirs = theirs.detach().numpy()
    assert ours.dtype == theirs.dtype
    x_hat = (x.astype(np.float64) - along(mean, x)) * along(inv_std, x)
    beta = beta if np.ndim(beta) == x.ndim else along(beta, x)
    size = abs(along(gamma, x)) * (1 + abs(x_hat) + abs(along(mean * inv_std, x))) + abs(beta)
    allowed = ROUNDINGS * np.finfo(x.dtype).eps * size
    error = abs(ours.astype(np.float64) - theirs)
    assert (error <= allowed).all(), f"{(error / allowed).max():.3g} times what is allowed"


def assert_gradients_agree(ours, theirs, x, dy, mean, inv_std, gamma):
    """ours, theirs: (dx, dgamma, dbeta)"""
    others = tuple(i for i in range(x.ndim) if i != 1)
    count = x.size // x.shape[1]
    x_hat = (x.astype(np.float64) - along(mean, x)) * along(inv_std, x)
    # mean size of what is summed up; the mean's distance from zero costs PyTorch digits of x - mean
    typical = abs(dy * (1 + abs(x_hat) + abs(along(mean * inv_std, x)))).mean(others)
    allowed = GRADIENT_ROUNDINGS * np.finfo(x.dtype).eps
    limits = (
        allowed * along(np.abs(gamma) * inv_std * typical, x) * (1 + abs(x_hat)),
        allowed * typical * count,
        allowed * typical * count,
    )
    for name, one, other, limit in zip(("dx", "dgamma", "dbeta"), ours, theirs, limits, strict=True):
        other = other.detach().numpy()
        assert one.dtype == other.dtype, name
        error = abs(one.astype(np.float64) - other)
        assert (error <= limit).all(), f"{name}: {(error / limit).max():.3g} times what is allowed"


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(("module", "shape"), CASES)
def test_functions_agree_in_training(module, shape, affine, layout, dtype):
    x, dy = data(shape, dtype, layout), data(shape, dtype, layout, seed=1)
    gamma, beta = parameters(shape[1], dtype) if affine else (None, None)
    leaf = to_torch(x).clone().requires_grad_()
    weights = [to_torch(p.copy()).requires_grad_() for p in (gamma, beta)] if affine else [None, None]
    theirs = torch.nn.functional.batch_norm(leaf, None, None, *weights, training=True, eps=EPS)
    theirs.backward(to_torch(dy))

    y, mean, inv_std = F.batch_norm(x, gamma, beta, eps=EPS)
    dx, dgamma, dbeta = F.batch_norm_backward(dy, x, mean, inv_std, gamma)
    if not affine:
        gamma, beta = np.ones(shape[1]), np.zeros(shape[1])
    assert_y_agrees(y, theirs, x, mean, inv_std, gamma, beta)
    gradients = (leaf.grad, *(w.grad for w in weights)) if affine else (leaf.grad, to_torch(dgamma), to_torch(dbeta))
    assert_gradients_agree((dx, dgamma, dbeta), gradients, x, dy, mean, inv_std, gamma)


@DTYPES
@LAYOUTS
@pytest.mark.parametrize(("module", "shape"), CASES)
def test_functions_agree_in_eval(module, shape, layout, dtype):
    x, dy = data(shape, dtype, layout), data(shape, dtype, layout, seed=1)
    gamma, beta = parameters(shape[1], dtype)
    rng = np.random.default_rng(3)
    mean, var = rng.normal(size=shape[1]).astype(dtype), rng.uniform(0.5, 4, shape[1]).astype(dtype)
    leaf, weight, bias = (to_torch(a.copy()).requires_grad_() for a in (x, gamma, beta))
    theirs = torch.nn.functional.batch_norm(leaf, to_torch(mean), to_torch(var), weight, bias, training=False, eps=EPS)
    theirs.backward(to_torch(dy))

    inv_std = 1 / np.sqrt(var.astype(np.float64) + EPS)
    assert_y_agrees(F.batch_norm_eval(x, mean, var, gamma, beta, eps=EPS), theirs, x, mean, inv_std, gamma, beta)
    ours = F.batch_norm_backward(dy, x, mean, inv_std, gamma, training=False)
    assert_gradients_agree(ours, (leaf.grad, weight.grad, bias.grad), x, dy, mean, inv_std, gamma)


ACTIVATIONS = {
    "relu": torch.nn.functional.relu,
    "relu6": torch.nn.functional.relu6,
    "leaky_relu": lambda w: torch.nn.functional.leaky_relu(w, 0.2),
}


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("module", "shape"), CASES)
def test_batch_norm_then_addition_then_activation_agree(module, shape, training, activation, layout, dtype):
    """Forward and backward, for dy that is 0 where rounding may choose the side of a kink."""
    x, residual, dy = (data(shape, dtype, layout, seed) for seed in (0, 1, 2))
    gamma, beta = parameters(shape[1], dtype)
    mean, var = (gamma - beta).astype(dtype), (gamma * gamma).astype(dtype)  # running ones, in eval
    options = {"residual": residual, "activation": activation, "negative_slope": 0.2}
    if training:
        y, mean, inv_std = F.batch_norm(x, gamma, beta, **options)
        plain = F.batch_norm(x, gamma, beta)[0]
    else:
        y, inv_std = F.batch_norm_eval(x, mean, var, gamma, beta, **options), 1 / np.sqrt(var.astype(np.float64) + EPS)
        plain = F.batch_norm_eval(x, mean, var, gamma, beta)
    met = plain.astype(np.float64) + residual
    near = np.minimum(abs(met), abs(met - 6)) < 1e-3
    assert near.mean() < 0.01
    dy[near] = 0

    leaves = [to_torch(a.copy()).requires_grad_() for a in (x, gamma, beta, residual)]
    running = (None, None) if training else (to_torch(mean.astype(dtype)), to_torch(var))
    theirs = torch.nn.functional.batch_norm(leaves[0], *running, *leaves[1:3], training=training, eps=EPS)
    theirs = ACTIVATIONS[activation](theirs + leaves[3])
    theirs.backward(to_torch(dy))
    # no activation is steeper than 1; the sum is rounded like another beta
    assert_y_agrees(y, theirs, x, mean, inv_std, gamma, abs(along(beta, x)) + abs(residual))
    dx, dgamma, dbeta, dresidual = F.batch_norm_backward(
        dy, x, mean, inv_std, gamma, beta=beta, training=training, **options
    )
    np.testing.assert_array_equal(dresidual, leaves[3].grad.numpy())
    gradients = (leaf.grad for leaf in leaves[:3])
    assert_gradients_agree((dx, dgamma, dbeta), gradients, x, dy, mean, inv_std, gamma)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_agree_at_their_kinks(activation):
    values = np.array([-np.inf, -1, -0.0, 0.0, 1, 6, np.nextafter(6, 7), np.inf])
    residual = values.reshape(-1, 1)
    x, zero, one = np.zeros_like(residual), np.zeros(1), np.ones(1)
    options = {"residual": residual, "activation": activation, "negative_slope": 0.2}
    leaf = to_torch(values.copy()).requires_grad_()
    theirs = ACTIVATIONS[activation](leaf)
    theirs.backward(torch.ones_like(leaf))
    np.testing.assert_array_equal(F.batch_norm_eval(x, zero, one, **options).ravel(), theirs.detach().numpy())
    *_, dresidual = F.batch_norm_backward(np.ones_like(x), x, zero, one, training=False, **options)
    np.testing.assert_array_equal(dresidual.ravel(), leaf.grad.numpy())


@DTYPES
@LAYOUTS
@pytest.mark.parametrize("momentum", [0.1, 0.75, None])
@pytest.mark.parametrize(("module", "shape"), CASES)
def test_layers_agree_over_several_steps_of_training_and_in_eval(module, shape, momentum, layout, dtype):
    channels = shape[1]
    theirs = module(channels, eps=EPS, momentum=momentum, dtype=torch.from_numpy(np.empty(0, dtype)).dtype)
    ours = BatchNorm(channels, eps=EPS, momentum=momentum, dtype=dtype)
    for step in range(3):
        x, dy = data(shape, dtype, layout, seed=10 + step), data(shape, dtype, layout, seed=20 + step)
        leaf = to_torch(x).clone().requires_grad_()
        expected = theirs(leaf)
        theirs.zero_grad()
        expected.backward(to_torch(dy))
        y, dx = ours(x), ours.backward(dy)
        mean, inv_std = ours.batch_mean, 1 / np.sqrt(ours.batch_var + EPS)
        assert_y_agrees(y, expected, x, mean, inv_std, ours.gamma, ours.beta)
        assert_gradients_agree(
            (dx, ours.grad_gamma, ours.grad_beta), (leaf.grad, theirs.weight.grad, theirs.bias.grad),
            x, dy, mean, inv_std, ours.gamma,
        )  # fmt: skip
        # the same step of an optimiser, from the same numbers
        ours.gamma -= dtype(0.01) * ours.grad_gamma
        ours.beta -= dtype(0.01) * ours.grad_beta
        with torch.no_grad():
            theirs.weight.copy_(to_torch(ours.gamma))
            theirs.bias.copy_(to_torch(ours.beta))
        # PyTorch keeps them in the layer's dtype: one rounding a step, of values up to 10
        rounding = {"rtol": 8 * np.finfo(dtype).eps, "atol": 32 * np.finfo(dtype).eps}
        np.testing.assert_allclose(ours.running_mean, theirs.running_mean.numpy(), **rounding)
        np.testing.assert_allclose(ours.running_var, theirs.running_var.numpy(), **rounding)
        assert ours.num_batches_tracked == int(theirs.num_batches_tracked) == step + 1

    ours.load_state_dict(theirs.eval().state_dict())
    x, dy = data(shape, dtype, layout, seed=99), data(shape, dtype, layout, seed=98)
    leaf = to_torch(x).clone().requires_grad_()
    expected = theirs(leaf)
    theirs.zero_grad()
    expected.backward(to_torch(dy))
    y, dx = ours.eval()(x), ours.backward(dy)
    mean, inv_std = ours.running_mean, 1 / np.sqrt(ours.running_var + EPS)
    assert_y_agrees(y, expected, x, mean, inv_std, ours.gamma, ours.beta)
    assert_gradients_agree(
        (dx, ours.grad_gamma, ours.grad_beta), (leaf.grad, theirs.weight.grad, theirs.bias.grad),
        x, dy, mean, inv_std, ours.gamma,
    )  # fmt: skip


def test_layers_without_parameters_or_statistics_agree():
    x = data((8, 3, 5, 5), np.float64)
    for options in ({"affine": False}, {"track_running_stats": False}, {"affine": False, "track_running_stats": False}):
        theirs = torch.nn.BatchNorm2d(3, dtype=torch.float64, **options)
        ours = BatchNorm(3, dtype=np.float64, **options)
        for training in (True, False):
            expected = theirs.train(training)(to_torch(x)).detach().numpy()
            np.testing.assert_allclose(ours.train(training)(x), expected, rtol=0, atol=1e-13)
        assert sorted(ours.state_dict()) == sorted(theirs.state_dict())


def test_a_batch_of_one_value_a_channel_is_refused_in_the_same_words():
    x = np.ones((1, 3, 1, 1), np.float32)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training") as theirs:
        torch.nn.BatchNorm2d(3)(to_torch(x))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training") as ours:
        BatchNorm(3)(x)
    assert str(theirs.value).partition("got")[0] == str(ours.value).partition("got")[0]


def test_the_jvp_agrees_with_forward_mode_differentiation():
    x, v = data((6, 4, 5), np.float64), data((6, 4, 5), np.float64, seed=1)
    gamma, beta = parameters(4, np.float64)
    vgamma, vbeta = parameters(4, np.float64)[::-1]

    def function(x, gamma, beta):
        return torch.nn.functional.batch_norm(x, None, None, gamma, beta, training=True, eps=EPS)

    _, expected = torch.autograd.functional.jvp(
        function, tuple(map(to_torch, (x, gamma, beta))), tuple(map(to_torch, (v, vgamma, vbeta)))
    )
    _, mean, inv_std = F.batch_norm(x, gamma, beta, eps=EPS)
    ours = F.batch_norm_jvp(v, x, mean, inv_std, gamma, vgamma=vgamma, vbeta=vbeta)
    np.testing.assert_allclose(ours, expected.numpy(), rtol=0, atol=1e-12)  # some roundings of values below 100
