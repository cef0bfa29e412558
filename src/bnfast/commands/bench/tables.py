"""What the comparison found, as text."""

from collections.abc import Mapping, Sequence
from typing import Any

from .block import BLOCK_CONTENDERS
from .shapes import BLOCK, OPERATIONS

__all__ = ["OP_TITLES", "Report", "busy", "contenders_of", "duration", "grid", "headline", "operations_of", "table"]

OP_TITLES = {
    "forward": "forward (training)",
    "backward": "backward",
    "eval": "forward (eval)",
    "block": "block: relu(batch norm(x) + residual), training",
    "block backward": "block backward",
}

BETWEEN = {
    "cold": "before each call 300 µs of other work on the calling thread, which is not timed",
    "consumer": "after each call its result is read once, by NumPy on one thread, and that is timed with it",
}

BUSY = 0.7  # load average at the start above which the report warns

INSTALL = {  # what to give to pip
    "torch": "torch",
    "torch.compile": "torch",
    "onednn": "onednn-cpu-gomp onednn-devel-cpu-gomp",
}

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
    return [name for name in BLOCK_CONTENDERS if name in found]  # all there are


def operations_of(report: Report) -> list[str]:
    """Those with results, in their usual order."""
    found = {r["operation"] for r in report["results"]}
    return [operation for operation in (*OPERATIONS, *BLOCK) if operation in found]


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
    lines += [f"left out: {name}: {why}{advice(name, why)}" for name, why in report["missing"].items()]
    return "\n".join(lines)


def advice(name: str, why: str) -> str:
    """How to install a contender that is not there."""
    return f" (python -m pip install {INSTALL[name]})" if name in INSTALL and why.endswith("not installed") else ""


def busy(machine: Mapping[str, Any]) -> list[str]:
    """A line of warning if other programs were running."""
    load = machine["load"] or 0.0
    return [f"the machine was busy (load average {load:.1f} at the start): figures mean little"] if load > BUSY else []


def table(report: Report) -> str:
    """Geometric means of the ratios to bnfast, then the times with their spread and the ratios, as plain text."""
    names = contenders_of(report)
    found = {(r["operation"], r["shape"], r["contender"]): r for r in report["results"]}
    shapes = list(dict.fromkeys(r["shape"] for r in report["results"]))
    lines = [headline(report), ""]
    lines += ["times as long as bnfast, geometric means (above 1: bnfast is faster)"]
    means = report["geometric_means"]
    rows = [[group, *(f"{row[n]:.2f}" if n in row else "-" for n in names)] for group, row in means.items()]
    lines += grid([["group", *names], *rows])
    for operation in operations_of(report):
        times, ratios = [], []
        for shape in shapes:
            cells = [found.get((operation, shape, name)) for name in names]
            times.append([shape, *("-" if r is None else f"{duration(r['median'])} ±{spread(r):.0%}" for r in cells)])
            ratios.append([shape, *("-" if r is None or r["ratio"] is None else f"{r['ratio']:.2f}" for r in cells)])
        lines += ["", f"{OP_TITLES[operation]}: median time of a call ± half the interquartile range"]
        lines += grid([["shape", *names], *times])
        lines += ["", f"{OP_TITLES[operation]}: times as long as bnfast"]
        lines += grid([["shape", *names], *ratios])
    return "\n".join(lines)


def spread(result: Mapping[str, Any]) -> float:
    """Half the interquartile range, as a share of the median."""
    return float((result["q3"] - result["q1"]) / 2 / result["median"])
