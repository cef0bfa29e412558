"""Batch normalisation lets a network train at learning rates that are far too large without it.

The same network, weights and batches, at learning rates from 0.01 to 12.8, five epochs each, on scikit-learn's digits.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bnfast.commands.figures import BLUE, VERMILION, curve, label, panels, save
from bnfast.commands.network import Array, learn, load_digits, perceptron

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Batch normalisation stands larger learning rates"
CAPTION = (
    "Without batch normalisation the network stops learning at rates at which it trains well with it. There is a "
    "limit with it too, because the last layer is not normalised; and at rates that suit both, the gain is smaller."
)
ALT = (
    "Training loss against the learning rate: two U-shaped curves, the one with batch normalisation lower and "
    "reaching rates ten times as large."
)

RATES = np.array([0.01, 0.03, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8])
EPOCHS = 5
TRAINS = 0.5  # nats: below this loss the network has learned; guessing costs log(10) = 2.3
WORST = 10.0  # nats: where the figure puts all that is worse, and nan


class Result(NamedTuple):
    losses_with: Array  # the mean of the last epoch at each of RATES, nats; at most WORST
    losses_without: Array

    @property
    def largest_rate_with(self) -> float:
        """The largest rate that trains with batch normalisation."""
        return largest_rate(self.losses_with)

    @property
    def largest_rate_without(self) -> float:
        """The same without batch normalisation."""
        return largest_rate(self.losses_without)


def largest_rate(losses: Array) -> float:
    """Return the largest of RATES with a loss below TRAINS; 0 without one."""
    return float(max(RATES[losses < TRAINS], default=0))


def final_loss(rate: float, normalise: bool, seed: int) -> float:
    """Train a network with four hidden layers of 64; return the loss of the last epoch."""
    images, labels = load_digits(seed).train
    x = images.reshape(len(images), -1)
    rng = np.random.default_rng(seed)
    layers = perceptron([64, 64, 64, 64, 64, 10], rng, "before" if normalise else None)
    loss = np.nan
    with np.errstate(all="ignore"):  # a training that diverges overflows
        for _ in range(EPOCHS):
            loss = learn(layers, x, labels, rate, rng, batch_size=64)
    return float(min(loss, WORST)) if np.isfinite(loss) else WORST


def compute(seed: int) -> Result:
    """Train at every rate, with and without."""
    with_, without = (np.array([final_loss(rate, normalise, seed) for rate in RATES]) for normalise in (True, False))
    return Result(with_, without)


def draw(results: Sequence[Result]) -> Figure:
    """Show all seeds."""
    figure, (panel,) = panels(1, TITLE)
    figure.set_size_inches(8, 4.8)
    curve(panel, RATES, [r.losses_with for r in results], BLUE, "o", "with batch normalisation")
    curve(panel, RATES, [r.losses_without for r in results], VERMILION, "s", "without")
    panel.axhline(np.log(10), color="0.4", linestyle=":", label="guessing: log 10")
    panel.axhline(TRAINS, color="0.4", linestyle="--", label=f"counts as trained: {TRAINS}")
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.set_ylim(0.002, 20)  # room for the legend
    label(
        panel,
        f"line: median of {len(results)} seeds, shade: all",
        "learning rate",
        f"training loss in epoch {EPOCHS} (nats)",
        "lower left",
    )
    return figure


def main(folder: str | Path) -> Path:
    """Write learning_rate.png into a folder, of three seeds."""
    return save(draw([compute(seed) for seed in range(3)]), folder, "learning_rate")


if __name__ == "__main__":
    print(main(sys.argv[1] if len(sys.argv) > 1 else "."))
