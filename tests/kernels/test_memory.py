"""Memory safety: the C driver (c/driver.c) plain and under its tools; no growth. Layouts are in
test_layouts.py, large arrays in test_big_arrays.py, the suite under sanitizers is tools/sanitize.
"""

import functools
import gc
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from campaign import short_and_long
from places import KERNELS, SOURCES
from scripts import NO_RSS_LIMIT, SANITIZED, run_script

import bnfast
from bnfast import _core
from bnfast import functional as F

# --- the driver ----------------------------------------------------------------------------------------------------

FLAGS = ["-std=c11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Werror", "-g1"]
LEAVES = ("baseline", "avx2", "avx512")  # they take nearly all the time to compile, with a sanitizer many minutes
ADDRESS = ["-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
THREAD = ["-O1", "-fsanitize=thread"]


def compiler(name):
    if not KERNELS.is_dir():
        pytest.skip("the sources do not lie beside the tests: an installed package is being tested")
    if shutil.which(name) is None:
        pytest.skip(f"no {name} on this machine")
    if not sys.platform.startswith("linux"):
        pytest.skip("the driver's guard pages are made with Linux's mmap")
    return name


def build(tmp_path, *flags, cc="gcc", leaves=None):
    """The driver, compiled with the kernels, as a path. Skips where that cannot be, but for errors in the sources.

    leaves: a folder with objects of the leaves, which are taken as they are.
    """
    target = tmp_path / "driver"
    sources = [Path(__file__).parent / "c" / "driver.c", *sorted(KERNELS.glob("*.c"))]
    probe = tmp_path / "probe.c"
    probe.write_text(
        "int main(void) { return 0; }\n" if "-DFUZZ" not in flags else "int LLVMFuzzerTestOneInput(void) { return 0; }"
    )
    command = [compiler(cc), *FLAGS, *flags]
    if subprocess.run([*command, "-w", probe, "-o", target], capture_output=True, check=False).returncode != 0:
        pytest.skip(f"{cc} cannot link a program with {' '.join(flags)}")

    def compiled(source):
        if leaves is not None and source.stem in LEAVES:
            return leaves / f"{source.stem}.o"
        unit = tmp_path / f"{source.stem}.o"
        done = subprocess.run([*command, f"-I{SOURCES}", "-c", source, "-o", unit], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return unit

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        units = list(pool.map(compiled, sources))
    subprocess.run([*command, *units, "-o", target, "-lm", "-lpthread"], check=True)
    return target


def drive(*command, **environment):
    """What the driver printed; what it or its tool complains of is the test's message."""
    env = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # it has sanitizers of its own
    env.update(environment)
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=7200, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("done\n")
    return done.stdout


@pytest.fixture(scope="module")
def plain_driver(tmp_path_factory):
    return build(tmp_path_factory.mktemp("driver"), "-O1")


@pytest.mark.parametrize("arguments", short_and_long(("sizes=36", "largest=3000"), ()))
def test_leaves_and_jobs_keep_within_their_buffers(plain_driver, arguments):
    """Values right, no byte too far, the same bits for every instruction set and number of threads."""
    drive(plain_driver, "leaves", "jobs", *arguments)


@pytest.mark.parametrize("arguments", short_and_long(("largest=300",), ("largest=200000",)))
def test_a_poisoned_channel_of_a_job_leaves_the_others_alone(plain_driver, arguments):
    drive(plain_driver, "poison", *arguments)


@pytest.fixture
def leaves(request, plain_driver):
    """Of the short forms: those of the plain driver, which no sanitizer watches. They keep within guard pages, too."""
    return None if request.node.get_closest_marker("campaign") else plain_driver.parent


@pytest.mark.parametrize("arguments", short_and_long(("sizes=20", "largest=700"), ("poison", "largest=70000")))
def test_driver_under_address_and_undefined_behaviour_sanitizers(tmp_path, leaves, arguments):
    drive(build(tmp_path, *ADDRESS, leaves=leaves), "leaves", "jobs", *arguments)


@pytest.mark.parametrize("largest", short_and_long(700, 20000))
def test_driver_under_thread_sanitizer(tmp_path, leaves, largest):
    """The tasks of a phase write to disjoint memory. ThreadSanitizer knows no barrier of libgomp, so the driver runs
    the tasks on threads of its own, joined after each phase: the order that OpenMP's loop promises, and no other."""
    drive(build(tmp_path, *THREAD, leaves=leaves), "jobs", "threads=3", f"largest={largest}")


# --- the same bits from other compilers, C libraries and processors ------------------------------------------------

SIZES = short_and_long(("sizes=20", "largest=700"), ("largest=70000",))


@pytest.fixture(scope="module")
def assert_same_digests(plain_driver):
    @functools.cache
    def digests(arguments):
        return set(drive(plain_driver, "leaves", "jobs", *arguments).splitlines())

    def check(printed, arguments):
        """All that the other driver printed; it may have fewer instruction sets."""
        lines = printed.splitlines()
        assert len(lines) >= 4  # leaves of both dtypes, jobs, done
        assert set(lines) <= digests(arguments)

    return check


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(("-O0",), id="-O0 but for the leaves"),
        # the extension itself is built with -O3: it takes minutes to compile
        pytest.param(("-O3", "-march=native"), id="-O3 -march=native", marks=pytest.mark.campaign),
    ],
)
@pytest.mark.parametrize("arguments", SIZES)
def test_other_flags_of_the_compiler(assert_same_digests, tmp_path, leaves, arguments, flags):
    """The leaves are compiled by these flags in the long form only: with -O0 each takes three minutes and 3 GB."""
    assert_same_digests(drive(build(tmp_path, *flags, leaves=leaves), "leaves", "jobs", *arguments), arguments)


@pytest.mark.parametrize("cc", ["clang", "musl-gcc"])
@pytest.mark.parametrize("arguments", SIZES)
def test_another_compiler_or_c_library(assert_same_digests, tmp_path, arguments, cc):
    assert_same_digests(drive(build(tmp_path, "-O2", cc=cc), "leaves", "jobs", *arguments), arguments)


@pytest.mark.parametrize("arguments", SIZES)
def test_arm64_under_an_emulator(assert_same_digests, tmp_path, arguments):
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if emulator is None:
        pytest.skip("there is no qemu-aarch64 (Debian: qemu-user)")
    arm64 = build(tmp_path, "-O2", "-static", cc="aarch64-linux-gnu-gcc")
    assert_same_digests(drive(emulator, arm64, "leaves", "jobs", *arguments), arguments)


@pytest.mark.parametrize("flags", [(), ("-fopenmp",)], ids=["alone", "openmp"])
def test_what_windows_compiles_has_no_warning(tmp_path, flags):
    """MinGW's GCC sees what MSVC would, but for MSVC's own words."""
    cc = compiler("x86_64-w64-mingw32-gcc")
    sources = [*KERNELS.glob("*.c"), *(SOURCES / "runtime").glob("*.c")]
    assert len(sources) > 10
    done = subprocess.run(
        [cc, *FLAGS, *flags, f"-I{SOURCES}", "-c", *sources], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# --- under tools -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ["baseline", "avx2"])  # Valgrind knows no AVX-512
@pytest.mark.parametrize("arguments", short_and_long(("sizes=9", "largest=100"), ("sizes=66", "largest=9000")))
def test_driver_under_valgrind(plain_driver, isa, arguments):
    if shutil.which("valgrind") is None:
        pytest.skip("no valgrind on this machine")
    if not _core.isas()[isa][1]:
        pytest.skip(f"this CPU has no {isa}")
    drive("valgrind", "-q", "--error-exitcode=9", plain_driver, "leaves", "jobs", f"isa={isa}", *arguments)


@pytest.mark.campaign
def test_fuzzed_jobs(tmp_path):
    """libFuzzer chooses operation, shape, place and bytes; ten minutes."""
    target = build(tmp_path, "-DFUZZ", "-Wno-unused-function", "-fsanitize=fuzzer", *ADDRESS, cc="clang")
    limits = ["-max_total_time=600", "-max_len=400", "-timeout=60", *NO_RSS_LIMIT]
    command = [target, *limits, f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run([*command, tmp_path], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-5000:]


# --- no growth -----------------------------------------------------------------------------------------------------


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def refused(call, *args, **options):
    """The call fails, and its traceback, which holds the arguments, goes."""
    try:
        call(*args, **options)
    except (TypeError, ValueError, RuntimeError, IndexError):
        return
    raise AssertionError(f"{call} should have refused")


def repeatable_calls():
    """name -> (a call to be made many times, the arrays it is given)."""
    rng = np.random.default_rng(1)
    x, dy = rng.normal(size=(2, 8, 5, 3)).astype(np.float32)
    gaps, long = np.zeros((16, 5, 3), np.float32)[::2], np.zeros(6)
    mean, var, gamma, out = np.zeros(5), np.ones(5), np.ones(5, np.float32), np.empty_like(x)
    table = rng.normal(size=(20, 5))
    inputs = [x, dy, gaps, long, mean, var, gamma, out, table]
    layer, other, evaluated = bnfast.BatchNorm(5), bnfast.BatchNorm(5), bnfast.BatchNorm(5).eval()
    scaler = bnfast.StandardScaler().fit(table)
    m = bnfast.moments(x)
    state = layer.state_dict()

    def train():
        layer(x)
        layer.backward(dy)

    def calibrate():
        with other.calibrate():
            other(x)

    def threads():
        with bnfast.num_threads(1):
            pass

    calls = {
        "batch_norm": lambda: F.batch_norm(x, gamma, mean),
        "batch_norm, gaps": lambda: F.batch_norm(gaps, gamma, mean),
        "batch_norm, out": lambda: F.batch_norm(x, gamma, out=out),
        "batch_norm, shape": lambda: refused(F.batch_norm, x, long),
        "batch_norm, dtype": lambda: refused(F.batch_norm, inputs),
        "batch_norm, axis": lambda: refused(F.batch_norm, x, axis=7),
        "batch_norm, wrong out": lambda: refused(F.batch_norm, x, out=long),
        "batch_norm_eval": lambda: F.batch_norm_eval(x, mean, var, gamma),
        "batch_norm_eval, variance": lambda: refused(F.batch_norm_eval, x, mean, mean - 1),
        "batch_norm_backward": lambda: F.batch_norm_backward(dy, x, mean, var, gamma),
        "batch_norm_backward, eval": lambda: F.batch_norm_backward(dy, x, mean, var, gamma, training=False),
        "batch_norm_backward, shape": lambda: refused(F.batch_norm_backward, dy[1:], x, mean, var),
        "batch_norm_jvp": lambda: F.batch_norm_jvp(dy, x, mean, var, vgamma=gamma, vbeta=mean),
        "batch_norm_jvp, shape": lambda: refused(F.batch_norm_jvp, dy, x, mean, var, vgamma=long),
        "moments": lambda: bnfast.moments(x) + m,
        "moments, dtype": lambda: refused(bnfast.moments, np.zeros((3, 2), complex)),
        "layer": train,
        "layer, shape": lambda: refused(layer, gaps[:, :3]),
        "layer, backward": lambda: refused(layer.backward, long),
        "layer, no forward": lambda: refused(bnfast.BatchNorm(5).backward, dy),
        "layer, eval": lambda: evaluated(x, out=out),
        "layer, state": lambda: layer.load_state_dict(layer.state_dict()),
        "layer, wrong state": lambda: refused(layer.load_state_dict, {**state, "weight": long}),
        "layer, modes": lambda: (layer.eval(), layer.train(), layer.parameters(), layer.gradients()),
        "layer, reset": lambda: (other.reset_parameters(), other.reset_running_stats()),
        "layer, calibrate": calibrate,
        "scaler": lambda: scaler.transform(table),
        "scaler, inverse": lambda: scaler.inverse_transform(table),
        "scaler, shape": lambda: refused(scaler.transform, table[:, 1:]),
        "scaler, fit": lambda: bnfast.StandardScaler().fit(table).partial_fit(table),
        "threads": threads,
        "threads, wrong": lambda: refused(bnfast.set_num_threads, 0),
    }
    return calls, inputs


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux's /proc")
@pytest.mark.parametrize("n", short_and_long(1500, 100_000))
@pytest.mark.parametrize("name", repeatable_calls()[0])
def test_memory_does_not_grow(name, n):
    calls, inputs = repeatable_calls()
    call = calls[name]
    for _ in range(max(300, n // 20)):
        call()
    gc.collect()
    references, before = [sys.getrefcount(a) for a in inputs], resident_bytes()
    for _ in range(n):
        call()
    gc.collect()
    grown = resident_bytes() - before
    assert [sys.getrefcount(a) for a in inputs] == references
    assert SANITIZED or grown < 2**20, f"{grown} bytes after {n} calls"  # the sanitizer keeps what is freed


# --- large workspaces ----------------------------------------------------------------------------------------------

MANY_CHANNELS = """
import resource
from pathlib import Path
import numpy as np
import bnfast
from bnfast import functional as F

n = 2_500_000
x, y = np.full((1, n, 16), 3, np.float32), np.zeros((1, n, 16), np.float32)
mean, var, gamma, beta = np.ones(n), np.ones(n), np.full(n, 2, np.float32), np.ones(n, np.float32)
evaluate = lambda: F.batch_norm_eval(x, mean, var, gamma, beta, eps=0.0, out=y)
"""


def large_pages():
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return path.exists() and "[never]" not in path.read_text()


@pytest.mark.skipif(not large_pages(), reason="the system gives no large pages to those who ask for them")
@pytest.mark.skipif(SANITIZED, reason="a sanitizer's own memory has faults of its own")
def test_a_large_workspace_comes_in_large_pages():
    """Of 30 MB of coefficients, which are made in each call, small pages would be 7,300 faults a call."""
    of_numpy, ours = run_script(
        MANY_CHANNELS
        + """
def faults(call):
    call()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        call()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 3

print(faults(lambda: np.empty(40_000_000, np.uint8).fill(1)), faults(evaluate))
"""
    ).split()
    if int(of_numpy) >= 3000:
        pytest.skip("NumPy's own arrays come in small pages: it does not ask for others, or there are none left")
    assert int(ours) < 3000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the limit is on Linux's address space")
@pytest.mark.skipif(SANITIZED, reason="a sanitizer needs the address space that would be limited")
def test_a_workspace_that_cannot_be_had_changes_nothing():
    done = run_script(
        MANY_CHANNELS
        + """
with bnfast.num_threads(2):  # whose threads are there before memory is short
    F.batch_norm_eval(x[:, :100_000], mean[:100_000], var[:100_000], out=y[:, :100_000].copy())
    y[:] = 7
    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + (16 << 20), resource.RLIM_INFINITY))
    try:
        evaluate()
    except MemoryError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert (y == 7).all()
    evaluate()
    assert (y == 5).all()
"""
    )
    assert re.fullmatch(r"no memory for \d+ bytes of workspace", done)
