"""The layer: parameters, running statistics and modes around `bnfast.functional`.

Everything that a call changes is in one tuple, `_State`. A call computes first, then makes a new tuple from the one it
finds and exchanges the two, if nobody else has in the meantime (else it looks again). So an exception, Ctrl-C included,
finds a layer as it was before the call or as it is after it; and threads, signal handlers and forked children need
no lock.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Self, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import _core
from ._checks import integer
from .functional import Array, Statistics
from .moments import Moments
from .state import StateError

__all__ = ["BatchNorm"]


class _Forward(NamedTuple):
    """What backward needs of the last forward."""

    x: Array
    mean: Statistics
    inv_std: Statistics | None  # of the batch
    var: Statistics | None  # or, in eval mode, the running variance, a constant
    overwritten_by: str | None  # the argument that has since been written into the memory of x


class _State(NamedTuple):
    running_mean: Statistics | None
    running_var: Statistics | None
    num_batches_tracked: int
    forward: _Forward | None = None
    grad_gamma: Array | None = None
    grad_beta: Array | None = None
    calibration: object = None  # the one that what is gathered belongs to
    gathered: Moments | None = None
    gathered_batches: int = 0

    def with_rest_of(self, state: "_State") -> "_State":
        """These running statistics, all else from `state`."""
        return state._replace(
            running_mean=self.running_mean, running_var=self.running_var, num_batches_tracked=self.num_batches_tracked
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
        To be updated in place by the optimiser.
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

    gamma: Array | None
    beta: Array | None

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
        self.axis = integer(axis, "axis")
        self.eps = eps
        self.momentum = momentum
        self.affine = bool(affine)
        self.track_running_stats = bool(track_running_stats)
        self.unbiased_running_var = bool(unbiased_running_var)
        self.dtype = _dtype(dtype)
        self.training = True
        self.gamma = np.ones(self.num_features, self.dtype) if affine else None
        self.beta = np.zeros(self.num_features, self.dtype) if affine else None
        self._state = self._fresh_state()
        self._calibration: object = None

    @property
    def eps(self) -> float:
        """Added to the variance, inside the root."""
        return self._eps

    @eps.setter
    def eps(self, value: float) -> None:
        eps = _number(value, "eps")
        if not (eps > 0 and math.isfinite(eps)):
            raise ValueError(f"eps: expected a positive finite number, got {value!r}")
        self._eps = eps

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
        data = _core.as_data(x, "x")
        if -data.ndim <= self.axis < data.ndim >= 2 and data.shape[self.axis] != self.num_features:
            fits = [i for i, n in enumerate(data.shape) if n == self.num_features and i > 0]
            hint = f"; BatchNorm(..., axis={-1 if fits[-1] == data.ndim - 1 else fits[-1]}) would fit" if fits else ""
            raise ValueError(
                f"x: expected {self.num_features} channels along axis {self.axis}, got shape {data.shape}{hint}"
            )
        state = self._state
        overwritten_by = "the forward's out" if out is not None and _core.shares_memory(out, data) else None
        try:
            if self.training or state.running_mean is None:
                y, mean, inv_std, m2 = _core.batch_norm(data, self.gamma, self.beta, self.axis, self.eps, out)
                forward = _Forward(data, mean, inv_std, None, overwritten_by)
                self._exchange(lambda state: self._after_training(state, forward, m2))
            else:
                mean, var = state.running_mean, state.running_var
                calibration = self._calibration
                batch = None
                if calibration is not None and data.size:
                    batch = Moments(*_core.moments(data, self.axis))
                y = _core.batch_norm_eval(data, mean, var, self.gamma, self.beta, self.axis, self.eps, out, "running_")
                forward = _Forward(data, mean, None, var, overwritten_by)
                self._exchange(lambda state: self._after_eval(state, forward, calibration, batch))
        except (TypeError, ValueError, MemoryError):
            raise
        except BaseException:  # an interrupt, perhaps after the kernel has written
            self._note_overwritten(out, "an interrupted forward's out")
            raise
        return y

    def _after_training(self, state: _State, forward: _Forward, m2: Statistics) -> _State:
        """The state after a forward that took the statistics of its batch."""
        count = forward.x.size // self.num_features
        if self._calibration is not None:
            batch = Moments(count, forward.mean, m2)
            return state._replace(forward=forward).gather(self._calibration, batch)
        if not self.training or state.running_mean is None:
            return state._replace(forward=forward)
        batches = state.num_batches_tracked + 1
        factor = 1 / batches if self.momentum is None else self.momentum
        mean, var = _core.updated_running(
            state.running_mean, state.running_var, forward.mean, m2, count, factor, self.unbiased_running_var
        )
        return _State(mean, var, batches, forward, state.grad_gamma, state.grad_beta)

    def _after_eval(self, state: _State, forward: _Forward, calibration: object, batch: Moments | None) -> _State:
        """The state after a forward with the running statistics; `batch`: what the calibration gathers of it."""
        state = state._replace(forward=forward)
        return state if batch is None or self._calibration is not calibration else state.gather(calibration, batch)

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
            state = self._state
            if _core.exchange(self, "_state", state, change(state)):
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
        forward = self._state.forward
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
                dy, forward.x, forward.mean, inv_std, self.gamma, self.axis, forward.var is None, out
            )
            with np.errstate(over="ignore", under="ignore"):
                grad_gamma = dgamma.astype(self.dtype, copy=False) if self.affine else None
                grad_beta = dbeta.astype(self.dtype, copy=False) if self.affine else None
            overwritten = out is not None and _core.shares_memory(out, forward.x)

            def after(state: _State) -> _State:
                kept = state.forward
                if overwritten and kept is forward:
                    kept = forward._replace(overwritten_by="the backward's out")
                return state._replace(forward=kept, grad_gamma=grad_gamma, grad_beta=grad_beta)

            self._exchange(after)
        except (TypeError, ValueError, MemoryError):
            raise
        except BaseException:
            self._note_overwritten(out, "an interrupted backward's out")
            raise
        return dx

    # --- modes ----------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Switch to training mode (or, with False, to eval mode); returns the layer."""
        if not isinstance(mode, bool | np.bool_):
            raise TypeError(f"mode: expected a bool, got {mode!r}")
        self.training = bool(mode)
        return self

    def eval(self) -> Self:
        """Switch to eval mode; returns the layer."""
        return self.train(False)

    def calibrate(self) -> AbstractContextManager[Self]:
        """Context manager: forwards inside gather exact statistics, which become the running ones at its end.

        The statistics of everything that passes, however many batches of whatever sizes: the mean and variance of
        the concatenated data (not an average of the batches' variances). Meanwhile the running statistics stay as
        they are, and the layer normalises as its mode says. An exception inside leaves them as they were.

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
        if not self.track_running_stats:
            raise RuntimeError("calibrate: expected a layer with running statistics, got track_running_stats=False")
        return _core.Calibration(self)

    def _finish_calibration(self, calibration: object) -> None:
        """Called at the end of the block, by a context manager in C that cannot be interrupted half-way."""

        def after(state: _State) -> _State:
            gathered = state.gathered if state.calibration is calibration else None
            if gathered is None or gathered.count < 2:
                raise RuntimeError("calibrate: expected at least 2 values a channel to pass through the layer")
            return state._replace(
                running_mean=gathered.mean.copy(),
                running_var=gathered.var(ddof=1 if self.unbiased_running_var else 0),
                num_batches_tracked=state.gathered_batches,
                calibration=None,
                gathered=None,
                gathered_batches=0,
            )

        self._exchange(after)

    # --- parameters and statistics ------------------------------------------------------------------------------

    @property
    def running_mean(self) -> Statistics | None:
        """(C,) float64; a new array after every training forward, so a reference kept is a snapshot."""
        return self._state.running_mean

    @running_mean.setter
    def running_mean(self, value: ArrayLike) -> None:
        mean = self._statistics(value, "running_mean")
        self._exchange(lambda state: state._replace(running_mean=mean))

    @property
    def running_var(self) -> Statistics | None:
        """(C,) float64; a new array after every training forward, so a reference kept is a snapshot."""
        return self._state.running_var

    @running_var.setter
    def running_var(self, value: ArrayLike) -> None:
        var = self._statistics(value, "running_var")
        self._exchange(lambda state: state._replace(running_var=var))

    @property
    def num_batches_tracked(self) -> int:
        """Batches that the running statistics have seen."""
        return self._state.num_batches_tracked

    @property
    def grad_gamma(self) -> Array | None:
        """(C,) gradient of the loss with respect to gamma, from the last backward."""
        return self._state.grad_gamma

    @property
    def grad_beta(self) -> Array | None:
        """(C,) gradient of the loss with respect to beta, from the last backward."""
        return self._state.grad_beta

    def parameters(self) -> dict[str, Array]:
        """The arrays to be trained: {"gamma": ..., "beta": ...}, empty if `affine=False`."""
        if self.gamma is None or self.beta is None:
            return {}
        return {"gamma": self.gamma, "beta": self.beta}

    def gradients(self) -> dict[str, Array]:
        """Their gradients under the same names; empty before the first backward."""
        state = self._state
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
        copies = []
        if self.affine:
            for name, value in (("gamma", gamma), ("beta", beta)):
                target = getattr(self, name)
                if not (
                    isinstance(target, np.ndarray)
                    and target.shape == value.shape
                    and target.dtype == value.dtype
                    and target.flags.carray
                ):
                    raise ValueError(
                        f"{name}: expected the layer's to be a writeable contiguous array of shape {value.shape} and "
                        f"dtype {value.dtype}, to be written in place; got {target!r}"
                    )
                copies.append((target, value))
        while True:
            state = self._state
            if _core.exchange(self, "_state", state, change(state), copies):
                return

    # --- state --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Copies of parameters and running statistics under PyTorch's names.

        Returns
        -------
        dict
            weight, bias (if affine), running_mean, running_var, num_batches_tracked (if tracked). Statistics stay
            float64; `torch.nn.Module.load_state_dict` takes the values through `torch.as_tensor`.
        """
        state = self._state
        found: dict[str, NDArray[Any]] = {}
        if self.gamma is not None and self.beta is not None:
            found["weight"], found["bias"] = np.array(self.gamma), np.array(self.beta)
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
        expected = self.state_dict()
        if not isinstance(state, Mapping):
            raise StateError(f"state: expected a mapping, got {type(state).__name__}")
        missing, unknown = sorted(expected.keys() - state.keys()), sorted(map(str, state.keys() - expected.keys()))
        if missing or unknown:
            raise StateError(f"state: expected the keys {list(expected)}; missing {missing}, unknown {unknown}")
        new = {
            name: _converted(state[name], name, self.num_features, self.dtype, StateError, StateError)
            for name in ("weight", "bias")
            if name in expected
        }
        fresh = self._fresh_state()
        if self.track_running_stats:
            float64 = np.dtype(np.float64)
            mean, var = (
                _converted(state[name], name, self.num_features, float64, StateError, StateError)
                for name in ("running_mean", "running_var")
            )
            if not bool(((var >= 0) | (nan_allowed & np.isnan(var))).all()):
                raise StateError("running_var: expected values of at least 0")
            fresh = _State(mean, var, _batches(state["num_batches_tracked"]))
        nothing = np.empty(0, self.dtype)
        self._exchange_all(new.get("weight", nothing), new.get("bias", nothing), fresh.with_rest_of)

    def __getstate__(self) -> dict[str, Any]:
        attributes = {name: value for name, value in self.__dict__.items() if name not in _NOT_PICKLED}
        attributes.update(eps=self.eps, momentum=self.momentum)
        return {"attributes": attributes, "state": self.state_dict()}

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        try:
            attributes, state = dict(pickled["attributes"]), dict(pickled["state"])
            fresh = BatchNorm(
                attributes["num_features"],
                **{name: attributes.pop(name) for name in _OPTIONS},
            )
            fresh._load(state, nan_allowed=True)
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise StateError(f"pickle: {error}") from error
        attributes.update(fresh.__dict__, training=bool(attributes.get("training", True)))
        self.__dict__.update(attributes)

    def __repr__(self) -> str:
        parts = [str(self.num_features), f"axis={self.axis}", f"eps={self.eps:g}", f"momentum={self.momentum}"]
        parts += [f"{name}={getattr(self, name)}" for name, usual in _FLAGS.items() if getattr(self, name) != usual]
        if self.dtype != np.float32:
            parts.append(f"dtype={self.dtype}")
        return f"{type(self).__name__}({', '.join(parts)})"


_NOT_PICKLED = ("gamma", "beta", "_eps", "_momentum", "_state", "_calibration")  # or not under these names
_FLAGS = {"affine": True, "track_running_stats": True, "unbiased_running_var": True}
_OPTIONS = ("axis", "eps", "momentum", "affine", "track_running_stats", "unbiased_running_var", "dtype")


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
    shape_error: type[Exception],
) -> NDArray[Any]:
    """A new (channels,) array of `dtype` from floating data."""
    try:
        array = np.asarray(value)
    except Exception as error:  # whatever an object's __array__ raises
        raise type_error(f"{name}: expected an array, got {type(value).__name__} ({error})") from error
    if array.dtype.kind != "f":
        raise type_error(f"{name}: expected floating-point numbers, got dtype {array.dtype}")
    if array.shape != (channels,):
        raise shape_error(f"{name}: expected shape ({channels},), got {array.shape}")
    with np.errstate(over="ignore"):
        return np.array(array, dtype=dtype, order="C")


def _batches(value: ArrayLike) -> int:
    try:
        array = np.asarray(value)
    except Exception as error:  # whatever an object's __array__ raises
        raise StateError(f"num_batches_tracked: expected one integer, got {type(value).__name__} ({error})") from error
    if array.dtype.kind not in "iu" or array.size != 1 or not 0 <= array.item() <= np.iinfo(np.int64).max:
        raise StateError(f"num_batches_tracked: expected one integer of at least 0, got {value!r}")
    return int(array.item())
