"""The layer: parameters, running statistics and modes around `bnfast.functional`.

Everything that a call changes is in one tuple, `_State`, behind an `AtomicReference`. A call computes first, then makes
a new tuple from the one it finds and exchanges the two, if nobody else has in the meantime (else it looks again). So
an exception, Ctrl-C included, finds a layer as it was before the call or as it is after it; and threads, signal
handlers and forked children need no lock.
"""

import math
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, Self, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import _core
from ._checks import flag, integer
from .functional import Array, Statistics
from .state.files import FORMAT, StateError, decode, encode, read, replace
from .statistics.moments import Moments
from .statistics.report import StatisticsReport

__all__ = ["BatchNorm"]


# What `_restored` raises for a state that is none.
_UNFIT = (TypeError, KeyError, ValueError, AttributeError, RuntimeError)

# A named tuple from all its fields, in a third of the time its own constructor takes.
_new = tuple.__new__


class _Forward(NamedTuple):
    """What backward needs of the last forward."""

    x: Array
    mean: Statistics
    inv_std: Statistics | None  # of the batch
    var: Statistics | None  # or, in eval mode, the running variance, a constant
    overwritten_by: str | None  # the argument that has since been written into the memory of x


class _Averaged(NamedTuple):
    """The running statistics, set aside while the exact ones are in use."""

    mean: Statistics
    var: Statistics
    batches: int


class _State(NamedTuple):
    running_mean: Statistics | None  # these three are in use, whichever they are
    running_var: Statistics | None
    num_batches_tracked: int
    forward: _Forward | None = None
    grad_gamma: Array | None = None
    grad_beta: Array | None = None
    calibration: object = None  # the one that what is gathered belongs to
    gathered: Moments | None = None
    gathered_batches: int = 0
    exact: Moments | None = None
    exact_batches: int = 0
    averaged: _Averaged | None = None  # if the exact ones are in use

    def with_rest_of(self, state: "_State") -> "_State":
        """These statistics, all else from `state`."""
        return state._replace(
            running_mean=self.running_mean,
            running_var=self.running_var,
            num_batches_tracked=self.num_batches_tracked,
            exact=self.exact,
            exact_batches=self.exact_batches,
            averaged=self.averaged,
        )

    def with_forward(self, forward: _Forward) -> "_State":
        return _new(_State, (*self[:3], forward, *self[4:]))

    def with_gradients(self, forward: _Forward | None, gradients: tuple[Array | None, Array | None]) -> "_State":
        return _new(_State, (*self[:3], forward, *gradients, *self[6:]))

    def running(self) -> _Averaged | None:
        """The averaged statistics, in use or not; None if the layer has none."""
        if self.averaged is not None or self.running_mean is None or self.running_var is None:
            return self.averaged
        return _Averaged(self.running_mean, self.running_var, self.num_batches_tracked)

    def using_running(self) -> "_State":
        if self.averaged is None:
            return self
        mean, var, batches = self.averaged
        return self._replace(running_mean=mean, running_var=var, num_batches_tracked=batches, averaged=None)

    def using_exact(self, exact: Moments, batches: int, ddof: int) -> "_State":
        return self._replace(
            running_mean=exact.mean.copy(),
            running_var=exact.var(ddof),
            num_batches_tracked=batches,
            exact=exact,
            exact_batches=batches,
            averaged=self.running(),
        )

    def gather(self, calibration: object, batch: Moments) -> "_State":
        if self.calibration is not calibration or self.gathered is None:
            return self._replace(calibration=calibration, gathered=batch, gathered_batches=1)
        return self._replace(gathered=self.gathered + batch, gathered_batches=self.gathered_batches + 1)


class BatchNorm:
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
        Added to the variance, inside the root; positive and finite.
    momentum : float or None
        Weight of the new batch in the running statistics, in [0, 1] (PyTorch's convention):
        running = (1 - momentum) * running + momentum * batch. None: the average of all batches, equally weighted.
    affine : bool
        Whether there are `gamma` and `beta`.
    track_running_stats : bool
        Whether there are running statistics. Without them eval mode uses the batch's statistics, as PyTorch does.
    unbiased_running_var : bool
        Whether `running_var` collects the unbiased variance (divisor M - 1, PyTorch) or the population's (divisor M,
        Keras, ONNX). The normalisation itself always uses the population's.
    dtype : float32 or float64
        Of `gamma`, `beta` and their gradients. Data may be either, whatever this says; y has the dtype of x.

    Attributes
    ----------
    gamma, beta : (C,) ndarray of `dtype`, or None
        To be updated in place by the optimiser. An array set in their place is kept, not copied: it may be a
        contiguous view of one that holds all parameters of a network.
    grad_gamma, grad_beta : (C,) ndarray of `dtype`, or None
        Set by `backward`; None before the first.
    running_mean, running_var : (C,) float64 ndarray, or None
    num_batches_tracked : int
    training : bool

    Raises
    ------
    TypeError, ValueError
        If an argument has a wrong type or is out of range.

    Notes
    -----
    Ioffe and Szegedy, "Batch Normalization", 2015. For backward, a forward keeps a reference to x, not a copy, until
    the next forward: do not modify x in between. Several threads may share a layer; each forward and backward takes
    effect as a whole, and `backward` belongs to the last forward of any thread.

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

    def __init__(
        self,
        num_features: SupportsIndex,
        *,
        axis: SupportsIndex = 1,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        unbiased_running_var: bool = True,
        dtype: DTypeLike = np.float32,
    ) -> None:
        self.num_features = integer(num_features, "num_features")
        if self.num_features < 1:
            raise ValueError(f"num_features: expected at least 1, got {self.num_features}")
        most = np.iinfo(np.intp).max // 8  # float64s in an array of NumPy's
        if self.num_features > most:
            raise ValueError(f"num_features: expected at most {most}, got {self.num_features}")
        self.axis = integer(axis, "axis")
        self.eps = eps
        self.momentum = momentum
        self.affine = flag(affine, "affine")
        self.track_running_stats = flag(track_running_stats, "track_running_stats")
        self.unbiased_running_var = flag(unbiased_running_var, "unbiased_running_var")
        self.dtype = _dtype(dtype)
        self._training = True
        self._gamma = np.ones(self.num_features, self.dtype) if self.affine else None
        self._beta = np.zeros(self.num_features, self.dtype) if self.affine else None
        self._state = _core.AtomicReference(self._fresh_state())
        self._calibration: _core.AtomicReference[object] = _core.AtomicReference(None)

    @property
    def eps(self) -> float:
        """Added to the variance, inside the root."""
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
        momentum = None if value is None else _number(value, "momentum")
        if momentum is not None and not 0 <= momentum <= 1:
            raise ValueError(f"momentum: expected None or a number in [0, 1], got {value!r}")
        self._momentum = momentum

    # --- forward and backward -----------------------------------------------------------------------------

    def __call__(self, x: ArrayLike, out: Array | None = None) -> Array:
        """See `forward`."""
        return self.forward(x, out)

    def forward(self, x: ArrayLike, out: Array | None = None) -> Array:
        """Normalise `x`; in training mode update the running statistics too.

        Parameters
        ----------
        x : (..., C, ...) array_like of float32 or float64, at least 2 dimensions
        out : ndarray like x, optional
            Where to write y. It may be `x`; then there can be no backward, because x is gone.

        Returns
        -------
        y : ndarray like x

        Raises
        ------
        TypeError
            If an argument has a wrong type or dtype.
        ValueError
            If a shape is wrong, `x` has fewer than 2 values a channel in training, or `running_var` holds a negative
            number or NaN in eval mode.
        numpy.exceptions.AxisError
            If `x` has no such axis.
        """
        data = _core.as_input(x, self.axis, self.num_features)
        state = self._state.value
        gamma, beta = self._parameters()
        overwritten_by = "the forward's out" if out is not None and _core.shares_memory(out, data) else None
        try:
            if self._training or state.running_mean is None:
                y, mean, inv_std, m2 = _core.batch_norm(data, gamma, beta, self.axis, self._eps, out, True)
                forward = _new(_Forward, (data, mean, inv_std, None, overwritten_by))
                while not self._state.compare_and_swap(state, self._after_training(state, forward, m2)):
                    state = self._state.value
            else:
                mean, var = state.running_mean, state.running_var
                calibration = self._calibration.value
                batch = None
                if calibration is not None and data.size:
                    batch = Moments(*_core.moments(data, self.axis))
                y = _core.batch_norm_eval(data, mean, var, gamma, beta, self.axis, self._eps, out, "running_")
                forward = _new(_Forward, (data, mean, None, var, overwritten_by))
                while not self._state.compare_and_swap(state, self._after_eval(state, forward, calibration, batch)):
                    state = self._state.value
        except (TypeError, ValueError, MemoryError):
            raise
        except BaseException:  # an interrupt, perhaps after the kernel has written
            self._note_overwritten(out, "an interrupted forward's out")
            raise
        return y

    def _parameters(self) -> tuple[Array | None, Array | None]:
        """gamma and beta of one moment, for a kernel: without a GIL `load_state_dict` may write them meanwhile."""
        if not _core.FREE_THREADED:
            return self._gamma, self._beta
        _, gamma, beta = self._snapshot()
        return gamma, beta

    def _after_training(self, state: _State, forward: _Forward, m2: Statistics) -> _State:
        """The state after a forward that took the statistics of its batch."""
        mean, var, batches, _, grad_gamma, grad_beta, _, _, _, exact, exact_batches, _ = state  # faster than by name
        count = forward.x.size // self.num_features
        calibration = self._calibration.value
        if calibration is not None:
            return state.with_forward(forward).gather(calibration, Moments(count, forward.mean, m2))
        if not self._training or mean is None:
            return state.with_forward(forward)
        batches += 1
        factor = 1 / batches if self._momentum is None else self._momentum
        mean, var = _core.updated_running(mean, var, forward.mean, m2, count, factor, self.unbiased_running_var)
        # from here on these are the running ones, whatever they were before
        return _new(
            _State, (mean, var, batches, forward, grad_gamma, grad_beta, None, None, 0, exact, exact_batches, None)
        )

    def _after_eval(self, state: _State, forward: _Forward, calibration: object, batch: Moments | None) -> _State:
        """The state after a forward with the running statistics; `batch`: what the calibration gathers of it."""
        state = state.with_forward(forward)
        return (
            state if batch is None or self._calibration.value is not calibration else state.gather(calibration, batch)
        )

    def _note_overwritten(self, out: Array | None, what: str) -> None:
        """After an interrupt: if `out` lies in the memory of the last forward's x, there can be no backward."""

        def after(state: _State) -> _State:
            forward = state.forward
            if forward is None or out is None or not _core.shares_memory(out, forward.x):
                return state
            return state._replace(forward=forward._replace(overwritten_by=what))

        self._exchange(after)

    def _exchange(self, change: Callable[[_State], _State]) -> None:
        """Replaces the state by `change` of it, at once; looks again if it was replaced meanwhile."""
        while True:
            state = self._state.value
            if self._state.compare_and_swap(state, change(state)):
                return

    def backward(self, dy: ArrayLike, out: Array | None = None) -> Array:
        """Gradient of the loss with respect to the last forward's x; sets `grad_gamma` and `grad_beta`.

        After a forward in eval mode the statistics are constants; otherwise the gradient flows through them.

        Parameters
        ----------
        dy : ndarray of x's shape and dtype
            Gradient of the loss with respect to y.
        out : ndarray like x, optional
            Where to write dx. It may be `dy`, or `x` (then there can be no second backward).

        Returns
        -------
        dx : ndarray like x

        Raises
        ------
        RuntimeError
            Without a forward, or if x was overwritten since by an `out`.
        TypeError, ValueError
            If `dy` differs from x in dtype or shape, or `out` does not fit.
        """
        forward = self._state.value.forward
        if forward is None:
            raise RuntimeError("backward: expected a forward before it, got none")
        if forward.overwritten_by is not None:
            raise RuntimeError(f"backward: x is gone: {forward.overwritten_by} was written into its memory")
        inv_std = forward.inv_std
        if inv_std is None:
            assert forward.var is not None
            inv_std = 1 / np.sqrt(forward.var + self.eps)
        try:
            dx, dgamma, dbeta = _core.batch_norm_backward(
                dy, forward.x, forward.mean, inv_std, self._parameters()[0], self.axis, forward.var is None, out
            )
            gradients = (self._as_gradient(dgamma), self._as_gradient(dbeta)) if self.affine else (None, None)
            overwritten = out is not None and _core.shares_memory(out, forward.x)
            while True:
                state = self._state.value
                kept = state.forward
                if overwritten and kept is forward:
                    kept = forward._replace(overwritten_by="the backward's out")
                if self._state.compare_and_swap(state, state.with_gradients(kept, gradients)):
                    break
        except (TypeError, ValueError, MemoryError):
            raise
        except BaseException:
            self._note_overwritten(out, "an interrupted backward's out")
            raise
        return dx

    def _as_gradient(self, gradient: Array) -> Array:
        """In the dtype of the parameters."""
        if gradient.dtype == self.dtype:
            return gradient
        with np.errstate(over="ignore", under="ignore"):
            return gradient.astype(self.dtype)

    # --- modes ----------------------------------------------------------------------------------------------

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

    def calibrate(self) -> AbstractContextManager[Self]:
        """Context manager: forwards inside gather exact statistics, which become the running ones at its end.

        The statistics of everything that passes, however many batches of whatever sizes: the mean and variance of
        the concatenated data (not an average of the batches' variances). Meanwhile the running statistics stay as
        they are, and the layer normalises as its mode says. An exception inside leaves them as they were. The averages
        collected in training are kept: `use_statistics("running")` takes them back, `statistics_report` compares.

        Raises
        ------
        RuntimeError
            If the layer has no running statistics, is calibrating already, or saw fewer than 2 values a channel.

        Examples
        --------
        >>> import numpy as np, bnfast
        >>> bn = bnfast.BatchNorm(1, dtype=np.float64)
        >>> with bn.calibrate():
        ...     for batch in np.arange(6.0).reshape(3, 2, 1):
        ...         y = bn(batch)
        >>> bn.running_mean, bn.running_var
        (array([2.5]), array([3.5]))
        """
        self._need_statistics("calibrate")
        return _core.Calibration(self, self._calibration)

    def _finish_calibration(self, calibration: object) -> None:
        """Called at the end of the block, by a context manager in C that cannot be interrupted half-way."""

        def after(state: _State) -> _State:
            gathered = state.gathered if state.calibration is calibration else None
            if gathered is None or gathered.count < 2:
                raise RuntimeError("calibrate: expected at least 2 values a channel to pass through the layer")
            state = state.using_exact(gathered, state.gathered_batches, self._ddof)
            return state._replace(calibration=None, gathered=None, gathered_batches=0)

        self._exchange(after)

    def use_statistics(self, which: Literal["running", "exact"] | Moments) -> Self:
        """Choose what eval mode normalises with, without losing the other; returns the layer.

        What is in use is what `running_mean`, `running_var`, `num_batches_tracked` and `state_dict` show. After
        `calibrate` that is the exact statistics. A training forward goes on from the ones in use, and the result are
        the running ones. Setting `running_mean` or `running_var` by hand makes running ones too. The exact ones stay
        until the next calibration, `load_state_dict` or a reset.

        Parameters
        ----------
        which : "running", "exact" or Moments
            The averages collected in training; the exact statistics of the last calibration; or exact ones from
            elsewhere, like the sum of what several processes gathered.

        Raises
        ------
        RuntimeError
            If the layer has no running statistics, or no exact ones.
        TypeError, ValueError
            If `which` is none of these, or the Moments have another number of channels or fewer than 2 values.

        Examples
        --------
        >>> import numpy as np, bnfast
        >>> bn = bnfast.BatchNorm(1, dtype=np.float64)
        >>> y = bn(np.array([[1.0], [3.0]]))  # a step of training
        >>> with bn.calibrate():
        ...     y = bn(np.array([[1.0], [3.0]]))
        >>> bn.running_mean, bn.use_statistics("running").running_mean, bn.use_statistics("exact").running_mean
        (array([2.]), array([0.2]), array([2.]))
        """
        self._need_statistics("use_statistics")
        if isinstance(which, Moments):
            exact = self._checked(which, "which")
            self._exchange(lambda state: state.using_exact(exact, max(state.num_batches_tracked, 1), self._ddof))
        elif not isinstance(which, str):
            raise TypeError(f"which: expected 'running', 'exact' or Moments, got {type(which).__name__}")
        elif which == "running":
            self._exchange(_State.using_running)
        elif which == "exact":
            self._exchange(self._using_exact)
        else:
            raise ValueError(f"which: expected 'running', 'exact' or Moments, got {which!r}")
        return self

    def _using_exact(self, state: _State) -> _State:
        if state.exact is None:
            raise RuntimeError("use_statistics: expected exact statistics, from calibrate() or as Moments; got none")
        return state.using_exact(state.exact, state.exact_batches, self._ddof)

    @property
    def statistics_in_use(self) -> Literal["running", "exact"]:
        """What eval mode normalises with: averages collected in training, or exact statistics."""
        return "running" if self._state.value.averaged is None else "exact"

    @property
    def exact_statistics(self) -> Moments | None:
        """What the last `calibrate` gathered, or `use_statistics` was given; None before. In use or not."""
        return self._state.value.exact

    def statistics_report(self, exact: Moments | None = None) -> StatisticsReport:
        """How far the running statistics are from the exact ones.

        Parameters
        ----------
        exact : Moments, optional
            The exact statistics; None: those of the last `calibrate`.

        Returns
        -------
        StatisticsReport
            Arrays of C values, `mean_error` and `std_ratio`, and `worst_channel`; prints as a short table. The
            running statistics are the averages collected in training, also while the exact ones are in use.

        Raises
        ------
        RuntimeError
            If the layer has no running statistics, or there are no exact ones.
        TypeError, ValueError
            If `exact` is not Moments of as many channels and at least 2 values.

        Examples
        --------
        >>> import numpy as np, bnfast
        >>> bn = bnfast.BatchNorm(2)
        >>> x = np.array([[1.0, 0.0], [3.0, 10.0]])
        >>> y = bn(x)
        >>> bn.statistics_report(bnfast.moments(x)).mean_error.round(3)  # of 0.2 and 0.5, in units of std
        array([-1.273, -0.636])
        """
        self._need_statistics("statistics_report")
        state = self._state.value
        moments = state.exact if exact is None else self._checked(exact, "exact")
        running = state.running()
        if moments is None or running is None:
            raise RuntimeError("statistics_report: expected exact statistics, from calibrate() or as Moments; got none")
        return StatisticsReport.compare(running.mean, running.var, moments.mean, moments.var(self._ddof), self.eps)

    @property
    def _ddof(self) -> int:
        return 1 if self.unbiased_running_var else 0

    def _need_statistics(self, method: str) -> None:
        if not self.track_running_stats:
            raise RuntimeError(f"{method}: expected a layer with running statistics, got track_running_stats=False")

    def _checked(self, exact: Moments, name: str) -> Moments:
        """Moments that may be this layer's exact statistics."""
        if not isinstance(exact, Moments):
            raise TypeError(f"{name}: expected Moments, got {type(exact).__name__}")
        if exact.mean.shape != (self.num_features,):
            raise ValueError(f"{name}: expected Moments of {self.num_features} channels, got {exact.mean.size}")
        if exact.count < 2:
            raise ValueError(f"{name}: expected Moments of at least 2 values a channel, got {exact.count}")
        return exact

    # --- parameters and statistics ------------------------------------------------------------------------------

    @property
    def gamma(self) -> Array | None:
        """(C,) scale of the normalised values; None if `affine=False`."""
        return self._gamma

    @gamma.setter
    def gamma(self, value: Array) -> None:
        self._gamma = self._parameter(value, "gamma")

    @property
    def beta(self) -> Array | None:
        """(C,) shift of the scaled values; None if `affine=False`."""
        return self._beta

    @beta.setter
    def beta(self, value: Array) -> None:
        self._beta = self._parameter(value, "beta")

    def _parameter(self, value: Array | None, name: str) -> Array:
        """The array itself, once it is one that can be trained."""
        if not self.affine:
            raise AttributeError(f"{name}: this layer was made with affine=False")
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
    def running_mean(self) -> Statistics | None:
        """(C,) float64; a new array after every training forward, so a reference kept is a snapshot.

        To change it, set it; do not write into the array.
        """
        return self._state.value.running_mean

    @running_mean.setter
    def running_mean(self, value: ArrayLike) -> None:
        mean = self._statistics(value, "running_mean")
        self._exchange(lambda state: state._replace(running_mean=mean, averaged=None))

    @property
    def running_var(self) -> Statistics | None:
        """(C,) float64; a new array after every training forward, so a reference kept is a snapshot.

        To change it, set it; do not write into the array.
        """
        return self._state.value.running_var

    @running_var.setter
    def running_var(self, value: ArrayLike) -> None:
        var = self._statistics(value, "running_var")
        self._exchange(lambda state: state._replace(running_var=var, averaged=None))

    @property
    def num_batches_tracked(self) -> int:
        """Batches that the running statistics have seen."""
        return self._state.value.num_batches_tracked

    @property
    def grad_gamma(self) -> Array | None:
        """(C,) gradient of the loss with respect to gamma, from the last backward."""
        return self._state.value.grad_gamma

    @property
    def grad_beta(self) -> Array | None:
        """(C,) gradient of the loss with respect to beta, from the last backward."""
        return self._state.value.grad_beta

    def parameters(self) -> dict[str, Array]:
        """The arrays to be trained: {"gamma": ..., "beta": ...}, empty if `affine=False`."""
        if self.gamma is None or self.beta is None:
            return {}
        return {"gamma": self.gamma, "beta": self.beta}

    def gradients(self) -> dict[str, Array]:
        """Their gradients under the same names; empty before the first backward."""
        state = self._state.value
        if state.grad_gamma is None or state.grad_beta is None:
            return {}
        return {"gamma": state.grad_gamma, "beta": state.grad_beta}

    def reset_running_stats(self) -> None:
        """Forget what the running statistics have seen: mean 0, variance 1, no batches."""
        self._exchange(self._fresh_state().with_rest_of)

    def reset_parameters(self) -> None:
        """gamma 1, beta 0 (in place), and `reset_running_stats`."""
        ones, zeros = np.ones(self.num_features, self.dtype), np.zeros(self.num_features, self.dtype)
        self._exchange_all(ones, zeros, self._fresh_state().with_rest_of)

    def _fresh_state(self) -> _State:
        if not self.track_running_stats:
            return _State(None, None, 0)
        return _State(np.zeros(self.num_features), np.ones(self.num_features), 0)

    def _statistics(self, value: ArrayLike, name: str) -> Statistics:
        if not self.track_running_stats:
            raise AttributeError(f"{name}: this layer was made with track_running_stats=False")
        return _converted(value, name, self.num_features, np.dtype(np.float64), TypeError, ValueError)

    def _exchange_all(self, gamma: Array, beta: Array, change: Callable[[_State], _State]) -> None:
        """gamma and beta, in place, and the state, all at once."""
        copies: tuple[tuple[Array, Array], ...] = ()
        if self.affine:  # what was set as gamma and beta may have changed since
            copies = (self._parameter(self.gamma, "gamma"), gamma), (self._parameter(self.beta, "beta"), beta)
        while True:
            state = self._state.value
            if self._state.compare_and_swap(state, change(state), copies):
                return

    # --- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Copies of parameters and running statistics under PyTorch's names.

        Returns
        -------
        dict
            weight, bias (if affine), running_mean, running_var, num_batches_tracked (if tracked; those in use, see
            `use_statistics`). Statistics stay float64; `torch.nn.Module.load_state_dict` takes the values through
            `torch.as_tensor`.
        """
        return self._dict_of(*self._snapshot())

    def _snapshot(self) -> tuple[_State, Array | None, Array | None]:
        """The state, and copies of gamma and beta, of one moment."""
        state, gamma, beta = self._state.snapshot((self._gamma, self._beta))
        return state, gamma, beta

    def _dict_of(self, state: _State, gamma: Array | None, beta: Array | None) -> dict[str, NDArray[Any]]:
        found: dict[str, NDArray[Any]] = {}
        if gamma is not None and beta is not None:
            found["weight"], found["bias"] = gamma, beta
        if state.running_mean is not None and state.running_var is not None:
            found["running_mean"] = state.running_mean.copy()
            found["running_var"] = state.running_var.copy()
            found["num_batches_tracked"] = np.array(state.num_batches_tracked, np.int64)
        return found

    def load_state_dict(self, state: Mapping[str, ArrayLike]) -> None:
        """Take parameters and running statistics from a dictionary as `state_dict` or PyTorch give it.

        gamma and beta are written in place, so an optimiser's references to them stay good.

        Parameters
        ----------
        state : mapping of str to array_like
            NumPy arrays, CPU tensors or lists, with exactly the keys of `state_dict`.

        Raises
        ------
        StateError
            If a key is missing or unknown, or a value has a wrong shape, kind or range. The layer is unchanged.
        """
        self._load(state, nan_allowed=False)

    def _load(self, state: Mapping[str, ArrayLike], nan_allowed: bool) -> None:
        """nan_allowed: whether running_var may hold NaN, as after data with NaN."""
        if not isinstance(state, Mapping):
            raise StateError(f"state: expected a mapping, got {type(state).__name__}")
        expected = _names(self.affine, self.track_running_stats)
        _check_names(state, expected)
        new = {
            name: _converted(state[name], name, self.num_features, self.dtype, StateError, StateError)
            for name in ("weight", "bias")
            if name in expected
        }
        fresh = self._fresh_state()
        if self.track_running_stats:
            mean, var = self._running(state["running_mean"], state["running_var"], nan_allowed)
            fresh = _State(mean, var, _whole_number(state["num_batches_tracked"], "num_batches_tracked"))
        nothing = np.empty(0, self.dtype)
        self._exchange_all(new.get("weight", nothing), new.get("bias", nothing), fresh.with_rest_of)

    def __getstate__(self) -> dict[str, Any]:
        attributes = {name: value for name, value in self.__dict__.items() if name not in _NOT_PICKLED}
        options, statistics = self._options(), self._contents()
        try:  # not when it is too late: attributes may have been set to what nobody could restore
            BatchNorm._restored(options, **statistics)
        except _UNFIT as error:
            raise StateError(f"the layer cannot be pickled or copied: {error}") from error
        return {"format": FORMAT, "attributes": {**attributes, **options}, **statistics}

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("num_features", *_OPTIONS)} | {"training": self.training}

    def _contents(self) -> dict[str, Any]:
        """What a layer holds beside its options, of one moment."""
        state, gamma, beta = self._snapshot()
        exact = None if state.exact is None else (state.exact, state.exact_batches)
        return {"state": self._dict_of(state, gamma, beta), "exact": exact, "averaged": state.averaged}

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        try:
            attributes = dict(pickled["attributes"])
            if any(type(name) is not str for name in attributes):
                raise StateError("attributes: expected names")
            made_by = pickled.get("format", 1)
            if type(made_by) is not int or not 1 <= made_by <= FORMAT:
                raise StateError(
                    f"format: expected one up to {FORMAT} (newer ones need a newer bnfast), got {made_by!r}"
                )
            known = {"format", "attributes", "state", "exact", "averaged"}
            if not pickled.keys() <= known:
                raise StateError(f"expected the keys {sorted(known)}, got {sorted(map(str, pickled))}")
            options = {name: attributes.pop(name) for name in ("num_features", *_OPTIONS)}
            options["training"] = attributes.pop("training", True)
            fresh = BatchNorm._restored(options, pickled["state"], pickled.get("exact"), pickled.get("averaged"))
        except _UNFIT as error:
            raise StateError(f"pickle: {error}") from error
        self.__dict__.update(attributes | fresh.__dict__)

    @staticmethod
    def _restored(options: dict[str, Any], state: Any, exact: Any, averaged: Any) -> "BatchNorm":
        """The layer of a pickle or a file. Whatever is wrong with them raises, before anything large is made."""
        state, options = dict(state), dict(options)
        features, training = options.pop("num_features"), options.pop("training")
        for name, value in (*((name, options[name]) for name in _FLAGS), ("training", training)):
            flag(value, name)
        _check_names(state, _names(options["affine"], options["track_running_stats"]))
        for name, value in state.items():
            if name != "num_batches_tracked" and np.shape(value) != (features,):
                raise StateError(f"{name}: expected shape ({features},), got {np.shape(value)}")
        fresh = BatchNorm(features, **options)
        fresh._load(state, nan_allowed=True)
        fresh._load_others(exact, averaged)
        fresh.training = training
        return fresh

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the layer to a file, from which `load` makes an equal one.

        Kept are the parameters, the statistics (the ones in use and those set aside), the mode and the arguments of
        the constructor, to the bit; not the gradients, nor attributes of your own. The file is an `.npz` with
        PyTorch's names: `numpy.load` reads it. The same state gives the same bytes.

        The file at `path` is replaced as a whole, once the new one is on disk: after an exception, a crash or a loss
        of power there is the old one or the new one. Several processes may save to one path. The permissions of a file
        that is there are kept; of a symbolic link, what it points to is replaced.

        Parameters
        ----------
        path : str or os.PathLike
            Taken as it is: no extension is added.

        Raises
        ------
        StateError
            If the layer could not be loaded again, as a parameter or statistic is not finite, or an option was set to
            what does not fit. Nothing is written.
        OSError
            If the file cannot be written. What is there is the old file or the new one, whole.

        Examples
        --------
        >>> import os, tempfile, bnfast
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "bn.npz")
        ...     bnfast.BatchNorm(3, eps=1e-3).eval().save(path)
        ...     bnfast.BatchNorm.load(path)
        BatchNorm(3, axis=1, eps=0.001, momentum=0.1)
        """
        replace(path, self._encoded())

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, max_bytes: int = 1 << 30) -> Self:
        """The layer that `save` wrote to a file.

        Nothing in the file is executed or unpickled. All of it is covered by a checksum, so a damaged file is refused.
        A checksum is not a signature: it does not show whether somebody changed the file on purpose.

        Parameters
        ----------
        path : str or os.PathLike
        max_bytes : int
            A larger file is refused before it is read. Loading takes up to five times the size of the file.

        Returns
        -------
        BatchNorm
            Of this class: a subclass gives its own, without calling its constructor.

        Raises
        ------
        StateError
            If the file was not written by `save`, is damaged, too large, or written by a newer bnfast.
        OSError
            If it cannot be read.
        """
        limit = integer(max_bytes, "max_bytes")
        try:
            fresh = cls._decoded(read(path, limit))
        except StateError as error:
            raise StateError(f"{os.fspath(path)}: {error}") from (error.__cause__ or error)
        layer = cls.__new__(cls)
        layer.__dict__.update(fresh.__dict__)
        return layer

    def _encoded(self) -> bytes:
        """The bytes of a file, which `_decoded` accepts."""
        kept = self._contents()
        arrays, exact, averaged = kept["state"], kept["exact"], kept["averaged"]
        description = {**self._options(), "dtype": self.dtype.name, "exact": None, "averaged": None}
        if exact is not None:
            moments, batches = exact
            description["exact"] = {"count": moments.count, "batches": batches}
            arrays |= {"exact_mean": moments.mean, "exact_m2": moments.m2}
        if averaged is not None:
            description["averaged"] = {"batches": averaged.batches}
            arrays |= {"averaged_mean": averaged.mean, "averaged_var": averaged.var}
        try:
            data = encode(description, arrays)
        except (TypeError, ValueError) as error:  # an option was set to something else
            raise StateError(f"the layer cannot be written: {error}") from error
        self._decoded(data)
        return data

    @staticmethod
    def _decoded(data: bytes) -> "BatchNorm":
        description, arrays = decode(data)
        try:
            for name, kind in _DESCRIPTION.items():
                if not isinstance(description[name], kind) or (
                    isinstance(description[name], bool) and kind is not bool
                ):
                    raise StateError(f"{name}: expected another type than {type(description[name]).__name__}")
            exact, averaged = description.pop("exact"), description.pop("averaged")
            if description["dtype"] not in ("float32", "float64"):
                raise StateError(f"dtype: expected float32 or float64, got {description['dtype']!r:.80}")
            for name, array in arrays.items():
                dtype = {"weight": description["dtype"], "bias": description["dtype"], "num_batches_tracked": "int64"}
                if array.dtype != dtype.get(name, "float64"):
                    raise StateError(f"{name}: expected dtype {dtype.get(name, 'float64')}, got {array.dtype}")
                if not np.isfinite(array).all():
                    raise StateError(f"{name}: expected finite numbers, got {array[~np.isfinite(array)][0]}")
            if exact is not None:
                _check_names(exact, ["count", "batches"])
                _whole_number(exact["count"], "exact count")
                exact = Moments(exact["count"], arrays.pop("exact_mean"), arrays.pop("exact_m2")), exact["batches"]
            if averaged is not None:
                _check_names(averaged, ["batches"])
                averaged = arrays.pop("averaged_mean"), arrays.pop("averaged_var"), averaged["batches"]
            return BatchNorm._restored(description, arrays, exact, averaged)
        except (StateError, MemoryError):
            raise
        except KeyError as error:
            raise StateError(f"missing {error}") from error
        except Exception as error:
            raise StateError(str(error)) from error

    def _load_others(self, exact: Any, averaged: Any) -> None:
        """The statistics that are not in use, of a pickle or a file."""
        others: dict[str, Any] = {}
        if exact is not None:
            self._need_statistics("exact")
            moments, batches = exact
            others["exact_batches"] = _whole_number(batches, "exact batches")
            others["exact"] = self._checked(moments, "exact")
        if averaged is not None:
            if exact is None:
                raise StateError("averaged: expected exact statistics to be in use, got none")
            mean, var, batches = averaged
            tracked = _whole_number(batches, "averaged batches")
            others["averaged"] = _Averaged(*self._running(mean, var, nan_allowed=True), tracked)
        self._exchange(lambda state: state._replace(**others))

    def _running(self, mean: ArrayLike, var: ArrayLike, nan_allowed: bool) -> tuple[Statistics, Statistics]:
        float64 = np.dtype(np.float64)
        new_mean, new_var = (
            _converted(value, name, self.num_features, float64, StateError, StateError)
            for name, value in (("running_mean", mean), ("running_var", var))
        )
        if not bool(((new_var >= 0) | (nan_allowed & np.isnan(new_var))).all()):
            raise StateError("running_var: expected values of at least 0")
        return new_mean, new_var

    def __repr__(self) -> str:
        parts = [str(self.num_features), f"axis={self.axis}", f"eps={self.eps:g}", f"momentum={self.momentum}"]
        parts += [f"{name}={getattr(self, name)}" for name, usual in _FLAGS.items() if getattr(self, name) != usual]
        if self.dtype != np.float32:
            parts.append(f"dtype={self.dtype}")
        return f"{type(self).__name__}({', '.join(parts)})"


# Or not under these names.
_NOT_PICKLED = ("_gamma", "_beta", "_eps", "_momentum", "_training", "_state", "_calibration")
_FLAGS = {"affine": True, "track_running_stats": True, "unbiased_running_var": True}
_OPTIONS = ("axis", "eps", "momentum", "affine", "track_running_stats", "unbiased_running_var", "dtype")
_DESCRIPTION: dict[str, Any] = {  # of a file: what a layer consists of beside arrays, and the types that JSON gives
    "num_features": int,
    "axis": int,
    "eps": float | int,
    "momentum": float | int | None,
    "affine": bool,
    "track_running_stats": bool,
    "unbiased_running_var": bool,
    "dtype": str,
    "training": bool,
    "exact": dict | None,
    "averaged": dict | None,
}


def _names(affine: bool, tracked: bool) -> list[str]:
    """The keys of a state."""
    parameters = ["weight", "bias"] if affine else []
    return parameters + (["running_mean", "running_var", "num_batches_tracked"] if tracked else [])


def _check_names(state: Mapping[str, Any], expected: list[str]) -> None:
    missing = sorted(set(expected) - state.keys())
    unknown = sorted(map(str, state.keys() - set(expected)))
    if missing or unknown:
        raise StateError(f"state: expected the keys {expected}; missing {missing}, unknown {unknown}")


def _dtype(value: DTypeLike) -> np.dtype[Any]:
    try:
        dtype = None if value is None else np.dtype(value)
    except TypeError:
        raise TypeError(f"dtype: expected float32 or float64, got {value!r}") from None
    if dtype is None or dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise TypeError(f"dtype: expected float32 or float64, got {dtype}")
    return dtype


def _number(value: float, name: str) -> float:
    try:
        if isinstance(value, (bool, str)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name}: expected a number, got {value!r}") from None
    except OverflowError:  # an int beyond float64
        return math.inf


def _converted(
    value: ArrayLike,
    name: str,
    channels: int,
    dtype: np.dtype[Any],
    type_error: type[Exception],
    value_error: type[Exception],
) -> NDArray[Any]:
    """A new (channels,) array of `dtype` from floating data."""
    try:
        array = np.asarray(value)
    except MemoryError:
        raise
    except Exception as error:  # whatever an object's __array__ raises
        raise type_error(f"{name}: expected an array, got {type(value).__name__} ({error})") from error
    if array.dtype.kind != "f":
        raise type_error(f"{name}: expected floating-point numbers, got dtype {array.dtype}")
    if array.shape != (channels,):
        raise value_error(f"{name}: expected shape ({channels},), got {array.shape}")
    with np.errstate(over="ignore"):
        converted = np.array(array, dtype=dtype, order="C")
    if lost := np.flatnonzero(np.isfinite(array) & np.isinf(converted)).tolist():
        raise value_error(f"{name}: expected values that {dtype} can hold, got {array[lost[0]]} at index {lost[0]}")
    return converted


def _whole_number(value: ArrayLike, name: str) -> int:
    """Of at least 0, that int64 holds."""
    try:
        array = np.asarray(value)
    except MemoryError:
        raise
    except Exception as error:  # whatever an object's __array__ raises
        raise StateError(f"{name}: expected one integer, got {type(value).__name__} ({error})") from error
    if array.dtype.kind not in "iu" or array.size != 1 or not 0 <= array.item() <= np.iinfo(np.int64).max:
        raise StateError(f"{name}: expected one integer of at least 0, got {value!r}")
    return int(array.item())
