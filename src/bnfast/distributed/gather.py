"""What a communicator is: of each engine, a gather of a few float64 numbers to all processes, in their order.

Nothing of an engine is imported until one of its communicators is given: it is recognised by the modules of its class.
"""

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core

__all__ = ["KEPT", "Carried", "as_numbers", "in_words", "of_layer", "sender"]

Vector = NDArray[np.float64]
Send = Callable[[Vector], Any]

KEPT = True  # in pickles and files: there was a communicator
EXPECTED = "an mpi4py communicator, a torch.distributed process group, or a callable gather(vector) -> (processes, n)"
CODES: Mapping[str, tuple[Any, ...]] = {  # of options that are no numbers
    "dtype": (np.dtype(np.float32), np.dtype(np.float64)),
    "affine": (True, False, "gamma", "beta"),
    "nonfinite": ("propagate", "skip", "raise"),
    "activation": (None, "relu", "relu6", "leaky_relu"),
}
AGREED = (
    "num_features", "dtype", "eps", "momentum", "affine", "nonfinite", "track_running_stats", "unbiased_running_var",
    "activation", "negative_slope",
)  # fmt: skip


class Carried:
    """A communicator on its way into a copy of a layer; pickles keep the fact alone."""

    def __init__(self, comm: Any) -> None:
        self.comm = comm

    def __deepcopy__(self, memo: object) -> "Carried":
        return self

    def __reduce__(self) -> Any:
        return bool, (KEPT,)


def sender(comm: Any) -> Send:
    """What sends a vector to all processes, and gives the vectors of all; TypeError for what is no communicator."""
    places = {base.__module__.partition(".")[0]: base.__module__ for base in type(comm).__mro__}
    if "mpi4py" in places and hasattr(comm, "Allgather"):
        return _mpi(comm)
    if "torch" in places and ("distributed" in places["torch"] or hasattr(comm, "allgather")):
        return _torch(comm)
    if callable(comm) and not isinstance(comm, type):
        return _callable(comm)
    raise TypeError(f"comm: expected {EXPECTED}, got {type(comm).__name__}")


def _callable(gather: Send) -> Send:
    def send(vector: Vector) -> Vector:
        rows = gather(vector)
        return rows.copy() if type(rows) is np.ndarray else rows  # they are merged where they lie

    return send


def _mpi(comm: Any) -> Send:
    if comm.Is_inter():
        raise TypeError("comm: expected an intracommunicator, got an intercommunicator")
    processes, all_gather, empty = comm.Get_size(), comm.Allgather, np.empty

    def send(vector: Vector) -> Vector:
        rows = empty((processes, vector.size))
        all_gather(vector, rows)
        return rows

    return send


def _torch(group: Any) -> Send:
    import torch
    from torch import distributed

    processes = distributed.get_world_size(group)
    if processes < 1:
        raise ValueError("comm: expected a process group that this process belongs to")

    def send(vector: Vector) -> Vector:
        mine = torch.from_numpy(vector.copy())
        rows = [torch.empty_like(mine) for _ in range(processes)]
        distributed.all_gather(rows, mine, group=group)
        found: Vector = torch.stack(rows).numpy()
        return found

    return send


def of_layer(comm: Any, layer: Any) -> "_core.Processes | None":
    """The processes that hold a layer; None: this one alone. comm: also `Carried` or KEPT, from a copy or a pickle."""
    if comm is None:
        return None
    if isinstance(comm, Carried):
        comm = comm.comm
    if comm is KEPT:
        return _core.Processes(None, None, (), tuple, in_words)
    return _core.Processes(comm, sender(comm), AGREED, partial(_agreed, weakref.ref(layer)), in_words)


def _agreed(layer: Callable[[], Any]) -> list[float]:
    return as_numbers({name: getattr(layer(), name) for name in AGREED})


def as_numbers(values: Mapping[str, Any]) -> list[float]:
    """Options of a layer in numbers, in their order."""
    numbers = {name: codes.index(values[name]) for name, codes in CODES.items() if name in values}
    momentum = -1.0 if values["momentum"] is None else values["momentum"]
    return [float(number) for number in {**values, **numbers, "momentum": momentum}.values()]


def in_words(name: str, number: float) -> str:
    """What such a number stands for."""
    if name == "momentum" and number == -1:
        return "None"
    codes = CODES.get(name, ())
    return str(codes[int(number)]) if number in range(len(codes)) else f"{number:g}"
