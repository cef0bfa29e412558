"""How many threads a call may use and who decides; what the threads and the import do to the rest of the process."""

import contextvars
import os
import re
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from scripts import TEAM_LIBRARY, c_library, completed, needs_libgomp, needs_openmp, needs_proc

import bnfast
from bnfast import _core
from bnfast.runtime import loading, threads

HAS_OPENMP = bnfast.config()["openmp"] is not None
needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no CPU affinity on this system")

# Whether a thread begins in the context of the one that starts it: so it is without a GIL from Python 3.14 on.
INHERITED = bool(getattr(sys.flags, "thread_inherit_context", False))

HEAD = """
import os, sys, time, warnings
import numpy as np
def tasks():
    return len(os.listdir("/proc/self/task"))
"""
LARGE = "x = np.random.default_rng(0).standard_normal((64, 32, 32, 32)).astype(np.float32)\n"


def run_python(script, *arguments, head=HEAD, error_ok=False, **environment):
    """Output (stdout, stderr) of a script in a fresh process."""
    run = completed(arguments or head + script, options=["-W", "default"], **environment)
    assert error_ok or run.returncode == 0, run.stderr
    return run.stdout.strip(), run.stderr


@pytest.fixture
def free(monkeypatch):
    """No setting of this process is in force, and the environment says 8."""
    if _core.openmp_thread_limit() < 100:
        pytest.skip("this build, or OMP_THREAD_LIMIT, grants too few threads to tell settings by")
    monkeypatch.setattr(threads, "_context", contextvars.ContextVar("test", default=None))
    _core.set_thread_sources(threads._context, threads._available_cpus)
    _core.set_environment_threads(8, False)
    _core.set_process_threads(0)
    yield
    _core.set_process_threads(0)
    _core.set_environment_threads(threads._from_environment(), threads._omp_num_threads_is_set())
    monkeypatch.undo()
    _core.set_thread_sources(threads._context, threads._available_cpus)


def in_thread(function):
    """The result of a function in a new thread."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join(20)
    return results[0]


# --- set, get, with ------------------------------------------------------------------------------------------


FACTS = {  # all that has a say, each with a number of its own
    "context": 4, "process": 5, "environment": 6, "omp_num_threads_is_set": 1, "openmp": 7, "limit": 2**31 - 1,
    "has_openmp": 1, "forked_serial": 0, "cpus": 3,
}  # fmt: skip


def decided(*silent, **changed):
    """(n, words, whether the user chose it), where some have nothing to say."""
    n, why, chosen = _core.decide_threads(**{**FACTS, **dict.fromkeys(silent, 0), **changed})
    return n, threads._WHY[why] or "CPUs", chosen


def test_each_setting_comes_before_the_next():
    silent = []
    for setting, n, words in (
        ("context", 4, "bnfast.num_threads"),
        ("process", 5, "bnfast.set_num_threads"),
        ("environment", 6, "BNFAST_NUM_THREADS"),
        ("omp_num_threads_is_set", 7, "OMP_NUM_THREADS"),
    ):
        found = decided(*silent)
        assert found[0] == n
        assert words in found[1]
        assert found[2]
        limited = decided(*silent, limit=n - 1)
        assert limited[:2] == (n - 1, "OMP_THREAD_LIMIT")
        assert decided(*silent, limit=n)[0] == n
        silent.append(setting)
    assert decided(*silent) == (3, "CPUs", False)
    n, words, chosen = decided(*silent, openmp=2)  # threadpoolctl
    assert (n, chosen) == (2, False)
    assert "threadpoolctl" in words
    assert decided(*silent, openmp=3)[1] == "CPUs"
    assert decided(*silent, limit=2)[:2] == (2, "OMP_THREAD_LIMIT")


def test_a_forked_child_without_a_pool_stays_on_one_thread_whatever_is_set():
    assert decided(forked_serial=1)[0] == 1
    assert "forked" in decided(forked_serial=1)[1]


def test_the_settings_are_asked_in_their_order(free):
    assert threads.thread_budget() == (8, "BNFAST_NUM_THREADS")
    bnfast.set_num_threads(5)
    assert threads.thread_budget() == (5, "bnfast.set_num_threads")
    with bnfast.num_threads(4):
        assert threads.thread_budget() == (4, "bnfast.num_threads")
        assert bnfast.get_num_threads() == bnfast.config()["threads"] == 4
    assert threads.thread_budget() == (5, "bnfast.set_num_threads")
    bnfast.set_num_threads(None)
    assert threads.thread_budget() == (8, "BNFAST_NUM_THREADS")
    _core.set_environment_threads(0, False)
    assert "BNFAST_NUM_THREADS" not in threads.thread_budget()[1]


def test_a_setting_of_ours_may_exceed_the_cpus(free):
    with bnfast.num_threads(100):
        assert bnfast.get_num_threads() == 100
    bnfast.set_num_threads(50)
    assert bnfast.get_num_threads() == 50


def test_without_openmp_there_is_one_thread():
    built_without = {"has_openmp": 0, "openmp": 1, "limit": 1}
    settings = ("context", "process", "environment", "omp_num_threads_is_set")
    assert decided(*settings, **built_without)[:2] == (1, "built without OpenMP")
    assert decided(**built_without)[0] == 1


def test_num_threads_nests_and_ends_with_an_exception(free):
    def fail():
        with bnfast.num_threads(2):
            assert bnfast.get_num_threads() == 2
            raise ZeroDivisionError

    with bnfast.num_threads(3):
        with pytest.raises(ZeroDivisionError):
            fail()
        assert bnfast.get_num_threads() == 3
        with bnfast.num_threads(5):
            assert bnfast.get_num_threads() == 5
        assert bnfast.get_num_threads() == 3
    assert bnfast.get_num_threads() == 8


def test_one_object_may_be_entered_again(free):
    three = bnfast.num_threads(3)
    with three, bnfast.num_threads(2), three:
        assert bnfast.get_num_threads() == 3
    assert bnfast.get_num_threads() == 8
    with three as entered:
        assert entered is three
        assert bnfast.get_num_threads() == 3


def test_one_object_may_be_entered_in_two_threads_at_once(free):
    two, inside, leave, seen = bnfast.num_threads(2), threading.Event(), threading.Event(), []

    def other():
        try:
            with two:
                seen.append(bnfast.get_num_threads())
                inside.set()
                leave.wait(20)
            seen.append(bnfast.get_num_threads())
        except ValueError as error:
            seen.append(error)

    thread = threading.Thread(target=other)
    try:
        with two:
            thread.start()
            inside.wait(20)
    finally:
        leave.set()
        thread.join(20)
    assert seen == [2, 2 if INHERITED else 8]
    assert bnfast.get_num_threads() == 8


def test_num_threads_is_for_its_own_context_only(free):
    with bnfast.num_threads(2):
        assert in_thread(bnfast.get_num_threads) == (2 if INHERITED else 8)
        assert contextvars.copy_context().run(bnfast.get_num_threads) == 2
        assert contextvars.Context().run(bnfast.get_num_threads) == 8


def test_set_num_threads_is_for_the_process(free):
    bnfast.set_num_threads(3)
    assert in_thread(bnfast.get_num_threads) == 3
    in_thread(lambda: bnfast.set_num_threads(4))
    assert bnfast.get_num_threads() == 4


@pytest.mark.parametrize("function", [bnfast.set_num_threads, bnfast.num_threads])
@pytest.mark.parametrize(
    ("n", "error", "words"),
    [
        (0, ValueError, ["at least 1", "got 0"]),
        (-1, ValueError, ["at least 1", "got -1"]),
        (np.int64(0), ValueError, ["at least 1", "got 0"]),
        (1.5, TypeError, ["int", "float"]),
        (2.0, TypeError, ["int", "float"]),
        ("2", TypeError, ["int", "str"]),
        (True, TypeError, ["int", "True"]),
        ([2], TypeError, ["int", "list"]),
    ],
)
def test_wrong_numbers_are_refused(free, function, n, error, words):
    with pytest.raises(error) as caught:
        function(n)
    for word in ["n: ", *words]:
        assert word in str(caught.value)
    assert bnfast.get_num_threads() == 8


def test_none_is_no_number_for_the_context_manager(free):
    with pytest.raises(TypeError, match="NoneType"):
        bnfast.num_threads(None)


def test_numpy_integers_are_accepted(free):
    bnfast.set_num_threads(np.int32(3))
    assert bnfast.get_num_threads() == 3
    with bnfast.num_threads(np.uint8(2)):
        assert bnfast.get_num_threads() == 2


@pytest.mark.parametrize("n", [1, 2, 3, 16, 2**31, 2**70])
def test_any_number_of_threads_gives_the_same_bits(n):
    x = np.random.default_rng(0).standard_normal((16, 8, 40, 40)).astype(np.float32)
    with bnfast.num_threads(1):
        expected = bnfast.functional.batch_norm(x)
    with bnfast.num_threads(n):
        found = bnfast.functional.batch_norm(x)
    for one, other in zip(found, expected, strict=True):
        assert one.tobytes() == other.tobytes()


# --- the environment -----------------------------------------------------------------------------------------

TELL = "import bnfast; c = bnfast.config(); print(c['threads'], c['threads_why'], sep='|')"


def told(script=TELL, **environment):
    """(threads, why) of config() in a fresh process, and its stderr."""
    output, errors = run_python(script, **environment)
    n, _, why = output.partition("|")
    return int(n), why, errors


@needs_openmp
@pytest.mark.parametrize(
    ("environment", "n", "why"),
    [
        ({"BNFAST_NUM_THREADS": "3"}, 3, "BNFAST_NUM_THREADS"),
        ({"BNFAST_NUM_THREADS": " 3 "}, 3, "BNFAST_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "5"}, 5, "OMP_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "5,2"}, 5, "OMP_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "5", "BNFAST_NUM_THREADS": "3"}, 3, "BNFAST_NUM_THREADS"),
        ({"OMP_NUM_THREADS": "3", "BNFAST_NUM_THREADS": "5"}, 5, "BNFAST_NUM_THREADS"),
        ({"OMP_THREAD_LIMIT": "2", "BNFAST_NUM_THREADS": "3"}, 2, "OMP_THREAD_LIMIT"),
        ({"OMP_THREAD_LIMIT": "1"}, 1, ""),
    ],
)
def test_the_environment_decides(environment, n, why):
    found, because, errors = told(**environment)
    assert found == n
    assert why in because
    assert errors == ""


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "two", "2 3"])
def test_garbage_in_bnfast_num_threads_warns_and_is_ignored(text):
    default = told(BNFAST_NUM_THREADS="")
    assert default[2] == ""  # empty: as if not set
    found = told(BNFAST_NUM_THREADS=text)
    assert found[:2] == default[:2]
    assert "RuntimeWarning" in found[2]
    assert "BNFAST_NUM_THREADS" in found[2]
    assert repr(text) in found[2]


@needs_openmp
@pytest.mark.parametrize("text", ["abc", "0", "-3", "99999", ""])
def test_garbage_in_omp_num_threads_does_no_harm(text):
    script = LARGE + TELL + "; print(bnfast.moments(x).count)"
    output, _ = run_python(script, OMP_NUM_THREADS=text)
    first, count = output.splitlines()
    assert int(first.split("|")[0]) >= 1
    assert int(count) == 64 * 32 * 32


@needs_openmp
@needs_affinity
@pytest.mark.parametrize("when", ["before", "after"])
def test_affinity_to_one_cpu_means_one_thread(when):
    one = "os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    refresh = "import bnfast; bnfast.get_num_threads()\n" + one + "time.sleep(1.05)\n"  # read again after a second
    n, why, _ = told((one if when == "before" else refresh) + TELL)
    assert n == 1
    if when == "after":
        assert "CPUs" in why or "cgroup" in why


@needs_openmp
def test_threadpoolctl_limits_are_respected_in_the_calling_thread():
    pytest.importorskip("threadpoolctl", reason="threadpoolctl is not installed")
    script = """
from threadpoolctl import threadpool_limits
import bnfast
before = bnfast.get_num_threads()
with threadpool_limits(1):
    inside = bnfast.get_num_threads(), bnfast.config()["threads_why"]
    with bnfast.num_threads(2):
        assert bnfast.get_num_threads() == 2  # our own setting is the nearer one
assert bnfast.get_num_threads() == before
print(*inside, sep="|")
"""
    n, why, _ = told(script)
    assert n == 1
    assert HAS_OPENMP
    assert "threadpoolctl" in why or "CPU" in why


# --- affinity and cgroups, by a fake root ----------------------------------------------------------------------

V2 = "sys/fs/cgroup/cpu.max"
V1_QUOTA, V1_PERIOD = "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "sys/fs/cgroup/cpu/cpu.cfs_period_us"
OWN = "proc/self/cgroup"

CGROUPS = {  # files, and the quota they mean
    "nothing": ({}, None),
    "v2": ({V2: "150000 100000\n"}, 1.5),
    "v2_half": ({V2: "50000 100000\n"}, 0.5),
    "v2_other_period": ({V2: "30000 10000\n"}, 3.0),
    "v2_max": ({V2: "max 100000\n"}, None),
    "v2_minus_one": ({V2: "-1 100000\n"}, None),
    "v2_zero_period": ({V2: "100000 0\n"}, None),
    "v2_garbage": ({V2: "many cpus\n"}, None),
    "v2_one_word": ({V2: "100000\n"}, None),
    "v2_three_words": ({V2: "100000 100000 100000\n"}, None),
    "v2_empty": ({V2: ""}, None),
    "v2_no_text": ({V2: b"\xff\xfe\x00"}, None),
    "v1": ({V1_QUOTA: "150000\n", V1_PERIOD: "100000\n"}, 1.5),
    "v1_minus_one": ({V1_QUOTA: "-1\n", V1_PERIOD: "100000\n"}, None),
    "v1_garbage": ({V1_QUOTA: "a\n", V1_PERIOD: "b\n"}, None),
    "v1_no_period": ({V1_QUOTA: "150000\n"}, None),
    "v1_no_quota": ({V1_PERIOD: "100000\n"}, None),
    "v1_nested": (
        {
            OWN: "12:name=systemd:/other\n4:cpu,cpuacct:/docker/abc\n2:memory:/docker/abc\n",
            "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_quota_us": "250000",
            "sys/fs/cgroup/cpu,cpuacct/docker/abc/cpu.cfs_period_us": "100000",
            "sys/fs/cgroup/memory/docker/abc/cpu.max": "1 100000",
        },
        2.5,
    ),
    "v2_nested": ({OWN: "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "200000 100000"}, 2.0),
    "v2_nested_under_a_tighter_one": (
        {OWN: "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "400000 100000", "sys/fs/cgroup/a/cpu.max": "100000 100000"},
        1.0,
    ),
    "v2_nested_in_a_group_without_limit": (
        {OWN: "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "300000 100000", "sys/fs/cgroup/a/cpu.max": "max 100000"},
        3.0,
    ),
    "not_ours": ({OWN: "0::/a\n", "sys/fs/cgroup/b/cpu.max": "100000 100000"}, None),
    "own_group_garbage": ({OWN: "no colon\n:::\n\n", V2: "200000 100000"}, 2.0),
    "own_group_no_text": ({OWN: b"0::/\xff\xfe\n", V2: "200000 100000"}, 2.0),
    "own_group_not_there": ({OWN: "0::/gone\n", V2: "200000 100000"}, 2.0),
    "own_group_above_the_mount": ({OWN: "0::/../../x\n", V2: "200000 100000"}, 2.0),
}


@pytest.fixture
def cgroup(tmp_path, monkeypatch):
    """A fake root with the given files, and 8 CPUs to run on."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)

    def make(files):
        for name, content in files.items():
            file = tmp_path / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return tmp_path

    return make


@pytest.mark.parametrize(("files", "quota"), CGROUPS.values(), ids=CGROUPS.keys())
def test_a_cgroup_quota_limits_the_cpus_rounded_up(cgroup, files, quota):
    root = cgroup(files)
    assert threads._cgroup_quota(root) == quota
    cpus, why = threads._read_available_cpus(root)
    assert cpus == (8 if quota is None else max(1, int(np.ceil(quota))))
    assert ("cgroup" in why) == (quota is not None)


def test_a_folder_in_the_place_of_a_file_is_no_limit(cgroup, tmp_path):
    (tmp_path / V2).mkdir(parents=True)
    assert threads._cgroup_quota(tmp_path) is None


def test_a_quota_above_the_affinity_does_not_count(cgroup, monkeypatch):
    root = cgroup({V2: "1600000 100000"})
    assert threads._read_available_cpus(root)[0] == 8
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    assert threads._read_available_cpus(root)[0] == 1


def test_without_affinity_calls_the_machines_cpus_count(cgroup, tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert threads._read_available_cpus(tmp_path)[0] == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert threads._read_available_cpus(tmp_path)[0] == 1


@pytest.fixture
def asked(monkeypatch):
    """Who asks for the CPUs is told how often that was, and it is noted here; the environment says nothing."""
    asked = []
    monkeypatch.setattr(threads, "_read_available_cpus", lambda root: asked.append(root) or (len(asked), "asked"))
    _core.set_environment_threads(0, False)
    _core.set_thread_sources(threads._context, threads._available_cpus)
    yield asked
    monkeypatch.undo()
    _core.set_environment_threads(threads._from_environment(), threads._omp_num_threads_is_set())
    _core.set_thread_sources(threads._context, threads._available_cpus)


def test_the_system_is_asked_once_a_second_at_most(asked):
    begun = time.monotonic()
    for _ in range(1000):
        n, why = threads.thread_budget()
    assert asked == [Path("/")] * len(asked)
    assert 1 <= len(asked) <= 1 + (time.monotonic() - begun)
    if n == len(asked):  # else OpenMP grants less
        assert why == "asked"
    before = len(asked)
    _core.age_cpus(1.0)
    threads.thread_budget()
    assert len(asked) == before + 1


def test_large_calls_ask_the_system_and_small_ones_do_not(asked):
    small, large = (np.ones((n, 64), np.float32) for n in (100, 2000))
    bnfast.moments(small)
    assert not asked
    bnfast.moments(large)
    assert len(asked) == 1


def test_an_interrupt_while_the_system_is_asked_ends_the_call_and_it_is_asked_again(monkeypatch, asked):
    def interrupted(root):
        raise KeyboardInterrupt

    x = np.ones((2000, 64), np.float32)
    with monkeypatch.context() as patch:
        patch.setattr(threads, "_read_available_cpus", interrupted)
        with pytest.raises(KeyboardInterrupt):
            bnfast.moments(x)
    assert bnfast.moments(x).count == 2000
    assert len(asked) == 1


@needs_openmp
def test_a_cpu_limit_counts_unless_omp_num_threads_is_set():
    settings = ("context", "process", "environment")
    assert decided(*settings, cpus=2)[0] == 7
    assert decided(*settings, "omp_num_threads_is_set", cpus=2) == (2, "CPUs", False)


# --- what the import does to the process ---------------------------------------------------------------------


@needs_proc
def test_import_changes_nothing_in_the_process():
    script = """
import ctypes, signal, threading
libc = ctypes.CDLL(None)
libc.getenv.restype = ctypes.c_char_p
def look():
    names = ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"]
    return (
        dict(os.environ),
        [libc.getenv(name.encode()) for name in names],  # what C sees
        tasks(),
        threading.active_count(),
        {s: signal.getsignal(s) for s in signal.valid_signals()},
        signal.pthread_sigmask(signal.SIG_BLOCK, []),
        np.geterr(),
        sys.gettrace(),
        os.getcwd(),
        list(warnings.filters),
    )
before = look()
import bnfast
for one, other in zip(before, look(), strict=True):
    assert one == other, (one, other)
print("same")
"""
    assert run_python(script)[0] == "same"


def test_subnormal_numbers_survive_the_import_and_the_calls():
    script = (
        LARGE
        + """
def works():
    # through variables: the compiler would fold the constants
    smallest = float("2.2250738585072014e-308"), np.float64("2.2250738585072014e-308"), np.float32("1.1754944e-38")
    return all(number / type(number)(2) != 0 for number in smallest)
assert works()
import bnfast
assert works()
with bnfast.num_threads(2):
    y, mean, inv_std = bnfast.functional.batch_norm(x)
    bnfast.functional.batch_norm_backward(y, x, mean, inv_std)
assert works()
print("work")
"""
    )
    assert run_python(script)[0] == "work"


# --- what the threads do -------------------------------------------------------------------------------------


@needs_openmp
@needs_proc
def test_small_work_starts_no_thread_and_large_work_starts_one_for_two():
    script = (
        LARGE
        + """
def every_function(x):
    y, mean, inv_std = bnfast.functional.batch_norm(x)
    bnfast.functional.batch_norm_eval(x, mean, mean * mean)
    bnfast.functional.batch_norm_backward(y, x, mean, inv_std)
    bnfast.functional.batch_norm_jvp(y, x, mean, inv_std)
    bnfast.moments(x)
import bnfast
counts = [tasks()]
bnfast.set_num_threads(2)
for shape in ((2, 3), (8, 16, 4, 4), (64, 200), (1, 1, 15000)):
    every_function(np.random.default_rng(0).standard_normal(shape))
counts.append(tasks())
bnfast.set_num_threads(1)
every_function(x)
counts.append(tasks())
bnfast.set_num_threads(2)
for _ in range(3):
    every_function(x)
counts.append(tasks())
print(*(count - counts[0] for count in counts))
"""
    )
    assert run_python(script)[0] == "0 0 0 1"


@needs_openmp
@needs_proc
def test_where_no_thread_can_be_started_the_call_goes_on_without():
    """libgomp would end the process; so it has to be found out before."""
    script = (
        LARGE
        + """
import resource
import bnfast
with bnfast.num_threads(1):
    expected = bnfast.moments(x)
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
resource.setrlimit(resource.RLIMIT_AS, (size + 2**22,) * 2)  # too little for another stack
with bnfast.num_threads(2):
    print(bnfast.moments(x) == expected)
"""
    )
    assert run_python(script)[0] == "True"


def idle_threads(before="import sys; sys.modules['torch'] = None; ", **environment):
    """What bnfast says of its idle threads, and for how many turns libgomp says that they spin before they sleep.

    before: what comes before the import; by default PyTorch is not installed.
    """
    script = before + "import bnfast; print(bnfast.config()['idle_threads'])"
    said, shown = run_python(script, OMP_DISPLAY_ENV="verbose", **environment)
    return said, [int(count) for count in re.findall(r"GOMP_SPINCOUNT = '(\d+)'", shown)]


@needs_libgomp
def test_idle_workers_sleep():
    """After a tenth of a millisecond; libgomp's own default is some milliseconds."""
    assert idle_threads() == ("sleep", [loading._SPIN_COUNT])
    assert loading._SPIN_COUNT <= 20_000


@needs_libgomp
@pytest.mark.skipif(loading._is_private(), reason="nobody shares the libgomp of a wheel")
@pytest.mark.parametrize("before", ["", "import torch; "])
def test_a_runtime_that_pytorch_shares_is_left_as_it_comes(tmp_path, before):
    """Whichever is imported first. This PyTorch is an empty one."""
    (tmp_path / "torch.py").touch()
    own = loading._LIBGOMPS_OWN
    said, counts = idle_threads(before, PYTHONPATH=str(tmp_path))
    assert counts == [own]
    assert "torch" in said


@needs_libgomp
def test_a_runtime_that_was_there_before_is_left_as_it_was_told(tmp_path):
    library = c_library(tmp_path, TEAM_LIBRARY, "-fopenmp")
    said, counts = idle_threads(f"import ctypes; ctypes.CDLL({library!r}); ")
    if len(counts) == 1:  # else this build has an OpenMP runtime of its own
        assert counts == [loading._LIBGOMPS_OWN]
        assert said.startswith("as this libgomp was told")


@needs_libgomp
@pytest.mark.parametrize(("name", "value"), [("GOMP_SPINCOUNT", "infinite"), ("OMP_WAIT_POLICY", "active")])
def test_idle_workers_spin_where_the_user_says_so(name, value):
    said, counts = idle_threads(**{name: value})
    assert said == f"as {name}={value} says"
    assert min(counts) > 10**9


@needs_openmp
@pytest.mark.parametrize(("name", "value"), [("GOMP_SPINCOUNT", "7"), ("OMP_WAIT_POLICY", "passive")])
def test_what_the_user_says_about_waiting_stays_in_the_environment(name, value):
    script = "import bnfast; print({n: v for n, v in os.environ.items() if n in ('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY')})"
    assert run_python(script, **{name: value})[0] == str({name: value})


# --- waking them ---------------------------------------------------------------------------------------------

LITTLE, MUCH = 100_000, 1_000_000  # elements: the first do not pay for waking a thread, the second do


@pytest.fixture
def two_that_sleep(free):
    """Two threads by the environment, which stay awake for many seconds: no test depends on its own speed."""
    _core.set_environment_threads(2, False)
    _core.set_spin_count(1 << 30)
    assert 1 < _core.seconds_awake() < 600
    _core.set_patience(10**9)
    yield
    _core.set_patience(-1)
    _core.set_spin_count(loading.SPIN_COUNT)
    _core.pretend_last_call(3600)


@needs_libgomp
def test_a_call_after_a_pause_wakes_a_thread_if_it_is_large(two_that_sleep):
    for elements, team in ((LITTLE, 1), (MUCH, 2)):
        _core.pretend_last_call(3600, MUCH)
        assert _core.team_for(elements) == team


@needs_libgomp
def test_a_call_after_a_large_one_finds_the_thread_awake(two_that_sleep):
    _core.pretend_last_call(3600)
    assert [_core.team_for(n) for n in (MUCH, LITTLE, LITTLE)] == [2, 2, 2]
    _core.pretend_last_call(0, MUCH)
    assert _core.team_for(LITTLE) == 2


@needs_libgomp
def test_small_calls_wake_a_thread_when_they_come_in_numbers(two_that_sleep):
    _core.pretend_last_call(3600)
    teams = [_core.team_for(LITTLE) for _ in range(20)]
    assert teams == sorted(teams)  # 1 1 1 ... 2 2 2
    assert 4 <= teams.count(1) <= 8
    _core.pretend_last_call(3600, MUCH)
    assert _core.team_for(LITTLE) == 1  # and from the beginning after a pause


@needs_libgomp
def test_each_thread_has_its_own_burst(two_that_sleep):
    _core.pretend_last_call(0, MUCH)
    assert _core.team_for(LITTLE) == 2
    assert in_thread(lambda: _core.team_for(LITTLE)) == 1  # whose pool has not been started


@needs_libgomp
def test_a_call_that_ends_is_what_the_pause_is_counted_from(two_that_sleep):
    x = np.ones((LITTLE // 64, 64), np.float32)
    _core.pretend_last_call(0, MUCH)
    bnfast.moments(x)
    assert _core.team_for(LITTLE) == 2
    _core.pretend_last_call(3600, MUCH)
    bnfast.moments(x)
    assert _core.team_for(LITTLE) == 1


@needs_libgomp
def test_a_number_set_in_code_is_used_as_it_is(two_that_sleep):
    _core.pretend_last_call(3600)
    with bnfast.num_threads(3):
        assert _core.team_for(LITTLE) == 3
    bnfast.set_num_threads(3)
    assert _core.team_for(LITTLE) == 3


@needs_libgomp
def test_where_workers_do_as_the_user_says_waking_counts_as_free(two_that_sleep):
    _core.set_spin_count(0)
    _core.pretend_last_call(3600)
    assert _core.team_for(LITTLE) == 2
    script = "import bnfast; print(bnfast._core.seconds_awake())"
    assert run_python(script, OMP_WAIT_POLICY="active")[0] == "0.0"
    assert 0 < float(run_python(script)[0]) < 0.01


@needs_libgomp
@needs_proc
def test_small_calls_between_pauses_start_no_thread():
    script = """
import bnfast
from bnfast import _core
x = np.ones((2000, 64), np.float32)
before = tasks()
for _ in range(20):
    _core.pretend_last_call(3600)
    bnfast.moments(x)
small = tasks() - before
bnfast.moments(np.ones((20_000, 64), np.float32))
print(small, tasks() - before)
"""
    assert run_python(script, BNFAST_NUM_THREADS="2")[0] == "0 1"


# --- where they come late, because other processes have the CPUs ----------------------------------------------


@pytest.fixture
def two_that_are_awake(two_that_sleep):
    """As before, in the midst of a burst; waits count from a second on, and one is pretended to be the last."""
    _core.set_patience(10**6)
    _core.pretend_last_call(0, MUCH)


def in_new_thread(function):
    """The same for a function that leaves traces in its thread."""
    return in_thread(lambda: (_core.pretend_last_call(0, MUCH), function())[1])


def teams_after_waiting(task, waited):
    """Teams of calls that follow at once, each in a new thread. (One that does not run for 5 ms comes too late.)"""

    def team():
        _core.pretend_late(int(task), int(waited))
        return _core.team_for(LITTLE)

    return {in_new_thread(team) for _ in range(20)}


@needs_libgomp
def test_who_had_to_wait_for_others_goes_on_alone_for_a_while(two_that_are_awake):
    second = 1_000_000
    assert 1 in teams_after_waiting(10, 1.1 * second)
    assert 1 in teams_after_waiting(second, 2.1 * second)
    assert teams_after_waiting(10, 0.9 * second) == {2}  # as long as it takes to wake one
    assert teams_after_waiting(second, 1.5 * second) == {2}  # one more task than threads


@needs_libgomp
def test_it_tries_again_after_milliseconds(two_that_are_awake):
    def team():
        _core.pretend_late(10, 1_100_000)
        end = time.monotonic() + 20
        while _core.team_for(LITTLE) == 1 and time.monotonic() < end:
            time.sleep(0.001)
        return _core.team_for(LITTLE)

    assert in_new_thread(team) == 2


@needs_libgomp
def test_large_work_and_a_number_set_in_code_are_worth_waiting(two_that_are_awake):
    def teams():
        _core.pretend_late(10, 1_100_000)
        with bnfast.num_threads(2):
            in_code = _core.team_for(LITTLE)
        return _core.team_for(20 * MUCH), in_code

    assert in_new_thread(teams) == (2, 2)


@needs_libgomp
def test_a_team_is_timed(two_that_are_awake):
    """With no patience at all a wait is too long if it is longer than two tasks: some are, sooner or later."""
    x = np.ones((LITTLE // 64, 64), np.float32)

    def alone_after_a_call():
        end = time.monotonic() + 20
        while time.monotonic() < end:
            _core.pretend_last_call(0, MUCH)
            bnfast.moments(x)
            if _core.team_for(LITTLE) == 1:
                return True
        return False

    _core.set_patience(0)
    assert in_thread(alone_after_a_call)


# --- config, show_config, python -m bnfast -------------------------------------------------------------------

KEYS = {
    "version": str, "python": str, "numpy": str, "isa": str, "isa_compiled": list, "isa_supported": list,
    "openmp": int if HAS_OPENMP else type(None), "openmp_library": str, "threads": int, "threads_why": str,
    "idle_threads": str, "fork": str, "forked_serial": bool, "l2_bytes": int, "last_level_bytes": int,
}  # fmt: skip


def test_config_says_what_was_built_and_what_runs():
    config = bnfast.config()
    assert {name: type(value) for name, value in config.items()} == KEYS
    assert config["version"] == bnfast.__version__
    assert config["numpy"] == np.__version__
    assert config["isa"] in config["isa_supported"]
    assert set(config["isa_supported"]) <= set(config["isa_compiled"])
    assert config["isa_compiled"][0] == "baseline"
    assert config["threads"] == bnfast.get_num_threads() >= 1
    assert config["forked_serial"] is False
    assert config["l2_bytes"] > 0
    assert config["last_level_bytes"] > 0


def test_config_is_the_callers_to_change():
    bnfast.config()["isa_compiled"].clear()
    assert bnfast.config()["isa_compiled"]


def assert_shows(text, config):
    for name in ("version", "python", "numpy", "isa", "openmp", "openmp_library", "threads", "idle_threads", "fork"):
        if config[name] is not None:
            assert str(config[name]) in text, name
    assert f"{config['threads']} ({config['threads_why']})" in text


def test_show_config_prints_it(capsys):
    assert bnfast.show_config() is None
    printed = capsys.readouterr()
    assert_shows(printed.out, bnfast.config())
    assert printed.err == ""


@pytest.mark.parametrize("arguments", [[], ["config"]])
def test_the_command_prints_version_isa_openmp_threads_and_why(arguments):
    output, errors = run_python("", "-m", "bnfast", *arguments, BNFAST_NUM_THREADS="3", OMP_THREAD_LIMIT="3")
    config = bnfast.config()
    for part in (config["version"], config["isa"], str(config["openmp"] or "none"), "OpenMP"):
        assert part in output
    if HAS_OPENMP:
        assert "3 (BNFAST_NUM_THREADS)" in output
    assert errors == ""


@pytest.mark.parametrize("arguments", [["--help"], ["config", "--help"]])
def test_the_help_says_what_each_command_does(arguments):
    output, errors = run_python("", "-m", "bnfast", *arguments)
    assert errors == ""
    for command in ("config", "demo", "gallery", "bench"):
        assert f"\n  {command} " in output


@pytest.mark.parametrize("arguments", [["no-such-command"], ["config", "more"]])
def test_the_command_refuses_what_it_does_not_know(arguments):
    output, errors = run_python("", "-m", "bnfast", *arguments, error_ok=True)
    assert output == ""
    assert "usage: python -m bnfast" in errors
    assert arguments[-1] in errors


def test_bnfast_isa_forces_an_instruction_set():
    for isa in bnfast.config()["isa_supported"]:
        assert run_python("import bnfast; print(bnfast.config()['isa'])", BNFAST_ISA=isa)[0] == isa


@pytest.mark.parametrize("isa", ["sse9", "AVX2"])
def test_an_unknown_instruction_set_is_an_error(isa):
    output, errors = run_python("import bnfast; print('imported')", BNFAST_ISA=isa, error_ok=True)
    assert output == ""
    assert "BNFAST_ISA" in errors
    assert isa in errors
    assert "baseline" in errors


def test_calls_give_no_warning_whatever_the_number_of_threads():
    x = np.random.default_rng(0).standard_normal((64, 32, 32, 32)).astype(np.float32)
    with warnings.catch_warnings(), bnfast.num_threads(2):
        warnings.simplefilter("error")
        bnfast.functional.batch_norm(x)
