# Running a job: on how many threads, in which memory, and the only parallel loop.

# Work of fewer elements than this is done at once by the calling thread, which keeps the GIL.
cdef Py_ssize_t SMALL = 1 << 16

# What a thread of a team should at least have to do, in elements.
cdef Py_ssize_t SHARE = 1 << 15

# Of threads.py: the ContextVar of `with num_threads` (to a pair whose first is a number, or None), and () -> int, the
# CPUs that the system grants. Asked only for work that is not small.
cdef object threads_in_context = None
cdef object available_cpus = None


def set_thread_sources(context, cpus):
    """Installs what says how many threads a call may use: see `threads_in_context` and `available_cpus`."""
    global threads_in_context, available_cpus
    threads_in_context, available_cpus = context, cpus
    bnfast_forget_cpus()


cdef bnfast_job new_job(bnfast_operation operation) noexcept:
    cdef bnfast_job job
    memset(&job, 0, sizeof(job))
    job.operation = operation
    return job


cdef void run_alone(bnfast_job *job) noexcept nogil:
    """The phases one after another, on this thread."""
    cdef int phase
    for phase in range(job.n_phases):
        run_phase_alone(job, &job.phases[phase])


cdef void run_phase_alone(bnfast_job *job, bnfast_phase *phase) noexcept nogil:
    cdef Py_ssize_t i, n = phase.n_tasks
    for i in range(n):
        phase.task(job, n - 1 - i if phase.backwards else i, 0)


cdef void run(bnfast_job *job, bnfast_share *shares) noexcept:
    """The parallel loop: the phases one after another, the tasks of each on job.n_threads threads, without the GIL.

    It lets go of the GIL itself: in a function without it, Cython's prange asks CPython whether there is one to let go
    of, and before 3.12 the answer is wrong once there has been a sub-interpreter; the process aborts.
    """
    cdef int p, thread, n_threads = job.n_threads
    cdef bnfast_phase *phase
    cdef unsigned long long control, workers_own
    with nogil:
        control = bnfast_float_control()
        for p in range(job.n_phases):
            phase = &job.phases[p]
            if n_threads == 1 or phase.n_tasks == 1:
                run_phase_alone(job, phase)
                continue
            bnfast_share_out(shares, n_threads, phase.n_tasks, phase.backwards)
            bnfast_late_region_begins()
            for thread in prange(n_threads, schedule="static", chunksize=1, num_threads=n_threads):
                bnfast_rivals_exclude_me()
                workers_own = bnfast_float_control()
                bnfast_set_float_control(control)
                bnfast_late_nothing_left(thread, run_shares(job, phase, shares, thread))
                bnfast_set_float_control(workers_own)
            bnfast_late_region_ends()


cdef Py_ssize_t run_shares(bnfast_job *job, bnfast_phase *phase, bnfast_share *shares, int thread) noexcept nogil:
    """A thread's own share of the tasks of a phase, and what is left of the others'; returns how many it did."""
    cdef int i
    cdef Py_ssize_t task, done = 0
    for i in range(job.n_threads):
        while True:
            task = bnfast_take(&shares[(thread + i) % job.n_threads])
            if task < 0:
                break
            phase.task(job, task, thread)
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


cpdef int team_for(Py_ssize_t elements) except -1:
    """How many threads the calling thread may use for work that is not small."""
    cdef bnfast_budget budget
    find_budget(&budget)
    cdef int team = min(budget.n, max(1, elements // SHARE))
    if team > 1 and not budget.in_code and (not bnfast_waking_pays(elements) or bnfast_late_better_alone(elements)):
        return 1
    return team if budget.chosen else bnfast_rivals_leave(team, elements)


cdef char *kept(bnfast_parameter *parameter, Py_ssize_t channels, char *at) noexcept:
    """Copies a parameter to `at`, and has it read from there; returns what is behind it."""
    if parameter.wide != NULL:
        memcpy(at, parameter.wide, channels * 8)
        parameter.wide = <const double *>at
    elif parameter.narrow != NULL:
        memcpy(at, parameter.narrow, channels * 4)
        parameter.narrow = <const float *>at
    return at + channels * 8


cdef int compute(bnfast_job *job, cnp.ndarray x) except -1:
    """Plans and runs a job whose arrays are set; job.u, if any, lies as x does."""
    cdef Py_ssize_t elements = job.outer * job.channels * job.inner
    cdef Py_ssize_t more
    cdef char *memory
    cdef char *at
    cdef bnfast_share *shares
    cdef bint small = elements < SMALL
    cdef int budget = 1
    job.kernels = bnfast_active(cnp.PyArray_ITEMSIZE(x))
    job.n_threads = 1
    if not small:
        budget = team_for(elements)
        job.n_threads = bnfast_openmp_enter(budget)
    bnfast_plan(job)
    # what the threads need besides: their shares, and the parameters as they are now, which others may change meanwhile
    more = 0 if small else job.n_threads * <Py_ssize_t>sizeof(bnfast_share) + 4 * job.channels * 8
    memory = <char *>PyMem_RawMalloc(more + job.workspace_bytes + 64)
    if memory == NULL:
        if not small:
            bnfast_openmp_leave(budget, job.n_threads)
        raise MemoryError(f"no memory for {job.workspace_bytes} bytes of workspace")
    job.workspace = memory + (-<uintptr_t>memory & 63)
    if small:
        run_alone(job)
    else:
        shares = <bnfast_share *>job.workspace
        job.workspace += job.n_threads * sizeof(bnfast_share)
        at = job.workspace + job.workspace_bytes
        at = kept(&job.gamma, job.channels, at)
        at = kept(&job.beta, job.channels, at)
        at = kept(&job.vgamma, job.channels, at)
        at = kept(&job.vbeta, job.channels, at)
        run(job, shares)
        bnfast_openmp_leave(budget, job.n_threads)
    PyMem_RawFree(memory)
    if bnfast_openmp_take_shortage():
        warnings.warn("bnfast: the system refused to start threads; calls go on with fewer", RuntimeWarning,
                      stacklevel=3)
    return 0
