"""Hard data, by name. What "right" means stands in tolerances.py, unless it is exact."""

import itertools
import json
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from places import FIXTURES
from tolerances import (
    TABLE,
    assert_same_bits,
    assert_within,
    check_batch_norm,
    check_batch_norm_backward,
    check_batch_norm_eval,
    check_batch_norm_jvp,
    check_moments,
    variance_bound,
    wide,
)

import bnfast
from bnfast import functional as F
from bnfast import reference

# One for every way through the kernels.
PATHS = {
    "planar_short_rows": (40, 3, 60),
    "planar_long_rows": (2, 3, 5000),
    "interleaved": (600, 70),
    "interleaved_folded": (3001, 3),
    "columns": (300, 12, 7),
    "columns_folded": (1501, 2, 3),
}
every_path = pytest.mark.parametrize("shape", PATHS.values(), ids=PATHS)


def normal(rng, shape, dtype, mean=0.0, std=1.0):
    return (mean + std * rng.normal(size=shape)).astype(dtype)


def parameters(rng, shape):
    return rng.normal(size=(2, shape[1]))


def check_forward(rng, x, eps=1e-5):
    """Moments, training and eval, with the batch's own statistics."""
    gamma, beta = parameters(rng, x.shape)
    m = bnfast.moments(x)
    check_moments(m, x)
    check_batch_norm(F.batch_norm(x, gamma, beta, eps=eps), x, gamma, beta, eps=eps)
    y = F.batch_norm_eval(x, m.mean, m.var(), gamma, beta, eps=eps)
    check_batch_norm_eval(y, x, m.mean, m.var(), gamma, beta, eps=eps)


def check_backward(rng, x, eps=1e-5):
    """Backward and jvp from bnfast's statistics, against what the true statistics give."""
    gamma, vgamma = parameters(rng, x.shape)
    dy = normal(rng, x.shape, x.dtype)
    _, mean, inv_std = F.batch_norm(x, eps=eps)
    _, true_mean, true_inv_std = reference.batch_norm(wide(x), eps=eps)
    for training in (True, False):
        gradients = F.batch_norm_backward(dy, x, mean, inv_std, gamma, training=training)
        check_batch_norm_backward(gradients, dy, x, true_mean, true_inv_std, gamma, training=training)
    # directions of gamma as large as x's own derivative, or it would hide behind them
    vgamma = vgamma * gamma * inv_std
    derivative = F.batch_norm_jvp(dy, x, mean, inv_std, gamma, vgamma=vgamma)
    check_batch_norm_jvp(derivative, dy, x, true_mean, true_inv_std, gamma, vgamma=vgamma)


def check(rng, x, eps=1e-5):
    check_forward(rng, x, eps)
    check_backward(rng, x, eps)


# --- where digits are lost -------------------------------------------------------------------------------------


@every_path
@pytest.mark.parametrize("offset", [0, 1e2, -1e4, 1e6], ids=lambda offset: f"{offset:g}std")
def test_mean_far_from_zero(isa, dtype, rng, shape, offset):
    check(rng, normal(rng, shape, dtype, offset))


@every_path
def test_channels_of_very_different_scale(isa, dtype, rng, shape):
    scale = np.geomspace(1e-8, 1e8, shape[1]).reshape(-1, *[1] * (len(shape) - 2))
    check(rng, normal(rng, shape, dtype, 5 * scale, scale))


@every_path
@pytest.mark.parametrize("value", [0.0, 0.1, 3.0, -7.7, 1e30, -1e30, 1e-30, 1e-42])
def test_constant_channel(isa, dtype, rng, shape, value):
    """Variance exactly 0, y exactly beta, gradients finite."""
    x = np.full(shape, value, dtype)
    gamma, beta = parameters(rng, shape).astype(dtype)
    m = bnfast.moments(x)
    assert_same_bits(m.mean, np.full(shape[1], dtype(value), np.float64), "mean")
    assert_same_bits(m.m2, np.zeros(shape[1]), "m2")
    y, mean, inv_std = F.batch_norm(x, gamma, beta)
    assert_same_bits(mean, m.mean, "mean")
    assert_same_bits(inv_std, np.full(shape[1], 1 / math.sqrt(1e-5)), "inv_std")
    expected = np.broadcast_to(beta.reshape(-1, *[1] * (len(shape) - 2)), shape)
    assert_same_bits(y, expected, "y")
    assert_same_bits(F.batch_norm_eval(x, mean, m.var(), gamma, beta), expected, "y of eval")
    dy = normal(rng, shape, dtype)
    gradients = F.batch_norm_backward(dy, x, mean, inv_std, gamma)
    check_batch_norm_backward(gradients, dy, x, mean, inv_std, gamma)
    assert not gradients[1].any(), "dgamma"


@every_path
def test_constant_channels_among_others(isa, dtype, rng, shape):
    x = normal(rng, shape, dtype, 3)
    constant = [0, shape[1] - 1]
    x[:, constant] = dtype(0.1)
    m = bnfast.moments(x)
    assert not m.m2[constant].any()
    check_forward(rng, x)


@every_path
@pytest.mark.parametrize("size", [1e2, -1e4, 1e6], ids=lambda size: f"{size:g}std")
def test_first_element_is_an_outlier(isa, dtype, rng, shape, size):
    x = normal(rng, shape, dtype, 1)
    x[0].reshape(shape[1], -1)[:, 0] = size
    check(rng, x)


@every_path
@pytest.mark.parametrize("size", [1e2, -1e4, 1e6], ids=lambda size: f"{size:g}std")
def test_first_and_last_element_are_outliers(isa, dtype, rng, shape, size):
    x = normal(rng, shape, dtype, 1)
    x[0].reshape(shape[1], -1)[:, 0] = x[-1].reshape(shape[1], -1)[:, -1] = size
    check_forward(rng, x)


@every_path
@pytest.mark.parametrize("size", [1e2, 1e6], ids=lambda size: f"{size:g}std")
def test_outlier_anywhere(isa, dtype, rng, shape, size):
    for row in (1, shape[0] // 2, shape[0] - 1):
        x = normal(rng, shape, dtype, 1)
        flat = x[row].reshape(shape[1], -1)
        flat[:, rng.integers(flat.shape[1])] = size
        check_forward(rng, x)


@every_path
@pytest.mark.parametrize("part", [0.02, 0.3], ids=["short", "long"])
@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (1e4, 1.0), (0.0, 1e-6)], ids=["zeros", "far", "narrow"])
def test_first_block_unlike_the_rest(isa, dtype, rng, shape, part, mean, std):
    """As the border of an image, or the padding before a table."""
    x = normal(rng, shape, dtype, 100)
    for channel in range(shape[1]):
        values = x[:, channel].copy().reshape(-1)
        n = int(part * values.size)
        values[:n] = normal(rng, n, dtype, mean, std)
        x[:, channel] = values.reshape(x[:, channel].shape)
    check(rng, x)


# --- where the range ends --------------------------------------------------------------------------------------


@every_path
@pytest.mark.parametrize("mean", [0, 100], ids=["centred", "100std"])
def test_huge_values(isa, rng, shape, mean):
    """Their squares overflow float32."""
    check_forward(rng, normal(rng, shape, np.float32, 1e30 * mean, 1e30))


@every_path
def test_huge_values_have_right_gradients(isa, rng, shape):
    """inv_std**2 underflows float32; dx, of the size of inv_std, does not."""
    check_backward(rng, normal(rng, shape, np.float32, 0, 1e30))


@every_path
@pytest.mark.parametrize("mean", [0, 100], ids=["centred", "100std"])
@pytest.mark.parametrize("std", [1e-18, 1e-20, 1e-22, 1e-25])
def test_tiny_values(isa, rng, shape, std, mean):
    """Their squares lose digits in float32 (subnormal, 1e-20), or are nothing at all (1e-25)."""
    check_forward(rng, normal(rng, shape, np.float32, std * mean, std), eps=1e-60)


@every_path
def test_tiny_values_have_right_gradients(isa, rng, shape):
    """inv_std**2 overflows float32; dx, of the size of inv_std, does not."""
    check_backward(rng, normal(rng, shape, np.float32, 0, 1e-25), eps=1e-60)


@every_path
def test_huge_dy(isa, rng, shape):
    """dy * (x - mean), summed in float32, overflows; the gradients do not."""
    x = normal(rng, shape, np.float32, 0, 1e15)
    _, mean, inv_std = F.batch_norm(x)
    dy = normal(rng, shape, np.float32, 0, 1e28)
    check_batch_norm_backward(F.batch_norm_backward(dy, x, mean, inv_std), dy, x, mean, inv_std)


# --- NaN and Inf -----------------------------------------------------------------------------------------------


def results_by_channel(x, dy, dtype):
    """name -> array with the channel first, of everything a channel's data decide."""
    gamma = np.linspace(0.5, 2, x.shape[1])
    mean, inv_std = (np.linspace(1, 2, x.shape[1]) for _ in range(2))
    y, batch_mean, batch_inv_std = F.batch_norm(x, gamma, -gamma)
    arrays = {"y": y, "mean": batch_mean, "inv_std": batch_inv_std, "m2": bnfast.moments(x).m2}
    arrays["eval"] = F.batch_norm_eval(x, mean, inv_std, gamma)
    for name, training in (("training", True), ("eval", False)):
        dx, dgamma, dbeta = F.batch_norm_backward(dy, x, mean, inv_std, gamma, training=training)
        arrays |= {f"dx {name}": dx, f"dgamma {name}": dgamma, f"dbeta {name}": dbeta}
    arrays["jvp"] = F.batch_norm_jvp(dy, x, mean, inv_std, gamma)
    return {name: a if a.ndim == 1 else np.moveaxis(a, 1, 0) for name, a in arrays.items()}


@every_path
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_stay_in_their_channel(isa, dtype, rng, shape, poison):
    clean_x, clean_dy = normal(rng, shape, dtype, 2), normal(rng, shape, dtype)
    clean = results_by_channel(clean_x, clean_dy, dtype)
    one_each = [[c] for c in range(shape[1])][:: -(-shape[1] // 12)]
    for poisoned in [*one_each, list(range(1, shape[1]))]:
        x, dy = clean_x.copy(), clean_dy.copy()
        row = rng.integers(shape[0])
        for array in (x, dy):
            array[row, poisoned, ...] = poison
        others = np.setdiff1d(range(shape[1]), poisoned)
        for name, result in results_by_channel(x, dy, dtype).items():
            assert_same_bits(result[others], clean[name][others], f"{name}, channels {poisoned} poisoned")
            if name in ("mean", "inv_std", "m2"):
                assert not np.isfinite(result[poisoned]).any() or name == "inv_std", name
            if name in ("y", "dx training", "jvp"):
                assert np.isnan(result[poisoned]).all(), name


@every_path
def test_nan_in_the_first_row_or_all_over(isa, dtype, rng, shape):
    """Where the kernels look for a pivot."""
    x = normal(rng, shape, dtype, 2)
    clean = bnfast.moments(x)
    for rows in (slice(1), slice(None)):
        dirty = x.copy()
        dirty[rows, -1] = np.nan
        m = bnfast.moments(dirty)
        assert np.isnan(m.mean[-1])
        assert np.isnan(m.m2[-1])
        assert_same_bits(m.mean[:-1], clean.mean[:-1])
        assert_same_bits(m.m2[:-1], clean.m2[:-1])


def test_nan_in_gamma_stays_in_its_channel(isa, dtype, rng):
    for shape in PATHS.values():
        x, gamma = normal(rng, shape, dtype), np.ones(shape[1])
        clean = F.batch_norm(x, gamma)[0]
        gamma[1] = np.nan
        y = F.batch_norm(x, gamma)[0]
        assert np.isnan(y[:, 1]).all()
        others = np.arange(shape[1]) != 1
        assert_same_bits(y[:, others], clean[:, others])


# --- exact data ------------------------------------------------------------------------------------------------


EXACT = {
    "planar_short_rows": (32, 3, 64),
    "planar_long_rows": (2, 3, 8192),
    "interleaved": (512, 70),
    "interleaved_folded": (4096, 3),
    "columns": (256, 12, 8),
    "columns_folded": (2048, 2, 4),
}


@pytest.mark.parametrize("shape", EXACT.values(), ids=EXACT)
def test_exact_data_give_exact_moments(isa, dtype, rng, shape):
    """2^k small integers a channel: every sum is exact in any order, so there is no room for an ulp."""
    x = rng.integers(-8, 8, shape)
    axes = (0, *range(2, len(shape)))
    count = x.size // shape[1]
    total, square = x.sum(axes), (x**2).sum(axes)
    m = bnfast.moments(x.astype(dtype))
    assert_same_bits(m.mean, total / count, "mean")
    assert_same_bits(m.m2, square - total**2 / count, "m2")
    _, mean, inv_std = F.batch_norm(x.astype(dtype))
    assert_same_bits(mean, m.mean, "mean")
    assert_same_bits(inv_std, 1 / np.sqrt(m.m2 / count + 1e-5), "inv_std")


@pytest.mark.parametrize("shape", [(6, 3, 30), (200, 70), (130, 4, 5), (2 * 128 * 3, 3)])
def test_pairs_around_an_integer_give_exact_moments(isa, dtype, rng, shape):
    """benchdnn's way: x[i] + x[i + 1] = 2 * mean, for counts that are no powers of two."""
    d = rng.integers(0, 6, (shape[0] // 2, *shape[1:]))
    x = np.stack([7 + d, 7 - d], 1).reshape(shape).astype(dtype)
    m = bnfast.moments(x)
    assert_same_bits(m.mean, np.full(shape[1], 7.0), "mean")
    assert_same_bits(m.m2, 2.0 * (d**2).sum((0, *range(2, len(shape)))), "m2")


# --- NIST ------------------------------------------------------------------------------------------------------


def digits_of_pi(n):
    """The first n, by Machin's formula: pi / 4 = 4 arctan(1/5) - arctan(1/239). (str(int) stops at 4300 digits.)"""
    one = 10 ** (n + 10)

    def arctan_of_inverse(k):
        power, total = one // k, 0
        for i in itertools.count(1, 2):
            if not power:
                return total
            total += power // i if i % 4 == 1 else -(power // i)
            power //= k * k

    return [int(digit) for digit in str(Decimal(16 * arctan_of_inverse(5) - 4 * arctan_of_inverse(239)))[:n]]


def nist_digits_of_pi():
    """NIST's file has a 3 where pi has an 8; the certified values are those of the file."""
    digits = digits_of_pi(5000)
    digits[956] = 3
    return digits


# The nine univariate sets of NIST's StRD: values, certified mean, standard deviation (divisor n - 1) and lag-1
# autocorrelation, and the digits owed of the standard deviation (of the mean always 13.9). What is owed of Mavro,
# Michelso, NumAcc3 and NumAcc4 is limited by rounding the data to float64 (exact arithmetic: 13.1, 13.8, 9.5, 8.3).
NIST = {
    name: (
        entry["values"],
        [entry[kind] for kind in ("mean", "std", "autocorrelation")],
        12.9 if name in ("Mavro", "Michelso") else 13.9,
    )
    for name, entry in json.loads((FIXTURES / "nist.json").read_text())["sets"].items()
} | {
    "PiDigits": (nist_digits_of_pi(), [4.53480000000000, 2.86733906028871, -0.00355099287237972], 13.9),
    "NumAcc1": ([10000001.0, 10000003.0, 10000002.0], [10000002.0, 1.0, -0.5], 13.9),
    "NumAcc2": ([1.2, *[1.1, 1.3] * 500], [1.2, 0.1, -0.999], 13.9),
    "NumAcc3": ([1000000.2, *[1000000.1, 1000000.3] * 500], [1000000.2, 0.1, -0.999], 9.4),
    "NumAcc4": ([10000000.2, *[10000000.1, 10000000.3] * 500], [10000000.2, 0.1, -0.999], 8.2),
}


@pytest.mark.parametrize("name", NIST)
def test_the_data_of_nist_are_right(name):
    """In exact arithmetic the decimal numbers have the certified values, to all 15 digits."""
    values, certified, _ = NIST[name]
    numbers = [Fraction(str(value)) for value in values]
    mean = sum(numbers) / len(numbers)
    deviations = [number - mean for number in numbers]
    squares = sum(d * d for d in deviations)
    autocorrelation = sum(a * b for a, b in itertools.pairwise(deviations)) / squares
    exact = [mean, math.sqrt(squares / (len(numbers) - 1)), autocorrelation]
    assert [f"{float(value):.14e}" for value in exact] == [f"{value:.14e}" for value in certified]


def log_relative_error(value, certified):
    """NIST's score: the number of right digits, 15 at most."""
    error = abs(value - certified) / abs(certified)
    return 15.0 if error == 0 else min(15.0, -math.log10(error))


def two_passes(values):
    """Mean and standard deviation by the textbook, in float64."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


@pytest.mark.parametrize("channels", [1, 5], ids=["planar", "interleaved"])
@pytest.mark.parametrize("name", NIST)
def test_nist_strd(isa, name, channels):
    values, (mean, std, _), digits_of_std = NIST[name]
    m = bnfast.moments(np.stack([np.array(values, float)] * channels, 1))
    for actual, certified, digits, textbook in zip(
        (m.mean[-1], m.std(ddof=1)[-1]), (mean, std), (13.9, digits_of_std), two_passes(values), strict=True
    ):
        score = log_relative_error(actual, certified)
        assert score >= digits
        # Beside two passes, but for one rounding of the result: Mavro's 50 values happen to be kind to two passes.
        assert score >= log_relative_error(textbook, certified) or abs(actual - textbook) <= np.spacing(abs(textbook))


# --- many elements ---------------------------------------------------------------------------------------------


MANY = pytest.mark.parametrize("shape", [(2, 1, 10_000_000), (7_000_000, 3)], ids=["planar", "interleaved"])


def sums(dy):
    """dgamma and dbeta, where both are the sum of dy."""
    ones = np.ones(dy.shape[1])
    return F.batch_norm_backward(dy, np.ones_like(dy), 0 * ones, ones, training=False, out=dy)[1:]


@MANY
def test_a_sum_of_many_equal_elements_loses_no_digits(shape):
    """A float32 running sum of 0.1 stands still after 2^21 terms. The lanes' roundings are all alike here."""
    exact = math.prod(shape) // shape[1] * float(np.float32(0.1))
    np.testing.assert_allclose(sums(np.full(shape, 0.1, np.float32)), exact, rtol=TABLE["float32"].sums)


@MANY
def test_a_sum_of_many_elements_loses_no_digits(rng, shape):
    """Roundings average out, and what remains is that of the result, 2^-24."""
    dy = rng.random(shape, np.float32)
    exact = [math.fsum(channel.ravel()) for channel in np.moveaxis(dy, 1, 0)]
    np.testing.assert_allclose(sums(dy), [exact] * 2, rtol=1e-7)


@MANY
def test_moments_of_many_elements_lose_no_digits(rng, shape):
    """Against exact sums of the same float32 values, whose integers fit in int64."""
    steps = rng.integers(-(2**9), 2**9, shape, dtype=np.int16)  # x = 1000 + steps / 1024, without rounding
    x = (1000 + steps / np.float32(1024)).astype(np.float32)
    axes, count = (0, *range(2, len(shape))), math.prod(shape) // shape[1]
    total, square = (wide((steps.astype(np.int32) ** power).sum(axes, dtype=np.int64)) for power in (1, 2))
    m = bnfast.moments(x)
    np.testing.assert_allclose(m.mean, 1000 + total / count / 1024, rtol=0, atol=TABLE["float32"].mean * 0.3)
    np.testing.assert_allclose(m.m2, (square - total**2 / count) / 1024**2, rtol=TABLE["float32"].var)


@pytest.mark.parametrize("n_rows", [2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 128])
def test_few_rows_leave_little_to_average_out(rng, n_rows):
    """So many columns that the rarest of roundings are among them."""
    x = rng.standard_normal((n_rows, 200_000), np.float32)
    check_moments(bnfast.moments(x), x)


@pytest.mark.parametrize("n_rows", [2, 3, 5, 7, 11, 15, 16, 17])
def test_few_rows_of_huge_constants_have_no_deviation(dtype, n_rows):
    """The mean of equal values is that value, however it is taken, and its square may not overflow."""
    values = (np.finfo(dtype).max * np.geomspace(1e-9, 1e-2, 200)).astype(dtype)
    x = np.tile(values, (n_rows, 1))
    y, mean, inv_std = F.batch_norm(x)
    assert (mean == values).all()
    assert (bnfast.moments(x).m2 == 0).all()
    assert np.isfinite(inv_std).all()
    assert (y == 0).all()


# --- variance is never negative --------------------------------------------------------------------------------


@given(
    x=hnp.arrays(
        st.sampled_from([np.float32, np.float64]),
        st.tuples(st.integers(2, 40), st.integers(1, 5), st.integers(1, 20)),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
        fill=st.floats(-(2.0**100), 2.0**100, width=32),
    )
)
def test_variance_is_never_negative(x):
    m = bnfast.moments(x)
    assert (m.m2 >= 0).all()
    constant = (x == x[:1, :, :1]).all((0, 2))
    assert not m.m2[constant].any()
    _, _, inv_std = F.batch_norm(x)
    assert (inv_std <= 1 / math.sqrt(1e-5)).all()


@given(st.integers(0, 2**32 - 1), st.sampled_from([np.float32, np.float64]))
def test_variance_of_almost_constant_data_is_never_negative(seed, dtype):
    rng = np.random.default_rng(seed)
    x = np.full((50, 4, 20), rng.normal() * 10.0 ** rng.integers(-20, 20), dtype)
    some = rng.random(x.shape) < rng.choice([0.001, 0.1, 0.5])
    x[some] = np.nextafter(x[some], dtype(np.inf))
    m = bnfast.moments(x)
    assert (m.m2 >= 0).all()
    count, _, m2 = reference.moments(wide(x - x[0, 0, 0]))  # this difference is exact, and longdouble not too narrow
    assert_within(m.m2, m2, count * variance_bound(x, wide(m.mean), m2 / count, 0), "m2")
