"""In a deep network of sigmoids the gradient vanishes on its way down; batch normalisation keeps it alive.

Eight hidden layers of 64 sigmoids on scikit-learn's digits; BatchNorm before each activation, after each, or nowhere.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bnfast.commands.figures import BLUE, GREEN, VERMILION, curve, label, panels, save
from bnfast.commands.network import (
    Array,
    Layer,
    Linear,
    Normalise,
    Sigmoid,
    accuracy,
    backward,
    cross_entropy,
    forward,
    learn,
    load_digits,
    perceptron,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Batch normalisation keeps gradients from vanishing"
CAPTION = (
    "Each sigmoid shrinks the gradient, so that of eight layers without batch normalisation the first gets a "
    "thousandth and the network learns nothing; normalised, before or after the activation, it learns. If the weights "
    "are ten times too large, normalising before keeps most inputs of the sigmoids out of saturation and normalising "
    "after does not: there the notes' advice, before, is what counts."
)
ALT = (
    "Norm of the gradient layer by layer, test accuracy by epoch, and the share of saturated sigmoids: without "
    "batch normalisation the first layers' gradients are a thousandth."
)

DEPTH = 8
EPOCHS = 10
RATE = 0.3
SATURATED = 0.05  # of the slope of the sigmoid, which is at most 0.25
PLACES: dict[str, Normalise] = {"before": "before", "after": "after", "without": None}


class Result(NamedTuple):
    """A value for each of PLACES."""

    norms: dict[str, Array]  # of dL/dW of each hidden layer at the start, relative to the last of them
    accuracies: dict[str, Array]  # on the test images, after each epoch
    saturated: dict[str, float]  # share of the sigmoids with a slope below SATURATED, weights ten times as large


def build(place: Normalise, seed: int) -> tuple[list[Layer], np.random.Generator]:
    """Return a network and the generator that goes on to make its batches."""
    rng = np.random.default_rng(seed)
    layers = perceptron([64] * (DEPTH + 1) + [10], rng, place, Sigmoid)
    return layers, rng


def compute(seed: int) -> Result:
    """Measure the gradients at the start, train, and look for saturation."""
    digits = load_digits(seed)
    (images, labels), (test_images, test_labels) = digits
    images, test_images = images.reshape(len(images), -1), test_images.reshape(len(test_images), -1)
    result = Result({}, {}, {})
    for name, place in PLACES.items():
        layers, rng = build(place, seed)
        _, dscores = cross_entropy(forward(layers, images, training=True), labels)
        backward(layers, dscores)
        norms = np.array([np.linalg.norm(layer.grad_weight) for layer in layers if isinstance(layer, Linear)])[:-1]
        result.norms[name] = norms / norms[-1]

        result.accuracies[name] = np.empty(EPOCHS)
        for epoch in range(EPOCHS):
            learn(layers, images, labels, RATE, rng)
            result.accuracies[name][epoch] = accuracy(layers, test_images, test_labels)

        layers, _ = build(place, seed)
        for layer in layers:
            if isinstance(layer, Linear):
                layer.weight *= 10
        forward(layers, images, training=True)
        slopes = [layer.y * (1 - layer.y) for layer in layers if isinstance(layer, Sigmoid)]
        result.saturated[name] = float(np.mean(np.array(slopes) < SATURATED))
    return result


def draw(results: Sequence[Result]) -> Figure:
    """Show all seeds."""
    figure, (left, middle, right) = panels(3, TITLE)
    styles = {"before": (BLUE, "o"), "after": (GREEN, "^"), "without": (VERMILION, "s")}
    for i, (name, style) in enumerate(styles.items()):
        curve(left, np.arange(1, DEPTH + 1), [r.norms[name] for r in results], *style, name)
        curve(middle, np.arange(1, EPOCHS + 1), [100 * r.accuracies[name] for r in results], *style, name)
        shares = [100 * r.saturated[name] for r in results]
        right.bar(i, np.median(shares), color=style[0], width=0.6)
        right.text(i, np.median(shares) + 1, f"{np.median(shares):.0f} %", ha="center", va="bottom", fontsize=13)
    left.set_yscale("log")
    middle.set_ylim(0, 102)
    right.set_ylim(0, 100)
    right.set_xticks(range(3), list(styles))
    label(left, "gradient at the start", "hidden layer (1: the first)", "norm of dL/dW, relative to layer 8")
    label(middle, f"training at rate {RATE}", "epoch", "test accuracy (%)", "center right")
    label(
        right,
        "saturation, weights ten times as large",
        "where batch normalisation is",
        f"sigmoids with a slope < {SATURATED} (%)",
        None,
    )
    return figure


def main(folder: str | Path) -> Path:
    """Write vanishing_gradients.png into a folder, of three seeds."""
    return save(draw([compute(seed) for seed in range(3)]), folder, "vanishing_gradients")


if __name__ == "__main__":
    print(main(sys.argv[1] if len(sys.argv) > 1 else "."))
