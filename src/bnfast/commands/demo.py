"""Train two networks to read digits, with and without batch normalisation, at rates at which it decides.

``python -m bnfast demo`` runs this file. It is an example to read, too: with `network.py` a training loop in plain
NumPy, in which `bnfast.BatchNorm` is one layer among others, and does the ReLU behind it in the same pass. The networks
with and without it differ in nothing else: they have the same initial weights (He's, made for ReLU), the same
mini-batches in the same order and the same learning rate. They are deep and take large steps: what batch normalisation
is for. At a small rate the first learns as well without (try ``--learning-rate 0.02``).
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .common import EXTRAS, check_writable, ended, require
from .figures import BLUE, VERMILION, curve
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

GUESSING = np.log(10)  # nats: the loss of one who knows nothing about ten classes


# --- Networks ---


def fully_connected(rng: np.random.Generator, normalise: bool) -> list[Layer]:
    """Fifteen hidden layers of 100; BatchNorm sees (N, C)."""
    return [Flatten(), *perceptron([64, *[100] * 15, 10], rng, "before" if normalise else None)]


def convolutional(rng: np.random.Generator, normalise: bool) -> list[Layer]:
    """Two convolutions on 8x8 pixels, six on 4x4; BatchNorm sees (N, C, H, W)."""
    layers: list[Layer] = []
    where: Normalise = "before" if normalise else None
    for widths in [1, 8, 8], [8, 16, 16, 16, 16, 16, 16]:
        for n_in, n_out in pairwise(widths):
            layers += activated(Conv2d(n_in, n_out, rng), n_out, where)
        layers += [MeanPool()]
    return [*layers, Flatten(), Linear(16 * 2 * 2, 10, rng)]


NETWORKS = {"fully connected": (fully_connected, 0.3), "convolutional": (convolutional, 1.0)}  # learning rate
TITLES = {"fully connected": "15 fully connected layers", "convolutional": "8 convolutions"}


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


def groups(results: list[Result]) -> dict[tuple[str, bool], list[Result]]:
    """The trainings of all seeds by (network, normalise), without batch normalisation first."""
    found: dict[tuple[str, bool], list[Result]] = {}
    for r in results:
        found.setdefault((r.network, r.normalise), []).append(r)
    return found


def table(results: list[Result]) -> str:
    """Return a heading and a line for each network with and without batch normalisation."""
    line = "{:<16} {:>5}  {:<13} {:>10} {:>10} {:>10} {:>8} {:>8} {:>8}".format
    titles = "train loss", "train acc.", "test acc.", "lowest", "highest", "seconds"
    lines = [line("network", "rate", "normalisation", *titles)]
    for (network, normalise), seeds in groups(results).items():
        scores = np.array([r.test_accuracies[-1] for r in seeds])
        loss = np.median([r.losses[-1] for r in seeds])  # nan if one of them is
        shares = np.median([r.train_accuracy for r in seeds]), np.median(scores), scores.min(), scores.max()
        kind = "BatchNorm" if normalise else "none"
        seconds = f"{sum(r.seconds for r in seeds):.1f}"
        columns = f"{loss:.4f}", *(f"{share:.1%}" for share in shares), seconds
        lines.append(line(network, f"{seeds[0].rate:g}", kind, *columns))
    return "\n".join(lines)


def words(results: list[Result]) -> str:
    """Say what the table shows, whatever that is."""
    found = groups(results)
    lines = []
    for network in dict.fromkeys(r.network for r in results):
        ranges = []
        for normalise in True, False:
            scores = [r.test_accuracies[-1] for r in found[network, normalise]]
            low, high = f"{min(scores):.0%}", f"{max(scores):.0%}"
            ranges.append(low if low == high else f"{low} to {high}")
        diverged = sum(bool(np.isnan(r.losses[-1])) for r in found[network, False])
        lines.append(f"{network}: with BatchNorm {ranges[0]} of the test images are read rightly, without {ranges[1]}")
        lines[-1] += f" ({diverged} of {len(found[network, False])} diverged)." if diverged else "."
    return "\n".join(lines)


def title(results: list[Result]) -> str:
    """Say what the figure shows."""
    scores = {
        normalise: [r.test_accuracies[-1] for r in results if r.normalise == normalise] for normalise in (True, False)
    }
    if min(scores[True]) > 0.8 > 0.6 > max(scores[False]):
        return "Where a plain network learns nothing, one with batch normalisation does"
    return "Learning to read digits with and without batch normalisation"


def draw(results: list[Result], digits: Digits) -> bytes:
    """Return the figure as a PNG: test accuracy above, training loss below, a column for each network."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 7.2), dpi=150, layout="constrained")
    strip, *axes = figure.subplot_mosaic("ss;ab;cd", height_ratios=(1, 6, 6)).values()
    axes[3].sharey(axes[2])
    strip.imshow(np.hstack([np.pad(image[0], 1) for image in digits.train[0][::72]]), cmap="gray_r")
    strip.set_title(title(results), fontsize=16, pad=10)
    strip.set_axis_off()
    for (network, normalise), seeds in groups(results).items():
        column = list(NETWORKS).index(network)
        style = (BLUE, "o", "with BatchNorm") if normalise else (VERMILION, "s", "without")
        epochs = np.arange(1, len(seeds[0].losses) + 1)
        losses = np.array([r.losses for r in seeds])
        losses = np.where(np.isfinite(losses), losses, np.inf).clip(max=2 * GUESSING)  # diverged: at the upper edge
        curve(axes[column], epochs, [100 * r.test_accuracies for r in seeds], *style)
        curve(axes[2 + column], epochs, losses, *style)
        axes[column].set_title(f"{TITLES[network]}, learning rate {seeds[0].rate:g}", fontsize=13)
    for panel in axes:
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.tick_params(labelsize=12)
        panel.grid(color="0.92")
        panel.spines[["top", "right"]].set_visible(False)
    for top, bottom in zip(axes[:2], axes[2:], strict=True):
        top.set_ylim(0, 103)
        bottom.set_yscale("log")
        bottom.set_ylim(top=6)
        bottom.axhline(GUESSING, color="0.4", linewidth=1, linestyle=(0, (4, 3)))
        bottom.text(0.99, 2.9, "guessing", transform=bottom.get_yaxis_transform(), fontsize=12, va="bottom", ha="right")
        bottom.set_xlabel("epoch", fontsize=13)
    axes[0].legend(loc="center right", fontsize=13, frameon=False)
    axes[0].set_ylabel("test accuracy (%)", fontsize=13)
    axes[2].set_ylabel("training loss (nats)", fontsize=13)
    n = len(next(iter(groups(results).values())))
    if n > 1:
        figure.supxlabel(f"lines: median of {n} seeds; shades: all of them", fontsize=11, color="0.35")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


# --- Command ---


def run(epochs: int, rate: float | None, seeds: range, output: Path | None) -> None:
    """Train the networks, print the table and, unless output is None, write the figure."""
    require([module for module in EXTRAS if output or module != "matplotlib"])
    if output:
        check_writable(output)
    from threadpoolctl import threadpool_limits
    from tqdm import tqdm

    data = {seed: load_digits(seed) for seed in seeds}
    digits = data[seeds[0]]
    print(
        f"{len(digits.train[0])} images of digits to learn from, {len(digits.test[0])} to test on.\n"
        f"{epochs} epochs of stochastic gradient descent in batches of {BATCH_SIZE}, "
        f"{'seed' if len(seeds) == 1 else 'seeds'} {', '.join(map(str, seeds))}.\n"
        "With and without BatchNorm: the same initial weights, the same batches, the same learning rate.\n"
    )
    results = []
    bar = tqdm(total=2 * len(NETWORKS) * len(seeds) * epochs, unit="epoch", leave=False, disable=None)
    with bar, threadpool_limits(1, user_api="blas"):  # more threads do not help with matrices this small
        for name, (_, default) in NETWORKS.items():
            for normalise in False, True:
                bar.set_description(f"{name}, {'with' if normalise else 'without'} BatchNorm")
                for seed in seeds:
                    results.append(fit(name, rate or default, normalise, data[seed], epochs, seed, tick=bar.update))
    print(table(results))
    print(f"\n{words(results)}")
    if output:
        output.write_bytes(draw(results, digits))
        print(f"\nFigure: {output}")
    print("\nNext: python -m bnfast gallery DIR (eight more), python -m bnfast bench --quick (how fast it is here)")


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
    add("--epochs", type=int, default=10, metavar="N", help="times each image is seen (default: %(default)s)")
    add("--learning-rate", type=float, metavar="RATE", help=f"the same for both networks (default: {rates})")
    add("--seed", type=int, default=0, metavar="N", help="of split, weights, batches (default: %(default)s)")
    add("--seeds", type=int, default=3, metavar="N", help="how many, from --seed on (default: %(default)s)")
    add("--output", type=Path, default="bnfast-demo.png", metavar="PATH", help="PNG (default: %(default)s)")
    add("--no-plot", action="store_true", help="write no figure; matplotlib is not needed")
    args = parser.parse_args(argv)
    if args.epochs < 1:
        parser.error(f"--epochs must be at least 1, not {args.epochs}")
    if args.output.suffix.lower() != ".png" and not args.no_plot:
        parser.error(f"--output must end in .png, not {args.output}")
    if args.seed < 0:
        parser.error(f"--seed must be at least 0, not {args.seed}")
    if args.seeds < 1:
        parser.error(f"--seeds must be at least 1, not {args.seeds}")
    if args.learning_rate is not None and not 0 < args.learning_rate < np.inf:
        parser.error(f"--learning-rate must be positive and finite, not {args.learning_rate}")
    output = None if args.no_plot else args.output
    seeds = range(args.seed, args.seed + args.seeds)
    return ended("demo", lambda: run(args.epochs, args.learning_rate, seeds, output))
