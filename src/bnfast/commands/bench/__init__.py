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
    if args.loop and (args.figure or args.only or args.shapes or args.fresh or args.dtype != "float32"):
        parser.error("--loop goes with --threads, --quick and --json only")
    work = (lambda: run_loop(args, argv)) if args.loop else (lambda: run_comparison(args, argv, parser))
    return ended("bench", work, (*ERRORS, RuntimeError))


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser("python -m bnfast bench", description=DESCRIPTION)
    add = parser.add_argument
    add("--quick", action="store_true", help="five shapes and fewer rounds, less than a minute; no torch.compile")
    add("--threads", type=int, metavar="N", help="threads of each contender (default: 2; --loop: each one's default)")
    add("--only", metavar="NAME,...", help="these contenders; bnfast always runs")
    add("--shapes", metavar="NAME,...", help="these shapes, named as in the table, for instance 32x64x56x56-cl")
    add("--dtype", choices=("float32", "float64"), default="float32", help="of the data (default: %(default)s)")
    add("--fresh", action="store_true", help="results go to fresh memory instead of out=")
    add("--json", type=Path, metavar="FILE", help="write all figures")
    add("--figure", type=Path, metavar="FILE", help="draw them: PNG")
    add("--loop", action="store_true", help="batch normalisation in training loops, beside matrix products, instead")
    return parser


def run_comparison(args: argparse.Namespace, argv: list[str], parser: argparse.ArgumentParser) -> None:
    """Compare the contenders and report."""
    from .compare import Plan, compare, known_contenders
    from .figure import draw
    from .shapes import OPERATIONS, QUICK, SHAPES
    from .tables import table

    try:
        contenders, left_out = known_contenders(args.only, args.quick)
    except ValueError as error:
        parser.error(f"--only: {error}")
    shapes = args.shapes.split(",") if args.shapes else list(QUICK if args.quick else SHAPES)
    if unknown := [name for name in shapes if name not in SHAPES]:
        parser.error(f"--shapes: unknown {', '.join(unknown)}; there are {', '.join(SHAPES)}")
    require(["tqdm", "matplotlib"] if args.figure else ["tqdm"], "bench")
    for path in filter(None, (args.json, args.figure)):
        check_writable(path)
    from tqdm import tqdm

    rounds, samples = (3, 3) if args.quick else (7, 5)
    plan = Plan(shapes, contenders, args.threads or 2, args.dtype, args.fresh, rounds, samples)
    with tqdm(total=len(shapes) * len(OPERATIONS), leave=False, disable=None) as bar:

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
        args.figure.write_bytes(draw(report))
        print(f"\nFigure: {args.figure}")


def run_loop(args: argparse.Namespace, argv: list[str]) -> None:
    """Measure the training loops and report."""
    from .loop import measure_loops, table

    require(["tqdm"], "bench")
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
