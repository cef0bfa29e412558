"""Digests of results, kept here for ever: the same bits on every machine, for every build and version.

A change of these numbers is a change of what users get and belongs in CHANGELOG.md.
`python tests/kernels/test_golden.py` prints the table as this build computes it.
"""

import hashlib

import numpy as np
import pytest

import bnfast
from bnfast import functional as F

CASES = {  # (shape, channel axis)
    "planar, long rows": ((3, 5, 70, 71), 1),
    "planar, 7 x 7": ((16, 33, 7, 7), 1),
    "planar, many blocks": ((8, 24, 130, 131), 1),
    "planar, 5 x 5": ((32, 20, 5, 5), 1),
    "planar, one channel": ((1, 1, 200_003), 1),
    "interleaved": ((700, 130), 1),
    "interleaved, narrow": ((30_011, 3), 1),
    "interleaved, few rows": ((11, 260), 1),
    "short rows": ((50, 40, 6), 1),
}

DIGESTS: dict[tuple[str, str], str] = {
    ("planar, long rows", "float32"): "c2375d301d89b9f0",
    ("planar, long rows", "float64"): "260160307c1f6ecd",
    ("planar, 7 x 7", "float32"): "5d8a553874fc31ac",
    ("planar, 7 x 7", "float64"): "b2a18c244f1878a3",
    ("planar, many blocks", "float32"): "6f05f3d3d7f8b865",
    ("planar, many blocks", "float64"): "b6d21ac991e518ff",
    ("planar, 5 x 5", "float32"): "6294c11976d58cbf",
    ("planar, 5 x 5", "float64"): "2af3e606112f7615",
    ("planar, one channel", "float32"): "572540b8819cd75a",
    ("planar, one channel", "float64"): "6fc3431c66ec2499",
    ("interleaved", "float32"): "c343c699fd5ea820",
    ("interleaved", "float64"): "24f8372cb0a7fbb1",
    ("interleaved, narrow", "float32"): "adf3181d0c6b56d9",
    ("interleaved, narrow", "float64"): "65f729069a027b87",
    ("interleaved, few rows", "float32"): "ef34d3297abfec06",
    ("interleaved, few rows", "float64"): "bc540e86bbcb63eb",
    ("short rows", "float32"): "3f7613854d4a1004",
    ("short rows", "float64"): "2c778fb1be19a540",
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
            print(f'    ("{case}", "{dtype}"): "{digest(case, dtype)}",')
