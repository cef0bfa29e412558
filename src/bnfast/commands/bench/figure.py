"""What the comparison found, as a figure."""

import io

from .contenders import ALONE
from .shapes import OPERATIONS, SIZES, family, named
from .tables import OP_TITLES, Report, contenders_of, operations_of

__all__ = ["NAMES", "STYLES", "draw", "draw_sizes"]

STYLES = {  # colour (Okabe and Ito's), marker
    "floor": ("#999999", "|"),
    "bnfast": ("#0072B2", "o"),
    ALONE: ("#56B4E9", "o"),
    "batch-norm": ("#56B4E9", "s"),
    "bnfast+numpy": ("#000000", "P"),
    "onednn": ("#009E73", "^"),
    "torch": ("#D55E00", "s"),
    "torch.compile": ("#E69F00", "D"),
    "numpy": ("#CC79A7", "v"),
}
NAMES = {  # as people know them
    "floor": "memory alone",
    "bnfast": "bnfast",
    ALONE: "bnfast, 1 thread",
    "batch-norm": "bnfast, batch norm alone",
    "bnfast+numpy": "bnfast + NumPy",
    "onednn": "oneDNN",
    "torch": "PyTorch",
    "torch.compile": "torch.compile",
    "numpy": "NumPy",
}


def kind(shape: str) -> tuple[bool, ...]:
    """What the figure keeps apart: planar, channels-last, (N, C), tiny."""
    found = named(shape)
    return found.tiny, found.channels_last, found.interleaved


def draw(report: Report) -> bytes:
    """The figure as a PNG: for every shape the contenders' times over the memory floor, a panel for each operation."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    names, operations = contenders_of(report), operations_of(report)
    unit = "floor" if "floor" in names else "bnfast"
    found = {(r["operation"], r["shape"], r["contender"]): r for r in report["results"]}
    shapes = list(dict.fromkeys(r["shape"] for r in report["results"]))
    height = 2.6 + 0.36 * len(shapes)
    figure = Figure(figsize=(14, height), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(operations), sharey=True)
    rows = range(len(shapes))
    for axes, operation in zip(panels, operations, strict=True):
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
            y = [row + 0.14 * (names.index(name) - len(names) / 2) for *_, row in points]  # none hides another
            main = name == "bnfast"
            axes.plot(
                *(x, y, marker),
                color=colour,
                markersize=11 if main else 9,
                markeredgecolor="white",
                markeredgewidth=0.8,
                zorder=4 if main else 3,
                label=NAMES[name],
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
        axes.set_xlabel(
            f"time / {'memory alone' if unit == 'floor' else 'time of bnfast'}\n(left is faster)", fontsize=16
        )
        axes.tick_params(labelsize=15)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(
        rows, [shape.replace("x", "\N{MULTIPLICATION SIGN}").replace("-cl", " cl") for shape in shapes]
    )
    panels[0].set_ylim(len(shapes) - 0.4, -0.6)
    handles, labels = panels[0].get_legend_handles_labels()
    order = [labels.index(NAMES[name]) for name in names if NAMES[name] in labels]
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


def draw_sizes(report: Report) -> bytes:
    """The figure of a sweep as a PNG: the others' times over bnfast's against the size, a panel for each operation and
    kind of array.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    names = [name for name in contenders_of(report) if name != "bnfast"]
    kinds = [kind for kind in SIZES if any(family(named(r["shape"])) == kind for r in report["results"])]
    figure = Figure(figsize=(13, 1.6 + 2.7 * len(kinds)), dpi=100, layout="constrained")
    panels = figure.subplots(len(kinds), len(OPERATIONS), sharex=True, sharey=True, squeeze=False)
    m = report["machine"]
    caches = {"L2": m["l2_bytes"] * min(report["threads"], m["cpus"]), "last level": m["last_level_bytes"]}
    ratios = [1.0]
    for row, kind in zip(panels, kinds, strict=True):
        for axes, operation in zip(row, OPERATIONS, strict=True):
            for name in names:
                points = sorted(
                    (r["bytes"], r["ratio"])
                    for r in report["results"]
                    if (r["operation"], r["contender"]) == (operation, name)
                    and r["ratio"] is not None
                    and family(named(r["shape"])) == kind
                )
                colour, marker = STYLES[name]
                style = {"color": colour, "linestyle": "-", "markersize": 6, "label": NAMES[name]}
                axes.plot(*zip(*points, strict=True), marker, **style)
                ratios += [ratio for _, ratio in points]
            axes.axhline(1, color="0.35", linewidth=1.6, zorder=1)
            for name, size in caches.items():
                axes.axvline(size, color="0.6", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
                if kind == kinds[0]:
                    axes.text(
                        size, 1.02, name, transform=axes.get_xaxis_transform(), ha="center", fontsize=12, color="0.4"
                    )
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.grid(axis="y", color="0.9")
            axes.set_axisbelow(True)
            axes.tick_params(labelsize=12)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(kind, fontsize=15)
    for axes, operation in zip(panels[0], OPERATIONS, strict=True):
        axes.set_title(OP_TITLES[operation], fontsize=16, pad=24)
    first = panels[0][0]
    first.set_ylim(min(ratios) / 1.15, max(ratios) * 1.15)
    wide = max(ratios) / min(ratios) > 30
    first.yaxis.set_major_locator(LogLocator(subs=(1, 3) if wide else (1, 1.5, 2, 3, 5, 7)))
    first.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    first.yaxis.set_minor_formatter(NullFormatter())
    first.xaxis.set_major_locator(FixedLocator([2.0**k for k in range(15, 31, 3)]))
    first.xaxis.set_minor_locator(NullLocator())
    first.xaxis.set_major_formatter(FuncFormatter(lambda value, _: binary_size(value)))
    handles, labels = first.get_legend_handles_labels()
    title = "time of a call / time of bnfast: above 1, bnfast is faster"
    style = {"fontsize": 14, "title": title, "title_fontsize": 17, "frameon": False}
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), **style)
    figure.supxlabel(
        f"bytes of the arrays of a call together\n{report['date'][:10]}, {m['cpu']}, {report['threads']} threads, "
        f"{report['dtype']}",
        fontsize=13,
        color="0.35",
    )
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def binary_size(size: float) -> str:
    """For instance 256 KB."""
    for unit, scale in (("GB", 1 << 30), ("MB", 1 << 20)):
        if size >= scale:
            return f"{size / scale:g} {unit}"
    return f"{size / 1024:g} KB"
