"""Checks of arguments that several modules share. Each names the argument, what came and what was expected."""

import math
import operator
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

__all__ = [
    "as_real",
    "channel_array",
    "count_of_values",
    "flag",
    "floating_dtype",
    "integer",
    "is_bfloat16",
    "is_half",
    "number",
    "one_of",
    "whole_number",
]


def flag(value: bool, name: str) -> bool:
    """The value, Python's or NumPy's, as a bool; TypeError for anything else."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name}: expected a bool, got {value!r:.80}")
    return bool(value)


def integer(value: SupportsIndex, name: str) -> int:
    """The value as an int; TypeError for anything else and for a bool."""
    if isinstance(value, bool):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}") from None


def number(value: float, name: str) -> float:
    """The value as a float; TypeError for a bool, a string and what is no number."""
    try:
        if isinstance(value, (bool, np.bool_, str, bytes)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {value!r}") from None
    except OverflowError:  # an int beyond float64
        return math.inf


def count_of_values(value: Any, name: str, whole: bool = False) -> int | float:
    """An int of at least 0; unless `whole`, also a float, as a sum of weights is."""
    if isinstance(value, float | np.floating) and not whole:
        count: int | float = float(value)
        if not math.isfinite(count):
            raise ValueError(f"{name}: expected a finite number, got {value!r}")
    else:
        count = integer(value, name)
    if count < 0:
        raise ValueError(f"{name}: expected at least 0, got {count}")
    return count


def one_of(value: Any, name: str, choices: tuple[Any, ...]) -> Any:
    """The value, if it is one of the choices: else ValueError, or TypeError if it is no string."""
    if isinstance(value, np.bool_):
        value = bool(value)
    if isinstance(value, str | bool) or value is None:
        for choice in choices:
            if type(choice) is type(value) and choice == value:
                return choice
    expected = f"{', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}"
    error = ValueError if isinstance(value, str) else TypeError
    raise error(f"{name}: expected {expected}, got {value!r:.80}")


def floating_dtype(value: DTypeLike) -> np.dtype[Any]:
    """The dtype of parameters: float32 or float64."""
    try:
        dtype = None if value is None else np.dtype(value)
    except TypeError:
        raise TypeError(f"dtype: expected float32 or float64, got {value!r}") from None
    if dtype is None or dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
        why = "; data may be halves, the parameters are not" if dtype is not None and is_half(dtype) else ""
        raise TypeError(f"dtype: expected float32 or float64, got {dtype}{why}")
    return dtype


def is_bfloat16(dtype: np.dtype[Any]) -> bool:
    """Whether it is that of ml_dtypes, which need not be installed."""
    return dtype.kind == "V" and dtype.name == "bfloat16"


def is_half(dtype: np.dtype[Any]) -> bool:
    """float16, in whatever byte order, or bfloat16: data that are computed with in float32."""
    return (dtype.kind == "f" and dtype.itemsize == 2) or is_bfloat16(dtype)


def as_real(array: NDArray[Any]) -> NDArray[Any]:
    """The array; bfloat16, which NumPy takes for no number, as float32, exactly."""
    return array.astype(np.float32) if is_bfloat16(array.dtype) else array


def channel_array(
    value: ArrayLike,
    name: str,
    channels: int,
    dtype: np.dtype[Any],
    type_error: type[Exception] = TypeError,
    value_error: type[Exception] = ValueError,
) -> NDArray[Any]:
    """A new (channels,) array of `dtype` from real numbers that it can hold."""
    array = as_real(as_array(value, name, "an array", type_error))
    if array.dtype.kind not in "fiu":
        raise type_error(f"{name}: expected real numbers, got dtype {array.dtype}")
    if array.shape != (channels,):
        raise value_error(f"{name}: expected shape ({channels},), got {array.shape}")
    with np.errstate(all="ignore"):
        converted = np.array(array, dtype=dtype, order="C")
    if lost := np.flatnonzero(np.isfinite(array) & np.isinf(converted)).tolist():
        raise value_error(f"{name}: expected values that {dtype} can hold, got {array[lost[0]]} in channel {lost[0]}")
    return converted


def whole_number(value: ArrayLike, name: str, error: type[Exception]) -> int:
    """One integer of at least 0 that int64 holds."""
    array = as_array(value, name, "one integer", error)
    if array.dtype.kind not in "iu" or array.size != 1 or not 0 <= array.item() <= np.iinfo(np.int64).max:
        raise error(f"{name}: expected one integer of at least 0 and below 2**63, got {value!r:.80}")
    return int(array.item())


def as_array(value: Any, name: str, expected: str, error: type[Exception]) -> NDArray[Any]:
    """`numpy.asarray`; of PyTorch's tensors without their graph, bfloat16 as float32, as NumPy has none."""
    if isinstance(value, np.ma.MaskedArray):
        raise error(f"{name}: expected an array without a mask, got {type(value).__name__}")
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu()
            value = value.float() if str(value.dtype) == "torch.bfloat16" else value
        return np.asarray(value)
    except MemoryError:
        raise
    except Exception as cause:  # whatever an object's __array__ raises
        raise error(f"{name}: expected {expected}, got {type(value).__name__} ({cause})") from cause
