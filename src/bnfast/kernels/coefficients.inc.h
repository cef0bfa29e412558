/* From merged reductions to results a channel and to the coefficients of the map, all in float64, rounded at the end.
 *
 * With M values a channel, variance = m2 / M, inv_std = 1 / sqrt(variance + eps), hi = mean rounded to the data's
 * dtype, lo = mean - hi:
 *   forward   scale = gamma * inv_std
 *   sums      sum(u), and sum(u * (x - mean)) = sum_ud - lo * sum_u, as d = x - hi there
 *   backward  dx = gamma*inv_std * (dy - dbeta/M - x_hat * dgamma/M)
 *             (through an activation: of what it lets pass of dy)
 *   jvp       dy = gamma*inv_std * (v - mean(v) - x_hat * mean(v*x_hat)) + vgamma * x_hat + vbeta
 * (Ioffe and Szegedy 2015, section 3, the backward pass collected by terms.)
 * A centre is taken off in two parts: what its rounding leaves, times the derivative of the result by it, goes into the
 * shift.
 *
 * GROUP channels at once, so that what is between stays in L1; plain loops, which every compiler turns into vectors:
 * 2 ns a channel, where a division and a root take half of it. */

#define GROUP 128

/* n values from the first-th channel on; `otherwise` where the parameter is left out. */
static ALWAYS_INLINE void FN(read_parameter)(const bnfast_parameter *parameter, double otherwise, ptrdiff_t first,
                                             ptrdiff_t n, double *restrict values)
{
    const double *restrict wide = parameter->wide ? parameter->wide + first : NULL;
    const float *restrict narrow = parameter->narrow ? parameter->narrow + first : NULL;
    if (wide)
        for (ptrdiff_t i = 0; i < n; i++)
            values[i] = wide[i];
    else if (narrow)
        for (ptrdiff_t i = 0; i < n; i++)
            values[i] = (double)narrow[i];
    else
        for (ptrdiff_t i = 0; i < n; i++)
            values[i] = otherwise;
}

/* A scale that float32 cannot hold would make 0 * inf of a constant channel. */
static ALWAYS_INLINE double FN(in_range)(double scale)
{
    if (sizeof(T) != 4)
        return scale;
    return scale > (double)FLT_MAX ? (double)FLT_MAX : scale < -(double)FLT_MAX ? -(double)FLT_MAX : scale;
}

static void FN(round_values)(ptrdiff_t n, const double *restrict values, void *out)
{
    T *restrict rounded = out;
    for (ptrdiff_t i = 0; i < n; i++)
        rounded[i] = (T)values[i];
}

/* shift: what rounding `center` leaves is taken off; slope: derivative of the result by what is centred */
static ALWAYS_INLINE void FN(round_center)(ptrdiff_t n, const double *restrict center, const double *restrict slope,
                                           double *restrict shift, T *restrict rounded)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        const T hi = (T)center[i];
        rounded[i] = hi;
        shift[i] -= (center[i] - (double)hi) * slope[i];
    }
}

/* mean of the batch: the centre of the reduction and what was found relative to it */
static ALWAYS_INLINE void FN(means_of_centers)(ptrdiff_t n, const T *restrict center, const double *restrict a,
                                               double *restrict mean)
{
    for (ptrdiff_t i = 0; i < n; i++)
        mean[i] = (double)center[i] + a[i];
}

static ALWAYS_INLINE void FN(copy_values)(ptrdiff_t n, const double *restrict values, double *restrict out)
{
    for (ptrdiff_t i = 0; i < n; i++)
        out[i] = values[i];
}

/* Channels first .. first + n - 1, n <= GROUP */
static void FN(make_group)(const bnfast_channels *of, ptrdiff_t first, ptrdiff_t n)
{
    double gamma[GROUP], slope[GROUP], scale[GROUP], shift[GROUP];
    double *restrict const mean = of->mean + first;
    const double *restrict const a = of->a + first, *restrict const b = of->b + first;
    T *const center = (T *)of->c.center + first;
    const double count = of->count, eps = of->eps;

    if (of->operation == BNFAST_MOMENTS) {
        FN(means_of_centers)(n, center, a, mean);
        FN(copy_values)(n, b, of->m2 + first);
        return;
    }
    FN(read_parameter)(&of->gamma, 1.0, first, n, gamma);
    if (of->operation == BNFAST_FORWARD || of->operation == BNFAST_EVAL) {
        if (of->operation == BNFAST_FORWARD) {
            double *restrict const inv_std = of->inv_std + first;
            for (ptrdiff_t i = 0; i < n; i++) {
                const double variance = b[i] / count; /* of the batch as it is, the population's; never negative */
                inv_std[i] = 1.0 / sqrt(variance + eps);
                slope[i] = gamma[i] * inv_std[i];
            }
            FN(means_of_centers)(n, center, a, mean);
            if (of->m2 != NULL)
                FN(copy_values)(n, b, of->m2 + first);
        } else if (of->var != NULL) {
            const double *restrict const variance = of->var + first;
            for (ptrdiff_t i = 0; i < n; i++)
                slope[i] = gamma[i] * (1.0 / sqrt(variance[i] + eps));
        } else
            FN(copy_values)(n, gamma, slope);
        FN(read_parameter)(&of->beta, 0.0, first, n, shift);
        for (ptrdiff_t i = 0; i < n; i++)
            scale[i] = FN(in_range)(slope[i]);
        FN(round_center)(n, mean, slope, shift, center);
        FN(round_values)(n, scale, (T *)of->c.scale + first);
        FN(round_values)(n, shift, (T *)of->c.shift + first);
        return;
    }

    /* backward, its parts, jvp */
    const int constant = of->operation == BNFAST_BACKWARD_EVAL;
    const double *restrict const inv_std = of->inv_std + first;
    double u_sum[GROUP], u_hat[GROUP], u_center[GROUP], hat_scale[GROUP]; /* sum(u), sum(u * x_hat), ... */
    if (of->operation == BNFAST_BACKWARD_APPLY) {
        FN(copy_values)(n, of->dbeta + first, u_sum);
        FN(copy_values)(n, of->dgamma + first, u_hat);
    } else {
        FN(copy_values)(n, a, u_sum);
        for (ptrdiff_t i = 0; i < n; i++)
            u_hat[i] = (b[i] - (mean[i] - (double)(T)mean[i]) * a[i]) * inv_std[i];
        if (of->dgamma != NULL) {
            FN(copy_values)(n, u_sum, of->dbeta + first);
            FN(copy_values)(n, u_hat, of->dgamma + first);
        }
    }
    if (of->operation == BNFAST_BACKWARD_SUMS)
        return;
    if (constant) {
        /* v + -0.0 is v, the sign of a zero included */
        T *restrict const rounded_center = center, *restrict const rounded_scale = (T *)of->c.scale + first,
                          *restrict const rounded_shift = (T *)of->c.shift + first;
        FN(read_parameter)(&of->vbeta, -0.0, first, n, shift);
        for (ptrdiff_t i = 0; i < n; i++) {
            rounded_center[i] = 0;
            rounded_scale[i] = (T)FN(in_range)(gamma[i] * inv_std[i]);
            rounded_shift[i] = (T)shift[i];
        }
        return;
    }
    FN(read_parameter)(&of->vbeta, 0.0, first, n, shift);
    FN(read_parameter)(&of->vgamma, 0.0, first, n, hat_scale);
    for (ptrdiff_t i = 0; i < n; i++) {
        const double u_scale = gamma[i] * inv_std[i];
        u_center[i] = u_sum[i] / count;
        hat_scale[i] -= u_scale * (u_hat[i] / count);
        scale[i] = FN(in_range)(u_scale);
        slope[i] = inv_std[i] * hat_scale[i];
    }
    FN(round_center)(n, mean, slope, shift, center);
    FN(round_center)(n, u_center, scale, shift, (T *)of->c.u_center + first);
    FN(round_values)(n, scale, (T *)of->c.u_scale + first);
    FN(round_values)(n, hat_scale, (T *)of->c.hat_scale + first);
    FN(round_values)(n, shift, (T *)of->c.shift + first);
    for (ptrdiff_t i = 0; i < n; i++)
        scale[i] = FN(in_range)(inv_std[i]);
    FN(round_values)(n, scale, (T *)of->c.scale + first);
}

static void FN(make_y_coefficients)(ptrdiff_t n_channels, const bnfast_channels *of)
{
    double gamma[GROUP], slope[GROUP], scale[GROUP], shift[GROUP];
    for (ptrdiff_t first = 0; first < n_channels; first += GROUP) {
        const ptrdiff_t n = n_channels - first < GROUP ? n_channels - first : GROUP;
        const double *restrict const inv_std = of->inv_std + first;
        FN(read_parameter)(&of->gamma, 1.0, first, n, gamma);
        FN(read_parameter)(&of->beta, 0.0, first, n, shift);
        for (ptrdiff_t i = 0; i < n; i++) {
            slope[i] = gamma[i] * inv_std[i];
            scale[i] = FN(in_range)(slope[i]);
        }
        FN(round_center)(n, of->mean + first, slope, shift, (T *)of->c.center + first);
        FN(round_values)(n, scale, (T *)of->c.y_scale + first);
        FN(round_values)(n, shift, (T *)of->c.y_shift + first);
    }
}

static void FN(make_coefficients)(ptrdiff_t n, const bnfast_channels *of)
{
    for (ptrdiff_t first = 0; first < n; first += GROUP)
        FN(make_group)(of, first, n - first < GROUP ? n - first : GROUP);
}

static ptrdiff_t FN(usable_variances)(ptrdiff_t n, const double *restrict var, double eps)
{
    int64_t usable = 0;
    for (ptrdiff_t i = 0; i < n; i++)
        usable += (var[i] + eps > 0.0) & (var[i] - var[i] == 0.0);
    return (ptrdiff_t)usable;
}

static ALWAYS_INLINE T FN(lesser)(T a, T b) { return a < b ? a : b; }
static ALWAYS_INLINE T FN(greater)(T a, T b) { return a > b ? a : b; }

static void FN(typical_values)(ptrdiff_t n, ptrdiff_t step, const void *data, const ptrdiff_t *offsets, void *out)
{
    const T *const x = data, *const p0 = x + offsets[0], *const p1 = x + offsets[1], *const p2 = x + offsets[2],
                   *const p3 = x + offsets[3], *const p4 = x + offsets[4];
    T *restrict const typical = out;
    for (ptrdiff_t i = 0; i < n; i++) {
        const ptrdiff_t at = i * step;
        /* neither the least nor the greatest of four is the middle one of five */
        const T low = FN(greater)(FN(lesser)(p0[at], p1[at]), FN(lesser)(p2[at], p3[at]));
        const T high = FN(lesser)(FN(greater)(p0[at], p1[at]), FN(greater)(p2[at], p3[at]));
        const T middle = FN(greater)(FN(lesser)(low, high), FN(lesser)(FN(greater)(low, high), p4[at]));
        typical[i] = middle - middle == 0 ? middle : 0;
    }
}
