"""How other frameworks keep a batch norm: names, eps, momentum, variance, the channel axis, and what else differs.

One row a framework; `read` and `written` do what a row says, and the steps that only one framework needs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._checks import as_array, channel_array, flag, number, one_of, whole_number

__all__ = ["CONVENTIONS", "Convention", "plain", "read", "written"]

FLOAT64 = np.dtype(np.float64)
DARKNET_EPS = 0.000001  # of src/blas.c; outside the root
LAYERS_OWN = ("axis", "activation", "negative_slope", "nonfinite", "dtype")  # options of any layer made of arrays

Arrays = dict[str, NDArray[Any]]


class Convention(NamedTuple):
    """A row. Names are the framework's, in the order gamma, beta, mean, var."""

    names: tuple[str, str, str, str]
    eps: tuple[str, float] | None  # its name and default; None: not an option
    momentum: tuple[str, float] | None
    weight_of: str  # what momentum is the weight of: the "old" average or the "new" batch
    axis: int
    unbiased: bool  # whether the moving variance has the divisor M - 1
    complete: bool = False  # whether gamma and beta must be there, 1 and 0 where they do nothing
    frozen: bool = False  # made for inference
    needed: tuple[str, ...] = ()  # extras without a default, as to forget them gives wrong numbers
    optional: tuple[str, ...] = ()


CONVENTIONS = {
    "pytorch": Convention(
        ("weight", "bias", "running_mean", "running_var"), ("eps", 1e-5), ("momentum", 0.1), "new", 1, True,
        optional=("num_batches_tracked",),
    ),
    "torchvision": Convention(  # FrozenBatchNorm2d
        ("weight", "bias", "running_mean", "running_var"), ("eps", 1e-5), None, "new", 1, True,
        complete=True, frozen=True,
    ),
    "keras": Convention(  # Keras 3
        ("gamma", "beta", "moving_mean", "moving_variance"), ("epsilon", 1e-3), ("momentum", 0.99), "old", -1, False
    ),
    "slim": Convention(  # TensorFlow 1, its fused kernel
        ("gamma", "beta", "moving_mean", "moving_variance"), ("epsilon", 1e-3), ("decay", 0.999), "old", -1, True
    ),
    "flax": Convention(("scale", "bias", "mean", "var"), ("epsilon", 1e-5), ("momentum", 0.99), "old", -1, False),
    "haiku": Convention(
        ("scale", "offset", "mean_ema/average", "var_ema/average"), ("eps", 1e-5), ("decay_rate", 0.9), "old", -1,
        False, needed=("decay_rate",), optional=("average", "counter"),
    ),
    "onnx": Convention(
        ("scale", "B", "input_mean", "input_var"), ("epsilon", 1e-5), ("momentum", 0.9), "old", 1, False,
        complete=True,
    ),
    "caffe": Convention(  # a BatchNorm layer and a Scale layer
        ("scale", "bias", "mean", "variance"), ("eps", 1e-5), ("moving_average_fraction", 0.999), "old", 1, True,
        needed=("scale_factor",),
    ),
    "darknet": Convention(
        ("scales", "biases", "rolling_mean", "rolling_variance"), None, None, "old", 1, True,
        complete=True, frozen=True,
    ),
    "mxnet": Convention(
        ("gamma", "beta", "moving_mean", "moving_var"), ("eps", 1e-3), ("momentum", 0.9), "old", 1, False,
        complete=True, needed=("fix_gamma",),
    ),
    "ncnn": Convention(
        ("slope", "bias", "mean", "variance"), ("eps", 0.0), None, "old", 1, True, complete=True, frozen=True
    ),
}  # fmt: skip


def read(
    convention: str, gamma: ArrayLike | None, beta: ArrayLike | None, mean: ArrayLike | None, var: ArrayLike | None,
    extras: dict[str, Any],
) -> tuple[dict[str, Any], Arrays, bool]:  # fmt: skip
    """(arguments of a layer's constructor, its state by PyTorch's names, whether it is for eval mode)."""
    row = CONVENTIONS[one_of(convention, "convention", tuple(CONVENTIONS))]
    extras = dict(extras)
    _check_extras(convention, row, extras)
    given = {"gamma": gamma, "beta": beta, "mean": mean, "var": var}
    for ours, frameworks in zip(given, row.names, strict=True):
        if frameworks in extras:
            if given[ours] is not None:
                raise TypeError(f"{frameworks}: here this is {ours}, expected one of them, got both")
            given[ours] = extras.pop(frameworks)
        if given[ours] is None and ours in ("mean", "var"):
            raise TypeError(f"{ours}: expected an array, got None")
    arrays = {name: plain(value, name) for name, value in given.items() if value is not None}
    if convention == "haiku":  # (1, 1, 1, C)
        arrays = {
            name: array.reshape(-1) if array.size == max(array.shape) else array for name, array in arrays.items()
        }
    if arrays["mean"].ndim != 1 or not arrays["mean"].size:
        raise ValueError(f"mean: expected one value a channel, got shape {arrays['mean'].shape}")
    channels = arrays["mean"].size
    wide = any(arrays[name].dtype == FLOAT64 for name in ("gamma", "beta") if name in arrays)
    values = {name: channel_array(array, name, channels, FLOAT64) for name, array in arrays.items()}

    options = {name: extras.pop(name) for name in LAYERS_OWN if name in extras}
    options = {"axis": row.axis, "dtype": np.float64 if wide else np.float32, **options}
    options |= {"num_features": channels, "unbiased_running_var": row.unbiased, "eps": 0.0}
    if row.eps is not None:
        options["eps"] = extras.pop(*row.eps)
    if row.momentum is not None:
        momentum = extras.pop(*row.momentum)
        if momentum is not None and row.weight_of == "old":
            momentum = round(1.0 - number(momentum, row.momentum[0]), 15)  # 0.99 is 0.01
        options["momentum"] = momentum
    batches = _STEPS.get(convention, _no_step)(values, extras, options)
    names = {("gamma",): "gamma", ("beta",): "beta", (): False}
    options["affine"] = names.get(tuple(name for name in ("gamma", "beta") if name in values), True)
    theirs = dict(zip(("gamma", "beta", "mean", "var"), CONVENTIONS["pytorch"].names, strict=True))
    state: Arrays = {theirs[name]: value for name, value in values.items()}
    return options, state | {"num_batches_tracked": np.array(batches)}, row.frozen


def written(
    convention: str, gamma: Any, beta: Any, mean: Any, var: Any, batches: int, eps: float, dtype: Any
) -> Arrays:
    """The arrays of a layer under a framework's own names; gamma and beta may be None."""
    row = CONVENTIONS[one_of(convention, "convention", tuple(CONVENTIONS))]
    if convention == "darknet":
        deviation = np.sqrt(var + eps) - DARKNET_EPS
        if (deviation < 0).any():
            channel = int(np.argmin(deviation))
            raise ValueError(f"var: expected sqrt(var + eps) of at least 1e-6, as Darknet adds it to the standard "
                             f"deviation; got {var[channel]} in channel {channel} (eps {eps:g})")  # fmt: skip
        var = deviation**2
    if gamma is None and (row.complete or (convention == "pytorch" and beta is not None)):
        gamma = np.ones(len(mean))  # PyTorch has a weight without a bias, but no bias without a weight
    if beta is None and row.complete:
        beta = np.zeros(len(mean))
    values = zip(row.names, (gamma, beta, mean, var), strict=True)
    arrays: Arrays = {
        name: channel_array(value, name, len(mean), np.dtype(dtype)) for name, value in values if value is not None
    }
    if convention == "pytorch":
        arrays["num_batches_tracked"] = np.array(batches, np.int64)
    if convention == "caffe":
        arrays["scale_factor"] = np.ones(1, dtype)
    return arrays


def plain(value: Any, name: str) -> NDArray[Any]:
    """A NumPy array of what frameworks give, half types as float32."""
    array = as_array(value, name, "an array", TypeError)
    return array.astype(np.float32) if array.dtype.name in ("float16", "bfloat16") else array


def _check_extras(convention: str, row: Convention, extras: dict[str, Any]) -> None:
    options = [option[0] for option in (row.eps, row.momentum) if option is not None]
    known = [*row.names, *row.needed, *row.optional, *options, *LAYERS_OWN]
    if unknown := sorted(extras.keys() - set(known)):
        raise TypeError(f"{unknown[0]}: not known to {convention!r}, which takes {', '.join(known)}")
    if missing := [name for name in row.needed if name not in extras]:
        raise TypeError(f"{missing[0]}: {convention!r} needs it: it has no default, or the arrays mean something else "
                        "without it")  # fmt: skip


# --- what only one framework does: change values, take extras, return the number of batches ---


def _no_step(values: Arrays, extras: dict[str, Any], options: dict[str, Any]) -> int:
    return 0


def _pytorch(values: Arrays, extras: dict[str, Any], options: dict[str, Any]) -> int:
    name = "num_batches_tracked"
    return whole_number(plain(extras.get(name, 0), name), name, ValueError)


def _haiku(values: Arrays, extras: dict[str, Any], options: dict[str, Any]) -> int:
    """average = hidden / (1 - decay**counter): hidden starts at 0, and the average makes up for it."""
    counter = whole_number(plain(extras.get("counter", 0), "counter"), "counter", ValueError)
    if not flag(extras.get("average", True), "average"):
        correction = 1.0 - (1.0 - options["momentum"]) ** counter
        if correction <= 0:
            raise ValueError("counter: expected at least 1 with average=False: hidden averages of no batch are 0")
        values["mean"], values["var"] = values["mean"] / correction, values["var"] / correction
    return counter


def _caffe(values: Arrays, extras: dict[str, Any], options: dict[str, Any]) -> int:
    """Both are sums, to be divided by scale_factor, which is 0 before the first batch."""
    given = np.asarray(extras["scale_factor"])
    if given.size != 1:
        raise ValueError(f"scale_factor: expected one number, got shape {given.shape}")
    factor = number(given.item(), "scale_factor")
    if not (factor >= 0 and np.isfinite(factor)):
        raise ValueError(f"scale_factor: expected a finite number of at least 0, got {factor}")
    share = 0.0 if factor == 0 else 1.0 / factor
    values["mean"], values["var"] = values["mean"] * share, values["var"] * share
    return 0


def _darknet(values: Arrays, extras: dict[str, Any], options: dict[str, Any]) -> int:
    """x / (sqrt(var) + 1e-6) is x / sqrt(v) with v = (sqrt(var) + 1e-6)**2."""
    if (values["var"] < 0).any():
        raise ValueError("var: expected values of at least 0")
    values["var"] = (np.sqrt(values["var"]) + DARKNET_EPS) ** 2
    return 0


def _mxnet(values: Arrays, extras: dict[str, Any], options: dict[str, Any]) -> int:
    """fix_gamma: whatever is stored, gamma is 1."""
    if flag(extras["fix_gamma"], "fix_gamma"):
        values["gamma"] = np.ones_like(values["mean"])
    return 0


_STEPS: dict[str, Callable[[Arrays, dict[str, Any], dict[str, Any]], int]] = {
    "pytorch": _pytorch,
    "haiku": _haiku,
    "caffe": _caffe,
    "darknet": _darknet,
    "mxnet": _mxnet,
}
