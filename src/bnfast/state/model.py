"""A whole model in one file: layers, arrays, numbers and strings under names.

The description lists the entries: name, kind, and what the arrays of the entry are not enough for. Its arrays are
members named by the entry's place, as a name is anything ("conv1/../w" too) and must not become a path.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core
from .._checks import integer
from ..layer import BatchNorm
from .files import MODEL_DTYPES, StateError, decode, encode, read, replace
from .layer_state import FIXED, LayerState, described, kept_from

__all__ = ["load", "save"]

Array = NDArray[Any]
Entry = LayerState | Array | bool | int | float | str
BFLOAT16 = "bfloat16"
MEMBERS = {"array": {"array"}, "bool": {"value"}, "float": {"value"}, "int": {"text"}, "str": {"text"}}  # of each kind


def save(path: str | os.PathLike[str], entries: Mapping[str, Any]) -> None:
    """Write layers, arrays, numbers and strings to one file, from which `load` gets them back to the bit.

    As `BatchNorm.save`: the file is replaced as a whole, has a checksum, and nothing in it is a pickle.

    Parameters
    ----------
    path : str or os.PathLike
        Taken as it is: no extension is added.
    entries : dict of str to BatchNorm, ndarray, bool, int, float or str
        Arrays of any shape, of bool, integers, float16, float32, float64 or bfloat16 (that of ml_dtypes); NumPy's
        scalars become Python's numbers. Names are any strings. Dictionaries and lists inside are refused: give their
        values names of their own, like "optimiser.step".

    Raises
    ------
    TypeError
        If `entries` is no dict of strings, or a value is none of these.
    ValueError
        If a name is no Unicode text (two halves of a character that are not put together).
    StateError
        If a parameter or statistic of a layer is not finite. Nothing is written. (Arrays may hold anything.)
    OSError
        If the file cannot be written. What is there is the old file or the new one, whole.

    Examples
    --------
    >>> import os, tempfile, numpy as np, bnfast
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "model.npz")
    ...     bnfast.save(path, {"bn": bnfast.BatchNorm(3), "w": np.eye(3), "epoch": 5})
    ...     model = bnfast.load(path)
    >>> model["bn"], model["w"].shape, model["epoch"]
    (BatchNorm(3, axis=1, eps=1e-05, momentum=0.1), (3, 3), 5)
    """
    if not isinstance(entries, Mapping):
        hint = "; a layer alone is written by its own save" if isinstance(entries, LayerState) else ""
        raise TypeError(f"entries: expected a dict of names, got {type(entries).__name__}{hint}")
    replace(path, _encoded(entries))


def load(
    path: str | os.PathLike[str], *, into: Mapping[str, Any] | None = None, max_bytes: int = 1 << 30
) -> dict[str, Any]:
    """What `bnfast.save` wrote to a file, under its names.

    Nothing in the file is executed or unpickled. All of it is covered by a checksum, so a damaged file is refused.

    Parameters
    ----------
    path : str or os.PathLike
    into : dict of str to BatchNorm or ndarray, optional
        Living layers and arrays to fill with the file's entries of those names: all of them or, after an error, none. A
        layer takes parameters (in place), statistics, mode, eps and momentum, and must have been made with the same
        other options; an array must have the same dtype and shape. Without it layers are new `BatchNorm`: a subclass
        comes back only through `into`.
    max_bytes : int
        A larger file is refused before it is read. Loading takes up to ten times the size of a file.

    Returns
    -------
    dict
        All entries; those that `into` names are the very objects of `into`.

    Raises
    ------
    TypeError, ValueError
        If `into` holds anything but layers and writeable arrays, or one of them twice.
    StateError
        If the file was not written by `bnfast.save`, is damaged, too large, written by a newer bnfast, or does not fit
        `into`. Nothing has changed.
    ImportError
        If it holds a bfloat16 array and ml_dtypes is not installed.
    OSError
        If it cannot be read.
    """
    limit = integer(max_bytes, "max_bytes")
    living = {} if into is None else _checked_into(into)
    try:
        found = _decoded(read(path, limit))
        if missing := [name for name in living if name not in found]:
            raise StateError(f"expected the entries of into, missing {missing!r:.300}")
        for name, target in living.items():
            _check_fits(name, target, found[name])
        pairs = [(target, found[name]) for name, target in living.items()]
        layers = [(target, new) for target, new in pairs if isinstance(target, LayerState)]
        updates = [target._restoring(new._kept(), strict=False) for target, new in layers]
    except StateError as error:
        raise StateError(f"{os.fspath(path)}: {error}") from (error.__cause__ or error)
    arrays = [pair for pair in pairs if isinstance(pair[0], np.ndarray)]
    _core.update_all(updates, arrays, [(target.__dict__, new._mode()) for target, new in layers])
    return {**found, **living}


def _checked_into(into: Mapping[str, Any]) -> dict[str, Any]:
    """What is to be filled; TypeError or ValueError if it could not be."""
    if not isinstance(into, Mapping):
        raise TypeError(f"into: expected a dict of names, got {type(into).__name__}")
    for name, value in into.items():
        if not isinstance(value, LayerState | np.ndarray) or isinstance(value, np.ma.MaskedArray):
            raise TypeError(f"into: expected layers and arrays, got {type(value).__name__} for {name!r:.80}")
        if isinstance(value, np.ndarray) and not value.flags.writeable:
            raise TypeError(f"into: expected writeable arrays, got a read-only one for {name!r:.80}")
    if len({id(value) for value in into.values()}) < len(into):
        raise ValueError("into: expected each layer and array once, got one of them twice")
    _check_apart(into)
    return dict(into)


def _check_apart(into: Mapping[str, Any]) -> None:
    """That no memory would be filled twice."""
    arrays: list[tuple[str, Array]] = []
    for name, value in into.items():
        arrays += [(name, a) for a in ([value] if isinstance(value, np.ndarray) else value.parameters().values())]
    extents = sorted((*np.lib.array_utils.byte_bounds(a), i) for i, (_, a) in enumerate(arrays) if a.size)
    for place, (_, end, i) in enumerate(extents):
        name, array = arrays[i]
        if _core.elements_overlap(array):
            raise ValueError(f"into: expected arrays whose elements do not overlap, got one for {name!r:.80}")
        for begin, _, j in extents[place + 1 :]:
            if begin >= end:
                break
            if _core.shares_memory(array, arrays[j][1]):
                raise ValueError(
                    f"into: expected memory of their own, but {name!r:.80} and {arrays[j][0]!r:.80} share some"
                )


def _encoded(entries: Mapping[str, Any]) -> bytes:
    """The bytes of a file, which `_decoded` accepts."""
    listed: list[dict[str, Any]] = []
    arrays: dict[str, Array] = {}
    for place, (name, value) in enumerate(entries.items()):
        if not isinstance(name, str):
            raise TypeError(f"entries: expected names that are strings, got {name!r:.80}")
        if json.loads(json.dumps(name)) != name:
            raise ValueError(f"entries: expected names that are Unicode text, got {name!r:.80}")
        kind, more, members = _taken_apart(name, value)
        listed.append({"name": name, "kind": kind, **more})
        arrays |= {f"{place}.{member}": array for member, array in members.items()}
    data = encode("model", {"entries": listed}, arrays)
    _decoded(data)  # what could not be loaded is not written
    return data


def _taken_apart(name: str, value: Any) -> tuple[str, dict[str, Any], dict[str, Array]]:
    """(kind, what the description says besides, arrays) of an entry."""
    if isinstance(value, LayerState):
        description, arrays = described(value._kept())
        return "layer", {"layer": description}, arrays
    if isinstance(value, np.ndarray):
        if isinstance(value, np.ma.MaskedArray):
            raise TypeError(f"{name!r:.80}: expected an array without a mask, got {type(value).__name__}")
        if value.dtype.name == BFLOAT16:
            return "array", {"dtype": BFLOAT16}, {"array": np.asarray(value).view(np.uint16)}
        if value.dtype.newbyteorder("<") not in MODEL_DTYPES:
            raise TypeError(
                f"{name!r:.80}: expected an array of bool, integers or floats of up to 8 bytes, got {value.dtype}"
            )
        return "array", {}, {"array": np.asarray(value)}
    if isinstance(value, np.generic):
        if value.dtype.name == BFLOAT16:
            value = float(value)
        elif value.dtype.kind in "biufU":
            value = value.item()
    if isinstance(value, bool):
        return "bool", {}, {"value": np.array(value)}
    if isinstance(value, int):
        return "int", {}, {"text": np.frombuffer(hex(value).encode(), np.uint8)}  # decimal digits are limited
    if isinstance(value, float):
        return "float", {}, {"value": np.array(value, np.float64)}
    if isinstance(value, str):
        return "str", {}, {"text": np.frombuffer(value.encode("utf-8", "surrogatepass"), np.uint8)}
    raise TypeError(
        f"{name!r:.80}: expected a BatchNorm, an array, a number or a string, got {type(value).__name__}"
        + ("; give its values names of their own" if isinstance(value, Mapping | list | tuple) else "")
    )


def _decoded(data: bytes) -> dict[str, Any]:
    description, arrays = decode(data, "model")
    try:
        members: dict[str, dict[str, Array]] = {}
        for name, array in arrays.items():
            number, _, member = name.partition(".")
            members.setdefault(number, {})[member] = array
        found: dict[str, Any] = {}
        if description.keys() != {"entries"} or type(description["entries"]) is not list:
            raise StateError("expected a list of entries, and nothing else")
        for place, entry in enumerate(description["entries"]):
            name = entry["name"]
            if type(name) is not str or name in found:
                raise StateError(f"expected names that are different strings, got {name!r:.80}")
            try:
                found[name] = _put_together(entry, members.pop(str(place), {}))
            except StateError as error:
                raise StateError(f"{name!r:.80}: {error}") from (error.__cause__ or error)
        if members:
            raise StateError("expected no members but those of its entries")
        return found
    except (StateError, MemoryError, ImportError):
        raise
    except Exception as error:
        raise StateError(f"not a description of a model ({type(error).__name__}: {error!s:.200})") from error


def _put_together(entry: dict[str, Any], arrays: dict[str, Array]) -> Any:
    kind, more = entry["kind"], entry.keys() - {"name", "kind"}
    if kind == "layer" and more == {"layer"}:
        return BatchNorm._made_of(kept_from(entry["layer"], arrays), strict=True)
    if kind == "array" and more == {"dtype"} and entry["dtype"] == BFLOAT16:
        return _as_bfloat16(**arrays)
    if more or kind not in MEMBERS or arrays.keys() != MEMBERS[kind]:
        raise StateError(f"expected an entry of a known kind, got {kind!r:.80} with {sorted(arrays)!r:.80}")
    if kind == "array":
        return arrays["array"]
    if kind in ("bool", "float"):
        value = arrays["value"]
        if value.dtype != kind or value.shape != ():
            raise StateError(f"expected one {kind}, got {value.dtype} of shape {value.shape}")
        return value.item()
    text = arrays["text"]
    if text.dtype != np.uint8 or text.ndim != 1:
        raise StateError(f"expected bytes of text, got {text.dtype} of shape {text.shape}")
    return int(text.tobytes(), 16) if kind == "int" else text.tobytes().decode("utf-8", "surrogatepass")


def _as_bfloat16(array: Array) -> Array:
    if array.dtype != np.uint16:
        raise StateError(f"expected the bits of bfloat16 as uint16, got {array.dtype}")
    try:
        import ml_dtypes
    except ImportError:
        raise ImportError("the file holds a bfloat16 array: `pip install ml_dtypes` to load it") from None
    return array.view(ml_dtypes.bfloat16)


def _check_fits(name: str, target: LayerState | Array, found: Any) -> None:
    """That a living object can take what was found."""
    if isinstance(target, LayerState):
        if not isinstance(found, LayerState):
            raise StateError(f"{name!r:.80}: expected a layer in the file, got {type(found).__name__}")
        for option in FIXED:
            if getattr(target, option) != getattr(found, option):
                raise StateError(
                    f"{name!r:.80}: expected {option} {getattr(target, option)!r} as the layer of into has it, got "
                    f"{getattr(found, option)!r}"
                )
    elif (
        not isinstance(found, np.ndarray)
        or found.dtype != target.dtype.newbyteorder("=")
        or found.shape != target.shape
    ):
        kind = f"{found.dtype} {found.shape}" if isinstance(found, np.ndarray) else type(found).__name__
        raise StateError(f"{name!r:.80}: expected {target.dtype} {target.shape}, got {kind}")
