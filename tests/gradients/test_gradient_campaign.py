"""Checks of gradients over many random layers: right ones are never called wrong, planted bugs always.

The short form looks at a few; `pytest -m campaign tests/gradients/test_gradient_campaign.py` at 1,000 right layers of
each dtype and 500 with bugs (5 minutes).
"""

import collections
import copy

import numpy as np
import pytest
from layers import Chain

from bnfast import BatchNorm, check_layer
from bnfast.commands.network import Linear, ReLU


class Curved:
    """y = a*x + b*sin(c*x) by columns, of sizes from 1 down to 1e-9."""

    def __init__(self, n, rng, dtype):
        smallest = rng.choice([0, -2, -9])
        self.values = {
            "a": (rng.normal(size=n) * 10 ** rng.uniform(smallest, 0, n)).astype(dtype),
            "b": (rng.normal(size=n) * 10 ** rng.uniform(smallest, 0, n)).astype(dtype),
        }
        self.c = rng.uniform(0.2, 1, n).astype(dtype)
        self.sums = {}

    def forward(self, x):
        self.x = x
        return self.values["a"] * x + self.values["b"] * np.sin(self.c * x)

    def backward(self, dy):
        sine, cosine = np.sin(self.c * self.x), np.cos(self.c * self.x)
        self.sums = {"a": (dy * self.x).sum(0), "b": (dy * sine).sum(0)}
        return dy * (self.values["a"] + self.values["b"] * self.c * cosine)

    def parameters(self):
        return self.values

    def gradients(self):
        return self.sums


class AddsUp:
    """A layer around another that adds up its gradients; `hidden`: and gives copies of them."""

    def __init__(self, layer, hidden):
        self.layer, self.hidden, self.sums = layer, hidden, {}

    def forward(self, x):
        return self.layer.forward(x)

    def backward(self, dy):
        dx = self.layer.backward(dy)
        for name, value in self.layer.gradients().items():
            self.sums[name] = self.sums.get(name, 0) + np.array(value)
        return dx

    def parameters(self):
        return self.layer.parameters()

    def gradients(self):
        return copy.deepcopy(self.sums) if self.hidden else self.sums


class Bugged:
    """A layer around another, one of whose claims has one column, or entry, with a wrong sign, or none, or 1 % more."""

    def __init__(self, layer, name, column, factor):
        self.layer, self.name, self.column, self.factor = layer, name, column, factor

    def forward(self, x):
        return self.layer.forward(x)

    def _changed(self, value):
        value = np.array(value)
        value[..., self.column] *= self.factor
        return value

    def backward(self, dy):
        dx = self.layer.backward(dy)
        return self._changed(dx) if self.name == "x" else dx

    def parameters(self):
        return self.layer.parameters()

    def gradients(self):
        return {
            name: self._changed(value) if name == self.name else value for name, value in self.layer.gradients().items()
        }


def right_layer(rng, dtype):
    """-> (layer, x)"""
    n_rows, n = int(rng.integers(3, 33)), int(rng.integers(1, 9))
    sizes = 10 ** rng.uniform(rng.choice([0, -2, -8]), 1, n)
    x = (rng.normal(10 ** rng.uniform(-2, 2), 1, (n_rows, n)) * sizes).astype(dtype)
    bn = BatchNorm(n, dtype=dtype, momentum=0.5)
    bn.gamma[:] = rng.normal(size=n) * 10 ** rng.uniform(rng.choice([0, -2, -9]), 0, n)
    bn.beta[:] = rng.normal(size=n) * rng.choice([0, 1])
    curved = Curved(n, rng, dtype)
    linear = Linear(n, 4, rng, dtype)
    kinds = [
        lambda: bn,
        lambda: curved,
        lambda: linear,
        lambda: Chain(curved, bn),
        lambda: Chain(bn, curved),
        lambda: Chain(linear, BatchNorm(4, dtype=dtype), ReLU(), Linear(4, 2, rng, dtype)),
        lambda: Chain(bn, linear, Curved(4, rng, dtype)),
    ]
    layer = kinds[rng.integers(len(kinds))]()
    if rng.random() < 0.2:
        layer = AddsUp(layer, bool(rng.integers(2)))
        layer.forward(x)
        layer.backward(np.ones_like(layer.forward(x)))
    return layer, x


def bugged_layer(rng):
    """A right layer of float64 with a bug that changes a column, or an entry, of 1e-8 or more of a gradient."""
    while True:
        layer, x = right_layer(rng, np.float64)
        work = copy.deepcopy(layer)
        dx = work.backward(rng.normal(size=work.forward(x).shape))
        claims = {"x": dx, **work.gradients()}
        name = list(claims)[rng.integers(len(claims))]
        sizes = np.sqrt(np.mean(np.square(claims[name]), axis=tuple(range(claims[name].ndim - 1))))
        eligible = np.flatnonzero(
            sizes > 1e-8 * np.abs(claims["x"]).max() if name == "x" else sizes > 1e-8 * sizes.max()
        )
        if len(eligible) and sizes.max() > 1e-6:
            factor = rng.choice([-1.0, 0.0, 1.5])
            return Bugged(layer, name, int(rng.choice(eligible)), factor), x


def campaign(n, make):
    verdicts, shown = collections.Counter(), []
    for seed in range(n):
        layer, x = make(np.random.default_rng(seed))
        with np.errstate(all="ignore"):
            check = check_layer(layer, x, rng=seed)
        verdicts[check.verdict] += 1
        shown.append((seed, check))
    return verdicts, shown


def no_right_layer_is_wrong(n, dtype):
    verdicts, shown = campaign(n, lambda rng: right_layer(rng, dtype))
    print(f"{n} right layers of {np.dtype(dtype)}: {dict(verdicts)}")
    assert [seed for seed, check in shown if check.verdict == "wrong"] == []
    return verdicts


def every_bug_is_found(n):
    verdicts, shown = campaign(n, bugged_layer)
    print(f"{n} layers with bugs: {dict(verdicts)}")
    assert [seed for seed, check in shown if check.verdict != "wrong"] == []


def test_right_layers_are_not_wrong(dtype):
    assert no_right_layer_is_wrong(25, dtype)["ok"] > 10


def test_planted_bugs_are_found():
    every_bug_is_found(15)


@pytest.mark.campaign
def test_a_thousand_right_layers_are_not_wrong(dtype):
    no_right_layer_is_wrong(1000, dtype)


@pytest.mark.campaign
def test_five_hundred_planted_bugs_are_found():
    every_bug_is_found(500)
