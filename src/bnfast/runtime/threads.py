"""How many threads a call may use.

The first of these that says something counts:

1. `with num_threads(n)`, for the code inside it
2. `set_num_threads(n)`, for the process
3. the environment variable BNFAST_NUM_THREADS, read at import
4. OMP_NUM_THREADS, read at import
5. the CPUs this process may use: its affinity and its cgroup's quota, read again at most once a second; where its
   affinity is not narrowed, divided by the processes of its job on this machine, as their launcher states them

Below 3, what OpenMP itself would use in the calling thread is a limit too, so that threadpoolctl's limits hold.
OMP_THREAD_LIMIT always is. A call on little data uses one thread whatever is said here. So does, from 3 on, one that is
not large enough to wake sleeping threads for it (waking.c), or that comes soon after one whose threads were late
(late.c). When several Python threads call at once they share the number. Where the user has said nothing (5), CPUs that
other threads of the process are using are left to them. No result depends on it: the bits are the same for every number
of threads.

Every large call decides anew, in C (budget.c); here are the settings, and what the system grants.
"""

import math
import os
import warnings
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from types import TracebackType
from typing import SupportsIndex

from .. import _core
from .._checks import integer

__all__ = ["get_num_threads", "num_threads", "set_num_threads", "thread_budget"]

# The innermost `with num_threads`: (its number, the one around it). Nothing of it is in the context manager itself,
# which may be entered in several threads at once.
_Nested = tuple[int, "_Nested | None"]
_context: ContextVar[_Nested | None] = ContextVar("bnfast_num_threads", default=None)

_LARGEST = 2**31 - 1  # OpenMP counts no further

_WHY = (  # as the enum of budget.h
    "a forked child whose OpenMP threads could not be paused",
    "bnfast.num_threads",
    "bnfast.set_num_threads",
    "BNFAST_NUM_THREADS",
    "OpenMP's own limit (OMP_NUM_THREADS, threadpoolctl)",
    None,  # what the system grants: _cpus_why
    "built without OpenMP",
    "OMP_THREAD_LIMIT",
)


def _checked(n: SupportsIndex) -> int:
    count = integer(n, "n")
    if count < 1:
        raise ValueError(f"n: expected at least 1, got {count}")
    return min(count, _LARGEST)


def _from_environment() -> int:
    text = os.environ.get("BNFAST_NUM_THREADS", "").strip()
    if not text:
        return 0
    try:
        return _checked(int(text))
    except ValueError:
        warnings.warn(
            f"BNFAST_NUM_THREADS: expected a positive integer, got {text!r}; ignored", RuntimeWarning, stacklevel=2
        )
        return 0


def _omp_num_threads_is_set() -> bool:
    return os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip().isdigit()


def set_num_threads(n: SupportsIndex | None) -> None:
    """Set how many threads a call may use, for the whole process.

    Parameters
    ----------
    n : int or None
        At least 1. None: forget an earlier call.

    Raises
    ------
    TypeError, ValueError
        If `n` is not an int, or less than 1.
    """
    _core.set_process_threads(0 if n is None else _checked(n))


def get_num_threads() -> int:
    """How many threads a large call from here would use now.

    Returns
    -------
    int
        At least 1.
    """
    return _core.thread_budget()[0]


class num_threads:
    """Context manager: calls inside it use at most `n` threads. Affects the current context (thread, task) only.

    Threads begin in a context of their own, but on Pythons without a GIL from 3.14 on in that of who starts them.

    Parameters
    ----------
    n : int
        At least 1.

    Raises
    ------
    TypeError, ValueError
        If `n` is not an int, or less than 1.

    Examples
    --------
    >>> import bnfast
    >>> with bnfast.num_threads(1):
    ...     bnfast.get_num_threads()
    1
    """

    def __init__(self, n: SupportsIndex) -> None:
        self._n = _checked(n)

    def __enter__(self) -> "num_threads":
        _context.set((self._n, _context.get()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        innermost = _context.get()
        _context.set(innermost[1] if innermost is not None else None)


def thread_budget() -> tuple[int, str]:
    """The number of threads for a large call from here, and why."""
    n, why, _ = _core.thread_budget()
    return n, _WHY[why] or _cpus_why


# --- what the operating system grants ---------------------------------------------------------------------

_cpus_why = ""


def _available_cpus() -> int:
    """Called by a large call, or by who asks for the budget, when it has been a second since the last time."""
    global _cpus_why
    cpus, _cpus_why = _read_available_cpus(Path("/"))
    return cpus


def _read_available_cpus(root: Path) -> tuple[int, str]:
    """CPUs by affinity or by cgroup quota, whichever is less; `root` is where /proc and /sys are."""
    if hasattr(os, "sched_getaffinity"):
        cpus, why = len(os.sched_getaffinity(0)), "CPUs this process may run on"
    else:
        cpus, why = os.cpu_count() or 1, "CPUs of this machine"
    ranks = _local_ranks(os.environ)
    bound = cpus < (os.cpu_count() or 1)  # the launcher, or the user, has given each process CPUs of its own
    quota = _cgroup_quota(root)
    if quota is not None and math.ceil(quota) < cpus:
        cpus, why, bound = max(1, math.ceil(quota)), f"cgroup quota of {quota:g} CPUs", False
    if ranks is not None and not bound:
        return max(1, cpus // ranks[0]), f"{why}, shared by {ranks[0]} processes here ({ranks[1]})"
    return cpus, why


# What launchers say of how many processes of a job are here: Open MPI, MPICH and Intel MPI, MVAPICH, PyTorch.
_LOCAL_RANKS = ("OMPI_COMM_WORLD_LOCAL_SIZE", "MPI_LOCALNRANKS", "MV2_COMM_WORLD_LOCAL_SIZE", "LOCAL_WORLD_SIZE")


def _local_ranks(environment: Mapping[str, str]) -> tuple[int, str] | None:
    """(processes of a job on this machine, the variable that says so); None: nothing says that there are several."""
    for name in _LOCAL_RANKS:
        if (text := environment.get(name, "")).isdigit() and int(text) > 1:
            return int(text), name
    per_node = environment.get("SLURM_NTASKS_PER_NODE", "").partition("(")[0]  # of a step that srun started
    if "SLURM_PROCID" in environment and per_node.isdigit() and int(per_node) > 1:
        return int(per_node), "SLURM_NTASKS_PER_NODE"
    return None


def _cgroup_quota(root: Path) -> float | None:
    """CPUs' worth of time the process's cgroup (v2 or v1) and those above it grant, None without a limit."""
    quotas = []
    for folder in _cgroup_folders(root):
        v2 = _words(folder / "cpu.max")
        if len(v2) == 2:
            quotas.append(_ratio(v2[0], v2[1]))
        v1 = _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
        if len(v1) == 2:
            quotas.append(_ratio(v1[0], v1[1]))
    return min((quota for quota in quotas if quota is not None), default=None)


def _cgroup_folders(root: Path) -> list[Path]:
    mount = root / "sys/fs/cgroup"
    folders = [mount, mount / "cpu", mount / "cpu,cpuacct"]
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return folders
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        folder = mount / controllers
        for part in Path(path.lstrip("/")).parts:
            folder = folder / part
            folders.append(folder)
    return folders


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except (OSError, UnicodeDecodeError):
        return []


def _ratio(quota: str, period: str) -> float | None:
    try:
        ratio = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max", or something unknown
        return None
    return ratio if ratio > 0 else None  # -1: no limit


_core.set_environment_threads(_from_environment(), _omp_num_threads_is_set())
_core.set_thread_sources(_context, _available_cpus)
