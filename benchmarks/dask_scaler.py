"""StandardScaler on dask arrays beside dask-ml's, errors and time: `python benchmarks/dask_scaler.py`.

float32 data of std 1 and several means, in chunks. Errors are those against numpy.longdouble, around the first row:
sums of float64 are less exact than bnfast's. The two take turns, on the threaded scheduler; the time is that of a fit,
the least and the median of ROUNDS. Needs dask-ml (`pip install dask-ml`).
"""

import argparse
import platform
import statistics
import time

import dask
import dask.array as da
import numpy as np

import bnfast
import bnfast.dask

ROUNDS = 7
MEANS = (0.0, 1e5, 1e6 + 0.3)


def errors(scaler, x):
    """(of the mean in standard deviations, of the variance relative to it), the largest of all columns."""
    found = []
    for column, mean, var in zip(x.T, scaler.mean_, scaler.var_, strict=True):
        first = np.longdouble(column[0])
        away = column - first
        exact = away.mean()
        exact_var = np.square(away - exact).mean()
        found.append((abs(np.longdouble(mean) - first - exact) / np.sqrt(exact_var), abs(var / exact_var - 1)))
    return np.max(found, axis=0)


def seconds(fit, chunked):
    start = time.perf_counter()
    fit(chunked)
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--columns", type=int, default=20)
    parser.add_argument("--chunks", type=int, default=16)
    options = parser.parse_args()
    import dask_ml
    import dask_ml.preprocessing

    versions = f"dask {dask.__version__}, dask-ml {dask_ml.__version__}, numpy {np.__version__}, {platform.machine()}"
    size = f"{options.rows:,} x {options.columns} of float32, std 1, {options.chunks} chunks"
    print(f"{versions}; {size}, {bnfast.get_num_threads()} threads")
    print("| mean | | error of the mean (std) | of the variance (relative) | fit: least, median (ms) |")
    print("| --- | --- | --- | --- | --- |")
    kinds = {"dask-ml": dask_ml.preprocessing.StandardScaler, "bnfast": bnfast.StandardScaler}
    for mean in MEANS:
        x = np.random.default_rng(0).standard_normal((options.rows, options.columns))
        x = (x + mean).astype(np.float32)
        chunked = da.from_array(x, chunks=(-(-options.rows // options.chunks), options.columns))
        times = {name: [] for name in kinds}
        for _ in range(ROUNDS):
            for name, kind in kinds.items():
                times[name].append(seconds(kind().fit, chunked))
        for name, kind in kinds.items():
            of_mean, of_var = errors(kind().fit(chunked), x)
            least, median = min(times[name]) * 1e3, statistics.median(times[name]) * 1e3
            print(f"| {mean:,.1f} | {name} | {of_mean:.1e} | {of_var:.1e} | {least:.0f}, {median:.0f} |")
        ratio = statistics.median(a / b for a, b in zip(times["dask-ml"], times["bnfast"], strict=True))
        print(f"dask-ml takes {ratio:.1f} times as long (median of the rounds)")


if __name__ == "__main__":
    main()
