"""A scaler as scikit-learn's own, and back: converters, hardened loaders and old programs know only theirs."""

import copy
from typing import Any

import numpy as np

__all__ = ["output_of", "state_of", "to_sklearn"]

PARAMETERS = ("copy", "with_mean", "with_std")
# of a subclass: the other side would not have them
METHODS = ("fit", "fit_transform", "partial_fit", "transform", "inverse_transform")


def to_sklearn(scaler: Any, base: type, fitted: tuple[str, ...]) -> Any:
    """A `sklearn.preprocessing.StandardScaler` with copies of the parameters and of what `fitted` names."""
    from sklearn.preprocessing import StandardScaler

    check_methods(scaler, base)
    theirs = StandardScaler(**{name: getattr(scaler, name) for name in PARAMETERS})
    vars(theirs).update({name: copy.deepcopy(vars(scaler)[name]) for name in fitted if name in vars(scaler)})
    return theirs.set_output(transform=output_of(scaler))


def state_of(theirs: Any, fitted: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(parameters, copies of what a fit has set) of a scaler of scikit-learn's."""
    from sklearn.preprocessing import StandardScaler

    if not isinstance(theirs, StandardScaler):
        cls = type(theirs)
        raise TypeError(f"theirs: expected a sklearn.preprocessing.StandardScaler, got {cls.__module__}.{cls.__name__}")
    check_methods(theirs, StandardScaler)
    state = {name: copy.deepcopy(vars(theirs)[name]) for name in fitted if name in vars(theirs)}
    for name in ("mean_", "var_", "scale_"):
        if state.get(name) is not None:  # it works in the data's precision where these are extended
            state[name] = np.asarray(state[name], np.float64)
    if "n_samples_seen_" in state:
        state["n_samples_seen_"] = np.asarray(state["n_samples_seen_"])[()]
    return {name: getattr(theirs, name) for name in PARAMETERS}, state


def output_of(scaler: Any) -> str | None:
    """The container that `set_output` was asked for, of either scaler."""
    container: str | None = vars(scaler).get("_sklearn_output_config", {}).get("transform")
    return container


def check_methods(scaler: Any, base: type) -> None:
    """TypeError if the scaler is of a subclass that does something else."""
    cls = type(scaler)
    if own := [name for name in METHODS if getattr(cls, name) is not getattr(base, name)]:
        raise TypeError(
            f"{cls.__name__}: expected the methods of {base.__name__}, got another {own[0]}, which would be lost"
        )
