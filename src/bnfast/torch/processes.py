"""A batch whose parts lie on several processes: what `torch.nn.SyncBatchNorm` does, on the CPU.

A training forward gathers the moments of the parts, a backward their sums: float64 rows, merged in the order of the
processes, so that all have the same bits. What a row is for stands in its first number, negative from a process that
raised, whose words follow in a second gather: then all raise, and none waits for it for ever. (core/processes.pxi does
the same for `bnfast.BatchNorm`.)
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from .. import _core
from .. import functional as ours
from ..distributed.gather import KEPT, as_numbers, in_words, sender
from ..statistics.moments import moments
from . import calls
from .memory import empty_like

__all__ = [
    "FORWARD", "Exchange", "Whole", "batch_norm", "exchange_of", "group_of", "is_initialized", "row_of", "width_of",
    "world",
]  # fmt: skip

Rows = NDArray[np.float64]

AGREEMENT, FORWARD, BACKWARD, PURPOSES = 1, 2, 3, 4
IN_WORDS = {AGREEMENT: "the agreement on a layer", FORWARD: "a forward", BACKWARD: "a backward"}
AGREED = ("num_features", "eps", "momentum", "affine", "track_running_stats", "activation", "negative_slope")
TEXT_NUMBERS = 64  # of a row with an error's text


def is_initialized() -> bool:
    """Whether there is a world of processes."""
    return bool(distributed.is_available() and distributed.is_initialized())


def world() -> Any:
    """All processes; None where there is this one alone."""
    return distributed.group.WORLD if is_initialized() else None


def group_of(process_group: Any, default: Callable[[], Any]) -> Any:
    """A layer's group, `default()` where it has named none; None if no other process belongs to it."""
    group = default() if process_group is None else process_group
    if group is None:
        return None
    if group is KEPT:
        raise RuntimeError("process_group: this layer had one when it was pickled, which a pickle cannot keep; set "
                           "layer.process_group to one, or to None")  # fmt: skip
    processes = distributed.get_world_size(group)
    if processes < 1:
        raise ValueError("process_group: expected one that this process belongs to")
    return group if processes > 1 else None


class Whole(NamedTuple):
    """What the parts of a batch have together; float64."""

    values: int  # a channel
    mean: Rows
    var: Rows


def width_of(channels: int) -> int:
    """Numbers in `row_of`."""
    return 1 + 3 * channels


def row_of(x: Tensor) -> Rows:
    """The moments of a part of a batch."""
    with calls.threads():
        return moments(calls.array_of(x), axis=1).to_row()


class Exchange:
    """Of one layer with the same layer on the other processes of its group."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self._send = sender(group)
        self._number = 0  # of the layer; 0: they have not agreed yet

    def agree(self, layer: Any) -> None:
        """That all have the same layer, once; ValueError on all of them otherwise."""
        global _layers_agreed
        if self._number:
            return
        values = {name: getattr(layer, name) for name in AGREED}
        if layer.weight is None or layer.bias is None:
            values["affine"] = "gamma" if layer.weight is not None else "beta" if layer.bias is not None else False
        rows = self.gathered(AGREEMENT, [_layers_agreed + 1, *as_numbers(values)])
        for name, column in zip(AGREED, rows[:, 1:].T, strict=True):
            unequal = np.flatnonzero(column != column[0])
            if unequal.size:
                first, other = in_words(name, column[0]), in_words(name, column[unequal[0]])
                raise ValueError(f"process_group: expected the same layer on all processes, got {name} {first} on "
                                 f"process 0 and {other} on process {unequal[0]}")  # fmt: skip
        self._number = int(rows[0, 0])
        _layers_agreed = max(_layers_agreed + 1, self._number)

    def gathered(self, purpose: int, numbers: Any) -> Rows:
        """Those of all processes, in rows. RuntimeError if another one raised, or is somewhere else."""
        code = float(purpose + PURPOSES * self._number)
        rows: Rows = np.asarray(self._send(np.concatenate([[code], numbers])))
        for process in np.flatnonzero(rows[:, 0] < 0.0):
            texts = np.asarray(self._send(np.zeros(TEXT_NUMBERS)))
            text = texts[process].tobytes().rstrip(b"\0").decode("utf-8", "replace")
            raise RuntimeError(f"process_group: process {process} raised in {_what_for(rows[process, 0])}: {text}")
        for process in np.flatnonzero(rows[:, 0] != code):
            raise RuntimeError(f"process_group: process {process} is in {_what_for(rows[process, 0])}, this one in "
                               f"{_what_for(code)}: all processes have to call the same layers in the same order"
                               )  # fmt: skip
        return rows[:, 1:]

    def whole(self, row: Rows) -> Whole:
        """The statistics of the batch, from the `row_of` this process's part. ValueError on all if there are none."""
        merged = _core.merge_moments_rows(np.ascontiguousarray(self.gathered(FORWARD, row)))
        count = int(merged[0])
        if count < 2:
            raise ValueError(f"Expected more than 1 value per channel when training, got {count} on all processes")
        mean, m2, _ = merged[1:].reshape(3, -1)
        return Whole(count, mean, m2 / count)

    @contextlib.contextmanager
    def refusing(self, purpose: int, width: int) -> Iterator[None]:
        """Says to the others what is raised inside, in the place of a row of so many numbers."""
        try:
            yield
        except Exception as error:
            text = f"{type(error).__name__}: {error}".encode()[: 8 * TEXT_NUMBERS].ljust(8 * TEXT_NUMBERS, b"\0")
            marked = np.zeros(1 + width)
            marked[0] = -(purpose + PURPOSES * self._number)
            with contextlib.suppress(Exception):  # the error itself says more
                self._send(marked)
                self._send(np.frombuffer(text))
            raise


def _what_for(code: float) -> str:
    number, purpose = divmod(int(abs(code)), PURPOSES)
    return f"{IN_WORDS.get(purpose, 'something else')} (layer {number})"


_layers_agreed = 0  # by this process: numbers that the first of a group proposes
_exchanges: WeakKeyDictionary[Any, Exchange] = WeakKeyDictionary()  # copies and pickles of a layer have none


def exchange_of(layer: Any, group: Any) -> Exchange:
    found = _exchanges.get(layer)
    if found is None or found.group is not group:
        found = _exchanges[layer] = Exchange(group)
    return found


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, whole: Whole,
    options: calls.Options, exchange: Exchange,
) -> Tensor:  # fmt: skip
    """y of a part of a batch, in autograd's graph where something needs a gradient."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, residual)):
        y: Tensor = BnfastSyncBatchNorm.apply(x, weight, bias, residual, whole, options, exchange)
        return y
    return _forward(x, weight, bias, residual, whole, options)[0]


def _forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, whole: Whole, options: calls.Options
) -> tuple[Tensor, Any, Any]:
    """(y, mean, inv_std), NaN in a channel whose statistics are not finite."""
    finite = np.isfinite(whole.mean) & np.isfinite(whole.var)
    statistics = np.where(finite, whole.mean, np.nan), np.where(finite, whole.var, 1.0)
    mean, var = map(torch.from_numpy, statistics)
    y, found, inv_std, _ = calls.forward(x, weight, bias, residual, (mean, var), options)
    return y, found, np.where(finite, inv_std, np.nan)


class BnfastSyncBatchNorm(torch.autograd.Function):
    """The node in autograd's graph, which all processes have."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, whole: Whole,
        options: calls.Options, exchange: Exchange,
    ) -> Tensor:  # fmt: skip
        y, mean, inv_std = _forward(x, weight, bias, residual, whole, options)
        met = calls.met_by_activation(bias, residual, options.activation)
        ctx.save_for_backward(x, weight, *met, torch.from_numpy(mean), torch.from_numpy(inv_std))
        ctx.count, ctx.options, ctx.exchange = whole.values, options, exchange
        ctx.dtypes = [None if t is None else t.dtype for t in (weight, bias)]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
        # only dx depends on the other processes; whether it is needed is the same on all of them
        dx, dgamma, dbeta, dresidual = _gradients(ctx, dy) if needs_x else _gradients_of_part(ctx, dy, needs_residual)
        return (
            dx,
            torch.from_numpy(dgamma).to(ctx.dtypes[0]) if needs_weight else None,
            torch.from_numpy(dbeta).to(ctx.dtypes[1]) if needs_bias else None,
            dresidual if needs_residual else None,
            None, None, None,
        )  # fmt: skip


def _saved(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    if calls.asks_for_more(dy):
        raise RuntimeError("a batch norm over several processes has no double backward, none of many dy at once, and "
                           "no tangent of its gradients")  # fmt: skip
    saved: tuple[Any, ...] = ctx.saved_tensors
    return saved


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, Any, Any, Tensor]:
    """(dx, dgamma, dbeta, dresidual); dgamma and dbeta are those of this process's part, as SyncBatchNorm's are."""
    channels = dy.shape[1]
    with ctx.exchange.refusing(BACKWARD, 2 * channels):
        x, weight, bias, residual, mean, inv_std = _saved(ctx, dy)
        given = calls.fused(bias, residual, ctx.options)
        arrays = calls.array_of(dy), calls.array_of(x), mean.numpy(), inv_std.numpy(), calls.parameter_of(weight)
        with calls.threads():
            part = ours.batch_norm_backward_sums(*arrays, **given)
    rows = ctx.exchange.gathered(BACKWARD, np.concatenate([part.dgamma, part.dbeta]))
    sums = ours.Sums(ctx.count, *rows.sum(axis=0).reshape(2, -1))  # row after row: in the order of the processes
    dx = empty_like(x)
    dresidual = dy if residual is None else empty_like(residual)  # dy: of one that was only added
    out_residual = None if residual is None else calls.array_of(dresidual)
    with calls.threads():
        ours.batch_norm_backward_apply(*arrays, sums, out=calls.array_of(dx), out_residual=out_residual, **given)
    return dx, np.array(part.dgamma), np.array(part.dbeta), dresidual


def _gradients_of_part(ctx: Any, dy: Tensor, needs_residual: bool) -> tuple[None, Any, Any, Tensor]:
    """The same without dx."""
    x, weight, bias, residual, mean, inv_std = _saved(ctx, dy)
    _, dgamma, dbeta, dresidual = calls.backward(
        dy, x, weight, bias, residual, mean, inv_std, False, ctx.options,
        needs_dx=needs_residual and residual is not None,
    )  # fmt: skip
    return None, dgamma, dbeta, dy if dresidual is None else dresidual
