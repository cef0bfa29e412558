"""A layer outside of memory: state dictionaries, copies and pickles, files.

All three come down to a `Kept`: options and mode, the dictionary of PyTorch's names, and the statistics that are not
in use. What comes from outside is checked as a whole, by making a layer of it, before a living one changes.
"""

import math
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .. import _core
from .._checks import channel_array, flag, integer, whole_number
from ..distributed.gather import KEPT, Carried
from ..statistics.moments import Moments
from ..statistics.running import FLOAT64, RunningStatistics, check_finite, check_variance, with_statistics
from . import conventions
from .files import FORMAT, StateError, decode, encode, read, replace

__all__ = ["FIXED", "Kept", "LayerState", "described", "kept_from"]

Array = NDArray[Any]
Values = dict[str, Array]

OPTIONS = {  # of the constructor, and the types that a file's description may give
    "num_features": int,
    "axis": int,
    "eps": float | int,
    "momentum": float | int | None,
    "affine": bool | str,
    "track_running_stats": bool,
    "unbiased_running_var": bool,
    "activation": str | None,
    "negative_slope": float,
    "nonfinite": str,
    "dtype": str,
}
FIXED = tuple(name for name in OPTIONS if name not in ("eps", "momentum"))  # once a layer is made
ADDED = {"activation": None, "negative_slope": 0.01, "nonfinite": "propagate"}  # since format 1: what layers did before
COUNTS = ("averaged", "skipped")  # of `Running`: None, or an array
NOT_PICKLED = (
    *("_contents", "_options", "_calibration", "_living", "_processes"),
    *("_gamma", "_beta", "_eps", "_momentum", "_training"),
)


class Kept(NamedTuple):
    """All that copies, pickles and files keep of a layer."""

    options: dict[str, Any]  # the constructor's
    training: bool
    values: dict[str, Any]  # as `state_dict` gives them
    counts: tuple[Any, Any] = (None, None)  # `averaged` and `skipped` of the statistics in use
    exact: Any = None  # (Moments, batches)
    averages: Any = None  # (mean, var, batches, averaged, skipped), set aside
    comm: Any = None  # on its way into a copy; True: there was one


class LayerState(RunningStatistics):
    """What a layer is outside of memory; the part of `BatchNorm` that has to do with it."""

    axis: int
    affine: bool | str
    dtype: np.dtype[Any]
    training: bool

    # --- dictionaries ---

    def state_dict(self) -> Values:
        """Copies of parameters and running statistics under PyTorch's names.

        Returns
        -------
        dict
            weight, bias (those of gamma and beta that the layer has), running_mean, running_var, num_batches_tracked
            (if tracked; those in use, see `use_statistics`). Statistics stay float64; `torch.nn.Module.load_state_dict`
            takes the values through `torch.as_tensor`.
        """
        return self._kept().values

    def load_state_dict(self, state: Mapping[str, ArrayLike], *, prefix: str = "") -> None:
        """Take parameters and running statistics from a dictionary as `state_dict` or PyTorch give it.

        gamma and beta are written in place, so an optimiser's references to them stay good. Gradients are cleared. A
        forward of before still has its backward.

        Parameters
        ----------
        state : mapping of str to array_like
            NumPy arrays, CPU tensors or lists, with the keys of `state_dict`. num_batches_tracked may be missing, and
            is 0 then.
        prefix : str
            What the keys begin with, like "layer1.0.bn1" (a dot at its end makes no difference): the rest of the
            dictionary is left alone. "": all of it is this layer's.

        Raises
        ------
        TypeError
            If `prefix` is no str.
        StateError
            If a key is missing or unknown, or a value has a wrong shape, kind or range. The layer is unchanged.
        """
        if not isinstance(state, Mapping):
            raise StateError(f"state: expected a mapping, got {type(state).__name__}")
        values = _part(state, prefix)
        if self.track_running_stats:
            values.setdefault("num_batches_tracked", 0)
        kept = Kept(self._given_options(), self.training, values)
        _core.update_all([self._restoring(kept, strict=True)])

    @classmethod
    def from_arrays(
        cls,
        convention: str,
        *,
        gamma: ArrayLike | None = None,
        beta: ArrayLike | None = None,
        mean: ArrayLike | None = None,
        var: ArrayLike | None = None,
        **extras: Any,
    ) -> Self:
        """A layer of the arrays that another framework keeps of one.

        Parameters
        ----------
        convention : str
            "pytorch", "torchvision" (its frozen layer), "keras" (3), "slim" (TensorFlow 1), "flax", "haiku", "onnx",
            "caffe", "darknet", "mxnet" or "ncnn".
        gamma, beta, mean, var : (C,) array_like
            Whatever they are called there, or under the framework's own names, as `to_arrays` gives them; gamma and
            beta None where there are none.
        **extras : any
            The framework's own options under its names, where they differ from its defaults: eps or epsilon, momentum
            or decay, which most of them take for the weight of the old average. Of some more: "pytorch"
            num_batches_tracked; "haiku" counter, and average=False if mean and var are its hidden averages; "caffe"
            scale_factor, by which both are divided; "mxnet" fix_gamma, with which gamma is 1 whatever is stored. The
            last two are needed, and decay_rate of "haiku". And of `BatchNorm`: axis (by default the framework's),
            activation, negative_slope, nonfinite, dtype (by default float64 if gamma or beta are, else float32).

        Returns
        -------
        BatchNorm
            In training mode, as every new layer is; in eval mode from "torchvision", "darknet" and "ncnn", which keep
            no more than that needs.

        Raises
        ------
        TypeError, ValueError
            If an argument is unknown or missing, or has a wrong type, shape or range.
        StateError
            If a value is not finite, or a variance with eps not above 0.

        Notes
        -----
        Darknet divides by sqrt(var) + 1e-6: the layer has eps=0 and the square of that as its variance. The table of
        all conventions is in docs/deploy/conventions.md.

        Examples
        --------
        >>> import bnfast
        >>> bnfast.BatchNorm.from_arrays("keras", gamma=[1, 2], beta=[0, 0], mean=[3, 4], var=[1, 1])
        BatchNorm(2, axis=-1, eps=0.001, momentum=0.01, unbiased_running_var=False)
        """
        options, state, frozen = conventions.read(convention, gamma, beta, mean, var, extras)
        make: Any = cls  # (this class is only a part of the layer's)
        layer: Self = make(**options)
        layer.load_state_dict(state)
        layer.training = not frozen
        return layer

    def to_arrays(self, convention: str) -> Values:
        """The layer's parameters and running statistics as another framework keeps them.

        Parameters
        ----------
        convention : str
            As in `from_arrays`.

        Returns
        -------
        dict of str to ndarray
            Under the framework's names, of the layer's dtype. gamma and beta that the layer has not are left out, or 1
            and 0 where the framework always has them. Options are not in it: give the framework the layer's eps, and
            1 - momentum where that is the weight of the old average ("mxnet": fix_gamma=False).

        Raises
        ------
        ValueError
            If there is no such convention, the layer has no running statistics, or they cannot be written so.

        Examples
        --------
        >>> import bnfast
        >>> list(bnfast.BatchNorm(2).to_arrays("flax"))
        ['scale', 'bias', 'mean', 'var']
        """
        kept = self._kept().values
        if not self.track_running_stats:
            raise ValueError("to_arrays: expected a layer with running statistics, got track_running_stats=False")
        gamma, beta = kept.get("weight"), kept.get("bias")
        mean, var, batches = kept["running_mean"], kept["running_var"], int(kept["num_batches_tracked"])
        return conventions.written(convention, gamma, beta, mean, var, batches, self.eps, self.dtype)

    # --- copies and pickles ---

    def __getstate__(self) -> dict[str, Any]:
        found = super().__getstate__()  # with the slots that a subclass may have
        plain, slots = found if isinstance(found, tuple) else (found, {})
        attributes = {name: value for name, value in plain.items() if name not in (*NOT_PICKLED, *OPTIONS)} | slots
        kept = self._kept()._asdict()
        if kept["comm"] is None:
            del kept["comm"]
        elif self.comm is not None:
            kept["comm"] = Carried(self.comm)
        return {"format": FORMAT, "attributes": attributes, **kept}

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        try:
            attributes, kept = _unpickled(dict(pickled))
        except MemoryError:
            raise
        except Exception as error:  # whatever checks raise that were not made for states
            raise StateError(f"pickle: {error}") from error
        fresh = self._made_of(kept, strict=False)
        self.__dict__.update(fresh.__dict__)
        for name, value in attributes.items():  # of the user's own; in slots, too
            if name not in fresh.__dict__:
                object.__setattr__(self, name, value)

    # --- files ---

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the layer to a file, from which `load` makes an equal one.

        Kept are the parameters, the statistics (the ones in use and those set aside), the mode and the arguments of
        the constructor, to the bit; not the gradients, nor attributes of your own. The file is an `.npz` with
        PyTorch's names: `numpy.load` reads it. The same state gives the same bytes.

        The file at `path` is replaced as a whole, once the new one is on disk: after an exception, a crash or a loss
        of power there is the old one or the new one. Several processes may save to one path. The permissions of a file
        that is there are kept; of a symbolic link, what it points to is replaced. `bnfast.save` writes several layers
        and other arrays to one file.

        Parameters
        ----------
        path : str or os.PathLike
            Taken as it is: no extension is added.

        Raises
        ------
        StateError
            If a parameter or statistic is not finite. Nothing is written.
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
            A larger file is refused before it is read. Loading takes up to ten times the size of a file.

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
            return cls._decoded(read(path, limit))
        except StateError as error:
            raise StateError(f"{os.fspath(path)}: {error}") from (error.__cause__ or error)

    def _encoded(self) -> bytes:
        """The bytes of a file, which `_decoded` accepts."""
        data = encode("layer", *described(self._kept()))
        self._decoded(data)  # what could not be loaded is not written
        return data

    @classmethod
    def _decoded(cls, data: bytes) -> Self:
        description, arrays = decode(data, "layer")
        return cls._made_of(kept_from(description, arrays), strict=True)

    # --- what all of them need ---

    def _given_options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in OPTIONS}

    def _kept(self) -> Kept:
        """What the layer holds, of one moment."""
        found, gamma, beta = self._contents.snapshot((self._gamma, self._beta))
        values = {name: value for name, value in (("weight", gamma), ("bias", beta)) if value is not None}
        running, averages = found.in_use, found.averages
        comm = None if self._processes is None else KEPT
        if running is None:
            return Kept(self._given_options(), self.training, values, comm=comm)
        values["running_mean"], values["running_var"] = running.mean.copy(), running.var.copy()
        values["num_batches_tracked"] = np.array(running.batches, np.int64)
        counts = running.averaged, running.skipped
        aside = averages and (averages.mean, averages.var, averages.batches, averages.averaged, averages.skipped)
        return Kept(self._given_options(), self.training, values, counts, found.exact, aside, comm)

    @classmethod
    def _made_of(cls, kept: Kept, strict: bool) -> Self:
        """A layer of this class, its constructor not called. strict: its statistics can be used."""
        try:
            options = {**ADDED, **kept.options}
            if options.keys() != OPTIONS.keys():
                raise StateError(f"options: expected {sorted(OPTIONS)}, got {sorted(map(str, options))}")
            # names and shapes first: a number of features that is not true must not make large arrays
            _check_names(kept.values, options["affine"], options["track_running_stats"])
            for name, value in kept.values.items():
                if name != "num_batches_tracked" and np.shape(value) != (options["num_features"],):
                    raise StateError(f"{name}: expected shape ({options['num_features']},), got {np.shape(value)}")
            layer = cls.__new__(cls)
            layer._begin(**options)
            layer.training = flag(kept.training, "training")
            layer.comm = kept.comm
            update = layer._restoring(kept, strict)
        except (StateError, MemoryError):
            raise
        except Exception as error:
            raise StateError(str(error)) from error
        _core.update_all([update])
        return layer

    def _restoring(self, kept: Kept, strict: bool) -> "_core._Update":
        """For `_core.update_all`: what makes this layer hold what is kept. strict: of statistics that can be used."""
        parameters = {"weight": self._gamma, "bias": self._beta}
        _check_names(kept.values, self.affine, self.track_running_stats)
        copies = []
        for name, array in parameters.items():
            if array is not None:
                new = channel_array(kept.values[name], name, self.num_features, self.dtype, StateError, StateError)
                if strict:
                    check_finite(new, name, StateError)
                self._check_parameter(array, "gamma" if name == "weight" else "beta")  # it may have changed since
                copies.append((array, new))
        if not self.track_running_stats:
            if any(part is not None for part in (*kept.counts, kept.exact, kept.averages)):
                raise StateError("statistics: expected none, as the layer has track_running_stats=False")
            return self._contents, _without_gradients, copies

        mean, var = (kept.values[name] for name in ("running_mean", "running_var"))
        batches = kept.values["num_batches_tracked"]
        running = self._statistics(mean, var, batches, *kept.counts, strict=strict)
        exact = kept.exact
        if exact is not None:
            moments, exact_batches = exact
            exact = self._checked(moments, "exact"), whole_number(exact_batches, "exact batches", StateError)
        averages = kept.averages
        if averages is not None:
            if exact is None:
                raise StateError("averages: expected exact statistics to be in use, got none")
            averages = self._statistics(*averages, strict=strict)

        def restored(found: _core.Contents) -> _core.Contents:
            return with_statistics(found, running, exact=exact, averages=averages)

        return self._contents, restored, copies

    def _statistics(
        self, mean: Any, var: Any, batches: Any, averaged: Any, skipped: Any, *, strict: bool
    ) -> _core.Running:
        n = self.num_features
        mean = channel_array(mean, "running_mean", n, FLOAT64, StateError, StateError)
        var = channel_array(var, "running_var", n, FLOAT64, StateError, StateError)
        if strict:
            check_finite(mean, "running_mean", StateError)
            check_variance(var, self.eps, StateError)
        counts = [
            None if count is None else _counts(count, f"num_batches_{name}", n)
            for name, count in zip(COUNTS, (averaged, skipped), strict=True)
        ]
        return _core.Running(mean, var, whole_number(batches, "num_batches_tracked", StateError), *counts)

    # of BatchNorm itself
    _gamma: Array | None
    _beta: Array | None
    _begin: Callable[..., None]
    _check_parameter: Callable[[Array, str], Array]
    _processes: _core.Processes | None
    comm: Any


def _check_names(values: Mapping[str, Any], affine: bool | str, tracked: bool) -> None:
    """That there are the values of a layer with these options, and no others."""
    expected = [name for name, ours in (("weight", "gamma"), ("bias", "beta")) if affine in (True, ours)]
    expected += ["running_mean", "running_var", "num_batches_tracked"] if tracked else []
    missing, unknown = sorted(set(expected) - values.keys()), sorted(map(str, values.keys() - set(expected)))
    if missing or unknown:
        layers = [name.removesuffix(".running_mean") for name in unknown if name.endswith(".running_mean")]
        hint = f"; of a whole model? then name one layer, as in prefix={layers[0]!r}" if layers else ""
        raise StateError(f"state: expected the keys {expected}; missing {missing}, unknown {unknown}{hint}")


def _part(state: Mapping[str, ArrayLike], prefix: str) -> dict[str, Any]:
    """What of a dictionary belongs to one layer, without the prefix of its keys."""
    if not isinstance(prefix, str):
        raise TypeError(f"prefix: expected a str, got {type(prefix).__name__}")
    if not prefix:
        return dict(state)
    prefix = prefix.removesuffix(".") + "."
    names = [name for name in state if isinstance(name, str)]
    found = {name.removeprefix(prefix): state[name] for name in names if name.startswith(prefix)}
    if all("." in name for name in found):  # none, or those of layers inside
        layers = sorted(name.removesuffix(".running_mean") for name in names if name.endswith(".running_mean"))
        raise StateError(
            f"state: expected keys of a layer that begin with {prefix!r}, got none"
            + (f"; there are {', '.join(map(repr, layers[:8]))}{', ...' if len(layers) > 8 else ''}" if layers else "")
        )
    return found


def _without_gradients(found: _core.Contents) -> _core.Contents:
    return found.replace(gradients=(None, None), accumulated=(None, None))


def _counts(value: Any, name: str, channels: int) -> NDArray[np.int64]:
    array = np.asarray(value)
    if array.dtype != np.int64 or array.shape != (channels,) or (array < 0).any():
        raise StateError(f"{name}: expected {channels} int64 of at least 0, got {array.dtype} of shape {array.shape}")
    return array.copy()


def _unpickled(pickled: dict[str, Any]) -> tuple[dict[str, Any], Kept]:
    """(attributes of the user's own, what is kept) of a pickle of any format."""
    made_by = pickled.pop("format", 1)
    if type(made_by) is not int or not 1 <= made_by <= FORMAT:
        raise StateError(f"format: expected one up to {FORMAT} (newer ones need a newer bnfast), got {made_by!r:.80}")
    attributes = dict(pickled.pop("attributes"))
    if any(type(name) is not str for name in attributes):
        raise StateError("attributes: expected names")
    if made_by == 1:  # options stood among the attributes
        options = {name: attributes.pop(name) for name in OPTIONS if name not in ADDED}
        averages = pickled.pop("averaged", None)
        pickled |= {
            "options": options,
            "training": attributes.pop("training", True),
            "values": pickled.pop("state"),
            "averages": None if averages is None else (*averages, None, None),
        }
    if not (pickled.get("comm") is None or pickled["comm"] is KEPT or isinstance(pickled["comm"], Carried)):
        raise StateError(f"comm: expected True, got {pickled['comm']!r:.80}")
    unknown = pickled.keys() - set(Kept._fields)
    if unknown:
        raise StateError(f"expected the keys {list(Kept._fields)}, got {sorted(map(str, unknown))} besides")
    kept = Kept(**pickled)
    return attributes, kept._replace(options=dict(kept.options), values=dict(kept.values))


# --- as JSON and arrays ---


def described(kept: Kept) -> tuple[dict[str, Any], Values]:
    """A description for JSON, and arrays: what `kept_from` takes."""
    arrays = dict(kept.values)
    description: dict[str, Any] = {**kept.options, "dtype": kept.options["dtype"].name, "training": kept.training}
    description |= {"exact": None, "averages": None} | ({} if kept.comm is None else {"comm": True})
    if kept.exact is not None:
        moments, batches = kept.exact
        description["exact"] = {"count": moments.count, "batches": batches}
        arrays |= {"exact_mean": moments.mean, "exact_m2": moments.m2}
    counts = {"": kept.counts}
    if kept.averages is not None:
        mean, var, batches, *counts["averages_"] = kept.averages
        description["averages"] = {"batches": batches}
        arrays |= {"averages_mean": mean, "averages_var": var}
    for prefix, pair in counts.items():
        arrays |= {f"{prefix}num_batches_{name}": a for name, a in zip(COUNTS, pair, strict=True) if a is not None}
    return description, arrays


def kept_from(description: dict[str, Any], arrays: Values) -> Kept:
    """What is kept, of a description and arrays from a file; StateError for whatever is wrong with them."""
    description = {**ADDED, **description}
    comm = description.pop("comm", None)
    if "averages" not in description and "averaged" in description:  # format 1's name
        description["averages"] = description.pop("averaged")
        arrays = {name.replace("averaged_", "averages_"): array for name, array in arrays.items()}
    try:
        for name, kind in {**OPTIONS, "training": bool, "exact": dict | None, "averages": dict | None}.items():
            value = description[name]
            if not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, bool | str)):
                raise StateError(f"{name}: expected another type than {type(value).__name__}")
        if description["dtype"] not in ("float32", "float64"):
            raise StateError(f"dtype: expected float32 or float64, got {description['dtype']!r:.80}")
        parameters = dict.fromkeys(("weight", "bias"), description["dtype"])
        for name, array in arrays.items():
            dtype = parameters.get(name, "int64" if "num_batches" in name else "float64")
            if array.dtype != dtype:
                raise StateError(f"{name}: expected dtype {dtype}, got {array.dtype}")
            if (unfit := np.flatnonzero(~np.isfinite(array))).size:
                raise StateError(f"{name}: expected finite values, got {array.flat[unfit[0]]} in channel {unfit[0]}")
        exact, averages = description.pop("exact"), description.pop("averages")
        averaged, skipped, *aside = (
            arrays.pop(f"{prefix}num_batches_{name}", None) for prefix in ("", "averages_") for name in COUNTS
        )
        if exact is not None:
            _check_keys(exact, {"count", "batches"})
            if not _is_sum_of_weights(exact["count"]):
                whole_number(exact["count"], "exact count", StateError)
            exact = Moments(exact["count"], arrays.pop("exact_mean"), arrays.pop("exact_m2")), exact["batches"]
        if averages is not None:
            _check_keys(averages, {"batches"})
            averages = (arrays.pop("averages_mean"), arrays.pop("averages_var"), averages["batches"], *aside)
        if comm not in (None, True):
            raise StateError(f"comm: expected true, got {comm!r:.80}")
        return Kept(description, description.pop("training"), arrays, (averaged, skipped), exact, averages, comm)
    except (StateError, MemoryError):
        raise
    except KeyError as error:
        raise StateError(f"missing {error}") from error
    except Exception as error:
        raise StateError(str(error)) from error


def _check_keys(found: dict[str, Any], expected: set[str]) -> None:
    if found.keys() != expected:
        raise StateError(f"expected the keys {sorted(expected)}, got {sorted(map(str, found))}")


def _is_sum_of_weights(count: object) -> bool:
    return isinstance(count, float) and 0 <= count < math.inf
