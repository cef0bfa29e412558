"""Two features of very different scale make gradient descent slow at any learning rate; scaled, they do not.

A straight-line model tells the first cultivar of wine from the two others (scikit-learn's wine data) by its alcohol
(% by volume, standard deviation 0.8) and its magnesium (mg/l, standard deviation 14). Its mean squared loss is a
quadratic bowl in the two weights; each descent takes the constant rate that is best for its bowl.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import bnfast
from bnfast.commands.figures import BLUE, VERMILION, label, panels, save
from bnfast.commands.network import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Feature scaling makes the loss round, and descent short"
CAPTION = (
    "With the features as they were measured the loss is a long narrow valley: a rate small enough for its steep "
    "walls creeps along its floor. After (x - mean) / std it is nearly round, and the same descent, each at the best "
    "constant learning rate for its own valley, is there in a few steps."
)
ALT = (
    "Contour lines of two losses with the path of a descent: left a narrow ellipse and a long zigzag, right near "
    "circles and a few steps to the middle."
)

MAX_STEPS = 100_000


class Descent(NamedTuple):
    hessian: Array  # (2, 2): the loss is (w - best)' hessian (w - best) / 2, up to a constant
    best: Array  # (2,)
    path: Array  # (steps + 1, 2), from the start to 1% of its excess loss
    condition: float  # longest over shortest axis of the contours, squared

    @property
    def steps(self) -> int:
        return len(self.path) - 1

    def excess(self, w: Array) -> Array:
        """Loss above the least one; w is (..., 2)."""
        d = w - self.best
        return np.asarray(np.einsum("...i,ij,...j", d, self.hessian, d) / 2)


class Result(NamedTuple):
    raw: Descent
    scaled: Descent


def descend(x: Array, target: Array, direction: Array) -> Descent:
    """Descend from where the weights are off by `direction`, in units of the contours' axes."""
    hessian = x.T @ x / len(x)
    best = np.linalg.solve(hessian, x.T @ target / len(x))
    curvatures, axes = np.linalg.eigh(hessian)
    rate = 2 / curvatures.sum()  # the best constant rate for a quadratic: 2 / (largest + smallest curvature)
    w = best + axes @ (direction / np.sqrt(curvatures))
    path = [w]
    start = (w - best) @ hessian @ (w - best)
    while (w - best) @ hessian @ (w - best) > 0.01 * start and len(path) <= MAX_STEPS:
        w = w - rate * hessian @ (w - best)
        path.append(w)
    return Descent(hessian, best, np.array(path), float(curvatures[1] / curvatures[0]))


def compute(seed: int) -> Result:
    """Descend before and after scaling, from the same relative height in a random direction."""
    from sklearn.datasets import load_wine

    data, cultivar = load_wine(return_X_y=True)
    features = data[:, [0, 4]]  # alcohol, magnesium
    target = np.where(cultivar == 0, 1.0, -1.0)
    rng = np.random.default_rng(seed)
    wines = rng.choice(len(features), len(features))  # a bootstrap sample, so that seeds differ
    features, target = features[wines], target[wines] - target[wines].mean()
    angle = rng.uniform(np.pi / 6, np.pi / 3)  # off along both axes of the contours
    direction = np.array([np.cos(angle), np.sin(angle)])
    centred = bnfast.StandardScaler(with_std=False).fit_transform(features)  # so that scale alone makes the difference
    scaled = bnfast.StandardScaler().fit_transform(features)
    return Result(descend(centred, target, direction), descend(scaled, target, direction))


def draw(results: Sequence[Result]) -> Figure:
    """Show the first result."""
    figure, axes = panels(2, TITLE)
    names = ("as measured", VERMILION), ("scaled", BLUE)
    for panel, descent, (name, color) in zip(axes, results[0], names, strict=True):
        span = 1.25 * np.abs(descent.path - descent.best).max()
        grid = np.stack(np.meshgrid(*(centre + np.linspace(-span, span, 201) for centre in descent.best)), axis=-1)
        height = descent.excess(grid)
        levels = descent.excess(descent.path[0]) * np.array([0.03, 0.2, 0.6, 1.2, 2, 3])
        panel.contour(grid[..., 0], grid[..., 1], height, levels=levels, colors="0.6", linewidths=1)
        marks = "o-" if descent.steps < 50 else "-"
        panel.plot(
            *descent.path.T,
            marks,
            color=color,
            linewidth=0.6 if descent.steps > 50 else 1.5,
            markersize=4,
            label=f"{descent.steps} steps",
        )
        panel.plot(*descent.path[0], "s", color="black", markersize=8, label="start")
        panel.plot(*descent.best, "*", color="black", markersize=14, label="least loss")
        panel.set_aspect("equal")
        panel.grid(visible=False)
        unit = ("(1 / % by volume)", "(1 / (mg/l))") if name == "as measured" else ("(1 / std)", "(1 / std)")
        label(
            panel,
            f"{name}: curvatures 1 : {descent.condition:.3g}",
            f"weight of alcohol {unit[0]}",
            f"weight of magnesium {unit[1]}",
        )
    return figure


def main(folder: str | Path) -> Path:
    """Write feature_scaling.png into a folder."""
    return save(draw([compute(seed=0)]), folder, "feature_scaling")


if __name__ == "__main__":
    print(main(sys.argv[1] if len(sys.argv) > 1 else "."))
