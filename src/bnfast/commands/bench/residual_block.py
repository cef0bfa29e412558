"""A residual block of a convolutional network, channels-last, forward and backward: (c) of `bench --loop`.

x -> batch norm, ReLU -> 1x1 convolution (a product of matrices) -> batch norm, + x, ReLU.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from ... import functional as F
from ... import reference
from .contenders import EPS, Array, Operation, imported_torch

__all__ = ["DIMS", "KINDS", "ResidualBlock"]

DIMS = (32, 28, 28, 128)  # (N, H, W, C)
TOLERANCE = 1e-2  # of the norm: rounding decides what ReLU lets pass near 0, and each such value differs by all of dy
GRADIENTS = ("dx", "dweight", "dgamma1", "dbeta1", "dgamma2", "dbeta2")


def data() -> dict[str, Array]:
    """x and dy (pixels, C), the weights of the convolution (C, C) and those of both layers: always the same."""
    rng = np.random.default_rng(3)
    channels = DIMS[-1]
    pixels = int(np.prod(DIMS[:-1]))
    found = {name: rng.standard_normal((pixels, channels), np.float32) for name in ("x", "dy")}
    found["weight"] = rng.standard_normal((channels, channels), np.float32) * np.float32((2 / channels) ** 0.5)
    for name, low, high in (("gamma", 0.5, 1.5), ("beta", -1.0, 1.0)):
        for layer in "12":
            found[name + layer] = rng.uniform(low, high, channels).astype(np.float32)
    return found


def expected() -> dict[str, Array]:
    """y and the gradients in float64."""
    d = {name: array.astype(np.float64) for name, array in data().items()}
    a, mean1, inv_std1 = reference.batch_norm(d["x"], d["gamma1"], d["beta1"], eps=EPS)
    a = np.maximum(a, 0)
    h = a @ d["weight"]
    y, mean2, inv_std2 = reference.batch_norm(h, d["gamma2"], d["beta2"], eps=EPS)
    y = np.maximum(y + d["x"], 0)
    dskip = np.where(y > 0, d["dy"], 0)
    dh, dgamma2, dbeta2 = reference.batch_norm_backward(dskip, h, mean2, inv_std2, d["gamma2"])
    da = np.where(a > 0, dh @ d["weight"].T, 0)
    dx, dgamma1, dbeta1 = reference.batch_norm_backward(da, d["x"], mean1, inv_std1, d["gamma1"])
    gradients = (dx + dskip, a.T @ dh, dgamma1, dbeta1, dgamma2, dbeta2)
    return {"y": y, **dict(zip(GRADIENTS, gradients, strict=True))}


# --- What the block does besides the product --------------------------------------------------------------------


class Stage(Protocol):
    """y = relu(batch norm(x) + residual) on (M, C), in training; the residual may be None."""

    def __init__(self, gamma: Array, beta: Array) -> None: ...
    def forward(self, x: Array, residual: Array | None, out: Array) -> None: ...
    def backward(self, dy: Array, out: Array, out_residual: Array | None) -> tuple[Array, Array]:
        """(dgamma, dbeta); without out_residual dy is overwritten."""


class Fused:
    """One call of bnfast."""

    def __init__(self, gamma: Array, beta: Array) -> None:
        self._gamma, self._beta = gamma, beta

    def forward(self, x: Array, residual: Array | None, out: Array) -> None:
        self._x, self._residual = x, residual
        _, self._mean, self._inv_std, *_ = F.batch_norm(
            x, self._gamma, self._beta, eps=EPS, residual=residual, activation="relu", out=out
        )

    def backward(self, dy: Array, out: Array, out_residual: Array | None) -> tuple[Array, Array]:
        _, dgamma, dbeta, *_ = F.batch_norm_backward(
            dy, self._x, self._mean, self._inv_std, self._gamma, beta=self._beta,
            residual=self._residual, activation="relu", out=out, out_residual=out_residual,
        )  # fmt: skip
        return dgamma, dbeta


class Steps:
    """Batch normalisation by bnfast, the rest by NumPy, in memory that is there."""

    def __init__(self, gamma: Array, beta: Array) -> None:
        self._gamma, self._beta = gamma, beta

    def forward(self, x: Array, residual: Array | None, out: Array) -> None:
        self._x, self._y = x, out
        self._normalise(x, out)
        if residual is not None:
            np.add(out, residual, out=out)
        np.maximum(out, np.float32(0), out=out)

    def backward(self, dy: Array, out: Array, out_residual: Array | None) -> tuple[Array, Array]:
        positive = np.greater(self._y, np.float32(0))
        passed = np.multiply(dy, positive, out=dy if out_residual is None else out_residual)
        return self._differentiate(passed, out)

    def _normalise(self, x: Array, out: Array) -> None:
        _, self._mean, self._inv_std, *_ = F.batch_norm(x, self._gamma, self._beta, eps=EPS, out=out)

    def _differentiate(self, dy: Array, out: Array) -> tuple[Array, Array]:
        _, dgamma, dbeta, *_ = F.batch_norm_backward(dy, self._x, self._mean, self._inv_std, self._gamma, out=out)
        return dgamma, dbeta


class Plain(Steps):
    """NumPy alone."""

    def _normalise(self, x: Array, out: Array) -> None:
        self._mean = x.mean(axis=0)
        np.subtract(x, self._mean, out=out)
        self._scratch = np.square(out)
        self._inv_std = 1 / np.sqrt(self._scratch.mean(axis=0) + np.float32(EPS))
        out *= self._gamma * self._inv_std
        out += self._beta

    def _differentiate(self, dy: Array, out: Array) -> tuple[Array, Array]:
        n = np.float32(len(dy))
        x_hat = np.subtract(self._x, self._mean, out=out)
        x_hat *= self._inv_std
        dbeta = dy.sum(axis=0)
        dgamma = np.multiply(dy, x_hat, out=self._scratch).sum(axis=0)
        x_hat *= dgamma / -n
        x_hat += dy
        x_hat -= dbeta / n
        x_hat *= self._gamma * self._inv_std
        return dgamma, dbeta


# --- The block --------------------------------------------------------------------------------------------------

Results = dict[str, Array]
Calls = tuple[Callable[[], Any], Callable[[], Any], Callable[[], Results]]  # forward, backward, their results


def numpy_calls(stage: type[Stage]) -> Calls:
    """The block in NumPy's arrays and products."""
    d = data()
    x, dy, weight = d["x"], d["dy"], d["weight"]
    first, second = stage(d["gamma1"], d["beta1"]), stage(d["gamma2"], d["beta2"])
    a, h, y, dh, da, dx, dskip = (np.empty_like(x) for _ in range(7))
    dweight = np.empty_like(weight)

    def forward() -> None:
        first.forward(x, None, a)
        np.matmul(a, weight, out=h)
        second.forward(h, x, y)

    def backward() -> tuple[Array, ...]:
        of_second = second.backward(dy, dh, dskip)
        np.matmul(a.T, dh, out=dweight)
        np.matmul(dh, weight.T, out=da)
        of_first = first.backward(da, dx, None)
        np.add(dx, dskip, out=dx)
        return (dx, dweight, *of_first, *of_second)

    return forward, backward, lambda: {"y": y, **dict(zip(GRADIENTS, backward(), strict=True))}


def torch_calls(threads: int | None) -> Calls:
    """The block in PyTorch, eager, with autograd; the layers change what is theirs in place, as torchvision's do."""
    torch = imported_torch(threads)
    d, channels = data(), DIMS[-1]

    def image(name: str) -> Any:
        return torch.from_numpy(d[name].reshape(DIMS)).permute(0, 3, 1, 2)

    x, dy, batch_norm = image("x").requires_grad_(), image("dy"), torch.nn.functional.batch_norm
    weight = torch.from_numpy(np.ascontiguousarray(d["weight"].T)).reshape(channels, channels, 1, 1).requires_grad_()
    gamma1, beta1, gamma2, beta2 = (
        torch.from_numpy(d[name]).requires_grad_() for name in ("gamma1", "beta1", "gamma2", "beta2")
    )
    found: dict[str, Any] = {}

    def forward() -> None:
        a = batch_norm(x, None, None, gamma1, beta1, True, 0.1, EPS).relu_()
        y = batch_norm(torch.nn.functional.conv2d(a, weight), None, None, gamma2, beta2, True, 0.1, EPS)
        y += x
        found["y"] = y.relu_()

    def backward() -> Any:
        of = (x, weight, gamma1, beta1, gamma2, beta2)
        return torch.autograd.grad(found["y"], of, dy, retain_graph=True)

    def results() -> Results:
        dx, dweight, *others = backward()
        pixels = {"y": found["y"], "dx": dx}
        arrays = {name: t.detach().permute(0, 2, 3, 1).reshape(-1, channels).numpy() for name, t in pixels.items()}
        arrays["dweight"] = dweight.reshape(channels, channels).numpy().T
        return {**arrays, **{name: t.numpy() for name, t in zip(GRADIENTS[2:], others, strict=True)}}

    return forward, backward, results


KINDS: dict[str, Callable[[int | None], Calls]] = {
    "fused": lambda _: numpy_calls(Fused),
    "steps": lambda _: numpy_calls(Steps),
    "numpy": lambda _: numpy_calls(Plain),
    "torch": torch_calls,
}


class ResidualBlock:
    """One of `KINDS`, as the worker wants it.

    Raises
    ------
    ArithmeticError
        If it computes something else than `expected`.
    """

    def __init__(self, kind: str, threads: int | None = None) -> None:
        self.about = kind
        self._forward, self._backward, results = KINDS[kind](threads)
        self._forward()
        found, self._error = results(), 0.0
        for name, value in expected().items():
            error = float(np.linalg.norm(found[name] - value) / np.linalg.norm(value))
            if not error <= TOLERANCE:
                raise ArithmeticError(f"{name} of the residual block is wrong by {error:.2g} of its norm")
            self._error = max(self._error, error)

    def tasks(self) -> dict[str, Operation]:
        """What to time."""
        return {
            "forward": Operation({"": self._forward}, lambda _: {}),
            "backward": Operation({"": self._backward}, lambda _: {}),
        }

    def notes(self) -> dict[str, Any]:
        """The largest error of y and the gradients, over the norm."""
        return {"error": self._error}
