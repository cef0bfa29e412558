"""Gamma and gradients so small that results are subnormal: right, the same for every plan, and made by no instruction
that a subnormal goes into or comes from, as those take some CPUs a hundred times as long.

That last is seen where such instructions give zeros (FTZ, DAZ): the results have the same bits there.
"""

import numpy as np
import pytest
from tolerances import assert_same_bits

import bnfast
from bnfast import BatchNorm, _core, reference
from bnfast import functional as F

SHAPES = [(64, 5), (40, 700), (6, 5, 40), (3, 70, 9, 9), (50, 9, 3), (2, 3, 20000)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def least(dtype):
    return float(np.finfo(dtype).smallest_subnormal)


def tiny(dtype):
    """Sizes of gammas: subnormal, just above that, and as small as some of what they make."""
    smallest = float(np.finfo(dtype).smallest_normal)
    return [smallest / 100, -smallest / 3e4, 1.5 * smallest, smallest * 1e3, -least(dtype)]


def drawn(shape, dtype, rng):
    """x, dy, gamma, beta; every other channel's gamma is tiny, some with a beta that is not."""
    x, dy = rng.normal(size=(2, *shape)).astype(dtype)
    gamma, beta = rng.normal(size=(2, shape[1]))
    beta[::2] = 0
    gamma[::2] = np.resize(tiny(dtype), gamma[::2].size)
    beta[::8] = 0.25
    beta[4::8] = gamma[4::8]
    return x, dy, gamma, beta


def wide(*arrays):
    return [np.asarray(a).astype(np.longdouble) for a in arrays]


def along_channels(a, ndim):
    return np.asarray(a)[(None, slice(None), *[None] * (ndim - 2))]


def assert_near(found, exact, size, dtype, least_numbers=0.51):
    """Within some roundings of what it is made of, plus one of the least number."""
    unit = 5e-7 if dtype is np.float32 else 2e-15
    assert found.dtype == dtype
    assert (abs(found - exact) <= unit * size + least_numbers * least(dtype)).all()


@shapes
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
def test_results_of_tiny_gammas(shape, dtype, activation, isa, rng):
    x, dy, gamma, beta = drawn(shape, dtype, rng)
    slope = {"leaky_relu": 0.25, "relu": 0.0}.get(activation, 1.0)
    y, mean, inv_std = F.batch_norm(x, gamma, beta, activation=activation, negative_slope=0.25)
    var = rng.uniform(0.5, 2, size=shape[1])
    evaluated = F.batch_norm_eval(x, mean, var, gamma, beta, activation=activation, negative_slope=0.25)
    for found, given in ((evaluated, 1 / np.sqrt(wide(var)[0] + 1e-5)), (y, inv_std)):
        hats = (wide(x)[0] - along_channels(mean, x.ndim)) * along_channels(given, x.ndim)
        v = hats * along_channels(gamma, x.ndim) + along_channels(beta, x.ndim)
        size = abs(along_channels(gamma, x.ndim)) * (1 + abs(hats)) + abs(along_channels(beta, x.ndim))
        # of float64 a forward has the digits of its scale that are there
        least_numbers = 4 * (1 + abs(hats)) if found is y and dtype is np.float64 else 0.51
        assert_near(found, np.where(v > 0, v, slope * v), size, dtype, least_numbers)
    if activation is None:
        dx, dgamma, dbeta = F.batch_norm_backward(dy, x, mean, inv_std, gamma)
        wanted = reference.batch_norm_backward(*wide(dy, x, mean, inv_std, gamma))
        size = abs(along_channels(gamma * inv_std, x.ndim)) * (1 + abs(hats)) * 4
        assert_near(dx, wanted[0], size, dtype)
        assert np.allclose(dgamma, wanted[1].astype(float), rtol=1e-5, atol=1e-4)
        assert np.allclose(dbeta, wanted[2].astype(float), rtol=1e-5, atol=1e-4)


def all_calls(x, dy, gamma, beta, in_halves=True):
    """Every call that may leave results times a power of two meanwhile, in place where it can be."""
    y, mean, inv_std = F.batch_norm(x, gamma, beta)
    var = 1 / inv_std**2
    into = x.copy()
    F.batch_norm(into, gamma, beta, out=into)
    found = [y, into, F.batch_norm_eval(x, mean, var, gamma, beta, activation="relu")]
    found += F.batch_norm_backward(dy, x, mean, inv_std, gamma)
    over = dy.copy()
    found.append(F.batch_norm_backward(over, x, mean, inv_std, gamma, out=over)[0])
    over = x.copy()
    found.append(F.batch_norm_backward(dy, over, mean, inv_std, gamma, out=over)[0])
    sums = F.batch_norm_backward_sums(dy, x, mean, inv_std, gamma)
    found += [sums.dgamma, sums.dbeta]
    if in_halves:
        found.append(F.batch_norm_backward_apply(dy, x, mean, inv_std, gamma, sums=sums))
    for training in (True, False):
        bn = BatchNorm(x.shape[1], dtype=x.dtype, activation="relu").train(training)
        bn(x, residual=x)
        found += [*bn.backward(dy), bn.grad_gamma, bn.grad_beta]
    return found


def assert_all_the_same(found, expected):
    assert len(found) == len(expected)
    for each, other in zip(found, expected, strict=True):
        assert_same_bits(each, other)


def with_baseline(function, *arguments):
    before = _core.isa()
    _core.select_isa("baseline")
    try:
        return function(*arguments)
    finally:
        _core.select_isa(before)


CASES = ["gamma", "dy"]


def case(which, shape, dtype, rng):
    x, dy, gamma, beta = drawn(shape, dtype, rng)
    if which == "gamma":
        return x, dy, gamma, beta
    return x, dy * dtype(np.finfo(dtype).smallest_normal / 8), np.abs(gamma) % 1 + 1, beta


PLANS = [
    {"kind": "blocks"},
    {"kind": "phases"},
    {"kind": "phases", "stream": True},
    {"near": True},
    {"kind": "blocks", "pack": True},
    {"kind": "blocks", "written_later": True},
]


@shapes
@pytest.mark.parametrize("which", CASES)
def test_the_bits_of_every_plan_and_instruction_set(shape, dtype, which, rng, force_plan, isa):
    given = case(which, shape, dtype, rng)
    with bnfast.num_threads(1):
        expected = all_calls(*given)
    assert_all_the_same(with_baseline(all_calls, *given), expected)
    for plan in PLANS:
        force_plan(**plan)
        for threads in (1, 2):
            with bnfast.num_threads(threads):
                assert_all_the_same(all_calls(*given), expected)


@shapes
@pytest.mark.parametrize("which", CASES)
def test_no_instruction_meets_a_subnormal(shape, dtype, which, isa, rng, flushed):
    if dtype is np.float64 and which == "gamma":
        pytest.skip("what there is one of a channel, in float64, is subnormal itself, and would be zero")
    x, dy, gamma, beta = case(which, shape, dtype, rng)
    normal = np.finfo(dtype).smallest_normal
    if which == "dy":
        beta[abs(beta) < normal] = 0

    def arrays():
        return [a for a in all_calls(x, dy, gamma, beta, in_halves=dtype is np.float32) if a.ndim > 1]

    expected = arrays()
    assert sum(((abs(a) < normal) & (a != 0)).any() for a in expected) > 3
    assert_all_the_same(flushed(arrays), expected)


@shapes
def test_other_channels_do_not_notice(shape, dtype, rng):
    x, dy, gamma, beta = drawn(shape, dtype, rng)
    ordinary = gamma.copy()
    ordinary[::2] = 1
    odd = (slice(None), slice(1, None, 2))
    y, mean, inv_std = F.batch_norm(x, gamma, beta)
    assert np.array_equal(y[odd], F.batch_norm(x, ordinary, beta)[0][odd])
    dx = [F.batch_norm_backward(dy, x, mean, inv_std, g)[0] for g in (gamma, ordinary)]
    assert np.array_equal(dx[0][odd], dx[1][odd])


def test_nan_infinity_and_the_far_stay(dtype):
    gamma = np.array([np.finfo(dtype).smallest_normal / 8])
    far = float(np.finfo(dtype).max) / 2
    x = np.array([[np.nan], [np.inf], [-np.inf], [far], [0]], dtype)
    y = F.batch_norm_eval(x, [0.0], [1.0], gamma)
    assert np.isnan(y[0, 0])
    assert list(y[1:3, 0]) == [np.inf, -np.inf]
    assert y[3, 0] == pytest.approx(far * gamma[0], rel=1e-5)
    assert y[4, 0] == 0


def test_residuals_and_tops_are_as_before(dtype, rng):
    """They are not small, so nothing is taken times anything."""
    x, residual = rng.normal(size=(2, 40, 3)).astype(dtype)
    gamma = np.full(3, np.finfo(dtype).smallest_normal / 8)
    assert np.array_equal(F.batch_norm(x, gamma, residual=residual)[0], residual)
    beta = np.full(3, 7.0)
    assert (F.batch_norm(x, gamma, beta, activation="relu6")[0] == 6).all()


@pytest.mark.parametrize("places", ["few", "beside large ones", "beside infinity"])
def test_a_gradient_that_is_subnormal_in_places(places, dtype, rng):
    x = rng.normal(size=(64, 5)).astype(dtype)
    dy = (rng.normal(size=(64, 5)) * np.finfo(dtype).smallest_normal / 8).astype(dtype)
    if places == "few":
        dy[16:] = rng.normal(size=(48, 5)) * 1e-3
    else:
        dy[7, 2] = np.inf if places == "beside infinity" else np.finfo(dtype).max / 4
    _, mean, inv_std = F.batch_norm(x)
    before = dy.copy()
    dx, dgamma, dbeta = F.batch_norm_backward(dy, x, mean, inv_std)
    assert np.array_equal(dy, before)
    with np.errstate(all="ignore"):
        wanted = reference.batch_norm_backward(*wide(dy, x, mean, inv_std))
    sound = np.isfinite(wanted[0].astype(dtype)).all(axis=0)
    assert sound.sum() == (4 if places == "beside infinity" else 5)
    for found, exact in zip((dx[:, sound], dgamma[sound], dbeta[sound]),
                            (wanted[0][:, sound], wanted[1][sound], wanted[2][sound]), strict=True):  # fmt: skip
        size = abs(exact).max(axis=0)
        assert (abs(found - exact) <= 2e-6 * size + 2 * least(dtype)).all()


@pytest.mark.parametrize("into", ["new", "dy", "x"])
def test_a_gradient_whose_results_are_large(dtype, into, rng):
    """What would be too large times a power of two is computed as it is."""
    x, dy = rng.normal(size=(2, 64, 2)).astype(dtype)
    dy *= dtype(np.finfo(dtype).smallest_normal / 8)
    dy[5] = 0.5
    gamma = np.full(2, 2.0 * np.finfo(dtype).max ** 0.25)
    _, mean, inv_std = F.batch_norm(x)
    exact = reference.batch_norm_backward(*wide(dy, x, mean, inv_std, gamma))
    found = F.batch_norm_backward(dy, x, mean, inv_std, gamma, out={"dy": dy, "x": x}.get(into))
    for each, wanted in zip(found, exact, strict=True):
        assert (abs(each - wanted) <= 1e-5 * abs(wanted).max()).all()


def test_sums_of_a_part_that_is_larger(dtype, rng):
    x = rng.normal(size=(64, 2)).astype(dtype)
    small = (rng.normal(size=(64, 2)) * np.finfo(dtype).smallest_normal / 8).astype(dtype)
    large = (rng.normal(size=(64, 2)) * np.finfo(dtype).max ** 0.25).astype(dtype)
    mean, inv_std = np.zeros(2), np.ones(2)
    sums = F.batch_norm_backward_sums(small, x, mean, inv_std) + F.batch_norm_backward_sums(large, x, mean, inv_std)
    dx = F.batch_norm_backward_apply(small, x, mean, inv_std, None, sums=sums)
    exact = small.astype(np.longdouble) - (sums.dbeta + x * sums.dgamma) / 128
    assert np.isfinite(dx).all()
    assert (abs(dx - exact) <= 1e-5 * abs(exact).max()).all()


def test_float64_keeps_what_its_mean_was_rounded_by(rng):
    x = 1e9 + rng.normal(size=(1000, 3))
    y, _, _ = F.batch_norm(x)
    tiny_y, _, _ = F.batch_norm(x, np.full(3, 1e-290))
    assert (abs(tiny_y * 1e290 - y) <= 1e-15 * (1 + abs(y))).all()


def test_a_large_gradient_through_a_subnormal_gamma(rng):
    """The digits that its product with inv_std would lose are not small beside such a gradient."""
    x, dy = rng.normal(size=(2, 64, 2))
    dy *= 1e250
    gamma = np.full(2, 1.5e-323)
    _, mean, inv_std = F.batch_norm(x * 0.1)
    dx, _, _ = F.batch_norm_backward(dy, x * 0.1, mean, inv_std, gamma)
    exact = reference.batch_norm_backward(*wide(dy, x * 0.1, mean, inv_std, gamma))[0]
    assert (abs(dx - exact) <= 1e-13 * abs(exact).max()).all()
