"""float16 and bfloat16 to float32 and back: every value, on every instruction set, to the bit."""

import numpy as np
import pytest
from halves import DTYPES, FIRST_QUIET, every, half

from bnfast import _core

NAMES = pytest.mark.parametrize("name", DTYPES)


def bits(array):
    return array.view(f"u{array.dtype.itemsize}")


def exact(name):
    """The bits in float32 of every half, by NumPy and by hand; float16's NaN are quiet ones."""
    halves = every(name)
    if name == "bfloat16":
        return bits(halves).astype(np.uint32) << 16
    with np.errstate(invalid="ignore"):
        return bits(halves.astype(np.float32)) | (quiet(halves, name).astype(np.uint32) << 13)


def quiet(halves, name):
    """The bit that makes a NaN quiet, where there is one."""
    infinity = {"float16": 0x7C00, "bfloat16": 0x7F80}[name]
    return np.where((bits(halves) & 0x7FFF) > infinity, FIRST_QUIET[name], 0).astype(np.uint16)


def numbers_to_round(name):
    """float32 of both signs: every half, the ties between neighbours, what lies next to both, and what is beyond."""
    halves = exact(name)[:0x8000].view(np.float32)  # in their order
    halves = halves[np.isfinite(halves)]
    with np.errstate(over="ignore"):
        ties = (halves[:-1].astype(np.float64) / 2 + halves[1:].astype(np.float64) / 2).astype(np.float32)
    edge = {"float16": [65519.99, 65520.0, 65536.0, 1e5], "bfloat16": [3.3961775e38, 3.4e38]}[name]
    least = [1e-45, 1e-40, 2.9802322e-08, 2.9802326e-08, 1.1754944e-38, 3.4028235e38, np.inf]
    around = np.concatenate([halves, ties, np.array(edge + least, np.float32)])
    with np.errstate(all="ignore"):
        beside = [np.nextafter(around, np.float32(end)) for end in (0, np.inf)]
    there = np.concatenate([around, *beside])
    return np.concatenate([there, -there])


def nans():
    """float32 NaN of both signs, quiet and signalling, with every leading bit of what they carry."""
    carried = np.concatenate([np.arange(1, 1 << 13, dtype=np.uint32) << 10, np.array([1, 0xFFF, 0x7FFFFF], np.uint32)])
    return np.concatenate([carried | 0x7F800000, carried | 0xFF800000]).view(np.float32)


@NAMES
def test_every_value_is_widened_exactly(isa, name):
    widened = _core.widened(every(name))
    assert widened.dtype == np.float32
    np.testing.assert_array_equal(bits(widened), exact(name))


@NAMES
def test_every_value_comes_back(isa, name):
    halves = every(name)
    expected = bits(halves) | quiet(halves, name)
    np.testing.assert_array_equal(bits(_core.narrowed(exact(name).view(np.float32), halves)), expected)


@NAMES
def test_rounded_to_nearest_and_ties_to_even(isa, name):
    values = numbers_to_round(name)
    assert len(values) > 6 * 31000  # three for each finite half of one sign, and for each tie
    np.testing.assert_array_equal(bits(_core.narrowed(values, every(name))), bits(half(values, DTYPES[name])))


@NAMES
def test_nan_stay_nan_with_sign_and_what_they_carry(isa, name):
    values = nans()
    carried = bits(values) & 0x007FFFFF
    leading = {"float16": 0x7C00 | carried >> 13, "bfloat16": 0x7F80 | carried >> 16}[name]
    expected = (bits(values) >> 16 & 0x8000 | leading | FIRST_QUIET[name]).astype(np.uint16)
    np.testing.assert_array_equal(bits(_core.narrowed(values, every(name))), expected)


@NAMES
@pytest.mark.parametrize("begin", [0x0000, 0x03F0, 0x7BF0, 0x7F70, 0xFBF0])  # around what is special
def test_parts_of_vectors(isa, name, begin):
    """Whatever the length, and wherever the first of them lies."""
    for n in range(36):
        for first in range(3):
            halves = every(name)[begin + first : begin + first + n].copy()
            numbers = exact(name)[begin + first : begin + first + n].view(np.float32)
            np.testing.assert_array_equal(bits(_core.widened(halves)), bits(numbers))
            expected = bits(halves) | quiet(halves, name)
            np.testing.assert_array_equal(bits(_core.narrowed(numbers.copy(), halves)), expected)


@NAMES
def test_whatever_is_said_of_subnormals(isa, name, flushed):
    """FTZ and DAZ do not reach them; but they do reach NumPy."""
    assert flushed(np.multiply, np.float32(1e-40), np.float32(1)) == 0
    halves, widened, values = every(name), exact(name).view(np.float32), numbers_to_round(name)
    np.testing.assert_array_equal(bits(flushed(_core.widened, halves)), bits(widened))
    for numbers in (widened, values):
        found, expected = flushed(_core.narrowed, numbers, halves), _core.narrowed(numbers, halves)
        np.testing.assert_array_equal(bits(found), bits(expected))
