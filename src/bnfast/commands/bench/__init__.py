"""`python -m bnfast bench`: bnfast beside other libraries, each in a process of its own, taking turns."""

import argparse
import json
from pathlib import Path

from ..common import ERRORS, check_writable, ended, require

__all__ = ["main"]

DESCRIPTION = """
Compare bnfast with NumPy, PyTorch, torch.compile and oneDNN, as far as they are installed, and with the memory floor.
Each contender runs in a process of its own; they take turns, and those not measured are stopped.
"""


def main(argv: list[str]) -> int:
    """Run the benchmark.

    Parameters
    ----------
    argv : list of str
        The arguments after ``python -m bnfast bench``.

    Returns
    -------
    int
        The exit code: 0, 1 if a package is missing, a file cannot be written or bnfast fails, 130 after Ctrl-C.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.threads is not None and args.threads < 1:
        parser.error(f"--threads must be at least 1, not {args.threads}")
    alone = args.figure or args.only or args.shapes or args.fresh or args.cold or args.consumer or args.sizes
    alone = alone or args.block or args.means
    if args.loop and (alone or args.dtype != "float32" or args.explain):
        parser.error("--loop goes with --threads, --quick and --json only")
    if args.explain and (alone or args.json or args.quick):
        parser.error("--explain goes with --dtype and --threads only")
    if args.cold and args.consumer:
        parser.error("--cold and --consumer do not go together")
    if args.sizes and args.shapes:
        parser.error("--sizes has shapes of its own; leave out --shapes")
    if args.means and (args.block or args.sizes or args.shapes or args.quick):
        parser.error("--means is of all shapes: without --block, --sizes, --shapes and --quick")
    if args.block and (args.fresh or args.cold or args.consumer or args.sizes):
        parser.error("--block goes with --dtype, --threads, --only, --shapes, --quick, --json and --figure only")
    if args.block and args.dtype in ("float16", "bfloat16"):
        parser.error("--block takes --dtype float32 and float64 only")
    work = run_explain if args.explain else run_loop if args.loop else run_comparison
    return ended("bench", lambda: work(args, argv, parser), (*ERRORS, RuntimeError))


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser("python -m bnfast bench", description=DESCRIPTION)
    add = parser.add_argument
    add("--quick", action="store_true", help="five shapes and fewer rounds, less than a minute; no torch.compile")
    add("--threads", type=int, metavar="N", help="threads of each contender (default: 2; --loop: each one's default)")
    add("--only", metavar="NAME,...", help="these contenders; bnfast always runs")
    add("--shapes", metavar="NAME,...", help="these shapes, named as in the table, for instance 32x64x56x56-cl")
    dtypes = ("float32", "float64", "float16", "bfloat16")
    add("--dtype", choices=dtypes, default="float32", help="of the data (default: %(default)s)")
    add("--fresh", action="store_true", help="results go to fresh memory instead of out=")
    add("--json", type=Path, metavar="FILE", help="write all figures")
    add("--figure", type=Path, metavar="FILE", help="draw them: PNG")
    add("--means", type=Path, metavar="FILE", help="draw the geometric means, of small arrays and large: PNG")
    add("--sizes", action="store_true", help="a sweep instead: five kinds of arrays from 16 KB to 256 MB each")
    add("--cold", action="store_true", help="other work of 300 µs before each call; beside bnfast on one thread")
    add("--consumer", action="store_true", help="the result is read after each call, and that is timed, too")
    add("--block", action="store_true", help="the residual block instead: relu(batch norm(x) + residual), and backward")
    add("--explain", metavar="SHAPE", help="print how the kernels go about a shape, and measure nothing")
    add("--loop", action="store_true", help="batch normalisation in training loops, beside matrix products, instead")
    return parser


def run_comparison(args: argparse.Namespace, argv: list[str], parser: argparse.ArgumentParser) -> None:
    """Compare the contenders and report."""
    from .compare import Plan, compare, known_contenders
    from .figure import draw, draw_sizes
    from .means import draw_means
    from .tables import table

    try:
        contenders, left_out = known_contenders(args.only, args.quick, usual_contenders(args), block=args.block)
    except ValueError as error:
        parser.error(f"--only: {error}")
    try:
        shapes = chosen_shapes(args)
    except ValueError as error:
        parser.error(f"--shapes: {error}")
    require(["tqdm", "matplotlib"] if args.figure or args.means else ["tqdm"])
    if args.dtype == "bfloat16":
        require(["ml_dtypes"])
    for path in filter(None, (args.json, args.figure, args.means)):
        check_writable(path)
    from tqdm import tqdm

    rounds, samples = (3, 3) if args.quick else (7, 5)
    between = "cold" if args.cold else "consumer" if args.consumer else ""
    plan = Plan(
        shapes, contenders, args.threads or 2, args.dtype, args.fresh, rounds, samples, between, args.sizes, args.block
    )
    with tqdm(total=len(shapes) * len(plan.operations), leave=False, disable=None) as bar:

        def tick(text: str) -> None:
            if text:
                bar.set_description(text)
            else:
                bar.update()

        report = compare(plan, argv, tick)
    report["missing"] = {**left_out, **report["missing"]}
    print(table(report))
    write_json(args.json, report)
    if args.figure:
        args.figure.write_bytes(draw_sizes(report) if args.sizes else draw(report))
        print(f"\nFigure: {args.figure}")
    if args.means:
        args.means.write_bytes(draw_means(report))
        print(f"\nFigure: {args.means}")


def usual_contenders(args: argparse.Namespace) -> tuple[str, ...] | None:
    """Those that run where --only names none; None: all there are."""
    if args.cold:
        return ("bnfast", "bnfast-1", "onednn", "torch")
    return ("bnfast", "onednn", "torch") if args.sizes else None


def chosen_shapes(args: argparse.Namespace) -> list[str]:
    """Names of the shapes to measure; ValueError for one that is none."""
    from .shapes import LARGEST_WHEN_COLD, LARGEST_WHEN_QUICK, QUICK, SHAPES, SIZES, named

    if args.shapes:
        return [named(name).name for name in args.shapes.split(",")]
    if args.sizes or args.cold:
        largest = LARGEST_WHEN_QUICK if args.quick else 1 << 62 if args.sizes else LARGEST_WHEN_COLD
        return [shape.name for shapes in SIZES.values() for shape in shapes if shape.size <= largest]
    return list(QUICK if args.quick else SHAPES)


def run_explain(args: argparse.Namespace, argv: list[str], parser: argparse.ArgumentParser) -> None:
    """Print what the kernels would do with a shape."""
    from ... import _core
    from .shapes import OPERATIONS, dtype_named, named

    if args.dtype == "bfloat16":
        require(["ml_dtypes"])
    try:
        shape = named(args.explain)
    except ValueError as error:
        parser.error(f"--explain: {error}")
    explain = getattr(_core, "explain", None)
    if explain is None:
        raise RuntimeError("this build of bnfast does not explain what its kernels do")
    for operation in OPERATIONS:
        print(f"{shape.name} {args.dtype}, {operation}, {args.threads or 2} threads")
        found = explain(shape.memory_dims, shape.axis, dtype_named(args.dtype), operation, args.threads or 2)
        for line in found["words"].splitlines():
            print(f"    {line}")


def run_loop(args: argparse.Namespace, argv: list[str], parser: argparse.ArgumentParser) -> None:
    """Measure the training loops and report."""
    from .loop import measure_loops, table

    require(["tqdm"])
    if args.json:
        check_writable(args.json)
    from tqdm import tqdm

    with tqdm(leave=False, disable=None, unit="turn") as bar:
        report = measure_loops(args.threads, args.quick, argv, bar.update)
    print(table(report))
    write_json(args.json, report)


def write_json(path: Path | None, report: object) -> None:
    """Write the report, if a file is given."""
    if path:
        path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        print(f"\nFigures: {path}")
