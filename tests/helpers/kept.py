"""What a layer, a model and their arrays hold, as bytes: so that NaN, -0.0 and dtypes count in a comparison."""

import numpy as np

from bnfast import BatchNorm, Moments


def raw(value):
    """A value that compares by its bits."""
    if isinstance(value, BatchNorm):
        return raw(tuple(value._kept()))
    if isinstance(value, Moments):
        return "Moments", value.count, raw(value.mean), raw(value.m2)
    if isinstance(value, dict):
        return {name: raw(entry) for name, entry in value.items()}
    if isinstance(value, tuple):
        return tuple(map(raw, value))
    if isinstance(value, float):
        return np.float64(value).tobytes()
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.dtype.name, value.shape, value.tobytes()
    return type(value), value
