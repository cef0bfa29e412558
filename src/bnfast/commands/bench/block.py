"""The contenders of the block that residual networks are made of: y = relu(batch norm(x) + residual), in training.

Each does it and its backward, dy -> dx, dgamma, dbeta, dresidual, as well as it can: bnfast in one call, others in
several. As in `contenders`, the fastest of several ways is measured.
"""

import copy
import operator
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ... import reference
from ...layer import BatchNorm
from .contenders import (
    ALONE,
    EPS,
    Array,
    Bnfast,
    Case,
    Contender,
    Floor,
    Numpy,
    OneDnn,
    Operation,
    Torch,
    TorchCompile,
    Unavailable,
    aligned_empty,
    as_arrays,
    without_dtype,
)
from .shapes import Shape

__all__ = ["BLOCK_CONTENDERS", "BlockCase", "create"]

MARGIN = 0.01  # nothing that ReLU is taken of is nearer to 0


class BlockCase(Case):
    """The arrays of a block of one shape, the same in every process.

    Attributes
    ----------
    residual, dx, dresidual : ndarray like x
        The last two, and `out` for y, are where results go.
    mean, var, inv_std : (C,) ndarray
        Those of the batch.
    """

    def __init__(self, shape: Shape, dtype: str) -> None:
        super().__init__(shape, dtype)
        self.residual, self.dx, self.dresidual = (aligned_empty(shape.memory_dims, self.dtype) for _ in range(3))
        np.random.default_rng((*shape.dims, 1)).standard_normal(dtype=self.dtype.type, out=self.residual)
        self.mean[:] = self.x.mean(self.other_axes, dtype=np.float64)
        self.var[:] = self.x.var(self.other_axes, dtype=np.float64)
        self.inv_std[:] = 1 / np.sqrt(self.var + EPS)
        # Where rounding decided about the sign, right gradients would differ by all of dy.
        before = self.x - self.along(self.mean)
        before *= self.along(self.inv_std * self.gamma)
        before += self.along(self.beta)
        before += self.residual
        self.residual[np.abs(before, out=before) < MARGIN] += 2 * MARGIN

    def within(self) -> "BlockCase":
        """The batch normalisation in the block: its dy is dresidual, and what it writes is dx."""
        found = copy.copy(self)
        found.dy, found.out = self.dresidual, self.dx
        return found

    def expected(self, operation: str, channels: NDArray[np.intp]) -> dict[str, Array]:
        """What `bnfast.reference` and NumPy say, in float64."""
        x, dy, residual = (array.take(channels, self.axis) for array in (self.x, self.dy, self.residual))
        gamma, beta = self.gamma[channels], self.beta[channels]
        y, mean, inv_std = reference.batch_norm(x, gamma, beta, axis=self.axis, eps=EPS)
        y = np.maximum(y + residual, 0)
        if operation == "block":
            return {"y": y}
        dresidual = np.where(y > 0, dy, 0)
        dx, dgamma, dbeta = reference.batch_norm_backward(dresidual, x, mean, inv_std, gamma, axis=self.axis)
        return {"dx": dx, "dgamma": dgamma, "dbeta": dbeta, "dresidual": dresidual}


class BlockContender(Protocol):
    """Something that does the block."""

    about: str

    def operations(self, case: BlockCase) -> dict[str, Operation]: ...


class BlockBnfast:
    """This package's layer: one call, which keeps a bit an element for the backward."""

    def __init__(self, threads: int) -> None:
        self.about = Bnfast(threads).about

    def operations(self, case: BlockCase) -> dict[str, Operation]:
        layer = BatchNorm(len(case.gamma), axis=case.axis, eps=EPS, dtype=case.dtype, activation="relu")
        layer.gamma, layer.beta = case.gamma, case.beta
        forward: Callable[[], Any] = partial(layer, case.x, case.out, residual=case.residual)
        _, pullback = layer.vjp(case.x, case.out, residual=case.residual)
        backward: Callable[[], Any] = partial(pullback, case.dy, case.dx, out_residual=case.dresidual)

        def gradients() -> dict[str, Any]:
            dx, dresidual = backward()
            return {"dx": dx, "dgamma": layer.grad_gamma, "dbeta": layer.grad_beta, "dresidual": dresidual}

        return {
            "block": Operation({"": forward}, lambda _: {"y": forward()}),
            "block backward": Operation({"": backward}, lambda _: gradients()),
        }


class BlockNormalisation:
    """Batch normalisation without addition and ReLU: what the block takes when these cost nothing."""

    def __init__(self, threads: int) -> None:
        self.about = f"batch normalisation alone, {Bnfast(threads).about}"

    def operations(self, case: BlockCase) -> dict[str, Operation]:
        layer = BatchNorm(len(case.gamma), axis=case.axis, eps=EPS, dtype=case.dtype)
        layer.gamma, layer.beta = case.gamma, case.beta
        _, pullback = layer.vjp(case.x, case.out)
        return {
            "block": Operation({"": partial(layer, case.x, case.out)}, lambda _: {}),
            "block backward": Operation({"": partial(pullback, case.dy, case.dx)}, lambda _: {}),
        }


class Steps:
    """Batch normalisation of another contender, the rest by NumPy: every step passes over the arrays."""

    def __init__(self, batch_norm: Contender) -> None:
        self._batch_norm, numpy = batch_norm, f"NumPy {np.__version__}"
        self.about = numpy if isinstance(batch_norm, Numpy) else f"batch norm of bnfast, the rest {numpy}"

    def operations(self, case: BlockCase) -> dict[str, Operation]:
        normalise = self._batch_norm.operations(case)["forward"].variants[""]
        differentiate = self._batch_norm.operations(case.within())["backward"]
        y, dy, residual, dresidual, zero = case.out, case.dy, case.residual, case.dresidual, case.dtype.type(0)
        positive = np.empty(y.shape, bool)

        def forward() -> Array:
            normalise()
            np.add(y, residual, out=y)
            np.maximum(y, zero, out=y)
            return y

        def through_relu() -> Array:
            np.greater(y, zero, out=positive)
            np.multiply(dy, positive, out=dresidual)
            return dresidual

        def backward() -> None:
            through_relu()
            differentiate.variants[""]()

        forward()
        return {
            "block": Operation({"": forward}, lambda _: {"y": forward()}),
            "block backward": Operation(
                {"": backward}, lambda _: {"dresidual": through_relu(), **differentiate.result("")}
            ),
        }


class BlockFloor:
    """What the memory traffic alone costs: x + residual to y; backward x + residual to dx, and dy to dresidual."""

    def __init__(self, threads: int) -> None:
        floor = Floor(threads)
        self._floor, self.about = floor.floor, floor.about

    def operations(self, case: BlockCase) -> dict[str, Operation]:
        floor, x, residual = self._floor, case.x, case.residual
        forward = partial(floor, x, residual, case.out)

        def backward() -> None:
            floor(x, residual, case.dx)
            floor(case.dy, None, case.dresidual)

        return {
            "block": Operation({"": forward}, lambda _: {}),
            "block backward": Operation({"": backward}, lambda _: {}),
        }


class BlockTorch:
    """PyTorch eager: as in torchvision's ResNets with autograd, and the same kernels called without it."""

    def __init__(self, threads: int) -> None:
        self._torch = Torch(threads)
        self._torch.torch.set_grad_enabled(True)
        self.about = self._torch.about

    def operations(self, case: BlockCase) -> dict[str, Operation]:
        forward, backward = self._with_autograd(case)
        forward_out, backward_fresh, backward_out = self._kernels(case)
        forward_out()
        ways: dict[str, dict[str, Callable[[], Any]]] = {
            "block": {"autograd": forward, "kernels, out=": forward_out},
            "block backward": {"autograd": backward, "kernels": backward_fresh},
        }
        if backward_out:
            ways["block backward"]["kernels, out="] = backward_out
        return {name: as_arrays(case, name, variants) for name, variants in ways.items()}

    def _with_autograd(self, case: BlockCase) -> tuple[Callable[[], Any], Callable[[], Any]]:
        torch, t = self._torch.torch, self._torch.tensors(case, "residual")
        x, residual, gamma, beta = (t[name].detach().requires_grad_() for name in ("x", "residual", "gamma", "beta"))
        batch_norm, grad, dy = torch.nn.functional.batch_norm, torch.autograd.grad, t["dy"]

        def forward() -> Any:
            y = batch_norm(x, None, None, gamma, beta, True, 0.1, EPS)
            y += residual
            return (y.relu_(),)

        (y,) = forward()

        def backward() -> Any:
            dx, dgamma, dbeta, dresidual = grad(y, (x, gamma, beta, residual), dy, retain_graph=True)
            return dx, dgamma, dbeta, dresidual

        return forward, backward

    def _kernels(self, case: BlockCase) -> tuple[Callable[[], Any], Callable[[], Any], Callable[[], Any] | None]:
        """Forward into out, backward with a fresh dx, backward into dx if there is such an overload."""
        torch, t = self._torch.torch, self._torch.tensors(case, "residual", "dx", "dresidual")
        x, y, residual, dresidual, aten = t["x"], t["out"], t["residual"], t["dresidual"], torch.ops.aten
        mean, inv_std, dgamma, dbeta = (torch.empty_like(t["gamma"]) for _ in range(4))
        training = (x, t["gamma"], t["beta"], None, None, True, 0.1, EPS)
        back = (dresidual, x, t["gamma"], None, None, mean, inv_std, True, EPS, (True, True, True))

        def forward() -> Any:
            torch.native_batch_norm(*training, out=(y, mean, inv_std))
            y.add_(residual)
            return (y.relu_(),)

        def backward(differentiate: Callable[[], Any]) -> Any:
            aten.threshold_backward.grad_input(t["dy"], y, 0, grad_input=dresidual)
            return (*differentiate(), dresidual)

        fresh = partial(backward, partial(aten.native_batch_norm_backward.default, *back))
        overload = getattr(aten.native_batch_norm_backward, "out", None)
        if overload is None:
            return forward, fresh, None
        return forward, fresh, partial(backward, partial(overload, *back, out0=t["dx"], out1=dgamma, out2=dbeta))


class BlockTorchCompile:
    """Forward and backward compiled by `torch.compile`, once for each shape; results written into out."""

    def __init__(self, threads: int) -> None:
        self._torch = TorchCompile(threads)
        self.about = self._torch.about

    def operations(self, case: BlockCase) -> dict[str, Operation]:
        torch, t = self._torch.torch, self._torch.tensors(case, "residual", "dx", "dresidual")
        torch.compiler.reset()
        native, native_backward = torch.native_batch_norm, torch.ops.aten.native_batch_norm_backward.default

        def forward(x: Any, gamma: Any, beta: Any, residual: Any, out: Any) -> Any:
            y, *statistics = native(x, gamma, beta, None, None, True, 0.1, EPS)
            return (out.copy_(torch.relu(y + residual)), *statistics)

        def backward(dy: Any, x: Any, gamma: Any, y: Any, mean: Any, inv_std: Any, out: Any, out_residual: Any) -> Any:
            passed, flags = torch.where(y > 0, dy, 0), (True, EPS, (True, True, True))
            dx, dgamma, dbeta = native_backward(passed, x, gamma, None, None, mean, inv_std, *flags)
            return out.copy_(dx), dgamma, dbeta, out_residual.copy_(passed)

        def compiled(function: Callable[..., Any], names: str) -> Callable[[], Any]:
            return partial(torch.compile(function, dynamic=False), *operator.itemgetter(*names.split())(t))

        ways = {
            "block": compiled(forward, "x gamma beta residual out"),
            "block backward": compiled(backward, "dy x gamma out mean inv_std dx dresidual"),
        }
        ways["block"]()
        return {name: as_arrays(case, name, {"": call}) for name, call in ways.items()}


class BlockOneDnn:
    """oneDNN: two primitives each way.

    Its flag fuse_norm_add_relu is one for GPUs, and batch normalisation takes no post-ops in training. So the add has
    ReLU as its post-op, and backward is that of ReLU, then that of batch normalisation.
    """

    def __init__(self, threads: int) -> None:
        self._onednn = OneDnn(threads)
        self.about = f"{self._onednn.about} (batch norm, then add with ReLU: fused is for GPUs only)"

    def operations(self, case: BlockCase) -> dict[str, Operation]:
        from .onednn import Status

        forward: dict[str, Callable[[], object]] = {}
        backward: dict[str, Callable[[], object]] = {}
        dgamma, dbeta, *_ = small = [np.zeros_like(case.gamma) for _ in range(4)]
        for name, dims, strides in self._onednn.views(case):
            try:
                (normalise, kind), *_ = self._onednn.primitives(case, dims, strides, small)
                _, (differentiate, kind_back), _ = self._onednn.primitives(case.within(), dims, strides, small)
                add_relu, relu_backward = self._elementwise(case, dims, strides)
            except Status:
                continue
            forward[f"{name}: {kind}"] = in_turn(normalise, add_relu)
            backward[f"{name}: {kind_back}"] = in_turn(relu_backward, differentiate)
        if not forward:
            raise Unavailable(f"oneDNN has nothing for {case.shape.name}")

        def y(variant: str) -> dict[str, Array]:
            case.out.fill(np.nan)
            forward[variant]()
            return {"y": case.out}

        def gradients(variant: str) -> dict[str, Array]:
            case.dx.fill(np.nan)
            backward[variant]()
            return {"dx": case.dx, "dgamma": dgamma, "dbeta": dbeta, "dresidual": case.dresidual}

        y(next(iter(forward)))
        return {"block": Operation(forward, y), "block backward": Operation(backward, gradients)}

    def _elementwise(
        self, case: BlockCase, dims: tuple[int, ...], strides: tuple[int, ...]
    ) -> tuple[Callable[[], object], Callable[[], object]]:
        """y = relu(y + residual), and dresidual of dy and y."""
        from .onednn import Primitive

        engine = self._onednn.engine
        data = engine.descriptor(dims, strides)
        add = {"src": (data, case.out), "src_1": (data, case.residual), "dst": (data, case.out)}
        back = {"dst": (data, case.out), "diff_dst": (data, case.dy), "diff_src": (data, case.dresidual)}
        return Primitive(engine, engine.add_relu(data), add), Primitive(engine, engine.relu_backward(data), back)


def in_turn(first: Callable[[], object], second: Callable[[], object]) -> Callable[[], None]:
    """One call for two."""

    def both() -> None:
        first()
        second()

    return both


BLOCK_CONTENDERS: dict[str, Callable[[int], BlockContender]] = {
    "floor": BlockFloor,
    "bnfast": BlockBnfast,
    ALONE: BlockBnfast,
    "batch-norm": BlockNormalisation,
    "bnfast+numpy": lambda threads: Steps(Bnfast(threads)),
    "onednn": BlockOneDnn,
    "torch": BlockTorch,
    "torch.compile": BlockTorchCompile,
    "numpy": lambda threads: Steps(Numpy(threads)),
}


def create(name: str, threads: int, dtype: str = "float32") -> BlockContender:
    """A contender by its name; raises `Unavailable`."""
    without_dtype(name, dtype)
    return BLOCK_CONTENDERS[name](threads)
