"""Digests of results, kept here for ever: the same bits on every machine, for every build and version.

A change of these numbers is a change of what users get and belongs in CHANGELOG.md.
`python tests/test_golden.py` prints the table as this build computes it.
"""

import hashlib

import numpy as np
import pytest

import bnfast
from bnfast import functional as F

CASES = {  # (shape, channel axis)
    "planar, long rows": ((3, 5, 70, 71), 1),
    "planar, 7 x 7": ((16, 33, 7, 7), 1),
    "planar, one channel": ((1, 1, 200_003), 1),
    "interleaved": ((700, 130), 1),
    "interleaved, narrow": ((30_011, 3), 1),
    "short rows": ((50, 40, 6), 1),
}

DIGESTS: dict[tuple[str, str], str] = {
    ("planar, long rows", "float32"): "b3b090b6cadc5629",
    ("planar, long rows", "float64"): "ed255dacf50a4e0d",
    ("planar, 7 x 7", "float32"): "fd92405c45a29fd0",
    ("planar, 7 x 7", "float64"): "9d6f5478856120e7",
    ("planar, one channel", "float32"): "bf95b877c8fb44ba",
    ("planar, one channel", "float64"): "eee0f8b08d57e210",
    ("interleaved", "float32"): "2f4ce013685394a6",
    ("interleaved", "float64"): "5ed51af398f48fb5",
    ("interleaved, narrow", "float32"): "8acdc7573492563a",
    ("interleaved, narrow", "float64"): "53fc5cd5a99f6394",
    ("short rows", "float32"): "bc71a2a206b30881",
    ("short rows", "float64"): "1024c9b46c2e542c",
}


def numbers(count: int, seed: int, dtype: str) -> np.ndarray:
    """Exact multiples of 2^-24 in [-0.5, 0.5) + 3, from integer arithmetic alone."""
    scrambled = (np.arange(1, count + 1, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(seed * 40503)) % 2**32
    scrambled = (scrambled ^ (scrambled >> 15)) * np.uint64(2246822519) % 2**32
    return ((scrambled >> 11).astype(np.float64) / 2**21 + 2.5).astype(dtype)


def digest(case: str, dtype: str) -> str:
    shape, axis = CASES[case]
    count, channels = int(np.prod(shape)), shape[axis]
    x, dy, v = (numbers(count, seed, dtype).reshape(shape) for seed in (1, 2, 3))
    gamma, beta = numbers(channels, 4, dtype), numbers(channels, 5, dtype)
    y, mean, inv_std = F.batch_norm(x, gamma, beta, axis=axis)
    results = [
        y,
        mean,
        inv_std,
        bnfast.moments(x, axis=axis).m2,
        F.batch_norm_eval(x, mean, mean, gamma, beta, axis=axis),
        *F.batch_norm_backward(dy, x, mean, inv_std, gamma, axis=axis),
        *F.batch_norm_backward(dy, x, mean, inv_std, gamma, axis=axis, training=False),
        F.batch_norm_jvp(v, x, mean, inv_std, gamma, axis=axis, vgamma=beta, vbeta=gamma),
    ]
    sha = hashlib.sha256()
    for result in results:
        sha.update(np.ascontiguousarray(result).astype(result.dtype.newbyteorder("<")).tobytes())
    return sha.hexdigest()[:16]


@pytest.mark.parametrize(("case", "dtype"), [(case, dtype) for case in CASES for dtype in ("float32", "float64")])
def test_bits_are_those_of_the_table(case: str, dtype: str) -> None:
    assert digest(case, dtype) == DIGESTS[case, dtype]


if __name__ == "__main__":
    for case in CASES:
        for dtype in ("float32", "float64"):
            print(f'    ({case!r}, "{dtype}"): "{digest(case, dtype)}",')
