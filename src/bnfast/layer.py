"""The layer: parameters, modes, forward and backward around the extension's steps.

A forward leaves a record, `Forward`, of all that its backward needs: x itself and copies of the rest. `backward` uses
up the last one; `vjp` hands out one as a function. Whatever else a call changes is exchanged at once (core/layer.pxi,
where `layer(x)` itself is, too).
The statistics are in statistics/running.py, dictionaries, pickles and files in state/layer_state.py.
"""

import weakref
from functools import partial
from typing import Any, Literal, Self, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from . import _core, grad_mode
from ._checks import channel_array, flag, floating_dtype, integer, number, one_of
from ._core import KEEP_LAST, KEEP_NOTHING, KEEP_PULLBACK
from .distributed.gather import of_layer
from .functional import Activation, Array
from .state.layer_state import FIXED, LayerState
from .statistics.running import gather, with_statistics

__all__ = ["BatchNorm", "Pullback"]


class _OthersName:
    """An attribute of other libraries' layers, which is not there under this name: says what it is called here."""

    def __init__(self, ours: str) -> None:
        self.ours = ours

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: object, owner: type | None = None) -> None:
        raise AttributeError(f"{self.name}: here this is {self.ours}")

    def __set__(self, layer: object, value: object) -> None:
        raise AttributeError(f"{self.name}: here this is {self.ours}; nothing was set")


class BatchNorm(LayerState):
    """Batch normalisation layer over one axis of arrays of any rank from 2 up.

    In training mode `bn(x)` normalises with the statistics of the batch and updates the running statistics; in eval
    mode it normalises with the running statistics. `bn.backward(dy)` gives the gradient of the last forward.

    Parameters
    ----------
    num_features : int
        C, the length of the channel axis.
    axis : int
        The channel axis: 1 for (N, C) and (N, C, H, W), -1 for (N, H, W, C).
    eps : float
        Added to the variance, inside the root; finite and at least 0. Training needs it positive.
    momentum : float or None
        Weight of the new batch in the running statistics, in [0, 1] (PyTorch's convention):
        running = (1 - momentum) * running + momentum * batch. None: the average of all batches, equally weighted.
    affine : bool, "gamma" or "beta"
        Whether there are `gamma` and `beta`: both, none, or the one named.
    track_running_stats : bool
        Whether there are running statistics. Without them eval mode uses the batch's statistics, as PyTorch does.
    unbiased_running_var : bool
        Whether `running_var` collects the unbiased variance (divisor M - 1, PyTorch) or the population's (divisor M,
        Keras, ONNX). The normalisation itself always uses the population's.
    activation : None, "relu", "relu6" or "leaky_relu"
        Of y, in the same pass, forward and backward.
    negative_slope : float
        Of "leaky_relu", above 0 and below 1.
    nonfinite : "propagate", "skip" or "raise"
        What a batch does in training, or in a calibration, whose mean or variance is not finite in a channel: enter the
        statistics as it is; leave those of that channel alone, counted in `num_batches_skipped`; or raise
        FloatingPointError. y is
        the same in the first two. A calibration leaves out the whole batch for "skip".
    comm : communicator, optional
        The batch of a training forward lies on several processes, a part on each; its statistics are those of all of
        it: an mpi4py communicator, a torch.distributed process group, or a callable that takes a float64 vector and
        gives the (processes, n) array of everybody's, in the order of the processes. Each calls the same layers in the
        same order. Parts may differ in size, and be empty. `grad_gamma` and `grad_beta` are of the process's own part.
        Eval mode asks nobody.
    dtype : float32 or float64
        Of `gamma`, `beta` and their gradients. Data may be either, whatever this says; y has the dtype of x.

    Attributes
    ----------
    gamma, beta : (C,) ndarray of `dtype`, or None
        To be updated in place by the optimiser. An array set in their place is kept, not copied: it may be a
        contiguous view of one that holds all parameters of a network.
    grad_gamma, grad_beta : (C,) ndarray of `dtype`, or None
        Set by `backward`; None before the first, and from a training forward to its backward.
    running_mean, running_var : (C,) float64 ndarray, read-only, or None
    batch_mean, batch_var : (C,) float64 ndarray, read-only, or None
        Mean and population variance of the last batch that was normalised with.
    num_batches_tracked : int
    num_batches_skipped : (C,) int64 ndarray
    training : bool

    Raises
    ------
    TypeError, ValueError
        If an argument has a wrong type or is out of range.

    Notes
    -----
    Ioffe and Szegedy, "Batch Normalization", 2015. The options cannot be changed afterwards, but `eps` and `momentum`,
    which belong to the next forward. For backward, a forward keeps a reference to x, not a copy, until its backward or
    the next forward: do not modify x in between. `with bnfast.no_grad():` keeps nothing. Several threads may share a
    layer; each forward and backward takes effect as a whole, and `backward` belongs to the last forward of any thread:
    threads that train at once use `vjp`.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> bn = bnfast.BatchNorm(3)
    >>> x = np.random.default_rng(0).normal(5.0, 2.0, (64, 3)).astype(np.float32)
    >>> y = bn(x)
    >>> dx = bn.backward(np.ones_like(y))
    >>> bn.eval()(x).shape
    (64, 3)
    """

    __module__ = "bnfast"  # where it is found, also by pickles

    num_features: int
    axis: int
    affine: bool | Literal["gamma", "beta"]
    track_running_stats: bool
    unbiased_running_var: bool
    activation: Activation
    negative_slope: float
    nonfinite: Literal["propagate", "skip", "raise"]
    dtype: np.dtype[Any]

    def __init__(
        self,
        num_features: SupportsIndex,
        *,
        axis: SupportsIndex = 1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool | Literal["gamma", "beta"] = True,
        track_running_stats: bool = True,
        unbiased_running_var: bool = True,
        activation: Activation = None,
        negative_slope: float = 0.01,
        nonfinite: Literal["propagate", "skip", "raise"] = "propagate",
        comm: Any = None,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self._begin(
            num_features, axis, eps, momentum, affine, track_running_stats, unbiased_running_var, activation,
            negative_slope, nonfinite, dtype,
        )  # fmt: skip
        self.comm = comm

    def _begin(
        self,
        num_features: SupportsIndex,
        axis: SupportsIndex,
        eps: float,
        momentum: float | None,
        affine: Any,
        track_running_stats: bool,
        unbiased_running_var: bool,
        activation: Any,
        negative_slope: float,
        nonfinite: Any,
        dtype: DTypeLike,
    ) -> None:
        """A new layer's attributes, whichever way it is made."""
        features = integer(num_features, "num_features")
        most = np.iinfo(np.intp).max // 8  # float64s in an array of NumPy's
        if not 1 <= features <= most:
            raise ValueError(f"num_features: expected at least 1 and at most {most}, got {features}")
        self.__dict__.update(
            num_features=features,
            axis=integer(axis, "axis"),
            affine=one_of(affine, "affine", (True, False, "gamma", "beta")),
            track_running_stats=flag(track_running_stats, "track_running_stats"),
            unbiased_running_var=flag(unbiased_running_var, "unbiased_running_var"),
            activation=one_of(activation, "activation", (None, "relu", "relu6", "leaky_relu")),
            negative_slope=_core.as_negative_slope(negative_slope),
            nonfinite=one_of(nonfinite, "nonfinite", ("propagate", "skip", "raise")),
            dtype=floating_dtype(dtype),
        )
        self._options = _core.Options(
            self.axis, features, self.track_running_stats, self.unbiased_running_var, self.nonfinite, self.activation,
            self.negative_slope,
        )  # fmt: skip
        self.eps = eps
        self.momentum = momentum
        self._training = True
        self._processes: _core.Processes | None = None
        self._gamma = np.ones(features, self.dtype) if self.affine in (True, "gamma") else None
        self._beta = np.zeros(features, self.dtype) if self.affine in (True, "beta") else None
        self._contents = _core.AtomicReference(_core.Contents(self._fresh_statistics()))
        self._calibration = _core.AtomicReference(None)
        self._living: set[weakref.ref[_core.Forward]] = set()  # forwards of pullbacks

    def __setattr__(self, name: str, value: object) -> None:
        if name in FIXED:
            raise AttributeError(f"{name}: fixed when the layer was made; make another layer")
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in FIXED:
            raise AttributeError(f"{name}: fixed when the layer was made")
        super().__delattr__(name)

    # (not by __getattr__, which would make every other attribute slower)
    weight = _OthersName("gamma")
    bias = _OthersName("beta")
    grad_weight = _OthersName("grad_gamma")
    grad_bias = _OthersName("grad_beta")
    epsilon = _OthersName("eps")
    moving_mean = _OthersName("running_mean")
    moving_variance = _OthersName("running_var")

    @property
    def eps(self) -> float:
        """Added to the variance, inside the root, from the next forward on."""
        return self._eps

    @eps.setter
    def eps(self, value: float) -> None:
        self._eps = _core.as_eps(value)

    @property
    def momentum(self) -> float | None:
        """Weight of the new batch in the running statistics; None: all batches weigh the same."""
        return self._momentum

    @momentum.setter
    def momentum(self, value: float | None) -> None:
        momentum = None if value is None else number(value, "momentum")
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(f"momentum: expected None or a number in [0, 1], got {value!r}")
        self._momentum = momentum

    @property
    def comm(self) -> Any:
        """The communicator of the processes that hold the layer; None: it is on this one alone.

        The next training forward is on all of them. Copies keep it; pickles and files keep that there was one, and a
        training forward then raises until it is set, to a communicator or to None.
        """
        return None if self._processes is None else self._processes.comm

    @comm.setter
    def comm(self, value: Any) -> None:
        self._processes = of_layer(value, self)

    # --- forward ------------------------------------------------------------------------------------------------

    __call__ = _core.called

    def forward(
        self,
        x: ArrayLike,
        out: Array | None = None,
        *,
        residual: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        update: bool = True,
    ) -> Array:
        """Normalise `x`; in training mode update the running statistics too.

        Parameters
        ----------
        x : (..., C, ...) array_like of float16, bfloat16, float32 or float64, at least 2 dimensions
        out : ndarray like x, optional
            Where to write y. It may be `x`; then there can be no backward, because x is gone.
        residual : ndarray of x's shape and dtype, optional
            Added before the activation; `backward` then gives its gradient, too. It is not kept: it may be `out`, and
            may be changed once y is there.
        mask : bool array_like, broadcast to x's shape without its channel axis, optional
            Where True, the position takes part in the batch. Elsewhere x and residual may be anything, and y is 0.
        update : bool
            Whether running statistics and counts take the batch in (and a calibration gathers it). Without it a forward
            in training mode is the same but for those.

        Returns
        -------
        y : ndarray like x

        Raises
        ------
        TypeError
            If an argument has a wrong type or dtype.
        ValueError
            If a shape is wrong, fewer than 2 values a channel take part in training, or `running_var` holds what is not
            finite or not above 0 with eps, in eval mode.
        numpy.exceptions.AxisError
            If `x` has no such axis.
        FloatingPointError
            If the statistics of the batch are not finite, in training with `nonfinite="raise"`. The layer is unchanged;
            `out` may be written.
        OverflowError
            If `running_var` would leave float64's range, in training; likewise.
        """
        return self._forward(x, out, residual, mask, update, KEEP_NOTHING if grad_mode.is_off() else KEEP_LAST)[0]

    def vjp(
        self,
        x: ArrayLike,
        out: Array | None = None,
        *,
        residual: ArrayLike | None = None,
        mask: ArrayLike | None = None,
        update: bool = True,
    ) -> tuple[Array, "Pullback"]:
        """Normalise `x` as `forward` does, and give the backward of this forward alone.

        For several forwards before their backwards: of a discriminator's real and generated batch, of the steps of a
        recurrent network, of threads. It leaves alone what `backward` belongs to, and gradients.

        Parameters
        ----------
        x : (..., C, ...) array_like of float16, bfloat16, float32 or float64, at least 2 dimensions
        out : ndarray like x, optional
            Where to write y; not into x.
        residual, mask : optional
            As for `forward`.
        update : bool
            Whether running statistics and counts take the batch in.

        Returns
        -------
        y : ndarray like x
        pullback : callable
            `pullback(dy, out=None, *, accumulate=False, out_residual=None)` is what `backward` would be for this
            forward; it may be called any number of times, whatever has happened to the layer since. It keeps x alive.

        Raises
        ------
        TypeError, ValueError, numpy.exceptions.AxisError, FloatingPointError, OverflowError
            As `forward`; and if `out` lies in the memory of x.

        Examples
        --------
        >>> import numpy as np, bnfast
        >>> bn = bnfast.BatchNorm(2)
        >>> real, fake = np.array([[1.0, 2.0], [3.0, 5.0]]), np.array([[0.0, 1.0], [4.0, 9.0]])
        >>> y_real, back_real = bn.vjp(real)
        >>> y_fake, back_fake = bn.vjp(fake)
        >>> dreal = back_real(np.ones_like(real))
        >>> dfake = back_fake(np.ones_like(fake), accumulate=True)  # grad_gamma, grad_beta: the sums of both
        """
        if out is not None and _core.shares_memory(out, _core.as_data(x, "x")):
            raise ValueError("out: expected memory that is not x's, as the pullback needs x, got a part of it")
        y, forward = self._forward(x, out, residual, mask, update, KEEP_PULLBACK)
        self._living.add(weakref.ref(forward, self._living.discard))
        return y, Pullback(self, forward)

    def _forward(
        self,
        x: ArrayLike,
        out: Array | None,
        residual: ArrayLike | None,
        mask: ArrayLike | None,
        update: bool,
        keep: int,
    ) -> tuple[Array, _core.Forward]:
        """Compute, and change the layer in one step. keep: who will call the backward."""
        calibration = self._calibration.value
        living = () if out is None else self._living_forwards()
        if calibration is None:
            return _core.forward_of(
                self._contents, self._options, x, self._gamma, self._beta, self._eps, self._momentum, self._training,
                keep, update, out, living, residual, mask, self._processes,
            )  # fmt: skip
        gathers = partial(gather, self._calibration, calibration, self.nonfinite) if update else None
        return _core.forward_in_calibration(
            self._contents, self._options, x, self._gamma, self._beta, self._eps, self._training, keep, out, living,
            gathers, residual, mask,
        )  # fmt: skip

    def _living_forwards(self) -> tuple[_core.Forward, ...]:
        return _core.living_forwards(self._contents, self._living)

    # --- backward -----------------------------------------------------------------------------------------------

    def backward(
        self,
        dy: ArrayLike,
        out: Array | None = None,
        *,
        accumulate: bool = False,
        out_residual: Array | None = None,
    ) -> Any:
        """Gradient of the loss with respect to the last forward's x; sets `grad_gamma` and `grad_beta`.

        It is the gradient of what that forward computed, whatever has been changed in the layer since. After a forward
        in eval mode the statistics are constants; otherwise the gradient flows through them. It uses the forward up.

        Parameters
        ----------
        dy : ndarray of x's shape and dtype
            Gradient of the loss with respect to y.
        out : ndarray like x, optional
            Where to write dx. It may be `dy`, or `x`.
        accumulate : bool
            Whether to add to what earlier backwards gave for gamma and beta, instead of replacing it.
        out_residual : ndarray like x, optional
            Where to write the gradient of the residual. One of the two may be `dy`.

        Returns
        -------
        dx : ndarray like x
            If the forward had a residual: (dx, dresidual).

        Raises
        ------
        RuntimeError
            Without a forward that waits for its backward (none, used up, under `no_grad`, replaced by one in eval
            mode), or if x has been overwritten since.
        TypeError, ValueError
            If `dy` differs from x in dtype or shape, or `out` does not fit. The forward still waits.
        """
        contents = self._contents.value
        forward = contents.forward
        if forward is None:
            raise RuntimeError(
                f"backward: expected a forward that waits for its backward, got {contents.why_no_forward}; "
                "vjp gives a forward whose backward may be called at any time"
            )
        if contents.replaced and self._training:
            raise RuntimeError(
                "backward: a forward in eval mode took the place of the one in training that waited for its backward; "
                "look at other data under no_grad before the forward, or give the forward a backward of its own by vjp"
            )
        return self._backward(forward, dy, out, accumulate, out_residual, last=True)

    def _backward(
        self,
        forward: _core.Forward,
        dy: ArrayLike,
        out: Array | None,
        accumulate: bool,
        out_residual: Array | None,
        last: bool,
    ) -> Any:
        """Compute, then change the layer in one step. last: it is the layer's last forward, which is used up."""
        living = () if out is None and out_residual is None else self._living_forwards()
        dx, dresidual, dgamma, dbeta = _core.backward_of(forward, dy, out, living, self.dtype, out_residual)
        gradients = None if self._gamma is None else dgamma, None if self._beta is None else dbeta
        _core.commit_backward(self._contents, forward, last, gradients, accumulate)
        return dx if dresidual is None else (dx, dresidual)

    # --- modes --------------------------------------------------------------------------------------------------

    @property
    def training(self) -> bool:
        """Whether a forward takes the statistics of its batch; see `train` and `eval`."""
        return self._training

    @training.setter
    def training(self, value: bool) -> None:
        self._training = flag(value, "training")

    def train(self, mode: bool = True) -> Self:
        """Switch to training mode (or, with False, to eval mode); returns the layer."""
        self._training = flag(mode, "mode")
        return self

    def eval(self) -> Self:
        """Switch to eval mode; returns the layer."""
        return self.train(False)

    # --- parameters and gradients -------------------------------------------------------------------------------

    @property
    def gamma(self) -> Array | None:
        """(C,) scale of the normalised values; None if `affine` leaves it out."""
        return self._gamma

    @gamma.setter
    def gamma(self, value: Array) -> None:
        self._gamma = self._parameter(value, "gamma")

    @property
    def beta(self) -> Array | None:
        """(C,) shift of the scaled values; None if `affine` leaves it out."""
        return self._beta

    @beta.setter
    def beta(self, value: Array) -> None:
        self._beta = self._parameter(value, "beta")

    def _parameter(self, value: Array | None, name: str) -> Array:
        if self.affine not in (True, name):
            raise AttributeError(f"{name}: this layer was made with affine={self.affine!r}")
        array, other = self._check_parameter(value, name), self._beta if name == "gamma" else self._gamma
        if other is not None and _core.shares_memory(array, other):
            raise ValueError(f"{name}: expected memory of its own, got a part of the other parameter's")
        return array

    def _check_parameter(self, value: Array | None, name: str) -> Array:
        """The array itself, once it is one that can be trained."""
        if not isinstance(value, np.ndarray) or value.dtype != self.dtype:
            kind = f"dtype {value.dtype}" if isinstance(value, np.ndarray) else type(value).__name__
            raise TypeError(
                f"{name}: expected an ndarray of {self.dtype}, got {kind} "
                f"(bn.{name}[...] = values converts into the layer's own)"
            )
        if isinstance(value, np.ma.MaskedArray):
            raise TypeError(f"{name}: expected an array without a mask, got {type(value).__name__}")
        if value.shape != (self.num_features,):
            raise ValueError(f"{name}: expected shape ({self.num_features},), got {value.shape}")
        if not value.flags.carray:
            raise ValueError(f"{name}: expected a writeable contiguous array, to be updated in place")
        return value

    @property
    def grad_gamma(self) -> Array | None:
        """(C,) gradient of the loss with respect to gamma, from the last backward; None: there is none yet.

        It may be set: to None, to forget it, or to an array, to which `accumulate=True` then adds.
        """
        return self._contents.value.gradients[0]

    @grad_gamma.setter
    def grad_gamma(self, value: ArrayLike | None) -> None:
        self._set_gradient(value, 0, "grad_gamma", self._gamma)

    @property
    def grad_beta(self) -> Array | None:
        """(C,) gradient of the loss with respect to beta, as `grad_gamma`."""
        return self._contents.value.gradients[1]

    @grad_beta.setter
    def grad_beta(self, value: ArrayLike | None) -> None:
        self._set_gradient(value, 1, "grad_beta", self._beta)

    def _set_gradient(self, value: ArrayLike | None, place: int, name: str, parameter: Array | None) -> None:
        if value is not None:
            if parameter is None:
                raise AttributeError(f"{name}: this layer was made with affine={self.affine!r}")
            if type(value) is not np.ndarray or value.dtype != self.dtype or value.shape != parameter.shape:
                value = channel_array(value, name, self.num_features, self.dtype)

        def with_gradient(found: _core.Contents) -> _core.Contents:
            gradients, sums = list(found.gradients), list(found.accumulated)
            gradients[place] = sums[place] = value
            return found.replace(gradients=tuple(gradients), accumulated=tuple(sums))

        self._contents.update(with_gradient)

    def parameters(self) -> dict[str, Array]:
        """The arrays to be trained: {"gamma": ..., "beta": ...}, those that `affine` says."""
        found = {"gamma": self._gamma, "beta": self._beta}
        return {name: array for name, array in found.items() if array is not None}

    def gradients(self) -> dict[str, Array]:
        """Their gradients under the same names; empty where `grad_gamma` and `grad_beta` are None."""
        found = zip(("gamma", "beta"), self._contents.value.gradients, strict=True)
        return {name: array for name, array in found if array is not None}

    def reset_parameters(self) -> None:
        """gamma 1, beta 0 (in place), and `reset_running_stats`."""
        fresh = {"gamma": np.ones(self.num_features, self.dtype), "beta": np.zeros(self.num_features, self.dtype)}
        copies = [(self._check_parameter(array, name), fresh[name]) for name, array in self.parameters().items()]
        statistics = self._fresh_statistics()
        _core.update_all([(self._contents, lambda found: with_statistics(found, statistics), copies)])

    def _mode(self) -> dict[str, Any]:
        """The attributes that are neither fixed nor exchanged with the contents."""
        return {name: self.__dict__[name] for name in ("_eps", "_momentum", "_training")}

    def __repr__(self) -> str:
        parts = [str(self.num_features), f"axis={self.axis}", f"eps={self.eps:g}", f"momentum={self.momentum}"]
        usual = {
            "affine": True,
            "track_running_stats": True,
            "unbiased_running_var": True,
            "activation": None,
            "negative_slope": self.negative_slope if self.activation != "leaky_relu" else 0.01,
            "nonfinite": "propagate",
        }
        parts += [f"{name}={getattr(self, name)!r}" for name, value in usual.items() if getattr(self, name) != value]
        if self._processes is not None:
            parts.append(f"comm={'<to be set>' if self.comm is None else type(self.comm).__name__}")
        if self.dtype != np.float32:
            parts.append(f"dtype={self.dtype}")
        return f"{type(self).__name__}({', '.join(parts)})"


class Pullback:
    """The backward of one forward, from `BatchNorm.vjp`. It may be called any number of times, from any thread."""

    __slots__ = ("_forward", "_layer")

    def __init__(self, layer: BatchNorm, forward: _core.Forward) -> None:
        self._layer = layer
        self._forward = forward

    def __call__(
        self,
        dy: ArrayLike,
        out: Array | None = None,
        *,
        accumulate: bool = False,
        out_residual: Array | None = None,
    ) -> Any:
        """Gradient of the loss with respect to this forward's x; sets the layer's `grad_gamma` and `grad_beta`.

        Parameters, result and errors are those of `BatchNorm.backward`.
        """
        return self._layer._backward(self._forward, dy, out, accumulate, out_residual, last=False)

    def __reduce__(self) -> Any:
        raise TypeError("a pullback belongs to one forward of one layer, and cannot be copied or pickled")

    def __repr__(self) -> str:
        return f"<backward of a forward of {self._forward.x.shape} through {self._layer!r}>"


_core.set_plain_forward(BatchNorm.forward, grad_mode.depth)
