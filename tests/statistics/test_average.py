"""The step of a running average in other libraries' memory: in place, rounded once."""

import numpy as np
import pytest

from bnfast import _core


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rounded_once(dtype, rng):
    average, batch = rng.normal(size=1000).astype(dtype), rng.normal(size=1000)
    expected = (0.9 * average.astype(np.float64) + 0.1 * batch).astype(dtype)
    _core.update_average(average, batch, 0.9, 0.1)
    np.testing.assert_array_equal(average, expected)


def test_what_does_not_fit_is_refused_before_anything_is_written():
    average = np.ones(4)
    frozen = np.ones(4)
    frozen.flags.writeable = False
    for one, batch in (
        (average, np.ones(3)), (average, np.ones(4, np.float32)), (average[::2], np.ones(2)), (frozen, np.ones(4)),
        (np.ones(4, np.float16), np.ones(4)), (np.ones(4, int), np.ones(4)), (average, np.ones(8)[::2]),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="average"):
            _core.update_average(one, batch, 0.9, 0.1)
    assert (average == 1).all()
