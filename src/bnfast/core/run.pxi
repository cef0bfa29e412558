# Running a job: on how many threads, in which memory, and the only parallel loop.

# Bytes of workspace that need no allocation.
cdef enum:
    WORKSPACE_ON_STACK = 12288
    # So much is an array of NumPy's, which asks for large pages: malloc maps and gives back each time what is over
    # 32 MiB, and in small pages to meet that memory again took half the time of calls with millions of channels.
    LARGE_WORKSPACE = 4 << 20

# Of threads.py: the ContextVar of `with num_threads` (to a pair whose first is a number, or None), and () -> int, the
# CPUs that the system grants. Asked only for work that is not small.
cdef object threads_in_context = None
cdef object available_cpus = None


def set_thread_sources(context, cpus):
    """Installs what says how many threads a call may use: see `threads_in_context` and `available_cpus`."""
    global threads_in_context, available_cpus
    threads_in_context, available_cpus = context, cpus
    bnfast_forget_cpus()


cdef inline void begin_job(bnfast_job *job, bnfast_operation operation) noexcept:
    """Of which nothing else is set. (In its place: a copy of all that would show in the time of small calls.)"""
    memset(job, 0, sizeof(bnfast_job))
    job.operation = operation


cdef void run_alone(bnfast_job *job) noexcept nogil:
    """The phases one after another, on this thread."""
    cdef int phase
    for phase in range(job.n_phases):
        run_phase_alone(job, &job.phases[phase])


cdef void run_phase_alone(bnfast_job *job, bnfast_phase *phase) noexcept nogil:
    cdef Py_ssize_t i, n = phase.n_tasks
    for i in range(n):
        phase.task(job, n - 1 - i if phase.backwards else i, 0)


# How the threads of a team share the tasks of a phase, and where they wait for its end.
ctypedef struct shared_phase:
    bnfast_gate gate
    bnfast_share shares[1]  # one for each thread


cdef size_t phase_bytes(int n_threads) noexcept nogil:
    return sizeof(bnfast_gate) + n_threads * sizeof(bnfast_share)


cdef shared_phase *shared_at(char *memory, int p, int n_threads) noexcept nogil:
    return <shared_phase *>(memory + p * phase_bytes(n_threads))


cdef void run(bnfast_job *job, char *memory) noexcept:
    """The parallel loop: the phases one after another, the tasks of each on job.n_threads threads, without the GIL.

    One region for all phases: a thread goes on when the tasks of a phase are done, whoever did them, so a team is
    waited for once a call, at its end. memory: phase_bytes for each phase.
    It lets go of the GIL itself: in a function without it, Cython's prange asks CPython whether there is one to let go
    of, and before 3.12 the answer is wrong once there has been a sub-interpreter; the process aborts.
    """
    cdef int p, thread, n_threads = job.n_threads, first = 0
    cdef shared_phase *phase
    cdef unsigned long long control, workers_own
    with nogil:
        control = bnfast_float_control()
        while first < job.n_phases and (n_threads == 1 or job.phases[first].n_tasks == 1):
            run_phase_alone(job, &job.phases[first])
            first += 1
        for p in range(first, job.n_phases):
            phase = shared_at(memory, p, n_threads)
            bnfast_gate_close(&phase.gate)
            bnfast_share_out(phase.shares, n_threads, job.phases[p].n_tasks, job.phases[p].backwards)
        if first < job.n_phases:
            bnfast_late_region_begins()
            for thread in prange(n_threads, schedule="static", chunksize=1, num_threads=n_threads):
                bnfast_rivals_exclude_me()
                workers_own = bnfast_float_control()
                bnfast_set_float_control(control)
                bnfast_late_nothing_left(thread, run_shares(job, memory, first, thread))
                bnfast_set_float_control(workers_own)
            bnfast_late_region_ends()


cdef Py_ssize_t run_shares(bnfast_job *job, char *memory, int first, int thread) noexcept nogil:
    """Of each phase from the first-th on, a thread's own share of the tasks, and what is left of the others'.

    -> how many it did.
    """
    cdef int i, p
    cdef Py_ssize_t task, done = 0
    cdef shared_phase *phase
    for p in range(first, job.n_phases):
        if p > first:
            bnfast_gate_pass(&phase.gate, job.phases[p - 1].n_tasks)
        phase = shared_at(memory, p, job.n_threads)
        for i in range(job.n_threads):
            while True:
                task = bnfast_take(&phase.shares[(thread + i) % job.n_threads])
                if task < 0:
                    break
                job.phases[p].task(job, task, thread)
                bnfast_gate_note(&phase.gate)
                done += 1
    return done


cdef int find_budget(bnfast_budget *found) except -1:
    """What the calling thread may use."""
    cdef object in_context = get_value(threads_in_context)
    cdef long n = 0 if in_context is None else (<tuple>in_context)[0]
    if bnfast_cpus_are_old():
        bnfast_set_cpus(available_cpus())
    found[0] = bnfast_budget_now(n)
    return 0


cpdef int team_for(Py_ssize_t elements, Py_ssize_t worth=1 << 30) except -1:
    """How many threads the calling thread may use for so much work, which is worth so many."""
    cdef bnfast_budget budget
    find_budget(&budget)
    cdef int team = min(budget.n, worth)
    if team > 1 and not budget.in_code and (not bnfast_waking_pays(elements) or bnfast_late_better_alone(elements)):
        return 1
    return team if budget.chosen else bnfast_rivals_leave(team, elements)


cdef int compute(bnfast_job *job, cnp.ndarray x) except -1:
    """Plans and runs a job whose arrays are set; job.u, if any, lies as x does."""
    if job.kernels == NULL:
        job.kernels = bnfast_active(dtype_of(x))
    if bnfast_is_subnormal(job):
        compute_lifted(job, x)
    else:
        plan_and_run(job)
    if bnfast_openmp_take_shortage():
        warnings.warn("bnfast: the system refused to start threads; calls go on with fewer", RuntimeWarning,
                      stacklevel=2)
    return 0


cdef int plan_and_run(bnfast_job *job) except -1:
    """One job, whose kernels are chosen."""
    cdef Py_ssize_t elements = job.outer * job.channels * job.inner
    cdef Py_ssize_t more
    cdef char on_stack[WORKSPACE_ON_STACK]  # an allocation costs small calls a twentieth of their time
    cdef char *memory = on_stack
    cdef cnp.ndarray large = None  # whose memory it is, where there is much of it
    cdef cnp.npy_intp size
    cdef char *shared = NULL
    cdef Py_ssize_t worth
    cdef bint small  # done at once by the calling thread, which keeps the GIL
    cdef int budget = 1
    job.n_threads = 1
    worth = bnfast_threads_worth(job)
    small = worth == 1
    if not small:
        budget = team_for(elements, worth)
        job.n_threads = bnfast_openmp_enter(budget)
    bnfast_plan(job)
    more = 0 if small else job.n_phases * <Py_ssize_t>phase_bytes(job.n_threads)  # the threads' shares of each phase
    if may_lift(job):
        more += job.channels
    size = more + job.workspace_bytes + 64
    if size >= LARGE_WORKSPACE:
        try:
            large = cnp.PyArray_EMPTY(1, &size, cnp.NPY_UINT8, 0)
            memory = cnp.PyArray_BYTES(large)
        except MemoryError:
            memory = NULL
    elif size > WORKSPACE_ON_STACK:
        memory = <char *>PyMem_RawMalloc(size)
    if memory == NULL:
        if not small:
            bnfast_openmp_leave(budget, job.n_threads)
        raise MemoryError(f"no memory for {size} bytes of workspace")
    job.workspace = memory + (-<uintptr_t>memory & 63)
    if not small:
        shared = job.workspace
        job.workspace += job.n_phases * phase_bytes(job.n_threads)
    if may_lift(job):
        job.lifted = <unsigned char *>memset(job.workspace + job.workspace_bytes, 0, job.channels)
    if small:
        run_alone(job)
        lower_what_is_lifted(job, NULL)
    else:
        run(job, shared)
        lower_what_is_lifted(job, shared)
        bnfast_openmp_leave(budget, job.n_threads)
    if memory != on_stack and large is None:
        PyMem_RawFree(memory)
    return 0
