"""What the comparison found, as text and as a figure."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from .contenders import ALONE, CONTENDERS
from .shapes import OPERATIONS, SIZES, family, named

__all__ = ["busy", "draw", "draw_sizes", "headline", "table"]

STYLES = {  # colour (Okabe and Ito's), marker
    "floor": ("#999999", "|"),
    "bnfast": ("#0072B2", "o"),
    ALONE: ("#56B4E9", "o"),
    "onednn": ("#009E73", "^"),
    "torch": ("#D55E00", "s"),
    "torch.compile": ("#E69F00", "D"),
    "numpy": ("#CC79A7", "v"),
}
OP_TITLES = {"forward": "forward (training)", "backward": "backward", "eval": "forward (eval)"}

BETWEEN = {
    "cold": "before each call 300 µs of other work on the calling thread, which is not timed",
    "consumer": "after each call its result is read once, by NumPy on one thread, and that is timed with it",
}

BUSY = 0.7  # load average at the start above which the report warns

Report = Mapping[str, Any]


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= 0.9995 * scale:
            return f"{seconds / scale:#.3g}".rstrip(".") + f" {unit}"
    return f"{seconds / 1e-9:.0f} ns"


def grid(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as they need to be, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def contenders_of(report: Report) -> list[str]:
    """Those with results, in their usual order."""
    found = {r["contender"] for r in report["results"]}
    return [name for name in CONTENDERS if name in found]


def headline(report: Report) -> str:
    """When, where, what: the lines above the tables."""
    m = report["machine"]
    results = "fresh memory" if report["fresh"] else "memory that is there (out=)"
    lines = [
        f"{report['date']}, {m['cpu']}, {m['cpus']} CPUs, {report['threads']} threads, {report['dtype']}",
        f"Python {m['python']}; {'; '.join(report['contenders'].values())}",
        f"{report['rounds']} rounds, up to {report['samples_per_turn']} samples a turn; results go to {results}",
    ]
    lines += [BETWEEN[report["between"]]] if report["between"] else []
    lines += busy(m)
    lines += [f"left out: {name}: {why}" for name, why in report["missing"].items()]
    return "\n".join(lines)


def busy(machine: Mapping[str, Any]) -> list[str]:
    """A line of warning if other programs were running."""
    load = machine["load"] or 0.0
    return [f"the machine was busy (load average {load:.1f} at the start): figures mean little"] if load > BUSY else []


def table(report: Report) -> str:
    """Times with their spread, ratios to bnfast, and geometric means of those, as plain text."""
    names = contenders_of(report)
    found = {(r["operation"], r["shape"], r["contender"]): r for r in report["results"]}
    shapes = list(dict.fromkeys(r["shape"] for r in report["results"]))
    lines = [headline(report)]
    for operation in OPERATIONS:
        times, ratios = [], []
        for shape in shapes:
            cells = [found.get((operation, shape, name)) for name in names]
            times.append([shape, *("-" if r is None else f"{duration(r['median'])} ±{spread(r):.0%}" for r in cells)])
            ratios.append([shape, *("-" if r is None or r["ratio"] is None else f"{r['ratio']:.2f}" for r in cells)])
        lines += ["", f"{OP_TITLES[operation]}: median time of a call ± half the interquartile range"]
        lines += grid([["shape", *names], *times])
        lines += ["", f"{OP_TITLES[operation]}: times as long as bnfast"]
        lines += grid([["shape", *names], *ratios])
    means = report["geometric_means"]
    lines += ["", "times as long as bnfast, geometric means"]
    rows = [[name, *(f"{row[n]:.2f}" if n in row else "-" for n in names)] for name, row in means.items()]
    return "\n".join(lines + grid([["group", *names], *rows]))


def spread(result: Mapping[str, Any]) -> float:
    """Half the interquartile range, as a share of the median."""
    return float((result["q3"] - result["q1"]) / 2 / result["median"])


def kind(shape: str) -> tuple[bool, ...]:
    """What the figure keeps apart: planar, channels-last, (N, C), tiny."""
    found = named(shape)
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


def draw_sizes(report: Report) -> bytes:
    """The figure of a sweep as a PNG: the others' times over bnfast's against the size, a panel for each operation and
    kind of array.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    names = [name for name in contenders_of(report) if name != "bnfast"]
    kinds = [kind for kind in SIZES if any(family(named(r["shape"])) == kind for r in report["results"])]
    figure = Figure(figsize=(3.5 * len(kinds) + 1, 10), dpi=110, layout="constrained")
    panels = figure.subplots(len(OPERATIONS), len(kinds), sharex=True, sharey=True, squeeze=False)
    m = report["machine"]
    caches = {"L2": m["l2_bytes"] * min(report["threads"], m["cpus"]), "last level": m["last_level_bytes"]}
    ratios = [1.0]
    for row, operation in zip(panels, OPERATIONS, strict=True):
        for axes, kind in zip(row, kinds, strict=True):
            for name in names:
                points = sorted(
                    (r["bytes"], r["ratio"])
                    for r in report["results"]
                    if (r["operation"], r["contender"]) == (operation, name)
                    and r["ratio"] is not None
                    and family(named(r["shape"])) == kind
                )
                colour, marker = STYLES[name]
                axes.plot(*zip(*points, strict=True), marker, color=colour, linestyle="-", markersize=6, label=name)
                ratios += [ratio for _, ratio in points]
            axes.axhline(1, color="0.35", linewidth=1.6, zorder=1)
            for name, size in caches.items():
                axes.axvline(size, color="0.6", linewidth=1, linestyle=(0, (4, 3)), zorder=0)
                if operation == OPERATIONS[0]:
                    axes.text(
                        size, 1.02, name, transform=axes.get_xaxis_transform(), ha="center", fontsize=9, color="0.4"
                    )
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.grid(axis="y", color="0.9")
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(f"{OP_TITLES[operation]}\ntime / time of bnfast", fontsize=12)
    for axes, kind in zip(panels[0], kinds, strict=True):
        axes.set_title(kind, fontsize=14, pad=20)
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
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), fontsize=13, frameon=False)
    figure.supxlabel(
        f"bytes of the arrays of a call together\n{report['date'][:10]}, {m['cpu']}, {report['threads']} threads, "
        f"{report['dtype']}; above 1 bnfast is faster",
        fontsize=12,
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
