# The operations. Each reads check, allocate, compute, return: an error leaves nothing half done.

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


cpdef tuple batch_norm(x, gamma, beta, axis, eps, out, bint with_m2=False):
    """-> (y, mean, inv_std), with_m2: and m2; y like x, the others (C,) float64 arrays."""
    cdef bnfast_job job = new_job(BNFAST_FORWARD)
    cdef cnp.ndarray data = as_samples(x, "x")
    cdef int channel_axis = as_axis(axis, data)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(data, channel_axis)
    cdef cnp.ndarray given_out, g, b, y, mean, inv_std, m2 = None
    job.eps = as_positive_eps(eps)
    given_out = as_out(out, data)
    g = as_parameter(gamma, "gamma", channels, given_out)
    b = as_parameter(beta, "beta", channels, given_out)
    check_count(data, channel_axis)

    data = packed(data, channel_axis, &job)
    y = target_of(given_out, data, None)
    mean, inv_std = new_statistics(channels), new_statistics(channels)
    if with_m2:
        m2 = new_statistics(channels)
    if cnp.PyArray_SIZE(data) > 0:
        job.x, job.out = cnp.PyArray_DATA(data), cnp.PyArray_DATA(y)
        job.gamma, job.beta = parameter(g), parameter(b)
        job.mean, job.inv_std, job.m2 = values(mean), values(inv_std), values(m2)
        compute(&job, data)
    y = delivered(y, given_out)
    return (y, mean, inv_std, m2) if with_m2 else (y, mean, inv_std)


cpdef cnp.ndarray batch_norm_eval(x, mean, var, gamma, beta, axis, eps, out, str prefix=""):
    """-> y like x. prefix: what the caller's names for mean and var begin with, for messages."""
    cdef bnfast_job job = new_job(BNFAST_EVAL)
    cdef cnp.ndarray data = as_samples(x, "x")
    cdef int channel_axis = as_axis(axis, data)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(data, channel_axis), i
    cdef cnp.ndarray given_out, g, b, m, v, y
    job.eps = as_eps(eps)
    given_out = as_out(out, data)
    m = as_statistics(mean, prefix + "mean", channels, given_out)
    v = as_statistics(var, prefix + "var", channels, given_out)
    for i in range(channels):
        if not (values(v)[i] + job.eps > 0.0 and values(v)[i] - values(v)[i] == 0.0):
            raise ValueError(f"{prefix}var: expected finite values with var + eps above 0, got {values(v)[i]} "
                             f"for channel {i} (eps {job.eps:g})")
    g = as_parameter(gamma, "gamma", channels, given_out)
    b = as_parameter(beta, "beta", channels, given_out)

    data = packed(data, channel_axis, &job)
    y = target_of(given_out, data, None)
    if cnp.PyArray_SIZE(data) > 0:
        job.x, job.out = cnp.PyArray_DATA(data), cnp.PyArray_DATA(y)
        job.gamma, job.beta = parameter(g), parameter(b)
        job.mean, job.var = values(m), values(v)
        compute(&job, data)
    return delivered(y, given_out)


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


cdef cnp.ndarray rounded_to(cnp.ndarray statistics, bint narrow):
    """(C,) float64 as float32 if `narrow`."""
    cdef cnp.npy_intp channels = cnp.PyArray_DIM(statistics, 0)
    cdef cnp.ndarray result
    if not narrow:
        return statistics
    result = cnp.PyArray_EMPTY(1, &channels, cnp.NPY_FLOAT32, 0)
    bnfast_active(4).round_values(channels, values(statistics), cnp.PyArray_DATA(result))
    return result


cpdef tuple batch_norm_backward(dy, x, mean, inv_std, gamma, axis, training, out, dtype=None):
    """-> (dx, dgamma, dbeta): dx like x, two (C,) arrays of `dtype`, float32 or float64 (None: x's)."""
    cdef bnfast_job job = new_job(BNFAST_BACKWARD if training else BNFAST_BACKWARD_EVAL)
    cdef cnp.ndarray data = as_samples(x, "x")
    cdef int channel_axis = as_axis(axis, data)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(data, channel_axis)
    cdef cnp.ndarray u = as_companion(dy, "dy", data)
    cdef cnp.ndarray given_out, g, m, s, dx, dgamma, dbeta
    cdef bint narrow
    given_out = as_out(out, data)
    m = as_statistics(mean, "mean", channels, given_out)
    s = as_statistics(inv_std, "inv_std", channels, given_out)
    g = as_parameter(gamma, "gamma", channels, given_out)
    if training:
        check_count(data, channel_axis)

    data = packed(data, channel_axis, &job)
    u = packed_like(u, data)
    dx = target_of(given_out, data, u)
    if cnp.PyArray_SIZE(data) == 0:
        dgamma, dbeta = np.zeros(channels), np.zeros(channels)
    else:
        dgamma, dbeta = new_statistics(channels), new_statistics(channels)
        job.x, job.u, job.out = cnp.PyArray_DATA(data), cnp.PyArray_DATA(u), cnp.PyArray_DATA(dx)
        job.gamma, job.mean, job.inv_std = parameter(g), values(m), values(s)
        job.dbeta, job.dgamma = values(dbeta), values(dgamma)
        compute(&job, data)
    narrow = cnp.PyArray_TYPE(data) == cnp.NPY_FLOAT32 if dtype is None else dtype.itemsize == 4
    return delivered(dx, given_out), rounded_to(dgamma, narrow), rounded_to(dbeta, narrow)


def batch_norm_jvp(v, x, mean, inv_std, gamma, axis, vgamma, vbeta, out):
    """-> dy like x."""
    cdef bnfast_job job = new_job(BNFAST_JVP)
    cdef cnp.ndarray data = as_samples(x, "x")
    cdef int channel_axis = as_axis(axis, data)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(data, channel_axis)
    cdef cnp.ndarray u = as_companion(v, "v", data)
    cdef cnp.ndarray given_out, g, m, s, vg, vb, dy
    given_out = as_out(out, data)
    m = as_statistics(mean, "mean", channels, given_out)
    s = as_statistics(inv_std, "inv_std", channels, given_out)
    g = as_parameter(gamma, "gamma", channels, given_out)
    vg = as_parameter(vgamma, "vgamma", channels, given_out)
    vb = as_parameter(vbeta, "vbeta", channels, given_out)
    check_count(data, channel_axis)

    data = packed(data, channel_axis, &job)
    u = packed_like(u, data)
    dy = target_of(given_out, data, u)
    if cnp.PyArray_SIZE(data) > 0:
        job.x, job.u, job.out = cnp.PyArray_DATA(data), cnp.PyArray_DATA(u), cnp.PyArray_DATA(dy)
        job.gamma, job.vgamma, job.vbeta = parameter(g), parameter(vg), parameter(vb)
        job.mean, job.inv_std = values(m), values(s)
        compute(&job, data)
    return delivered(dy, given_out)


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
