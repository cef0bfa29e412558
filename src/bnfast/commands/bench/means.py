"""The comparison at a glance: how many times as long as bnfast each library takes, in bars; releases side by side."""

import io
import json
import statistics
from pathlib import Path
from typing import Any

from .figure import NAMES, STYLES
from .shapes import named
from .tables import Report, contenders_of

__all__ = ["KINDS", "SIZES", "draw_history", "draw_means", "history", "means", "releases"]

# What the bars stand for: (operation, whether neighbours in memory are different channels).
KINDS = {
    "training forward, (N, C, H, W)": ("forward", False),
    "backward, (N, C, H, W)": ("backward", False),
    "eval mode, (N, C, H, W)": ("eval", False),
    "training forward, channels last and (N, C)": ("forward", True),
    "backward, channels last and (N, C)": ("backward", True),
    "eval mode, channels last and (N, C)": ("eval", True),
}
LIBRARIES = ("bnfast", "torch", "torch.compile", "onednn", "numpy")
SMALL = 2_500_000  # elements: 10 MB of float32
SIZES = {"arrays up to 7 MB": True, "arrays of 13 to 103 MB": False}


def chosen(report: Report, operation: str, interleaved: bool, small: bool | None) -> list[dict[str, Any]]:
    """The results of a kind and size. Tiny shapes and few channels are left out: they would lift every mean."""
    return [
        result
        for result, shape in ((result, named(result["shape"])) for result in report["results"])
        if (result["operation"], shape.interleaved) == (operation, interleaved)
        and not (shape.tiny or shape.channels < 16)
        and small in (None, shape.size <= SMALL)
    ]


def means(report: Report, small: bool | None = None, base: str = "bnfast") -> dict[str, dict[str, float]]:
    """{kind: {contender: geometric mean of its times over the base's}}; small None: all sizes."""
    found: dict[str, dict[str, float]] = {}
    for kind, (operation, interleaved) in KINDS.items():
        results = chosen(report, operation, interleaved, small)
        of = {r["shape"]: r["median"] for r in results if r["contender"] == base}
        for name in contenders_of(report):
            ratios = [r["median"] / of[r["shape"]] for r in results if r["contender"] == name and r["shape"] in of]
            if ratios:
                found.setdefault(kind, {})[name] = statistics.geometric_mean(ratios)
    return found


def draw_means(report: Report) -> bytes:
    """The figure as a PNG: a bar for each library and kind of call, small arrays and large; shorter is faster."""
    from matplotlib.figure import Figure

    found = [means(report, small) for small in SIZES.values()]
    names = [name for name in contenders_of(report) if name in LIBRARIES]
    figure = Figure(figsize=(12, 1.9 + 0.235 * (len(names) + 0.8) * len(KINDS)), dpi=120, layout="constrained")
    panels = figure.subplots(1, len(SIZES), sharey=True)
    for axes, sizes, rows in zip(panels, SIZES, found, strict=True):
        largest = max(value for row in rows.values() for name, value in row.items() if name in names)
        for group, row in enumerate(rows.values()):
            for bar, name in enumerate(names):
                if name in row:
                    y = group * (len(names) + 0.8) + bar
                    axes.barh(y, row[name], 0.86, color=STYLES[name][0], label=NAMES[name] if group == 0 else None)
                    text = "1" if name == "bnfast" else f"{row[name]:.1f}"
                    axes.text(max(row[name], 1) + 0.012 * largest, y, text, va="center", fontsize=12)
        axes.set_xlim(0, 1.1 * largest)
        axes.axvline(1, color="0.35", linewidth=1, zorder=0)
        axes.set_title(sizes, fontsize=14)
        axes.set_xlabel("time of a call, bnfast = 1\n(shorter is faster)", fontsize=13)
        axes.tick_params(axis="x", labelsize=12)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    middles = [group * (len(names) + 0.8) + (len(names) - 1) / 2 for group in range(len(KINDS))]
    panels[0].set_yticks(middles, [kind.replace(", ", "\n", 1) for kind in KINDS], fontsize=13)
    panels[0].set_ylim(middles[-1] + len(names) / 2 + 0.2, -0.8)
    handles, labels = panels[0].get_legend_handles_labels()
    title = "Batch normalisation on the CPU: time of a call, as a multiple of bnfast's"
    style = {"fontsize": 14, "title": title, "title_fontsize": 17, "frameon": False}
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), **style)
    figure.supxlabel(small_print(report), fontsize=11, color="0.35")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def small_print(report: Report) -> str:
    """When, on what, of which versions."""
    m, about = report["machine"], report["contenders"]
    versions = "; ".join(about[name].partition(" (")[0] for name in ("bnfast", "torch", "onednn") if name in about)
    return (
        f"{report['date'][:10]}, {m['cpu']}, {report['threads']} threads, {report['dtype']}; {versions}\n"
        "geometric means over the shapes of `python -m bnfast bench`, but for those of few channels and the tiny ones"
    )


# --- releases ---


def releases(folder: Path) -> dict[str, Report]:
    """{name: report} of the files of a folder, `VERSION-CPU.json`, in their order."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def history(reports: dict[str, Report]) -> list[list[str]]:
    """Rows of a table, by kind and file: bnfast's time over the memory traffic's alone, PyTorch's over bnfast's."""
    rows = [["", *reports]]
    for kind in KINDS:
        cells = []
        for report in reports.values():
            floor, torch = means(report, base="floor").get(kind, {}), means(report).get(kind, {})
            cells.append(f"{floor.get('bnfast', float('nan')):.2f} ({torch.get('torch', float('nan')):.1f})")
        rows.append([kind, *cells])
    return rows


def draw_history(reports: dict[str, Report]) -> bytes:
    """The figure as a PNG: bnfast's and PyTorch's times over those of the memory traffic alone, release by release."""
    from matplotlib.figure import Figure

    versions = list(dict.fromkeys(name.partition("-")[0] for name in reports))
    cpus = {name.partition("-")[2]: report["machine"]["cpu"] for name, report in reports.items()}
    figure = Figure(figsize=(10, 7.4), dpi=110, layout="constrained")
    panels = list(figure.subplots(2, 3, sharex=True, sharey=True).flat)
    found = {release: means(report, base="floor") for release, report in reports.items()}
    for axes, kind in zip(panels, KINDS, strict=True):
        for n, (cpu, full_name) in enumerate(cpus.items()):
            for name in "bnfast", "torch":
                points = [
                    (versions.index(release.partition("-")[0]) + 0.16 * (n - (len(cpus) - 1) / 2), of[kind][name])
                    for release, of in found.items()
                    if release.partition("-")[2] == cpu and name in of[kind]
                ]
                colour, marker = STYLES[name]
                style = {"color": colour, "markersize": 9, "linestyle": ("-", "--", ":")[n % 3]}
                style["markerfacecolor"] = colour if n == 0 else "white"
                axes.plot(*zip(*points, strict=True), marker, label=f"{NAMES[name]}, {full_name}", **style)
        axes.axhline(1, color="0.35", linewidth=1, zorder=0)
        axes.set_yscale("log")
        axes.set_yticks([0.5, 1, 2, 5, 10], ["0.5", "1", "2", "5", "10"])
        axes.minorticks_off()
        axes.set_xticks(range(len(versions)), versions, fontsize=12)
        axes.set_xlim(-0.4, len(versions) - 0.6)
        axes.set_title(kind.replace(", ", "\n", 1), fontsize=12)
        axes.grid(axis="y", color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", labelsize=12)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=12, frameon=False
    )
    figure.supylabel("time / memory traffic alone   (lower is faster)", fontsize=12)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
