"""1 / sqrt(variance + eps), both steps rounded to nearest, on every instruction set.

Where Newton's steps stand for a root and a division, they come nearest to a wrong bit for the arguments made here.
"""

import numpy as np
import pytest

from bnfast import functional as F

MANTISSA = 52


def inverse_roots(variance):
    """What the kernels make of variances: x - 0 = 1, times that."""
    n = len(variance)
    return F.batch_norm_eval(np.ones((1, n)), np.zeros(n), variance, eps=0.0)[0]


def odd_roots(c, bits):
    """Every odd k below 2**bits with k*k = c modulo 2**bits; one bit more at a time (Hensel)."""
    found = {k for k in (1, 3, 5, 7) if (k * k - c) % 8 == 0}
    for b in range(4, bits + 1):
        candidates = {k + step for k in found for step in (0, 1 << (b - 1), 1 << (b - 2))}
        found = {k % (1 << b) for k in candidates if (k * k - c) % (1 << b) == 0}
    return found


def roots_near_the_middle(furthest):
    """Each v in [1, 4) whose root is next to the middle m between two numbers: v - m*m is at most `furthest` * 2**-106.

    With m = k * 2**-53 and v = n * 2**-52 or n * 2**-51 that asks for a k whose square is little more or less than a
    multiple of 2**54 or 2**55.
    """
    found = []
    for scale, bits in ((2.0**-MANTISSA, 54), (2.0 ** (1 - MANTISSA), 55)):
        for c in range(-furthest, furthest + 1):
            for root in odd_roots(c, bits) if c % 8 == 1 else ():
                n = (root * root - c) >> bits
                if 1 << MANTISSA <= n < 2 << MANTISSA and 1 << 53 <= root < 1 << 54:
                    found.append(n * scale)
    return np.array(found)


ULP = 2.0**-MANTISSA
# The first two have a root whose bits are all ones, whose inverse is in the middle of two numbers but for 2**-107.
BESIDE_POWERS = [4 - 4 * ULP, 4 - 2 * ULP, 4 - 6 * ULP, 2 - ULP, 1 + ULP, 2 + 2 * ULP, 1.0, 2.0, 3.0]


@pytest.fixture(scope="module")
def hard():
    found = roots_near_the_middle(1023)
    assert len(found) > 300
    assert {1 + ULP, 4 - 2 * ULP} <= set(found)
    return np.concatenate([BESIDE_POWERS, found])  # what does not fill a vector at the end is done one by one


@pytest.mark.parametrize("power", [-511, -260, -250, -249, -33, 0, 1, 100, 249, 250, 251, 511])
def test_next_to_the_middle_of_two_numbers(isa, hard, power):
    v = np.ldexp(hard, 2 * power)
    np.testing.assert_array_equal(inverse_roots(v), 1 / np.sqrt(v))


def test_of_any_size(isa, rng):
    exponents = rng.uniform(-1, 1, 200_000)
    for v in (rng.uniform(1, 4, 200_000), np.exp2(500 * exponents), np.exp2(1020 * exponents)):
        np.testing.assert_array_equal(inverse_roots(v), 1 / np.sqrt(v))


def test_at_the_ends_of_the_range(isa):
    """Each alone among ordinary ones, in every place of a vector."""
    ends = [5e-324, 1e-310, np.finfo(float).tiny, 2.0**-501, 2.0**-500, 2.0**500, 2.0**501, np.finfo(float).max]
    for place in range(8):
        for end in ends:
            v = np.full(24, 1.3)
            v[8 + place] = end
            np.testing.assert_array_equal(inverse_roots(v), 1 / np.sqrt(v))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_of_a_batch(isa, dtype, rng):
    """What a forward hands out is made of its variance and eps in the same two steps."""
    x = rng.normal(size=(64, 100)).astype(dtype) * np.exp(rng.normal(size=100)).astype(dtype)
    _, _, inv_std, var = F.batch_norm(x, eps=1e-3, return_var=True)
    np.testing.assert_array_equal(inv_std, 1 / np.sqrt(var + 1e-3))
