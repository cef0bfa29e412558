"""The contenders: each takes the arrays of one case and gives a function to time for every operation.

All of them get the same numbers in the same memory, NumPy arrays on 64-byte boundaries. Where a contender has more
than one way to do an operation (PyTorch's `.out` overloads or fresh results, oneDNN's views of an (N, C) array), each
is a variant, and the fastest is measured.
"""

import importlib
import operator
import os
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ... import __version__, _core, config, reference
from ... import functional as F
from .shapes import OPERATIONS, Shape, dtype_named

__all__ = [
    "ALONE",
    "CONTENDERS",
    "Case",
    "Contender",
    "Operation",
    "Unavailable",
    "check",
    "create",
    "imported_torch",
]

Array = NDArray[Any]

EPS = 1e-5
HALF_ULP = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # relative, of what is written
TOLERANCE = 1e-3  # of the largest expected value, at least of 1: this finds wrong results, not rounding
CHECKED_CHANNELS = 8
MEAN, STD = 0.5, 1.5


class Unavailable(Exception):
    """A contender is not installed, or cannot do what is asked for."""


class Operation(NamedTuple):
    """How a contender does one operation."""

    variants: dict[str, Callable[[], object]]  # what to time
    result: Callable[[str], dict[str, Array]]  # run a variant once; y, or dx, dgamma and dbeta, as in `Case`


class Contender(Protocol):
    """Something that normalises batches."""

    about: str

    def __init__(self, threads: int) -> None: ...

    def operations(self, case: "Case") -> dict[str, Operation]: ...


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An uninitialised array that begins on a 64-byte boundary."""
    size = dtype.itemsize
    for n in shape:
        size *= n
    memory = np.empty(size + 64, np.uint8)
    offset = -memory.ctypes.data % 64
    return memory[offset : offset + size].view(dtype).reshape(shape)


class Case:
    """The arrays of one shape, the same in every process.

    Attributes
    ----------
    x, dy, out : ndarray of `shape.memory_dims`
        Contiguous.
    gamma, beta, mean, var, inv_std : (C,) ndarray
        All of the data's dtype, or of float32 for halves. The statistics are those of the distribution x is drawn from.
    fresh : bool
        Whether results go to fresh memory instead of `out`.
    """

    def __init__(self, shape: Shape, dtype: str, fresh: bool = False) -> None:
        self.shape, self.fresh, self.axis = shape, fresh, shape.axis
        self.dtype = dtype_named(dtype)
        self.is_half = self.dtype.itemsize == 2
        parameters: np.dtype[Any] = np.dtype(np.float32) if self.is_half else self.dtype
        rng = np.random.default_rng(shape.dims)
        self.x, self.dy, self.out = (aligned_empty(shape.memory_dims, self.dtype) for _ in range(3))
        for array in self.x, self.dy:
            array[...] = rng.standard_normal(shape.memory_dims, dtype=parameters.type)
        self.x[...] = self.x.astype(parameters, copy=False) * parameters.type(STD) + parameters.type(MEAN)
        self.out[...] = 0
        self.gamma, self.beta, self.mean, self.var, self.inv_std = (
            aligned_empty((shape.channels,), parameters) for _ in range(5)
        )
        self.gamma[:] = rng.uniform(0.5, 1.5, shape.channels)
        self.beta[:] = rng.uniform(-1, 1, shape.channels)
        self.mean[:], self.var[:] = MEAN, STD**2
        self.inv_std[:] = 1 / np.sqrt(STD**2 + EPS)

    @property
    def other_axes(self) -> tuple[int, ...]:
        """All but the channel axis."""
        return tuple(i for i in range(self.x.ndim) if i != self.axis)

    def along(self, parameter: Array) -> Array:
        """A (C,) array shaped to broadcast against x."""
        shape = [1] * self.x.ndim
        shape[self.axis] = -1
        return parameter.reshape(shape)

    def logical(self, array: Array) -> Array:
        """A view (N, C, ...) of an array that lies as x does."""
        return np.moveaxis(array, self.axis, 1)

    def expected(self, operation: str, channels: NDArray[np.intp]) -> dict[str, Array]:
        """What `bnfast.reference` says, for some of the channels."""
        x, dy = (array.take(channels, self.axis) for array in (self.x, self.dy))
        names = ("gamma", "beta", "mean", "var", "inv_std")
        gamma, beta, mean, var, inv_std = (getattr(self, name)[channels] for name in names)
        if operation == "forward":
            return {"y": reference.batch_norm(x, gamma, beta, axis=self.axis, eps=EPS)[0]}
        if operation == "eval":
            return {"y": reference.batch_norm_eval(x, mean, var, gamma, beta, axis=self.axis, eps=EPS)}
        dx, dgamma, dbeta = reference.batch_norm_backward(dy, x, mean, inv_std, gamma, axis=self.axis)
        return {"dx": dx, "dgamma": dgamma, "dbeta": dbeta}


def check(case: Case, operation: str, result: dict[str, Array]) -> None:
    """Compare a result with the reference, in a few channels.

    Raises
    ------
    ArithmeticError
        If they differ by more than `TOLERANCE`, and half an ulp of halves.
    """
    n = case.shape.channels
    tolerance = TOLERANCE + HALF_ULP.get(case.dtype.name, 0.0)
    channels = np.unique(np.linspace(0, n - 1, min(n, CHECKED_CHANNELS)).astype(np.intp))
    for name, value in case.expected(operation, channels).items():
        found = result[name].take(channels, case.axis if result[name].ndim > 1 else 0).astype(np.float64)
        error = float(np.abs(found - value).max())
        if not error <= tolerance * max(1.0, float(np.abs(value).max())):
            raise ArithmeticError(f"{operation} of {case.shape.name}: {name} is wrong by {error:.3g}")


# --- The contenders -----------------------------------------------------------------------------------------


class Bnfast:
    """This package."""

    def __init__(self, threads: int) -> None:
        self.about = f"bnfast {__version__}, {_core.isa()} (idle threads: {config()['idle_threads']})"

    def operations(self, case: Case) -> dict[str, Operation]:
        out = None if case.fresh else case.out
        forward = partial(F.batch_norm, case.x, case.gamma, case.beta, axis=case.axis, eps=EPS, out=out)
        backward = partial(
            F.batch_norm_backward, case.dy, case.x, case.mean, case.inv_std, case.gamma, axis=case.axis, out=out
        )
        evaluate = partial(
            F.batch_norm_eval, case.x, case.mean, case.var, case.gamma, case.beta, axis=case.axis, eps=EPS, out=out
        )
        return {
            "forward": Operation({"": forward}, lambda _: {"y": forward()[0]}),
            "backward": Operation(
                {"": backward}, lambda _: dict(zip(("dx", "dgamma", "dbeta"), backward(), strict=True))
            ),
            "eval": Operation({"": evaluate}, lambda _: {"y": evaluate()}),
        }


class Numpy:
    """The formulas in plain NumPy, in the dtype of the data, as somebody who minds speed would write them."""

    def __init__(self, threads: int) -> None:
        self.about = f"NumPy {np.__version__}"

    def operations(self, case: Case) -> dict[str, Operation]:
        axes, along = case.other_axes, case.along
        gamma, beta, mean, var, inv_std = map(along, (case.gamma, case.beta, case.mean, case.var, case.inv_std))
        x, dy, eps, count = (
            case.x,
            case.dy,
            case.dtype.type(EPS),
            case.dtype.type(case.shape.size // case.shape.channels),
        )
        out = None if case.fresh else case.out
        scratch = None if case.fresh else np.empty_like(x)

        def forward() -> dict[str, Array]:
            y = np.subtract(x, x.mean(axes, keepdims=True), out=out)
            scale = gamma / np.sqrt(np.square(y, out=scratch).mean(axes, keepdims=True) + eps)
            y *= scale
            y += beta
            return {"y": y}

        def backward() -> dict[str, Array]:
            x_hat = np.subtract(x, mean, out=out)
            x_hat *= inv_std
            dbeta = dy.sum(axes, keepdims=True)
            dgamma = np.multiply(dy, x_hat, out=scratch).sum(axes, keepdims=True)
            x_hat *= dgamma / -count
            x_hat += dy
            x_hat -= dbeta / count
            x_hat *= gamma * inv_std
            return {"dx": x_hat, "dgamma": dgamma.ravel(), "dbeta": dbeta.ravel()}

        def evaluate() -> dict[str, Array]:
            y = np.subtract(x, mean, out=out)
            y *= gamma / np.sqrt(var + eps)
            y += beta
            return {"y": y}

        return {
            "forward": Operation({"": forward}, lambda _: forward()),
            "backward": Operation({"": backward}, lambda _: backward()),
            "eval": Operation({"": evaluate}, lambda _: evaluate()),
        }


class Floor:
    """What the memory traffic alone costs: bnfast's parallel copy (x to out; for backward x + dy to out)."""

    def __init__(self, threads: int) -> None:
        floor: Any = getattr(_core, "memory_floor", None)
        if floor is None:
            raise Unavailable("floor not available in this build of bnfast")
        self.floor, self.about = floor, "the memory traffic alone"

    def operations(self, case: Case) -> dict[str, Operation]:
        floor, x, dy, out = self.floor, case.x, case.dy, case.out

        def run(u: Array | None) -> Callable[[], object]:
            if case.fresh:
                return lambda: floor(x, u, np.empty_like(x))
            return partial(floor, x, u, out)

        return {name: Operation({"": run(dy if name == "backward" else None)}, lambda _: {}) for name in OPERATIONS}


def imported_torch(threads: int | None) -> Any:
    """PyTorch on so many threads, None: as many as it takes; raises `Unavailable`."""
    try:
        torch: Any = importlib.import_module("torch")
    except ImportError:
        raise Unavailable("torch is not installed") from None
    if threads:
        torch.set_num_threads(threads)
    return torch


class Torch:
    """PyTorch's own kernels, called as directly as Python can."""

    def __init__(self, threads: int) -> None:
        self.torch = imported_torch(threads)
        self.torch.set_grad_enabled(False)
        self.about = f"PyTorch {self.torch.__version__}"

    def tensor(self, array: Array) -> Any:
        """A tensor over an array; bfloat16 is no dtype that PyTorch takes from NumPy."""
        if array.dtype.name != "bfloat16":
            return self.torch.from_numpy(array)
        return self.torch.from_numpy(array.view(np.int16)).view(self.torch.bfloat16)

    def tensors(self, case: Case, *more: str) -> dict[str, Any]:
        """Tensors over the arrays of the case; x, dy, out and `more` are (N, C, ...)."""
        found = {name: self.tensor(case.logical(getattr(case, name))) for name in ("x", "dy", "out", *more)}
        for name in ("gamma", "beta", "mean", "var", "inv_std"):
            found[name] = self.torch.from_numpy(getattr(case, name))
        return found

    def operations(self, case: Case) -> dict[str, Operation]:
        t, torch = self.tensors(case), self.torch
        none, statistics = torch.empty(0), [torch.empty_like(t["gamma"]) for _ in range(4)]
        training = (t["x"], t["gamma"], t["beta"], None, None, True, 0.1, EPS)
        running = (t["x"], t["gamma"], t["beta"], t["mean"], t["var"], False, 0.1, EPS)
        back = (t["dy"], t["x"], t["gamma"], None, None, t["mean"], t["inv_std"], True, EPS, (True, True, True))
        ways: dict[str, dict[str, Callable[[], Any]]] = {
            "forward": {"fresh": partial(torch.native_batch_norm, *training)},
            "backward": {"fresh": partial(torch.ops.aten.native_batch_norm_backward.default, *back)},
            "eval": {"fresh": partial(torch.native_batch_norm, *running)},
        }
        if not case.fresh:
            ways["forward"]["out="] = partial(torch.native_batch_norm, *training, out=(t["out"], *statistics[:2]))
            ways["eval"]["out="] = partial(torch.native_batch_norm, *running, out=(t["out"], none, none.clone()))
            overload = getattr(torch.ops.aten.native_batch_norm_backward, "out", None)
            if overload is not None:
                to = dict(zip(("out0", "out1", "out2"), (t["out"], *statistics[2:]), strict=True))
                ways["backward"]["out="] = partial(overload, *back, **to)
        return {name: as_arrays(case, name, variants) for name, variants in ways.items()}


RESULTS = {"backward": ("dx", "dgamma", "dbeta"), "block backward": ("dx", "dgamma", "dbeta", "dresidual")}


def as_arrays(case: Case, name: str, variants: dict[str, Callable[[], Any]]) -> Operation:
    """An operation whose variants return a tuple of tensors."""

    def result(variant: str) -> dict[str, Array]:
        names = RESULTS.get(name, ("y",))
        values = (value.detach() for value in variants[variant]())
        values = (value.float() if case.is_half else value for value in values)  # bfloat16 is not for NumPy
        found = {key: value.numpy() for key, value in zip(names, values, strict=False)}
        return {key: np.moveaxis(value, 1, case.axis) if value.ndim > 1 else value for key, value in found.items()}

    return Operation(dict(variants), result)


class TorchCompile(Torch):
    """The same functions compiled by `torch.compile`, once for each shape; results written into out."""

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        if not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
            raise Unavailable("torch.compile needs a C++ compiler")
        self.about = f"torch.compile of PyTorch {self.torch.__version__}"
        try:
            probe = self.torch.compile(lambda x: x * 2 + 1)
            probe(self.torch.ones(8))
        except Exception as error:  # whatever the compiler stack raises
            raise Unavailable(f"torch.compile does not work here: {first_line(error)}") from None

    def operations(self, case: Case) -> dict[str, Operation]:
        t, torch = self.tensors(case), self.torch
        torch.compiler.reset()
        fresh, native = case.fresh, torch.native_batch_norm
        native_backward = torch.ops.aten.native_batch_norm_backward.default

        def forward(x: Any, gamma: Any, beta: Any, out: Any) -> Any:
            y, *statistics = native(x, gamma, beta, None, None, True, 0.1, EPS)
            return (y if fresh else out.copy_(y), *statistics)

        def evaluate(x: Any, gamma: Any, beta: Any, mean: Any, var: Any, out: Any) -> Any:
            y = native(x, gamma, beta, mean, var, False, 0.1, EPS)[0]
            return (y if fresh else out.copy_(y),)

        def backward(dy: Any, x: Any, gamma: Any, mean: Any, inv_std: Any, out: Any) -> Any:
            flags = (True, EPS, (True, True, True))
            dx, dgamma, dbeta = native_backward(dy, x, gamma, None, None, mean, inv_std, *flags)
            return dx if fresh else out.copy_(dx), dgamma, dbeta

        arguments = {
            "forward": (forward, "x gamma beta out"),
            "backward": (backward, "dy x gamma mean inv_std out"),
            "eval": (evaluate, "x gamma beta mean var out"),
        }
        return {
            name: as_arrays(
                case,
                name,
                {"": partial(torch.compile(function, dynamic=False), *operator.itemgetter(*names.split())(t))},
            )
            for name, (function, names) in arguments.items()
        }


class OneDnn:
    """oneDNN through its C API. An (N, C) array is given to it in each of the forms that mean the same."""

    def __init__(self, threads: int) -> None:
        from .onednn import Engine

        try:
            self.engine = Engine()
        except ImportError as error:
            raise Unavailable(first_line(error)) from None
        self.about = f"oneDNN {self.engine.version}"

    @staticmethod
    def views(case: Case) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        """(name, dims, strides in elements) that oneDNN may take the array for."""
        x = case.logical(case.x)
        strides = tuple(step // x.itemsize for step in x.strides)
        n, c = x.shape[:2]
        if x.ndim > 2:
            yield "nhwc" if case.shape.channels_last else "nchw", x.shape, strides
            return
        yield "nc", (n, c), (c, 1)
        yield "nhwc, N images of one pixel", (n, c, 1, 1), (c, 1, c, c)
        yield "nhwc, one image of N pixels", (1, c, n, 1), (n * c, 1, c, c)

    def operations(self, case: Case) -> dict[str, Operation]:
        from .onednn import Status

        forward: dict[str, Callable[[], object]] = {}
        backward: dict[str, Callable[[], object]] = {}
        evaluate: dict[str, Callable[[], object]] = {}
        dgamma, dbeta, *batch = (np.zeros_like(case.gamma) for _ in range(4))
        for name, dims, strides in self.views(case):
            try:
                calls = self.primitives(case, dims, strides, [dgamma, dbeta, *batch])
            except Status:
                continue
            for found, (call, kind) in zip((forward, backward, evaluate), calls, strict=True):
                found[f"{name}: {kind}"] = call
        if not forward:
            raise Unavailable(f"oneDNN has nothing for {case.shape.name}")

        def run(calls: dict[str, Callable[[], object]], variant: str) -> Array:
            case.out[...] = np.nan
            given = calls[variant]()
            return case.out if given is None else np.asarray(given)

        return {
            "forward": Operation(forward, lambda variant: {"y": run(forward, variant)}),
            "backward": Operation(
                backward, lambda variant: {"dx": run(backward, variant), "dgamma": dgamma, "dbeta": dbeta}
            ),
            "eval": Operation(evaluate, lambda variant: {"y": run(evaluate, variant)}),
        }

    def primitives(
        self, case: Case, dims: tuple[int, ...], strides: tuple[int, ...], small: list[Array]
    ) -> list[tuple[Callable[[], object], str]]:
        """(call, oneDNN's implementation) of forward, backward and eval."""
        from .onednn import Primitive

        engine, (dgamma, dbeta, batch_mean, batch_var) = self.engine, small
        data = engine.descriptor(dims, strides, case.dtype.name)
        vector = engine.descriptor((case.shape.channels,), (1,))
        training = engine.forward(data, EPS, training=True)
        inputs = {"src": (data, case.x), "scale": (vector, case.gamma)}
        given = {"mean": (vector, case.mean), "variance": (vector, case.var)}
        shift, dst = {"shift": (vector, case.beta)}, {"dst": (data, case.out)}
        of_batch = {"mean": (vector, batch_mean), "variance": (vector, batch_var)}
        gradients = {
            "diff_dst": (data, case.dy),
            "diff_src": (data, case.out),
            "diff_scale": (vector, dgamma),
            "diff_shift": (vector, dbeta),
        }
        primitives = (
            ("dst", Primitive(engine, training, inputs | shift | dst | of_batch)),
            ("diff_src", Primitive(engine, engine.backward(data, EPS, training), inputs | given | gradients)),
            ("dst", Primitive(engine, engine.forward(data, EPS, training=False), inputs | shift | dst | given)),
        )

        def to_fresh(primitive: Primitive, argument: str) -> Array:
            fresh = np.empty_like(case.x)
            primitive.place(argument, fresh)
            primitive()
            return fresh

        return [
            (partial(to_fresh, primitive, name) if case.fresh else primitive, primitive.implementation)
            for name, primitive in primitives
        ]


def first_line(error: BaseException) -> str:
    """A message short enough for a list."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


ALONE = "bnfast-1"

CONTENDERS: dict[str, type[Contender]] = {
    "floor": Floor,
    "bnfast": Bnfast,
    ALONE: Bnfast,  # on one thread, whatever the others have
    "onednn": OneDnn,
    "torch": Torch,
    "torch.compile": TorchCompile,
    "numpy": Numpy,
}


def without_dtype(name: str, dtype: str) -> None:
    """Raise `Unavailable` if the contender does not take the dtype."""
    if name == "onednn" and dtype == "float64":
        raise Unavailable(f"oneDNN normalises no {dtype}")
    if name == "numpy" and dtype in HALF_ULP:
        raise Unavailable(f"NumPy's own sums of {dtype} overflow, or there are none")


def create(name: str, threads: int, dtype: str = "float32") -> Contender:
    """A contender by its name; raises `Unavailable`."""
    without_dtype(name, dtype)
    return CONTENDERS[name](threads)
