"""`python -m bnfast`: the configuration; `python -m bnfast demo`, `gallery`, `bench`: see there."""

import argparse
import sys

from . import __version__, show_config

NEXT = """
python -m bnfast demo           train two networks with and without batch normalisation: a figure
python -m bnfast bench --quick  how fast it is here, beside what is installed of PyTorch, oneDNN and NumPy
python -m bnfast gallery DIR    eight experiments on real data
python -m bnfast --help         all commands; in Python: help(bnfast); the guide: docs/ in the sources"""

COMMANDS = """commands:
  config   versions, instruction set, threads and why there are as many
  demo     train two networks to read digits, with and without batch normalisation, and draw a figure
  gallery  write the examples' figures on real data and a page that shows them
  bench    compare with PyTorch, oneDNN and NumPy on this machine
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bnfast",
        description="Batch normalisation on the CPU for NumPy arrays. Without a command: print the configuration.",
        epilog=COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", nargs="?", choices=["config", "demo", "gallery", "bench"], default="config")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="of the command: python -m bnfast demo --help")
    parser.add_argument("--version", action="version", version=f"bnfast {__version__}")
    args = parser.parse_args(argv)
    if args.command == "demo":
        from .commands.demo import main as demo

        return demo(args.arguments)
    if args.command == "gallery":
        from .commands.gallery import main as gallery

        return gallery(args.arguments)
    if args.command == "bench":
        from .commands.bench import main as bench

        return bench(args.arguments)
    if args.arguments in (["-h"], ["--help"]):
        parser.print_help()
        return 0
    if args.arguments:
        parser.error(f"config takes no arguments, got {' '.join(args.arguments)}")
    show_config()
    print(NEXT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
