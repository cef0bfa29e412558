"""Batch normalisation on the CPU for NumPy arrays.

`BatchNorm` is the layer; `functional` has the same as functions; `moments` and `Moments` are exact statistics that
merge; `StandardScaler` scales features as scikit-learn's; `check_layer` checks any layer's gradients.
`python -m bnfast` shows what was built.
"""

# isort: off
from .runtime import loading as loading  # first: it loads the extension

# isort: on
from . import functional
from .gradients.check import GradientCheck, check_gradient, check_layer, directional_derivative
from .layer import BatchNorm
from .runtime.config import __version__, config, show_config
from .runtime.threads import get_num_threads, num_threads, set_num_threads
from .scaling.scaler import StandardScaler
from .state import names_of_0_1
from .state.files import StateError
from .statistics.moments import Moments, moments

names_of_0_1.enter(Moments, StandardScaler)

__all__ = [
    "BatchNorm",
    "GradientCheck",
    "Moments",
    "StandardScaler",
    "StateError",
    "__version__",
    "check_gradient",
    "check_layer",
    "config",
    "directional_derivative",
    "functional",
    "get_num_threads",
    "moments",
    "num_threads",
    "set_num_threads",
    "show_config",
]
