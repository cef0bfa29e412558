"""Scripts in processes of their own, and small C libraries for them to load."""

import os
import shutil
import subprocess
import sys
import sysconfig

import pytest

import bnfast

# Variables that decide about threads; a script gets exactly those its test gives it.
DECIDING = ("BNFAST_", "OMP_", "GOMP_", "KMP_")

# Whether this process runs under tools/sanitize.
SANITIZED = "asan" in os.environ.get("LD_PRELOAD", "")

# Whether this Python can run without its GIL.
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))

# The CPUs this process may use.
CPUS = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

needs_openmp = pytest.mark.skipif(bnfast.config()["openmp"] is None, reason="this build is without OpenMP")
needs_proc = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="this system does not list tasks in /proc")
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
needs_libgomp = pytest.mark.skipif(
    "gomp" not in bnfast.config()["openmp_library"],
    reason="about libgomp, which is not the OpenMP library of this build",
)

# For libFuzzer. It reads the largest resident size so far, which a process inherits from the one that starts it: here
# from tests that had gigabytes. What a single allocation may take stays limited.
NO_RSS_LIMIT = ("-rss_limit_mb=0", "-malloc_limit_mb=1024")

# For scripts that fork; they import os, sys, time and traceback.
CHILDREN = '''
def start_child(work):
    """Pid of a child that runs work() and exits with 0 if it is true."""
    pid = os.fork()
    if pid:
        return pid
    status = 3
    try:
        status = 0 if work() else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)

def end_of(pid, seconds=60.0):
    """How a child ended: its exit status, or "hangs"."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return "hangs"
'''

# A library with a parallel region of its own, on the same OpenMP runtime as bnfast if that is the system's.
TEAM_LIBRARY = """
int team(void)
{
    int n = 0;
    #pragma omp parallel num_threads(2) reduction(+ : n)
    n += 1;
    return n;
}
"""


def run_script(script, *arguments, timeout=300, options=(), error_ok=False, cwd=None, folder=None, **environment):
    """What a script printed, without the space around it. The test fails if it fails, hangs or is killed."""
    run = completed(script, *arguments, timeout=timeout, options=options, cwd=cwd, folder=folder, **environment)
    assert error_ok or run.returncode == 0, f"exit status {run.returncode}\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}"
    return run.stdout.strip()


def completed(script, *arguments, timeout=300, **how):
    """The finished process of a script; how: see `finished`. The test fails if it takes longer."""
    try:
        return finished(script, *arguments, timeout=timeout, **how)
    except subprocess.TimeoutExpired as expired:
        pytest.fail(f"hangs: {(expired.stdout or b'').decode()[-2000:]}\n{(expired.stderr or b'').decode()[-4000:]}")


def finished(script, *arguments, timeout, options=(), cwd=None, command=(), folder=None, **environment):
    """The finished process of a script, or TimeoutExpired. In a folder it is a file: what it spawns can import it.

    Instead of a script: the words that follow `python`, for a file or a module that is there.
    """
    source = ["-c", script] if isinstance(script, str) else list(script)
    if folder is not None:
        source = [str(folder / "script.py")]
        (folder / "script.py").write_text(script)
    whole = [*command, sys.executable, "-W", "error", *options, *source, *map(str, arguments)]
    return subprocess.run(
        whole,
        env=environ(**environment),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        errors="replace",
    )


def environ(**more):
    """Of a process: this one's, without what decides about threads, and `more`."""
    return {name: value for name, value in os.environ.items() if not name.startswith(DECIDING)} | more


def preloaded(library):
    """LD_PRELOAD with this library, behind those that are there already."""
    return " ".join([*os.environ.get("LD_PRELOAD", "").split(), library])


def c_library(folder, source, *flags):
    """Path of a shared library made from C source; skips the test where no compiler makes it."""
    compiler = shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0]) or shutil.which("gcc")
    if compiler is None:
        pytest.skip("there is no C compiler to make a library with")
    file, library = folder / "library.c", folder / "library.so"
    file.write_text(source)
    command = [compiler, "-shared", "-fPIC", str(file), "-o", str(library), *flags]
    compilation = subprocess.run(command, capture_output=True, text=True, check=False)
    if compilation.returncode:
        pytest.skip(f"the C compiler here does not make it: {compilation.stderr[-300:]}")
    return str(library)
