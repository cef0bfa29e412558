"""What users give to a scaler, as arrays; and what it is cut into."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["Array", "Float64", "as_table", "as_weights", "chunks", "infinity_error", "is_native", "row_slices"]

Array = NDArray[Any]
Float64 = NDArray[np.float64]

# Elements that are converted, or searched for NaN, at a time: their float64 copies stay in cache.
CHUNK = 1 << 17


def as_table(x: object) -> Array:
    """x as an array of numbers of 2 dimensions, not empty; its memory untouched where it is one."""
    if type(x) is not np.ndarray:
        if hasattr(x, "nnz") and hasattr(x, "toarray"):
            raise TypeError(
                f"X: expected dense data, got sparse {type(x).__name__}; use X.toarray(), or "
                "sklearn.preprocessing.StandardScaler(with_mean=False), which scales sparse data"
            )
        if isinstance(x, np.ma.MaskedArray):
            raise TypeError("X: expected an array without a mask, got a masked array; use X.filled(numpy.nan)")
        if isinstance(x, np.matrix):
            raise TypeError("X: expected an array, got numpy.matrix; use numpy.asarray(X)")
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
        raise TypeError(f"X: expected numbers, got dtype {data.dtype}")
    if data.dtype.kind not in "fiub":
        # a frame of pandas may say "missing" in its own way
        frame: Any = x
        data = frame.to_numpy(np.float64, na_value=np.nan) if hasattr(x, "iloc") else np.asarray(data, np.float64)
    return data


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
    """(n_samples,) float64, finite, not all zero."""
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
    if not weights.any():
        raise ValueError("Sample weights must contain at least one non-zero number.")
    return weights


def infinity_of(dtype: np.dtype[Any]) -> str:
    return f"infinity or a value too large for {dtype!r}"


def infinity_error(dtype: np.dtype[Any]) -> ValueError:
    return ValueError(f"Input X contains {infinity_of(dtype)}.")


def is_native(data: Array) -> bool:
    """Whether the kernels take it as it is."""
    return data.dtype in (np.float32, np.float64)


def row_slices(data: Array, n_rows: int) -> list[slice]:
    return [slice(row, min(row + n_rows, len(data))) for row in range(0, len(data), n_rows)]


def chunks(data: Array) -> list[slice]:
    """Slices of rows that are small enough to be converted."""
    return row_slices(data, max(1, CHUNK // data.shape[1]))
