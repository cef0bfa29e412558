"""Where the time of a small call goes: `python benchmarks/small_calls.py`.

A call on (32, 64) float32 is taken apart by leaving things out: each line is the difference of two calls that differ in
that one thing. Medians of short runs that take turns, in nanoseconds, one thread.
"""

import statistics
import timeit
from collections.abc import Callable

import numpy as np

import bnfast
from bnfast import _core
from bnfast import functional as F

ROUNDS, CALLS = 40, 2000


def medians(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Nanoseconds of a call of each, in turns."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            times[name].append(timeit.timeit(function, number=CALLS) / CALLS * 1e9)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Measure, and print two tables."""
    x = np.random.default_rng(0).standard_normal((32, 64), dtype=np.float32)
    dy, out, least = x[::-1].copy(), np.empty_like(x), x[:2].copy()
    narrow, wide = np.ones(64, np.float32), np.ones(64)
    layer = bnfast.BatchNorm(64)
    _, mean, inv_std = F.batch_norm(x)
    layer(x)

    def nothing() -> None:
        pass

    def pair() -> None:  # a backward uses its forward up
        layer(x)
        layer.backward(dy)

    t = medians(
        {
            "lambda": lambda: nothing(),
            "function": lambda: F.batch_norm(x, narrow, narrow),
            "core": lambda: _core.batch_norm(x, narrow, narrow, 1, 1e-5, None),
            "out": lambda: _core.batch_norm(x, narrow, narrow, 1, 1e-5, out),
            "wide": lambda: _core.batch_norm(x, wide, wide, 1, 1e-5, out),
            "least": lambda: _core.batch_norm(least, wide, wide, 1, 1e-5, out[:2]),
            "view": lambda: out[:2],
            "layer": lambda: layer(x),
            "backward": lambda: F.batch_norm_backward(dy, x, mean, inv_std, narrow),
            "pair": pair,
        }
    )
    whole = t["function"] - t["lambda"]
    smallest = t["least"] - t["view"] - t["lambda"]
    parts = {
        "a Python function with these arguments": t["function"] - t["core"],
        "a fresh y": t["core"] - t["out"],
        "gamma and beta to float64": t["out"] - t["wide"],
        "2048 elements instead of 128: the kernel": t["wide"] - t["lambda"] - smallest,
        "the rest: checks, mean and inv_std, 64 roots and coefficients": smallest,
    }
    print(f"functional.batch_norm, (32, 64) float32          {whole:6.0f} ns")
    for name, value in parts.items():
        print(f"    {name:64} {value:6.0f}")
    layered = t["layer"] - t["lambda"]
    print(f"BatchNorm.__call__ in training                   {layered:6.0f} ns")
    print(f"    {'the function in it':64} {t['core'] - t['lambda']:6.0f}")
    print(f"    {'its record, running statistics, one exchange, Python':64} {layered - t['core'] + t['lambda']:6.0f}")
    print(f"functional.batch_norm_backward                   {t['backward'] - t['lambda']:6.0f} ns")
    print(f"BatchNorm.__call__ and backward, a pair          {t['pair'] - t['lambda']:6.0f} ns")


if __name__ == "__main__":
    main()
