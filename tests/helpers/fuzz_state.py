"""Fuzzing of what reads files: any bytes give a layer or `StateError`.

`python fuzz_state.py CORPUS [libFuzzer's options]` fuzzes with atheris, guided by coverage, until a finding or
the limit (`-max_total_time=600`). Inputs are not only files: a checksum would end nearly all of them. The first byte
says what the rest is, and the parts that a fuzzer cannot guess (checksum, CRCs) are made right.
"""

import sys

if __name__ == "__main__":
    import atheris

    for name in ("zipfile", "json", "json.decoder", "json.scanner", "ast"):  # to be imported again, instrumented
        sys.modules.pop(name, None)
    with atheris.instrument_imports(
        include=["bnfast.state", "bnfast.layer", "bnfast.moments", "zipfile", "json", "ast", "numpy.lib._format_impl"]
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

from bnfast import BatchNorm, StateError, state

NAMES = [
    "__bnfast__.npy", "weight.npy", "bias.npy", "running_mean.npy", "running_var.npy", "num_batches_tracked.npy",
    "exact_mean.npy", "exact_m2.npy", "averaged_mean.npy", "averaged_var.npy", "other.npy", "", "../weight.npy",
    "weight", "weight.npy/", "\N{SNOWMAN}.npy",
]  # fmt: skip
RAW, SEALED, MEMBERS, DESCRIBED = range(4)


def layers():
    """One of each kind."""
    x = np.arange(12.0).reshape(6, 2) ** 2
    plain, exact = BatchNorm(2), BatchNorm(2, momentum=None, dtype=np.float64, axis=-1, unbiased_running_var=False)
    plain(x)
    exact(x)
    with exact.calibrate():
        exact(x)
    return [plain, exact.eval(), BatchNorm(2, affine=False), BatchNorm(1, affine=False, track_running_stats=False)]


def archive(members):
    """The bytes of a file with these members, (name, bytes) each, and a right checksum."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.comment = bytes(state.SEAL)
        for name, content in members:
            info = zipfile.ZipInfo(name)
            file.writestr(info, content)
    return state.sealed(buffer.getvalue()[: -state.SEAL])


def members(data):
    """(name, bytes) of all members of a file."""
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        return [(info.filename, file.read(info)) for info in file.infolist()]


def npy(array):
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array), version=(1, 0))
    return buffer.getvalue()


def seeds():
    """Inputs of which each describes a good file, in every one of the ways."""
    for number, layer in enumerate(layers()):
        data = layer._encoded()
        yield bytes([RAW]) + data
        yield bytes([SEALED]) + data[: -state.SEAL]
        yield bytes([MEMBERS]) + b"".join(
            struct.pack("<BH", NAMES.index(name), len(content)) + content for name, content in members(data)
        )
        yield bytes([DESCRIBED, number]) + dict(members(data))["__bnfast__.npy"].partition(b"\n")[2]


def file_of(given):
    """The bytes of the file that an input describes."""
    kind, rest = (given[0] % 4, given[1:]) if given else (RAW, b"")
    if kind == RAW:
        return rest
    if kind == SEALED:
        return state.sealed(rest)
    if kind == MEMBERS:
        found = []
        while len(rest) >= 3 and len(found) < 20:
            name, length = struct.unpack_from("<BH", rest)
            found.append((NAMES[name % len(NAMES)], rest[3 : 3 + length]))
            rest = rest[3 + length :]
        return archive(found)
    number, text = (rest[0] % len(FILES), rest[1:]) if rest else (0, b"")
    return archive([("__bnfast__.npy", npy(np.frombuffer(text, np.uint8))), *FILES[number][1:]])


FILES = [members(layer._encoded()) for layer in layers()]


def check(given):
    """Whether an input gives a layer; False for `StateError`. Anything else is a finding."""
    data = file_of(given)
    try:
        layer = BatchNorm._decoded(data)
    except StateError as error:
        assert "pickle" not in str(error)  # noqa: PT017  (NumPy's advice)
        return False
    again = layer._encoded()
    assert BatchNorm._decoded(again)._encoded() == again
    return True


def fuzz(given):
    with warnings.catch_warnings():  # zipfile's about names that are there twice, made by archive()
        warnings.simplefilter("ignore")
        check(given)


if __name__ == "__main__":
    import pathlib

    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    for number, seed in enumerate(seeds()):
        (folder / f"seed{number:02}").write_bytes(seed)
    atheris.Setup([sys.argv[0], str(folder), *sys.argv[2:]], fuzz)
    atheris.Fuzz()
