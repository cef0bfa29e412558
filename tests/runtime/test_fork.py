"""A forked child computes the same bits, on as many threads as its parent, and never hangs.

libgomp keeps a pool for each thread that has run a parallel region; a child inherits the bookkeeping, not the
workers, and waits for them for ever. bnfast gives the pool back before a fork (openmp.c). Every case runs in a
process of its own with a time limit; a child that hangs is killed and makes its case fail.
"""

import pytest
import scripts
from campaign import short_and_long
from scripts import CHILDREN, TEAM_LIBRARY, c_library, needs_fork, needs_libgomp, needs_openmp, needs_proc, preloaded

import bnfast

CONFIG = bnfast.config()
pytestmark = [needs_fork, needs_openmp]

TIME_LIMIT = 300

# Every script begins with this. `step` is a training step on two threads; its bits are what a child has to find too.
HEAD = (
    CHILDREN
    + '''
import faulthandler, os, sys, time, traceback, warnings
faulthandler.dump_traceback_later(200)
# CPython 3.12 and later warn when a process with threads forks; that it works is what is tested here
warnings.filterwarnings("ignore", message=".*fork.*", category=DeprecationWarning)
import hashlib, threading
import numpy as np
import bnfast
from bnfast import functional as F

def batch(seed=0):
    return np.random.default_rng(seed).standard_normal((32, 16, 24, 24)).astype(np.float32)

def step(x=batch(), dy=batch(1), team=2):
    """Hash of the results of forward and backward on two threads."""
    with bnfast.num_threads(team):
        y, mean, inv_std = F.batch_norm(x)
        results = [y, mean, inv_std, *F.batch_norm_backward(dy, x, mean, inv_std)]
    return hashlib.sha256(b"".join(result.tobytes() for result in results)).hexdigest()

with bnfast.num_threads(1):
    BITS = step(team=1)

def tasks():
    return len(os.listdir("/proc/self/task"))

def child_is_fine(work=lambda: step() == BITS):
    return end_of(start_child(work)) == 0

def warm():
    assert step() == BITS
    return True
'''
)


def run_script(body, tmp_path, *arguments, head=HEAD, limit=TIME_LIMIT, **environment):
    """Output of a script; it fails the test if it fails or takes longer than `limit` seconds."""
    return scripts.run_script(head + body, *arguments, timeout=limit, folder=tmp_path, **environment)


# --- the usual ways to fork ----------------------------------------------------------------------------------

WARM_PARENT_THEN_FORK = "warm(); print(end_of(start_child(lambda: step() == BITS), SECONDS))"


def test_the_child_of_a_warm_parent_finds_the_same_bits(tmp_path):
    assert run_script("SECONDS = 60\n" + WARM_PARENT_THEN_FORK, tmp_path) == "0"


@needs_libgomp
def test_without_the_fork_handler_that_child_hangs(tmp_path):
    """Negative control: shows that the test above can fail."""
    body = (
        "SECONDS = 3; bnfast._core.handle_fork(False); assert not bnfast._core.fork_handled()\n" + WARM_PARENT_THEN_FORK
    )
    assert run_script(body, tmp_path) == "hangs"


def test_the_child_of_a_cold_parent_finds_the_same_bits(tmp_path):
    assert run_script("print(child_is_fine())", tmp_path) == "True"


@needs_libgomp
@needs_proc
def test_the_parent_goes_on_with_two_threads(tmp_path):
    """Its pool was given back for the fork; the next region starts a new one."""
    body = """
for _ in range(3):
    warm()
    assert child_is_fine()
    between = tasks()
    warm()
    print(tasks() - between)
"""
    assert run_script(body, tmp_path).split() == ["1", "1", "1"]


@needs_libgomp
@needs_proc
def test_the_child_uses_two_threads(tmp_path):
    body = """
def work():
    before = tasks()
    fine = step() == BITS
    config = bnfast.config()
    assert config["forked_serial"] is False and config["fork"] == "a child may use threads", config
    return fine and before == 1 and tasks() == 2
warm()
print(child_is_fine(work))
"""
    assert run_script(body, tmp_path) == "True"


def test_grandchildren_find_the_same_bits(tmp_path):
    body = """
def generation(n):
    if n == 0:
        return warm()
    return warm() and child_is_fine(lambda: generation(n - 1)) and warm()
print(generation(4))
"""
    assert run_script(body, tmp_path) == "True"


def test_a_child_that_forks_before_it_computes(tmp_path):
    body = "warm(); print(child_is_fine(lambda: child_is_fine(lambda: child_is_fine())))"
    assert run_script(body, tmp_path) == "True"


@pytest.mark.parametrize("warm_in_the_thread", [True, False])
@pytest.mark.parametrize("compute_in_the_child", [True, False])
def test_fork_from_a_thread_that_returns_in_the_child(tmp_path, warm_in_the_thread, compute_in_the_child):
    """The child is what was a thread; its end runs the destructors of that thread's pool."""
    body = f"""
pids = []
def work():
    if {warm_in_the_thread}:
        warm()
    pid = os.fork()
    if pid:
        pids.append(pid)
    elif {compute_in_the_child} and step() != BITS:
        os._exit(1)
warm()
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(end_of(pids[0]))
warm()
"""
    assert run_script(body, tmp_path) == "0"


def test_fork_from_a_thread_that_computes_in_the_child(tmp_path):
    body = """
warm()
results = []
def work():
    warm()
    results.append(child_is_fine())
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(results, warm())
"""
    assert run_script(body, tmp_path) == "[True] True"


@pytest.mark.parametrize("forks", short_and_long(20, 200))
def test_forks_in_a_row_while_threads_run_kernels(tmp_path, forks):
    body = """
stop, wrong, rounds = threading.Event(), [], [0] * 4
def compute(i):
    while not stop.is_set():
        if step() != BITS:
            wrong.append(i)
        rounds[i] += 1
threads = [threading.Thread(target=compute, args=(i,), daemon=True) for i in range(4)]
for thread in threads:
    thread.start()
warm()
for _ in range(int(sys.argv[1])):
    assert child_is_fine()
while not all(rounds):
    time.sleep(0.001)
stop.set()
for thread in threads:
    thread.join()
print("fine", len(wrong))
"""
    assert run_script(body, tmp_path, forks, limit=TIME_LIMIT + forks) == "fine 0"


@pytest.mark.parametrize("forks", short_and_long(10, 200))
def test_forks_in_a_row_each_with_a_fork_of_its_own(tmp_path, forks):
    body = """
def child():
    return warm() and child_is_fine()
for _ in range(int(sys.argv[1])):
    warm()
    assert child_is_fine(child)
print("fine", warm())
"""
    assert run_script(body, tmp_path, forks, limit=TIME_LIMIT + forks) == "fine True"


@needs_libgomp
@needs_proc
def test_the_child_has_the_team_of_its_parent(tmp_path):
    body = """
child_is_fine(lambda: True) # OpenBLAS gives its threads up for a fork
others = tasks()
for team in (2, 3, 8, 4):
    def work():
        alone = tasks()
        return step(team=team) == BITS and tasks() - alone == team - 1
    assert step(team=team) == BITS
    assert tasks() - others == team - 1
    assert child_is_fine(lambda: work() and child_is_fine(work)), team
    assert step(team=team) == BITS
    assert tasks() - others == team - 1
print("the same")
"""
    assert run_script(body, tmp_path) == "the same"


NO_PAUSE = "int omp_pause_resource_all(int kind) { (void)kind; return -1; }"


@needs_libgomp
@needs_proc
def test_where_the_pool_cannot_be_paused_the_child_stays_on_one_thread(tmp_path):
    body = """
def work():
    config = bnfast.config()
    assert config["forked_serial"] is True and config["threads"] == 1, config
    assert config["threads_why"] == "a forked child whose OpenMP threads could not be paused"
    assert bnfast.get_num_threads() == 1
    alone = tasks()
    return step() == BITS and tasks() == alone and child_is_fine(lambda: step() == BITS)
warm()
print(child_is_fine(work), bnfast.config()["forked_serial"], warm())
"""
    library = c_library(tmp_path, NO_PAUSE)
    assert run_script(body, tmp_path, LD_PRELOAD=preloaded(library)) == "True False True"


def test_a_layer_trains_on_in_the_child(tmp_path):
    body = """
x, dy = batch(), batch(1)
def train(bn, steps):
    with bnfast.num_threads(2):
        for _ in range(steps):
            bn(x)
            bn.backward(dy)
    return hashlib.sha256(bn.running_var.tobytes() + bn.grad_gamma.tobytes()).hexdigest()
bn = bnfast.BatchNorm(16)
train(bn, 2)
expected = train(bnfast.BatchNorm(16), 5)
print(child_is_fine(lambda: train(bn, 3) == expected), bn.num_batches_tracked)
"""
    assert run_script(body, tmp_path) == "True 2"


def test_a_layer_works_in_the_child_whatever_another_thread_was_doing_with_it(tmp_path):
    """Another thread is in the middle of a forward when this one forks."""
    body = """
bn, x = bnfast.BatchNorm(16), batch()
inside, leave = threading.Event(), threading.Event()
right = bnfast.layer._core.forward_of
class Slow:
    def __getattr__(self, name):
        return getattr(core, name)
    def forward_of(self, *arguments):
        if threading.current_thread() is thread:
            inside.set()
            leave.wait(150)
        return right(*arguments)
core, bnfast.layer._core = bnfast.layer._core, Slow()
thread = threading.Thread(target=lambda: bn.forward(x), daemon=True)
thread.start()
assert inside.wait(60)
def work():
    bn(x)
    return bn.num_batches_tracked == 1
pid = start_child(work)
print(end_of(pid))
leave.set()
thread.join()
assert bn.num_batches_tracked == 1
"""
    assert run_script(body, tmp_path) == "0"


def test_subprocess_with_a_function_to_run_before_exec(tmp_path):
    body = """
import subprocess
warm()
def before_exec():
    assert step() == BITS
run = subprocess.run([sys.executable, "-c", "print('fine')"], preexec_fn=before_exec, capture_output=True, timeout=100)
print(run.stdout.decode().strip(), warm())
"""
    assert run_script(body, tmp_path) == "fine True"


@pytest.mark.parametrize("method", ["fork", "forkserver", "spawn"])
def test_multiprocessing_pools(tmp_path, method):
    body = """
import multiprocessing

def work(i):
    return step()

if __name__ == "__main__":
    warm()
    with multiprocessing.get_context(sys.argv[1]).Pool(2) as pool:
        results = pool.map(work, range(4), chunksize=1)
    print(set(results) == {BITS}, warm())
"""
    assert run_script(body, tmp_path, method) == "True True"


# --- beside other libraries ----------------------------------------------------------------------------------


def use_torch():
    return """
import torch
def use():
    a = torch.ones(64, 32, 32, 32, requires_grad=True)
    torch.set_num_threads(2)
    torch.nn.BatchNorm2d(32)(a).sum().backward()
"""


def use_scikit_learn():
    return """
from sklearn.cluster import KMeans
def use():
    KMeans(8, n_init=1, max_iter=5, random_state=0).fit(np.random.default_rng(0).random((4000, 8)))
"""


OTHERS = {"torch": ("torch", use_torch()), "scikit-learn": ("sklearn", use_scikit_learn())}


def test_fork_after_pytorch_and_scikit_learn_were_imported_first_and_used(tmp_path):
    """Three copies of libgomp, each with a pool."""
    for module, _ in OTHERS.values():
        pytest.importorskip(module, reason=f"{module} is not installed")
    use = "".join(f"{use}use_{module} = use\n" for module, use in OTHERS.values())
    body = """
for _ in range(5):
    use_torch(), use_sklearn(), warm()
    assert child_is_fine(lambda: warm() and child_is_fine())
print(warm())
"""
    head = "import warnings\nwarnings.simplefilter('ignore')\nimport numpy as np\n" + use + HEAD
    assert run_script(body, tmp_path, head=head) == "True"


@pytest.mark.parametrize("bnfast_used_too", [True, False], ids=["both_used_in_the_parent", "only_the_other_used"])
@pytest.mark.parametrize(("module", "use"), OTHERS.values(), ids=OTHERS.keys())
def test_fork_after_another_library_was_imported_first_and_used(tmp_path, module, use, bnfast_used_too):
    """It may have brought the OpenMP library that bnfast then uses as well: its pool is ours."""
    pytest.importorskip(module, reason=f"{module} is not installed")
    body = f"use()\n{'warm()' if bnfast_used_too else ''}\nprint(child_is_fine())\nuse()\nwarm()\n"
    # what other libraries warn about is not our concern
    head = "import warnings\nwarnings.simplefilter('ignore')\nimport numpy as np\n" + use + HEAD
    assert run_script(body, tmp_path, head=head) == "True"


@needs_libgomp
@pytest.mark.parametrize("order", ["library_first", "bnfast_first"])
def test_fork_after_another_user_of_the_same_libgomp(tmp_path, order):
    """As in a conda environment, or where everything comes from the system: one libgomp for all."""
    library = c_library(tmp_path, TEAM_LIBRARY, "-fopenmp")
    load = f"import ctypes\nlibrary = ctypes.CDLL({library!r})\n"
    head = load + HEAD if order == "library_first" else HEAD + load
    body = "assert library.team() == 2\nprint(child_is_fine())\nassert library.team() == 2\nwarm()\n"
    assert run_script(body, tmp_path, head=head) == "True"
