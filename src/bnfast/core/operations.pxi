# The operations. Each reads check, allocate, compute, return: an error leaves nothing half done.

cdef int set_activation(bnfast_job *job, object activation, object negative_slope) except -1:
    """Has y go through an activation of the rectifier family (kernels.h)."""
    job.rectifies = activation is not None
    if activation is None:
        return 0
    job.rectifier.slope, job.rectifier.top = 0.0, math.nan
    if activation == "relu6":
        job.rectifier.top = 6.0
    elif activation == "leaky_relu":
        job.rectifier.slope = as_negative_slope(negative_slope)
    elif activation != "relu":
        raise ValueError(f"activation: expected None, 'relu', 'relu6' or 'leaky_relu', got {activation!r}")
    return 0


cpdef double as_negative_slope(object value) except? -1.0:
    """A number between 0 and 1."""
    cdef double slope
    try:
        if isinstance(value, (bool, np.bool_, str, bytes)):
            raise TypeError
        slope = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"negative_slope: expected a number, got {value!r}") from None
    except OverflowError:  # an int beyond float64
        slope = math.inf
    if not 0.0 < slope < 1.0:
        raise ValueError(f"negative_slope: expected a number above 0 and below 1, got {value!r}")
    return slope


cdef int check_kept_shape(cnp.ndarray x, int axis, Py_ssize_t channels, tuple others) except -1:
    """The conversion of another argument may have run anybody's code since x was looked at."""
    cdef bint kept = cnp.PyArray_NDIM(x) > axis and cnp.PyArray_DIM(x, axis) == channels
    for other in others:
        kept = kept and (other is None or same_shape(other, x))
    if not kept:
        raise RuntimeError("x: expected an array that keeps its shape during the call")
    return 0


cdef cnp.ndarray mapped(bnfast_job *job, cnp.ndarray x, cnp.ndarray beside, int axis, Py_ssize_t channels,
                        cnp.ndarray out):
    """The result like x of a job whose statistics and parameters are set: in `out`, checked, or in a new array.

    beside: the u of an operation that has one, else a residual; or None.
    """
    cdef cnp.ndarray data, result
    if (cnp.PyArray_NDIM(x) <= axis or cnp.PyArray_DIM(x, axis) != channels
            or (beside is not None and not same_shape(beside, x)) or (out is not None and not same_shape(out, x))):
        check_kept_shape(x, axis, channels, (beside, out))
    data = packed(x, axis, job)
    if beside is not None:
        beside = packed_like(beside, data)
    result = target_of(out, data, beside)
    if cnp.PyArray_SIZE(data) > 0:
        job.x, job.out = cnp.PyArray_DATA(data), cnp.PyArray_DATA(result)
        if beside is not None and job.operation in (BNFAST_FORWARD, BNFAST_EVAL):
            job.residual = cnp.PyArray_DATA(beside)
        elif beside is not None:
            job.u = cnp.PyArray_DATA(beside)
        compute(job, data)
    return delivered(result, out)


cdef inline bint stores_passed(bnfast_job *job, bint has_residual) noexcept:
    """Whether a backward has more than one result like x, for itself or for the caller."""
    return has_residual or (job.rectifies and job.operation == BNFAST_BACKWARD_EVAL)


cdef tuple mapped_back(bnfast_job *job, cnp.ndarray x, cnp.ndarray dy, cnp.ndarray residual, int axis,
                       Py_ssize_t channels, cnp.ndarray out, cnp.ndarray out_residual, bint has_residual):
    """-> (dx, dresidual) of a backward job, likewise; dresidual is None without a residual.

    What an activation passes of dy is dresidual. With job.marks the map finds it by them and stores it, and no
    `residual` is asked for; without, the reduction makes it of x and residual and stores it, and the map reads that.
    """
    cdef cnp.ndarray data, u, r, dx, dr = None
    if not stores_passed(job, has_residual):
        return mapped(job, x, dy, axis, channels, out), None
    if is_half(x) and job.rectifies and job.rectifier.slope != 0.0 and (
            job.marks == NULL or job.operation == BNFAST_BACKWARD_EVAL):
        # what the reduction stores would be rounded before dx is made of it
        if job.kernels != NULL:
            job.kernels = bnfast_of_same_isa(job.kernels, BNFAST_FLOAT32)
        dx, dr = mapped_back(job, widened(x), widened(dy), None if residual is None else widened(residual), axis,
                             channels, None, None, has_residual)
        return narrowed(dx, x, out), narrowed(dr, x, out_residual) if has_residual else None
    check_kept_shape(x, axis, channels, (dy, residual, out, out_residual))
    data = packed(x, axis, job)
    u = packed_like(dy, data)
    dx = target_of(out, data, u)
    r = None if residual is None or not job.rectifies else packed_like(residual, data)
    if not has_residual:  # a place for what is passed: dx itself, unless it is x's
        dr = empty_like(data) if may_overlap(dx, data) else dx
    else:
        if r is not None and not disjoint_or_same(dx, r):
            dx = empty_like(data)
        dr = out_residual
        if dr is None or not same_layout(dr, data) or may_overlap(dr, data) or not (
                disjoint_or_same(dr, u) and (r is None or disjoint_or_same(dr, r))):
            dr = empty_like(data)
    if cnp.PyArray_SIZE(data) > 0:
        job.x, job.u, job.out = cnp.PyArray_DATA(data), cnp.PyArray_DATA(u), cnp.PyArray_DATA(dx)
        if job.rectifies:
            job.passed = cnp.PyArray_DATA(dr)
            if r is not None:
                job.residual = cnp.PyArray_DATA(r)
        elif dr is not u:
            cnp.PyArray_CopyInto(dr, u)  # an activation that there is not passes all
            job.u = cnp.PyArray_DATA(dr)
        compute(job, data)
    if not has_residual:
        return delivered(dx, out), None
    return delivered(dx, out), delivered(dr, out_residual)


def widened(cnp.ndarray x not None):
    """Halves as a new array of float32, in the same order of axes."""
    cdef cnp.ndarray dense = x, wide
    if not (cnp.PyArray_ISBEHAVED_RO(x) and (cnp.PyArray_IS_C_CONTIGUOUS(x) or cnp.PyArray_IS_F_CONTIGUOUS(x))):
        dense = np.array(x, x.dtype.newbyteorder("="), order="K", copy=True, subok=False)
    wide = np.empty_like(dense, np.float32)
    if not is_half(dense) or not same_order(dense, wide):
        raise AssertionError("expected halves, dense")
    bnfast_active(dtype_of(dense)).widen_values(cnp.PyArray_SIZE(dense), cnp.PyArray_DATA(dense),
                                                cnp.PyArray_DATA(wide))
    return wide


def narrowed(cnp.ndarray wide not None, cnp.ndarray model not None, out=None):
    """float32, dense, as an array of the dtype of `model`, halves, rounded to nearest even; or in `out`."""
    cdef cnp.ndarray half = np.empty_like(wide, model.dtype.newbyteorder("="))
    if not is_half(half) or cnp.PyArray_TYPE(wide) != cnp.NPY_FLOAT32 or not same_order(wide, half):
        raise AssertionError("expected float32, dense, and halves")
    bnfast_active(dtype_of(half)).narrow_values(cnp.PyArray_SIZE(wide), cnp.PyArray_DATA(wide),
                                                cnp.PyArray_DATA(half))
    return delivered(half, out)


cdef bint same_order(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Whether equal indices are equal counts of elements from the beginning."""
    cdef int i
    if cnp.PyArray_SIZE(a) == 0:  # their strides may be any
        return True
    for i in range(cnp.PyArray_NDIM(a)):
        if cnp.PyArray_DIM(a, i) != 1 and (cnp.PyArray_STRIDE(a, i) // cnp.PyArray_ITEMSIZE(a)
                                           != cnp.PyArray_STRIDE(b, i) // cnp.PyArray_ITEMSIZE(b)):
            return False
    return True


cdef cnp.ndarray as_residual(object residual, cnp.ndarray x):
    """Of x's shape and dtype; None stays None."""
    return None if residual is None else as_companion(residual, "residual", x)


cdef cnp.ndarray as_out_residual(object out_residual, cnp.ndarray out, bint has_residual, cnp.ndarray x):
    """The user's `out_residual`, checked as `out` is; apart from it."""
    cdef cnp.ndarray given
    if out_residual is None:
        return None
    if not has_residual:
        raise ValueError("out_residual: expected None, as there is no residual")
    try:
        given = as_out(out_residual, x)
    except (TypeError, ValueError) as error:
        raise type(error)(f"out_residual{str(error)[3:]}") from None
    if out is not None and shares_memory(given, out):
        raise ValueError("out_residual: expected memory of its own, got a part of out's")
    return given


cdef int check_variance(const bnfast_parameter *var, Py_ssize_t channels, double eps, str prefix) except -1:
    """That it can be divided by."""
    cdef Py_ssize_t i
    cdef double value
    if bnfast_active(BNFAST_FLOAT64).usable_variances(channels, var, eps) == channels:
        return 0
    for i in range(channels):
        value = var.wide[i] if var.wide != NULL else var.narrow[i]
        if not (value + eps > 0.0 and value - value == 0.0):
            raise ValueError(f"{prefix}var: expected finite values with var + eps above 0, got {value} "
                             f"in channel {i} (eps {eps:g})")
    return 0


def moments(x, axis):
    """-> (count, mean, m2, rest): values a channel, and (C,) float64 arrays; mean + rest is the mean."""
    cdef bnfast_job job
    begin_job(&job, BNFAST_MOMENTS)
    cdef cnp.ndarray data = as_samples(x, "x")
    cdef int channel_axis = as_axis(axis, data)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(data, channel_axis)
    cdef cnp.ndarray mean, m2, rest
    if cnp.PyArray_SIZE(data) == 0:
        return 0, np.zeros(channels), np.zeros(channels), np.zeros(channels)
    data = packed(data, channel_axis, &job)
    mean, m2, rest = new_statistics(channels), new_statistics(channels), new_statistics(channels)
    job.x, job.exact = cnp.PyArray_DATA(data), True
    job.mean, job.m2, job.mean_rest = values(mean), values(m2), values(rest)
    compute(&job, data)
    return job.outer * job.inner, mean, m2, rest


def batch_norm(x, gamma, beta, axis, eps, out, residual=None, activation=None, negative_slope=None,
               bint return_var=False):
    """-> (y, mean, inv_std), and var if that is asked for; y like x, the others (C,) float64 arrays."""
    cdef bnfast_job job
    begin_job(&job, BNFAST_FORWARD)
    cdef cnp.ndarray data = as_samples(x, "x")
    cdef int channel_axis = as_axis(axis, data)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(data, channel_axis)
    cdef cnp.ndarray given_out, g, b, r, mean, inv_std, var = None
    job.eps = as_positive_eps(eps)
    set_activation(&job, activation, negative_slope)
    given_out = as_out(out, data)
    r = as_residual(residual, data)
    g = as_parameter(gamma, "gamma", channels, given_out)
    b = as_parameter(beta, "beta", channels, given_out)
    check_count(data, channel_axis)

    mean, inv_std = new_statistics(channels), new_statistics(channels)
    job.gamma, job.beta = parameter(g), parameter(b)
    job.mean, job.inv_std = values(mean), values(inv_std)
    if not return_var:
        return mapped(&job, data, r, channel_axis, channels, given_out), mean, inv_std
    var = new_statistics(channels)
    job.m2 = values(var)
    y = mapped(&job, data, r, channel_axis, channels, given_out)
    np.divide(var, cnp.PyArray_SIZE(data) / max(1, channels), out=var)
    return y, mean, inv_std, var


def batch_norm_eval(x, mean, var, gamma, beta, axis, eps, out, residual=None, activation=None, negative_slope=None):
    """-> y like x."""
    cdef bnfast_job job
    begin_job(&job, BNFAST_EVAL)
    cdef cnp.ndarray data = as_samples(x, "x")
    cdef int channel_axis = as_axis(axis, data)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(data, channel_axis)
    cdef cnp.ndarray given_out, g, b, m, v, r
    cdef bnfast_parameter variances
    job.eps = as_eps(eps)
    set_activation(&job, activation, negative_slope)
    given_out = as_out(out, data)
    r = as_residual(residual, data)
    m = as_given(mean, "mean", channels, given_out)
    v = as_given(var, "var", channels, given_out)
    variances = parameter(v)
    check_variance(&variances, channels, job.eps, "")
    g = as_parameter(gamma, "gamma", channels, given_out)
    b = as_parameter(beta, "beta", channels, given_out)

    job.gamma, job.beta = parameter(g), parameter(b)
    job.mean, job.narrow_mean = float64s_of(m), float32s_of(m)
    job.var, job.narrow_var = float64s_of(v), float32s_of(v)
    return mapped(&job, data, r, channel_axis, channels, given_out)


def before_activation(x, mean, inv_std, gamma, beta, axis, residual):
    """-> (x - mean) * inv_std * gamma + beta + residual, like x: what an activation meets, to the bit."""
    cdef bnfast_job job
    begin_job(&job, BNFAST_EVAL)
    cdef cnp.ndarray data = as_samples(x, "x")
    cdef int channel_axis = as_axis(axis, data)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(data, channel_axis)
    cdef cnp.ndarray m, s, g, b, slope, r = as_residual(residual, data)
    m = as_statistics(mean, "mean", channels, None)
    s = as_statistics(inv_std, "inv_std", channels, None)
    g = as_parameter(gamma, "gamma", channels, None)
    b = as_parameter(beta, "beta", channels, None)
    slope = s if g is None else g * s
    job.mean, job.gamma, job.beta = values(m), parameter(slope), parameter(b)
    return mapped(&job, data, r, channel_axis, channels, None)


def passed_by(cnp.ndarray u, cnp.ndarray y, activation, negative_slope, out):
    """-> u, or `out`: u times the derivative of an activation at y, in place."""
    cdef bnfast_job job
    begin_job(&job, BNFAST_EVAL)
    set_activation(&job, activation, negative_slope)
    if job.rectifies:
        np.multiply(u, job.rectifier.slope, out=u, where=y <= 0)
        u[y >= job.rectifier.top] = 0
        if job.rectifier.slope == 0:
            u[y <= 0] = 0  # whatever u is there
    return delivered(u, as_out(out, u))


def as_like(value, str name, cnp.ndarray x):
    """`value` as an array, checked to have x's shape and dtype."""
    return as_companion(value, name, x)


def check_outs(out, out_residual, residual, cnp.ndarray x):
    """TypeError or ValueError if they cannot take results like x, or share memory."""
    as_out_residual(out_residual, as_out(out, x), residual is not None, x)


def affine(x, center, scale, shift, out, bint search):
    """-> (y, infinite): y = (x - center) * scale + shift, by columns of a 2-dimensional x; shift may be None.

    infinite: whether x has an infinity, False unless `search`; y is of no use then.
    """
    cdef bnfast_job job
    begin_job(&job, BNFAST_EVAL)
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
    cdef cnp.ndarray result = new_vector(channels, dtype, False)
    round_or_copy(statistics, channels, float64s_of(result), <float *>float32s_of(result))
    return result


cdef void round_or_copy(const double *statistics, Py_ssize_t channels, double *wide, float *narrow) noexcept:
    """To whichever there is."""
    if wide != NULL:
        memcpy(wide, statistics, channels * sizeof(double))
    else:
        bnfast_active(BNFAST_FLOAT32).round_values(channels, statistics, narrow)


cdef tuple new_gradients(bnfast_job *job, cnp.npy_intp channels, int dtype, bint zero):
    """-> (dgamma, dbeta), of dtype NPY_FLOAT32 or NPY_FLOAT64, for the job to write; zero: it might not be run."""
    cdef cnp.ndarray dgamma = new_vector(channels, dtype, zero), dbeta = new_vector(channels, dtype, zero)
    job.dgamma, job.narrow_dgamma = float64s_of(dgamma), <float *>float32s_of(dgamma)
    job.dbeta, job.narrow_dbeta = float64s_of(dbeta), <float *>float32s_of(dbeta)
    return dgamma, dbeta


cdef void set_statistics(bnfast_job *job, cnp.ndarray mean, cnp.ndarray inv_std) noexcept:
    """Those a gradient is taken through, float32 or float64 each."""
    job.mean, job.narrow_mean = float64s_of(mean), float32s_of(mean)
    job.inv_std, job.narrow_inv_std = float64s_of(inv_std), float32s_of(inv_std)


def batch_norm_backward(dy, x, mean, inv_std, gamma, axis, training, out, beta=None, residual=None, activation=None,
                        negative_slope=None, out_residual=None):
    """-> (dx, dgamma, dbeta), and dresidual with a residual: dx, dresidual like x, two (C,) arrays of x's dtype,
    or of float32 where that is narrower."""
    cdef bnfast_job job
    begin_job(&job, BNFAST_BACKWARD if training else BNFAST_BACKWARD_EVAL)
    cdef cnp.ndarray data = as_samples(x, "x")
    cdef int channel_axis = as_axis(axis, data)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(data, channel_axis)
    cdef cnp.ndarray u = as_companion(dy, "dy", data)
    cdef cnp.ndarray given_out, given_out_residual, g, b, m, s, r
    set_activation(&job, activation, negative_slope)
    given_out = as_out(out, data)
    r = as_residual(residual, data)
    given_out_residual = as_out_residual(out_residual, given_out, r is not None, data)
    m = as_given(mean, "mean", channels, given_out, given_out_residual)
    s = as_given(inv_std, "inv_std", channels, given_out, given_out_residual)
    g = as_parameter(gamma, "gamma", channels, given_out, given_out_residual)
    b = as_parameter(beta, "beta", channels, given_out, given_out_residual)
    if training:
        check_count(data, channel_axis)

    job.gamma, job.beta = parameter(g), parameter(b)
    set_statistics(&job, m, s)
    dgamma, dbeta = new_gradients(&job, channels, gradient_type(data), cnp.PyArray_SIZE(data) == 0)
    if stores_passed(&job, r is not None):
        dx, dresidual = mapped_back(&job, data, u, r, channel_axis, channels, given_out, given_out_residual,
                                    r is not None)
    else:
        dx = mapped(&job, data, u, channel_axis, channels, given_out)
    return (dx, dgamma, dbeta) if residual is None else (dx, dgamma, dbeta, dresidual)


def batch_norm_backward_sums(dy, x, mean, inv_std, gamma, axis, beta, residual, activation, negative_slope):
    """-> (count, dgamma, dbeta): the sums as (C,) float64 arrays."""
    cdef bnfast_job job
    begin_job(&job, BNFAST_BACKWARD_SUMS)
    cdef cnp.ndarray data = as_samples(x, "x")
    cdef int channel_axis = as_axis(axis, data)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(data, channel_axis)
    cdef cnp.ndarray u = as_companion(dy, "dy", data)
    cdef cnp.ndarray g, b, m, s, r, dgamma, dbeta
    set_activation(&job, activation, negative_slope)
    r = as_residual(residual, data)
    m = as_given(mean, "mean", channels, None)
    s = as_given(inv_std, "inv_std", channels, None)
    g = as_parameter(gamma, "gamma", channels, None)
    b = as_parameter(beta, "beta", channels, None)

    check_kept_shape(data, channel_axis, channels, (u, r))
    dgamma, dbeta = np.zeros(channels), np.zeros(channels)
    if cnp.PyArray_SIZE(data) == 0:
        return 0, dgamma, dbeta
    job.gamma, job.beta = parameter(g), parameter(b)
    set_statistics(&job, m, s)
    job.dgamma, job.dbeta = values(dgamma), values(dbeta)
    data = packed(data, channel_axis, &job)
    u = packed_like(u, data)
    job.x, job.u = cnp.PyArray_DATA(data), cnp.PyArray_DATA(u)
    if r is not None and job.rectifies:
        r = packed_like(r, data)
        job.residual = cnp.PyArray_DATA(r)
    compute(&job, data)
    return job.outer * job.inner, dgamma, dbeta


def batch_norm_backward_apply(dy, x, mean, inv_std, gamma, double count, dgamma, dbeta, axis, beta, residual,
                              activation, negative_slope, out, out_residual):
    """-> dx like x; (dx, dresidual) with a residual. count, dgamma, dbeta: of the whole batch."""
    cdef bnfast_job job
    begin_job(&job, BNFAST_BACKWARD_APPLY)
    cdef cnp.ndarray data = as_samples(x, "x")
    cdef int channel_axis = as_axis(axis, data)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(data, channel_axis)
    cdef cnp.ndarray u = as_companion(dy, "dy", data)
    cdef cnp.ndarray given_out, given_out_residual, g, b, m, s, r, to_gamma, to_beta
    set_activation(&job, activation, negative_slope)
    given_out = as_out(out, data)
    r = as_residual(residual, data)
    given_out_residual = as_out_residual(out_residual, given_out, r is not None, data)
    m = as_given(mean, "mean", channels, given_out, given_out_residual)
    s = as_given(inv_std, "inv_std", channels, given_out, given_out_residual)
    g = as_parameter(gamma, "gamma", channels, given_out, given_out_residual)
    b = as_parameter(beta, "beta", channels, given_out, given_out_residual)
    to_gamma = as_statistics(dgamma, "sums.dgamma", channels, given_out, given_out_residual)
    to_beta = as_statistics(dbeta, "sums.dbeta", channels, given_out, given_out_residual)

    job.count = count
    job.gamma, job.beta = parameter(g), parameter(b)
    set_statistics(&job, m, s)
    job.dgamma, job.dbeta = values(to_gamma), values(to_beta)
    dx, dresidual = mapped_back(&job, data, u, r, channel_axis, channels, given_out, given_out_residual,
                                r is not None)
    return dx if residual is None else (dx, dresidual)


def batch_norm_jvp(v, x, mean, inv_std, gamma, axis, vgamma, vbeta, out):
    """-> dy like x."""
    cdef bnfast_job job
    begin_job(&job, BNFAST_JVP)
    cdef cnp.ndarray data = as_samples(x, "x")
    cdef int channel_axis = as_axis(axis, data)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(data, channel_axis)
    cdef cnp.ndarray u = as_companion(v, "v", data)
    cdef cnp.ndarray given_out, g, m, s, vg, vb
    given_out = as_out(out, data)
    m = as_given(mean, "mean", channels, given_out)
    s = as_given(inv_std, "inv_std", channels, given_out)
    g = as_parameter(gamma, "gamma", channels, given_out)
    vg = as_parameter(vgamma, "vgamma", channels, given_out)
    vb = as_parameter(vbeta, "vbeta", channels, given_out)
    check_count(data, channel_axis)

    job.gamma, job.vgamma, job.vbeta = parameter(g), parameter(vg), parameter(vb)
    set_statistics(&job, m, s)
    return mapped(&job, data, u, channel_axis, channels, given_out)


def memory_floor(cnp.ndarray x, cnp.ndarray u, cnp.ndarray out):
    """out = x, or x + u: the least time an operation on such arrays can take. For benchmarks.

    All C-contiguous, of one shape and dtype, float32 or float64; u may be None.
    """
    cdef bnfast_job job
    begin_job(&job, BNFAST_FLOOR)
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


def update_average(cnp.ndarray average, cnp.ndarray batch, double keep, double weight):
    """average = keep * average + weight * batch, in place and rounded once.

    average: (C,) float32 or float64, contiguous and writeable; batch: (C,) float64, contiguous.
    """
    cdef Py_ssize_t i, channels = cnp.PyArray_SIZE(average)
    cdef float *narrow
    cdef double *wide
    cdef const double *new
    if (cnp.PyArray_TYPE(batch) != cnp.NPY_FLOAT64 or cnp.PyArray_SIZE(batch) != channels
            or not cnp.PyArray_ISCARRAY(average) or not cnp.PyArray_ISCARRAY_RO(batch)):
        raise ValueError("average, batch: expected contiguous arrays of one size, batch of float64")
    new = <const double *>cnp.PyArray_DATA(batch)
    if cnp.PyArray_TYPE(average) == cnp.NPY_FLOAT32:
        narrow = <float *>cnp.PyArray_DATA(average)
        for i in range(channels):
            narrow[i] = <float>(keep * narrow[i] + weight * new[i])
    elif cnp.PyArray_TYPE(average) == cnp.NPY_FLOAT64:
        wide = <double *>cnp.PyArray_DATA(average)
        for i in range(channels):
            wide[i] = keep * wide[i] + weight * new[i]
    else:
        raise ValueError(f"average: expected float32 or float64, got {average.dtype}")
