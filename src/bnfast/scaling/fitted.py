"""What a fitted scaler consists of: made of statistics, read back as such, checked."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from .._checks import as_real, integer
from .columns import Statistics
from .data import Float64
from .estimator import Names

__all__ = ["FITTED", "attributes", "check_fitted", "given", "is_fitted", "statistics_of"]

FITTED = ("mean_", "var_", "scale_", "n_samples_seen_", "n_features_in_", "feature_names_in_")
FITTED_ALWAYS = frozenset(FITTED) - {"feature_names_in_"}

# Of which scikit-learn's rule counts all: a feature is constant if its standard deviation is within this many roundings
# of its mean. Data do not get worse with their number, so it ends here.
ROWS_OF_THE_RULE = 10_000
LEAST_VARIANCE = 1e-290  # squares of less have lost digits
EPS = float(np.finfo(np.float64).eps)


def is_fitted(state: Mapping[str, Any]) -> bool:
    return "n_features_in_" in state


def attributes(found: Statistics, names: Names | None, *, with_mean: bool, with_std: bool) -> dict[str, Any]:
    """The fitted attributes of a scaler with these parameters."""
    count, mean, m2, _ = found
    state: dict[str, Any] = dict.fromkeys(("mean_", "var_", "scale_"))
    if np.ndim(count) > 0 and (count == count[0]).all():
        count = count[0]
    state["n_samples_seen_"] = np.asarray(count)[()]
    state["n_features_in_"] = len(mean)
    if names is not None:
        state["feature_names_in_"] = names
    if with_mean or with_std:
        state["mean_"] = mean
    if with_std:
        with np.errstate(all="ignore"):
            var = m2 / count
            constant = is_constant(var, mean, state["n_samples_seen_"])
            scale = np.where(constant, 1.0, np.sqrt(var))
        check_range(var, mean, count, constant)
        state["var_"], state["scale_"] = var, scale
    return state


def check_range(var: Float64, mean: Float64, count: Any, constant: Any) -> None:
    """ValueError where float64 cannot hold a variance, or not with its digits."""
    if (((var >= LEAST_VARIANCE) | (var == 0)) & (var < np.inf)).all():
        return
    for outside, what in (
        (~np.isfinite(var) & np.isfinite(mean) & (count > 0), "values too large"),
        ((var > 0) & (var < LEAST_VARIANCE) & ~constant, "values too close to each other"),
    ):
        if outside.any():
            feature = int(np.argmax(outside))
            raise ValueError(
                f"X: {what} in feature {feature}: its squares leave float64's range; multiply it by a constant"
            )


def is_constant(var: Float64, mean: Float64, n_samples_seen: Any) -> Any:
    """Which features are constant to rounding; a sum of weights is no number of rows, and counts as many."""
    rows: Any = ROWS_OF_THE_RULE
    if isinstance(n_samples_seen, np.integer):
        rows = min(n_samples_seen, rows)
    elif np.asarray(n_samples_seen).dtype.kind in "iu":
        rows = np.minimum(n_samples_seen, rows)
    share = rows * EPS
    return var <= share * var + (share * mean) ** 2


def statistics_of(state: Mapping[str, Any], *, with_mean: bool, with_std: bool) -> Statistics:
    """What a scaler has been fitted to; what its parameters do not ask for is zero."""
    count, nothing = state["n_samples_seen_"], np.zeros(state["n_features_in_"])
    mean = given(state, "mean_") if with_mean or with_std else nothing
    m2 = given(state, "var_") * count if with_std else nothing
    return Statistics(count, mean, m2)


def given(state: Mapping[str, Any], name: str) -> Float64:
    """A fitted attribute that the parameters ask for."""
    value: Float64 | None = state[name]
    if value is None:
        raise ValueError(f"{name}: expected an array, got None: with_mean or with_std has changed since the fit")
    return value


def check_fitted(state: Mapping[str, Any]) -> None:
    """Raises if what a fitted scaler consists of is not complete, or parts of it do not fit; not of one before fit."""
    if FITTED_ALWAYS.isdisjoint(state):
        return
    if missing := FITTED_ALWAYS - state.keys():
        raise ValueError(f"missing {sorted(missing)}")
    features = integer(state["n_features_in_"], "n_features_in_")
    for name, smallest in (("mean_", -np.inf), ("var_", 0), ("scale_", 0), ("n_samples_seen_", 0)):
        if state[name] is None and name != "n_samples_seen_":
            continue
        array = as_real(np.asarray(state[name]))
        if array.dtype.kind not in "fiu":
            raise TypeError(f"{name}: expected real numbers, got dtype {array.dtype}")
        if array.shape != (features,) and not (name == "n_samples_seen_" and array.shape == ()):
            raise ValueError(f"{name}: expected shape ({features},), got {array.shape}")
        if bool((array < smallest).any()):
            raise ValueError(f"{name}: expected values of at least {smallest}")
    names = state.get("feature_names_in_")
    if names is not None and np.shape(names) != (features,):
        raise ValueError(f"feature_names_in_: expected shape ({features},), got {np.shape(names)}")
