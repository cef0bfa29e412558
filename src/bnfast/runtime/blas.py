"""One set of threads for bnfast and OpenBLAS, the library behind NumPy's and SciPy's matrix products.

Each has threads of its own, as many as there are CPUs, and OpenBLAS's idle ones go on spinning for a tenth of a second.
In a loop that uses both in turn they are in each other's way. OpenBLAS can hand its jobs to somebody else's threads;
`share_blas_threads` makes them bnfast's. What that takes is in blas.c; here the copies of OpenBLAS are found.
"""

import ctypes
import os
import re
from types import TracebackType
from typing import NamedTuple

from .. import _core

__all__ = ["BlasCopy", "blas_copies", "share_blas_threads"]

# 0.3.28 can hand its jobs over, and has no buffers for those in the last places: it crashes.
_OLDEST = (0, 3, 29)


class BlasCopy(NamedTuple):
    """A copy of OpenBLAS in this process."""

    path: str
    version: str
    addresses: tuple[int, int, int, int, int] | None  # for _core.blas_share; None: cannot be shared
    obstacle: str  # why it cannot be shared, "" if it can

    def threads(self) -> str:
        """Whose threads it uses, in words."""
        if self.addresses is None:
            return f"its own threads; cannot share: {self.obstacle}"
        state, _, _ = _core.blas_state(self.addresses[0])
        if state == "given back":
            return "its own threads again: there were not enough others"
        return "shares bnfast's threads" if state == "shared" else "its own threads"


class share_blas_threads:
    """Let NumPy's and SciPy's matrix products run on the threads of bnfast, for the whole process.

    Takes effect at once, for every copy of OpenBLAS that is loaded; import SciPy first if it is to be included (or
    call this again later). Results stay the same, and so do the numbers of threads: OpenBLAS's is its own
    (OPENBLAS_NUM_THREADS, threadpoolctl). The products of several Python threads run one after another. LU
    factorisation (`linalg.solve`, `inv`, `det`) keeps a part of its work on OpenBLAS's own threads and gets slower.

    Lasts until `close()` of the object returned, or until the end of a `with` block; for ever if neither comes. Calls
    may be nested and closed in any order: the last one that is closed ends it. `config()["blas"]` shows what is shared.

    Raises
    ------
    RuntimeError
        If no copy of OpenBLAS can be shared: there is none (MKL, Accelerate), it is too old, or this system is not
        Linux. Nothing has changed then. If only some can, the others go on as before.

    Examples
    --------
    >>> import bnfast
    >>> with bnfast.share_blas_threads():  # doctest: +SKIP
    ...     train()
    """

    def __init__(self) -> None:
        self._shared: list[int] = []
        if not _core.blas_supported():
            raise RuntimeError("share_blas_threads: works on Linux, in a build with OpenMP; this is not one")
        copies = blas_copies()
        found = [copy.addresses for copy in copies if copy.addresses is not None]
        if not found:
            got = "; ".join(f"{copy.version} ({copy.path}): {copy.obstacle}" for copy in copies) or "none"
            raise RuntimeError(f"share_blas_threads: expected an OpenBLAS that can share threads, got {got}")
        if not _core.blas_share(found, self._shared):
            self.close()
            raise RuntimeError(f"share_blas_threads: too many copies of OpenBLAS ({len(found)})")

    def close(self) -> None:
        """Give OpenBLAS its own threads back.

        Calls that are running end as they began. A second `close` does nothing.
        """
        _core.blas_release(self._shared)

    def __enter__(self) -> "share_blas_threads":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def blas_copies() -> list[BlasCopy]:
    """The copies of OpenBLAS in this process; if there is none, another library for linear algebra, if known."""
    copies: dict[int, BlasCopy] = {}
    for path in _mapped_libraries():
        try:
            library = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
        except OSError:  # its file has been replaced, or it is gone
            continue
        get_config = _address(library, "openblas_get_config")
        if get_config not in copies:  # a library that is linked with OpenBLAS shows OpenBLAS's function
            copies[get_config] = _examined(path, library, get_config)
    found = [copy for get_config, copy in copies.items() if get_config]
    return found or list(copies.values())


def _mapped_libraries() -> list[str]:
    """Paths of the loaded libraries whose names speak of linear algebra; those that say OpenBLAS come first."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            paths = {line.split(maxsplit=5)[5].rstrip("\n") for line in maps if ".so" in line}
    except OSError:
        return []
    paths = {path for path in paths if re.match(r"lib.*(blas|blis|mkl_rt|armpl)", os.path.basename(path))}
    return sorted(paths, key=lambda path: ("openblas" not in os.path.basename(path), path))


def _examined(path: str, library: ctypes.CDLL, get_config: int) -> BlasCopy:
    if not get_config:
        return BlasCopy(path, "another library", None, "only OpenBLAS can share")
    config = (ctypes.CFUNCTYPE(ctypes.c_char_p)(get_config)() or b"").decode("utf-8", "replace")
    version = re.match(r"OpenBLAS (\d+)\.(\d+)\.(\d+)\S*", config)
    built_for = re.search(r"MAX_THREADS=(\d+)", config)
    places = int(built_for[1]) if built_for else 0
    set_callback = _address(library, "openblas_set_threads_callback_function")
    exec_blas = _address(library, "exec_blas")
    callback = _address(library, "openblas_threads_callback_")
    num_threads = _address(library, "blas_num_threads")
    get_parallel = _address(library, "openblas_get_parallel")

    obstacle = ""
    if version is None or tuple(map(int, version.groups())) < _OLDEST:
        obstacle = "expected 0.3.29 or later"
    elif not set_callback:
        obstacle = "it has no openblas_set_threads_callback_function"
    elif not (exec_blas and num_threads and places and get_parallel):
        obstacle = "it does not show exec_blas, blas_num_threads or MAX_THREADS"
    elif ctypes.CFUNCTYPE(ctypes.c_int)(get_parallel)() != 1:
        obstacle = "it has no threads of its own"
    elif callback and ctypes.c_void_p.from_address(callback).value and _core.blas_state(set_callback)[0] != "shared":
        obstacle = "another package runs its jobs"
    elif (threads := ctypes.c_int.from_address(num_threads).value) > (places + 1) // 2:
        obstacle = f"it has {threads} threads; set OPENBLAS_NUM_THREADS to at most {(places + 1) // 2} before the start"
    addresses = None if obstacle else (set_callback, exec_blas, callback, num_threads, places)
    return BlasCopy(path, version[0] if version else "OpenBLAS", addresses, obstacle)


def _address(library: ctypes.CDLL, name: str) -> int:
    """Of a symbol, under the names that NumPy's and SciPy's wheels and Linux distributions give it; 0: not there."""
    for decorated in (f"{prefix}{name}{suffix}" for prefix in ("", "scipy_") for suffix in ("", "64_")):
        try:
            return ctypes.cast(library[decorated], ctypes.c_void_p).value or 0
        except AttributeError:
            continue
    return 0
