"""PyTorch's layers and ours in pairs, and data for them; modules that import it are left out without PyTorch."""

import os
from collections import Counter

import pytest

if os.environ.get("BNFAST_REQUIRE_TORCH"):
    import torch  # one CI job has to have it: there a missing PyTorch is an error, not a skip
else:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: there are no layers of its kind")

import bnfast.torch
from bnfast.torch import calls

LAYERS = {
    2: (bnfast.torch.BatchNorm1d, torch.nn.BatchNorm1d),
    3: (bnfast.torch.BatchNorm1d, torch.nn.BatchNorm1d),
    4: (bnfast.torch.BatchNorm2d, torch.nn.BatchNorm2d),
    5: (bnfast.torch.BatchNorm3d, torch.nn.BatchNorm3d),
}
SHAPES = {2: (32, 6), 3: (8, 6, 9), 4: (4, 6, 5, 7), 5: (3, 6, 4, 3, 5)}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
# Of values of some units: roundings of PyTorch's in the data's precision; its half types round y once more.
TOLERANCES = {torch.float32: 3e-5, torch.float64: 1e-12, torch.bfloat16: 4e-2, torch.float16: 8e-3}


def data(ndim, dtype=None, channels_last=False, seed=0):
    """Values with a different mean and spread in each channel."""
    generator = torch.Generator().manual_seed(seed)
    shape = SHAPES[ndim]
    along = (1, 6, *[1] * (ndim - 2))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = x * torch.linspace(0.5, 2, 6).view(along) + torch.linspace(-2, 2, 6).view(along)
    x = x.to(torch.float32 if dtype is None else dtype)
    return x.contiguous(memory_format=FORMATS[ndim]) if channels_last and ndim in FORMATS else x


def pair(ndim, *, activation=None, negative_slope=0.01, **options):
    """(ours, PyTorch's) of the same random state; only ours has the activation."""
    ours, theirs = (kind for kind in LAYERS[ndim])
    theirs = theirs(6, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor, low, high in (
            (theirs.weight, 0.5, 2), (theirs.bias, -1, 1), (theirs.running_mean, -1, 1), (theirs.running_var, 0.5, 2),
        ):  # fmt: skip
            if tensor is not None:
                tensor.uniform_(low, high, generator=generator)
    ours = ours(6, activation=activation, negative_slope=negative_slope, **options)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def close(ours, theirs, of=1):
    """of: how many values were summed up."""
    assert ours.dtype == theirs.dtype
    tolerance = TOLERANCES.get(ours.dtype, 0)
    torch.testing.assert_close(
        ours, theirs, rtol=tolerance, atol=tolerance * max(1, of / 8), check_stride=False, equal_nan=True
    )


def counted(monkeypatch):
    """A counter of the kernels' calls from PyTorch's layers, by name."""
    count = Counter()

    def counting(name):
        original = getattr(calls, name)

        def call(*arguments, **options):
            result = original(*arguments, **options)
            count[name] += 1
            return result

        monkeypatch.setattr(calls, name, call)

    counting("forward")
    counting("backward")
    return count
