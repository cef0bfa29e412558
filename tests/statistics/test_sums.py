"""Sums of a backward pass: immutable, added up, pickled. What they are sums of is in test_backward_in_parts.py."""

import copy
import math
import pickle
import pickletools

import numpy as np
import pytest
from tolerances import assert_same_bits

from bnfast import functional as F
from bnfast.functional import Sums


def numbers(seed, channels=3):
    rng = np.random.default_rng(seed)
    return Sums(int(rng.integers(1, 9)), rng.normal(size=channels), rng.normal(size=channels))


# --- made, and never changed -----------------------------------------------------------------------------------


def test_values_are_copies_in_float64_that_nobody_changes():
    dgamma = np.array([1, 2], np.float32)
    sums = Sums(np.int64(4), dgamma, [3, 4])
    dgamma[0] = 9
    assert_same_bits(sums.dgamma, np.array([1.0, 2.0]))
    assert_same_bits(sums.dbeta, np.array([3.0, 4.0]))
    assert type(sums.count) is int
    for array in (sums.dgamma, sums.dbeta):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1
    for name in ("count", "dgamma", "dbeta"):
        with pytest.raises(AttributeError):
            setattr(sums, name, getattr(sums, name))
        with pytest.raises(AttributeError):
            delattr(sums, name)
    with pytest.raises((AttributeError, TypeError)):
        sums.another = 1


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((-1, [1.0], [1.0]), ValueError, ["count", "at least 0", "-1"]),
        ((1.0, [1.0], [1.0]), TypeError, ["count", "int", "float"]),
        ((True, [1.0], [1.0]), TypeError, ["count", "int"]),
        ((None, [1.0], [1.0]), TypeError, ["count", "int", "NoneType"]),
        ((1, [1.0], [1.0, 2.0]), ValueError, ["dbeta", "(1,)", "(2,)"]),
        ((1, 1.0, 1.0), ValueError, ["dgamma", "()"]),
        ((1, [[1.0]], [[1.0]]), ValueError, ["dgamma", "(1, 1)"]),
        ((1, ["a"], [1.0]), TypeError, ["dgamma", "real numbers", "<U1"]),
        ((1, [1.0], [1j]), TypeError, ["dbeta", "real numbers", "complex128"]),
        ((1, [1.0], [True]), TypeError, ["dbeta", "real numbers", "bool"]),
        ((1, None, [1.0]), TypeError, ["dgamma", "real numbers", "object"]),
    ],
)
def test_wrong_values_are_refused(arguments, error, words):
    with pytest.raises(error) as caught:
        Sums(*arguments)
    for word in words:
        assert word in str(caught.value)


def test_it_prints_as_it_is_made():
    sums = Sums(6, [1.5], [4.0])
    assert repr(sums) == "Sums(count=6, dgamma=array([1.5]), dbeta=array([4.]))"
    assert eval(repr(sums), {"Sums": Sums, "array": np.array}) == sums


# --- added up --------------------------------------------------------------------------------------------------


def test_sums_add_up():
    a, b = numbers(0), numbers(1)
    both = a + b
    assert both.count == a.count + b.count
    assert_same_bits(both.dgamma, a.dgamma + b.dgamma)
    assert_same_bits(both.dbeta, a.dbeta + b.dbeta)


def test_the_sum_of_a_list_begins_with_its_first():
    parts = [numbers(seed) for seed in range(4)]
    assert sum(parts) == parts[0] + parts[1] + parts[2] + parts[3]
    assert sum(parts[:1]) == parts[0]


def test_a_sum_of_nothing_changes_nothing():
    parts, nothing = numbers(3), Sums(0, np.zeros(3), np.zeros(3))
    assert parts + nothing == nothing + parts == parts


@pytest.mark.parametrize("n", range(1, 10))
def test_merge_is_a_tree_in_the_order_of_the_parts(n):
    """Neighbours are added, then neighbouring sums: with these numbers every other order gives other bits."""
    values = 1.0 + np.random.default_rng(n).random(n) * 2.0 ** np.arange(0, 3 * n, 3)
    parts = [Sums(1, [value], [-value]) for value in values]

    def tree(values):
        if len(values) == 1:
            return values[0]
        return tree([sum(values[i : i + 2]) for i in range(0, len(values), 2)])

    merged = Sums.merge(iter(parts))
    assert merged.count == n
    assert merged.dgamma[0] == -merged.dbeta[0] == tree(list(values))
    assert merged.dgamma[0] == pytest.approx(math.fsum(values), rel=1e-15 * n)  # a rounding for each addition


def test_merge_of_neighbouring_halves_is_that_of_all():
    """Where each half is a whole tree, as of processes that have merged their own parts."""
    values = np.random.default_rng(1).normal(size=8) * 10.0 ** np.arange(8)
    parts = [Sums(2, [value], [value]) for value in values]
    halves = [Sums.merge(parts[:4]), Sums.merge(parts[4:])]
    assert Sums.merge(halves) == Sums.merge(parts)
    assert Sums.merge(halves) != sum(parts)


def test_what_does_not_add_up_is_refused():
    sums = numbers(0)
    with pytest.raises(ValueError, match="3 channels, got 2"):
        sums + numbers(0, channels=2)
    with pytest.raises(ValueError, match="at least one"):
        Sums.merge([])
    for other in (1, 0, None, (1, [1.0], [1.0]), sums.dgamma.tolist()):
        with pytest.raises(TypeError):
            sums + other
    for other in (1, 0.0, None, ()):
        with pytest.raises(TypeError):
            other + sums


# --- compared, copied, pickled ---------------------------------------------------------------------------------


def test_equal_sums_have_equal_values_and_hashes():
    sums = Sums(3, [1.0, np.nan], [0.0, 2.0])
    same = Sums(3, [1.0, np.nan], [-0.0, 2.0])
    assert sums == same
    assert hash(sums) == hash(same)
    for other in (Sums(4, [1.0, np.nan], [0.0, 2.0]), Sums(3, [1.5, np.nan], [0.0, 2.0]),
                  Sums(3, [1.0, np.nan], [0.0, 2.5]), Sums(3, [1.0], [0.0]), (3, [1.0], [0.0]), None):  # fmt: skip
        assert sums != other


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_come_back_to_the_bit(protocol):
    sums = Sums(2**62, [1e300, -0.0, np.nan], [np.inf, 5e-324, 1 / 3])
    pickled = pickle.dumps(sums, protocol)
    again = pickle.loads(pickled)
    assert type(again) is Sums
    assert again.count == sums.count
    assert_same_bits(again.dgamma, sums.dgamma)
    assert_same_bits(again.dbeta, sums.dbeta)
    assert not again.dgamma.flags.writeable
    strings = {argument for _, argument, _ in pickletools.genops(pickled) if isinstance(argument, str)}
    assert strings & {"bnfast.functional", "bnfast.functional Sums"}


def test_copies_are_equal():
    sums = numbers(5)
    for again in (copy.copy(sums), copy.deepcopy(sums)):
        assert again == sums
        assert not again.dbeta.flags.writeable


def test_it_is_public_in_functional_alone():
    assert F.Sums is Sums
    assert Sums.__module__ == "bnfast.functional"
