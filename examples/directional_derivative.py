"""The derivative along a direction is largest along the gradient, and what t * D_u f leaves of the increment is o(t).

f is the mean logistic loss of telling benign from malignant tumours (scikit-learn's breast cancer data) by two scaled
features, as a function of their two weights. D_u f = f_x cos(angle) + f_y sin(angle) says the gradient;
`bnfast.directional_derivative` finds the same from values of f alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import bnfast
from bnfast.commands.figures import BLUE, GREEN, VERMILION, label, panels, save
from bnfast.commands.network import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "The directional derivative is largest along the gradient"
CAPTION = (
    "The slope of a loss, measured by differences in all directions, is the cosine that the gradient predicts, and it "
    "is largest where the gradient points. With the right slope D the error of the linear approximation, f(x + tu) - "
    "f(x) - tD, falls like t², faster than the step t (it is o(t)); with a slope that is wrong by 1% it falls like t "
    "only."
)
ALT = (
    "Left: measured slopes lie on a cosine whose maximum is at the gradient's angle. Right, double logarithmic: "
    "two lines of error against step, the lower one twice as steep."
)

ANGLES = np.arange(0, 360, 5)  # degrees
STEPS = 2.0 ** -np.arange(0, 16)


class Result(NamedTuple):
    gradient_angle: float  # degrees
    gradient_length: float
    measured: Array  # D_u f at each of ANGLES, by differences
    predicted: Array  # the same, from the gradient
    error: Array  # of f(x) + t * D at each of STEPS
    error_if_wrong: Array  # with D 1% too large


def compute(seed: int) -> Result:
    """Measure at a random pair of weights."""
    from sklearn.datasets import load_breast_cancer

    data, benign = load_breast_cancer(return_X_y=True)
    features = bnfast.StandardScaler().fit_transform(data[:, [0, 1]])  # mean radius, mean texture
    sign = np.where(benign, -1.0, 1.0)

    def f(w: Array) -> float:
        return float(np.logaddexp(0, -sign * (features @ w)).mean())

    w = np.random.default_rng(seed).normal(size=2)
    gradient = -(features.T @ (sign / (1 + np.exp(sign * (features @ w))))) / len(sign)

    directions = np.stack([np.cos(np.radians(ANGLES)), np.sin(np.radians(ANGLES))], axis=1)
    measured = np.array([bnfast.directional_derivative(f, w, u).value for u in directions])
    u = directions[np.argmax(measured)]
    slope = gradient @ u
    increments = np.array([f(w + t * u) - f(w) for t in STEPS])
    return Result(
        gradient_angle=float(np.degrees(np.arctan2(gradient[1], gradient[0])) % 360),
        gradient_length=float(np.linalg.norm(gradient)),
        measured=measured,
        predicted=directions @ gradient,
        error=np.abs(increments - STEPS * slope),
        error_if_wrong=np.abs(increments - STEPS * 1.01 * slope),
    )


def draw(results: Sequence[Result]) -> Figure:
    """Show the first result."""
    r = results[0]
    figure, (left, right) = panels(2, TITLE)
    left.plot(ANGLES, r.predicted, color=BLUE, linewidth=2, label="$f_x$ cos θ + $f_y$ sin θ")
    left.plot(ANGLES[::2], r.measured[::2], "o", color=VERMILION, markersize=5, label="measured by differences")
    left.axvline(r.gradient_angle, color="0.3", linestyle="--", label="angle of the gradient")
    left.set_xticks(range(0, 361, 90))
    left.set_ylim(top=1.9 * r.gradient_length)
    label(
        left,
        "slope in all directions",
        "angle θ of the direction u (degrees)",
        "$D_u f$ (nats per unit)",
        "upper right",
    )

    right.loglog(STEPS, r.error_if_wrong, "s-", color=VERMILION, linewidth=2, label="slope 1% wrong")
    right.loglog(STEPS, r.error, "o-", color=BLUE, linewidth=2, label="slope right")
    right.loglog(STEPS, STEPS * r.gradient_length, "--", color="0.3", label="the step itself: t $D_u f$")
    right.loglog(STEPS, r.error[0] * STEPS**2, ":", color=GREEN, linewidth=3, label="∝ t²")
    label(right, "error of the linear approximation", "step t (units of the weights)", "error (nats)")
    return figure


def main(folder: str | Path) -> Path:
    """Write directional_derivative.png into a folder."""
    return save(draw([compute(seed=0)]), folder, "directional_derivative")


if __name__ == "__main__":
    print(main(sys.argv[1] if len(sys.argv) > 1 else "."))
