# Steps of a layer whose batch lies on several processes: each reduces its part, all exchange one row, each maps its
# own.

cdef cnp.ndarray new_row(double code, Py_ssize_t n_numbers):
    """(code, 0, numbers of the channels), which are not set yet."""
    cdef cnp.npy_intp width = 2 + n_numbers
    cdef cnp.ndarray row = cnp.PyArray_EMPTY(1, &width, cnp.NPY_FLOAT64, 0)
    values(row)[0], values(row)[1] = code, 0.0
    return row


cdef void set_nothing(cnp.ndarray row) noexcept:
    """The numbers of an empty part."""
    memset(values(row) + 2, 0, (cnp.PyArray_DIM(row, 0) - 2) * sizeof(double))


cdef int reduce_part(Forward forward, cnp.ndarray row) except -1:
    """Count, mean, m2 and what the mean was rounded by, of this process's part."""
    cdef bnfast_job job
    begin_job(&job, BNFAST_MOMENTS)
    cdef cnp.ndarray data = forward.x
    cdef int axis = forward.axis
    cdef Positions there = forward.positions()
    if there is not None:
        data, axis = there.gather(data, "x"), 1
    values(row)[1] = forward.count
    if cnp.PyArray_SIZE(data) == 0:
        set_nothing(row)
    else:
        data = packed(data, axis, &job)
        job.x = cnp.PyArray_DATA(data)
        job.mean, job.m2 = values(row) + 2, values(row) + 2 + forward.channels
        job.mean_rest = values(row) + 2 + 2 * forward.channels
        compute(&job, data)
    return 0


cdef int take_statistics(Forward forward, cnp.ndarray rows, bnfast_job *job) except -1:
    """Those of the whole batch, from the rows of all, for a job that maps with them."""
    cdef Py_ssize_t channels = forward.channels, width = cnp.PyArray_DIM(rows, 1)
    cdef double *merged = values(rows) + 1
    cdef const double *m2 = merged + 1 + channels
    bnfast_merge_moments_rows(merged, cnp.PyArray_DIM(rows, 0), width, channels)
    cdef double count = merged[0]
    if count < 2:
        raise ValueError("Expected more than 1 value per channel when training, "
                         f"got {count:.0f} on all processes together")
    memcpy(forward.row(MEAN), merged + 1, channels * sizeof(double))
    memcpy(forward.row(M2), m2, channels * sizeof(double))
    if forward.count == 0:
        memset(forward.row(INV_STD), 0, channels * sizeof(double))  # which a map of nothing does not make
    if forward.mean_rest() != NULL:
        memcpy(forward.mean_rest(), m2 + channels, channels * sizeof(double))
    check_range(m2, forward.row(MEAN), channels)
    job.count, job.mean, job.mean_rest = count, forward.row(MEAN), forward.mean_rest()
    job.m2, job.inv_std = forward.row(M2), forward.row(INV_STD)
    return 0


cdef tuple forward_together(AtomicReference contents, Options options, Processes processes, x, gamma, beta, double eps,
                            momentum, int keep, bint update, out, tuple living, residual, mask):
    """-> (y, Forward) of this process's part x of a training batch, whose contents are exchanged for those after it."""
    cdef Forward forward
    cdef bnfast_job job
    begin_job(&job, BNFAST_EVAL)
    cdef cnp.ndarray y, given_out, row, rows
    processes.begin()
    row = new_row(processes.code(FOR_FORWARD), 3 * options.channels)
    try:
        forward = new_forward(contents, options, x, gamma, beta, eps, True, residual, mask)
        given_out = as_out(out, forward.x)
        as_positive_eps(eps)
        reduce_part(forward, row)
    except BaseException as error:
        processes.refuse(FOR_FORWARD, cnp.PyArray_DIM(row, 0), error)
        raise
    rows = processes.sent(row, processes.code(FOR_FORWARD))
    take_statistics(forward, rows, &job)
    job.eps = eps
    forward.set_parameters(&job)
    y = mapped_there(forward, &job, given_out, keep)
    forward.count, forward.processes = <Py_ssize_t>values(rows)[1], processes
    seal(forward, out, living)
    if options.raises:
        forward.check_finite()
    if options.tracks and update:
        commit_training(contents, options, forward, keep, momentum)
    else:
        commit_forward(contents, forward, keep)
    return y, forward


cdef int sum_part(bnfast_job *job, cnp.ndarray x, cnp.ndarray u, int axis, cnp.ndarray row) except -1:
    """dgamma and dbeta of this process's part."""
    cdef cnp.ndarray data
    cdef Py_ssize_t channels = (cnp.PyArray_DIM(row, 0) - 2) // 2
    if cnp.PyArray_SIZE(x) == 0:
        set_nothing(row)
        return 0
    job.dgamma, job.dbeta = values(row) + 2, values(row) + 2 + channels
    data = packed(x, axis, job)
    u = packed_like(u, data)
    job.x, job.u = cnp.PyArray_DATA(data), cnp.PyArray_DATA(u)
    return compute(job, data)


cdef tuple backward_together(Forward forward, dy, out, tuple living, dtype, out_residual):
    """As `backward_of`, of a forward of this process's part: dgamma and dbeta are those of the part."""
    cdef Processes processes = forward.processes
    cdef Py_ssize_t channels = forward.channels
    cdef bnfast_job job, apply
    begin_job(&job, BNFAST_BACKWARD_SUMS)
    begin_job(&apply, BNFAST_BACKWARD_APPLY)
    cdef cnp.ndarray x = forward.x, u, given_out, given_out_residual, row, rows
    cdef int type_number = cnp.NPY_FLOAT32 if dtype.itemsize == 4 else cnp.NPY_FLOAT64, axis = forward.axis
    cdef Positions there
    cdef double *sums
    processes.begin()
    row = new_row(processes.code(FOR_BACKWARD), 2 * channels)
    sums = values(row) + 2
    try:
        forward.check()
        u = as_companion(dy, "dy", x)
        given_out = as_out(out, x)
        given_out_residual = as_out_residual(out_residual, given_out, forward.has_residual, x)
        there = forward.positions()
        if there is not None:
            x, u, axis = there.gather(x, "x"), there.gather(u, "dy"), 1
        for each in (0, 1):
            of = &job if each == 0 else &apply
            forward.set_parameters(of)
            of.mean, of.inv_std, of.mean_rest = forward.row(MEAN), forward.row(INV_STD), forward.mean_rest()
        forward.set_marks(&job)
        sum_part(&job, x, u, axis, row)
    except BaseException as error:
        processes.refuse(FOR_BACKWARD, cnp.PyArray_DIM(row, 0), error)
        raise
    rows = processes.sent(row, processes.code(FOR_BACKWARD))
    bnfast_merge_sums_rows(values(rows) + 1, cnp.PyArray_DIM(rows, 0), cnp.PyArray_DIM(rows, 1), 2 * channels)
    forward.set_marks(&apply)
    apply.count = forward.count
    apply.dgamma, apply.dbeta = values(rows) + 2, values(rows) + 2 + channels
    dx, dresidual = mapped_back_there(forward, &apply, there, x, u, axis, given_out, given_out_residual)
    note_gradients(forward, out, out_residual, living)
    return dx, dresidual, rounded(sums, channels, type_number), rounded(sums + channels, channels, type_number)
