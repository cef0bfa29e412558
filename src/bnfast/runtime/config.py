"""What was built, what runs, and why: `config()` and `show_config()`."""

import platform
from typing import Any

import numpy as np

from .. import _core
from . import loading
from .threads import thread_budget

__all__ = ["config", "show_config"]

__version__ = "0.2.0"


def config() -> dict[str, Any]:
    """What was built and what runs.

    Returns
    -------
    dict
        version, python, numpy : str
            Of bnfast, of Python, of NumPy.
        isa : str
            The instruction set in use; BNFAST_ISA in the environment forces one.
        isa_compiled, isa_supported : list of str
            Those in this build; those of them this CPU has.
        openmp : int or None
            Date of the OpenMP standard (yyyymm), None for a build without.
        openmp_library : str
            Path of the runtime.
        threads, threads_why : int, str
            What a large call from here would use, and what decided it.
        idle_threads : str
            What workers do between calls.
        fork : str
            What a forked child may do.
        forked_serial : bool
            Whether this is a forked child that has to stay on one thread.
        l2_bytes, last_level_bytes : int
            Data caches.
    """
    isas = _core.isas()
    threads, why = thread_budget()
    l2_bytes, last_level_bytes = _core.cache_bytes()
    return {
        "version": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "isa": _core.isa(),
        "isa_compiled": [name for name, (compiled, _) in isas.items() if compiled],
        "isa_supported": [name for name, (_, supported) in isas.items() if supported],
        "openmp": _core.openmp_version() or None,
        "openmp_library": _core.openmp_library(),
        "threads": threads,
        "threads_why": why,
        "idle_threads": loading.IDLE_THREADS,
        "fork": "a child may use threads" if _core.fork_handled() else "a child stays on one thread",
        "forked_serial": _core.forked_serial(),
        "l2_bytes": l2_bytes,
        "last_level_bytes": last_level_bytes,
    }


def show_config() -> None:
    """Print `config()` in readable form."""
    c = config()
    openmp = f"{c['openmp']}, {c['openmp_library']}" if c["openmp"] else "none: this build runs on one thread"
    lines = {
        "bnfast": c["version"],
        "Python, NumPy": f"{c['python']}, {c['numpy']}",
        "instruction set": f"{c['isa']} (compiled: {', '.join(c['isa_compiled'])}; "
        f"on this CPU: {', '.join(c['isa_supported'])})",
        "OpenMP": openmp,
        "threads": f"{c['threads']} ({c['threads_why']})",
        "idle threads": c["idle_threads"],
        "after a fork": "this child stays on one thread" if c["forked_serial"] else c["fork"],
        "caches": f"L2 {c['l2_bytes'] >> 10} KiB, last level {c['last_level_bytes'] >> 10} KiB",
    }
    for name, value in lines.items():
        print(f"{name:<16} " + str(value).replace("\n", f"\n{'':<17}"))
