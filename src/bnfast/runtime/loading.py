"""Imports the extension module; `bnfast/__init__.py` imports this before anything else.

The OpenMP runtime reads its environment once, when it is loaded. Left to its defaults an idle worker spins for
milliseconds on a core that NumPy's BLAS is about to need, which makes a loop of `a @ b` and batch normalisation
several times slower than the sum of its parts. So unless the user has said otherwise, libgomp is told to let idle
workers sleep, and the environment is put back at once.

But only a libgomp that is bnfast's own. Where a package shares it, in whichever order the two are imported, its work
runs on the same threads and was tuned for workers that wait as long as libgomp lets them by itself: then nothing is
said. In a wheel of bnfast libgomp has a name of its own, and nobody shares it.
"""

import importlib.util
import os
from pathlib import Path

__all__ = ["IDLE_THREADS", "SPIN_COUNT"]

# Iterations (tenths of a millisecond in all) that a libgomp worker waits before it sleeps. None at all is worse: the
# phases of one call are closer together than it takes to wake a sleeping core. Measured in bursts of calls on 2
# threads, training forward of (32, 256, 14, 14): 1.2 ms with 0, 0.5 to 0.7 ms with 1000, 5000 and 20000.
_SPIN_COUNT = 5_000

# What libgomp says to itself where nobody says anything: milliseconds.
_LIBGOMPS_OWN = 300_000

# Packages that load a libgomp under its plain name, libgomp.so.1, and get bnfast's if that is there already.
_SHARING = ("torch",)


def _mapped_libgomps() -> set[str]:
    """Paths of the libgomps mapped into this process, empty where the system does not say."""
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            return {os.path.realpath(line.rstrip().split(maxsplit=5)[5]) for line in maps if "gomp" in line}
    except OSError:
        return set()


def _is_private() -> bool:
    """Whether our libgomp has a name of its own, as in a wheel."""
    return (Path(__file__).parents[2] / "bnfast.libs").is_dir()


def _may_be_shared() -> str:
    """The package, installed here, that would share our libgomp if it is imported later; "" if there is none."""
    if _is_private():
        return ""
    for name in _SHARING:
        try:
            if importlib.util.find_spec(name):
                return name
        except (ImportError, ValueError):  # ValueError: a module that somebody has made by hand
            continue
    return ""


def _load_core() -> tuple[str, int]:
    """Imports `_core`; returns what idle threads do, for `config()`, and how many turns they wait, 0: unknown."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        if name in os.environ:
            from .. import _core

            return f"as {name}={os.environ[name]} says", 0
    before = _mapped_libgomps()
    sharing = _may_be_shared()
    if not sharing:
        os.environ["GOMP_SPINCOUNT"] = str(_SPIN_COUNT)
    try:
        from .. import _core
    except ImportError as error:
        raise ImportError(
            f"bnfast's extension module could not be imported ({error}). In a checkout it is not built in place: "
            "install with `python -m pip install .` and run Python from another folder."
        ) from error
    finally:
        os.environ.pop("GOMP_SPINCOUNT", None)
    if not _core.openmp_version():
        return "there are none", 0
    if "gomp" not in _core.openmp_library():
        return "as the OpenMP runtime decides", 0
    if os.path.realpath(_core.openmp_library()) in before:
        return "as this libgomp was told when another package loaded it", 0
    if sharing:
        return f"sleep, after some milliseconds: {sharing}, which is installed, may share them", _LIBGOMPS_OWN
    return "sleep", _SPIN_COUNT


IDLE_THREADS, SPIN_COUNT = _load_core()


def _start() -> None:
    from .. import _core

    _core.set_spin_count(SPIN_COUNT)
    _core.select_isa(os.environ.get("BNFAST_ISA") or None)


_start()
