"""scikit-learn's own scaler, fitted as ours is: it scales sparse data."""

from collections.abc import Mapping
from typing import Any

from .data import Float64, row_slices

__all__ = ["fitted_to_sparse", "scaled_sparse"]


def fitted_to_sparse(
    x: Any,
    weights: Float64 | None,
    parameters: Mapping[str, bool],
    fitted: Mapping[str, Any],
    batch_size: int | None,
) -> dict[str, Any]:
    """What scikit-learn's scaler with these parameters and fitted attributes has after `partial_fit(x)`."""
    peer = peer_of(parameters, fitted)
    if batch_size is None:
        peer.partial_fit(x, sample_weight=weights)
    else:
        x = x.tocsr()
        for rows in row_slices(x, batch_size):
            peer.partial_fit(x[rows], sample_weight=None if weights is None else weights[rows])
    return {name: value for name, value in vars(peer).items() if name.endswith("_")}


def scaled_sparse(method: str, x: Any, copy: bool, parameters: Mapping[str, bool], fitted: Mapping[str, Any]) -> Any:
    """What scikit-learn's `transform` or `inverse_transform` makes of x: a CSR array, or matrix, as x is one."""
    return getattr(peer_of(parameters, fitted), method)(x, copy=copy)


def peer_of(parameters: Mapping[str, bool], fitted: Mapping[str, Any]) -> Any:
    try:
        import sklearn.preprocessing
    except ImportError as error:
        raise TypeError(
            "X: expected dense data, as scikit-learn, which scales sparse data, is not installed; use X.toarray()"
        ) from error
    theirs = sklearn.preprocessing.StandardScaler
    if not theirs.__module__.startswith("sklearn."):  # somebody put ours in its place
        theirs = sklearn.preprocessing._data.StandardScaler
    peer = theirs(**parameters)
    # copies: scikit-learn adds to some of them in place
    vars(peer).update({name: value.copy() if hasattr(value, "copy") else value for name, value in fitted.items()})
    return peer
