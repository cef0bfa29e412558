"""The functions of `bnfast.functional` in NumPy: the same signatures, the formulas as one reads them.

They compute in float64 (in longdouble for longdouble data) and return that, unrounded: the oracle of the tests, and
the shortest description of what the kernels do. They check nothing, and use nothing else of bnfast.
"""

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "Sums",
    "batch_norm",
    "batch_norm_backward",
    "batch_norm_backward_apply",
    "batch_norm_backward_sums",
    "batch_norm_eval",
    "batch_norm_jvp",
    "moments",
]

Wide = NDArray[Any]
Function = TypeVar("Function", bound=Callable[..., Any])


def _wide(value: ArrayLike) -> Wide:
    array = np.asarray(value)
    return array.astype(np.result_type(array.dtype, np.float64))


def _other_axes(x: Wide, axis: int) -> tuple[int, ...]:
    return tuple(i for i in range(x.ndim) if i != axis % x.ndim)


def _along(parameter: ArrayLike | None, x: Wide, axis: int, default: float) -> Wide:
    """A (C,) parameter shaped to broadcast against x."""
    shape = [1] * x.ndim
    shape[axis] = x.shape[axis]
    return _wide(np.full(x.shape[axis], default) if parameter is None else parameter).reshape(shape)


def _written(result: Wide, out: NDArray[Any] | None) -> Wide:
    if out is None:
        return result
    out[...] = result
    return out


@dataclass(frozen=True, eq=False)
class Sums:
    """See `bnfast.functional.Sums`."""

    count: int
    dgamma: Wide
    dbeta: Wide

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.count + other.count, self.dgamma + other.dgamma, self.dbeta + other.dbeta)


def _rectified(y: Wide, activation: str | None, negative_slope: float) -> Wide:
    """The activation of y; NaN stays NaN."""
    if activation is None:
        return y
    y = np.where(y <= 0, negative_slope * y if activation == "leaky_relu" else 0.0, y)
    return np.minimum(y, 6.0) if activation == "relu6" else y


def _passed(u: Wide, y: Wide, activation: str | None, negative_slope: float) -> Wide:
    """u times the derivative of the activation at y."""
    if activation is None:
        return u
    u = np.where(y <= 0, negative_slope * u if activation == "leaky_relu" else 0.0, u)
    return np.where(y >= 6, 0.0, u) if activation == "relu6" else u


def _before_activation(
    x_hat: Wide, gamma: ArrayLike | None, beta: ArrayLike | None, residual: ArrayLike | None, axis: int
) -> Wide:
    y = _along(gamma, x_hat, axis, 1.0) * x_hat + _along(beta, x_hat, axis, 0.0)
    return y if residual is None else y + _wide(residual)


def _masked(function: Function) -> Function:
    """The function of the positions where its `mask` is True alone; what it gives like x is 0 elsewhere."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def at_positions(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        mask = given.pop("mask", None)
        if mask is None:
            return function(**given)
        axis, outs = given.pop("axis", 1), [given.pop("out", None), given.pop("out_residual", None)]
        shape = np.moveaxis(np.asarray(given["x"]), axis, -1).shape
        there = np.broadcast_to(mask, shape[:-1])
        for name in ("x", "dy", "v", "residual", "vresidual"):
            if given.get(name) is not None:
                given[name] = np.moveaxis(np.asarray(given[name]), axis, -1)[there]  # (M, C)
        if given.get("weights") is not None:
            given["weights"] = np.broadcast_to(given["weights"], shape[:-1])[there]

        def back(result: Any) -> Any:
            if np.ndim(result) != 2:
                return result
            whole = np.zeros(shape, result.dtype)
            whole[there] = result
            return _written(np.moveaxis(whole, -1, axis), outs.pop(0))

        found = function(**given)
        return tuple(map(back, found)) if isinstance(found, tuple) else back(found)

    return cast(Function, at_positions)


@_masked
def moments(
    x: ArrayLike, *, axis: int = 1, mask: ArrayLike | None = None, weights: ArrayLike | None = None
) -> tuple[Any, Wide, Wide]:
    """See `bnfast.moments`; here (count, mean, m2)."""
    x = _wide(x)
    others = _other_axes(x, axis)
    if weights is not None:
        positions = np.moveaxis(x, axis, -1).shape[:-1]
        w = np.expand_dims(np.broadcast_to(np.asarray(weights, x.dtype), positions), axis)
        x, total = np.where(w > 0, x, 0), w.sum()
        mean = (w * x).sum(others, keepdims=True) / (total if total else 1)
        return total, mean.ravel(), (w * (x - mean) ** 2).sum(others)
    count = x.size // max(1, x.shape[axis])
    mean = x.mean(others, keepdims=True) if count else _along(None, x, axis, 0.0)
    return count, mean.ravel(), ((x - mean) ** 2).sum(others)


@_masked
def batch_norm(
    x: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    residual: ArrayLike | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    mask: ArrayLike | None = None,
    return_var: bool = False,
    out: NDArray[Any] | None = None,
) -> tuple[Wide, ...]:
    """See `bnfast.functional.batch_norm`."""
    x = _wide(x)
    mean = x.mean(_other_axes(x, axis), keepdims=True)
    var = ((x - mean) ** 2).mean(_other_axes(x, axis), keepdims=True)
    inv_std = 1 / np.sqrt(var + eps)
    y = _before_activation((x - mean) * inv_std, gamma, beta, residual, axis)
    found = _written(_rectified(y, activation, negative_slope), out), mean.ravel(), inv_std.ravel()
    return (*found, var.ravel()) if return_var else found


@_masked
def batch_norm_eval(
    x: ArrayLike,
    mean: ArrayLike,
    var: ArrayLike,
    gamma: ArrayLike | None = None,
    beta: ArrayLike | None = None,
    *,
    axis: int = 1,
    eps: float = 1e-5,
    residual: ArrayLike | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    mask: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
) -> Wide:
    """See `bnfast.functional.batch_norm_eval`."""
    x = _wide(x)
    inv_std = 1 / np.sqrt(_along(var, x, axis, 1.0) + eps)
    y = _before_activation((x - _along(mean, x, axis, 0.0)) * inv_std, gamma, beta, residual, axis)
    return _written(_rectified(y, activation, negative_slope), out)


@_masked
def batch_norm_backward(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    inv_std: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    beta: ArrayLike | None = None,
    axis: int = 1,
    training: bool = True,
    residual: ArrayLike | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    mask: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
    out_residual: NDArray[Any] | None = None,
) -> tuple[Wide, ...]:
    """See `bnfast.functional.batch_norm_backward`."""
    given: dict[str, Any] = {"beta": beta, "axis": axis, "residual": residual, "activation": activation}
    sums = batch_norm_backward_sums(dy, x, mean, inv_std, gamma, negative_slope=negative_slope, **given)
    through_statistics = sums if training else None
    found = batch_norm_backward_apply(
        dy, x, mean, inv_std, gamma, through_statistics, negative_slope=negative_slope, out=out,
        out_residual=out_residual, **given,
    )  # fmt: skip
    dx, *dresidual = found if isinstance(found, tuple) else (found,)
    return dx, sums.dgamma, sums.dbeta, *dresidual


@_masked
def batch_norm_backward_sums(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    inv_std: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    beta: ArrayLike | None = None,
    axis: int = 1,
    residual: ArrayLike | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    mask: ArrayLike | None = None,
) -> Sums:
    """See `bnfast.functional.batch_norm_backward_sums`."""
    dy, x = _wide(dy), _wide(x)
    x_hat = (x - _along(mean, x, axis, 0.0)) * _along(inv_std, x, axis, 1.0)
    dy = _passed(dy, _before_activation(x_hat, gamma, beta, residual, axis), activation, negative_slope)
    others = _other_axes(x, axis)
    return Sums(x.size // max(1, x.shape[axis]), (dy * x_hat).sum(others), dy.sum(others))


@_masked
def batch_norm_backward_apply(
    dy: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    inv_std: ArrayLike,
    gamma: ArrayLike | None,
    sums: Sums | None,
    *,
    beta: ArrayLike | None = None,
    axis: int = 1,
    residual: ArrayLike | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    mask: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
    out_residual: NDArray[Any] | None = None,
) -> Wide | tuple[Wide, Wide]:
    """See `bnfast.functional.batch_norm_backward_apply`; sums None: of statistics that do not depend on x."""
    dy, x = _wide(dy), _wide(x)
    scale = _along(inv_std, x, axis, 1.0)
    x_hat = (x - _along(mean, x, axis, 0.0)) * scale
    dy = _passed(dy, _before_activation(x_hat, gamma, beta, residual, axis), activation, negative_slope)
    centred = dy
    if sums is not None:
        dgamma, dbeta = _along(sums.dgamma, x, axis, 0.0), _along(sums.dbeta, x, axis, 0.0)
        centred = dy - (dbeta + x_hat * dgamma) / max(1, sums.count)
    dx = _written(_along(gamma, x, axis, 1.0) * scale * centred, out)
    return dx if residual is None else (dx, _written(dy, out_residual))


@_masked
def batch_norm_jvp(
    v: ArrayLike,
    x: ArrayLike,
    mean: ArrayLike,
    inv_std: ArrayLike,
    gamma: ArrayLike | None = None,
    *,
    beta: ArrayLike | None = None,
    axis: int = 1,
    vgamma: ArrayLike | None = None,
    vbeta: ArrayLike | None = None,
    residual: ArrayLike | None = None,
    vresidual: ArrayLike | None = None,
    activation: str | None = None,
    negative_slope: float = 0.01,
    mask: ArrayLike | None = None,
    out: NDArray[Any] | None = None,
) -> Wide:
    """See `bnfast.functional.batch_norm_jvp`."""
    v, x = _wide(v), _wide(x)
    others = _other_axes(x, axis)
    scale = _along(inv_std, x, axis, 1.0)
    x_hat = (x - _along(mean, x, axis, 0.0)) * scale
    centred = v - v.mean(others, keepdims=True) - x_hat * (v * x_hat).mean(others, keepdims=True)
    along = _along(gamma, x, axis, 1.0) * scale * centred
    along = along + _along(vgamma, x, axis, 0.0) * x_hat + _along(vbeta, x, axis, 0.0)
    if vresidual is not None:
        along = along + _wide(vresidual)
    y = _before_activation(x_hat, gamma, beta, residual, axis)
    return _written(_passed(along, y, activation, negative_slope), out)
