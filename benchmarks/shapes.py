"""The shapes of the benchmarks. The table itself is in the package, where `python -m bnfast bench` needs it."""

from bnfast.commands.bench.shapes import OPERATIONS, QUICK, SHAPES, Shape, group

__all__ = ["OPERATIONS", "QUICK", "SHAPES", "Shape", "group"]

if __name__ == "__main__":
    print("\n".join(SHAPES))
