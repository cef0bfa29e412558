"""With batch normalisation the scale of the initial weights hardly matters: BN(kWx) = BN(Wx).

Hidden layers start from He's weights times k, k from 0.01 to 100, and train on scikit-learn's digits.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bnfast.commands.figures import BLUE, GREEN, VERMILION, curve, label, panels, save
from bnfast.commands.network import Array, Linear, accuracy, learn, load_digits, perceptron
from bnfast.functional import batch_norm

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Batch normalisation forgives the initial scale of the weights"
CAPTION = (
    "Without batch normalisation the network learns from a narrow range of initial scales only; with it from all of "
    "them, although not equally well: the gradient goes like 1/k, so large weights hardly turn. BN(kWx) = BN(Wx) "
    "holds but for eps, which does not scale (for small k the difference grows like eps / k² var); with eps times "
    "k², and k a power of two, every bit is the same."
)
ALT = (
    "Left: test accuracy against the scale of the initial weights, high everywhere with batch normalisation, a "
    "narrow peak without. Right: difference of BN(kWx) and BN(Wx) against k."
)

SCALES = 10.0 ** np.linspace(-2, 2, 9)
POWERS = 2.0 ** np.arange(-7, 8)
EPOCHS = 5
RATE = 0.1
EPS = 1e-5


class Result(NamedTuple):
    accuracies_with: Array  # on the test images, at each of SCALES
    accuracies_without: Array
    difference: Array  # largest |BN(kWx) - BN(Wx)| at each of POWERS
    difference_scaled_eps: Array  # the same with eps * k**2


def train(k: float, normalise: bool, seed: int) -> float:
    """Train four hidden layers of 64 from weights times k; return the test accuracy."""
    (images, labels), (test_images, test_labels) = load_digits(seed)
    rng = np.random.default_rng(seed)
    layers = perceptron([64, 64, 64, 64, 64, 10], rng, "before" if normalise else None)
    for layer in layers[:-1]:
        if isinstance(layer, Linear):
            layer.weight *= k
    loss = 0.0
    with np.errstate(all="ignore"):  # a training that diverges overflows
        for _ in range(EPOCHS):
            loss = learn(layers, images.reshape(-1, 64), labels, RATE, rng)
        return accuracy(layers, test_images.reshape(-1, 64), test_labels, diverged=not np.isfinite(loss))


def compute(seed: int) -> Result:
    """Train from every scale, with and without, and measure the invariance itself."""
    with_, without = (np.array([train(k, normalise, seed) for k in SCALES]) for normalise in (True, False))
    images = load_digits(seed).train[0].reshape(-1, 64).astype(np.float64)
    z = images @ Linear(64, 64, np.random.default_rng(seed), np.float64).weight
    y = batch_norm(z, eps=EPS)[0]
    difference = np.array([np.abs(batch_norm(k * z, eps=EPS)[0] - y).max() for k in POWERS])
    scaled = np.array([np.abs(batch_norm(k * z, eps=EPS * k**2)[0] - y).max() for k in POWERS])
    return Result(with_, without, difference, scaled)


def draw(results: Sequence[Result]) -> Figure:
    """Show all seeds; the invariance of the first."""
    figure, (left, right) = panels(2, TITLE)
    curve(left, SCALES, [100 * r.accuracies_with for r in results], BLUE, "o", "with")
    curve(left, SCALES, [100 * r.accuracies_without for r in results], VERMILION, "s", "without")
    left.set_xscale("log")
    left.set_ylim(0, 102)
    label(
        left,
        f"accuracy after {EPOCHS} epochs",
        "k: initial weights are He's times k",
        "test accuracy (%)",
        "center right",
    )
    right.loglog(POWERS, results[0].difference, "o-", color=VERMILION, linewidth=2, label=f"eps = {EPS:g}")
    right.loglog(POWERS, results[0].difference_scaled_eps, "s--", color=GREEN, linewidth=2, label="eps times k²")
    right.set_yscale("symlog", linthresh=1e-9)
    right.set_ylim(-2e-10, 1e3)
    label(right, "the invariance, float64", "k", "largest |BN(kWx) - BN(Wx)|", "upper right")
    return figure


def main(folder: str | Path) -> Path:
    """Write initialisation.png into a folder, of three seeds."""
    return save(draw([compute(seed) for seed in range(3)]), folder, "initialisation")


if __name__ == "__main__":
    print(main(sys.argv[1] if len(sys.argv) > 1 else "."))
