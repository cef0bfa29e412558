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

DTYPES = ("float32", "float64", "float16", "bfloat16")

DIGESTS: dict[tuple[str, str], str] = {
    ("planar, long rows", "float32"): "aa5092c82107677a",
    ("planar, long rows", "float64"): "94827970947ccc0a",
    ("planar, long rows", "float16"): "78d832afdb01550a",
    ("planar, long rows", "bfloat16"): "392aaedf48ccc579",
    ("planar, 7 x 7", "float32"): "46ec3194d49a38ae",
    ("planar, 7 x 7", "float64"): "d44157a929aa2f87",
    ("planar, 7 x 7", "float16"): "d68950d3d739e476",
    ("planar, 7 x 7", "bfloat16"): "3af59d2349c19aeb",
    ("planar, many blocks", "float32"): "fa84ea0fb6b000ff",
    ("planar, many blocks", "float64"): "67a749329ac544e1",
    ("planar, many blocks", "float16"): "1e127ee6e0f75bc8",
    ("planar, many blocks", "bfloat16"): "7a56d8a5d57d0fc3",
    ("planar, 5 x 5", "float32"): "75ce23c2ab5889bd",
    ("planar, 5 x 5", "float64"): "a7354c40fc29256b",
    ("planar, 5 x 5", "float16"): "5588f210267d35d3",
    ("planar, 5 x 5", "bfloat16"): "c040fafd00519885",
    ("planar, one channel", "float32"): "7cf1944cbf01a565",
    ("planar, one channel", "float64"): "bf0a66a0ab0995ee",
    ("planar, one channel", "float16"): "210721d244bb6ad4",
    ("planar, one channel", "bfloat16"): "e568c3bd319b7cc8",
    ("interleaved", "float32"): "61aeeb41d8a60359",
    ("interleaved", "float64"): "da72ac9f87538aa0",
    ("interleaved", "float16"): "86766cfcdc13c0ae",
    ("interleaved", "bfloat16"): "ca0c70939b9aa8d2",
    ("interleaved, narrow", "float32"): "1d9d9703c0fc79d7",
    ("interleaved, narrow", "float64"): "58707eb00ac3e66d",
    ("interleaved, narrow", "float16"): "391c5fadaf6e16e0",
    ("interleaved, narrow", "bfloat16"): "19a4dbaecbf683d2",
    ("interleaved, few rows", "float32"): "e650039c3663dc51",
    ("interleaved, few rows", "float64"): "2b6a575493d1bb63",
    ("interleaved, few rows", "float16"): "53c434273cf2409e",
    ("interleaved, few rows", "bfloat16"): "01f07d8723d23b4f",
    ("short rows", "float32"): "eebf7697e140a697",
    ("short rows", "float64"): "941ee4a47551560d",
    ("short rows", "float16"): "173c4622eb0cc5b5",
    ("short rows", "bfloat16"): "263b53f7abce71bd",
}


FUSED_DIGESTS: dict[tuple[str, str], str] = {
    ("planar, long rows", "float32"): "5326cc61656a30f7",
    ("planar, long rows", "float64"): "9c25cf1b9731a847",
    ("planar, long rows", "float16"): "52942d465ea19e0d",
    ("planar, long rows", "bfloat16"): "53374301a9ba71e1",
    ("planar, 7 x 7", "float32"): "e5bbbc6c42954039",
    ("planar, 7 x 7", "float64"): "7bf97e0b62ecbfa1",
    ("planar, 7 x 7", "float16"): "e50d77e54965ee2d",
    ("planar, 7 x 7", "bfloat16"): "3631b12fd4b4aa2e",
    ("planar, many blocks", "float32"): "457026c82d359b3b",
    ("planar, many blocks", "float64"): "83ac6bbbaa995dbc",
    ("planar, many blocks", "float16"): "a7f95e1bb8baa2c1",
    ("planar, many blocks", "bfloat16"): "a0ba4f8a3bcef193",
    ("planar, 5 x 5", "float32"): "861eed6957f9faeb",
    ("planar, 5 x 5", "float64"): "ebba4ca98d833a61",
    ("planar, 5 x 5", "float16"): "106f85d03f355536",
    ("planar, 5 x 5", "bfloat16"): "b1da77ce4b0b2714",
    ("planar, one channel", "float32"): "daf406ba163ae5a4",
    ("planar, one channel", "float64"): "9629e2cde29d129d",
    ("planar, one channel", "float16"): "85a0d3f947e7b966",
    ("planar, one channel", "bfloat16"): "74288938cf421542",
    ("interleaved", "float32"): "04e9c2b98a5d6ae8",
    ("interleaved", "float64"): "61b55b4a1ce2c4b8",
    ("interleaved", "float16"): "f746692dca37cd20",
    ("interleaved", "bfloat16"): "e9725c526e82ccd7",
    ("interleaved, narrow", "float32"): "c059737bbac968df",
    ("interleaved, narrow", "float64"): "459ebec439d7b9c2",
    ("interleaved, narrow", "float16"): "459708753c820b7f",
    ("interleaved, narrow", "bfloat16"): "411c8775d9c085fc",
    ("interleaved, few rows", "float32"): "da5091e67113428c",
    ("interleaved, few rows", "float64"): "471f9408cd9d3674",
    ("interleaved, few rows", "float16"): "18cef31e6a85a398",
    ("interleaved, few rows", "bfloat16"): "9bb335b2bf4d75ef",
    ("short rows", "float32"): "033e66e7008d1e92",
    ("short rows", "float64"): "fd44faac65205205",
    ("short rows", "float16"): "f169a42e270a730e",
    ("short rows", "bfloat16"): "13f8baed652c4115",
}


def numbers(count: int, seed: int, dtype: str) -> np.ndarray:
    """Exact multiples of 2^-24 in [-0.5, 0.5) + 3, from integer arithmetic alone; halves are rounded from them."""
    scrambled = (np.arange(1, count + 1, dtype=np.uint64) * np.uint64(2654435761) + np.uint64(seed * 40503)) % 2**32
    scrambled = (scrambled ^ (scrambled >> 15)) * np.uint64(2246822519) % 2**32
    values = (scrambled >> 11).astype(np.float64) / 2**21 + 2.5
    if dtype == "bfloat16":
        return values.astype(pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed").bfloat16)
    return values.astype(dtype)


def hashed(results: list[np.ndarray]) -> str:
    sha = hashlib.sha256()
    for result in results:
        little_endian = result.dtype if result.dtype.kind == "V" else result.dtype.newbyteorder("<")
        sha.update(np.ascontiguousarray(result).astype(little_endian).tobytes())
    return sha.hexdigest()[:16]


def digest(case: str, dtype: str) -> str:
    shape, axis = CASES[case]
    count, channels = int(np.prod(shape)), shape[axis]
    x, dy, v = (numbers(count, seed, dtype).reshape(shape) for seed in (1, 2, 3))
    gamma, beta = (numbers(channels, seed, "float64" if dtype == "float64" else "float32") for seed in (4, 5))
    y, mean, inv_std = F.batch_norm(x, gamma, beta, axis=axis)
    return hashed(
        [
            y,
            mean,
            inv_std,
            bnfast.moments(x, axis=axis).m2,
            F.batch_norm_eval(x, mean, mean, gamma, beta, axis=axis),
            *F.batch_norm_backward(dy, x, mean, inv_std, gamma, axis=axis),
            *F.batch_norm_backward(dy, x, mean, inv_std, gamma, axis=axis, training=False),
            F.batch_norm_jvp(v, x, mean, inv_std, gamma, axis=axis, vgamma=beta, vbeta=gamma),
        ]
    )


def fused_digest(case: str, dtype: str) -> str:
    """Of an activation of both signs, a residual, a mask, the halves of a backward, and a layer that goes by marks."""
    shape, axis = CASES[case]
    count, channels = int(np.prod(shape)), shape[axis]
    x, dy, residual = (numbers(count, seed, dtype).reshape(shape) for seed in (1, 2, 3))
    residual = residual - np.asarray(3, residual.dtype)
    gamma, beta = (numbers(channels, seed, "float64" if dtype == "float64" else "float32") - 3 for seed in (4, 5))
    mask = (np.arange(count // channels) % 7 != 3).reshape(np.delete(shape, axis))
    results: list[np.ndarray] = []
    for options in ({}, {"residual": residual}, {"residual": residual, "mask": mask}):
        given = {"axis": axis, "activation": "leaky_relu", "negative_slope": 0.25, **options}
        y, mean, inv_std = F.batch_norm(x, gamma, beta, **given)
        first = dy, x, mean, inv_std, gamma
        sums = F.batch_norm_backward_sums(*first, beta=beta, **given)
        applied = F.batch_norm_backward_apply(*first, sums, beta=beta, **given)
        results += [y, *F.batch_norm_backward(*first, beta=beta, **given), sums.dgamma, sums.dbeta]
        results += applied if isinstance(applied, tuple) else [applied]
    layer = bnfast.BatchNorm(channels, axis=axis, activation="relu", dtype=gamma.dtype)
    layer.gamma, layer.beta = gamma, beta
    results += [layer(x, residual=residual), *layer.backward(dy), layer.grad_gamma, layer.running_var]
    return hashed(results)


every_case = pytest.mark.parametrize(("case", "dtype"), [(case, dtype) for case in CASES for dtype in DTYPES])


@every_case
def test_bits_are_those_of_the_table(case: str, dtype: str) -> None:
    assert digest(case, dtype) == DIGESTS[case, dtype]


@every_case
def test_fused_bits_are_those_of_the_table(case: str, dtype: str) -> None:
    assert fused_digest(case, dtype) == FUSED_DIGESTS[case, dtype]


if __name__ == "__main__":
    for name, digest_of in (("DIGESTS", digest), ("FUSED_DIGESTS", fused_digest)):
        print(f"{name}: dict[tuple[str, str], str] = {{")
        for case in CASES:
            for dtype in DTYPES:
                print(f'    ("{case}", "{dtype}"): "{digest_of(case, dtype)}",')
        print("}")
