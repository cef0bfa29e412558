"""What users give to a scaler, as arrays; and what it is cut into."""

import datetime
import re
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .._checks import is_bfloat16

__all__ = [
    "Array", "Float64", "as_table", "as_weights", "chunks", "infinity_error", "is_dense", "is_native", "is_sparse",
    "row_slices",
]  # fmt: skip

Array = NDArray[Any]
Float64 = NDArray[np.float64]

# Elements that are converted, or searched for NaN, at a time: their float64 copies stay in cache.
CHUNK = 1 << 17

# What is no number, though it may be turned into one: a day, or a time, says nothing without its unit and its zero.
DATES = (datetime.date, datetime.time, datetime.timedelta, np.datetime64, np.timedelta64)
DATE_DTYPES = re.compile("date|time|duration|period", re.IGNORECASE)  # how pandas', polars' and pyarrow's names begin


def as_table(x: object) -> Array:
    """x as an array of numbers of 2 dimensions, not empty; its memory untouched where it is one."""
    if type(x) is not np.ndarray:
        if is_sparse(x):
            raise TypeError(f"X: expected dense data, got sparse {type(x).__name__}; use X.toarray()")
        if isinstance(x, np.ma.MaskedArray):
            raise TypeError("X: expected an array without a mask, got a masked array; use X.filled(numpy.nan)")
        if isinstance(x, np.matrix):
            raise TypeError("X: expected an array, got numpy.matrix; use numpy.asarray(X)")
        for name, dtype in columns_of(x):
            if DATE_DTYPES.match(dtype):
                raise dates_error(f"column {name!r}", f"dtype {dtype}")
    data = np.asarray(x)
    if data.dtype.kind == "c":
        raise ValueError(f"Complex data not supported\n{data}\n")
    if data.ndim != 2:
        raise ValueError(dimensions_message(x, data))
    for n, what in zip(data.shape, ("sample", "feature"), strict=True):
        if n == 0:
            raise ValueError(
                f"Found array with 0 {what}(s) (shape={data.shape}) while a minimum of 1 is required by StandardScaler."
            )
    if data.dtype.kind in "mM":
        raise dates_error("X", f"dtype {data.dtype}")
    return data if data.dtype.kind in "fiub" or is_bfloat16(data.dtype) else as_numbers(x, data)


def is_sparse(x: object) -> bool:
    """Whether x is one of SciPy's sparse arrays or matrices."""
    return type(x) is not np.ndarray and hasattr(x, "nnz") and hasattr(x, "toarray")


def columns_of(x: Any) -> list[tuple[Any, str]]:
    """Name and dtype of each column of a data frame (pandas, polars) or table (pyarrow); nothing for what is none."""
    if hasattr(x, "iloc"):
        return [(name, str(dtype)) for name, dtype in x.dtypes.items()] if hasattr(x, "columns") else []
    schema: Any = getattr(x, "schema", None)
    if hasattr(schema, "types"):
        return [(name, str(dtype)) for name, dtype in zip(schema.names, schema.types, strict=True)]
    return [(name, str(dtype)) for name, dtype in schema.items()] if hasattr(schema, "items") else []


def as_numbers(x: object, data: Array) -> Array:
    """Objects and strings as float64; an error names the column that has none."""
    frame: Any = x
    columns = columns_of(x)

    def named(column: int) -> str:
        return f"column {columns[column][0]!r}" if columns else f"column {column}"

    if data.dtype.kind == "O":
        for column in range(data.shape[1]):
            for kind in set(map(type, data[:, column])):
                if issubclass(kind, DATES):
                    raise dates_error(named(column), kind.__name__)
    try:
        # a frame of pandas may say "missing" in its own way
        return frame.to_numpy(np.float64, na_value=np.nan) if hasattr(x, "iloc") else data.astype(np.float64)
    except (TypeError, ValueError):
        for column in range(data.shape[1]):
            part: Any = frame.iloc[:, column] if hasattr(x, "iloc") else data[:, column]
            try:
                part.to_numpy(np.float64, na_value=np.nan) if hasattr(x, "iloc") else part.astype(np.float64)
            except (TypeError, ValueError) as error:
                raise type(error)(f"X: {named(column)}: {error}") from error
        raise


def dates_error(where: str, what: str) -> TypeError:
    return TypeError(
        f"X: expected numbers, got {what} in {where}; make numbers of it first, (X - start) / numpy.timedelta64(1, 's')"
    )


def dimensions_message(x: object, data: Array) -> str:
    """scikit-learn's words."""
    if data.ndim > 2:
        return f"Found array with dim {data.ndim}, while dim <= 2 is required by StandardScaler."
    if data.ndim == 1 and hasattr(x, "iloc"):
        return (
            f"Expected a 2-dimensional container but got {type(x)} instead. Pass a DataFrame containing a single row "
            "(i.e. single sample) or a single column (i.e. single feature) instead."
        )
    return (
        f"Expected 2D array, got {'scalar' if data.ndim == 0 else '1D'} array instead:\narray={data}.\n"
        "Reshape your data either using array.reshape(-1, 1) if your data has a single feature or "
        "array.reshape(1, -1) if it contains a single sample."
    )


def as_weights(sample_weight: ArrayLike, n_samples: int) -> Float64:
    """(n_samples,) float64, finite, at least 0, not all zero."""
    weights = np.asarray(sample_weight)
    if weights.dtype.kind == "c":
        raise ValueError(f"Complex data not supported\n{weights}\n")
    weights = weights.astype(np.float64)
    if weights.ndim == 0:
        weights = np.full(n_samples, weights[()])
    if weights.ndim != 1:
        raise ValueError(
            f"Sample weights must be 1D array or scalar, got {weights.ndim}D array. Expected either a scalar value or "
            f"a 1D array of length {n_samples}."
        )
    if weights.shape != (n_samples,):
        raise ValueError(f"sample_weight.shape == {weights.shape}, expected {(n_samples,)}!")
    if not np.isfinite(weights).all():
        what = "NaN" if np.isnan(weights).any() else infinity_of(weights.dtype)
        raise ValueError(f"Input sample_weight contains {what}.")
    if (weights < 0).any():
        raise ValueError(f"sample_weight: expected values of at least 0, got {weights.min()}")
    if not weights.any():
        raise ValueError("Sample weights must contain at least one non-zero number.")
    with np.errstate(over="ignore"):
        total = weights.sum()
    if not np.isfinite(total):
        raise ValueError("sample_weight: expected a sum that float64 holds, got infinity")
    return weights


def infinity_of(dtype: np.dtype[Any]) -> str:
    return f"infinity or a value too large for {dtype!r}"


def infinity_error(dtype: np.dtype[Any]) -> ValueError:
    return ValueError(f"Input X contains {infinity_of(dtype)}.")


def is_native(data: Array) -> bool:
    """Whether the kernels take it as it is."""
    return data.dtype in (np.float32, np.float64)


def is_dense(data: Array) -> bool:
    """Whether the kernels take it without a copy."""
    return data.flags.forc and data.flags.aligned


def row_slices(data: Array, n_rows: int) -> list[slice]:
    n = data.shape[0]
    return [slice(row, min(row + n_rows, n)) for row in range(0, n, n_rows)]


def chunks(data: Array, n_elements: int | None = None) -> list[slice]:
    """Slices of rows that are small enough to be converted, of `n_elements` or CHUNK elements."""
    return row_slices(data, max(1, (CHUNK if n_elements is None else n_elements) // data.shape[1]))
