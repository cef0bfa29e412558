"""Files: what is in one, how it is checked, how it replaces another.

Two kinds of file, that of a layer and that of a model (layers, arrays, numbers and strings under names). A file is a
zip archive of `.npy` members, as `numpy.savez` writes it, so `numpy.load` reads it. Beside the arrays the member
`__bnfast__` holds a description, JSON as bytes, which says the kind. The archive's comment, the last bytes of the file,
is the sha256 of all bytes before it. It is looked at first: nothing of a damaged file is interpreted. It is a checksum,
not a signature: who changes a file on purpose computes it again. So what is interpreted is not trusted either. No
member may be compressed, be larger than the file, or hold anything but plain numbers; nothing is ever unpickled.

A new file is complete on disk under a temporary name before it gets the name of the old one. Its writer holds a lock on
it, which ends with the process: a temporary file without a lock was left by a process that died, and is removed.
"""

import contextlib
import errno
import hashlib
import io
import itertools
import json
import math
import os
import re
import secrets
import stat
import zipfile
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["FORMAT", "StateError", "decode", "encode", "read", "replace", "sealed"]

FORMAT = 2
KINDS = {"layer": "BatchNorm.save", "model": "bnfast.save"}
DESCRIPTION = "__bnfast__"
LAYER_DTYPES = {np.dtype(name) for name in ("<f4", "<f8", "<i8", "u1")}
MODEL_DTYPES = LAYER_DTYPES | {np.dtype(name) for name in ("?", "i1", "<i2", "<i4", "<u2", "<u4", "<u8", "<f2")}
# Of the archive's directory: a member; what comes after the last one; that of large archives, and what leads to it.
ENTRY, END, END_64, LOCATOR_64 = b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
# What a file may consist of, so that looking at it takes no more memory than a few times its size: zipfile takes 1 KB
# for a member, json up to 100 bytes for a part (what is after a bracket or a comma).
MEMBERS, BYTES_OF_A_MEMBER = 20, 256  # 20, and one in 256 bytes: ours have more, all told
PARTS, BYTES_OF_A_PART = 256, 16  # ours have 3 for a number, in 250 bytes, and 17 for a layer, in 350
PART = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"|([\[{,])')  # or a string, whose brackets and commas do not count
TRIES = 100  # other processes may take our temporary file for a dead one's before it is locked
MAX_HEADER = 1024  # characters; those of ours have less than 128
# What NumPy may parse: it would read more than this, and warn of some (Python 2, escapes, old names of dtypes).
HEADER = re.compile(
    rb"\{'descr': '[<|][bfiu][1248]', 'fortran_order': (?:True|False), 'shape': \([-0-9, ]*\)(?:, )?\} *\n?"
)
MARK = b"bnfast sha256 "
SEAL = len(MARK) + 64
TEMPORARY = re.compile(r"\.tmp-bnfast-[0-9a-f]{16}")


class StateError(ValueError):
    """A state (a dictionary, a pickle, a file) does not fit the layer, or is damaged. The layer is unchanged."""

    __module__ = "bnfast"


# --- bytes ---------------------------------------------------------------------------------------------------


def sealed(body: bytes) -> bytes:
    """The body of an archive (with the length of a seal as that of its comment) and its checksum."""
    return body + _seal(memoryview(body))


def _seal(body: memoryview) -> bytes:
    return MARK + hashlib.sha256(body).hexdigest().encode()


def encode(kind: str, description: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> bytes:
    """A file's bytes: the same ones for the same state."""
    text = json.dumps({"format": FORMAT, "kind": kind, **description}, indent=1, sort_keys=True)
    members = {DESCRIPTION: np.frombuffer(text.encode(), np.uint8), **arrays}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.comment = bytes(SEAL)
        for name, array in members.items():
            member = io.BytesIO()
            little = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
            np.lib.format.write_array(member, little, version=(1, 0), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy")  # of 1980
            info.create_system = 3
            info.external_attr = 0o644 << 16
            archive.writestr(info, member.getbuffer())
    return sealed(buffer.getvalue()[:-SEAL])


def decode(data: bytes, kind: str) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Description and arrays of the bytes of such a file; StateError, with its cause, for whatever is wrong."""
    if data[-SEAL:][: len(MARK)] != MARK:
        raise StateError(
            f"expected a file written by {KINDS[kind]}, got another one, or a part of one: its checksum is missing"
        )
    if _seal(memoryview(data)[:-SEAL]) != data[-SEAL:]:
        raise StateError("damaged: its checksum does not belong to its contents")
    try:
        most = MEMBERS + len(data) // BYTES_OF_A_MEMBER
        if (count := _count_members(data)) > most:  # zipfile makes an object of each at once
            raise StateError(f"expected at most {most} members, got {count}")
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = _members(archive, len(data))
            description = _description(archive.read(members.pop(DESCRIPTION)), len(data))
            _check_kind(description.pop("format"), description.pop("kind", "layer"), kind)  # format 1 knew layers only
            arrays = {name: _array(name, archive.read(info), kind == "model") for name, info in members.items()}
    except (StateError, MemoryError):
        raise
    except Exception as error:  # zipfile, NumPy and json raise a dozen kinds
        raise StateError(f"not the archive of a {kind} ({type(error).__name__})") from error
    return description, arrays


def _check_kind(made_by: Any, found: Any, kind: str) -> None:
    """That this loader reads this file: before anything else in it is looked at, which may be quite different."""
    if type(made_by) is not int or made_by < 1:
        raise StateError(f"format: expected an integer of at least 1, got {made_by!r:.80}")
    if made_by > FORMAT:
        raise StateError(f"format {made_by} is of a newer bnfast; this one reads formats up to {FORMAT}")
    if found != kind:
        if not isinstance(found, str) or found not in KINDS:
            raise StateError(f"kind: expected {kind!r}, got {found!r:.80}")
        reader = KINDS[found].replace("save", "load")
        raise StateError(f"expected a file written by {KINDS[kind]}, got one of {KINDS[found]}: {reader} reads it")


def _description(member: bytes, size: int) -> dict[str, Any]:
    text = _array(DESCRIPTION, member, model=False).tobytes().decode("ascii")
    most = PARTS + size // BYTES_OF_A_PART
    if sum(1 for _ in itertools.islice(filter(None, (part[1] for part in PART.finditer(text))), most + 1)) > most:
        raise StateError(f"expected a description of at most {most} parts, got more")
    description: dict[str, Any] = json.loads(text)
    return description


def _count_members(data: bytes) -> int:
    """How many there are at most in the archive's directory, found as zipfile finds it."""
    end = data.rfind(END)
    stop, size = end, int.from_bytes(data[end + 12 : end + 16], "little")
    if data[end - 20 : end - 16] == LOCATOR_64 and data[end - 76 : end - 72] == END_64:
        stop, size = end - 76, int.from_bytes(data[end - 36 : end - 28], "little")
    return data.count(ENTRY, max(stop - size, 0), max(end, 0))


def _members(archive: zipfile.ZipFile, size: int) -> dict[str, zipfile.ZipInfo]:
    """The members by name. None takes more memory than the file has bytes, whatever it claims."""
    infos = archive.infolist()
    if len({info.filename for info in infos}) < len(infos):
        raise StateError("expected members of different names")
    if any(info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size for info in infos):
        raise StateError("expected members that are not compressed")
    if sum(info.file_size for info in infos) > size:
        raise StateError("expected members that are together not larger than the file")
    return {_name(info.filename): info for info in infos}


def _name(filename: str) -> str:
    if not filename.endswith(".npy"):
        raise StateError(f"expected members that end in .npy, got {filename!r:.80}")
    return filename.removesuffix(".npy")


def _array(name: str, member: bytes, model: bool) -> NDArray[Any]:
    """The array of an .npy file. No more memory than the file has bytes, whatever its header claims."""
    stream = io.BytesIO(member)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise StateError(f"{name}: expected .npy version 1.0")
    if not HEADER.fullmatch(member, 10, 10 + int.from_bytes(member[8:10], "little")):
        raise StateError(f"{name}: expected the header of a plain array")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream, max_header_size=MAX_HEADER)
    if dtype not in (MODEL_DTYPES if model else LAYER_DTYPES):
        raise StateError(f"{name}: expected one of the dtypes of such a file, got {dtype!r:.80}")
    if not model and len(shape) > 1:
        raise StateError(f"{name}: expected at most one dimension, got {len(shape)}")
    if fortran_order and len(shape) > 1:
        raise StateError(f"{name}: expected C order")
    count, start = math.prod(shape), stream.tell()
    if any(n < 0 for n in shape) or count * dtype.itemsize != len(member) - start:
        raise StateError(f"{name}: expected as many bytes as its shape says")
    array: NDArray[Any] = np.frombuffer(member, dtype, count, start) if count else np.empty(0, dtype)
    if dtype == np.bool_ and (array.view(np.uint8) > 1).any():
        raise StateError(f"{name}: expected bools, got other bytes than 0 and 1")
    return array.reshape(shape).astype(dtype.newbyteorder("="))  # a copy


# --- files ---------------------------------------------------------------------------------------------------


def read(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """All bytes of a regular file that has at most `max_bytes` of them."""
    with open(_named(path), "rb", buffering=0, opener=_not_waiting) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise StateError("expected a regular file")
        if found.st_size > max_bytes:
            raise StateError(f"expected at most {max_bytes} bytes (max_bytes), got {found.st_size}")
        parts, left = [], found.st_size
        while left and (part := file.read(left)):
            parts.append(part)
            left -= len(part)
    return b"".join(parts) if len(parts) != 1 else parts[0]


def replace(path: str | os.PathLike[str], data: bytes) -> None:
    """Make `data` the contents of the file at `path`: all of them or, after an exception or a crash, the old ones.

    The order is: write, fsync, rename, fsync of the directory. A symbolic link stays; what it points to is replaced.
    """
    target = os.path.realpath(_named(path))
    folder = os.path.dirname(target)
    mode = _mode(target)
    _remove_stale(folder)
    for _ in range(TRIES):
        temporary = os.path.join(folder, f".tmp-bnfast-{secrets.token_hex(8)}")
        try:
            written = _written(temporary, target, mode, data)
        except OSError as error:
            if error.filename == temporary:  # a name that the caller never gave
                error.filename = target
            raise
        if written:
            _sync_folder(folder)
            return
    raise OSError(errno.EBUSY, "every temporary file was removed at once", folder)


def _written(temporary: str, target: str, mode: int | None, data: bytes) -> bool:
    """Whether it worked: another process may have removed the temporary file before it was locked."""

    def new(name: str, flags: int) -> int:
        return os.open(name, flags, 0o666 if mode is None else 0o600)

    try:
        with open(temporary, "xb", opener=new) as file:
            _lock(file.fileno(), wait=True)
            if not _has_name(file.fileno(), temporary):
                return False
            if mode is not None:
                os.chmod(temporary, mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            if not fcntl:  # Windows renames closed files only
                file.close()
            os.replace(temporary, target)  # under the lock
    except BaseException:
        _unlink(temporary)
        raise
    return True


def _has_name(descriptor: int, path: str) -> bool:
    """Whether it is still this file that lies there. (Not every file system counts links.)"""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        return False


def _named(path: str | os.PathLike[str]) -> str:
    name = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(name, str):
        raise TypeError(f"path: expected str or os.PathLike of str, got {type(path).__name__}")
    return name


def _not_waiting(name: str, flags: int) -> int:
    """To open a pipe without waiting for its other end, and then refuse it."""
    return os.open(name, flags | getattr(os, "O_NONBLOCK", 0))


def _mode(target: str) -> int | None:
    """Permissions of a file, None if there is none; OSError if it may not be written, or is not a file."""
    try:
        descriptor = _not_waiting(target, os.O_WRONLY)
    except FileNotFoundError:
        return None
    try:
        mode = os.fstat(descriptor).st_mode
    finally:
        os.close(descriptor)
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "expected a regular file", target)
    return stat.S_IMODE(mode)


def _remove_stale(folder: str) -> None:
    """Remove the temporary files of processes that have died."""
    if not fcntl:
        return
    try:
        names = os.listdir(folder)
    except OSError:  # one may write into it, but not look
        return
    for name in names:
        if not TEMPORARY.fullmatch(name):
            continue
        path = os.path.join(folder, name)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:  # gone, somebody else's, or not a file
            continue
        try:
            if _lock(descriptor, wait=False):
                _unlink(path)
        finally:
            os.close(descriptor)


def _lock(descriptor: int, wait: bool) -> bool:
    """Whether the file is locked now, by this descriptor; file systems without locks lock nothing."""
    if not fcntl:
        return wait
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _unlink(path: str) -> None:
    with contextlib.suppress(OSError):
        os.unlink(path)


def _sync_folder(folder: str) -> None:
    """So that the new name is on disk, too."""
    if not fcntl:  # Windows cannot
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # one may write into it, but not look; the file is there
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of file systems that cannot
            raise
    finally:
        os.close(descriptor)
