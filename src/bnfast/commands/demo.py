"""Train two small networks to read digits, with and without batch normalisation.

``python -m bnfast demo`` runs this file. It is an example to read, too: with `network.py` a training loop in plain
NumPy, in which `bnfast.BatchNorm` is one layer among others, and does the ReLU behind it in the same pass. The networks
with and without it differ in nothing else: they have the same initial weights (He's, made for ReLU), the same
mini-batches in the same order and the same learning rate. The rate suits BatchNorm: to stand a large one is what it is
for. Without it the fully connected network is better off with a smaller one (try ``--learning-rate 0.05``).
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .common import EXTRAS, check_writable, ended, require
from .figures import BLUE, VERMILION
from .network import (
    BATCH_SIZE,
    Array,
    Conv2d,
    Digits,
    Flatten,
    Layer,
    Linear,
    MeanPool,
    Normalise,
    accuracy,
    activated,
    learn,
    load_digits,
    perceptron,
)

__all__ = ["main"]

GOAL = 0.95  # the table counts the epochs to this test accuracy


# --- Networks ---


def fully_connected(rng: np.random.Generator, normalise: bool) -> list[Layer]:
    """Five hidden layers of 128; BatchNorm sees (N, C)."""
    return [Flatten(), *perceptron([64, 128, 128, 128, 128, 128, 10], rng, "before" if normalise else None)]


def convolutional(rng: np.random.Generator, normalise: bool) -> list[Layer]:
    """Two convolutions on 8x8 pixels, two on 4x4; BatchNorm sees (N, C, H, W)."""
    layers: list[Layer] = []
    where: Normalise = "before" if normalise else None
    for n_in, n_out in [(1, 8), (8, 16)]:
        layers += activated(Conv2d(n_in, n_out, rng), n_out, where)
        layers += activated(Conv2d(n_out, n_out, rng), n_out, where)
        layers += [MeanPool()]
    return [*layers, Flatten(), Linear(16 * 2 * 2, 10, rng)]


NETWORKS = {"fully connected": (fully_connected, 0.2), "convolutional": (convolutional, 0.1)}  # learning rate


# --- Training ---


class Result(NamedTuple):
    """One training. Accuracies are shares of 1; the arrays have one entry an epoch."""

    network: str
    rate: float
    normalise: bool
    losses: Array
    test_accuracies: Array
    train_accuracy: float
    seconds: float


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
            "\nThe rates suit BatchNorm. Without it the first network learns unsteadily, and how this machine rounds\n"
            "matrix products decides how it ends; at 0.3 it may diverge (a loss of nan), at 0.05 it is steady\n"
            "(--learning-rate). With BatchNorm the training loss keeps the noise of the batches' statistics."
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
    if args.output.suffix.lower() != ".png" and not args.no_plot:
        parser.error(f"--output must end in .png, not {args.output}")
    if args.seed < 0:
        parser.error(f"--seed must be at least 0, not {args.seed}")
    if args.learning_rate is not None and not 0 < args.learning_rate < np.inf:
        parser.error(f"--learning-rate must be positive and finite, not {args.learning_rate}")
    output = None if args.no_plot else args.output
    return ended("demo", lambda: run(args.epochs, args.learning_rate, args.seed, output))
