"""Batch norm as one operator for `torch.compile`, `bnfast::batch_norm`: opaque, with autograd and fake kernels."""

from typing import Any

import torch
from torch import Tensor

from . import calls

__all__ = ["forward"]


def _kept_bias(x: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """A copy of the bias for the backward; empty where that needs none."""
    kept, _ = calls.met_by_activation(bias, None, activation)
    return x.new_empty(0) if kept is None else kept


@torch.library.custom_op("bnfast::batch_norm", mutates_args=())
def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    eps: float,
    activation: str | None,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(y, mean, inv_std, var, kept_bias).

    The statistics are those of the batch, or the running ones if they are given; float64. The last is for the backward,
    a result because a compiler would move a copy to where it is used: after changes of the bias.
    """
    running = None if running_mean is None or running_var is None else (running_mean, running_var)
    options = calls.Options(eps, activation, negative_slope)
    y, *statistics = calls.forward(x, weight, bias, residual, running, options)
    return y, *map(torch.from_numpy, statistics), _kept_bias(x, bias, activation)


@_batch_norm.register_fake
def _(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None, running_mean: Tensor | None,
    running_var: Tensor | None, eps: float, activation: str | None, negative_slope: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    statistics = [x.new_empty(x.shape[1], dtype=torch.float64) for _ in range(3)]
    y = torch.empty_like(x, memory_format=calls.format_of_result(x))
    return y, *statistics, _kept_bias(x, bias, activation)


@torch.library.custom_op("bnfast::batch_norm_backward", mutates_args=())
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    inv_std: Tensor,
    training: bool,
    activation: str | None,
    negative_slope: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dgamma, dbeta, dresidual); the last is empty without a residual."""
    options = calls.Options(0.0, activation, negative_slope)
    dx, dgamma, dbeta, dresidual = calls.backward(dy, x, weight, bias, residual, mean, inv_std, training, options)
    assert dx is not None
    dresidual = x.new_empty(0) if dresidual is None else dresidual
    return dx, torch.from_numpy(dgamma), torch.from_numpy(dbeta), dresidual


@_backward.register_fake
def _(dy: Tensor, x: Tensor, weight: Any, bias: Any, residual: Tensor | None, *others: Any) -> tuple[Tensor, ...]:
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    sums = [x.new_empty(x.shape[1], dtype=dtype) for _ in range(2)]
    return torch.empty_like(x), *sums, x.new_empty(0) if residual is None else torch.empty_like(residual)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, residual, running_mean, _, eps, activation, negative_slope = inputs
    _, mean, inv_std, var, kept_bias = output
    ctx.mark_non_differentiable(mean, inv_std, var, kept_bias)
    bias_then, residual_then = calls.met_by_activation(bias, residual, activation, kept=kept_bias)
    ctx.save_for_backward(x, weight, bias_then, residual_then, mean, inv_std)
    ctx.training, ctx.options = running_mean is None, calls.Options(eps, activation, negative_slope)
    ctx.dtypes = [None if t is None else t.dtype for t in (weight, bias)]
    ctx.bias = bias


def _gradients(ctx: Any, dy: Tensor, *of_statistics: Any) -> tuple[Any, ...]:
    none = (None,) * 5
    if calls.asks_for_more(dy):
        return *calls.differentiable_gradients(ctx, dy), *none
    *saved, mean, inv_std = ctx.saved_tensors
    dx, dgamma, dbeta, dresidual = _backward(
        dy, *saved, mean, inv_std, ctx.training, ctx.options.activation, ctx.options.negative_slope
    )
    needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
    if saved[3] is None:
        dresidual = dy
    return (
        dx if needs_x else None,
        dgamma.to(ctx.dtypes[0]) if needs_weight else None,
        dbeta.to(ctx.dtypes[1]) if needs_bias else None,
        dresidual if needs_residual else None,
        *none,
    )


_batch_norm.register_autograd(_gradients, setup_context=_setup)


def forward(layer: Any, state: Any, x: Tensor, residual: Tensor | None) -> Tensor:
    """A layer's forward in terms that `torch.compile` understands; its tensors (`state`) and `residual` fit."""
    weight, bias, mean, var = state
    in_training = layer.training or mean is None
    running = (None, None) if in_training else (mean, var)
    y, batch_mean, _, batch_var, _ = torch.ops.bnfast.batch_norm(
        x, weight, bias, residual, *running, layer.eps, layer.activation, layer.negative_slope
    )
    if layer.training and layer.track_running_stats:
        momentum: Any = layer.momentum
        if layer.num_batches_tracked is not None:
            layer.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / layer.num_batches_tracked.double()
        if mean is not None:
            momentum = 0.0 if momentum is None else momentum
            count = x.numel() // x.shape[1]
            # as in PyTorch's own code no version counter of autograd is raised
            with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter((mean, var)):
                for tensor, batch in ((mean, batch_mean), (var, batch_var * (count / (count - 1)))):
                    tensor.copy_(tensor.double() * (1.0 - momentum) + batch * momentum)
    return y
