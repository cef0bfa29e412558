"""Layers for tests, and what to compare of them."""

import sys
import threading

import numpy as np

from bnfast import BatchNorm

CHANNELS = 3
EPS = 1e-5


def batch(n_rows=8, seed=0, mean=5.0, std=2.0, dtype=np.float64, channels=CHANNELS):
    """(n_rows, channels), a different mean and spread in each channel."""
    values = np.random.default_rng(seed).normal(mean, std, (n_rows, channels))
    return (values * np.arange(1, channels + 1)).astype(dtype)


def trained(**options):
    """A layer that nothing is left at its default in: parameters, statistics, gradients."""
    bn = BatchNorm(CHANNELS, **options)
    if bn.gamma is not None:
        bn.gamma[:], bn.beta[:] = [0.5, 1.0, 2.0], [-1.0, 0.25, 3.0]
    x = batch(dtype=bn.dtype)
    bn(x)
    bn.backward(np.cos(x))
    return bn


class Chain:
    """Layers one after another, as one."""

    def __init__(self, *layers):
        self.layers = layers

    def forward(self, x):
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, dy):
        for layer in reversed(self.layers):
            dy = layer.backward(dy)
        return dy

    def _all(self, method):
        return {f"{i}.{k}": v for i, layer in enumerate(self.layers) for k, v in getattr(layer, method)().items()}

    def parameters(self):
        return self._all("parameters")

    def gradients(self):
        return self._all("gradients")


def raw(array):
    return None if array is None else (array.dtype.str, array.shape, array.tobytes())


def statistics(bn):
    """Parameters and running statistics, bit for bit."""
    return raw(bn.gamma), raw(bn.beta), raw(bn.running_mean), raw(bn.running_var), bn.num_batches_tracked


def everything(bn):
    """All that a call could change, bit for bit, and which arrays the layer holds."""
    held = (bn.gamma, bn.beta, bn.grad_gamma, bn.grad_beta, bn._contents.value.forward)
    return statistics(bn), raw(bn.grad_gamma), raw(bn.grad_beta), bn.training, [id(thing) for thing in held]


def normalised(x, mean, var, gamma=1.0, beta=0.0):
    return gamma * (x - mean) / np.sqrt(var + EPS) + beta


# float64 throughout: some roundings of values of the order of 10
def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


def in_threads(functions):
    """Runs the functions at once, one thread each; raises the first exception of any."""
    errors, start = [], threading.Barrier(len(functions))

    def run(function):
        try:
            start.wait(300)
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,), daemon=True) for function in functions]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
    finally:
        sys.setswitchinterval(interval)
    assert not any(thread.is_alive() for thread in threads), "hangs"
    if errors:
        raise errors[0]
