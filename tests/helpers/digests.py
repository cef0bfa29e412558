"""Cases, what bnfast computes from them, and digests of that; for test_bits.py.

`python digests.py` compares all numbers of threads and instruction sets and prints 'N cases, M differences';
`python digests.py --digest` prints what its environment chose, and one digest of every case.
"""

import functools
import hashlib
import sys

import numpy as np

import bnfast
from bnfast import _core
from bnfast import functional as F

N_THREADS = [1, 2, 3, 5, 8]
DTYPES = [np.float32, np.float64]
ISAS = [name for name, (_, supported) in _core.isas().items() if supported]

# (shape, axis, memory order). How large a team each is worth: `_core.explain`, test_bits.py.
CASES = [
    # planar, few channels: a channel is split over the team
    ((2, 1, 300_000), 1, "C"),
    ((300_000, 1), 1, "C"),
    ((4, 1, 192, 192), 1, "C"),
    ((16, 3, 72, 72), 1, "C"),
    ((1, 3, 100_000), 1, "C"),
    ((8, 5, 90, 90), 1, "C"),
    ((3, 7, 5000), 1, "C"),
    ((5, 60_000), 0, "C"),
    # planar, channels enough for everyone
    ((4, 96, 28, 28), 1, "C"),
    ((2, 513, 9, 17), 1, "C"),
    ((129, 1000), 0, "C"),
    ((400, 300), 1, "F"),
    ((30, 8, 20, 30), 1, "F"),
    # planar, short runs
    ((32, 64, 7, 7), 1, "C"),
    ((64, 80, 4, 4), 1, "C"),
    # columns: runs shorter than a vector
    ((64, 256, 3, 3), 1, "C"),
    ((300, 70, 2, 2), 1, "C"),
    ((9001, 3, 5), 1, "C"),
    # interleaved and narrow: rows are folded, some are left over
    ((40_001, 2), 1, "C"),
    ((90_001, 3), 1, "C"),
    ((33_333, 5), 1, "C"),
    ((16, 57, 57, 9), -1, "C"),
    # interleaved and wide
    ((1031, 70), 1, "C"),
    ((8, 30, 30, 64), -1, "C"),
    ((2000, 256), -1, "C"),
    ((300, 1000), 1, "C"),
    ((40, 2100), 1, "C"),
    # interleaved, and a multiple of a cache line wide
    ((300, 1024), 1, "C"),
    ((5, 7, 9, 512), -1, "C"),
    ((300, 256, 2), 1, "C"),
    # few rows: a thread takes columns of its own
    ((12, 2048), 1, "C"),
    # small: never a team
    ((5, 3), 1, "C"),
    ((4, 3, 5, 6), 1, "C"),
]
LARGEST = 300_000  # elements of the largest cases: room for the largest team


def case_name(case):
    shape, axis, order = case
    return f"{'x'.join(map(str, shape))}-axis{axis}-{order}"


@functools.lru_cache(maxsize=4)
def arguments(case, dtype):
    """x, dy and v like each other; gamma, beta, vgamma, vbeta. Some channels hold what sends a kernel another way."""
    shape, axis, order = case
    rng = np.random.default_rng(shape)
    x, dy, v = (np.asarray(rng.normal(1, 2, shape), dtype, order=order) for _ in range(3))
    channels = np.moveaxis(x, axis, 0)
    if len(channels) > 2:
        channels[0] = 0.1  # constant
        channels[1, ..., -1] = channels[1][(0,) * (x.ndim - 1)] = 1e6  # outliers, the very first one too
        channels[2] += 1e5  # far from zero
    return x, dy, v, *rng.normal(size=(4, len(channels))).astype(dtype)


def results(x, dy, v, gamma, beta, vgamma, vbeta, axis):
    """Every array that bnfast computes from these."""
    y, mean, inv_std = F.batch_norm(x, gamma, beta, axis=axis)
    yield from (y, mean, inv_std)
    m = bnfast.moments(x, axis=axis)
    yield from (m.mean, m.m2)
    yield F.batch_norm_eval(x, mean, m.var(), gamma, beta, axis=axis)
    yield from F.batch_norm_backward(dy, x, mean, inv_std, gamma, axis=axis)
    yield from F.batch_norm_backward(dy, x, mean, inv_std, gamma, axis=axis, training=False)
    yield F.batch_norm_jvp(v, x, mean, inv_std, gamma, axis=axis, vgamma=vgamma, vbeta=vbeta)


def digest(arrays):
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(np.ascontiguousarray(array))
    return sha.hexdigest()


def digest_of(case, dtype, n_threads):
    with bnfast.num_threads(n_threads):
        assert bnfast.get_num_threads() == n_threads
        return digest(results(*arguments(case, dtype), axis=case[1]))


def digests(case, dtype):
    """{(isa, n_threads): digest}"""
    before, found = _core.isa(), {}
    for isa in ISAS:
        _core.select_isa(isa)
        found |= {(isa, n): digest_of(case, dtype, n) for n in N_THREADS}
    _core.select_isa(before)
    return found


def digest_of_all():
    """One digest of every case, by whatever this process's environment chose."""
    return digest(a for case in CASES for t in DTYPES for a in results(*arguments(case, t), axis=case[1]))


def main(argv):
    if argv == ["--digest"]:
        print(_core.isa(), bnfast.get_num_threads(), digest_of_all())
        return 0
    found = [digests(case, dtype) for case in CASES for dtype in DTYPES]
    n_cases = sum(map(len, found))
    n_differences = sum(value != of[ISAS[0], 1] for of in found for value in of.values())
    print(f"{n_cases} cases, {n_differences} differences")
    return int(n_differences > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
