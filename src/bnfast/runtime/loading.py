"""Imports the extension module; `bnfast/__init__.py` imports this before anything else.

The OpenMP runtime reads its environment once, when it is loaded. Left to its defaults an idle worker spins for
milliseconds on a core that NumPy's BLAS is about to need, which makes a loop of `a @ b` and batch normalisation
several times slower than the sum of its parts. So unless the user has said otherwise, libgomp is told to let idle
workers sleep, and the environment is put back at once.
"""

import os

__all__ = ["IDLE_THREADS"]

# Iterations (tenths of a millisecond in all) that a libgomp worker waits before it sleeps. None at all is worse: the
# phases of one call are closer together than it takes to wake a sleeping core. Measured in bursts of calls on 2
# threads, training forward of (32, 256, 14, 14): 1.2 ms with 0, 0.5 to 0.7 ms with 1000, 5000 and 20000.
_SPIN_COUNT = "5000"


def _mapped_libgomps() -> set[str]:
    """Paths of the libgomps mapped into this process, empty where the system does not say."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            return {os.path.realpath(line.rstrip().split(maxsplit=5)[5]) for line in maps if "gomp" in line}
    except OSError:
        return set()


def _load_core() -> str:
    """Imports `_core`; returns what its idle threads do, for `config()`."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        if name in os.environ:
            from .. import _core

            return f"as {name}={os.environ[name]} says"
    before = _mapped_libgomps()
    os.environ["GOMP_SPINCOUNT"] = _SPIN_COUNT
    try:
        from .. import _core
    except ImportError as error:
        raise ImportError(
            f"bnfast's extension module could not be imported ({error}). In a checkout it is not built in place: "
            "install with `python -m pip install .` and run Python from another folder."
        ) from error
    finally:
        del os.environ["GOMP_SPINCOUNT"]
    if not _core.openmp_version():
        return "there are none"
    if "gomp" not in _core.openmp_library():
        return "as the OpenMP runtime decides"
    if os.path.realpath(_core.openmp_library()) in before:
        return "as this libgomp was told when another package loaded it"
    _core.set_spin_count(int(_SPIN_COUNT))
    return "sleep"


IDLE_THREADS = _load_core()


def _select_isa() -> None:
    from .. import _core

    _core.select_isa(os.environ.get("BNFAST_ISA") or None)


_select_isa()
