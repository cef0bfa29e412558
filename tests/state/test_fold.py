"""A batch norm folded into the weights beside it, against the two of them, for each kind of layer.

Convolutions are PyTorch's in float64, where it is installed; a small one in NumPy judges the main kinds without it.
"""

import os

import numpy as np
import pytest

import bnfast
from bnfast import BatchNorm

if os.environ.get("BNFAST_REQUIRE_TORCH"):
    import torch
else:
    try:
        import torch
    except ImportError:
        torch = None
needs_torch = pytest.mark.skipif(torch is None, reason="PyTorch is not installed: its convolutions judge these")

CLOSE = {"rtol": 1e-12, "atol": 1e-12}  # float64: sums of some hundred terms below 10


def batch_norm(channels, rng, dtype=np.float64, **options):
    layer = BatchNorm(channels, dtype=dtype, eps=1e-3, **options)
    if layer.gamma is not None:
        layer.gamma[:] = rng.uniform(-2, 2, channels)
    if layer.beta is not None:
        layer.beta[:] = rng.normal(size=channels)
    layer.running_mean, layer.running_var = rng.normal(size=channels), rng.uniform(0.1, 4, channels)
    return layer.eval()


# --- linear ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, "gamma", "beta", False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("numpy_layout", [True, False])
@pytest.mark.parametrize("position", ["after", "before"])
@pytest.mark.parametrize("n_out", [5, 7])  # square, too
def test_linear(position, numpy_layout, with_bias, affine, n_out, rng):
    w, x = rng.normal(size=(5, n_out)), rng.normal(size=(6, 5))
    b = rng.normal(size=n_out) if with_bias else None
    bn = batch_norm(n_out if position == "after" else 5, rng, affine=affine)

    def layer(x, w=w, b=b):
        return x @ w + (0 if b is None else b)

    expected = bn(layer(x)) if position == "after" else layer(bn(x))
    if numpy_layout:
        new_w, new_b = bnfast.fold(bn, w, b, position=position, axis=1)
    else:
        new_w, new_b = bnfast.fold(bn, w.T, b, position=position)
        assert new_w.shape == (n_out, 5)
        new_w = new_w.T
    np.testing.assert_allclose(layer(x, new_w, new_b), expected, **CLOSE)


# --- convolutions --------------------------------------------------------------------------------------------------

KINDS = {  # in, out, kernel, options of the convolution
    "1d": (4, 6, (3,), {"padding": 1}),
    "2d": (4, 6, (3, 2), {"stride": 2, "padding": 1}),
    "3d": (2, 4, (2, 2, 1), {}),
    "pointwise": (4, 4, (1, 1), {}),
    "grouped": (4, 6, (3, 3), {"groups": 2, "padding": 1}),
    "depthwise": (4, 4, (3, 3), {"groups": 4}),
    "depthwise, 2 for each": (4, 8, (3, 3), {"groups": 4}),
    "transposed": (4, 6, (3, 3), {"transposed": True, "stride": 2, "padding": 1}),
    "transposed, square": (4, 4, (3, 3), {"transposed": True}),
    "transposed 1d": (4, 6, (3,), {"transposed": True}),
    "transposed 3d": (2, 4, (2, 2, 1), {"transposed": True}),
    "grouped transposed": (4, 6, (3, 3), {"transposed": True, "groups": 2}),
    "grouped transposed, in = out/groups": (4, 8, (3, 3), {"transposed": True, "groups": 2}),
    "grouped transposed, square": (4, 4, (3, 3), {"transposed": True, "groups": 2}),
    "depthwise transposed": (4, 4, (3, 3), {"transposed": True, "groups": 4}),
}


def convolution(kind, rng):
    """(function of x, weight and bias; weight; bias; x; options for `fold`) of a kind."""
    n_in, n_out, kernel, options = KINDS[kind]
    options = dict(options)
    transposed, groups = options.pop("transposed", False), options.get("groups", 1)
    leading, other = (n_in, n_out) if transposed else (n_out, n_in)
    w, b = rng.normal(size=(leading, other // groups, *kernel)), rng.normal(size=n_out)
    name = f"conv{'_transpose' if transposed else ''}{len(kernel)}d"
    x = rng.normal(size=(2, n_in, *(5,) * len(kernel)))

    def layer(x, w, b):
        given = [None if a is None else torch.from_numpy(np.ascontiguousarray(a)) for a in (x, w, b)]
        return getattr(torch.nn.functional, name)(*given, **options).numpy()

    return layer, w, b, x, {"groups": groups, "transposed": transposed}


@needs_torch
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_after_a_convolution(kind, with_bias, rng):
    layer, w, b, x, options = convolution(kind, rng)
    b = b if with_bias else None
    bn = batch_norm(KINDS[kind][1], rng)
    folded = bnfast.fold(bn, w, b, **options)
    np.testing.assert_allclose(layer(x, *folded), bn(layer(x, w, b)), **CLOSE)
    # and with the channels last, as Keras has them
    new_w, new_b = bnfast.fold(bn, np.moveaxis(w, (0, 1), (-1, -2)), b, axis=-1, **options)
    np.testing.assert_array_equal(np.moveaxis(new_w, (-1, -2), (0, 1)), folded[0])
    np.testing.assert_array_equal(new_b, folded[1])


@needs_torch
@pytest.mark.parametrize("kind", [k for k, v in KINDS.items() if "padding" not in v[3] and "transposed" not in v[3]])
def test_before_a_convolution(kind, rng):
    layer, w, b, x, options = convolution(kind, rng)
    bn = batch_norm(KINDS[kind][0], rng)
    folded = bnfast.fold(bn, w, b, position="before", padding=0, **options)
    np.testing.assert_allclose(layer(x, *folded), layer(bn(x), w, b), **CLOSE)


@needs_torch
def test_a_layer_is_not_its_weight(rng):
    with pytest.raises(TypeError, match=r"weight: expected float32, .*; give the layer's weight and bias"):
        bnfast.fold(batch_norm(3, rng), torch.nn.Conv2d(3, 3, 3))


@needs_torch
def test_where_pytorchs_own_helper_is_wrong(rng):
    """A grouped transposed convolution: its helper scales the axis of out/groups as if it were out."""
    conv = torch.nn.ConvTranspose2d(4, 4, 3, groups=2, dtype=torch.float64).eval()
    bn = torch.nn.BatchNorm2d(4, dtype=torch.float64)
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in (bn.weight, bn.bias, bn.running_mean):
            tensor.normal_()
        bn.running_var.uniform_(0.5, 2)
    bn.eval()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    expected = bn(conv(x)).detach().numpy()
    ours = bnfast.from_state(bn.state_dict())[""].eval()
    w, b = bnfast.fold(ours, conv.weight, conv.bias, transposed=True, groups=2)
    folded = torch.nn.functional.conv_transpose2d(x, torch.from_numpy(w), torch.from_numpy(b), groups=2).numpy()
    np.testing.assert_allclose(folded, expected, **CLOSE)
    try:
        theirs = torch.nn.utils.fuse_conv_bn_eval(conv, bn, transpose=True)(x).detach().numpy()
    except RuntimeError:
        return  # the shapes do not fit
    assert abs(theirs - expected).max() > 1e-3, "PyTorch's helper is right now: say so where we say it is not"


def test_after_a_convolution_of_numpy(rng):
    """Valid, one dimension, grouped; and transposed with stride 1: sums written out."""
    n, groups, length = 3, 2, 7
    w, b = rng.normal(size=(6, 2, n)), rng.normal(size=6)  # in 4, out 6
    x = rng.normal(size=(2, 4, length))

    def layer(x, w, b):
        y = np.zeros((len(x), 6, length - n + 1)) + b[:, None]
        for out in range(6):
            for c in range(2):
                for k in range(n):
                    y[:, out] += w[out, c, k] * x[:, out // 3 * 2 + c, k : k + length - n + 1]
        return y

    bn = batch_norm(6, rng)
    np.testing.assert_allclose(layer(x, *bnfast.fold(bn, w, b, groups=groups)), bn(layer(x, w, b)), **CLOSE)
    bn = batch_norm(4, rng)
    folded = bnfast.fold(bn, w, b, groups=groups, position="before", padding="valid")
    np.testing.assert_allclose(layer(x, *folded), layer(bn(x), w, b), **CLOSE)

    w = rng.normal(size=(4, 3, n))  # in 4, out 6 in two groups

    def transposed(x, w, b):
        y = np.zeros((len(x), 6, length + n - 1)) + b[:, None]
        for c in range(4):
            for out in range(3):
                for k in range(n):
                    y[:, c // 2 * 3 + out, k : k + length] += w[c, out, k] * x[:, c]
        return y

    bn = batch_norm(6, rng)
    folded = bnfast.fold(bn, w, b, groups=groups, transposed=True)
    np.testing.assert_allclose(transposed(x, *folded), bn(transposed(x, w, b)), **CLOSE)


def test_a_depthwise_kernel_of_keras(rng):
    """(kernel, kernel, in, multiplier): its output channels are in * multiplier."""
    w = rng.normal(size=(3, 3, 4, 2))
    bn = batch_norm(8, rng)
    new_w, _ = bnfast.fold(bn, w.reshape(3, 3, 1, 8), axis=-1, groups=4)
    scale = bn.gamma / np.sqrt(bn.running_var + bn.eps)
    np.testing.assert_allclose(new_w.reshape(w.shape), w * scale.reshape(4, 2), rtol=1e-15)


# --- what is rounded -----------------------------------------------------------------------------------------------


def dtypes():
    found = [np.float16, np.float32]
    try:
        import ml_dtypes

        found.append(ml_dtypes.bfloat16)
    except ImportError:
        pass
    return [np.dtype(dtype) for dtype in found]


@pytest.mark.parametrize("dtype", dtypes(), ids=str)
@pytest.mark.parametrize("position", ["after", "before"])
def test_rounded_once(dtype, position, rng):
    """To the nearest of the dtype, ties to even, of the value in float64."""
    bits = {"float16": 11, "float32": 24, "bfloat16": 8}[dtype.name]
    w, b = rng.normal(size=(400, 400)).astype(dtype), rng.normal(size=400).astype(dtype)
    bn = batch_norm(400, rng)
    new_w, new_b = bnfast.fold(bn, w, b, position=position)
    assert (new_w.dtype, new_b.dtype) == (dtype, dtype)
    exact_w, exact_b = bnfast.fold(bn, w.astype(np.float64), b.astype(np.float64), position=position)
    for found, exact in ((new_w, exact_w), (new_b, exact_b)):
        step = np.exp2(np.floor(np.log2(abs(exact))) - bits + 1)  # (no value here is subnormal but in float16)
        if dtype.name == "float16":
            step = np.maximum(step, 2.0**-24)
        np.testing.assert_array_equal(found.astype(np.float64), np.rint(exact / step) * step)


def test_a_value_that_two_roundings_get_wrong():
    """1 + 2**-8 + 2**-30 is above the middle of two bfloat16; rounded to float32 first it is the middle."""
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 arrays need ml_dtypes")
    value = 1 + 2.0**-8 + 2.0**-30
    bn = BatchNorm(1, eps=0.0, dtype=np.float64).eval()
    bn.gamma[:] = value
    w, _ = bnfast.fold(bn, np.ones((1, 1), ml_dtypes.bfloat16))
    assert float(w[0, 0]) == 1 + 2.0**-7
    assert float(np.float32(value).astype(ml_dtypes.bfloat16)) == 1


def test_the_bound_of_the_docstring(rng):
    w, b, x = rng.normal(size=(50, 60)), rng.normal(size=60), rng.normal(size=(200, 50))
    w, b, x = w.astype(np.float32), b.astype(np.float32), x.astype(np.float32)
    bn = batch_norm(60, rng)
    for far in (0.0, 1e4):
        bn.running_mean = bn.running_mean + far
        new_w, new_b = bnfast.fold(bn, w, b, axis=1)
        exact = bn(x.astype(np.float64) @ w + b)
        wide = new_w.astype(np.float64), new_b.astype(np.float64)
        error = abs(x.astype(np.float64) @ wide[0] + wide[1] - exact)
        bound = 2.0**-24 * (abs(x).astype(np.float64) @ abs(wide[0]) + abs(wide[1]))
        assert (error <= 1.01 * bound).all()
        assert error.max() > bound.max() / 10, "the bound is not one of this size"


def test_memory_order_and_other_libraries_tensors(rng):
    bn = batch_norm(3, rng)
    w = rng.normal(size=(3, 4)).astype(np.float32)
    expected = bnfast.fold(bn, w)
    for same in (np.asfortranarray(w), w[::-1][::-1], w.astype(">f4"), w.tolist()):
        found = bnfast.fold(bn, same)
        np.testing.assert_allclose(found[0], expected[0], rtol=1e-7)
    assert bnfast.fold(bn, w.astype(">f4"))[0].dtype == np.float32
    before = w.copy()
    bnfast.fold(bn, w, np.zeros(3))
    np.testing.assert_array_equal(w, before)
    if torch is not None:
        tensor = torch.nn.Parameter(torch.from_numpy(w))
        np.testing.assert_array_equal(bnfast.fold(bn, tensor)[0], expected[0])
        assert bnfast.fold(bn, tensor.detach().bfloat16())[0].dtype == np.float32


def test_channel_axes_in_the_middle(rng):
    bn, w = batch_norm(5, rng), rng.normal(size=(5, 3, 2, 4))  # PyTorch's (out, in, kernel)
    expected = bnfast.fold(bn, w)
    found = bnfast.fold(bn, w.transpose(2, 1, 0, 3), axis=2)  # (kernel, in, out, kernel)
    np.testing.assert_array_equal(found[0].transpose(2, 1, 0, 3), expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


def test_the_bias_keeps_its_own_dtype(rng):
    bn, w = batch_norm(3, rng), rng.normal(size=(3, 4)).astype(np.float32)
    for dtype in (np.float32, np.float64):
        new_w, new_b = bnfast.fold(bn, w, np.zeros(3, dtype))
        assert (new_w.dtype, new_b.dtype) == (np.float32, dtype)


def test_what_is_not_finite_stays_and_hides_nothing():
    """A NaN is where it was; beside it what overflows is refused all the same."""
    bn = BatchNorm(2, eps=0.0).eval()
    bn.running_var = [0.25, 0.25]
    w = np.float32([[np.nan, 1.0], [1.0, 2.0]])
    new_w, new_b = bnfast.fold(bn, w)
    np.testing.assert_array_equal(new_w, 2 * w)
    np.testing.assert_array_equal(new_b, [0.0, 0.0])
    _, new_b = bnfast.fold(bn, w, position="before")
    np.testing.assert_array_equal(np.isnan(new_b), [True, False])
    w[1, 0] = 3e38
    with pytest.raises(ValueError, match=r"weight: the folded value at \[1, 0\] is beyond float32"):
        bnfast.fold(bn, w)


# --- what cannot be folded -----------------------------------------------------------------------------------------


def test_a_layer_that_is_no_fixed_map_is_refused(rng):
    w = np.eye(3)
    with pytest.raises(ValueError, match="eval mode"):
        bnfast.fold(BatchNorm(3), w)
    bn = batch_norm(3, rng)
    with bn.calibrate():
        with pytest.raises(ValueError, match="calibration"):
            bnfast.fold(bn, w)
        bn(rng.normal(size=(4, 3)))
    with pytest.raises(ValueError, match="track_running_stats=False"):
        bnfast.fold(BatchNorm(3, track_running_stats=False).eval(), w)
    spoilt = BatchNorm(3)
    spoilt(np.float32([[np.inf, 1, 1], [1, 2, 3]]))
    with pytest.raises(ValueError, match="finite running statistics"):
        bnfast.fold(spoilt.eval(), w)
    with pytest.raises(TypeError, match=r"bn: expected a bnfast.BatchNorm, got object; .*from_arrays and .* make one"):
        bnfast.fold(object(), w)


def test_an_activation_is_the_callers_behind_and_refused_before(rng):
    bn, w, x = batch_norm(3, rng, activation="relu"), rng.normal(size=(4, 3)), rng.normal(size=(8, 4))
    new_w, new_b = bnfast.fold(bn, w, axis=1)
    np.testing.assert_allclose(np.maximum(x @ new_w + new_b, 0), bn(x @ w), **CLOSE)
    with pytest.raises(ValueError, match="its activation 'relu' stands between"):
        bnfast.fold(bn, w.T, axis=1, position="before")


@pytest.mark.parametrize(
    ("shape", "options", "words"),
    [
        ((3, 4, 3, 3), {"padding": 1}, "only padding=0"),
        ((3, 4, 3, 3), {"padding": (0, 1)}, "only padding=0"),
        ((3, 4, 3, 3), {"padding": [(0, 0), (1, 0)]}, "only padding=0"),
        ((3, 4, 3, 3), {"padding": "same"}, "only padding=0"),
        ((3, 4, 3, 3), {"padding": np.array([0, 1])}, "only padding=0"),
        ((3, 4, 3, 3), {}, "say padding=0"),
        ((4, 3, 3, 3), {"padding": 0, "transposed": True}, "before a transposed convolution"),
    ],
)
def test_before_what_is_padded_or_transposed_is_refused(shape, options, words, rng):
    bn = batch_norm(4, rng)
    with pytest.raises(ValueError, match=words):
        bnfast.fold(bn, np.ones(shape), position="before", **options)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"weight": np.ones((4, 3))}, ValueError, r"weight: expected 3 output channels, .* got 4"),
        ({"weight": np.ones((3, 4)), "position": "before"}, ValueError, "weight: expected 3 input channels, .* got 4"),
        (  # depthwise
            {"weight": np.ones((3, 1, 3, 3)), "position": "before", "padding": 0},
            ValueError,
            r"weight: expected 3 input channels, .* got 1 .*; if the convolution is grouped, give groups=$",
        ),
        ({"weight": np.ones((4, 1, 3)), "transposed": True}, ValueError, "got 1 .* is grouped, give groups=$"),
        ({"weight": np.ones((4, 3, 3))}, ValueError, r"got 4 \(.*, transposed False\)$"),
        ({"weight": np.ones(3)}, ValueError, "at least 2 dimensions"),
        ({"weight": np.ones((3, 3), int)}, TypeError, "weight: expected float32"),
        ({"weight": np.ones((3, 3), complex)}, TypeError, "weight: expected float32"),
        ({"weight": np.ma.ones((3, 3))}, TypeError, "weight: expected an array without a mask"),
        ({"weight": None}, TypeError, "weight"),
        ({"weight": np.ones((3, 3)), "bias": np.ones(2)}, ValueError, r"bias: expected shape \(3,\)"),
        ({"weight": np.ones((3, 3)), "groups": 2}, ValueError, "groups: expected a divisor of the 3 channels"),
        ({"weight": np.ones((3, 3)), "groups": 0}, ValueError, "groups"),
        ({"weight": np.ones((3, 3)), "groups": 1.5}, TypeError, "groups: expected an int"),
        ({"weight": np.ones((3, 3)), "axis": 2}, np.exceptions.AxisError, "axis 2"),
        ({"weight": np.ones((3, 3)), "position": "behind"}, ValueError, "position: expected 'after' or 'before'"),
        ({"weight": np.ones((3, 3)), "transposed": 1}, TypeError, "transposed: expected a bool"),
        ({"weight": np.full((3, 3), 3e38, np.float32)}, ValueError, r"weight: the folded value at \[0, 0\] is beyond"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, error, words):
    bn = BatchNorm(3, eps=0.0).eval()
    bn.running_var = [0.25, 0.25, 0.25]
    with pytest.raises(error, match=words):
        bnfast.fold(bn, **arguments)
