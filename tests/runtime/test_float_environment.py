"""The float environment (rounding mode, flush to zero) of the caller holds on every thread, and is left as it was."""

import platform
import sys

import pytest
from scripts import c_library, needs_openmp, run_script

pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not sys.platform.startswith("linux"),
    reason="reads and sets MXCSR through a C library made for Linux on x86-64",
)

# `look`: the control bits of each thread of a team, of the OpenMP runtime that bnfast uses: a wheel has its own.
MXCSR = """
#include <xmmintrin.h>
unsigned get(void) { return _mm_getcsr() & ~0x3fu; }
void set(unsigned control) { _mm_setcsr(control); }
typedef void parallel(void (*)(void *), void *, unsigned, unsigned);
static unsigned *found;
static int (*number)(void);
static void note(void *count)
{
    found[number()] = get();
    __atomic_add_fetch((int *)count, 1, __ATOMIC_RELAXED);
}
int look(parallel *run, int (*thread_num)(void), int n, unsigned *controls)
{
    int count = 0;
    found = controls;
    number = thread_num;
    run(note, &count, n, 0);
    return count;
}
"""

HEAD = """
import ctypes, hashlib, os, sys
import numpy as np
library = ctypes.CDLL(sys.argv[1])
library.get.restype = ctypes.c_uint
library.set.argtypes = [ctypes.c_uint]
DEFAULT = library.get()
FLUSH = 0x8040 # flush to zero, denormals are zero
CONTROLS = {f"{name}{flush}": DEFAULT | rounding << 13 | (FLUSH if flush else 0)
            for rounding, name in enumerate(["nearest", "down", "up", "to_zero"]) for flush in ("", "+flush")}
def digest(arrays):
    return hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for a in arrays)).hexdigest()
def threads_controls(n):
    from bnfast import _core
    runtime = ctypes.CDLL(_core.openmp_library())
    found = (ctypes.c_uint * n)()
    assert library.look(runtime.GOMP_parallel, runtime.omp_get_thread_num, n, found) == n
    return list(found)
"""

FUNCTIONS = """
import bnfast
from bnfast import functional as F
def functions(x):
    yield "batch_norm", lambda: F.batch_norm(x)
    _, mean, inv_std = F.batch_norm(x)
    yield "moments", lambda: (bnfast.moments(x).mean, bnfast.moments(x).m2)
    yield "batch_norm_eval", lambda: [F.batch_norm_eval(x, mean, mean * mean)]
    yield "batch_norm_backward", lambda: F.batch_norm_backward(x, x, mean, inv_std)
    yield "batch_norm_jvp", lambda: [F.batch_norm_jvp(x, x, mean, inv_std)]
    yield "BatchNorm", lambda: [bnfast.BatchNorm(x.shape[1])(x)]
    yield "StandardScaler", lambda: [bnfast.StandardScaler().fit_transform(x.reshape(-1, x.shape[-1]))]
"""


@pytest.fixture(scope="module")
def mxcsr(tmp_path_factory):
    return c_library(tmp_path_factory.mktemp("mxcsr"), MXCSR, "-O1")


def test_inverse_roots_are_rounded_as_the_caller_rounds(mxcsr):
    """Alone, or beside others, which may be made together: exact roots, and inverses between two numbers."""
    body = """
from bnfast import _core, functional as F
v = np.array([1, 4, 9, 2, 3, 4 - 2.0**-51, 4 - 2.0**-50, 1 + 2.0**-52, 2.25, 1e-5, 6, 7, 8, 10, 11, 12])
for isa, (compiled, supported) in _core.isas().items():
    if not (compiled and supported):
        continue
    _core.select_isa(isa)
    for name, control in CONTROLS.items():
        library.set(control)
        together = F.batch_norm_eval(np.ones((1, 16)), np.zeros(16), v, eps=0.0)[0]
        alone = [F.batch_norm_eval(np.ones((1, 1)), np.zeros(1), v[i : i + 1], eps=0.0)[0, 0] for i in range(16)]
        library.set(DEFAULT)
        assert together.tolist() == alone, (isa, name)
"""
    run_script(HEAD + body, mxcsr)


@needs_openmp
def test_every_thread_computes_as_the_caller_would(mxcsr):
    """And the environment matters: different controls give different bits."""
    body = """
rng = np.random.default_rng(0)
x = rng.standard_normal((32, 8, 20, 20)).astype(np.float32)
x[:, 4:] *= np.float32(1e-38) # their squares, and many of them, are subnormal or less
seen = {}
bnfast.set_num_threads(4)
bnfast.moments(x) # the pool is there before
for name, control in CONTROLS.items():
    for function, call in functions(x):
        library.set(control)
        try:
            with bnfast.num_threads(1):
                alone = digest(call())
            assert library.get() == control, (function, name)
            for _ in range(5):
                assert digest(call()) == alone, (function, name)
            assert library.get() == control, (function, name)
        finally:
            library.set(DEFAULT)
        seen.setdefault(function, {})[name] = alone
for function, digests in seen.items():
    assert len(set(digests.values())) > 1, (function, digests)
assert len(set(seen["batch_norm"].values())) >= 6, seen["batch_norm"]
print("the same")
"""
    assert run_script(HEAD + FUNCTIONS + body, mxcsr) == "the same"


@needs_openmp
def test_the_workers_get_their_own_back(mxcsr):
    """Another library may run on them next."""
    body = """
bnfast.set_num_threads(2)
x = np.random.default_rng(0).standard_normal((32, 8, 20, 20)).astype(np.float32)
bnfast.moments(x)
before = threads_controls(2)
for control in CONTROLS.values():
    library.set(control)
    list(map(lambda named: named[1](), functions(x)))
    library.set(DEFAULT)
    assert threads_controls(2) == before == [DEFAULT] * 2
print("their own")
"""
    assert run_script(HEAD + FUNCTIONS + body, mxcsr) == "their own"


def test_import_and_calls_leave_the_control_bits(mxcsr):
    body = """
for control in CONTROLS.values():
    pid = os.fork()
    if pid == 0:
        library.set(control)
        import bnfast
        imported = library.get() == control
        x = np.ones((64, 32, 16, 16), np.float32)
        x[0] = 2
        y, mean, inv_std = bnfast.functional.batch_norm(x)
        with bnfast.num_threads(3):
            bnfast.functional.batch_norm_backward(y, x, mean, inv_std)
        os._exit(0 if imported and library.get() == control else 1)
    assert os.waitpid(pid, 0)[1] == 0, hex(control)
print("as they were")
"""
    assert run_script(HEAD + body, mxcsr) == "as they were"


def test_a_library_of_fast_math_loaded_after_the_pool(mxcsr, tmp_path):
    """Built with -ffast-math by some compilers it switches subnormals off for the thread that loads it. Results are the
    same on every number of threads, and with the environment put back they are the old ones."""
    fast = c_library(tmp_path, "float twice(float x) { return x + x; }", "-ffast-math")
    body = """
x = np.random.default_rng(0).standard_normal((32, 8, 20, 20)).astype(np.float32) * np.float32(1e-38)
def bits(team):
    with bnfast.num_threads(team):
        return [digest(call()) for _, call in functions(x)]
before = bits(4)
assert before == bits(1)
ctypes.CDLL(sys.argv[2])
flushes = library.get() != DEFAULT
control = library.get()
if not flushes: # this compiler's do no harm: do what the others' do
    library.set(DEFAULT | FLUSH)
    control = DEFAULT | FLUSH
after = bits(4)
assert after == bits(1)
assert library.get() == control
assert after != before
library.set(DEFAULT)
assert bits(4) == before
print("the same")
"""
    assert run_script(HEAD + FUNCTIONS + body, mxcsr, fast) == "the same"
