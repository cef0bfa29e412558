"""How exact bnfast has to be: the one table, each number beside its reason, and the checks that use it.

The oracle is `bnfast.reference` fed with longdouble copies, so it is wider than what it judges. A check never has
another tolerance than the table's; equality of bits is `assert_same_bits`.
"""

from typing import NamedTuple

import numpy as np
import pytest

from bnfast import reference

EPS = float(np.finfo(np.float64).eps)


class Tolerance(NamedTuple):
    """Of one dtype of data. Statistics are float64 whatever the data."""

    y: float  # times |gamma| * (1 + |x_hat|) + |beta|
    y_mean: float  # times |gamma * mean / std|, added to that
    mean: float  # times std
    mean_rounding: float  # times |mean|, added to that
    mean_copies: float  # times std, instead of `mean`, where every value is there more than once
    var: float  # relative
    var_mean: float  # times |mean| / std, factor to that
    var_share: float  # times the largest share that one value, or its copies, have in the variance, relative, added
    dx: float  # in norm, channel by channel, relative to the norm of gamma * inv_std * dy
    sums: float  # dgamma, dbeta: relative to the sum of the absolute terms
    mean_argument: float  # times |mean| / std, added to dx's and dgamma's


TABLE = {
    "float32": Tolerance(
        # Four roundings of 2^-24: x - centre, scale, product, sum. DESIGN.md 5.2.
        y=2e-7,
        # The centre is subtracted in two parts and the mean is float64: no digit of x is lost.
        y_mean=0.0,
        # Lanes of 16 float32 terms (of columns: 4), then float64: 2^-25 an element, which averages out. TRUST.md A8.
        mean=1e-7,
        mean_rounding=EPS,
        # Copies round alike, so their lanes do not average out: what docs/theory/error-bounds.md proves for any data.
        mean_copies=17 * 2.0**-24,
        # The same, amplified by the loss the pivot may cause (a factor of 3). TRUST.md A8.
        var=2e-7,
        # d = x - pivot is as exact far from zero as near it, and what fails is done again in float64.
        var_mean=0.0,
        # An outlier that is most of the variance leaves nothing to average out: two roundings of d and one of its
        # square, and those of up to 15 additions after it in its lane, a random walk of 4: 7 or 8 times 2^-24.
        var_share=8 * 2.0**-24,
        # Two maps of three roundings each, and a sum. TRUST.md A9, benchdnn's figure.
        dx=6e-7,
        # Lanes of 16 float32 terms, a product of two rounded factors each, and the result rounded. TRUST.md A9.
        sums=1e-6,
        # The float64 mean is exact enough for float32 data.
        mean_argument=0.0,
    ),
    "float64": Tolerance(
        # Seven roundings of 2^-53: those of float32, and variance, root and quotient in the same precision.
        y=1e-15,
        # The float64 mean is itself rounded. DESIGN.md 5.2.
        y_mean=1e-15,
        # 4 ulp of the mean, or of a standard deviation where the mean is smaller than that. TRUST.md A8.
        mean=4 * EPS,
        mean_rounding=4 * EPS,
        # Nothing beyond the usual bound was seen.
        mean_copies=4 * EPS,
        # Lanes of at most a few hundred terms, merged as a tree. TRUST.md A8.
        var=8 * EPS,
        # A mean of 4096 terms may be off by 4096 roundings, which its square adds. Nothing below a |mean| of 1e9 std.
        var_mean=2 * EPS * 4096,
        # As float32, in units of 2^-53.
        var_share=8 * 2.0**-53,
        # As float32, in units of 2^-53, and the statistics are rounded too. TRUST.md A9.
        dx=1e-14,
        sums=1e-14,
        # x_hat inherits the rounding of the mean that the caller passes.
        mean_argument=EPS,
    ),
}

# Of float32 data summed in float64, in segments four times as long: a random walk goes twice as far.
EXACT_FLOAT32 = TABLE["float64"]._replace(mean=8 * EPS, var=16 * EPS, var_share=16 * 2.0**-53)


def table(x):
    """The line of the table for an array's dtype."""
    return TABLE[np.dtype(x.dtype).newbyteorder("=").name]


def wide(value):
    """A longdouble copy, None for None: what the oracle is fed with."""
    if value is None:
        return None
    value = np.asarray(value)
    if value.dtype.itemsize == 8 and np.finfo(np.longdouble).eps > EPS / 1000:
        pytest.skip("longdouble is no wider than float64 on this platform: no oracle for float64")
    return value.astype(np.longdouble)


def others(x, axis):
    """The axes the statistics are taken over."""
    return tuple(i for i in range(x.ndim) if i != axis % x.ndim)


def along(parameter, x, axis):
    """(C,) shaped to broadcast against x; None stays None."""
    shape = [1] * x.ndim
    shape[axis] = x.shape[axis]
    return None if parameter is None else wide(parameter).reshape(shape)


def absolute(parameter, default):
    return default if parameter is None else abs(parameter)


def assert_within(actual, expected, bound, what):
    """|actual - expected| <= bound, elementwise; says by which factor the worst element misses."""
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    error = abs(actual.astype(np.longdouble) - expected)
    bad = ~(error <= bound)
    if bad.any():
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = np.where(bad, error / bound, 0)
        worst = np.unravel_index(np.argmax(np.where(np.isnan(ratio), np.inf, ratio)), ratio.shape)
        raise AssertionError(
            f"{what}: {bad.sum()} of {bad.size} outside the table, the worst at {tuple(map(int, worst))}: "
            f"{actual[worst]!r} instead of {expected[worst]!r}, {float(ratio[worst]):.3g} times the bound"
        )


def assert_same_bits(actual, expected, what="result"):
    """Equal dtype, shape and bits, NaN payloads and signs of zero included; the memory order may differ."""
    assert actual.dtype == expected.dtype, f"{what}: dtype {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, expected {expected.shape}"
    if actual.tobytes() != expected.tobytes():
        bits = f"u{actual.dtype.itemsize}"
        unequal = np.ascontiguousarray(actual).view(bits) != np.ascontiguousarray(expected).view(bits)
        where = tuple(int(i[0]) for i in np.nonzero(unequal))
        raise AssertionError(
            f"{what}: {unequal.sum()} of {unequal.size} differ, the first at {where}: "
            f"{actual[where]!r} instead of {expected[where]!r}"
        )


def check_mean(mean, x, axis, copies=1, tolerance=None):
    tolerance = tolerance or table(x)
    count, expected, m2 = reference.moments(wide(x), axis=axis)
    times_std = tolerance.mean if copies == 1 else tolerance.mean_copies
    bound = times_std * np.sqrt(m2 / count) + tolerance.mean_rounding * abs(expected)
    assert_within(mean, expected, bound, "mean")


def largest_share(x, mean, m2, axis, copies=1):
    """Of one value, with its copies, in the sum of squared deviations, channel by channel; 0 where that is 0."""
    square = (wide(x) - along(mean, x, axis)) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        share = square.max(others(x, axis)) / m2
    return np.minimum(1, copies * np.where(m2 > 0, share, 0))


def variance_bound(x, mean, var, share, tolerance=None):
    """The error allowed to a variance of x."""
    tolerance = tolerance or table(x)
    return tolerance.var * (var + tolerance.var_mean * abs(mean) * np.sqrt(var)) + tolerance.var_share * share * var


def check_moments(moments, x, *, axis=1, copies=1):
    """The result of bnfast.moments. copies: how often every value is there; equal values round alike.

    It sums in float64 whatever the data, so it is judged as of float64.
    """
    count, mean, m2 = reference.moments(wide(x), axis=axis)
    assert moments.count == count
    tolerance = TABLE["float64"] if x.dtype.itemsize == 8 else EXACT_FLOAT32
    check_mean(moments.mean, x, axis, copies, tolerance)
    share = largest_share(x, mean, m2, axis, copies)
    bound = count * variance_bound(x, mean, m2 / count, share, tolerance)
    assert_within(moments.m2, m2, bound, "m2")


def check_y(y, x, expected, x_hat, mean, inv_std, gamma, beta, axis, of_mean=0.0, of_var=0.0):
    """of_mean (in std), of_var (relative): errors of the statistics beyond those that average out, a channel each."""
    tolerance = table(x)
    gamma, beta = absolute(along(gamma, x, axis), 1), absolute(along(beta, x, axis), 0)
    kappa = abs(along(mean, x, axis)) * along(inv_std, x, axis)
    bound = tolerance.y * (gamma * (1 + abs(x_hat)) + beta) + tolerance.y_mean * gamma * kappa
    bound = bound + gamma * (of_mean + abs(x_hat) * of_var / 2)
    assert y.dtype == x.dtype.newbyteorder("=")
    assert_within(y, expected, bound, "y")


def check_batch_norm(result, x, gamma=None, beta=None, *, axis=1, eps=1e-5, copies=1):
    """(y, mean, inv_std) of functional.batch_norm. copies: how often every value is there; equal values round alike."""
    y, mean, inv_std = result
    expected, true_mean, true_inv_std = reference.batch_norm(wide(x), wide(gamma), wide(beta), axis=axis, eps=eps)
    x_hat = reference.batch_norm(wide(x), axis=axis, eps=eps)[0]
    of_mean, of_var = 0.0, np.zeros(x.shape[axis])
    if copies > 1:
        _, center, m2 = reference.moments(wide(x), axis=axis)
        of_mean = table(x).mean_copies
        of_var = table(x).var_share * largest_share(x, center, m2, axis, copies)
    check_y(y, x, expected, x_hat, true_mean, true_inv_std, gamma, beta, axis, of_mean, along(of_var, x, axis))
    assert mean.dtype == inv_std.dtype == np.float64
    check_mean(mean, x, axis, copies)
    # Half the variance's relative error, and a rounding or two.
    assert_within(inv_std, true_inv_std, (table(x).var + of_var / 2) * true_inv_std, "inv_std")


def check_batch_norm_eval(y, x, mean, var, gamma=None, beta=None, *, axis=1, eps=1e-5):
    """y of functional.batch_norm_eval."""
    expected = reference.batch_norm_eval(wide(x), wide(mean), wide(var), wide(gamma), wide(beta), axis=axis, eps=eps)
    x_hat = reference.batch_norm_eval(wide(x), wide(mean), wide(var), axis=axis, eps=eps)
    check_y(y, x, expected, x_hat, mean, 1 / np.sqrt(wide(var) + eps), gamma, beta, axis)


def norm(x, axis):
    """Of each channel."""
    return np.sqrt((x**2).sum(others(x, axis)))


def check_in_norm(actual, expected, size, mean, inv_std, x, axis, what):
    """Channel by channel, relative to `size`, the norm of the terms: what is left of them may cancel."""
    tolerance = table(x)
    kappa = abs(wide(mean)) * wide(inv_std)
    error = norm(actual.astype(np.longdouble) - expected, axis)
    assert actual.dtype == x.dtype.newbyteorder("=")
    assert actual.shape == expected.shape
    assert_within(error, np.zeros_like(error), (tolerance.dx + tolerance.mean_argument * kappa) * size, what)


def check_batch_norm_backward(result, dy, x, mean, inv_std, gamma=None, *, axis=1, training=True):
    """(dx, dgamma, dbeta) of functional.batch_norm_backward."""
    dx, dgamma, dbeta = result
    tolerance = table(x)
    args = wide(dy), wide(x), wide(mean), wide(inv_std), wide(gamma)
    true_dx, true_dgamma, true_dbeta = reference.batch_norm_backward(*args, axis=axis, training=training)
    size = norm(wide(dy), axis) * abs(wide(inv_std)) * absolute(wide(gamma), 1)
    check_in_norm(dx, true_dx, size, mean, inv_std, x, axis, "dx")
    assert dgamma.dtype == dbeta.dtype == dx.dtype
    x_hat = (wide(x) - along(mean, x, axis)) * along(inv_std, x, axis)
    terms = abs(wide(dy)).sum(others(x, axis))
    rest = tolerance.mean_argument * abs(wide(mean)) * wide(inv_std) * terms
    bound = tolerance.sums * abs(wide(dy) * x_hat).sum(others(x, axis)) + rest
    assert_within(dgamma, true_dgamma, bound, "dgamma")
    assert_within(dbeta, true_dbeta, tolerance.sums * terms, "dbeta")


def check_batch_norm_jvp(dy, v, x, mean, inv_std, gamma=None, *, axis=1, vgamma=None, vbeta=None):
    """The result of functional.batch_norm_jvp."""
    args = wide(v), wide(x), wide(mean), wide(inv_std), wide(gamma)
    expected = reference.batch_norm_jvp(*args, axis=axis, vgamma=wide(vgamma), vbeta=wide(vbeta))
    x_hat = (wide(x) - along(mean, x, axis)) * along(inv_std, x, axis)
    size = norm(wide(v), axis) * wide(inv_std) * absolute(wide(gamma), 1)
    size = size + norm(x_hat, axis) * absolute(wide(vgamma), 0)
    size = size + np.sqrt(wide(x.size // x.shape[axis])) * absolute(wide(vbeta), 0)
    check_in_norm(dy, expected, size, mean, inv_std, x, axis, "jvp")
