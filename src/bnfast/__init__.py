"""Batch normalisation on the CPU for NumPy arrays.

`BatchNorm` is the layer; `functional` has the same as functions; `moments` and `Moments` are exact statistics that
merge; `StandardScaler` scales features as scikit-learn's; `check_layer` checks any layer's gradients.
`python -m bnfast` shows what was built.
"""

# isort: off
from .runtime import loading as loading  # first: it loads the extension

# isort: on
from . import functional
from .grad_mode import no_grad
from .gradients.check import check_gradient, check_layer
from .gradients.differences import directional_derivative
from .gradients.verdict import GradientCheck
from .layer import BatchNorm
from .runtime.config import __version__, config, show_config
from .runtime.threads import get_num_threads, num_threads, set_num_threads
from .scaling.scaler import StandardScaler
from .state import names_of_0_1
from .state.files import StateError
from .state.fold import fold
from .state.model import load, save
from .state.trees import from_state
from .statistics.moments import Moments, moments
from .statistics.running import calibrate

names_of_0_1.enter(Moments, StandardScaler)

__all__ = [
    "BatchNorm",
    "GradientCheck",
    "Moments",
    "StandardScaler",
    "StateError",
    "__version__",
    "calibrate",
    "check_gradient",
    "check_layer",
    "config",
    "directional_derivative",
    "fold",
    "from_state",
    "functional",
    "get_num_threads",
    "load",
    "moments",
    "no_grad",
    "num_threads",
    "save",
    "set_num_threads",
    "show_config",
]
