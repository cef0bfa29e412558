# Results and gradients too small for ordinary numbers, which some CPUs are slow with: taken times a power of two
# meanwhile (kernels/subnormal.c).

cdef inline bint may_lift(const bnfast_job *job) noexcept:
    """Whether the job may leave results of some channels times a power of two."""
    return (job.out != NULL and job.kernels.lift_exponent != 0
            and job.operation != BNFAST_LIFT and job.operation != BNFAST_LOWER)


cdef void lower_what_is_lifted(const bnfast_job *job, char *shared) noexcept:
    """The end of a job that may have done so. shared: the memory of its phases; NULL: it ran on this thread alone."""
    cdef bnfast_job lower
    if job.lifted == NULL or memchr(job.lifted, 1, job.channels) == NULL:
        return
    lower = job[0]
    lower.operation = BNFAST_LOWER
    bnfast_plan(&lower)
    if shared == NULL:
        run_alone(&lower)
    else:
        run(&lower, shared)


cdef int lower_all(const bnfast_job *job, void *out) except -1:
    cdef bnfast_job lower = new_job(BNFAST_LOWER)
    lower.kernels, lower.outer, lower.channels, lower.inner = job.kernels, job.outer, job.channels, job.inner
    lower.out = out
    return plan_and_run(&lower)


cdef int compute_lifted(bnfast_job *job, cnp.ndarray x) except -1:
    """A backward whose u is subnormal in places: all of it is taken times a power of two, and so are its results, until
    they are there. If some of u is too large for that, as it is."""
    cdef bnfast_job lift = new_job(BNFAST_LIFT)
    cdef cnp.ndarray buffer, sums = None
    cdef int beyond = 0, exponent = job.kernels.lift_exponent
    cdef Py_ssize_t channels = job.channels, i
    lift.kernels, lift.outer, lift.channels, lift.inner = job.kernels, job.outer, channels, job.inner
    lift.x, lift.infinite = job.u, &beyond
    if job.out != NULL and job.out != job.x and job.out != job.u and job.out != job.residual:
        lift.out = job.out  # where it can lie until dx is written over it
    else:
        buffer = PyArray_NewLikeArray(x, cnp.NPY_KEEPORDER, NULL, False)
        lift.out = cnp.PyArray_DATA(buffer)
    plan_and_run(&lift)
    if beyond:
        return plan_and_run(job)
    job.u = lift.out
    if job.operation == BNFAST_BACKWARD_APPLY:  # whose sums are given
        sums = new_block(2, channels, False)
        for i in range(channels):
            values(sums)[i] = ldexp(job.dbeta[i], exponent)
            values(sums)[channels + i] = ldexp(job.dgamma[i], exponent)
        job.dbeta, job.dgamma = values(sums), values(sums) + channels
    plan_and_run(job)
    if job.out != NULL:
        lower_all(job, job.out)
    if job.passed != NULL and job.passed != job.out:
        lower_all(job, job.passed)
    for i in range(channels if sums is None and job.dbeta != NULL else 0):
        job.dbeta[i], job.dgamma[i] = ldexp(job.dbeta[i], -exponent), ldexp(job.dgamma[i], -exponent)
    return 0
