"""The batch norms of a whole model's weights: layers of what a dictionary of PyTorch's names holds."""

import os
from collections.abc import Iterable, Mapping
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import ArrayLike

from ..layer import BatchNorm
from .conventions import plain
from .files import StateError

__all__ = ["from_state"]

PARAMETERS = ("weight", "bias")
STATISTICS = ("running_mean", "running_var")


def from_state(
    state: Mapping[str, ArrayLike],
    prefixes: Iterable[str] | None = None,
    *,
    eps: float | Mapping[str, float] = 1e-5,
    axis: SupportsIndex | Mapping[str, SupportsIndex] = 1,
    **options: Any,
) -> dict[str, BatchNorm]:
    """Layers of all batch norms in a model's weights, such as PyTorch's `state_dict` or a safetensors file.

    Parameters
    ----------
    state : mapping of str to array_like
        NumPy arrays or tensors; half types become float32. A batch norm is what has a running_mean and a running_var,
        with weight, bias and num_batches_tracked where they are there. (So has an instance norm that tracks its
        statistics: a state does not tell them apart.)
    prefixes : iterable of str, optional
        Which layers to take, like "layer1.0.bn1"; None: all.
    eps : float or mapping of str to float
        Of all of them, or by prefix: it is not in a state. What a mapping leaves out is 1e-5.
    axis : int or mapping of str to int
        The channel axis of all of them, or by prefix.
    **options : any
        Other arguments of `BatchNorm`, for all of them or, as eps, by prefix: momentum, activation, ...

    Returns
    -------
    dict of str to BatchNorm
        Under their prefixes, in the order of `state`; "" for a state of one layer alone. In training mode, as every
        new layer is: call `eval()` to use the statistics.

    Raises
    ------
    TypeError, ValueError
        If `state`, a prefix or an option has a wrong type, or an option a wrong value.
    StateError
        If there is no batch norm, not one that `prefixes` or a mapping names, or one whose arrays do not fit.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> ones = np.ones(4, np.float32)
    >>> bnfast.from_state({"stem.bn.running_mean": ones, "stem.bn.running_var": ones, "fc.weight": np.eye(4)})
    {'stem.bn': BatchNorm(4, axis=1, eps=1e-05, momentum=0.1, affine=False)}
    """
    if not isinstance(state, Mapping):
        way = "; give its state_dict()" if hasattr(state, "state_dict") else ""
        way = "; load the file first" if isinstance(state, str | os.PathLike) else way
        raise TypeError(f"state: expected a mapping, got {type(state).__name__}{way}")
    if isinstance(prefixes, str):
        raise TypeError(f"prefixes: expected several str, got one; write [{prefixes!r}]")
    if not (prefixes is None or isinstance(prefixes, Iterable)):
        raise TypeError(f"prefixes: expected several str, got {type(prefixes).__name__}")
    found = _found(state)
    if not found:
        inner = [name for name, value in state.items() if isinstance(value, Mapping) and _found(value)]
        way = f"; state[{inner[0]!r:.80}] is a mapping that has some: give that" if inner else ""
        raise StateError(
            f"state: expected the keys of a batch norm, as 'bn1.running_mean' and 'bn1.running_var', got none{way}"
        )
    wanted = found if prefixes is None else list(prefixes)
    if others := [prefix for prefix in wanted if not isinstance(prefix, str)]:
        raise TypeError(f"prefixes: expected several str, got {type(others[0]).__name__} among them")
    wanted = [prefix.removesuffix(".") for prefix in wanted]
    options = {"eps": eps, "axis": axis, **options}
    by_prefix = {name: _by_bare_prefix(value) for name, value in options.items() if isinstance(value, Mapping)}
    of_all = {name: value for name, value in options.items() if name not in by_prefix}
    for name, named in {"prefixes": wanted, **by_prefix}.items():
        if missing := [prefix for prefix in named if prefix not in found]:
            few = ", ".join(map(repr, found[:8])) + (", ..." if len(found) > 8 else "")
            raise StateError(f"{name}: no batch norm {missing[0]!r}; there are {few}")
    layers = {}
    for prefix in wanted:
        its_own = {name: values[prefix] for name, values in by_prefix.items() if prefix in values}
        layers[prefix] = _layer(state, prefix, of_all | its_own)
    return layers


def _found(state: Mapping[str, ArrayLike]) -> list[str]:
    """The prefixes of all batch norms."""
    endings = [name for name in state if isinstance(name, str) and f".{name}".endswith(".running_mean")]
    found = [name.removesuffix("running_mean").removesuffix(".") for name in endings]
    return [prefix for prefix in found if _key(prefix, "running_var") in state]


def _by_bare_prefix(values: Mapping[Any, Any]) -> dict[Any, Any]:
    return {key.removesuffix(".") if isinstance(key, str) else key: value for key, value in values.items()}


def _key(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _layer(state: Mapping[str, ArrayLike], prefix: str, options: dict[str, Any]) -> BatchNorm:
    names = [name for name in (*PARAMETERS, *STATISTICS, "num_batches_tracked") if _key(prefix, name) in state]
    try:
        values = {name: plain(state[_key(prefix, name)], name) for name in names}
    except TypeError as error:
        raise StateError(f"{prefix}: {error}") from error
    kinds = {("weight", "bias"): True, ("weight",): "gamma", ("bias",): "beta", (): False}
    options = {"affine": kinds[tuple(name for name in PARAMETERS if name in values)], **options}
    wide = any(values[name].dtype == np.float64 for name in PARAMETERS if name in values)
    channels = values["running_mean"].size
    if not channels:
        raise StateError(f"{prefix}: running_mean: expected one value a channel, got none")
    layer = BatchNorm(channels, **{"dtype": np.float64 if wide else np.float32, **options})
    try:
        layer.load_state_dict(values)
    except StateError as error:
        raise StateError(f"{prefix}: {error}") from error
    return layer
