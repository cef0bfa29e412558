"""What a layer says its gradients are, in whichever of the usual ways it says so."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

__all__ = ["Claims", "claims_of"]


class Claims(NamedTuple):
    dx: Any
    dresidual: Any  # None without a residual
    parameters: Mapping[str, Any]
    gradients: Mapping[str, Any]  # with the same keys


def claims_of(layer: Any, forward: Callable[[], Any], dy: Any, with_residual: bool) -> Claims:
    """What backward gives for dy, after a forward; leaves its mark on the layer, so let it be a copy."""
    keeps, has_parameters = (getattr(layer, method, None) is not None for method in ("gradients", "parameters"))
    before = cleared(layer) if keeps else {}
    found = layer.backward(dy.copy())
    expected = ["dx", "dresidual"] if with_residual else ["dx"]
    results = (
        list(found) if isinstance(found, (tuple, list)) and (with_residual or isinstance(found, tuple)) else [found]
    )
    words = f"({', '.join(expected)})" if with_residual else "dx"
    if with_residual and len(results) < 2:
        raise TypeError(
            f"layer: expected (dx, dresidual) of backward, as there is a residual, got {type(found).__name__}"
        )
    if isinstance(found, Mapping):
        raise TypeError(f"layer: expected {words} of backward, got {type(found).__name__}")
    results, others = results[: len(expected)], results[len(expected) :]
    dx, dresidual = results if with_residual else (results[0], None)
    if others and (keeps or not has_parameters):
        raise TypeError(
            f"layer: expected {words} of backward, got a tuple of {len(results) + len(others)}; gradients of "
            "parameters come from gradients(), or, if there is parameters() alone, after dx in the order of its values"
        )
    if not (keeps or has_parameters):
        return Claims(dx, dresidual, {}, {})
    parameters = dictionary(layer, "parameters")
    for name, value in parameters.items():
        if not isinstance(value, np.ndarray):
            raise TypeError(
                f"parameters()[{name!r}]: expected the numpy.ndarray that forward reads, got {type(value).__name__}, "
                "which cannot be moved in place"
            )
    if others:
        if len(others) != len(parameters):
            raise ValueError(
                f"layer: expected {len(parameters)} gradients after {words} of backward, those of {list(parameters)}, "
                f"got {len(others)}"
            )
        return Claims(dx, dresidual, parameters, dict(zip(parameters, others, strict=True)))
    gradients = dictionary(layer, "gradients")
    if parameters.keys() != gradients.keys():
        raise ValueError(
            f"layer.gradients(): expected the keys of parameters(), {list(parameters)}, got {list(gradients)}"
        )
    for name, value in gradients.items():
        if value is None:
            raise TypeError(f"gradients()[{name!r}]: expected an array, got None: backward has not set it")
    if before:
        gradients = added(layer, forward, dy, before, copied(gradients))
    return Claims(dx, dresidual, parameters, gradients)


# --- layers that add up their gradients ---------------------------------------------------------------------------


def cleared(layer: Any) -> dict[str, Any]:
    """Sets the gradients of earlier backwards to zero, where they can be written; what is left of them else."""
    try:
        found = dict(layer.gradients())
        for value in found.values():
            if isinstance(value, np.ndarray) and value.flags.writeable:
                value[...] = 0
        left = copied(layer.gradients())
    except Exception:  # before the first backward there may be none yet; afterwards this is looked at again
        return {}
    return left if any(np.any(value) for value in left.values() if value is not None) else {}


def added(
    layer: Any, forward: Callable[[], Any], dy: Any, before: Mapping[str, Any], once: dict[str, Any]
) -> dict[str, Any]:
    """What one backward adds: `once` itself, unless a second one with twice the dy shows that it was a sum."""
    forward()
    layer.backward(2 * dy)
    twice = dictionary(layer, "gradients")
    found = dict(once)
    for name, value in once.items():
        old = before.get(name)
        if old is None or np.shape(old) != np.shape(value) or np.shape(twice[name]) != np.shape(value):
            continue
        one = value - old
        if np.linalg.norm(twice[name] - (value + 2 * one)) < np.linalg.norm(twice[name] - 2 * value):
            found[name] = one
    return found


# --- methods ------------------------------------------------------------------------------------------------------


def dictionary(layer: Any, method: str) -> Mapping[str, Any]:
    function = getattr(layer, method, None)
    if not callable(function):
        found = "missing" if function is None else f"an attribute, {type(function).__name__}"
        raise TypeError(f"layer: expected the methods parameters and gradients, or neither; {method} is {found}")
    found = function()
    if not isinstance(found, Mapping):
        raise TypeError(f"layer.{method}(): expected a dict of arrays, got {type(found).__name__}")
    return found


def copied(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: None if value is None else np.array(value) for name, value in values.items()}
