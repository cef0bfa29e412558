"""The kernels on tensors, whose memory they use as it is: forward, backward, and the node in autograd's graph.

Nothing here decides whether the kernels are to be used: layers.py does.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as theirs

from .. import _core
from .. import functional as ours
from .._checks import one_of
from ..runtime.threads import get_num_threads, num_threads
from .memory import empty_like

__all__ = [
    "ACTIVATIONS", "HALF", "Options", "activated", "array_of", "asks_for_more", "backward", "batch_norm",
    "differentiable_gradients", "format_of_result", "forward", "fused", "is_differentiated", "met_by_activation",
    "parameter_of", "threads", "update_running",
]  # fmt: skip


ACTIVATIONS = (None, "relu", "relu6", "leaky_relu")


def _half_types() -> dict[torch.dtype, Any]:
    """Those that the kernels know, and their dtypes in NumPy."""
    found: dict[torch.dtype, Any] = {torch.float16: np.dtype(np.float16)}
    with contextlib.suppress(ImportError):
        import ml_dtypes

        found[torch.bfloat16] = np.dtype(ml_dtypes.bfloat16)
    for name, dtype in list(found.items()):
        try:
            ours.batch_norm(np.zeros((2, 1), dtype))
        except TypeError:
            del found[name]
    return found


HALF = _half_types()


class Options(NamedTuple):
    """What a call is besides tensors."""

    eps: float
    activation: str | None
    negative_slope: float


def array_of(tensor: Tensor) -> Any:
    """The memory of a CPU tensor as an array."""
    tensor = tensor.detach()
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if tensor._is_zerotensor():  # zeros without memory
        tensor = tensor.clone()
    if tensor.dtype is torch.bfloat16:  # NumPy has none of its own
        return tensor.view(torch.int16).numpy().view(HALF[torch.bfloat16])
    return tensor.numpy()


def parameter_of(tensor: Tensor | None) -> Any:
    """C numbers; half types as float32."""
    if tensor is None:
        return None
    return array_of(tensor.float() if tensor.dtype in HALF else tensor)


def optional_array(tensor: Tensor | None) -> Any:
    return None if tensor is None else array_of(tensor)


def fused(bias: Tensor | None, residual: Tensor | None, options: Options) -> dict[str, Any]:
    """beta, and what is fused with the batch norm."""
    return {
        "beta": parameter_of(bias), "residual": optional_array(residual), "activation": options.activation,
        "negative_slope": options.negative_slope,
    }  # fmt: skip


def threads() -> num_threads:
    """As many threads as PyTorch uses, and no more than bnfast is told to.

    A number that is set is used as it is: what runs besides is PyTorch's own, waiting for this call to end.
    """
    return num_threads(min(torch.get_num_threads(), get_num_threads()))


def format_of_result(x: Tensor) -> torch.memory_format:
    """What PyTorch's code gives: channels_last where x is, planar of x in any other order."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if x.is_contiguous() or last is None or 0 in x.stride():  # (no order is read from one that was expanded)
        return torch.contiguous_format
    if not x.is_contiguous(memory_format=last):
        x = torch.empty_like(x, device="meta")  # without gaps, in the order of x's strides
    return last if x.is_contiguous(memory_format=last) and not x.is_contiguous() else torch.contiguous_format


def forward(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    running: tuple[Tensor, Tensor] | None, options: Options,
) -> tuple[Tensor, Any, Any, Any]:  # fmt: skip
    """(y, mean, inv_std, var): the last three are float64 arrays, of the batch or, where given, the running ones."""
    y = empty_like(x, format_of_result(x))
    gamma = parameter_of(weight)
    given = {**fused(bias, residual, options), "eps": options.eps, "out": array_of(y)}
    with threads():
        if running is None:
            _, mean, inv_std, var = ours.batch_norm(array_of(x), gamma, return_var=True, **given)
        else:
            mean, var = (np.array(parameter_of(each), np.float64) for each in running)
            try:
                ours.batch_norm_eval(array_of(x), mean, var, gamma, **given)
            except ValueError:  # a variance that is negative or not finite: y as PyTorch has it, NaN or bias
                w = theirs.batch_norm(x, *running, weight, bias, False, 0.0, options.eps)
                y.copy_(activated(w if residual is None else w + residual, options))
            with np.errstate(all="ignore"):
                inv_std = 1.0 / np.sqrt(var + options.eps)
    return y, mean, inv_std, var


def backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, mean: Tensor,
    inv_std: Tensor, training: bool, options: Options, *, needs_dx: bool = True,
) -> tuple[Tensor | None, Any, Any, Tensor | None]:  # fmt: skip
    """(dx, dgamma, dbeta, dresidual): the second and third as arrays; the last None without a residual."""
    given = fused(bias, residual, options)
    arrays = array_of(dy), array_of(x), mean.numpy(), inv_std.numpy(), parameter_of(weight)
    with threads():
        if not needs_dx and residual is None:
            sums = ours.batch_norm_backward_sums(*arrays, **given)
            return None, np.array(sums.dgamma), np.array(sums.dbeta), None
        dx = empty_like(x)
        dresidual = None if residual is None else empty_like(residual)
        _, dgamma, dbeta, *_ = ours.batch_norm_backward(
            *arrays, training=training, out=array_of(dx), out_residual=optional_array(dresidual), **given
        )
    return dx, dgamma, dbeta, dresidual


def update_running(running: tuple[Tensor, Tensor], mean: Any, var: Any, count: int, momentum: float) -> None:
    """new = (1 - momentum) * old + momentum * batch, with the unbiased variance; in float64, rounded once.

    As in PyTorch's own code no version counter of autograd is raised.
    """
    unbiased = momentum * (count / (count - 1))
    for tensor, batch, weight in ((running[0], mean, momentum), (running[1], var, unbiased)):
        average = array_of(tensor)
        if tensor.dtype in HALF or not average.flags.carray:
            with np.errstate(all="ignore"):
                average[...] = (1.0 - momentum) * average.astype(np.float64) + weight * batch
        else:
            _core.update_average(average, batch, 1.0 - momentum, weight)


def activated(w: Tensor, options: Options, *, in_place: bool = False) -> Tensor:
    """The activation by PyTorch's code; in place where that has a backward for every argument."""
    if options.activation == "relu":
        return theirs.relu(w, inplace=in_place)
    if options.activation == "relu6":
        return theirs.relu6(w, inplace=in_place)
    if options.activation == "leaky_relu":
        return theirs.leaky_relu(w, options.negative_slope)
    one_of(options.activation, "activation", ACTIVATIONS)  # it may have been set since
    return w


def batch_norm(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
    running: tuple[Tensor, Tensor] | None, options: Options, taken: Callable[[Any, Any], None],
) -> Tensor:  # fmt: skip
    """y, in autograd's graph where something needs a gradient; mean and variance are handed to `taken`."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias, residual)):
        y: Tensor = BnfastBatchNorm.apply(x, weight, bias, residual, running, options, taken)
        return y
    y, mean, _, var = forward(x, weight, bias, residual, running, options)
    taken(mean, var)
    return y


class BnfastBatchNorm(torch.autograd.Function):
    """The node in autograd's graph; its name is what profilers and `grad_fn` show."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None,
        running: tuple[Tensor, Tensor] | None, options: Options, taken: Callable[[Any, Any], None],
    ) -> Tensor:  # fmt: skip
        y, mean, inv_std, var = forward(x, weight, bias, residual, running, options)
        taken(mean, var)  # here, as what is saved may end a forward that a checkpoint repeats
        met = met_by_activation(bias, residual, options.activation)
        ctx.save_for_backward(x, weight, *met, torch.from_numpy(mean), torch.from_numpy(inv_std))
        ctx.training, ctx.options = running is None, options
        ctx.dtypes = [None if t is None else t.dtype for t in (weight, bias)]
        ctx.bias = bias  # for a double backward; of its values a copy was saved
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, weight, bias, residual, mean, inv_std = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
        if asks_for_more(dy):
            return *differentiable_gradients(ctx, dy), None, None, None
        dx, dgamma, dbeta, dresidual = backward(
            dy, x, weight, bias, residual, mean, inv_std, ctx.training, ctx.options,
            needs_dx=needs_x or (needs_residual and residual is not None),
        )  # fmt: skip
        if residual is None:
            dresidual = dy  # of one that was only added
        return (
            dx if needs_x else None,
            _gradient(dgamma, ctx.dtypes[0]) if needs_weight else None,
            _gradient(dbeta, ctx.dtypes[1]) if needs_bias else None,
            dresidual if needs_residual else None,
            None, None, None,
        )  # fmt: skip


def _gradient(array: Any, dtype: torch.dtype) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def met_by_activation(
    bias: Tensor | None, residual: Tensor | None, activation: str | None, *, kept: Tensor | None = None
) -> tuple[Any, Any]:
    """What a backward needs of (bias, residual): without an activation nothing; of bias a copy, as it may change.

    kept: that copy, where there is one already.
    """
    if activation is None:
        return None, None
    if bias is not None:
        bias = bias.clone() if kept is None else kept
    return bias, residual


def asks_for_more(dy: Tensor) -> bool:
    """Whether a backward is asked for more than gradients of one dy: for a graph, for many, for a tangent."""
    return torch.is_grad_enabled() or is_batched(dy) or is_differentiated()


def is_differentiated() -> bool:
    """Whether transforms of torch.func or forward-mode differentiation are on; a graph in the making knows, too."""
    return bool(torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0)


def is_batched(dy: Tensor) -> bool:
    """Whether it stands for many, as with `is_grads_batched` or under `torch.func.vmap`."""
    return bool(torch._C._are_functorch_transforms_active() or torch._C._functorch.is_legacy_batchedtensor(dy))


@contextlib.contextmanager
def _gradients_within_transforms() -> Iterator[None]:
    """`requires_grad_` of tensors of one's own, also where torch.func transforms a backward."""
    before = torch._C._functorch.get_inplace_requires_grad_allowed()
    torch._C._functorch.set_inplace_requires_grad_allowed(True)
    try:
        yield
    finally:
        torch._C._functorch.set_inplace_requires_grad_allowed(before)


def differentiable_gradients(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    """The same gradients by PyTorch's own code: for double backward, and for backwards of many dy at once."""
    *saved, mean, inv_std = ctx.saved_tensors
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), _gradients_within_transforms():
        # Aliases: what these depend on is no concern of this node's. (`view_as` would set strides anew.)
        inputs: list[Any] = [None if t is None else torch.ops.aten.alias(t) for t in saved]
        if not create_graph:
            inputs = [None if t is None else t.detach().requires_grad_() for t in inputs]
        x, weight, bias, residual = inputs
        # these were not kept where their values do not matter
        if ctx.needs_input_grad[2] and bias is None:
            inputs[2] = bias = mean.new_zeros(mean.shape, dtype=ctx.dtypes[1]).requires_grad_()
        elif ctx.needs_input_grad[2] and create_graph:  # the values of then, and a place in the graph
            inputs[2] = bias = bias + (ctx.bias - ctx.bias.detach())
        if ctx.needs_input_grad[3] and residual is None:
            inputs[3] = residual = x.new_zeros(()).expand_as(x).requires_grad_()
        dtype = next((t.dtype for t in (weight, bias) if t is not None), torch.promote_types(x.dtype, torch.float32))
        running = mean.to(dtype), (inv_std**-2 - ctx.options.eps).to(dtype)
        w = theirs.batch_norm(x, *running, weight, bias, ctx.training, 0.0, ctx.options.eps)
        w = w if residual is None else w + residual
        y = activated(w, ctx.options)
        if not is_batched(dy):  # of one image PyTorch's backward may misread a planar dy where x is in channels_last
            dy = torch.empty_like(y).copy_(dy)
        wanted = [t is not None and needed for t, needed in zip(inputs, ctx.needs_input_grad[:4], strict=True)]
        found = iter(
            torch.autograd.grad(
                y, [t for t, use in zip(inputs, wanted, strict=True) if use], dy,
                create_graph=create_graph, allow_unused=True,
            )
        )  # fmt: skip
        gradients = [next(found) if use else None for use in wanted]
    return tuple(gradients)
