"""Train two small networks to read digits, with and without batch normalisation.

``python -m bnfast demo`` runs this file. It is an example to read, too: a training loop in plain NumPy, in
which `bnfast.BatchNorm` is one layer among others. The networks with and without it differ in nothing else:
they have the same initial weights (He's, made for ReLU), the same mini-batches in the same order and the same
learning rate. The rate suits BatchNorm: to stand a large one is what it is for. Without it the fully
connected network is better off with a smaller one (try ``--learning-rate 0.05``).
"""

from __future__ import annotations

import argparse
import importlib
import io
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from .layer import BatchNorm

Array = npt.NDArray[Any]

BATCH_SIZE = 32
GOAL = 0.95  # the table counts the epochs to this test accuracy
EXTRAS = {  # module: package
    "sklearn": "scikit-learn",
    "threadpoolctl": "threadpoolctl",
    "tqdm": "tqdm",
    "matplotlib": "matplotlib",
}
BLUE, VERMILION = "#0072B2", "#D55E00"  # Okabe and Ito's, which colour-blind eyes tell apart


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


def activated(layer: Layer, n_features: int, normalise: bool) -> list[Layer]:
    """Add the activation to a layer and, in front of it, BatchNorm if asked for.

    Beta makes the bias before it superfluous; it stays, so that the two networks differ in nothing else.
    """
    return [layer, BatchNorm(n_features), ReLU()] if normalise else [layer, ReLU()]


def fully_connected(rng: np.random.Generator, normalise: bool) -> list[Layer]:
    """Five hidden layers of 128; BatchNorm sees (N, C)."""
    layers: list[Layer] = [Flatten()]
    for n_in, n_out in [(64, 128), (128, 128), (128, 128), (128, 128), (128, 128)]:
        layers += activated(Linear(n_in, n_out, rng), n_out, normalise)
    return [*layers, Linear(128, 10, rng)]


def convolutional(rng: np.random.Generator, normalise: bool) -> list[Layer]:
    """Two convolutions on 8x8 pixels, two on 4x4; BatchNorm sees (N, C, H, W)."""
    layers: list[Layer] = []
    for n_in, n_out in [(1, 8), (8, 16)]:
        layers += activated(Conv2d(n_in, n_out, rng), n_out, normalise)
        layers += activated(Conv2d(n_out, n_out, rng), n_out, normalise)
        layers += [MeanPool()]
    return [*layers, Flatten(), Linear(16 * 2 * 2, 10, rng)]


NETWORKS = {"fully connected": (fully_connected, 0.3), "convolutional": (convolutional, 0.1)}  # learning rate


def forward(layers: list[Layer], x: Array, training: bool) -> Array:
    """Run a network; BatchNorm takes the statistics of the batch in training, the running ones otherwise."""
    for layer in layers:
        if isinstance(layer, BatchNorm):
            layer.train(training)
        x = layer.forward(x)
    return x


# --- Training ---


class Digits(NamedTuple):
    """Images (N, 1, 8, 8), float32 from 0 to 1, and their labels (N,), 0 to 9."""

    train: tuple[Array, Array]
    test: tuple[Array, Array]


class Result(NamedTuple):
    """One training. Accuracies are shares of 1; the arrays have one entry an epoch."""

    network: str
    rate: float
    normalise: bool
    losses: Array
    test_accuracies: Array
    train_accuracy: float
    seconds: float


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


def learn(layers: list[Layer], images: Array, labels: Array, rate: float, rng: np.random.Generator) -> float:
    """Descend the gradient of one mini-batch after another, an epoch long; return the mean loss."""
    total = 0.0
    order = rng.permutation(len(images))
    for start in range(0, len(order), BATCH_SIZE):
        batch = order[start : start + BATCH_SIZE]
        loss, dy = cross_entropy(forward(layers, images[batch], training=True), labels[batch])
        total += loss * len(batch)
        for layer in reversed(layers):
            dy = layer.backward(dy)
        for layer in layers:
            gradients = layer.gradients()
            for name, parameter in layer.parameters().items():
                parameter -= rate * gradients[name]
    return total / len(images)


def accuracy(layers: list[Layer], images: Array, labels: Array, diverged: bool) -> float:
    """Return the share of images named rightly; once all scores are nan, their argmax names each one 0."""
    answers = 0 if diverged else forward(layers, images, training=False).argmax(axis=1)
    return float(np.mean(answers == labels))


def fit(
    name: str, rate: float, normalise: bool, digits: Digits, epochs: int, seed: int, tick: Callable[[], Any]
) -> Result:
    """Build a network, train it and measure it after every epoch; `tick` is called after each."""
    rng = np.random.default_rng(seed)  # the same weights, then the same batches, with and without BatchNorm
    layers = NETWORKS[name][0](rng, normalise)
    losses, accuracies, seconds = np.empty(epochs), np.empty(epochs), 0.0
    with np.errstate(all="ignore"):  # a training that diverges overflows; its loss shows it
        for epoch in range(epochs):
            start = time.perf_counter()
            losses[epoch] = learn(layers, *digits.train, rate, rng)
            seconds += time.perf_counter() - start
            diverged = not np.isfinite(losses[epoch])
            accuracies[epoch] = accuracy(layers, *digits.test, diverged)
            tick()
        train_accuracy = accuracy(layers, *digits.train, diverged)
    return Result(name, rate, normalise, losses, accuracies, train_accuracy, seconds)


# --- Report ---


def table(results: list[Result]) -> str:
    """Return a heading and a line for each training."""
    line = "{:<16} {:>5}  {:<13} {:>10} {:>10} {:>9} {:>14} {:>7}".format
    accuracies = "train acc.", "test acc.", f"epochs to {GOAL:.0%}"
    lines = [line("network", "rate", "normalisation", "train loss", *accuracies, "seconds")]
    for r in results:
        there = np.flatnonzero(r.test_accuracies >= GOAL)
        epochs = str(there[0] + 1) if len(there) else "-"
        scores = f"{r.losses[-1]:.4f}", f"{r.train_accuracy:.1%}", f"{r.test_accuracies[-1]:.1%}"
        kind = "BatchNorm" if r.normalise else "none"
        lines.append(line(r.network, f"{r.rate:g}", kind, *scores, epochs, f"{r.seconds:.1f}"))
    return "\n".join(lines)


def draw(results: list[Result], digits: Digits) -> bytes:
    """Return the figure as a PNG: test accuracy above, training loss below, a column for each network."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 7.2), dpi=150, layout="constrained")
    strip, *panels = figure.subplot_mosaic("ss;ab;cd", height_ratios=(1, 6, 6)).values()
    strip.imshow(np.hstack([np.pad(image[0], 1) for image in digits.train[0][::72]]), cmap="gray_r")
    strip.set_title("Learning to read digits with and without batch normalisation", fontsize=16, pad=10)
    strip.set_axis_off()
    for r in results:
        column = list(NETWORKS).index(r.network)
        label, color, marker = ("with BatchNorm", BLUE, "o") if r.normalise else ("without", VERMILION, "s")
        label += " (diverged)" if np.isnan(r.losses[-1]) else ""
        epochs = np.arange(1, len(r.losses) + 1)
        for axes, values in zip(panels[column::2], (100 * r.test_accuracies, r.losses), strict=True):
            axes.plot(epochs, values, color=color, marker=marker, markersize=5, linewidth=2, label=label)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.tick_params(labelsize=12)
            axes.grid(color="0.92")
            axes.spines[["top", "right"]].set_visible(False)
        panels[column].set_title(f"{r.network} network, learning rate {r.rate:g}", fontsize=13)
        panels[column].legend(fontsize=13, frameon=False)
    for top, bottom in zip(panels[:2], panels[2:], strict=True):
        top.set_ylim(0, 103)
        top.set_yticks([0, 25, 50, 75, 100 * GOAL])
        bottom.set_yscale("log")
        bottom.set_xlabel("epoch", fontsize=13)
    panels[0].set_ylabel("test accuracy (%)", fontsize=13)
    panels[2].set_ylabel("training loss (nats)", fontsize=13)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


# --- Command ---


def require(modules: list[str], extra: str = "demo") -> None:
    """Raise ImportError, with advice, if one of the modules is missing."""
    missing = []
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError:
            missing.append(EXTRAS[module])
    if missing:
        raise ImportError(f'missing: {", ".join(missing)}; to install: pip install "bnfast[{extra}]"')


def check_writable(path: Path) -> None:
    """Raise OSError if the file cannot be written; leave everything as it was."""
    existed = path.exists() or path.is_symlink()
    path.open("ab").close()
    if not existed:
        path.unlink()


def run(epochs: int, rate: float | None, seed: int, output: Path | None) -> None:
    """Train the four networks, print the table and, unless output is None, write the figure."""
    require([module for module in EXTRAS if output or module != "matplotlib"])
    if output:
        check_writable(output)
    from threadpoolctl import threadpool_limits
    from tqdm import tqdm

    digits = load_digits(seed)
    print(
        f"{len(digits.train[0])} images of digits to learn from, {len(digits.test[0])} to test on.\n"
        f"{epochs} epochs of stochastic gradient descent in batches of {BATCH_SIZE}, seed {seed}.\n"
        "With and without BatchNorm: the same initial weights, the same batches, the same learning rate.\n"
    )
    results = []
    bar = tqdm(total=2 * len(NETWORKS) * epochs, unit="epoch", leave=False, disable=None)
    with bar, threadpool_limits(1, user_api="blas"):  # more threads do not help with matrices this small
        for name, (_, default) in NETWORKS.items():
            for normalise in False, True:
                bar.set_description(f"{name}, {'with' if normalise else 'without'} BatchNorm")
                results.append(fit(name, rate or default, normalise, digits, epochs, seed, tick=bar.update))
    print(table(results))
    if rate is None:
        print(
            "\nThe rates suit BatchNorm. Without it the first network is close to divergence, and how this machine\n"
            "rounds matrix products decides how it ends (a loss of nan: it diverged); try --learning-rate 0.05."
        )
    if output:
        output.write_bytes(draw(results, digits))
        print(f"\nFigure: {output}")


def main(argv: list[str]) -> int:
    """Run the demo.

    Parameters
    ----------
    argv : list of str
        The arguments after ``python -m bnfast demo``.

    Returns
    -------
    int
        The exit code: 0, 1 if a package is missing or the figure cannot be written, 130 after Ctrl-C.
    """
    rates = ", ".join(f"{rate:g} {name}" for name, (_, rate) in NETWORKS.items())
    parser = argparse.ArgumentParser("python -m bnfast demo", description=str(__doc__).partition("\n")[0])
    add = parser.add_argument
    add("--epochs", type=int, default=15, metavar="N", help="times each image is seen (default: %(default)s)")
    add("--learning-rate", type=float, metavar="RATE", help=f"the same for both networks (default: {rates})")
    add("--seed", type=int, default=0, metavar="N", help="of split, weights, batches (default: %(default)s)")
    add("--output", type=Path, default="bnfast-demo.png", metavar="PATH", help="PNG (default: %(default)s)")
    add("--no-plot", action="store_true", help="write no figure; matplotlib is not needed")
    args = parser.parse_args(argv)
    if args.epochs < 1:
        parser.error(f"--epochs must be at least 1, not {args.epochs}")
    if args.seed < 0:
        parser.error(f"--seed must be at least 0, not {args.seed}")
    if args.learning_rate is not None and not 0 < args.learning_rate < np.inf:
        parser.error(f"--learning-rate must be positive and finite, not {args.learning_rate}")
    try:
        run(args.epochs, args.learning_rate, args.seed, None if args.no_plot else args.output)
    except (ImportError, OSError) as error:
        print(f"bnfast demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bnfast demo: interrupted", file=sys.stderr)
        return 130
    return 0
