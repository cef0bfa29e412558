"""A batch norm in eval mode is a map per channel, x * scale + shift: it can be made part of the weights beside it.

Weights of all kinds are one shape here, (groups, leading channels of a group, other channels of a group, kernel):
the leading channels are the output of an ordinary convolution and the input of a transposed one.
"""

from typing import Any, Literal, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._checks import flag, integer, one_of
from ..layer import BatchNorm
from .conventions import plain

__all__ = ["fold"]

Array = NDArray[np.floating[Any]]
DTYPES = {"float16", "bfloat16", "float32", "float64"}


def fold(
    bn: BatchNorm,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    position: Literal["after", "before"] = "after",
    axis: SupportsIndex = 0,
    groups: SupportsIndex = 1,
    transposed: bool = False,
    padding: Any = None,
) -> tuple[Array, Array]:
    """Weight and bias of a linear layer or convolution that does what it and a batch norm in eval mode do.

    Parameters
    ----------
    bn : BatchNorm
        In eval mode, with running statistics. It is not changed.
    weight : (..., C, ...) array_like of float32, float64 or a half type
        In any layout whose channel axes are neighbours: PyTorch's (out, in, kernel...) as it is, NumPy's (in, out) for
        `x @ weight` and Keras's (kernel..., in, out) with axis=-1. A grouped weight has in/groups channels in the
        place of its input's; a depthwise one of Keras's, (kernel..., in, multiplier), is made
        `weight.reshape(*kernel, 1, -1)` first, with axis=-1 and groups=in.
    bias : (out,) array_like, optional
        None: 0.
    position : "after" or "before"
        Where the batch norm stands: it takes what the layer gives, or gives what the layer takes.
    axis : int
        The axis of the output channels; of the input channels for a transposed convolution, whose weights have them
        there. The other channels are on the axis after it if it is the first, else on the one before.
    groups : int
        Of a grouped convolution; of a depthwise one the number of its channels.
    transposed : bool
        Whether it is a transposed convolution ("deconvolution"), with (in, out/groups, kernel...) or, for axis=-1,
        (kernel..., out/groups, in).
    padding : int, tuple of int or "valid", optional
        Of a convolution, to be given for position="before": only 0 can be folded. What is padded is 0, not what batch
        norm makes of 0.

    Returns
    -------
    weight : ndarray of weight's shape and dtype
        Of tensors of float16 and bfloat16 it is float32.
    bias : (out,) ndarray
        Of bias's dtype, or weight's without one.

    Raises
    ------
    TypeError
        If an argument has a wrong type or dtype.
    ValueError
        If it cannot be folded: the layer is in training mode, in a calibration or has no running statistics; before a
        layer, it has an activation, or the convolution is padded or transposed; shapes do not fit; or a
        result of finite numbers is not finite in its dtype.

    Notes
    -----
    With scale = gamma / sqrt(running_var + eps) and shift = beta - running_mean * scale: after the layer,
    weight * scale and bias * scale + shift; before it, weight * scale and bias + sum(weight * shift), over inputs and
    kernel. All in float64, rounded once: each entry of the new weight is within u of the exact one, relative to itself
    (u = 2**-24 for float32, 2**-11 for float16, 2**-8 for bfloat16; 1e-15 for float64), the new bias within u of itself
    and 1e-15 of the terms it is the sum of. So what the folded layer gives differs, before its own rounding, from the
    two by at most u * (sum(abs(weight * x)) + abs(bias)), with the new weight and bias. Where the running mean is many
    standard deviations from 0 these are large and cancel: there the two keep about log2(abs(mean)/std) bits more.

    An activation of the layer is not folded: after, apply it to what the folded layer gives. A residual, which is an
    argument of a call, is added before that.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> rng = np.random.default_rng(0)
    >>> bn, w, x = bnfast.BatchNorm(3, dtype=np.float64), rng.normal(size=(4, 3)), rng.normal(size=(8, 4))
    >>> _ = bn(x @ w)
    >>> w_folded, b_folded = bnfast.fold(bn.eval(), w, axis=1)
    >>> bool(np.allclose(x @ w_folded + b_folded, bn(x @ w), rtol=0, atol=1e-14))
    True
    """
    before = one_of(position, "position", ("after", "before")) == "before"
    transposed = flag(transposed, "transposed")
    scale, shift = _map_of(bn, before)
    w, original = _weights(weight, "weight")
    if w.ndim < 2:
        raise ValueError(f"weight: expected at least 2 dimensions, got shape {w.shape}")
    leading = integer(axis, "axis")
    if not -w.ndim <= leading < w.ndim:
        raise np.exceptions.AxisError(leading, w.ndim, "axis")
    leading %= w.ndim
    other = 1 if leading == 0 else leading - 1
    n_groups = integer(groups, "groups")
    if n_groups < 1 or w.shape[leading] % n_groups:
        raise ValueError(
            f"groups: expected a divisor of the {w.shape[leading]} channels along axis {axis}, got {groups}"
        )
    if before:
        _check_before(transposed, padding, w)

    moved = np.moveaxis(w, (leading, other), (0, 1))
    # (groups, leading channels of a group, other channels of a group, kernel)
    grouped = moved.reshape(n_groups, moved.shape[0] // n_groups, moved.shape[1], -1)
    n_out = n_groups * moved.shape[1] if transposed else moved.shape[0]
    n_channels = n_groups * moved.shape[1] if before else n_out
    if bn.num_features != n_channels:
        one_group = w.ndim > 2 and (before or transposed) and n_groups == 1
        way = "; if the convolution is grouped, give groups=" if one_group else ""
        raise ValueError(
            f"weight: expected {bn.num_features} {'input' if before else 'output'} channels, as the batch norm has, "
            f"got {n_channels} (shape {w.shape}, axis {axis}, groups {groups}, transposed {transposed}){way}"
        )
    along = (n_groups, 1, -1, 1) if before or transposed else (n_groups, -1, 1, 1)
    b, bias_dtype = (np.zeros(n_out), original) if bias is None else _weights(bias, "bias")
    if b.shape != (n_out,):
        raise ValueError(f"bias: expected shape ({n_out},), one value an output channel, got {b.shape}")
    with np.errstate(all="ignore"):  # what overflows is refused
        folded = (grouped * scale.reshape(along)).reshape(moved.shape)
        into_all = (grouped * shift.reshape(along)).sum(axis=(2, 3)).reshape(-1) if before else shift
        new_bias = (b if before else b * scale) + into_all
    new_weight = np.ascontiguousarray(np.moveaxis(folded, (0, 1), (leading, other)))
    of_finite = np.isfinite(b) & (np.isfinite(grouped).all(axis=(2, 3)).reshape(-1) if before else True)
    return (
        _rounded(new_weight, original, "weight", np.isfinite(w)),
        _rounded(new_bias, bias_dtype, "bias", of_finite),
    )


def _map_of(bn: BatchNorm, before: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(scale, shift): what the layer does in eval mode."""
    if not isinstance(bn, BatchNorm):
        way = "BatchNorm.from_arrays and bnfast.from_state make one of another library's"
        raise TypeError(f"bn: expected a bnfast.BatchNorm, got {type(bn).__name__}; {way}")
    if bn.training or bn._calibration.value is not None:
        raise ValueError("bn: expected a layer in eval mode: in training and in a calibration it is no fixed map")
    if not bn.track_running_stats:
        raise ValueError("bn: expected a layer with running statistics, got track_running_stats=False")
    if before and bn.activation is not None:
        raise ValueError(f"bn: its activation {bn.activation!r} stands between it and the layer behind it")
    mean, var = np.asarray(bn.running_mean), np.asarray(bn.running_var)
    if not (np.isfinite(var).all() and bool((var + bn.eps > 0).all()) and np.isfinite(mean).all()):
        raise ValueError("bn: expected finite running statistics with running_var + eps above 0")
    scale = 1.0 / np.sqrt(var + bn.eps)
    if bn.gamma is not None:
        scale = scale * bn.gamma
    shift = -mean * scale
    return scale, shift if bn.beta is None else shift + bn.beta


def _weights(value: ArrayLike, name: str) -> tuple[NDArray[np.float64], np.dtype[Any]]:
    """(as float64, the dtype to round to)"""
    array = plain(value, name)
    dtype = getattr(value, "dtype", array.dtype)
    original = array.dtype if not isinstance(dtype, np.dtype) else dtype  # a tensor's bfloat16 is no dtype of NumPy's
    if original.name not in DTYPES:
        way = "; give the layer's weight and bias" if hasattr(value, "weight") else ""
        raise TypeError(f"{name}: expected float32, float64, float16 or bfloat16, got {original}{way}")
    return array.astype(np.float64), original.newbyteorder("=")


def _check_before(transposed: bool, padding: Any, weight: NDArray[Any]) -> None:
    if transposed:
        raise ValueError("position: before a transposed convolution it cannot be folded, as the outputs take in "
                         "different numbers of inputs")  # fmt: skip
    if weight.ndim == 2:
        return
    if padding is None:
        raise ValueError("padding: before a convolution, say padding=0; a padded one cannot be folded")
    if isinstance(padding, str) and padding == "valid":
        return
    each = padding if isinstance(padding, tuple | list) else (padding,)
    if isinstance(padding, str) or any(np.any(np.asarray(part)) for part in each):
        raise ValueError(f"padding: before a convolution only padding=0 can be folded, got {padding!r}")


def _rounded(values: NDArray[np.float64], dtype: np.dtype[Any], name: str, of_finite: NDArray[np.bool_]) -> Array:
    """In the dtype, rounded once. of_finite: what was computed of finite numbers only."""
    with np.errstate(over="ignore"):  # (older ml_dtypes convert to bfloat16 by way of float32)
        result: Array = (_odd(values) if dtype.name == "bfloat16" else values).astype(dtype)
    finite = np.isfinite(result.astype(np.float64) if dtype.name == "bfloat16" else result)
    if (lost := np.argwhere(of_finite & ~finite)).size:
        at = lost[0].tolist()
        raise ValueError(f"{name}: the folded value at {at} is beyond {dtype}")
    return result


def _odd(values: NDArray[np.float64]) -> NDArray[np.float32]:
    """float32 rounded to odd: to round these once more to fewer bits is to round once."""
    with np.errstate(over="ignore"):
        near = values.astype(np.float32)
        inexact = (near.astype(np.float64) != values) & np.isfinite(near)
        toward_zero = np.where(abs(near.astype(np.float64)) > abs(values), np.nextafter(near, np.float32(0)), near)
    return np.where(inexact, (toward_zero.view(np.uint32) | 1).view(np.float32), near)
