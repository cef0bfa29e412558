"""A scaler as scikit-learn's own, and back: converters, hardened loaders and old programs know only theirs."""

import copy
from typing import Any

import numpy as np

__all__ = ["state_of", "to_sklearn"]

PARAMETERS = ("copy", "with_mean", "with_std")


def to_sklearn(scaler: Any, fitted: tuple[str, ...]) -> Any:
    """A `sklearn.preprocessing.StandardScaler` with copies of the parameters and of what `fitted` names."""
    from sklearn.preprocessing import StandardScaler

    theirs = StandardScaler(**{name: getattr(scaler, name) for name in PARAMETERS})
    vars(theirs).update({name: copy.deepcopy(vars(scaler)[name]) for name in fitted if name in vars(scaler)})
    return theirs


def state_of(theirs: Any, fitted: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(parameters, copies of what a fit has set) of a scaler of scikit-learn's."""
    from sklearn.preprocessing import StandardScaler

    if not isinstance(theirs, StandardScaler):
        raise TypeError(f"theirs: expected a sklearn.preprocessing.StandardScaler, got {type(theirs).__name__}")
    state = {name: copy.deepcopy(vars(theirs)[name]) for name in fitted if name in vars(theirs)}
    for name in ("mean_", "var_", "scale_"):
        if state.get(name) is not None:  # it works in the data's precision where these are extended
            state[name] = np.asarray(state[name], np.float64)
    if "n_samples_seen_" in state:
        state["n_samples_seen_"] = np.asarray(state["n_samples_seen_"])[()]
    return {name: getattr(theirs, name) for name in PARAMETERS}, state
