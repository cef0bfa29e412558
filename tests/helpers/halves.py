"""float16 and bfloat16 data, and what is expected of them: the results of the same numbers in float32, rounded once."""

import numpy as np
import pytest

ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed: there is no bfloat16")

DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
FIRST_QUIET = {"float16": 0x0200, "bfloat16": 0x0040}  # the bit that makes a NaN quiet
BITS = {"float16": 10, "bfloat16": 7}  # of the significand, behind the point
SMALLEST = {"float16": -24, "bfloat16": -133}  # exponent of the smallest subnormal


def every(name):
    """All 65,536 values."""
    return np.arange(65536, dtype=np.uint16).view(DTYPES[name])


def single(array):
    """The same numbers in float32, in the same order of axes; None stays None."""
    return None if array is None else np.asarray(array).astype(np.float32, order="K")


def half(array, dtype):
    """float32 rounded to halves, by NumPy and ml_dtypes."""
    with np.errstate(all="ignore"):
        return array.astype(dtype, order="K")


def ulp(values, name):
    """The distance of neighbouring halves at some numbers, in longdouble."""
    exponent = np.frexp(np.asarray(values, np.longdouble))[1] - 1
    return np.ldexp(np.longdouble(1), np.maximum(exponent - BITS[name], SMALLEST[name]))
