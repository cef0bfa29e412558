# What was built, what this machine has, and what is running: for reports, tests and the modules of runtime/.

def set_process_threads(long n):
    """For the process; 0: nothing is said."""
    bnfast_set_process_threads(n)


def set_environment_threads(long n, bint omp_num_threads_is_set):
    """BNFAST_NUM_THREADS, 0 without, and whether OMP_NUM_THREADS has a number."""
    bnfast_set_environment_threads(n, omp_num_threads_is_set)


def thread_budget():
    """-> (n, why, chosen): as budget.h says, for a large call from here."""
    cdef bnfast_budget budget
    find_budget(&budget)
    return budget.n, budget.why, bool(budget.chosen)


def set_spin_count(long turns):
    """How many turns an idle worker waits before it sleeps; 0: not known, waking is taken to cost nothing."""
    bnfast_waking_init(turns)


def pretend_late(long long task, long long waited):
    """As if a region had ended in which this thread's tasks took, and it waited for others, so many us. For tests."""
    bnfast_late_pretend(task, waited)


def set_patience(long long microseconds):
    """How long others may be waited for before they count as late; a negative number: what is usual. For tests."""
    bnfast_late_set_patience(microseconds)


def pretend_last_call(double seconds_ago, long long elements=0):
    """As if this thread's last large call had ended so long ago, and so many elements were the burst's. For tests."""
    bnfast_waking_pretend(<long long>(seconds_ago * 1e9), elements)


def seconds_awake():
    """How long a worker waits before it sleeps, 0 if that is not known."""
    return bnfast_waking_awake() * 1e-9


def age_cpus(double seconds):
    """As if the system had been asked for its CPUs so much earlier. For tests."""
    bnfast_age_cpus(<long long>(seconds * 1e9))


def decide_threads(**facts):
    """-> (n, why, chosen): what the rules say where these facts (budget.h) are so, the others 0. For tests."""
    cdef bnfast_facts given = {
        name: facts.pop(name, 0)
        for name in ("context", "process", "environment", "omp_num_threads_is_set", "openmp", "limit", "has_openmp",
                     "forked_serial", "cpus")}
    cdef bnfast_budget budget = bnfast_decide(&given)
    return budget.n, budget.why, bool(budget.chosen)


def isa():
    """Name of the active instruction set."""
    return bnfast_active(BNFAST_FLOAT32).isa.decode()


def isas():
    """{name: (compiled, supported by this CPU)}, narrowest first."""
    cdef int i = 0
    found = {}
    while bnfast_isa_name(i) != NULL:
        found[bnfast_isa_name(i).decode()] = (bool(bnfast_isa_compiled(i)), bool(bnfast_isa_supported(i)))
        i += 1
    return found


def select_isa(str name=None):
    """Makes an instruction set the active one; None: the widest this CPU has. ValueError if that cannot be."""
    cdef bytes encoded
    cdef int status
    if name is None:
        status = bnfast_select(NULL)
    else:
        encoded = name.encode()
        status = bnfast_select(encoded)
    if status == -1:
        raise ValueError(f"BNFAST_ISA: expected one of {', '.join(isas())}, got {name!r}")
    if status == -2:
        usable = [known for known, (_, supported) in isas().items() if supported]
        raise ValueError(f"BNFAST_ISA: {name!r} was not compiled in or is not on this CPU; usable: {', '.join(usable)}")


def cache_bytes():
    """(L2, last level) of this CPU."""
    return bnfast_l2_bytes(), bnfast_last_level_bytes()


def last_level_is_far():
    """Whether plans take the last level of cache for slow to reach: it is said to be large."""
    return bool(bnfast_last_level_is_far())


def set_cache_bytes(Py_ssize_t l2, Py_ssize_t last_level):
    """For tests: as if this CPU had such caches. They decide what is done in which order, never a bit of a result."""
    bnfast_set_caches(l2, last_level)


def openmp_version():
    """The compiler's _OPENMP date, 0 for a build without OpenMP."""
    return bnfast_openmp_version()


def openmp_library():
    """Path of the OpenMP runtime, '' if unknown."""
    return bnfast_openmp_library().decode("utf-8", "replace")


def openmp_max_threads():
    """What OpenMP would use in the calling thread (environment, threadpoolctl)."""
    return bnfast_openmp_max_threads()


def openmp_thread_limit():
    """OMP_THREAD_LIMIT, or a very large number."""
    return bnfast_openmp_thread_limit()


def fork_handled():
    """Whether a forked child may use threads whatever its parent did."""
    return bool(bnfast_openmp_fork_handled())


def handle_fork(bint on):
    """Switches the fork handlers off and on, for the test that shows the hang they prevent."""
    bnfast_openmp_handle_fork(on)


def forked_serial():
    """Whether this process is a child that has to stay on one thread."""
    return bool(bnfast_openmp_forked_serial())
