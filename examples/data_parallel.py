"""Train on several processes, a part of each batch on each, with statistics of the whole batch, or of each part alone.

``python examples/data_parallel.py DIR`` draws the losses, with threads for processes. On real ones
``mpiexec -n 2 python -m mpi4py examples/data_parallel.py`` says how far they are from those of one process, and with
``--apart`` how far those with statistics of each process's own part are, as without `comm`.
"""

from __future__ import annotations

import argparse
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import bnfast
from bnfast.commands.figures import BLUE, GREEN, ORANGE, VERMILION, label, panels, save
from bnfast.commands.network import Array

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLE = "Several processes: one batch norm, or one for each part"
CAPTION = (
    "With statistics of the whole batch, of 64 images, the losses on 1, 2 and 4 processes are one line, equal to "
    "rounding. With statistics of each process's own part the same network trains differently on every number of "
    "processes; on 4, with parts of 16 images, its loss stays higher."
)
ALT = (
    "Loss against steps on 1, 2 and 4 processes, with statistics of the whole batch and of each part; and the distance "
    "of each from the loss on one process, on a logarithmic axis."
)

STEPS = 60
BATCH = 64
PROCESSES = 1, 2, 4


class Result(NamedTuple):
    """The loss of each of STEPS, by the number of processes."""

    together: dict[int, Array]  # statistics of the whole batch
    apart: dict[int, Array]  # of each process's own part


def losses(
    comm: Any, rank: int, size: int, steps: int, together: bool = True, sum_of: Any = None, seed: int = 0
) -> list[float]:
    """The loss of each step of a network of two layers, with parts of the same batches on `size` processes."""
    from sklearn.datasets import load_digits

    images, digits = load_digits(return_X_y=True)
    rng = np.random.default_rng(seed)
    first, second = rng.normal(0, 0.1, (64, 32)), rng.normal(0, 0.1, (32, 10))
    bn = bnfast.BatchNorm(32, activation="relu", dtype=np.float64, comm=comm if together else None)
    part = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    found = []
    for _ in range(steps):
        chosen = rng.choice(len(images), BATCH, replace=False)[part]
        x, target = images[chosen], np.eye(10)[digits[chosen]]
        hidden = bn(x @ first)
        scores = hidden @ second
        chances = np.exp(scores - scores.max(1, keepdims=True))
        chances /= chances.sum(1, keepdims=True)
        back = (chances - target) / BATCH
        dhidden = bn.backward(back @ second.T)
        loss = -np.log((chances * target).sum(1)).sum() / BATCH
        gradients = [np.array(loss), x.T @ dhidden, hidden.T @ back, bn.grad_gamma, bn.grad_beta]
        if sum_of is not None:
            gradients = [sum_of(gradient) for gradient in gradients]
        found.append(float(gradients[0]))
        for parameter, gradient in zip((first, second, bn.gamma, bn.beta), gradients[1:], strict=True):
            parameter -= 0.5 * gradient
    return found


# --- threads for processes ---


def on_threads(size: int, function: Callable[[Any, int], Any]) -> list[Any]:
    """Return what function(gather, rank) gives on each of so many threads."""
    barrier, sent = threading.Barrier(size), [np.empty(0)] * size
    results: list[Any] = [None] * size

    def work(rank: int) -> None:
        def gather(vector: Array) -> Array:
            sent[rank] = vector.copy()
            barrier.wait()
            rows = np.stack(sent)
            barrier.wait()
            return rows

        try:
            results[rank] = function(gather, rank)
        except BaseException:
            barrier.abort()  # nobody waits for this one
            raise

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def compute(seed: int) -> Result:
    """Train on 1, 2 and 4 processes, together and apart."""

    def trained(size: int, together: bool) -> Array:
        def work(gather: Any, rank: int) -> list[float]:
            def sum_of(array: Array) -> Array:
                total: Array = gather(np.ravel(array)).sum(0).reshape(array.shape)
                return total

            return losses(gather, rank, size, STEPS, together, sum_of, seed)

        return np.array(on_threads(size, work)[0])

    return Result(
        {size: trained(size, True) for size in PROCESSES}, {size: trained(size, False) for size in PROCESSES[1:]}
    )


def draw(results: Sequence[Result]) -> Figure:
    """Show the first result."""
    (together, apart), steps = results[0], np.arange(STEPS)
    figure, (left, right) = panels(2, TITLE)
    wholes = {1: ("0.8", 9.0, "-"), 2: (BLUE, 4.0, "-"), 4: (ORANGE, 1.8, "--")}  # one upon another
    parts = {2: (GREEN, "-."), 4: (VERMILION, ":")}
    for size, (color, width, dash) in wholes.items():
        name = "1 process" if size == 1 else f"{size}, of the whole"
        left.plot(steps, together[size], dash, color=color, linewidth=width, label=name)
        if size > 1:
            away = np.maximum(np.abs(together[size] - together[1]), 1e-17)
            right.plot(steps, away, dash, color=color, linewidth=2, label=name)
    for size, (color, dash) in parts.items():
        left.plot(steps, apart[size], dash, color=color, linewidth=2, label=f"{size}, of parts")
        right.plot(steps, np.abs(apart[size] - together[1]), dash, color=color, linewidth=2, label=f"{size}, of parts")
    left.set_yscale("log")
    right.set_yscale("log")
    label(left, "loss", "step", "loss of the batch (nats)", "upper right")
    label(right, "distance from one process", "step", "difference (nats; drawn from 1e-17 up)", "center right")
    return figure


def main(folder: str | Path) -> Path:
    """Write data_parallel.png into a folder."""
    return save(draw([compute(seed=0)]), folder, "data_parallel")


def train(steps: int, apart: bool) -> None:
    """Train on the processes of MPI, and say how far the losses are from those of one."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    rank, size = comm.Get_rank(), comm.Get_size()
    found = losses(comm, rank, size, steps, not apart, comm.allreduce)
    if rank == 0:
        alone = losses(None, 0, 1, steps)
        for step in range(0, steps, 10):
            print(f"step {step:3}: loss {found[step]:.6f}, on one process {alone[step]:.6f}")
        print(f"{size} processes, {steps} steps: largest difference {np.abs(np.subtract(found, alone)).max():.1e}")


def command() -> None:
    """Draw with threads for processes, or train on the processes of MPI, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", metavar="DIR", help="draw into it, with threads for processes")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--apart", action="store_true", help="statistics of each process's own part")
    options = parser.parse_args()
    if options.folder is not None:
        print(main(options.folder))
    else:
        train(options.steps, options.apart)


if __name__ == "__main__":
    command()
