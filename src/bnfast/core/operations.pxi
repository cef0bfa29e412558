# The operations. Each reads check, allocate, compute, return: an error leaves nothing half done.

cdef cnp.ndarray mapped(bnfast_job *job, cnp.ndarray x, cnp.ndarray u, int axis, Py_ssize_t channels,
                        cnp.ndarray out):
    """The result like x of a job whose statistics and parameters are set: in `out`, checked, or in a new array."""
    cdef cnp.ndarray data, result
    # the conversion of another argument may have run anybody's code since x was looked at
    if (cnp.PyArray_NDIM(x) <= axis or cnp.PyArray_DIM(x, axis) != channels
            or (u is not None and not same_shape(u, x)) or (out is not None and not same_shape(out, x))):
        raise RuntimeError("x: expected an array that keeps its shape during the call")
    data = packed(x, axis, job)
    if u is not None:
        u = packed_like(u, data)
    result = target_of(out, data, u)
    if cnp.PyArray_SIZE(data) > 0:
        job.x, job.out = cnp.PyArray_DATA(data), cnp.PyArray_DATA(result)
        if u is not None:
            job.u = cnp.PyArray_DATA(u)
        compute(job, data)
    return delivered(result, out)


cdef int check_variance(const double *var, Py_ssize_t channels, double eps, str prefix) except -1:
    """That it can be divided by."""
    cdef Py_ssize_t i
    if bnfast_active(8).usable_variances(channels, var, eps) == channels:
        return 0
    for i in range(channels):
        if not (var[i] + eps > 0.0 and var[i] - var[i] == 0.0):
            raise ValueError(f"{prefix}var: expected finite values with var + eps above 0, got {var[i]} "
                             f"in channel {i} (eps {eps:g})")
    return 0


def moments(x, axis):
    """-> (count, mean, m2): values a channel, and two (C,) float64 arrays."""
    cdef bnfast_job job = new_job(BNFAST_MOMENTS)
    cdef cnp.ndarray data = as_samples(x, "x")
    cdef int channel_axis = as_axis(axis, data)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(data, channel_axis)
    cdef cnp.ndarray mean, m2
    if cnp.PyArray_SIZE(data) == 0:
        return 0, np.zeros(channels), np.zeros(channels)
    data = packed(data, channel_axis, &job)
    mean, m2 = new_statistics(channels), new_statistics(channels)
    job.x = cnp.PyArray_DATA(data)
    job.mean, job.m2 = values(mean), values(m2)
    compute(&job, data)
    return job.outer * job.inner, mean, m2


def batch_norm(x, gamma, beta, axis, eps, out):
    """-> (y, mean, inv_std); y like x, the others (C,) float64 arrays."""
    cdef bnfast_job job = new_job(BNFAST_FORWARD)
    cdef cnp.ndarray data = as_samples(x, "x")
    cdef int channel_axis = as_axis(axis, data)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(data, channel_axis)
    cdef cnp.ndarray given_out, g, b, mean, inv_std
    job.eps = as_positive_eps(eps)
    given_out = as_out(out, data)
    g = as_parameter(gamma, "gamma", channels, given_out)
    b = as_parameter(beta, "beta", channels, given_out)
    check_count(data, channel_axis)

    mean, inv_std = new_statistics(channels), new_statistics(channels)
    job.gamma, job.beta = parameter(g), parameter(b)
    job.mean, job.inv_std = values(mean), values(inv_std)
    return mapped(&job, data, None, channel_axis, channels, given_out), mean, inv_std


def batch_norm_eval(x, mean, var, gamma, beta, axis, eps, out):
    """-> y like x."""
    cdef bnfast_job job = new_job(BNFAST_EVAL)
    cdef cnp.ndarray data = as_samples(x, "x")
    cdef int channel_axis = as_axis(axis, data)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(data, channel_axis)
    cdef cnp.ndarray given_out, g, b, m, v
    job.eps = as_eps(eps)
    given_out = as_out(out, data)
    m = as_statistics(mean, "mean", channels, given_out)
    v = as_statistics(var, "var", channels, given_out)
    check_variance(values(v), channels, job.eps, "")
    g = as_parameter(gamma, "gamma", channels, given_out)
    b = as_parameter(beta, "beta", channels, given_out)

    job.gamma, job.beta = parameter(g), parameter(b)
    job.mean, job.var = values(m), values(v)
    return mapped(&job, data, None, channel_axis, channels, given_out)


def affine(x, center, scale, shift, out, bint search):
    """-> (y, infinite): y = (x - center) * scale + shift, by columns of a 2-dimensional x; shift may be None.

    infinite: whether x has an infinity, False unless `search`; y is of no use then.
    """
    cdef bnfast_job job = new_job(BNFAST_EVAL)
    cdef cnp.ndarray data = as_samples(x, "x")
    cdef int channel_axis = as_axis(1, data), infinite = 0
    cdef Py_ssize_t channels = cnp.PyArray_DIM(data, channel_axis)
    cdef cnp.ndarray given_out, c, s, t, y
    given_out = as_out(out, data)
    c = as_statistics(center, "center", channels, given_out)
    s = as_statistics(scale, "scale", channels, given_out)
    t = as_parameter(shift, "shift", channels, given_out)

    data = packed(data, channel_axis, &job)
    y = target_of(given_out, data, None)
    if cnp.PyArray_SIZE(data) > 0:
        job.x, job.out = cnp.PyArray_DATA(data), cnp.PyArray_DATA(y)
        job.mean, job.gamma, job.beta = values(c), parameter(s), parameter(t)
        if search:
            job.infinite = &infinite
        compute(&job, data)
    if infinite:
        return y, True
    return delivered(y, given_out), False


cdef cnp.ndarray rounded(const double *statistics, cnp.npy_intp channels, int dtype):
    """(C,) float64 as a new array of dtype NPY_FLOAT32 or NPY_FLOAT64."""
    cdef cnp.ndarray result = cnp.PyArray_EMPTY(1, &channels, dtype, 0)
    if dtype == cnp.NPY_FLOAT64:
        memcpy(cnp.PyArray_DATA(result), statistics, channels * sizeof(double))
    else:
        bnfast_active(4).round_values(channels, statistics, cnp.PyArray_DATA(result))
    return result


def batch_norm_backward(dy, x, mean, inv_std, gamma, axis, training, out):
    """-> (dx, dgamma, dbeta): dx like x, two (C,) arrays of x's dtype."""
    cdef bnfast_job job = new_job(BNFAST_BACKWARD if training else BNFAST_BACKWARD_EVAL)
    cdef cnp.ndarray data = as_samples(x, "x")
    cdef int channel_axis = as_axis(axis, data)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(data, channel_axis)
    cdef cnp.ndarray u = as_companion(dy, "dy", data)
    cdef cnp.ndarray given_out, g, m, s, dx, sums = new_block(2, channels, True)
    given_out = as_out(out, data)
    m = as_statistics(mean, "mean", channels, given_out)
    s = as_statistics(inv_std, "inv_std", channels, given_out)
    g = as_parameter(gamma, "gamma", channels, given_out)
    if training:
        check_count(data, channel_axis)

    job.gamma, job.mean, job.inv_std = parameter(g), values(m), values(s)
    job.dgamma, job.dbeta = values(sums), values(sums) + channels
    dx = mapped(&job, data, u, channel_axis, channels, given_out)
    return (dx, rounded(job.dgamma, channels, cnp.PyArray_TYPE(data)),
            rounded(job.dbeta, channels, cnp.PyArray_TYPE(data)))


def batch_norm_jvp(v, x, mean, inv_std, gamma, axis, vgamma, vbeta, out):
    """-> dy like x."""
    cdef bnfast_job job = new_job(BNFAST_JVP)
    cdef cnp.ndarray data = as_samples(x, "x")
    cdef int channel_axis = as_axis(axis, data)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(data, channel_axis)
    cdef cnp.ndarray u = as_companion(v, "v", data)
    cdef cnp.ndarray given_out, g, m, s, vg, vb
    given_out = as_out(out, data)
    m = as_statistics(mean, "mean", channels, given_out)
    s = as_statistics(inv_std, "inv_std", channels, given_out)
    g = as_parameter(gamma, "gamma", channels, given_out)
    vg = as_parameter(vgamma, "vgamma", channels, given_out)
    vb = as_parameter(vbeta, "vbeta", channels, given_out)
    check_count(data, channel_axis)

    job.gamma, job.vgamma, job.vbeta = parameter(g), parameter(vg), parameter(vb)
    job.mean, job.inv_std = values(m), values(s)
    return mapped(&job, data, u, channel_axis, channels, given_out)


def memory_floor(cnp.ndarray x, cnp.ndarray u, cnp.ndarray out):
    """out = x, or x + u: the least time an operation on such arrays can take. For benchmarks.

    All C-contiguous, of one shape and dtype, float32 or float64; u may be None.
    """
    cdef bnfast_job job = new_job(BNFAST_FLOOR)
    cdef cnp.ndarray array
    for array in (x, out) if u is None else (x, u, out):
        if not (cnp.PyArray_ISCARRAY(array) and same_shape(array, x)
                and cnp.PyArray_TYPE(array) == cnp.PyArray_TYPE(x)):
            raise ValueError("memory_floor: expected contiguous arrays of one shape and dtype")
    as_floating(x, "x")
    job.outer, job.channels, job.inner = 1, 1, cnp.PyArray_SIZE(x)
    job.x, job.out = cnp.PyArray_DATA(x), cnp.PyArray_DATA(out)
    if u is not None:
        job.u = cnp.PyArray_DATA(u)
    compute(&job, x)
