"""What to normalise with at test time: exponential averages, cumulative averages or exact, merged statistics.

A trained network is held fixed, its statistics are forgotten, and the training images pass once more, in batches. After
each batch: how far are the statistics from those of the whole training set, and how well does the network read?
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import bnfast
from bnfast.commands.figures import BLUE, GREEN, VERMILION, curve, label, panels, save
from bnfast.commands.network import Array, Layer, accuracy, learn, load_digits, perceptron

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Statistics for test time: averages wander, exact ones arrive"
CAPTION = (
    "The running average starts from 0 and 1 and forgets: of few large batches it is still on its way, which costs "
    "accuracy, and of many small ones it wanders about the truth, which here costs two percent at most. The cumulative "
    "average closes in, and merged moments are the statistics of all that has passed, so those of the training set "
    "once it has."
)
ALT = (
    "Distance of three kinds of statistics from those of the training set against images seen, for small and "
    "large batches; and the test accuracy with each."
)

SMALL, LARGE = 4, 64
IMAGES = 22 * LARGE  # of the 1437 to train on: whole batches of both sizes
MOMENTUM = {"running": 0.1, "cumulative": None}
KINDS = (*MOMENTUM, "exact")
SHARES = np.array([0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.7, 1.0])  # of the training images


class Result(NamedTuple):
    """For batches of SMALL and LARGE images and each of KINDS, a value at each of SHARES (whole batches)."""

    distances: dict[tuple[int, str], Array]  # of the first layer's mean and std, in std: root mean square
    accuracies: dict[tuple[int, str], Array]  # on the test images


def norms(layers: list[Layer]) -> list[bnfast.BatchNorm]:
    """Return the batch normalisations of a network."""
    return [layer for layer in layers if isinstance(layer, bnfast.BatchNorm)]


def distance(mean: Array, std: Array, truth: bnfast.Moments) -> float:
    """Return how far a mean and a standard deviation are from the truth, in units of its standard deviation."""
    errors = (mean - truth.mean) / truth.std(), std / truth.std() - 1
    return float(np.sqrt(np.mean(np.square(errors))))


def compute(seed: int) -> Result:
    """Train a network with two hidden layers of 64 for three epochs, then let the images pass."""
    digits = load_digits(seed)
    (x, labels), (test_x, test_labels) = ((images.reshape(-1, 64), labels) for images, labels in digits)
    rng = np.random.default_rng(seed)
    layers = perceptron([64, 64, 64, 10], rng, "before")
    for _ in range(3):
        learn(layers, x, labels, 0.1, rng)
    x = x[rng.permutation(len(x))[:IMAGES]]
    truth = bnfast.moments(layers[0].forward(x))  # what the first BatchNorm sees does not depend on any statistics
    result = Result({}, {})
    for size in SMALL, LARGE:
        ends = np.maximum(np.rint(SHARES * len(x) / size).astype(int) * size, size)
        for kind in KINDS:
            for bn in norms(layers):
                bn.reset_running_stats()
                bn.momentum = MOMENTUM.get(kind)
            gathered = [bnfast.Moments(0, np.zeros(64), np.zeros(64)) for _ in norms(layers)]
            distances, accuracies = np.full((2, len(ends)), np.nan)
            for start in range(0, len(x), size):
                y = x[start : start + size]
                i = 0
                for layer in layers:
                    if isinstance(layer, bnfast.BatchNorm):
                        gathered[i] += bnfast.moments(y)
                        i += 1
                        layer.train()
                    y = layer.forward(y)
                now = ends == start + size
                if not now.any():
                    continue
                if kind == "exact":
                    mean, std = gathered[0].mean, gathered[0].std()
                    for bn, moments in zip(norms(layers), gathered, strict=True):
                        bn.use_statistics(moments)
                else:
                    first = norms(layers)[0]
                    assert first.running_mean is not None
                    assert first.running_var is not None
                    mean, std = first.running_mean, np.sqrt(first.running_var)
                distances[now] = distance(mean, std, truth)
                accuracies[now] = accuracy(layers, test_x, test_labels)
            result.distances[size, kind], result.accuracies[size, kind] = distances, accuracies
    return result


def draw(results: Sequence[Result]) -> Figure:
    """Show all seeds: batches of SMALL above, of LARGE below."""
    figure, axes = panels(4, TITLE, rows=2)
    styles = {"running": (VERMILION, "s"), "cumulative": (BLUE, "o"), "exact": (GREEN, "^")}
    for size, (far, right) in {SMALL: axes[:2], LARGE: axes[2:]}.items():
        first = int(np.searchsorted(SHARES, size / IMAGES))  # before that there is no batch yet
        seen = 100 * SHARES[first:]
        for kind, style in styles.items():
            curve(far, seen, [np.maximum(r.distances[size, kind][first:], 1e-4) for r in results], *style, kind)
            curve(right, seen, [100 * r.accuracies[size, kind][first:] for r in results], *style, kind)
        for panel in far, right:
            panel.set_xscale("log")
            panel.set_xticks([1, 10, 100], ["1", "10", "100"])
        far.set_yscale("log")
        far.set_ylim(7e-5, 3)
        right.set_ylim(0, 102)
        passed = "training images seen (%)"
        label(far, f"batches of {size}: distance", passed, "error, rms (std; drawn from 1e-4 up)", "lower left")
        label(right, f"batches of {size}: accuracy", passed, "test accuracy (%)", "lower right")
    return figure


def main(folder: str | Path) -> Path:
    """Write test_time_statistics.png into a folder, of three seeds."""
    return save(draw([compute(seed) for seed in range(3)]), folder, "test_time_statistics")


if __name__ == "__main__":
    print(main(sys.argv[1] if len(sys.argv) > 1 else "."))
