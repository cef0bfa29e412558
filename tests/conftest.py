"""Fixtures for all tests: every instruction set of this CPU, both dtypes, the memory layouts, data."""

import ctypes
import platform
import sys
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import settings
from layouts import LAYOUTS
from scripts import c_library

from bnfast import _core

# The same examples in every run, and nothing left on disk.
settings.register_profile("bnfast", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("bnfast")


@pytest.fixture(params=list(_core.isas()))
def isa(request):
    """Name of an instruction set, which is active while the test runs."""
    compiled, supported = _core.isas()[request.param]
    if not compiled:
        pytest.skip(f"{request.param} is not compiled in")
    if not supported:
        pytest.skip(f"this CPU has no {request.param}")
    before = _core.isa()
    _core.select_isa(request.param)
    yield request.param
    _core.select_isa(before)


@pytest.fixture
def force_plan():
    """_core.force_plan, whose choices end with the test."""
    yield _core.force_plan
    _core.force_plan()


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


MXCSR = """
#include <xmmintrin.h>
unsigned get(void) { return _mm_getcsr() & ~0x3fu; }
void set(unsigned control) { _mm_setcsr(control); }
"""


@pytest.fixture
def flushed(tmp_path):
    """Calls a function while results are flushed to zero and denormals are zero, on this thread."""
    if platform.machine() not in ("x86_64", "AMD64") or not sys.platform.startswith("linux"):
        pytest.skip("sets MXCSR through a C library made for Linux on x86-64")
    library = ctypes.CDLL(c_library(tmp_path, MXCSR, "-O1"))
    library.get.restype, library.set.argtypes = ctypes.c_uint, [ctypes.c_uint]
    default = library.get()

    def call(function, *arguments, **named):
        library.set(default | 0x8040)
        try:
            return function(*arguments, **named)
        finally:
            library.set(default)

    return call


@pytest.fixture
def rng():
    return np.random.default_rng(20150211)


@pytest.fixture(params=LAYOUTS.values(), ids=LAYOUTS)
def layout(request):
    return request.param


class Data(NamedTuple):
    """Arguments for all functions: x, dy and v are (N, C, ...), the rest (C,)."""

    x: np.ndarray
    dy: np.ndarray
    v: np.ndarray
    gamma: np.ndarray
    beta: np.ndarray
    vgamma: np.ndarray
    vbeta: np.ndarray

    def placed(self, layout):
        """The same with x, dy and v in a layout."""
        return self._replace(**{name: layout.place(getattr(self, name)) for name in ("x", "dy", "v")})


@pytest.fixture(scope="session")
def make_data():
    """(shape, dtype) -> Data with channels of different means (a few std) and scales; the same for the same shape."""

    def make(shape, dtype):
        rng = np.random.default_rng(shape)
        channels = (shape[1], *[1] * (len(shape) - 2))
        x = rng.normal(2 * rng.normal(size=channels), np.exp2(rng.uniform(-2, 2, channels)), shape)
        parameters = rng.normal(size=(4, shape[1]))
        parameters[0] += np.copysign(0.1, parameters[0])  # gamma: not 0
        arrays = x, rng.normal(size=shape), rng.normal(0.5, 1, shape), *parameters
        return Data(*(array.astype(dtype) for array in arrays))

    return make
