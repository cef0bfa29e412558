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


cdef bint lower_all(const bnfast_job *job, void *out) except -1:
    """Whether something was too large, and has been left."""
    cdef bnfast_job lower
    begin_job(&lower, BNFAST_LOWER)
    cdef int beyond = 0
    lower.kernels, lower.outer, lower.channels, lower.inner = job.kernels, job.outer, job.channels, job.inner
    lower.out, lower.infinite = out, &beyond
    plan_and_run(&lower)
    return beyond


cdef bint scale_sums(double *sums, Py_ssize_t channels, int exponent) noexcept:
    """Whether all are finite."""
    cdef Py_ssize_t i
    cdef bint finite = True
    for i in range(channels):
        finite = finite and sums[i] - sums[i] == 0.0
        sums[i] = ldexp(sums[i], exponent)
    return finite


cdef int compute_lifted(bnfast_job *given, cnp.ndarray x) except -1:
    """A backward whose u is subnormal in places: all of it is taken times a power of two, and so are its results, until
    they are there. If some of u, or of them, is too large for that, as it is."""
    cdef bnfast_job job = given[0], lift
    begin_job(&lift, BNFAST_LIFT)
    cdef Py_ssize_t channels = job.channels
    cdef bint has_sums = given.dbeta != NULL or given.narrow_dbeta != NULL
    cdef bint gives_sums = has_sums and job.operation != BNFAST_BACKWARD_APPLY
    cdef bint written_over = job.u == job.out or job.u == job.passed  # u, in the end
    cdef int beyond = 0, exponent = job.kernels.lift_exponent
    cdef cnp.ndarray buffer, apart = None, sums = new_block(2, channels)
    if job.passed != NULL and job.passed == job.residual:
        return plan_and_run(given)  # what is read for it could not be read again
    if job.out != NULL and (job.out == job.x or job.out == job.residual):  # nor that
        apart = PyArray_NewLikeArray(x, cnp.NPY_KEEPORDER, NULL, False)
        job.out = cnp.PyArray_DATA(apart)
        if job.passed == given.out:
            job.passed = job.out
    lift.kernels, lift.outer, lift.channels, lift.inner = job.kernels, job.outer, channels, job.inner
    lift.x, lift.infinite = job.u, &beyond
    if job.out != NULL and not written_over:
        lift.out = job.out  # where it can lie until dx is written over it
    else:
        buffer = PyArray_NewLikeArray(x, cnp.NPY_KEEPORDER, NULL, False)
        lift.out = cnp.PyArray_DATA(buffer)
    plan_and_run(&lift)
    if beyond:
        return plan_and_run(given)
    job.u = lift.out
    if has_sums:
        if not gives_sums:
            memcpy(values(sums), job.dbeta, channels * sizeof(double))
            memcpy(values(sums) + channels, job.dgamma, channels * sizeof(double))
            scale_sums(values(sums), 2 * channels, exponent)
        job.dbeta, job.dgamma = values(sums), values(sums) + channels
        job.narrow_dbeta = job.narrow_dgamma = NULL
    plan_and_run(&job)
    if has_sums:
        beyond = not scale_sums(values(sums), 2 * channels, -exponent)
    if job.out != NULL:
        beyond = lower_all(&job, job.out) or beyond
    if job.passed != NULL and job.passed != job.out:
        beyond = lower_all(&job, job.passed) or beyond
    if beyond:  # from the beginning
        if written_over:
            lower_all(&job, lift.out)
            given.u = lift.out
        return plan_and_run(given)
    if apart is not None:
        memcpy(given.out, job.out, cnp.PyArray_NBYTES(apart))
    if gives_sums:
        round_or_copy(job.dbeta, channels, given.dbeta, given.narrow_dbeta)
        round_or_copy(job.dgamma, channels, given.dgamma, given.narrow_dgamma)
    return 0
