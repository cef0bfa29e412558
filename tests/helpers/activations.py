"""Activations in NumPy, in the dtype of the data; data that meet their kinks; what is fused, one step after another."""

from typing import NamedTuple

import numpy as np

from bnfast import functional as F

ACTIVATIONS = [None, "relu", "relu6", "leaky_relu"]
SLOPE = 0.3  # no float32 is this


def rectified(y, activation, slope=SLOPE):
    """The activation of y."""
    if activation is None:
        return y
    below = y.dtype.type(slope) * y if activation == "leaky_relu" else np.zeros_like(y)
    y = np.where(y <= 0, below, y)
    return np.where(y >= 6, np.full_like(y, 6), y) if activation == "relu6" else y


def passed(u, y, activation, slope=SLOPE):
    """u times the activation's derivative at y."""
    if activation is None:
        return u
    u = np.where(y <= 0, u.dtype.type(slope) * u if activation == "leaky_relu" else np.zeros_like(u), u)
    return np.where(y >= 6, np.zeros_like(u), u) if activation == "relu6" else u


class Batch(NamedTuple):
    x: np.ndarray
    dy: np.ndarray
    v: np.ndarray
    residual: np.ndarray
    vresidual: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    vgamma: np.ndarray
    vbeta: np.ndarray
    axis: int

    def map(self, function):
        """The same with another x, dy, ..., vresidual: what a function makes of them."""
        return self._replace(**{name: function(getattr(self, name)) for name in LIKE_X})

    @property
    def channels(self):
        return len(self.gamma)


LIKE_X = ("x", "dy", "v", "residual", "vresidual")


def batch(shape, dtype, axis=1, order="C", at_kinks=True):
    """Values on both sides of 0 and of 6.

    at_kinks: of three channels or more the first is 0 and the second 6 before the activation, but for a residual.
    """
    rng = np.random.default_rng((*shape, axis % len(shape)))
    x, dy, v, residual, vresidual = (np.asarray(rng.normal(1, 2, shape), dtype, order=order) for _ in LIKE_X)
    for array in (dy, residual):  # some zeros of either sign
        array[rng.random(shape) < 0.1] = 0.0
        array[rng.random(shape) < 0.1] = -0.0
    gamma, beta, vgamma, vbeta = rng.normal([[0], [1], [0], [0]], [[4], [2], [1], [1]], (4, shape[axis])).astype(dtype)
    if at_kinks and shape[axis] > 2:
        np.moveaxis(x, axis, 0)[:2] = 0.1
        beta[:2] = 0, 6
    return Batch(x, dy, v, residual, vresidual, gamma, beta, vgamma, vbeta, axis)


def fused(b, activation, with_residual, mask=None):
    """name -> array: all that the functions give."""
    residual, vresidual = (b.residual, b.vresidual) if with_residual else (None, None)
    options = {
        "axis": b.axis, "residual": residual, "activation": activation, "negative_slope": SLOPE, "mask": mask
    }  # fmt: skip
    y, mean, inv_std, var = F.batch_norm(b.x, b.gamma, b.beta, return_var=True, **options)
    found = {"y": y, "mean": mean, "inv_std": inv_std, "var": var}
    usable = np.where(np.isfinite(var), var, 1)  # eval takes no other
    found["y_eval"] = F.batch_norm_eval(b.x, mean, usable, b.gamma, b.beta, **options)
    given = b.dy, b.x, mean, inv_std, b.gamma
    options["beta"] = b.beta
    for name, training in (("", True), ("_eval", False)):
        gradients = F.batch_norm_backward(*given, training=training, **options)
        names = ("dx", "dgamma", "dbeta", "dresidual")[: 4 if with_residual else 3]
        found |= {key + name: gradient for key, gradient in zip(names, gradients, strict=True)}
    sums = F.batch_norm_backward_sums(*given, **options)
    found |= {"sums_dgamma": sums.dgamma, "sums_dbeta": sums.dbeta, "count": np.array(sums.count)}
    applied = F.batch_norm_backward_apply(*given, sums, **options)
    if with_residual:
        found["dx_applied"], found["dresidual_applied"] = applied
    else:
        found["dx_applied"] = applied
    directions = {"vgamma": b.vgamma, "vbeta": b.vbeta, "vresidual": vresidual}
    found["jvp"] = F.batch_norm_jvp(b.v, b.x, mean, inv_std, b.gamma, **directions, **options)
    return found


def one_after_another(b, activation, with_residual):
    """The same from batch normalisation alone, and NumPy."""
    y, mean, inv_std, var = F.batch_norm(b.x, b.gamma, b.beta, axis=b.axis, return_var=True)
    usable = np.where(np.isfinite(var), var, 1)  # eval takes no other
    y_eval = F.batch_norm_eval(b.x, mean, usable, b.gamma, b.beta, axis=b.axis)
    if with_residual:
        y, y_eval = y + b.residual, y_eval + b.residual
    dy = passed(b.dy, y, activation)
    found = {"y": rectified(y, activation), "mean": mean, "inv_std": inv_std, "var": var}
    found["y_eval"] = rectified(y_eval, activation)
    given = b.x, mean, inv_std, b.gamma
    for name, training in (("", True), ("_eval", False)):
        gradients = F.batch_norm_backward(dy, *given, axis=b.axis, training=training)
        found |= {key + name: gradient for key, gradient in zip(("dx", "dgamma", "dbeta"), gradients, strict=True)}
        if with_residual:
            found["dresidual" + name] = dy
    found["dx_applied"] = found["dx"]
    if with_residual:
        found["dresidual_applied"] = dy
    sums = F.batch_norm_backward_sums(dy, *given, axis=b.axis)
    found |= {"sums_dgamma": sums.dgamma, "sums_dbeta": sums.dbeta, "count": np.array(sums.count)}
    jvp = F.batch_norm_jvp(b.v, *given, axis=b.axis, vgamma=b.vgamma, vbeta=b.vbeta)
    found["jvp"] = passed(jvp + b.vresidual if with_residual else jvp, y, activation)
    return found
