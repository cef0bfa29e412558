"""The one table of shapes that all benchmarks share."""

import importlib
from typing import Any, NamedTuple

import numpy as np

__all__ = ["BLOCK", "OPERATIONS", "QUICK", "SHAPES", "SIZES", "Shape", "dtype_named", "family", "group", "named"]

OPERATIONS = ("forward", "backward", "eval")
BLOCK = ("block", "block backward")  # y = relu(batch norm(x) + residual), in training, and its gradients
ARRAYS = {"forward": 2, "backward": 3, "eval": 2, "block": 3, "block backward": 5}


def dtype_named(name: str) -> np.dtype[Any]:
    """A dtype by its name; bfloat16 is that of ml_dtypes."""
    return np.dtype(importlib.import_module("ml_dtypes").bfloat16 if name == "bfloat16" else name)


class Shape(NamedTuple):
    """An array (N, C, ...) and how it lies in memory."""

    dims: tuple[int, ...]  # (N, C, ...)
    channels_last: bool = False
    tiny: bool = False  # what is measured is the cost of a call

    @property
    def name(self) -> str:
        """For instance 32x64x56x56, or 32x64x56x56-cl for channels-last."""
        return "x".join(map(str, self.dims)) + ("-cl" if self.channels_last else "")

    @property
    def channels(self) -> int:
        """C."""
        return self.dims[1]

    @property
    def interleaved(self) -> bool:
        """Whether neighbours in memory belong to different channels."""
        return self.channels_last or len(self.dims) == 2

    @property
    def memory_dims(self) -> tuple[int, ...]:
        """The dimensions in the order of memory: (N, C, ...) or (N, ..., C)."""
        n, c, *rest = self.dims
        return (n, *rest, c) if self.channels_last else self.dims

    @property
    def axis(self) -> int:
        """The channel axis among `memory_dims`."""
        return len(self.dims) - 1 if self.channels_last else 1

    @property
    def size(self) -> int:
        """Number of elements."""
        size = 1
        for n in self.dims:
            size *= n
        return size

    def bytes_moved(self, operation: str, itemsize: int) -> int:
        """Least traffic: forward and eval read x and write y, backward reads x and dy and writes dx.

        The block reads the residual, too, and its backward reads x, the residual and dy and writes dx and dresidual.
        """
        return ARRAYS[operation] * self.size * itemsize


RESNET50 = (  # at batch 32
    (32, 64, 112, 112),
    (32, 64, 56, 56),
    (32, 256, 56, 56),
    (32, 128, 28, 28),
    (32, 512, 28, 28),
    (32, 256, 14, 14),
    (32, 1024, 14, 14),
    (32, 512, 7, 7),
    (32, 2048, 7, 7),
)

SHAPES = {
    shape.name: shape
    for shape in (
        *(Shape(dims) for dims in RESNET50),
        Shape((64, 128, 1000)),
        Shape((4, 32, 16, 64, 64)),
        *(Shape(dims, channels_last=True) for dims in RESNET50),
        *(Shape(dims) for dims in ((128, 256), (1024, 1024), (8192, 512), (65536, 64), (262144, 3))),
        *(Shape(dims, tiny=True) for dims in ((8, 16), (32, 64))),
    )
}

# A sweep: arrays of about 16 KB, 64 KB, ... 256 MB of float32, each kind at every size.
SIZES = {
    "(N, C)": tuple(
        Shape(dims)
        for dims in (
            *((64, 64), (256, 64), (512, 128), (1024, 256)),
            *((4096, 256), (8192, 512), (32768, 512), (65536, 1024)),
        )
    ),
    "planar": (
        planar := tuple(
            Shape(dims)
            for dims in (
                *((1, 64, 8, 8), (2, 64, 12, 12), (6, 64, 14, 14), (8, 64, 24, 24)),
                *((16, 64, 30, 30), (32, 64, 44, 44), (32, 128, 60, 60), (32, 256, 90, 90)),
            )
        )
    ),
    "channels last": tuple(shape._replace(channels_last=True) for shape in planar),
    "many channels": tuple(Shape((16, 4**k)) for k in range(4, 12)),
    "few channels": tuple(Shape((4**k // 3, 3)) for k in range(6, 14)),
}
LARGEST_WHEN_QUICK, LARGEST_WHEN_COLD = 1 << 18, 1 << 22  # elements


def named(name: str) -> Shape:
    """A shape by its name, one of the table or any other. Raises ValueError if it is none."""
    if name in SHAPES:
        return SHAPES[name]
    try:
        shape = Shape(tuple(int(n) for n in name.removesuffix("-cl").split("x")), name.endswith("-cl"))
    except ValueError:
        raise ValueError(f"{name!r} is no shape like 32x64x56x56 or 32x64x56x56-cl") from None
    if shape.name != name or len(shape.dims) < 2 + shape.channels_last or min(shape.dims) < 1 or len(shape.dims) > 8:
        raise ValueError(f"{name!r} is no shape like 32x64x56x56 or 32x64x56x56-cl")
    if shape.size == shape.channels:
        raise ValueError(f"{name!r} has one value a channel, and training needs two")
    return shape


def family(shape: Shape) -> str:
    """The kind, in the sweep, that a shape belongs to."""
    return next(kind for kind, shapes in SIZES.items() if shape in shapes)


QUICK = ("32x64x56x56", "32x128x28x28", "32x128x28x28-cl", "8192x512", "32x64")


def group(shape: Shape, operation: str) -> str:
    """The group whose geometric mean a measurement enters."""
    if shape.tiny:
        return "tiny"
    if operation == "eval":
        return "eval"
    return f"{'channels-last and (N, C)' if shape.interleaved else 'planar'} {operation}"
