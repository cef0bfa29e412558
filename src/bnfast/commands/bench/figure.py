"""What the comparison found, as a figure."""

import io

from .shapes import OPERATIONS, SHAPES
from .tables import OP_TITLES, Report, contenders_of

__all__ = ["draw"]

STYLES = {  # colour (Okabe and Ito's), marker
    "floor": ("#999999", "|"),
    "bnfast": ("#0072B2", "o"),
    "onednn": ("#009E73", "^"),
    "torch": ("#D55E00", "s"),
    "torch.compile": ("#E69F00", "D"),
    "numpy": ("#CC79A7", "v"),
}


def kind(shape: str) -> tuple[bool, ...]:
    """What the figure keeps apart: planar, channels-last, (N, C), tiny."""
    found = SHAPES[shape]
    return found.tiny, found.channels_last, found.interleaved


def draw(report: Report) -> bytes:
    """The figure as a PNG: for every shape the contenders' times over the memory floor, a panel for each operation."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    names = contenders_of(report)
    unit = "floor" if "floor" in names else "bnfast"
    found = {(r["operation"], r["shape"], r["contender"]): r for r in report["results"]}
    shapes = list(dict.fromkeys(r["shape"] for r in report["results"]))
    height = 2.6 + 0.36 * len(shapes)
    figure = Figure(figsize=(14, height), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(OPERATIONS), sharey=True)
    rows = range(len(shapes))
    for axes, operation in zip(panels, OPERATIONS, strict=True):
        largest = 1.0
        for name in reversed(names):
            if name == unit == "floor":
                continue
            colour, marker = STYLES[name]
            points = [
                (found[operation, shape, name], found[operation, shape, unit], row)
                for row, shape in enumerate(shapes)
                if (operation, shape, name) in found and (operation, shape, unit) in found
            ]
            if not points:
                continue
            x = [r["median"] / of["median"] for r, of, _ in points]
            largest = max(largest, *x)
            y = [row for *_, row in points]
            main = name == "bnfast"
            axes.plot(
                *(x, y, marker),
                color=colour,
                markersize=11 if main else 9,
                markeredgecolor="white",
                markeredgewidth=0.8,
                zorder=4 if main else 3,
                label=name,
            )
        axes.axvline(1, color="0.35", linewidth=1.6, zorder=1)
        for row in rows:
            axes.axhline(row, color="0.91", linewidth=1, zorder=0)
        for row in rows[1:]:
            if kind(shapes[row]) != kind(shapes[row - 1]):
                axes.axhline(row - 0.5, color="0.5", linewidth=1, linestyle=(0, (2, 3)), zorder=0)
        axes.set_xscale("log")
        axes.set_xlim(right=largest * 1.35)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if largest < 60 else (1, 3) if largest < 300 else (1,)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="x", color="0.88")
        axes.set_axisbelow(True)
        axes.set_title(OP_TITLES[operation], fontsize=17)
        axes.set_xlabel(f"time / {'memory floor' if unit == 'floor' else 'time of bnfast'}", fontsize=16)
        axes.tick_params(labelsize=15)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(
        rows, [shape.replace("x", "\N{MULTIPLICATION SIGN}").replace("-cl", " cl") for shape in shapes]
    )
    panels[0].set_ylim(len(shapes) - 0.4, -0.6)
    handles, labels = panels[0].get_legend_handles_labels()
    order = [labels.index(name) for name in names if name in labels]
    figure.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="outside upper center",
        ncols=len(order),
        fontsize=17,
        frameon=False,
        handletextpad=0.1,
    )
    m = report["machine"]
    figure.supxlabel(
        f"{report['date'][:10]}, {m['cpu']}, {report['threads']} threads, {report['dtype']}; cl: channels-last",
        fontsize=13,
        color="0.35",
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
