"""StandardScaler beside scikit-learn's: `python benchmarks/scaler.py`.

Each has a process of its own; they take turns, as in `python -m bnfast bench`: in each of ROUNDS rounds each makes one
call that is not timed and SAMPLES that are, the other waiting meanwhile. A sample is the mean of as many calls as take
about a millisecond. Results are compared before anything is timed. Results of `transform` go to fresh memory.
"""

import argparse
import functools
import os
import statistics
import subprocess
import sys
import time

import numpy as np

from bnfast.commands.bench.compare import environment, machine

ROUNDS, SAMPLES = 7, 3
CASES = {  # shape and dtype, a mean of a few standard deviations
    "1000000x50": ((1_000_000, 50), np.float32),
    "100000x784": ((100_000, 784), np.float32),
    "150x13": ((150, 13), np.float64),
    "1000000x50 NaN": ((1_000_000, 50), np.float32),
    "1000000x50 int32": ((1_000_000, 50), np.int32),
}
OPERATIONS = ("fit", "transform", "fit_transform", "inverse_transform", "fit weighted")
CONTENDERS = ("bnfast", "sklearn")


def scaler_of(contender):
    """A new scaler; ImportError where the contender is not installed."""
    if contender == "bnfast":
        from bnfast import StandardScaler
    else:
        from sklearn.preprocessing import StandardScaler
    return StandardScaler()


def data(case):
    """The same numbers in every process."""
    shape, dtype = CASES[case]
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape, dtype=np.float64 if dtype == np.float64 else np.float32)
    x += 3
    if dtype == np.int32:
        return (100 * x).astype(np.int32)
    if case.endswith("NaN"):
        x[rng.random(shape, dtype=np.float32) < 0.01] = np.nan
    return x


def calls(scaler, x):
    """{operation: function}; the scaler is fitted."""
    weights = np.linspace(0.5, 1.5, len(x))
    scaler.fit(x)
    found = {name: functools.partial(getattr(scaler, name), x) for name in OPERATIONS[:-1]}
    return found | {"fit weighted": functools.partial(scaler.fit, x, sample_weight=weights)}


def worker(contender, case):
    """Answers each line of the standard input, an operation, with the seconds of its samples; 'check' with numbers."""
    x = data(case)
    scaler = scaler_of(contender)
    functions = calls(scaler, x)
    print("ready", flush=True)
    for line in sys.stdin:
        operation = line.strip()
        if operation == "check":
            rows = scaler.fit(x).transform(x)[:: max(1, len(x) // 7)]
            print(*scaler.mean_, *scaler.scale_, *rows.ravel(), flush=True)
            continue
        call = functions[operation]
        begin = time.perf_counter()
        call()
        n = max(1, round(1e-3 / (time.perf_counter() - begin)))
        seconds = []
        for _ in range(SAMPLES):
            begin = time.perf_counter()
            for _ in range(n):
                call()
            seconds.append((time.perf_counter() - begin) / n)
        print(*seconds, flush=True)


def measure(case, threads, operations):
    """{operation: {contender: seconds of all samples}}"""
    command = [sys.executable, __file__, "--case", case, "--worker"]
    env = os.environ | environment(threads)
    workers = {
        name: subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        for name in CONTENDERS
    }

    def ask(name, question):
        print(question, file=workers[name].stdin, flush=True)
        return [float(number) for number in workers[name].stdout.readline().split()]

    try:
        for process in workers.values():
            if process.stdout.readline() != "ready\n":
                raise SystemExit("a contender did not start")
        np.testing.assert_allclose(ask("bnfast", "check"), ask("sklearn", "check"), rtol=1e-4, atol=1e-5)
        found = {operation: {name: [] for name in CONTENDERS} for operation in operations}
        for operation in operations:
            for i in range(ROUNDS):
                for name in CONTENDERS if i % 2 else reversed(CONTENDERS):
                    found[operation][name] += ask(name, operation)
        return found
    finally:
        for process in workers.values():
            process.stdin.close()
            process.wait()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--case", choices=CASES, help="only this one")
    parser.add_argument("--operations", help="only these, with commas between")
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.case)
        return
    try:
        scaler_of("sklearn")
    except ImportError:
        raise SystemExit("scikit-learn is not installed: there is nothing to compare with") from None
    print(machine(), f"{options.threads} threads")
    print(f"{'':<18}{'':<20}{'bnfast':>12}{'sklearn':>12}{'ratio':>8}")
    for case in [options.case] if options.case else CASES:
        operations = options.operations.split(",") if options.operations else OPERATIONS
        for operation, times in measure(case, options.threads, operations).items():
            mine, theirs = (statistics.median(times[name]) for name in CONTENDERS)
            print(
                f"{case:<18}{operation:<20}{1e3 * mine:>9.3f} ms{1e3 * theirs:>9.3f} ms{theirs / mine:>8.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
