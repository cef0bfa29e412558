"""How the figures of the gallery look: the same colours, type sizes and folder rules in all of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["BLUE", "GREEN", "ORANGE", "VERMILION", "curve", "label", "panels", "save"]

# Okabe and Ito's, which colour-blind eyes tell apart; markers or dashes say the same again.
BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"


def panels(n: int, title: str, rows: int = 1) -> tuple[Figure, list[Axes]]:
    """Return a figure with a title and n panels in so many rows, without pyplot: no window, no global state.

    Its width is such that all of its text can be read on a page 700 pixels wide.
    """
    from matplotlib.figure import Figure

    columns = n // rows
    width, height = (5.0, 4.6) if rows == 1 else (5.0, 3.7)
    figure = Figure(figsize=(min(width * columns, 13), height * rows), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=16)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for panel in axes:
        panel.grid(color="0.92")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=12)
    return figure, axes


def label(axes: Axes, title: str, x: str, y: str, legend: Any = "best") -> None:
    """Name a panel and its axes, and give it a legend, at `legend` or not at all."""
    axes.set_title(title, fontsize=14)
    axes.set_xlabel(x, fontsize=13)
    axes.set_ylabel(y, fontsize=13)
    if legend:
        axes.legend(loc=legend, fontsize=12, framealpha=0.85, edgecolor="none")


def curve(axes: Axes, x: ArrayLike, seeds: ArrayLike, color: str, marker: str, name: str) -> None:
    """Draw the median over the seeds, (seeds, len(x)), as a line, and all that lies between them as a shade."""
    values = np.asarray(seeds, dtype=float)
    axes.fill_between(x, values.min(axis=0), values.max(axis=0), color=color, alpha=0.2, linewidth=0)
    axes.plot(x, np.median(values, axis=0), color=color, marker=marker, linewidth=2, markersize=6, label=name)


def save(figure: Figure, folder: str | Path, name: str) -> Path:
    """Write a figure as ``name.png`` into a folder, which is made if it is not there; return its path."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    figure.savefig(path / f"{name}.png")
    return path / f"{name}.png"
