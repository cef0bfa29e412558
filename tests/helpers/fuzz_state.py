"""Fuzzing of what reads files: any bytes give a layer (or a model) or `StateError`.

`python fuzz_state.py CORPUS [libFuzzer's options]` fuzzes with atheris, guided by coverage, until a finding or
the limit (`-max_total_time=600`). Inputs are not only files: a checksum would end nearly all of them. The first byte
says what the rest is and which of the two should come out, and the parts that a fuzzer cannot guess (checksum, CRCs)
are made right.
"""

import sys

if __name__ == "__main__":
    import atheris

    for name in ("zipfile", "json", "json.decoder", "json.scanner", "ast"):  # to be imported again, instrumented
        sys.modules.pop(name, None)
    with atheris.instrument_imports(
        include=[
            "bnfast.state",
            "bnfast.layer",
            "bnfast.statistics",
            "zipfile",
            "json",
            "ast",
            "numpy.lib._format_impl",
        ]
    ):
        import ast  # noqa: F401
        import json  # noqa: F401
        import zipfile

        import numpy.lib.format

        import bnfast.layer  # noqa: F401

import io
import struct
import warnings
import zipfile

import numpy as np

from bnfast import BatchNorm, StateError
from bnfast.state import files, model

NAMES = [
    "__bnfast__.npy", "weight.npy", "bias.npy", "running_mean.npy", "running_var.npy", "num_batches_tracked.npy",
    "exact_mean.npy", "exact_m2.npy", "averages_mean.npy", "averages_var.npy", "other.npy", "", "../weight.npy",
    "weight", "weight.npy/", "\N{SNOWMAN}.npy", "num_batches_averaged.npy", "num_batches_skipped.npy",
    "averages_num_batches_averaged.npy", "averages_num_batches_skipped.npy", "averaged_mean.npy", "averaged_var.npy",
    *(f"{place}.{name}.npy" for place in range(12) for name in ("array", "text", "value", "weight", "bias",
      "running_mean", "running_var", "num_batches_tracked", "exact_mean", "exact_m2", "averages_mean", "averages_var",
      "num_batches_averaged", "num_batches_skipped", "averages_num_batches_averaged", "averages_num_batches_skipped")),
]  # fmt: skip
RAW, SEALED, MEMBERS, DESCRIBED, KINDS = range(5)


def layers():
    """One of each kind."""
    x = np.arange(12.0).reshape(6, 2) ** 2
    plain, exact = BatchNorm(2), BatchNorm(2, momentum=None, dtype=np.float64, axis=-1, unbiased_running_var=False)
    plain(x)
    exact(x)
    with exact.calibrate():
        exact(x)
    skipping, infinite = BatchNorm(2, momentum=None, affine="gamma", nonfinite="skip"), x.copy()
    infinite[0, 1] = np.inf
    for batch in (x, infinite):
        skipping(batch)
    with skipping.calibrate():
        skipping(x)
    beta, nothing = (
        BatchNorm(2, affine="beta", nonfinite="raise"),
        BatchNorm(1, affine=False, track_running_stats=False),
    )
    return [plain, exact.eval(), BatchNorm(2, affine=False), nothing, skipping, beta]


KINDS_OF_LAYERS = ["usual", "exact", "no_parameters", "nothing", "skipping", "beta"]


def models():
    """What has every kind of entry, and what has none."""
    plain, exact, *_, nothing, skipping, _ = layers()
    arrays = {name: np.arange(4).astype(name) for name in ("bool", "u1", "i2", "<i4", ">i8", "f2", "f4", "f8")}
    arrays |= {
        "zero": np.array(1.5),
        "empty": np.empty((0, 3), np.int8),
        "table": np.ones((2, 3), np.float32, order="F"),
    }
    plain_values = {"on": True, "epoch": -3, "rate": 0.1, "": "", "../x": "\N{SNOWMAN}"}
    return [
        {"bn": plain, "w": np.array([[1.0, 2.0]]), **plain_values},
        {"a": exact, "b": skipping, "c": nothing},
        arrays,
        {},
    ]


def archive(members):
    """The bytes of a file with these members, (name, bytes) each, and a right checksum."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(buffer, "w") as file:
        warnings.simplefilter("ignore")  # about names that are there twice
        file.comment = bytes(files.SEAL)
        for name, content in members:
            info = zipfile.ZipInfo(name)
            file.writestr(info, content)
    return files.sealed(buffer.getvalue()[: -files.SEAL])


def members(data):
    """(name, bytes) of all members of a file."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return [(info.filename, file.read(info)) for info in file.infolist()]


def npy(array):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array), version=(1, 0))
    return buffer.getvalue()


def encoded():
    """(number of the loader, the file) of all these: layers, then models."""
    return [(0, layer._encoded()) for layer in layers()] + [(1, model._encoded(entries)) for entries in models()]


def seeds():
    """Inputs of which each describes a good file, in every one of the ways."""
    for number, (loader, data) in enumerate(encoded()):
        first = [bytes([loader * KINDS + kind]) for kind in range(KINDS)]
        yield first[RAW] + data
        yield first[SEALED] + data[: -files.SEAL]
        yield first[MEMBERS] + b"".join(
            struct.pack("<BH", NAMES.index(name), len(content)) + content for name, content in members(data)
        )
        yield first[DESCRIBED] + bytes([number]) + dict(members(data))["__bnfast__.npy"].partition(b"\n")[2]


def file_of(kind, rest):
    """The bytes of the file that an input describes."""
    if kind == RAW:
        return rest
    if kind == SEALED:
        return files.sealed(rest)
    if kind == MEMBERS:
        found = []
        while len(rest) >= 3 and len(found) < 40:
            name, length = struct.unpack_from("<BH", rest)
            found.append((NAMES[name % len(NAMES)], rest[3 : 3 + length]))
            rest = rest[3 + length :]
        return archive(found)
    number, text = (rest[0] % len(FILES), rest[1:]) if rest else (0, b"")
    return archive([("__bnfast__.npy", npy(np.frombuffer(text, np.uint8))), *FILES[number][1:]])


FILES = [members(data) for _, data in encoded()]
LOADERS = [
    (BatchNorm._decoded, BatchNorm._encoded),
    (model._decoded, model._encoded),
]


def check(given):
    """Whether an input gives a layer, or a model; False for `StateError`. Anything else is a finding, a warning too."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        good = _is_good(given)
    assert not caught, caught[0]
    return good


def _is_good(given):
    loader, kind = divmod(given[0], KINDS) if given else (0, RAW)
    decode, encode = LOADERS[loader % len(LOADERS)]
    try:
        found = decode(file_of(kind, given[1:]))
    except StateError as error:
        assert "pickle" not in str(error)  # noqa: PT017  (NumPy's advice)
        return False
    except ImportError as error:
        assert "ml_dtypes" in str(error)  # noqa: PT017
        return False
    again = encode(found)
    assert encode(decode(again)) == again
    return True


if __name__ == "__main__":
    import pathlib

    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    for number, seed in enumerate(seeds()):
        (folder / f"seed{number:02}").write_bytes(seed)
    atheris.Setup([sys.argv[0], str(folder), *sys.argv[2:]], check)
    atheris.Fuzz()
