"""A batch in parts: moments merged, each part normalised with them, sums of the backward added, each part's gradient.

What the functions are on a whole is in test_fused.py; `Sums` itself is in statistics/test_sums.py.
"""

import itertools

import numpy as np
import pytest
from activations import SLOPE, batch
from tolerances import TABLE, absolute, along, assert_same_bits, assert_within, others, table, wide

import bnfast
from bnfast import functional as F
from bnfast.functional import Sums

SHAPES = [((60, 5), 1), ((12, 4, 30), 1), ((12, 7, 6), -1), ((9, 4, 5, 6), 1), ((40, 3), 1)]
CUTS = {  # where the first axis is cut
    "halves": lambda n: [n // 2],
    "one_row_each": lambda n: list(range(1, n)),
    "nothing_in_some": lambda n: [0, 0, 1, n // 3, n // 3, n],
    "whole": lambda n: [],
}
COMBINATIONS = [(None, False), (None, True), ("relu", False), ("relu6", True), ("leaky_relu", True)]
every_shape = pytest.mark.parametrize(("shape", "axis"), SHAPES, ids=str)
every_cut = pytest.mark.parametrize("cut", CUTS)
every_combination = pytest.mark.parametrize("combination", COMBINATIONS, ids=str)


def slices(n, cut):
    edges = [0, *CUTS[cut](n), n]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def options_of(data, activation, with_residual, rows=np.s_[:], mask=None):
    return {
        "axis": data.axis, "activation": activation, "negative_slope": SLOPE,
        "residual": data.residual[rows] if with_residual else None, "mask": None if mask is None else mask[rows],
    }  # fmt: skip


def in_parts(data, activation, with_residual, rows, mask=None):
    """y, statistics and gradients of a batch that nobody holds as a whole."""
    options = [options_of(data, activation, with_residual, part, mask) for part in rows]
    parts = [
        bnfast.moments(data.x[part], axis=data.axis, mask=option["mask"])
        for part, option in zip(rows, options, strict=True)
    ]
    m = sum(parts)
    inv_std = 1 / np.sqrt(m.var() + 1e-5)
    y, dx, dresidual, sums = [], [], [], []
    for part, option in zip(rows, options, strict=True):
        y.append(F.batch_norm_eval(data.x[part], m.mean, m.var(), data.gamma, data.beta, **option))
        given = data.dy[part], data.x[part], m.mean, inv_std, data.gamma
        sums.append(F.batch_norm_backward_sums(*given, beta=data.beta, **option))
    whole = Sums.merge(sums)
    for part, option in zip(rows, options, strict=True):
        given = data.dy[part], data.x[part], m.mean, inv_std, data.gamma
        found = F.batch_norm_backward_apply(*given, whole, beta=data.beta, **option)
        dx.append(found[0] if with_residual else found)
        dresidual += [found[1]] if with_residual else []
    joined = [np.concatenate(arrays) for arrays in (y, dx, *[dresidual][:with_residual])]
    return *joined, whole, m.mean, inv_std


def batch_away_from_kinks(shape, axis, dtype):
    """None of it so near a kink that statistics of another rounding choose another side."""
    data = batch(shape, dtype, axis, at_kinks=False)
    y = F.batch_norm(data.x.astype(np.float64), data.gamma, data.beta, axis=axis)[0]
    for with_residual in (False, True):
        met = y + data.residual if with_residual else y
        data.dy[np.minimum(abs(met), abs(met - 6)) < 1e-4] = 0  # there y is continuous, and a gradient of 0 is 0
    return data


def check(data, combination, rows, mask=None):
    """Parts against the whole: twice what the table allows either of them."""
    activation, with_residual = combination
    y, dx, *dresidual, sums, mean, inv_std = in_parts(data, activation, with_residual, rows, mask)
    options = options_of(data, activation, with_residual, mask=mask)
    y_whole, mean_whole, inv_std_whole = F.batch_norm(data.x, data.gamma, data.beta, **options)
    given = data.dy, data.x, mean_whole, inv_std_whole, data.gamma
    dx_whole, dgamma, dbeta, *dresidual_whole = F.batch_norm_backward(*given, beta=data.beta, **options)
    tolerance, axis = table(data.x), data.axis
    std = 1 / inv_std_whole
    assert_within(
        mean, wide(mean_whole), 2 * (tolerance.mean * std + tolerance.mean_rounding * abs(mean_whole)), "mean"
    )
    # eps apart: relative errors of the variance are halved by the root
    assert_within(inv_std, wide(inv_std_whole), 2 * (tolerance.var + tolerance.var_share) * inv_std_whole, "inv_std")

    there = np.ones(data.x.shape, bool) if mask is None else np.expand_dims(mask, axis % data.x.ndim)
    there = np.broadcast_to(there, data.x.shape)
    gamma, beta = absolute(along(data.gamma, data.x, axis), 1), absolute(along(data.beta, data.x, axis), 0)
    kappa = abs(along(mean, data.x, axis)) * along(inv_std, data.x, axis)
    x_hat = (wide(data.x) - along(mean, data.x, axis)) * along(inv_std, data.x, axis)
    bound = 2 * (tolerance.y * (gamma * (1 + abs(x_hat)) + beta) + tolerance.y_mean * gamma * kappa)
    bound += np.finfo(data.x.dtype).eps * (gamma * abs(x_hat) + beta + abs(data.residual))  # of the sum, the product
    # and the statistics' own, above
    bound += 2 * gamma * (tolerance.mean + abs(x_hat) * (tolerance.var + tolerance.var_share))
    bound += 2 * gamma * tolerance.mean_rounding * kappa
    assert_within(y, wide(y_whole), bound, "y")
    assert not y[~there].any()
    assert not dx[~there].any()

    assert sums.count == there.sum() // len(data.gamma)
    terms = abs(np.where(there, wide(data.dy), 0))
    of_mean = (tolerance.sums + tolerance.mean_argument * kappa).max() + tolerance.mean + tolerance.var
    size = (terms * abs(x_hat)).sum(others(data.x, axis))
    assert_within(sums.dgamma, wide(dgamma), 2 * of_mean * (size + terms.sum(others(data.x, axis))), "dgamma")
    assert_within(sums.dbeta, wide(dbeta), 2 * tolerance.sums * terms.sum(others(data.x, axis)), "dbeta")

    def norm(array):
        return np.sqrt((wide(array) ** 2).sum(others(data.x, axis)))

    size = norm(np.where(there, data.dy, 0)) * abs(wide(inv_std)) * abs(wide(data.gamma))
    allowed = 2 * (tolerance.dx + (tolerance.mean_argument * kappa).max() + tolerance.var + tolerance.var_share)
    assert_within(norm(dx - dx_whole), 0 * size, allowed * size, "dx")
    for found, expected in zip(dresidual, dresidual_whole, strict=True):
        assert_same_bits(found, expected)


@every_shape
@every_cut
@every_combination
def test_parts_are_the_whole(shape, axis, cut, combination, dtype):
    data = batch_away_from_kinks(shape, axis, dtype)
    check(data, combination, slices(shape[0], cut))


@every_shape
@every_cut
@every_combination
def test_masked_parts_are_the_whole(shape, axis, cut, combination, dtype):
    """Some parts have no position that takes part."""
    data = batch_away_from_kinks(shape, axis, dtype)
    mask = np.random.default_rng(5).random(np.delete(shape, axis)) < 0.6
    mask[: len(mask) // 4] = False
    y = F.batch_norm(data.x.astype(np.float64), data.gamma, data.beta, axis=axis, mask=mask)[0]
    for met in (y, y + data.residual):
        data.dy[np.minimum(abs(met), abs(met - 6)) < 1e-4] = 0  # see batch_away_from_kinks
    check(data, combination, slices(shape[0], cut), mask)


def test_any_elements_may_be_a_part(dtype):
    """Every second row, the left of images: views, of a channels-last array too."""
    data = batch((8, 6, 10, 3), dtype, axis=-1)
    mean, inv_std = np.linspace(-1, 1, 3), np.linspace(0.5, 2, 3)
    parts = [np.s_[::2, :, :4], np.s_[::2, :, 4:], np.s_[1::2, 3:], np.s_[1::2, :3][:2]]

    def sums_of(part):
        given = data.dy[part], data.x[part], mean, inv_std, data.gamma
        options = {"beta": data.beta, "axis": -1, "residual": data.residual[part], "activation": "relu"}
        return F.batch_norm_backward_sums(*given, **options)

    whole, sums = sums_of(np.s_[:]), sum(map(sums_of, parts))
    assert sums.count == whole.count == 480
    terms = abs(data.dy * (1 + abs((data.x - mean) * inv_std))).sum((0, 1, 2))
    for name in ("dgamma", "dbeta"):
        difference = abs(getattr(sums, name) - getattr(whole, name))
        assert (difference <= 2 * TABLE[np.dtype(dtype).name].sums * terms).all()


@pytest.mark.parametrize("shape", [(20, 3), (6, 4, 30), (9, 4, 3)], ids=str)
def test_the_count_is_that_of_the_sums(shape, isa, dtype):
    """M of the formulas: with that of a batch twice as large, of which this is one half."""
    data = batch(shape, dtype)
    mean, var = bnfast.moments(data.x).mean, bnfast.moments(data.x).var()
    given = data.dy, data.x, mean, 1 / np.sqrt(var + 1e-5), data.gamma
    sums = F.batch_norm_backward_sums(*given)
    twice = Sums(2 * sums.count, 2 * sums.dgamma, 2 * sums.dbeta)
    assert sums + sums == twice
    assert_same_bits(F.batch_norm_backward_apply(*given, twice), F.batch_norm_backward(*given)[0])
    none = Sums(10**6, 0 * sums.dgamma, 0 * sums.dbeta)  # nothing flows through the statistics
    expected = F.batch_norm_backward(*given, training=False)[0]
    np.testing.assert_array_equal(F.batch_norm_backward_apply(*given, none), expected)  # but for the sign of zero


def test_an_empty_part_has_sums_of_nothing_and_an_empty_gradient(dtype):
    whole = Sums(7, [1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    for shape in ((0, 3), (0, 3, 4), (5, 3, 0)):
        x = np.empty(shape, dtype)
        for residual in (None, x):
            options = {"residual": residual, "activation": "relu"}
            sums = F.batch_norm_backward_sums(x, x, np.zeros(3), np.ones(3), **options)
            assert sums == Sums(0, np.zeros(3), np.zeros(3))
            found = F.batch_norm_backward_apply(x, x, np.zeros(3), np.ones(3), None, whole, **options)
            for array in (found,) if residual is None else found:
                assert_same_bits(array, x)


def test_one_value_a_channel_is_enough_for_a_part(dtype):
    x, dy = np.array([[1.0, 5.0]], dtype), np.array([[2.0, -3.0]], dtype)
    sums = F.batch_norm_backward_sums(dy, x, np.array([0.0, 4.0]), np.array([2.0, 3.0]))
    assert sums == Sums(1, [4.0, -9.0], [2.0, -3.0])
    whole = Sums(4, [4.0, 8.0], [4.0, 0.0])
    dx = F.batch_norm_backward_apply(dy, x, np.array([0.0, 4.0]), np.array([2.0, 3.0]), None, whole)
    # inv_std * (dy - dbeta/M - x_hat * dgamma/M), all of it exact
    assert_same_bits(dx, np.array([[2 * (2 - 1 - 2 * 1), 3 * (-3 - 0 - 3 * 2)]], dtype))


def test_sums_are_float64_whatever_the_data():
    dy = np.zeros((200, 2), np.float32)
    dy[0], dy[100] = 2**24, 1
    given = dy, np.zeros_like(dy), np.zeros(2), np.ones(2)
    assert F.batch_norm_backward_sums(*given).dbeta.tolist() == [2**24 + 1] * 2  # no float32
    assert F.batch_norm_backward(*given)[2].tolist() == [2**24] * 2
