"""The comparison: every contender in a process of its own, taking turns."""

import contextlib
import datetime
import os
import platform
import shlex
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ... import _core
from ...runtime.config import __version__
from .block import BLOCK_CONTENDERS
from .contenders import ALONE, CONTENDERS
from .shapes import BLOCK, OPERATIONS, Shape, dtype_named, family, group, named
from .worker import Worker, WorkerError

__all__ = ["BASE", "Plan", "compare", "geometric_means", "machine", "summary"]

BASE = "bnfast"  # what ratios are to
OURS = (BASE, ALONE, "batch-norm", "bnfast+numpy", "floor")  # their OpenMP runtime is as bnfast sets it up


class Plan(NamedTuple):
    """What to measure, and how thoroughly."""

    shapes: Sequence[str]
    contenders: Sequence[str]
    threads: int = 2
    dtype: str = "float32"
    fresh: bool = False
    rounds: int = 7
    samples: int = 5  # in a turn
    between: str = ""  # what happens around a call: "cold" or "consumer" (worker.py)
    sizes: bool = False  # whether the shapes are those of the sweep
    block: bool = False  # whether the residual is added and ReLU taken, too

    @property
    def operations(self) -> tuple[str, ...]:
        """What is measured of each shape."""
        return BLOCK if self.block else OPERATIONS


def machine() -> dict[str, Any]:
    """The CPU, what it was busy with (load average of the last minute) and the software, for the record."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    l2_bytes, last_level_bytes = _core.cache_bytes()
    return {
        "cpu": cpu,
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "isa": _core.isa(),
        "l2_bytes": l2_bytes,
        "last_level_bytes": last_level_bytes,
        "bnfast": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def record(argv: Sequence[str]) -> dict[str, Any]:
    """When, where and by which command figures were taken."""
    now = datetime.datetime.now(datetime.UTC)
    command = "python -m bnfast bench"
    return {
        "date": now.strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join([*command.split(), *argv]),
        "machine": machine(),
    }


def environment(threads: int) -> dict[str, str | None]:
    """Variables that give a worker's libraries their number of threads."""
    names = ("OMP_NUM_THREADS", "BNFAST_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    # torch.compile: compile here, not in helpers that a signal to the worker would not reach
    return {**dict.fromkeys(names, str(threads)), "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median, quartiles and minimum."""
    q1, median, q3 = (float(q) for q in np.percentile(seconds, (25, 50, 75)))
    return {"median": median, "q1": q1, "q3": q3, "min": min(seconds)}


def geometric_means(results: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """{group: {contender: geometric mean of its ratios}}, over the results that have a ratio."""
    ratios: dict[str, dict[str, list[float]]] = {}
    for result in results:
        if result["ratio"] is not None:
            ratios.setdefault(result["group"], {}).setdefault(result["contender"], []).append(result["ratio"])
    return {
        name: {contender: statistics.geometric_mean(values) for contender, values in found.items()}
        for name, found in ratios.items()
    }


def with_ratios(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The results, each with `ratio`: its median over bnfast's of the same shape and operation; None without one."""
    base = {(r["shape"], r["operation"]): r["median"] for r in results if r["contender"] == BASE}
    found = []
    for result in results:
        of = base.get((result["shape"], result["operation"]))
        found.append({**result, "ratio": result["median"] / of if of else None})
    return found


def compare(plan: Plan, argv: Sequence[str], tick: Callable[[str], object]) -> dict[str, Any]:
    """Run the comparison.

    Parameters
    ----------
    plan : Plan
    argv : sequence of str
        The command's arguments, for the record.
    tick : callable
        Called with a description before each of the len(shapes) * len(plan.operations) measurements.

    Returns
    -------
    dict
        What `--json` writes; see benchmarks/README.md.

    Raises
    ------
    RuntimeError
        If bnfast itself fails.
    """
    raw: list[dict[str, Any]] = []
    begun = record(argv)
    missing: dict[str, str] = {}
    about: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}
        for name in plan.contenders:
            threads = 1 if name == ALONE else plan.threads
            workers[name] = stack.enter_context(
                Worker(
                    name,
                    "block:create" if plan.block else "contenders:create",
                    {"name": name, "threads": threads, "dtype": plan.dtype},
                    environment(threads),
                    openmp_as_it_comes=name not in OURS,
                )
            )
        for name, worker in list(workers.items()):
            with dropping(workers, name, missing):
                about[name] = worker.about()
                worker.stop()
        for shape in plan.shapes:
            tick(shape)
            ready = prepared(workers, plan, named(shape), missing)
            for operation in plan.operations:
                tick(f"{shape} {operation}")
                raw += turns(ready, plan, named(shape), operation, missing)
                tick("")
    results = with_ratios(raw)
    return {
        "format": 1,
        **begun,
        "threads": plan.threads,
        "dtype": plan.dtype,
        "fresh": plan.fresh,
        "between": plan.between,
        "sizes": plan.sizes,
        "block": plan.block,
        "rounds": plan.rounds,
        "samples_per_turn": plan.samples,
        "contenders": about,
        "missing": missing,
        "results": results,
        "geometric_means": geometric_means(results),
    }


class dropping:
    """Leave out a worker that fails, and note why; bnfast must not fail."""

    def __init__(self, workers: dict[str, Worker], name: str, missing: dict[str, str], what: str = "") -> None:
        self._workers, self._name, self._missing, self._what = workers, name, missing, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, WorkerError):
            return False
        if self._name == BASE:
            raise RuntimeError(f"{BASE}: {error}") from None
        self._workers.pop(self._name)
        self._missing[f"{self._name}{self._what}"] = str(error)
        return True


def prepared(workers: dict[str, Worker], plan: Plan, shape: Shape, missing: dict[str, str]) -> dict[str, Worker]:
    """The workers that have made their arrays, all at the same time, and given right results."""
    ready = dict(workers)
    for name, worker in list(ready.items()):
        with dropping(ready, name, missing, f", {shape.name}"):
            worker.send(
                "prepare",
                **{"shape": shape.name, "dtype": plan.dtype, "fresh": plan.fresh},
                **{"between": plan.between, "block": plan.block},
            )
    for name, worker in list(ready.items()):
        with dropping(ready, name, missing, f", {shape.name}"):
            worker.receive()
    for name, worker in list(workers.items()):
        worker.stop()
        if not worker.alive:
            workers.pop(name)
    return ready


def turns(
    workers: dict[str, Worker], plan: Plan, shape: Shape, operation: str, missing: dict[str, str]
) -> list[dict[str, Any]]:
    """Measure one operation: rounds in which every worker has a turn, beginning with another one each time."""
    workers = dict(workers)
    chosen: dict[str, dict[str, Any]] = {}
    seconds: dict[str, list[float]] = {}
    failed = f", {shape.name} {operation}"
    for name, worker in list(workers.items()):
        with dropping(workers, name, missing, failed):
            chosen[name] = worker.ask("calibrate", operation=operation)
    order = list(workers)
    for turn in range(plan.rounds):
        start = turn % len(order)
        for name in order[start:] + order[:start]:
            if name in workers:
                with dropping(workers, name, missing, failed):
                    found = workers[name].ask("measure", operation=operation, samples=plan.samples)
                    seconds.setdefault(name, []).extend(found["seconds"])
    return [
        {
            "shape": shape.name,
            "operation": operation,
            "group": f"{family(shape)} {operation}" if plan.sizes else group(shape, operation),
            "contender": name,
            **summary(seconds[name]),
            "samples": len(seconds[name]),
            "calls_per_sample": chosen[name]["calls"],
            "variant": chosen[name]["variant"],
            "bytes": shape.bytes_moved(operation, dtype_named(plan.dtype).itemsize),
        }
        for name in workers
    ]


def known_contenders(
    only: str | None, quick: bool, usual: Sequence[str] | None = None, *, block: bool = False
) -> tuple[list[str], dict[str, str]]:
    """(contenders to run, in their order; those left out and why). Raises ValueError for an unknown name.

    usual: those to run where `only` names none, instead of all but `ALONE`. block: of the block.
    """
    known = list(BLOCK_CONTENDERS if block else CONTENDERS)
    if only is None and usual is not None:
        return [name for name in known if name in usual], {}
    if only is None:
        names = [name for name in known if name != ALONE and not (quick and name == "torch.compile")]
        return names, {"torch.compile": "compiles for minutes, so --quick leaves it out"} if quick else {}
    wanted = set(filter(None, only.split(",")))
    if unknown := sorted(wanted.difference(known)):
        raise ValueError(f"unknown contender {', '.join(unknown)}; there are {', '.join(known)}")
    return [name for name in known if name in wanted | {BASE}], {}
