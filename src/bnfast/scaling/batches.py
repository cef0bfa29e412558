"""A table in batches of rows, and the report of how far they are."""

import sys
import time
from collections.abc import Iterator

from .._checks import integer
from .data import Array, row_slices

__all__ = ["batches_of", "checked_batch_size"]

# Bytes of a batch where progress is wanted and no batch size given.
BATCH_BYTES = 1 << 25


def checked_batch_size(batch_size: int | None) -> int | None:
    if batch_size is None:
        return None
    batch_size = integer(batch_size, "batch_size")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    return batch_size


def batches_of(data: Array, batch_size: int | None, progress: bool) -> Iterator[slice]:
    """Slices of rows, one of all if neither is asked for; where `progress`, each is reported when it is done."""
    if batch_size is None:
        batch_size = max(1, BATCH_BYTES // (data.itemsize * data.shape[1])) if progress else data.shape[0]
    batches = row_slices(data, batch_size)
    return reported(batches, data.shape[0]) if progress else iter(batches)


def reported(batches: list[slice], n_rows: int) -> Iterator[slice]:
    """The batches, with a line on the standard error stream that says how far they are."""
    begin = time.monotonic()
    for rows in batches:
        yield rows
        seconds = time.monotonic() - begin
        left = seconds * (n_rows - rows.stop) / rows.stop
        line = f"StandardScaler: {rows.stop:,} of {n_rows:,} rows ({100 * rows.stop // n_rows} %), {left:.0f} s left"
        print(f"\r{line:<78}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
