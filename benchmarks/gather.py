"""What processes cost a step: `mpiexec -n 2 python -m mpi4py benchmarks/gather.py`.

An Allgather of 2 C + 2 float64 numbers, for several C: its latency, and its bandwidth; the merge of the rows of many
processes, in C, with a callable in the place of an engine; and steps of a layer with and without the communicator. The
least and the median of ROUNDS means of CALLS calls, of the slowest process; they begin each round together. Last, a
forward beside the local one followed by two gathers, in alternating pairs.
"""

import platform
import statistics
import time

import numpy as np
from mpi4py import MPI

import bnfast

ROUNDS, CALLS = 15, 200
CHANNELS = (1, 16, 64, 256, 1024, 4096, 16384)
COMM = MPI.COMM_WORLD


def mean_of(call, n_calls):
    """Microseconds of a call, the slowest process's; they begin together."""
    call()
    COMM.Barrier()
    start = time.perf_counter()
    for _ in range(n_calls):
        call()
    return COMM.allreduce((time.perf_counter() - start) / n_calls * 1e6, MPI.MAX)


def microseconds(call, n_calls=CALLS):
    """(least, median) of the means of the rounds."""
    found = [mean_of(call, n_calls) for _ in range(ROUNDS)]
    return min(found), statistics.median(found)


def gathers():
    """{bytes a process sends: (least, median)}"""
    found = {}
    for channels in CHANNELS:
        row = np.ones(2 * channels + 2)
        rows = np.empty((COMM.size, row.size))
        found[row.nbytes] = microseconds(lambda row=row, rows=rows: COMM.Allgather(row, rows))
    return found


def merges(channels=256):
    """{processes: (forward, backward)}, ns a row and channel, least: calls with so many rows less those with one."""
    x = np.random.default_rng(0).normal(size=(2, channels)).astype(np.float32)

    def times(processes):
        rows = {}

        def gather(vector):
            found = rows.setdefault(vector.size, np.empty((processes, vector.size)))
            found[:] = vector
            return found

        bn = bnfast.BatchNorm(channels, comm=gather)
        row = np.ones(2 * channels + 2)
        copied, forward = microseconds(lambda: gather(row), 20)[0], microseconds(lambda: bn(x), 20)[0]
        step = microseconds(lambda: (bn(x), bn.backward(x)), 20)[0]
        return np.array([forward - copied, step - forward - copied])

    one = times(1)
    return {n: (times(n) - one) * 1e3 / ((n - 1) * channels) for n in (64, 1024)}


def steps(channels=256, shape=(32, 7, 7)):
    """(least, median) of a forward and backward, with and without the communicator."""
    x = np.random.default_rng(COMM.rank).normal(size=(shape[0], channels, *shape[1:])).astype(np.float32)
    y, dx = np.empty_like(x), np.empty_like(x)
    found = {}
    for name, comm in (("with", COMM), ("without", None)):
        bn = bnfast.BatchNorm(channels, comm=comm)

        def step(bn=bn):
            bn(x, out=y)
            bn.backward(x, out=dx)

        found[name] = microseconds(step, 20)
    return found


def beside_two_gathers(pairs=25, n_calls=100):
    """{C: quartiles, us} of a forward of (64, C) on each process, less the local one and two Allgathers of its row."""
    found = {}
    for channels in CHANNELS[2:5]:
        x = np.random.default_rng(COMM.rank).normal(size=(64, channels)).astype(np.float32)
        y, row = np.empty_like(x), np.ones(3 * channels + 2)
        rows = np.empty((COMM.size, row.size))
        alone, together = bnfast.BatchNorm(channels), bnfast.BatchNorm(channels, comm=COMM)

        def local(alone=alone, x=x, y=y, row=row, rows=rows):
            alone(x, out=y)
            COMM.Allgather(row, rows)
            COMM.Allgather(row, rows)

        def synchronised(together=together, x=x, y=y):
            together(x, out=y)

        more = [-mean_of(local, n_calls) + mean_of(synchronised, n_calls) for _ in range(pairs)]
        found[channels] = statistics.quantiles(more, n=4)
    return found


def main():
    sent, merged, stepped, beside = gathers(), merges(), steps(), beside_two_gathers()
    if COMM.rank:
        return
    print(f"{MPI.Get_library_version().split(',')[0]}, {COMM.size} processes, {platform.machine()}")
    print("| C | bytes a process | least (us) | median (us) |\n| --- | --- | --- | --- |")
    for channels, (size, (least, median)) in zip(CHANNELS, sent.items(), strict=True):
        print(f"| {channels:,} | {size:,} | {least:.1f} | {median:.1f} |")
    (less, more), which = list(sent)[-3::2], range(2)
    rates = [1e-3 * (more - less) / (sent[more][i] - sent[less][i]) for i in which]
    print(f"of large rows, bytes of one process over time: {rates[0]:.1f} GB/s least, {rates[1]:.1f} median")
    for processes, (forward, backward) in merged.items():
        print(f"merge of {processes:,} rows, ns a row and channel: forward {forward:.1f}, backward {backward:.1f}")
    for name, (least, median) in stepped.items():
        print(f"step of 32x256x7x7 {name} comm: {least:.0f} us least, {median:.0f} median")
    for channels, (low, median, high) in beside.items():
        print(
            f"forward of (64, {channels}) with comm, over the local one and two Allgathers: {median:+.1f} us "
            f"({low:+.1f} to {high:+.1f})"
        )


if __name__ == "__main__":
    main()
