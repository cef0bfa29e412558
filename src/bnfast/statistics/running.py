"""The statistics of a layer: which are in use, how training averages them, how a calibration replaces them.

Three kinds: those of the last batch; the averages of training (`momentum`: exponential, or None: cumulative); the exact
ones, gathered in a calibration or given. Of the last two one is in use, in eval mode and as `running_mean` and
`running_var`; the other is kept. The average itself is taken in `core/layer.pxi`, where a layer's step is one.
"""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _core
from .._checks import channel_array, whole_number
from .moments import Moments
from .report import StatisticsReport

__all__ = ["RunningStatistics", "calibrate", "check_finite", "check_variance", "gather", "with_statistics"]

Statistics = NDArray[np.float64]
Counts = NDArray[np.int64]
FLOAT64 = np.dtype(np.float64)


def check_finite(values: NDArray[Any], name: str, error: type[Exception]) -> None:
    """That there is no NaN and no Inf."""
    unfit = np.flatnonzero(~np.isfinite(values))
    if unfit.size:
        raise error(f"{name}: expected finite values, got {values[unfit[0]]} in channel {unfit[0]}")


def check_variance(var: Statistics, eps: float, error: type[Exception]) -> None:
    """That eval mode could divide by it."""
    with np.errstate(all="ignore"):
        unfit = np.flatnonzero(~(np.isfinite(var) & (var + eps > 0)))
    if unfit.size:
        raise error(
            f"running_var: expected finite values with var + eps above 0, got {var[unfit[0]]} in channel {unfit[0]} "
            f"(eps {eps:g})"
        )


class RunningStatistics:
    """What a layer knows of its data; the part of `BatchNorm` that has to do with it."""

    num_features: int
    eps: float
    track_running_stats: bool
    unbiased_running_var: bool
    _contents: "_core.AtomicReference[_core.Contents]"
    _calibration: "_core.AtomicReference[object]"
    _processes: "_core.Processes | None"

    # --- what they are ---

    @property
    def running_mean(self) -> Statistics | None:
        """(C,) float64, read-only, a new array after every training forward: a reference kept is a snapshot.

        To change it, set it: finite numbers, one a channel, which are copied.
        """
        running = self._contents.value.in_use
        return None if running is None else running.mean

    @running_mean.setter
    def running_mean(self, value: ArrayLike) -> None:
        mean = self._given(value, "running_mean")
        check_finite(mean, "running_mean", ValueError)
        self._contents.update(_with_running, mean, None)

    @property
    def running_var(self) -> Statistics | None:
        """(C,) float64, read-only, a new array after every training forward: a reference kept is a snapshot.

        To change it, set it: finite numbers, above 0 once eps is added, one a channel, which are copied.
        """
        running = self._contents.value.in_use
        return None if running is None else running.var

    @running_var.setter
    def running_var(self, value: ArrayLike) -> None:
        var = self._given(value, "running_var")
        check_variance(var, self.eps, ValueError)
        self._contents.update(_with_running, None, var)

    def _given(self, value: ArrayLike, name: str) -> Statistics:
        if not self.track_running_stats:
            raise AttributeError(f"{name}: this layer was made with track_running_stats=False")
        return channel_array(value, name, self.num_features, FLOAT64)

    @property
    def num_batches_tracked(self) -> int:
        """Batches that the statistics in use have seen, in training or in the calibration; it stays at 2**63 - 1."""
        running = self._contents.value.in_use
        return 0 if running is None else running.batches

    @property
    def num_batches_skipped(self) -> Counts:
        """(C,) int64: batches that `nonfinite="skip"` left out of a channel's running statistics."""
        running = self._contents.value.in_use
        skipped = None if running is None else running.skipped
        return np.zeros(self.num_features, np.int64) if skipped is None else skipped.copy()

    @property
    def batch_mean(self) -> Statistics | None:
        """(C,) float64, read-only: mean of the last batch that a forward normalised with; None before."""
        moments = self._contents.value.batch_moments
        return None if moments is None else moments[1]

    @property
    def batch_var(self) -> Statistics | None:
        """(C,) float64, read-only: population variance of the last batch that a forward normalised with."""
        moments = self._contents.value.batch_moments
        if moments is None:
            return None
        count, _, m2 = moments
        var: Statistics = m2 / count
        var.flags.writeable = False
        return var

    def reset_running_stats(self) -> None:
        """Forget what the running statistics have seen: mean 0, variance 1, no batches. Gradients are cleared."""
        self._contents.update(with_statistics, self._fresh_statistics())

    def _fresh_statistics(self) -> _core.Running | None:
        if not self.track_running_stats:
            return None
        return _core.Running(np.zeros(self.num_features), np.ones(self.num_features))

    @property
    def _ddof(self) -> int:
        return 1 if self.unbiased_running_var else 0

    # --- exact ones ---

    def calibrate(self) -> AbstractContextManager[Self]:
        """Context manager: forwards inside gather exact statistics, which become the running ones at its end.

        The statistics of everything that passes, however many batches of whatever sizes: the mean and variance of
        the concatenated data (not an average of the batches' variances). Meanwhile the running statistics stay as
        they are, and the layer normalises with the statistics of each batch, whatever its mode; a batch of one value a
        channel is normalised with the running ones, an empty one passes. An exception inside leaves the statistics as
        they were. The averages collected in training are kept: `use_statistics("running")` takes them back,
        `statistics_report` compares.

        To calibrate several layers of a network use `bnfast.calibrate(layers)`, in one pass.

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
        return _core.Calibration((self._calibration,), partial(_finish, [self]), self)

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
            if isinstance(exact.count, int):  # not a sum of weights
                whole_number(exact.count, "which: count", ValueError)
            check_finite(exact.mean, "which: mean", ValueError)
            check_variance(exact.var(self._ddof), self.eps, ValueError)
            self._contents.update(lambda found: self._using_exact(found, (exact, max(found.in_use.batches, 1))))
        elif not isinstance(which, str):
            raise TypeError(f"which: expected 'running', 'exact' or Moments, got {type(which).__name__}")
        elif which == "running":
            self._contents.update(_using_averages)
        elif which == "exact":
            self._contents.update(lambda found: self._using_exact(found, found.exact))
        else:
            raise ValueError(f"which: expected 'running', 'exact' or Moments, got {which!r}")
        return self

    def _using_exact(self, found: _core.Contents, exact: tuple[Moments, int] | None) -> _core.Contents:
        if exact is None:
            raise RuntimeError("use_statistics: expected exact statistics, from calibrate() or as Moments; got none")
        moments, batches = exact
        running = _core.Running(moments.mean, moments.var(self._ddof), batches, None, found.in_use.skipped)
        averages = found.in_use if found.averages is None else found.averages
        return found.replace(in_use=running, averages=averages, exact=exact)

    @property
    def statistics_in_use(self) -> Literal["running", "exact"]:
        """What eval mode normalises with: averages collected in training, or exact statistics."""
        return "running" if self._contents.value.averages is None else "exact"

    @property
    def exact_statistics(self) -> Moments | None:
        """What the last `calibrate` gathered, or `use_statistics` was given; None before. In use or not."""
        exact = self._contents.value.exact
        return None if exact is None else exact[0]

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
        found = self._contents.value
        moments = self._checked(exact, "exact") if exact is not None else found.exact and found.exact[0]
        if moments is None:
            raise RuntimeError("statistics_report: expected exact statistics, from calibrate() or as Moments; got none")
        running = found.in_use if found.averages is None else found.averages
        return StatisticsReport.compare(running.mean, running.var, moments.mean, moments.var(self._ddof), self.eps)

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


# --- what an update makes of the contents ---


def with_statistics(found: _core.Contents, running: _core.Running | None, **others: Any) -> _core.Contents:
    """The contents with new statistics, `others` of them too, and without gradients, which belong to the old ones."""
    kept = {"exact": None, "averages": None, "gradients": (None, None), "accumulated": (None, None)}
    return found.replace(in_use=running, **{**kept, **others})


def _with_running(found: _core.Contents, mean: Statistics | None, var: Statistics | None) -> _core.Contents:
    """Set by hand: the other one of the two stays."""
    old = found.in_use
    new = _core.Running(
        old.mean if mean is None else mean, old.var if var is None else var, old.batches, old.averaged, old.skipped
    )
    return found.replace(in_use=new, averages=None)


def _with_skipped(old: _core.Running, channels: NDArray[np.bool_]) -> _core.Running:
    """One batch more that was left out of these channels."""
    before = np.zeros(len(channels), np.int64) if old.skipped is None else old.skipped
    skipped = before + (channels & (before < np.iinfo(np.int64).max))
    return _core.Running(old.mean, old.var, old.batches, old.averaged, skipped)


def _using_averages(found: _core.Contents) -> _core.Contents:
    return found if found.averages is None else found.replace(in_use=found.averages, averages=None)


# --- calibration ---


def calibrate(
    layers: RunningStatistics | Iterable[RunningStatistics] | Mapping[Any, RunningStatistics],
) -> AbstractContextManager[list[RunningStatistics]]:
    """Context manager: the layers gather exact statistics of what passes, in one pass, and use them from its end on.

    As `BatchNorm.calibrate`, for several layers of a network at once: inside, each normalises with the statistics of
    the batch, so that the layers behind it see what they will see afterwards. (One after another in eval mode, each
    would gather what the old statistics before it give.) At the end all of them take their statistics, or none does.

    Parameters
    ----------
    layers : iterable of BatchNorm, dict with them as values, or one

    Returns
    -------
    context manager
        It gives the list of the layers.

    Raises
    ------
    TypeError
        If one is no BatchNorm.
    ValueError
        If there is none, or one is there twice.
    RuntimeError
        If one has no running statistics or is calibrating already; at the end, if one saw fewer than 2 values a
        channel.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> first, second = bnfast.BatchNorm(2), bnfast.BatchNorm(2)
    >>> with bnfast.calibrate([first, second]):
    ...     y = second(np.maximum(first(np.array([[1.0, 2.0], [3.0, 6.0]])), 0))
    >>> first.running_mean, second.running_mean.round(3)
    (array([2., 4.]), array([0.5, 0.5]))
    """
    if isinstance(layers, RunningStatistics):
        layers = [layers]
    found = list(layers.values() if isinstance(layers, Mapping) else layers)
    if not found:
        raise ValueError("layers: expected at least one layer, got none")
    for layer in found:
        if not isinstance(layer, RunningStatistics):
            raise TypeError(f"layers: expected BatchNorm layers, got {type(layer).__name__}")
        layer._need_statistics("calibrate")
    if len({id(layer) for layer in found}) < len(found):
        raise ValueError("layers: expected each layer once, got one of them twice")
    return _core.Calibration(tuple(layer._calibration for layer in found), partial(_finish, found), list(found))


def gather(
    current: "_core.AtomicReference[object]",
    calibration: object,
    nonfinite: str,
    found: _core.Contents,
    moments: tuple[int, Statistics, Statistics, Statistics],
) -> _core.Contents:
    """The contents once a batch is gathered: its (count, mean, m2, rest). current: the layer's calibration now."""
    batch = Moments.with_rest(*moments)
    finite = np.isfinite(batch.mean) & np.isfinite(batch.m2)
    if nonfinite == "raise" and not finite.all():
        channel = int(np.flatnonzero(~finite)[0])
        raise FloatingPointError(
            f"x: expected a batch with finite statistics (nonfinite='raise'), got mean {batch.mean[channel]} in "
            f"channel {channel}"
        )
    if nonfinite == "skip" and not finite.all():
        return found.replace(
            in_use=_with_skipped(found.in_use, ~finite),
            averages=None if found.averages is None else _with_skipped(found.averages, ~finite),
        )
    if batch.count == 0 or current.value is not calibration:  # over, in another thread
        return found
    if found.gathered is None or found.gathered[0] is not calibration:
        return found.replace(gathered=(calibration, batch, 1))
    _, gathered, batches = found.gathered
    return found.replace(gathered=(calibration, gathered + batch, batches + 1))


def _finish(layers: list[RunningStatistics], calibration: object, error: BaseException | None) -> None:
    """Called at the end of the block, by a context manager in C that cannot be interrupted half-way.

    error: what the block raised. Then there is nothing to do, but to tell other processes that wait.
    """
    if error is not None:
        for layer in [layer for layer in layers if layer._processes is not None][:1]:  # all stop there
            _gathered(layer, calibration, error)
        return
    gathered = [_gathered(layer, calibration, None) for layer in layers]

    def calibrated(place: int, layer: RunningStatistics, found: _core.Contents) -> _core.Contents:
        moments, batches = gathered[place] or (None, 0)
        if moments is None or moments.count < 2:
            name = "the layer" if len(layers) == 1 else f"layer {place} of {len(layers)}, {layer!r}"
            raise RuntimeError(f"calibrate: expected at least 2 values a channel to pass through {name}")
        return layer._using_exact(found, (moments, batches)).replace(gathered=None)

    _core.update_all([(layer._contents, partial(calibrated, i, layer), []) for i, layer in enumerate(layers)])


def _gathered(layer: RunningStatistics, calibration: object, error: BaseException | None) -> tuple[Moments, int] | None:
    """What a layer has gathered, on all processes that hold it, and of how many batches."""
    gathered = layer._contents.value.gathered
    own = None if gathered is None or gathered[0] is not calibration else gathered[1:]
    if layer._processes is None:
        return own
    zeros = np.zeros(layer.num_features)
    moments, batches = own or (Moments(0, zeros, zeros), 0)
    row_and_batches = layer._processes.calibrated(moments.to_row(), batches, error)
    return None if row_and_batches is None else (Moments.from_row(row_and_batches[0]), row_and_batches[1])
