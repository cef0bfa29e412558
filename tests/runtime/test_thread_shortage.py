"""Where the system starts no more threads, calls go on with those there are, with the same bits and one warning.

libgomp ends the process in that case. So before a pool grows, bnfast starts as many threads for a try (openmp.c).
"""

import sys

import pytest
from campaign import short_and_long
from scripts import TEAM_LIBRARY, c_library, completed, needs_libgomp, needs_openmp, preloaded, run_script

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits and preloading as on Linux"),
    needs_openmp,
]

HEAD = """
import ctypes, hashlib, os, resource, sys, threading, time, warnings
import numpy as np
import bnfast
from bnfast import functional as F

x = np.random.default_rng(0).standard_normal((32, 16, 24, 24)).astype(np.float32)
def step(team):
    with bnfast.num_threads(team):
        y, mean, inv_std = F.batch_norm(x)
        results = [y, mean, inv_std, *F.batch_norm_backward(x, x, mean, inv_std)]
    return hashlib.sha256(b"".join(result.tobytes() for result in results)).hexdigest()
def light(team):
    # the same with hardly any memory of its own
    with bnfast.num_threads(team):
        m = bnfast.moments(x)
    return m.mean.tobytes() + m.m2.tobytes()
BITS, LIGHT_BITS = step(1), light(1)
def tasks():
    return len(os.listdir("/proc/self/task"))
def caught(function):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        function()
    assert all(w.category is RuntimeWarning and "refused to start threads" in str(w.message) for w in found), found
    return len(found)
"""

# Refuses new threads once `allowed` of them have been started; -1: never.
REFUSING = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
int allowed = -1, asked;
int pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*run)(void *), void *argument)
{
    static int (*real)(pthread_t *, const pthread_attr_t *, void *(*)(void *), void *);
    if (real == NULL)
        real = dlsym(RTLD_NEXT, "pthread_create");
    __atomic_add_fetch(&asked, 1, __ATOMIC_RELAXED);
    if (allowed >= 0 && __atomic_fetch_sub(&allowed, 1, __ATOMIC_RELAXED) <= 0) {
        allowed = 0;
        return EAGAIN;
    }
    return real(thread, attributes, run, argument);
}
"""
SHIM = """
shim = ctypes.CDLL(os.environ["LD_PRELOAD"].split()[-1])
allowed, asked = (ctypes.c_int.in_dll(shim, name) for name in ("allowed", "asked"))
"""


@pytest.fixture(scope="module")
def refusing(tmp_path_factory):
    return c_library(tmp_path_factory.mktemp("refusing"), REFUSING, "-O1", "-ldl")


def run_refused(refusing, body):
    return run_script(HEAD + SHIM + body, LD_PRELOAD=preloaded(refusing))


def test_no_thread_at_all_right_bits_and_one_warning(refusing):
    body = """
before = tasks()
allowed.value = 0
def work():
    for _ in range(30):
        assert step(4) == BITS
print(caught(work), tasks() - before)
"""
    assert run_refused(refusing, body) == "1 0"


def test_room_for_some_threads_makes_a_smaller_team():
    body = """
before = tasks()
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
stack = 2**23 if stack == resource.RLIM_INFINITY else stack
resource.setrlimit(resource.RLIMIT_AS, (size + int(2.5 * stack) + 2**23,) * 2)
def work():
    for _ in range(30):
        assert light(16) == LIGHT_BITS
print(caught(work), 0 < tasks() - before < 15)
"""
    assert run_script(HEAD + body) == "1 True"


def test_after_a_second_it_is_tried_again(refusing):
    body = """
before = tasks()
allowed.value = 0
refused = time.monotonic()
print(caught(lambda: step(4)))
allowed.value = -1
assert step(4) == BITS
print(tasks() - before if time.monotonic() < refused + 1 else "too late to say")
time.sleep(1.1)
print(caught(lambda: step(4)), tasks() - before)
step(2) # ends two of the three
while tasks() - before > 1: # which takes the system a moment
    time.sleep(0.001)
allowed.value = 0
print(caught(lambda: step(4)), step(4) == BITS, tasks() - before)
"""
    refusal, within, *later = run_refused(refusing, body).splitlines()
    assert refusal == "1"
    assert within in ("0", "too late to say")  # on a machine that needs a second for two steps
    assert later == ["0 3", "1 True 1"]


@needs_libgomp  # others are not known to end it
def test_without_the_try_the_process_ends(refusing, tmp_path):
    """Negative control: the pool grows in a region that bnfast did not prepare."""
    body = "library = ctypes.CDLL(sys.argv[1]); allowed.value = 0; library.team()"
    run = completed(HEAD + SHIM + body, c_library(tmp_path, TEAM_LIBRARY, "-fopenmp"), LD_PRELOAD=preloaded(refusing))
    assert run.returncode == 1
    assert "Thread creation failed" in run.stderr


def test_the_try_is_made_once_for_a_growth(refusing):
    """Calls that do not grow the pool start no thread."""
    body = """
before = asked.value
counts = []
for team in (2, 2, 4, 4, 4, 2, 2):
    step(team)
    counts.append(asked.value - before)
print(*counts)
"""
    # 1 tried and 1 started; 2 more of both; none
    assert run_refused(refusing, body) == "2 2 6 6 6 6 6"


def test_a_limit_on_processes_of_the_user():
    body = """
before = tasks()
if os.getuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
def work():
    for _ in range(30):
        assert step(4) == BITS
print(caught(work), tasks() - before)
bn = bnfast.BatchNorm(16)
with bnfast.num_threads(4):
    bn(x), bn.backward(x)
print(bn.num_batches_tracked)
"""
    assert run_script(HEAD + body).split() == ["1", "0", "1"]


@pytest.mark.parametrize("rounds", short_and_long(3, 100))
def test_limits_on_the_address_space_of_every_size(rounds):
    """Room for none, one, two ... stacks."""
    body = """
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
for i in range(int(sys.argv[1])):
    pid = os.fork()
    if pid == 0:
        resource.setrlimit(resource.RLIMIT_AS, (size + 2**22 + i * 5 * 2**20 % 2**27,) * 2)
        warned = caught(lambda: [light(16) == LIGHT_BITS or os._exit(3) for _ in range(5)])
        os._exit(0 if warned <= 1 else 4)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status == 0, (i, status)
print("right")
"""
    assert run_script(HEAD + body, rounds) == "right"


def test_the_warning_as_an_error_comes_after_the_work(refusing):
    body = """
allowed.value = 0
bn = bnfast.BatchNorm(16)
out = np.zeros_like(x)
try:
    with bnfast.num_threads(4):
        F.batch_norm(x, out=out)
    print("no warning")
except RuntimeWarning:
    print(out.any())
with bnfast.num_threads(4):
    bn(x)
print(bn.num_batches_tracked)
"""
    assert run_refused(refusing, body).split() == ["True", "1"]
