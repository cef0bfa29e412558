"""What lies in new memory."""

import numpy as np
from scripts import FREE_THREADED, SANITIZED


def leave_nan(shape, dtype):
    """Arrays of this kind that are not set hold NaN next: NumPy keeps the memory of small ones for those to come.

    Not without a GIL, nor under a sanitizer: what they hold is then as it comes.
    """
    kept = [np.full(shape, np.nan, dtype) for _ in range(16)]
    del kept
    if not (FREE_THREADED or SANITIZED):
        assert np.isnan(np.empty(shape, dtype)).all()
