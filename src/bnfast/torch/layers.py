"""PyTorch's layers with our forward and backward.

`_Layer.forward` decides: PyTorch's own code for what the kernels do not do, the operator of operator.py under
`torch.compile`, the kernels otherwise; in training with a process group, processes.py.
"""

from collections.abc import Container
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.parameter import Parameter

from .. import _core
from .._checks import one_of
from ..distributed.gather import Carried
from . import calls, operator, processes

__all__ = ["OURS", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"]

WIDE = (torch.float32, torch.float64)
# Elements from which on `pays`: (gradients wanted, layout): (alone, with a ReLU or a residual, with what PyTorch is
# slow with). Measured in whole steps of training (benchmarks/torch_steps.py): there Python costs three times what it
# does in a loop of its own, and large results lie in memory that the system hands out anew. Rows, (N, C): by calls.
LEAST_NEAR = {
    (True, "planar"): (400_000, 300_000, 300_000),
    (True, "channels last"): (3_000_000, 3_000_000, 900_000),
    (True, "rows"): (800_000, 500_000, 500_000),
    (False, "planar"): (1_000_000, 400_000, 400_000),
    (False, "channels last"): (600_000, 400_000, 400_000),
    (False, "rows"): (600_000, 400_000, 400_000),
}
# The same where the last level of cache is far from the cores: PyTorch's passes cost more there.
LEAST_FROM_AFAR = {
    **LEAST_NEAR,
    (True, "planar"): (200_000, 200_000, 150_000),
    (True, "channels last"): (1_000_000, 1_000_000, 900_000),
}
# Of half types, of whose memory there is half as much to save; by calls (AVX2).
LEAST_OF_HALF = {
    (True, "planar"): (5_000_000, 3_000_000, 3_000_000),
    (True, "channels last"): (5_000_000, 2_000_000, 2_000_000),
    (True, "rows"): (5_000_000, 2_000_000, 2_000_000),
    (False, "planar"): (12_000_000, 5_000_000, 5_000_000),
    (False, "channels last"): (12_000_000, 1_500_000, 1_500_000),
    (False, "rows"): (12_000_000, 1_500_000, 1_500_000),
}
LEAST = LEAST_FROM_AFAR if _core.last_level_is_far() else LEAST_NEAR
SMALL = min(min(each) for each in LEAST.values())  # what cannot pay, whatever it is
PLAIN = (Tensor, Parameter)  # not their subclasses: these do something of their own


class _Layer(nn.modules.batchnorm._BatchNorm):
    """What the four have in common; before one of PyTorch's classes among their bases."""

    activation: str | None = None
    negative_slope: float = 0.01
    process_group: Any = None
    adds_in_place: bool = False  # a residual of another dtype or shape, as `out += residual` does
    __constants__: tuple[str, ...] = (
        *nn.BatchNorm2d.__constants__,
        *("activation", "negative_slope", "adds_in_place", "_asks_others"),
    )
    __jit_unused_properties__: tuple[str, ...] = ("_asks_others",)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: str | None = None,
        negative_slope: float = 0.01,
        process_group: Any = None,
        **options: Any,
    ) -> None:
        one_of(activation, "activation", calls.ACTIVATIONS)
        slope = _core.as_negative_slope(negative_slope)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)
        self.activation, self.negative_slope = activation, slope
        self.process_group = process_group

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which have the process group, and pickles, which keep that there was one."""
        group = self.process_group
        return self.__dict__ if group is None else {**self.__dict__, "process_group": Carried(group)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        group = state.get("process_group")
        super().__setstate__({**state, "process_group": group.comm} if isinstance(group, Carried) else state)

    def extra_repr(self) -> str:
        text: str = super().extra_repr()
        if self.activation is None:
            return text
        slope = f", negative_slope={self.negative_slope}" if self.activation == "leaky_relu" else ""
        return f"{text}, activation={self.activation!r}{slope}"

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """activation(batch norm(input) + residual).

        Parameters
        ----------
        input : (N, C, ...) tensor
        residual : tensor, optional
            Added before the activation, as `batch norm(x) + residual` is: usually of input's shape and dtype.

        Returns
        -------
        tensor
            Like input, or what the addition makes of another shape or dtype.
        """
        if torch.jit.is_scripting():
            return self._scripted(input, residual)
        return self._forward(input, residual)

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        """In a graph that `torch.fx` traces the layer is one node, as PyTorch's are; its hooks run when that does."""
        x = args[0] if args else kwargs.get("input")
        if type(x) not in PLAIN and isinstance(x, fx.Proxy):
            residual = args[1] if len(args) > 1 else kwargs.get("residual")
            arguments = (x,) if residual is None else (x, residual)
            return x.tracer.create_proxy("call_module", x.tracer.path_of_module(self), arguments, {})
        return super()._call_impl(*args, **kwargs)

    def _forward(self, input: Any, residual: Tensor | None) -> Any:
        if self.training and self._asks_others:
            if torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None:
                raise RuntimeError("process_group: no graph can hold what a layer in training exchanges with other "
                                   "processes: trace or export it in eval mode, or without a process group"
                                   )  # fmt: skip
            if torch.compiler.is_compiling():
                return _outside_of_graphs(self, input, residual)
            return self._on_processes(input, residual)
        return self._on_one(input, residual)

    def _on_one(self, input: Any, residual: Tensor | None) -> Any:
        if type(input) not in PLAIN:
            return self._by_pytorch(input, residual)
        if torch.compiler.is_compiling():
            if torch.compiler.is_exporting() or calls.is_differentiated():
                return self._by_pytorch(input, residual)
            state = self._suiting_state(input, residual)
            if state is None:
                return self._by_pytorch(input, residual)
            return operator.forward(self, state, input, residual)
        if torch._C._get_tracing_state() is not None or input.numel() < SMALL:  # (a traced size is a tensor)
            return self._by_pytorch(input, residual)
        if _is_transformed() or not pays(input, self.activation, residual is not None):
            return self._by_pytorch(input, residual)
        state = self._suiting_state(input, residual)
        if state is None:
            return self._by_pytorch(input, residual)
        return self._by_kernels(input, residual, state)

    def _state(self) -> "_State":
        try:  # where they are; by name it takes PyTorch half a microsecond each
            parameters, buffers = self._parameters, self._buffers
            return _State(
                parameters["weight"], parameters["bias"], buffers["running_mean"], buffers["running_var"]
            )  # fmt: skip
        except KeyError:  # something has put others in their place
            return _State(self.weight, self.bias, self.running_mean, self.running_var)

    def _options(self) -> calls.Options:
        return calls.Options(self.eps, self.activation, self.negative_slope)

    def _by_pytorch(self, input: Tensor, residual: Tensor | None) -> Tensor:
        return self._completed(super().forward(input), residual)

    def _completed(self, y: Tensor, residual: Tensor | None) -> Tensor:
        """In y's memory where it is nobody else's: PyTorch's batch norm does not need it for its backward."""
        if residual is None and self.activation is None:
            return y
        own = type(y) is Tensor and type(self) in OURS.values() and not _is_seen()
        if residual is not None:
            in_place = self.adds_in_place or (own and self._suits_residual(y, residual))
            y = y.add_(residual) if in_place else y + residual
        if self.activation is None:
            return y
        return calls.activated(y, self._options(), in_place=own and type(y) is Tensor)

    def _by_kernels(self, input: Tensor, residual: Tensor | None, state: "_State") -> Tensor:
        weight, bias, mean, var = state
        running = None if self.training or mean is None else (mean, var)

        def taken(batch_mean: Any, batch_var: Any) -> None:
            self._track(state, batch_mean, batch_var, input.numel() // input.shape[1])

        return calls.batch_norm(input, weight, bias, residual, running, self._options(), taken)

    def _track(self, state: "_State", batch_mean: Any, batch_var: Any, count: int) -> None:
        """The running statistics after a batch, in training."""
        if not (self.training and self.track_running_stats):
            return
        momentum, batches = self.momentum, self.num_batches_tracked  # (may have been set to None)
        if batches is not None:
            batches.add_(1)
            if momentum is None:
                momentum = 1.0 / float(batches)
        if state.mean is not None and state.var is not None:
            calls.update_running((state.mean, state.var), batch_mean, batch_var, count, momentum or 0.0)

    def _suiting_state(self, input: Tensor, residual: Tensor | None) -> "_State | None":
        """The tensors, if the kernels do what is asked for and PyTorch would not refuse it.

        They are read last: a parametrization computes them each time.
        """
        if not (self._suits_input(input) and self._suits_residual(input, residual)):
            return None
        state = self._state()
        return state if self._suits_state(input, state) else None

    def _suits_input(self, input: Tensor, *, least: int = 2) -> bool:
        """Whether the kernels take it. least: values a channel."""
        if not input.is_cpu or input.layout is not torch.strided or len(input.shape) not in self._ranks:
            return False
        if input.dtype not in WIDE and input.dtype not in calls.HALF:
            return False
        channels = input.shape[1]
        return bool(channels > 0 and input.numel() >= least * channels)

    def _suits_state(self, input: Tensor, state: "_State") -> bool:
        """Whether they take these. (Where there are none at all, PyTorch takes any number of channels.)"""
        parameters = input.dtype if input.dtype in WIDE else _parameters_of_half(input.dtype, state)
        for tensor in state:
            if tensor is not None and (
                tensor.dtype is not parameters
                or not tensor.is_cpu
                or type(tensor) not in PLAIN
                or tensor.shape != (self.num_features,)
                or self.num_features != input.shape[1]
            ):
                return False
        mean, var = state.mean, state.var
        if not 0 < self.eps < float("inf") or (mean is None) is not (var is None):
            return False
        return mean is None or var is None or not (mean.requires_grad or var.requires_grad)

    def _suits_residual(self, input: Tensor, residual: Tensor | None) -> bool:
        return residual is None or bool(
            type(residual) in PLAIN
            and residual.dtype is input.dtype
            and residual.shape == input.shape
            and residual.is_cpu
            and residual.layout is torch.strided
        )

    _ranks: Container[int] = ()

    @property
    def _asks_others(self) -> bool:
        """Whether a forward in training may depend on other processes."""
        return self.process_group is not None

    def _default_group(self) -> Any:
        return None

    def _on_processes(self, input: Tensor, residual: Tensor | None) -> Tensor:
        """A forward in training, of this process's part of the batch."""
        group = processes.group_of(self.process_group, self._default_group)
        if group is None:
            y: Tensor = self._on_one(input, residual)
            return y
        if isinstance(input, Tensor) and not input.is_cpu:
            return self._completed(nn.SyncBatchNorm.forward(self, input), residual)
        exchange = processes.exchange_of(self, group)
        exchange.agree(self)
        state = self._state()
        with exchange.refusing(processes.FORWARD, processes.width_of(self.num_features)):
            self._check_part(input, state)
            row = processes.row_of(input)
        whole = exchange.whole(row)
        self._track(state, whole.mean, whole.var, whole.values)
        if self._suits_residual(input, residual):
            return processes.batch_norm(input, state.weight, state.bias, residual, whole, self._options(), exchange)
        plain = calls.Options(self.eps, None, self.negative_slope)
        return self._completed(
            processes.batch_norm(input, state.weight, state.bias, None, whole, plain, exchange), residual
        )

    def _check_part(self, input: Tensor, state: "_State") -> None:
        """What goes to PyTorch's code where there is one process has none to go to here."""
        if _is_transformed():
            raise RuntimeError("process_group: in training with one there are no transforms of torch.func, no "
                               "forward-mode differentiation and no dispatch modes")  # fmt: skip
        self._check_input_dim(input)
        if type(input) not in PLAIN:
            raise TypeError(f"input: expected a Tensor and no subclass of it, got {type(input).__name__}")
        if not (
            self._suits_input(input, least=0)
            and self._suits_state(input, state)
            and input.shape[1] == self.num_features  # of all processes, whether there are tensors or not
        ):
            raise ValueError(
                f"input: expected (N, {self.num_features}, ...) of a floating dtype that goes with the parameters', "
                f"eps above 0 and finite, and statistics that want no gradient, got {tuple(input.shape)} of "
                f"{input.dtype}, parameters of "
                f"{sorted({str(t.dtype) for t in state if t is not None})}, eps {self.eps}"
            )

    # of PyTorch's SyncBatchNorm, whose forward takes tensors on other devices
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def _scripted(self, input: Tensor, residual: Tensor | None) -> Tensor:
        """For `torch.jit.script`: what `_by_pytorch` does in a graph, as TorchScript knows no `super()`."""
        self._check_input_dim(input)
        if self.training and self._asks_others:
            raise RuntimeError("TorchScript knows no process group: script a layer in eval mode, or one without")
        factor = 0.0
        if self.momentum is not None:
            factor = self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                factor = 1.0 / float(self.num_batches_tracked)
        use_running = not self.training or self.track_running_stats
        y = F.batch_norm(
            input,
            self.running_mean if use_running else None,
            self.running_var if use_running else None,
            self.weight,
            self.bias,
            self.training or (self.running_mean is None and self.running_var is None),
            factor,
            self.eps,
        )
        if residual is not None:
            y = y.add_(residual) if self.adds_in_place else y + residual
        if self.activation is not None:
            if self.activation == "relu":
                y = F.relu(y)
            elif self.activation == "relu6":
                y = F.relu6(y)
            elif self.activation == "leaky_relu":
                y = F.leaky_relu(y, self.negative_slope)
            else:
                raise ValueError("activation: expected None, 'relu', 'relu6' or 'leaky_relu'")
        return y


@torch.compiler.disable(reason="a batch norm over several processes exchanges numbers with them")
def _outside_of_graphs(layer: _Layer, input: Tensor, residual: Tensor | None) -> Tensor:
    return layer._on_processes(input, residual)


def pays(input: Tensor, activation: str | None, has_residual: bool) -> bool:
    """Whether the kernels are faster than PyTorch's own code, or as fast: what they save is more than a call costs.

    A forward and backward through Python costs 60 to 200 us, PyTorch's half of it. An activation and a residual are
    further passes of PyTorch's code.
    """
    if input.layout is not torch.strided or input.ndim < 2:
        return False
    thresholds = LEAST_OF_HALF if input.dtype in calls.HALF else LEAST
    alone, fused, slow = thresholds[torch.is_grad_enabled(), _layout_of(input)]
    least = slow if activation in ("relu6", "leaky_relu") else fused if activation or has_residual else alone
    return bool(input.numel() >= least)


def _layout_of(input: Tensor) -> str:
    return "planar" if input.stride(1) != 1 else "rows" if input.ndim == 2 else "channels last"


class _State(NamedTuple):
    """A layer's tensors, looked up once."""

    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor | None
    var: Tensor | None


def _parameters_of_half(dtype: torch.dtype, state: _State) -> torch.dtype:
    """Of half data parameters are float32, or half as they are; what the first is, all must be."""
    first = next((tensor for tensor in state if tensor is not None), None)
    return dtype if first is None or first.dtype is dtype else torch.float32


def _is_seen() -> bool:
    """Whether something may keep what passes between operations: a graph, a mode, a transform."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_function_stack() > 0
        or _is_transformed()
    )


def _is_transformed() -> bool:
    """Whether something takes part in every operation that autograd's node would hide from it.

    Transforms of torch.func, forward-mode differentiation, modes that see each operation.
    """
    return bool(calls.is_differentiated() or torch._C._len_torch_dispatch_stack() > 0)


class BatchNorm1d(_Layer, nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` by bnfast's kernels; see `BatchNorm2d`."""

    __module__ = "bnfast.torch"
    _ranks = (2, 3)


class BatchNorm2d(_Layer, nn.BatchNorm2d):
    """`torch.nn.BatchNorm2d` by bnfast's kernels, with what may come after it: activation(batch norm(x) + residual).

    On CPU tensors of float32, float64, bfloat16 and float16, planar and channels_last, in training and eval, the
    memory of tensors is used as it is. All else goes to PyTorch's own code: other devices, subclasses of Tensor,
    double backward, forward-mode differentiation, `torch.func`, tracing and export, little data (where that is
    faster), and what PyTorch refuses.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype
        As for `torch.nn.BatchNorm2d`, and further keyword arguments, too.
    activation : None, "relu", "relu6" or "leaky_relu"
        Of the result, in the same pass.
    negative_slope : float
        Of "leaky_relu", above 0 and below 1.
    process_group : torch.distributed.ProcessGroup, optional
        The batch of a forward in training lies on the processes of this group, a part on each: see `SyncBatchNorm`.
        None: this process has all of it.

    Raises
    ------
    TypeError, ValueError
        If there is no such activation, or the slope is no number above 0 and below 1.

    Notes
    -----
    State dictionaries are those of PyTorch's layer, key by key. Statistics are summed in float64, so y and the running
    statistics differ from PyTorch's by its rounding errors. Gradients are those of the forward that was, whatever
    the running statistics have become since.

    Examples
    --------
    >>> import torch, bnfast.torch
    >>> layer = bnfast.torch.BatchNorm2d(16, activation="relu")
    >>> x, shortcut = torch.randn(8, 16, 14, 14), torch.randn(8, 16, 14, 14)
    >>> layer(x, shortcut).shape
    torch.Size([8, 16, 14, 14])
    """

    __module__ = "bnfast.torch"
    _ranks = (4,)


class BatchNorm3d(_Layer, nn.BatchNorm3d):
    """`torch.nn.BatchNorm3d` by bnfast's kernels; see `BatchNorm2d`."""

    __module__ = "bnfast.torch"
    _ranks = (5,)


class SyncBatchNorm(_Layer):
    """`torch.nn.SyncBatchNorm` on the CPU: one batch whose parts lie on several processes, of any rank from 2 up.

    In training mean and variance are those of all parts together, and dx is the gradient through them. Eval mode asks
    no other process. It is no subclass of `torch.nn.SyncBatchNorm`, which DistributedDataParallel refuses on the CPU.

    Parameters
    ----------
    num_features, eps, momentum, affine, track_running_stats, device, dtype
        As for `torch.nn.SyncBatchNorm`, in its order, and further keyword arguments, too.
    process_group : torch.distributed.ProcessGroup, optional
        With a backend for CPU tensors: gloo. None: the whole world; where there is none, or it has one process, this
        is a batch norm as any other.
    activation, negative_slope
        As for `BatchNorm2d`.

    Raises
    ------
    RuntimeError
        In a forward or backward: on all other processes, if one refuses its input (they name it and its error), or
        calls another layer; for what needs PyTorch's own code in one process: double backward, `torch.func`,
        forward-mode differentiation, `torch.jit`, `torch.export`.
    ValueError
        On all processes, if their layers differ, or there are fewer than 2 values a channel on all together.

    Notes
    -----
    Gradients of weight and bias are sums over the process's own part, as `torch.nn.SyncBatchNorm` leaves them:
    DistributedDataParallel reduces them with all others (to their mean over the processes), or you do.

    A forward is one gather of 2 + 3 C float64 numbers, a backward one of 1 + 2 C, the very first forward one more to
    agree on the layer. Rows are merged in the order of the processes: all have the same bits. Parts may differ in
    size, and be empty. Under `torch.compile` the layer breaks the graph in training (`fullgraph=True` is an error that
    says so). Tensors on other devices go to PyTorch's own code. Copies have the process group; pickles keep that there
    was one, and a forward in training then raises until it is set.

    Examples
    --------
    >>> import torch, bnfast.torch
    >>> layer = bnfast.torch.SyncBatchNorm(16, activation="relu")  # here without other processes
    >>> layer(torch.randn(8, 16, 14, 14)).shape
    torch.Size([8, 16, 14, 14])
    """

    __module__ = "bnfast.torch"
    _ranks = range(2, 65)
    _check_input_dim = nn.SyncBatchNorm._check_input_dim

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        **options: Any,
    ) -> None:
        options["process_group"] = process_group
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype, **options)

    @property
    def _asks_others(self) -> bool:
        return self.process_group is not None or processes.is_initialized()

    def _default_group(self) -> Any:
        return processes.world()


OURS = {
    nn.BatchNorm1d: BatchNorm1d, nn.BatchNorm2d: BatchNorm2d, nn.BatchNorm3d: BatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
}  # fmt: skip
