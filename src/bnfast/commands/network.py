"""Small networks in plain NumPy, and real images to train them on: what the demo and the examples share."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from ..layer import BatchNorm

__all__ = [
    "Array",
    "Conv2d",
    "Digits",
    "Fixed",
    "Flatten",
    "Layer",
    "Linear",
    "MeanPool",
    "Normalise",
    "ReLU",
    "Sigmoid",
    "accuracy",
    "activated",
    "backward",
    "cross_entropy",
    "forward",
    "learn",
    "load_digits",
    "perceptron",
]

Array = npt.NDArray[Any]
Normalise = Literal["before", "after"] | None  # where BatchNorm is, seen from the activation

BATCH_SIZE = 32

# --- Layers: forward keeps what backward needs; backward takes dL/dy, keeps dL/dparameter, returns dL/dx ---


class Layer(Protocol):
    """What training asks of a layer."""

    def forward(self, x: Array, /) -> Array: ...
    def backward(self, dy: Array, /) -> Array: ...
    def parameters(self) -> Mapping[str, Array]: ...
    def gradients(self) -> Mapping[str, Array]: ...


class Linear:
    """Fully connected: (N, n_in) -> (N, n_out)."""

    def __init__(self, n_in: int, n_out: int, rng: np.random.Generator, dtype: npt.DTypeLike = np.float32):
        self.weight: Array = (rng.standard_normal((n_in, n_out)) * np.sqrt(2 / n_in)).astype(dtype)  # He
        self.bias: Array = np.zeros(n_out, dtype)
        self.grad_weight, self.grad_bias = np.zeros_like(self.weight), np.zeros_like(self.bias)

    def forward(self, x: Array) -> Array:
        self.x = x
        return x @ self.weight + self.bias

    def backward(self, dy: Array) -> Array:
        self.grad_weight = self.x.T @ dy
        self.grad_bias = dy.sum(axis=0)
        return dy @ self.weight.T

    def parameters(self) -> dict[str, Array]:
        return {"weight": self.weight, "bias": self.bias}

    def gradients(self) -> dict[str, Array]:
        return {"weight": self.grad_weight, "bias": self.grad_bias}


class Conv2d(Linear):
    """3x3 convolution, zeros around the image: (N, n_in, H, W) -> (N, n_out, H, W).

    It is Linear, applied to the 3x3 pixels around each pixel.
    """

    def __init__(self, n_in: int, n_out: int, rng: np.random.Generator, dtype: npt.DTypeLike = np.float32):
        super().__init__(n_in * 9, n_out, rng, dtype)

    def forward(self, x: Array) -> Array:
        n, c, h, w = self.shape = x.shape
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = sliding_window_view(padded, (3, 3), axis=(2, 3))  # (N, C, H, W, 3, 3)
        rows = windows.transpose(0, 2, 3, 1, 4, 5).reshape(n * h * w, c * 9)
        return np.ascontiguousarray(super().forward(rows).reshape(n, h, w, -1).transpose(0, 3, 1, 2))

    def backward(self, dy: Array) -> Array:
        n, c, h, w = self.shape
        drows = super().backward(dy.transpose(0, 2, 3, 1).reshape(n * h * w, -1))
        dwindows = drows.reshape(n, h, w, c, 3, 3).transpose(0, 3, 1, 2, 4, 5)
        dpadded = np.zeros((n, c, h + 2, w + 2), dy.dtype)
        for i, j in np.ndindex(3, 3):
            dpadded[:, :, i : i + h, j : j + w] += dwindows[..., i, j]
        return dpadded[:, :, 1:-1, 1:-1]


class Fixed:
    """A layer with nothing to learn."""

    def parameters(self) -> dict[str, Array]:
        return {}

    def gradients(self) -> dict[str, Array]:
        return {}


class ReLU(Fixed):
    """max(x, 0); any shape."""

    def forward(self, x: Array) -> Array:
        self.positive = x > 0
        return np.maximum(x, 0)

    def backward(self, dy: Array) -> Array:
        return dy * self.positive


class Sigmoid(Fixed):
    """1 / (1 + exp(-x)); any shape."""

    def forward(self, x: Array) -> Array:
        self.y: Array = 0.5 * np.tanh(0.5 * x) + 0.5  # the same, without overflow
        return self.y

    def backward(self, dy: Array) -> Array:
        dx: Array = dy * self.y * (1 - self.y)
        return dx


class MeanPool(Fixed):
    """The means of 2x2 pixels: (N, C, H, W) -> (N, C, H / 2, W / 2)."""

    def forward(self, x: Array) -> Array:
        n, c, h, w = x.shape
        return np.asarray(x.reshape(n, c, h // 2, 2, w // 2, 2).mean(axis=(3, 5)))

    def backward(self, dy: Array) -> Array:
        return (dy / 4).repeat(2, axis=2).repeat(2, axis=3)


class Flatten(Fixed):
    """(N, C, H, W) -> (N, C * H * W)."""

    def forward(self, x: Array) -> Array:
        self.shape = x.shape
        return x.reshape(len(x), -1)

    def backward(self, dy: Array) -> Array:
        return dy.reshape(self.shape)


# --- Networks ---


def activated(
    layer: Layer, n_features: int, normalise: Normalise, activation: type[ReLU] | type[Sigmoid] = ReLU
) -> list[Layer]:
    """Add the activation to a layer and, before or after it, BatchNorm if asked for.

    Beta makes the bias before it superfluous; it stays, so that networks with and without differ in nothing else.
    """
    if normalise is None:
        return [layer, activation()]
    if normalise == "after":
        return [layer, activation(), BatchNorm(n_features)]
    if activation is ReLU:
        return [layer, BatchNorm(n_features, activation="relu")]  # both in one pass
    return [layer, BatchNorm(n_features), activation()]


def perceptron(
    sizes: Sequence[int],
    rng: np.random.Generator,
    normalise: Normalise,
    activation: type[ReLU] | type[Sigmoid] = ReLU,
) -> list[Layer]:
    """Fully connected layers from sizes[0] inputs to sizes[-1] scores, which are neither normalised nor activated."""
    layers: list[Layer] = []
    for n_in, n_out in pairwise(sizes[:-1]):
        layers += activated(Linear(n_in, n_out, rng), n_out, normalise, activation)
    return [*layers, Linear(sizes[-2], sizes[-1], rng)]


def forward(layers: list[Layer], x: Array, training: bool) -> Array:
    """Run a network; BatchNorm takes the statistics of the batch in training, the running ones otherwise."""
    for layer in layers:
        if isinstance(layer, BatchNorm):
            layer.train(training)
        x = layer.forward(x)
    return x


def backward(layers: list[Layer], dy: Array) -> Array:
    """Run a network backwards: every layer gets its gradients; return dL/dx."""
    for layer in reversed(layers):
        dy = layer.backward(dy)
    return dy


# --- Training ---


class Digits(NamedTuple):
    """Images (N, 1, 8, 8), float32 from 0 to 1, and their labels (N,), 0 to 9."""

    train: tuple[Array, Array]
    test: tuple[Array, Array]


def load_digits(seed: int) -> Digits:
    """Return scikit-learn's 1797 digits; a fifth of each class, drawn by the seed, is for the test."""
    from sklearn import datasets

    bunch = datasets.load_digits()
    images, labels = (bunch.images[:, np.newaxis] / 16).astype(np.float32), bunch.target
    order = np.random.default_rng(seed).permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # sorted by class, shuffled within
    is_test = np.arange(len(order)) % 5 == 0
    train, test = order[~is_test], order[is_test]
    return Digits((images[train], labels[train]), (images[test], labels[test]))


def cross_entropy(scores: Array, labels: Array) -> tuple[float, Array]:
    """Return the mean -log softmax(scores)[label] over a batch, in nats, and the gradient in the scores."""
    rows = np.arange(len(labels))
    scores = scores - scores.max(axis=1, keepdims=True)
    log_p = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
    dscores = np.exp(log_p)
    dscores[rows, labels] -= 1
    return float(-log_p[rows, labels].mean()), dscores / len(labels)


def learn(
    layers: list[Layer],
    images: Array,
    labels: Array,
    rate: float,
    rng: np.random.Generator,
    batch_size: int = BATCH_SIZE,
) -> float:
    """Descend the gradient of one mini-batch after another, an epoch long; return the mean loss."""
    total = 0.0
    order = rng.permutation(len(images))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        loss, dy = cross_entropy(forward(layers, images[batch], training=True), labels[batch])
        total += loss * len(batch)
        backward(layers, dy)
        for layer in layers:
            gradients = layer.gradients()
            for name, parameter in layer.parameters().items():
                parameter -= rate * gradients[name]
    return total / len(images)


def accuracy(layers: list[Layer], images: Array, labels: Array, diverged: bool = False) -> float:
    """Return the share of images named rightly; once all scores are nan, their argmax names each one 0."""
    answers = 0 if diverged else forward(layers, images, training=False).argmax(axis=1)
    return float(np.mean(answers == labels))
