"""The four names under which pickles of 0.1.0 find their classes.

`bnfast.moments` and `bnfast.scaler` were modules then. They are entered as modules without becoming attributes of the
package, where `bnfast.moments` is the function. `bnfast.layer` is still there; `_Averaged` is put into it.
"""

import sys
from types import ModuleType
from typing import Any, NamedTuple

__all__ = ["enter"]


class _Averaged(NamedTuple):
    """The averages that were set aside while exact statistics were in use."""

    mean: Any
    var: Any
    batches: int


def enter(moments: type, scaler: type) -> None:
    """Make the names importable, by `pickle` and by `import`."""
    for name, value in (("moments.Moments", moments), ("scaler.StandardScaler", scaler)):
        module, _, attribute = name.partition(".")
        found = sys.modules.setdefault(f"bnfast.{module}", ModuleType(f"bnfast.{module}", __doc__))
        setattr(found, attribute, value)
    sys.modules["bnfast.layer"]._Averaged = _Averaged  # type: ignore[attr-defined]
