"""Channels at the edges of their dtype's range: right, or refused; and the same whatever the plan and the layout.

Magnitudes are drawn uniformly in their exponents. The oracle is `bnfast.reference` in longdouble, whose exponents reach
further than float64's; where it has no more than they have there is nothing to hold these against.
"""

import numpy as np
import pytest
from campaign import short_and_long
from tolerances import assert_same_bits

import bnfast
from bnfast import BatchNorm, StandardScaler, reference
from bnfast import functional as F

pytestmark = pytest.mark.skipif(
    np.finfo(np.longdouble).maxexp < 16000, reason="longdouble has no further range than float64 on this machine"
)

TINY = {np.float32: 2.0**-149, np.float64: 5e-324}
UNIT = {np.float32: 2.4e-7, np.float64: 1e-15}  # error-bounds.md


def wide(*arrays):
    return [None if a is None else np.asarray(a).astype(np.longdouble) for a in arrays]


def channels(a, ndim):
    return np.asarray(a)[(None, slice(None), *[None] * (ndim - 2))]


def assert_y(y, x, mean, inv_std, gamma, beta):
    """Within the promised bound, plus a few of the least number of the dtype."""
    dtype = x.dtype.type
    hat = (x.astype(np.longdouble) - channels(mean, x.ndim)) * channels(inv_std, x.ndim)
    g, b = channels(gamma, x.ndim).astype(np.longdouble), channels(beta, x.ndim).astype(np.longdouble)
    exact = hat * g + b
    # gammas of a size that the dtype hardly has: 8 of its least a standard deviation (error-bounds.md)
    allowed = UNIT[dtype] * (abs(g) * (1 + abs(hat)) + abs(b)) + 8 * TINY[dtype] * (1 + abs(hat))
    fits = abs(exact) < np.finfo(dtype).max
    error = np.where(fits, abs(y.astype(np.longdouble) - exact), 0)
    assert (error <= allowed).all(), float((error / allowed).max())
    assert np.isinf(y[~fits]).all()


# --- the cases people met ---


def test_a_scale_below_float32():
    y = F.batch_norm_eval(np.float32([[1e30]]), [0.0], [1e60], [1e-12])
    assert y[0, 0] == pytest.approx(1e-12, rel=1e-6, abs=0)
    y = F.batch_norm_eval(np.float32([[1e30]]), [0.0], [1e60], [1e-15])
    assert y[0, 0] == pytest.approx(1e-15, rel=1e-6, abs=0)


def test_a_distance_beyond_float32():
    assert F.batch_norm_eval(np.float32([[3e38]]), [-3e38], [1e76])[0, 0] == np.float32(6)
    x = np.full((10, 1), -3e38, np.float32)
    x[3] = 3e38
    y, _, _ = F.batch_norm(x)
    assert y[3, 0] == pytest.approx(3.0, rel=1e-6, abs=0)
    assert np.allclose(np.delete(y, 3), -1 / 3, rtol=1e-6, atol=0)


@pytest.mark.parametrize("unit", [1e154, 1e160, 1e200, 1e300])
def test_float64_whose_squares_leave_the_range(unit):
    x = np.array([[1.0], [2.0], [3.0], [4.0]]) * unit
    y, mean, inv_std = F.batch_norm(x)
    assert np.allclose(y[:, 0], np.array([-3, -1, 1, 3]) / np.sqrt(5), rtol=1e-15, atol=0)
    assert mean[0] == pytest.approx(2.5 * unit, rel=1e-15, abs=0)
    assert inv_std[0] == pytest.approx(1 / (np.sqrt(1.25) * unit), rel=1e-15, abs=0)
    dy = np.array([[1.0], [-2.0], [0.5], [4.0]])
    dx, dgamma, dbeta = F.batch_norm_backward(dy, x, mean, inv_std)
    ex = reference.batch_norm_backward(*wide(dy, x, mean, inv_std))
    assert np.allclose(dx * unit, (ex[0] * unit).astype(float), rtol=1e-13, atol=1e-15)
    assert dgamma[0] == pytest.approx(float(ex[1][0]), rel=1e-14, abs=0)
    assert dbeta[0] == 3.5


@pytest.mark.parametrize("unit", [1e-154, 1e-200, 1e-300])
def test_float64_whose_squares_vanish(unit):
    """Only where eps is smaller still does it matter."""
    x = np.array([[1.0], [2.0], [3.0], [4.0]]) * unit
    y, _, inv_std = F.batch_norm(x, eps=5e-324)
    expected = reference.batch_norm(x.astype(np.longdouble), eps=5e-324)[0]
    assert np.allclose(y, expected.astype(float), rtol=1e-14, atol=0)
    assert np.isfinite(inv_std).all()
    assert (bnfast.moments(x).m2 > 0).all()  # it is not a constant
    y, _, _ = F.batch_norm(x)
    assert np.allclose(y, (x - x.mean()) / np.sqrt(1e-5), rtol=1e-15, atol=0)


def test_a_layer_refuses_a_variance_that_it_could_not_keep():
    bn = BatchNorm(2, dtype=np.float64)
    before = bn.state_dict()
    x = np.array([[1.0, 1e160], [2.0, 2e160], [3.0, 4e160]])
    with pytest.raises(OverflowError, match="channel 1"):
        bn(x)
    assert all(np.array_equal(before[name], value) for name, value in bn.state_dict().items())
    y = BatchNorm(2, dtype=np.float64, track_running_stats=False)(x)
    assert np.allclose(y.std(axis=0), 1, rtol=1e-5)


def test_a_calibration_and_several_processes_refuse_it_too():
    x = np.array([[1.0, 1e160], [2.0, 2e160], [3.0, 4e160]])
    bn = BatchNorm(2, dtype=np.float64)
    before = bn.state_dict()
    with pytest.raises(OverflowError, match="channel 1"), bn.calibrate():
        bn(x)
    assert all(np.array_equal(before[name], value) for name, value in bn.state_dict().items())
    for tracks in (True, False):
        bn = BatchNorm(2, dtype=np.float64, comm=lambda vector: vector[None], track_running_stats=tracks)
        with pytest.raises(OverflowError, match="channel 1"):
            bn(x)


def test_a_scaler_refuses_what_it_cannot_scale():
    for unit in (1e160, 1e300, 1e-160, 1e-300):
        with pytest.raises(ValueError, match=r"too (large|close).*feature 1"):
            StandardScaler().fit(np.array([[1.0, 1.0], [2.0, 2.0], [3.0, 4.0]]) * [1.0, unit])
    constant = StandardScaler().fit(np.full((3, 1), 1e300))
    assert constant.scale_[0] == 1


def test_means_of_infinities_and_of_what_lies_far_apart():
    x = np.array([[1.0, np.inf, np.inf, np.nan], [2.0, 1.0, -np.inf, 1.0]])
    for dtype in (np.float32, np.float64):
        with np.errstate(invalid="ignore"):
            assert np.array_equal(bnfast.moments(x.astype(dtype)).mean, x.mean(axis=0), equal_nan=True)
        m = bnfast.moments(x.astype(dtype))
        assert np.isnan(m.m2[1:]).all()
    both = bnfast.Moments(1, [1.7e308], [0]) + bnfast.Moments(1, [-1.7e308], [0])
    assert both.mean[0] == 0
    assert (bnfast.Moments(1, [np.inf], [np.nan]) + bnfast.Moments(3, [1.0], [0])).mean[0] == np.inf


@pytest.mark.parametrize("shape", [(400, 3), (7, 3, 100), (40, 3, 7)])
def test_float64_far_from_zero_keeps_what_its_mean_was_rounded_by(shape, rng):
    for factor in (1e3, 1e6, 1e9, 1e12):
        x = np.moveaxis(factor + rng.normal(size=shape), 1, 1)
        y, _, _ = F.batch_norm(x, eps=1e-30)
        near_zero = x.astype(np.longdouble) - factor  # exactly; longdouble's own roundings of the mean would be seen
        exact, mean, inv_std = reference.batch_norm(near_zero, eps=1e-30)
        assert (abs(y - exact) <= 1e-15 * (1 + abs(exact))).all(), factor
        dy = rng.normal(size=shape)
        bn = BatchNorm(3, dtype=np.float64, eps=1e-30)
        bn(x)
        dx = bn.backward(dy)
        wanted = reference.batch_norm_backward(dy.astype(np.longdouble), near_zero, mean, inv_std)
        size = np.sqrt((wanted[0] ** 2).mean())
        assert (abs(dx - wanted[0]) <= 1e-14 * (size + abs(wanted[0]))).all(), factor
        assert np.allclose(bn.grad_gamma, wanted[1].astype(float), rtol=0, atol=1e-14 * np.abs(dy).sum())


@pytest.mark.parametrize("shape", [(8, 4, 5, 5), (64, 4)], ids=str)
def test_marks_of_a_careful_channel_are_those_of_vectors(dtype, shape, isa, rng):
    x, dy, residual = rng.normal(size=(3, *shape)).astype(dtype)
    x[:, 1] *= dtype(3e37 if dtype is np.float32 else 1e200)
    bn = BatchNorm(4, dtype=dtype, activation="relu", track_running_stats=False)
    y = bn(x, residual=residual)
    _, dresidual = bn.backward(dy)
    wanted = np.where(y > 0, dy, 0)
    assert np.array_equal(dresidual, wanted)
    axes = tuple(i for i in range(x.ndim) if i != 1)
    assert np.allclose(bn.grad_beta, wanted.astype(np.float64).sum(axis=axes), rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [0.1, 1 / 3])
def test_a_long_constant_of_float64(value):
    m = bnfast.moments(np.full((3_000_000, 1), value))
    assert m.mean[0] == value
    assert m.m2[0] == 0


def test_a_large_constant_beside_a_tiny_eps():
    x = np.full((4, 1), 1e13)
    _, mean, inv_std = F.batch_norm(x, eps=1e-300)
    assert inv_std[0] == pytest.approx(1e150)
    assert np.isfinite(F.batch_norm_backward(np.array([[1.0], [2], [0], [1]]), x, mean, inv_std)[0]).all()


def test_apply_leaves_the_sums_it_is_given(rng):
    x, dy = rng.normal(size=(40, 3)) * [1, 1e305, 1], rng.normal(size=(40, 3)) * 1e10
    given = {"residual": abs(rng.normal(size=(40, 3))) * 10, "activation": "relu"}
    _, mean, inv_std = F.batch_norm(x, **given)
    whole = F.batch_norm_backward(dy, x, mean, inv_std, **given)[0]
    parts = [slice(0, 20), slice(20, 40)]

    def of(part):
        return dy[part], x[part], mean, inv_std

    def beside(part):
        return {**given, "residual": given["residual"][part]}

    sums = F.batch_norm_backward_sums(*of(parts[0]), **beside(parts[0])) + F.batch_norm_backward_sums(
        *of(parts[1]), **beside(parts[1])
    )
    before = sums.dgamma.copy()
    found = [F.batch_norm_backward_apply(*of(part), None, sums, **beside(part))[0] for part in parts]
    assert np.array_equal(sums.dgamma, before)
    assert np.allclose(np.concatenate(found), whole, rtol=1e-12, atol=0)


def test_a_gamma_of_zero_beside_products_beyond_float64(rng):
    x, dy = rng.normal(size=(2, 40, 2)) * [1, 1e200]
    _, mean, inv_std = F.batch_norm(x)
    assert (F.batch_norm_backward(dy, x, mean, inv_std, np.zeros(2))[0] == 0).all()


# --- of any magnitude ---


SHAPES = [(20, 6), (300, 6), (3, 6, 40), (5, 6, 3), (2, 6, 5000)]


def drawn(shape, dtype, rng):
    """Data, gradient, gamma and beta of any magnitude, channel by channel."""
    low, high = (-140, 126) if dtype is np.float32 else (-1060, 1022)
    n, ndim = shape[1], len(shape)

    def sizes(least, most):
        return np.ldexp(1.0, rng.integers(least, most, n).astype(np.int32))

    def near_one():
        return rng.normal(size=shape).clip(-3.9, 3.9) / 4

    far = channels(rng.choice([0, 0, 1, -1, 100], n), ndim) / 128
    x = channels(sizes(low, high), ndim) * (near_one() + far)
    dy = channels(sizes(low // 2, high // 2), ndim) * near_one()
    gamma = rng.normal(size=n) * sizes(low // 2, high // 2)
    return x.astype(dtype), dy.astype(dtype), gamma.astype(dtype), np.zeros(n, dtype)


@pytest.mark.parametrize("n", short_and_long(20, 3400))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_magnitude(shape, dtype, n, rng):
    for _ in range(n):
        x, _, gamma, beta = drawn(shape, dtype, rng)
        y, mean, inv_std = F.batch_norm(x, gamma, beta)
        _, exact_mean, exact_inv_std = reference.batch_norm(*wide(x, gamma, beta))
        assert np.allclose(
            (mean * exact_inv_std).astype(float),
            (exact_mean * exact_inv_std).astype(float),
            rtol=2e-16,
            atol=2e-6 if dtype is np.float32 else 1e-14,
        )
        assert np.allclose(
            (inv_std / exact_inv_std).astype(float), 1, rtol=0, atol=2e-6 if dtype is np.float32 else 1e-13
        )
        assert_y(y, x, mean if dtype is np.float32 else exact_mean, inv_std, gamma, beta)
        var = reference.moments(x.astype(np.longdouble))[2] / (x.size // shape[1])
        if (var < 1e308).all():
            given = var.astype(np.float64)
            inv_std = 1 / np.sqrt(given.astype(np.longdouble) + 1e-5)
            assert_y(F.batch_norm_eval(x, mean, given, gamma, beta), x, mean, inv_std, gamma, beta)


@pytest.mark.parametrize("n", short_and_long(20, 500))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_of_every_magnitude(shape, dtype, n, rng):
    for _ in range(n):
        x, dy, gamma, _ = drawn(shape, dtype, rng)
        _, mean, inv_std = F.batch_norm(x, gamma)
        if not (np.isfinite(1 / inv_std).all() and (inv_std > 1e-300).all()):
            continue
        dx, dgamma, dbeta = F.batch_norm_backward(dy, x, mean, inv_std, gamma)
        ex = reference.batch_norm_backward(*wide(dy, x, mean, inv_std, gamma))
        axes = tuple(i for i in range(x.ndim) if i != 1)
        terms = abs(wide(dy)[0]).sum(axis=axes)
        hats = (x.astype(np.longdouble) - channels(mean, x.ndim)) * channels(inv_std, x.ndim)
        hat_terms = (abs(wide(dy)[0]) * abs(hats)).sum(axis=axes)
        unit = 1e-6 if dtype is np.float32 else 1e-13
        limit = np.finfo(dtype).max
        for found, exact, size in ((dbeta, ex[2], terms), (dgamma, ex[1], hat_terms + terms * 1e-3)):
            fits = abs(exact) < limit
            assert (abs(found - exact) <= unit * size + TINY[dtype])[fits].all()
        scale = abs(wide(gamma)[0] * inv_std)
        size = channels(scale * np.sqrt((wide(dy)[0] ** 2).mean(axis=axes)), x.ndim)
        fits = abs(ex[0]) < limit
        error = abs(dx - ex[0])
        allowed = unit * (size + abs(ex[0])) + 8 * TINY[dtype] * (1 + abs(hats))
        assert (error <= allowed)[fits].all(), float((error / allowed)[fits].max())


PLANS = [
    {"kind": "blocks"},
    {"kind": "phases"},
    {"kind": "blocks", "stream": True},
    {"kind": "phases", "stream": True},
    {"near": True},
    {"kind": "blocks", "pack": True},
    {"kind": "blocks", "written_later": True},
]


@pytest.mark.parametrize("shape", [(64, 70), (6, 40, 33), (3, 70, 20, 20), (50, 9, 3)], ids=str)
def test_the_bits_of_every_plan(shape, dtype, rng, force_plan):
    """Some channels at the edges among ordinary ones; in place, beside a residual and an activation, backward too."""
    n = shape[1]
    x, dy = rng.normal(size=(2, *shape)).astype(dtype)
    top = np.finfo(dtype).max
    with np.errstate(over="ignore"):
        x[:, 3] *= top / 8
        x[:, 7] *= dtype(1e30 if dtype is np.float32 else 1e200)
    gamma, beta = rng.normal(size=(2, n)).astype(dtype)
    gamma[7] = 1e-12 if dtype is np.float32 else 1e-150
    gamma[5] = 0
    residual = rng.normal(size=shape).astype(dtype)

    def all_of_it():
        bn = BatchNorm(n, dtype=dtype, activation="relu", track_running_stats=False)
        bn.gamma[:], bn.beta[:] = gamma, beta
        y = bn(x, residual=residual)
        dx, dresidual = bn.backward(dy)
        into = x.copy()
        plain = F.batch_norm(into, gamma, beta, out=into)
        sums = F.batch_norm_backward_sums(dy, x, plain[1], plain[2], gamma)
        halves = F.batch_norm_backward_apply(dy, x, plain[1], plain[2], gamma, sums=sums)
        whole = F.batch_norm_backward(dy, x, plain[1], plain[2], gamma)[0]
        assert np.array_equal(halves, whole)
        with np.errstate(over="ignore", divide="ignore"):
            v = np.minimum(1 / plain[2] ** 2, 1e300)  # eval takes no infinity
        over = residual.copy()
        evaluated = F.batch_norm_eval(x, plain[1], v, gamma, beta, residual=over, activation="relu", out=over)
        return [y, dx, dresidual, *plain, whole, evaluated, bn.grad_gamma, bn.grad_beta]

    expected = all_of_it()
    y, mean, inv_std = expected[3:6]
    assert np.isfinite(expected[0]).all()
    if dtype is np.float64:
        _, mean, inv_std = reference.batch_norm(x.astype(np.longdouble))
    assert_y(y, x, mean, inv_std, gamma, beta)
    for plan in PLANS:
        for threads in (1, 2):
            force_plan(**plan)
            with bnfast.num_threads(threads):
                found = all_of_it()
            for one, other in zip(expected, found, strict=True):
                assert_same_bits(one, other, (plan, threads))


@pytest.mark.parametrize("n", [515, 1030])
def test_the_first_and_the_last_channel_of_a_long_row(n, dtype, rng):
    """At the edges of the range, in a row a few channels longer than what is mapped at once, wherever it begins."""
    x, residual, dy = rng.normal(size=(3, 6, n)).astype(dtype)
    x[:, [0, -1]] *= np.finfo(dtype).max / 8
    gamma, beta = rng.normal(size=(2, n)).astype(dtype)

    def all_of_it(offset):
        out, dx, plain = (np.empty(x.size + 16, dtype)[offset:][: x.size].reshape(x.shape) for _ in range(3))
        _, mean, inv_std = F.batch_norm(x, gamma, beta, residual=residual, activation="relu", out=out)
        F.batch_norm_backward(dy, x, mean, inv_std, gamma, out=dx)
        F.batch_norm(x, gamma, beta, out=plain)
        return [out, dx, plain]

    with bnfast.num_threads(1):
        expected = all_of_it(0)
        mean, inv_std = F.batch_norm(x, gamma, beta)[1:3]
        assert_y(expected[2], x, mean, inv_std, gamma, beta)
        ends = [0, -1]
        of_ends = [np.ascontiguousarray(a[:, ends]) for a in (x, residual, dy)]
        y = np.maximum(F.batch_norm(of_ends[0], gamma[ends], beta[ends], residual=of_ends[1])[0], 0)
        assert_same_bits(expected[0][:, ends], y)
        dx, *_ = F.batch_norm_backward(of_ends[2], of_ends[0], mean[ends], inv_std[ends], gamma[ends])
        assert_same_bits(expected[1][:, ends], dx)
        for offset in range(1, 16):
            for one, other in zip(expected, all_of_it(offset), strict=True):
                assert_same_bits(one, other, offset)
