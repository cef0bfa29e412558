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
 * 2 ns a channel, where a division and a root take half of it, but for AVX-512. */

#define GROUP 128

/* What stands for parameters that are left out. */
static const double FN(zeros)[GROUP] = {0};
#define ONE_8 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0
#define ONE_64 ONE_8, ONE_8, ONE_8, ONE_8, ONE_8, ONE_8, ONE_8, ONE_8
static const double FN(ones)[GROUP] = {ONE_64, ONE_64};

/* n <= GROUP values from the first-th channel on, as they are or widened to `room`; `otherwise` where the parameter is left
 * out. */
static ALWAYS_INLINE const double *FN(values_of)(const bnfast_parameter *parameter, const double *otherwise,
                                                 ptrdiff_t first, ptrdiff_t n, double *restrict room)
{
    if (parameter->wide)
        return parameter->wide + first;
    if (parameter->narrow == NULL)
        return otherwise;
    const float *restrict narrow = parameter->narrow + first;
    for (ptrdiff_t i = 0; i < n; i++)
        room[i] = (double)narrow[i];
    return room;
}

/* A scale that float32 cannot hold would make 0 * inf of a constant channel. */
static ALWAYS_INLINE double FN(in_range)(double scale)
{
    if (!NARROW)
        return scale;
    return scale > (double)FLT_MAX ? (double)FLT_MAX : scale < -(double)FLT_MAX ? -(double)FLT_MAX : scale;
}

/* The same, rounded: what is out of range is infinite first, as a comparison of floats is cheaper than of doubles. */
static ALWAYS_INLINE T FN(round_scale)(double scale)
{
    const T rounded = (T)scale, largest = (T)FLT_MAX;
    if (!NARROW)
        return rounded;
    return rounded > largest ? largest : rounded < -largest ? -largest : rounded;
}

static void FN(round_values)(ptrdiff_t n, const double *restrict values, void *out)
{
    T *restrict rounded = out;
    for (ptrdiff_t i = 0; i < n; i++)
        rounded[i] = (T)values[i];
}

/* Centre, scale and shift of a map whose scale is the slope of what is centred: what rounding the centre leaves is taken off
 * the shift. rest: what rounding `center` to float64 has left, where float64 are the data: to float32 it is nothing; or NULL */
static ALWAYS_INLINE void FN(round_map)(ptrdiff_t n, const double *restrict center, const double *restrict rest,
                                        const double *restrict slope, const double *restrict shift,
                                        T *restrict rounded_center, T *restrict rounded_scale,
                                        T *restrict rounded_shift)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        const T hi = (T)center[i];
        const double left = !NARROW && rest ? shift[i] - rest[i] * slope[i] : shift[i];
        rounded_center[i] = hi;
        rounded_scale[i] = FN(round_scale)(slope[i]);
        rounded_shift[i] = (T)(left - (center[i] - (double)hi) * slope[i]);
    }
}

/* The same of a gradient's map, and of jvp's: scale is inv_std, u's its own. */
static ALWAYS_INLINE void FN(round_gradient)(ptrdiff_t n, const double *restrict mean, const double *restrict rest,
                                             const double *restrict inv_std, const double *restrict gamma,
                                             const double *restrict u_mean, const double *restrict hat_mean,
                                             const double *restrict vgamma, const double *restrict vbeta,
                                             T *restrict center, T *restrict scale, T *restrict u_center,
                                             T *restrict u_scale, T *restrict hat_scale, T *restrict shift)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        const double by_u = gamma[i] * inv_std[i], by_hat = vgamma[i] - by_u * hat_mean[i], by_x = inv_std[i] * by_hat;
        const double left = !NARROW && rest ? vbeta[i] - rest[i] * by_x : vbeta[i];
        const T hi = (T)mean[i], u_hi = (T)u_mean[i];
        center[i] = hi;
        scale[i] = FN(round_scale)(inv_std[i]);
        u_center[i] = u_hi;
        u_scale[i] = FN(round_scale)(by_u);
        hat_scale[i] = (T)by_hat;
        shift[i] = (T)(left - (mean[i] - (double)hi) * by_x - (u_mean[i] - (double)u_hi) * FN(in_range)(by_u));
    }
}

/* mean of the batch: the centre of the reduction and what was found relative to it */
static ALWAYS_INLINE void FN(means_of_centers)(ptrdiff_t n, const T *restrict center, const double *restrict a,
                                               double *restrict mean)
{
    for (ptrdiff_t i = 0; i < n; i++)
        mean[i] = (double)center[i] + a[i];
}

/* What rounding that sum leaves (Knuth's two-sum); 0 where the mean is not finite. */
static ALWAYS_INLINE void FN(rests_of_means)(ptrdiff_t n, const T *restrict center, const double *restrict a,
                                             const double *restrict mean, double *restrict rest)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        const double c = (double)center[i], from_a = mean[i] - c, from_c = mean[i] - from_a;
        const double left = (c - from_c) + (a[i] - from_a);
        rest[i] = left - left == 0.0 ? left : 0.0;
    }
}

static ALWAYS_INLINE void FN(quotients)(ptrdiff_t n, const double *restrict sums, double count,
                                        double *restrict quotients)
{
    const double inverse = FN(exact_inverse)(count);
    for (ptrdiff_t i = 0; i < n; i++)
        quotients[i] = FN(quotient)(sums[i], count, inverse);
}

/* 1 / sqrt(variance + eps), both the root and the quotient rounded */
static ALWAYS_INLINE void FN(inverse_roots)(ptrdiff_t n, const double *restrict variance, double eps,
                                            double *restrict inv_std)
{
    ptrdiff_t i = 0;
#if ISA_HAS_INVERSE_ROOT
    if (n >= INVERSE_ROOTS && rounds_to_nearest())
        for (; i + INVERSE_ROOTS <= n; i += INVERSE_ROOTS)
            inverse_root(variance + i, eps, inv_std + i);
#endif
    for (; i < n; i++)
        inv_std[i] = 1.0 / sqrt(variance[i] + eps);
}

/* slope: may be inv_std itself */
static ALWAYS_INLINE void FN(multiply)(ptrdiff_t n, const double *restrict gamma, const double *inv_std, double *slope)
{
    for (ptrdiff_t i = 0; i < n; i++)
        slope[i] = gamma[i] * inv_std[i];
}

/* sum(u * x_hat) from sum(u) and sum(u * d), d = x - center: what rounding the mean left is taken off */
static ALWAYS_INLINE void FN(sums_of_hats)(ptrdiff_t n, const double *restrict u_sum, const double *restrict ud_sum,
                                           const double *restrict mean, const double *restrict rest,
                                           const double *restrict inv_std, double *restrict u_hat)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        const double left = !NARROW && rest ? rest[i] : mean[i] - (double)(T)mean[i];
        u_hat[i] = (ud_sum[i] - left * u_sum[i]) * inv_std[i];
    }
}

static ALWAYS_INLINE void FN(copy_values)(ptrdiff_t n, const double *restrict values, double *restrict out)
{
    for (ptrdiff_t i = 0; i < n; i++)
        out[i] = values[i];
}

/* Channels first .. first + n - 1, n <= GROUP */
static void FN(make_group)(const bnfast_channels *of, ptrdiff_t first, ptrdiff_t n)
{
    double room[4][GROUP], slope[GROUP], u_mean[GROUP], hat_mean[GROUP];
    double *restrict const mean = of->mean + first;
    const double *restrict const a = of->a + first, *restrict const b = of->b + first;
    T *restrict const center = (T *)of->c.center + first, *restrict const scale = (T *)of->c.scale + first,
                      *restrict const shift = (T *)of->c.shift + first;
    const double count = of->count, eps = of->eps;

    if (of->operation == BNFAST_MOMENTS) {
        FN(means_of_centers)(n, center, a, mean);
        FN(copy_values)(n, b, of->m2 + first);
        if (of->mean_rest != NULL)
            FN(rests_of_means)(n, center, a, mean, of->mean_rest + first);
        return;
    }
    const double *restrict const gamma = FN(values_of)(&of->gamma, FN(ones), first, n, room[0]);
    const double *restrict const mean_rest = of->mean_rest ? of->mean_rest + first : NULL;
    if (of->operation == BNFAST_FORWARD || of->operation == BNFAST_EVAL) {
        const double *restrict const beta = FN(values_of)(&of->beta, FN(zeros), first, n, room[1]);
        const double *restrict const m2 = of->operation == BNFAST_FORWARD ? b : of->m2 ? of->m2 + first : NULL;
        const double *restrict rest = mean_rest;
        double *inv_std = slope;
        if (m2 != NULL) {
            FN(quotients)(n, m2, count, room[2]); /* of the batch as it is, the population's; never negative */
            inv_std = of->inv_std + first;
            FN(inverse_roots)(n, room[2], eps, inv_std);
        } else if (of->var != NULL)
            FN(inverse_roots)(n, of->var + first, eps, inv_std);
        if (m2 != NULL || of->var != NULL)
            FN(multiply)(n, gamma, inv_std, slope);
        if (of->operation == BNFAST_FORWARD) {
            FN(means_of_centers)(n, center, a, mean);
            if (of->m2 != NULL)
                FN(copy_values)(n, b, of->m2 + first);
            if (of->mean_rest != NULL || !NARROW) {
                FN(rests_of_means)(n, center, a, mean, room[3]);
                rest = room[3];
            }
            if (of->mean_rest != NULL)
                FN(copy_values)(n, rest, of->mean_rest + first);
        }
        FN(round_map)(n, mean, rest, m2 || of->var ? slope : gamma, beta, center, scale, shift);
        return;
    }

    /* backward, its parts, jvp */
    const int constant = of->operation == BNFAST_BACKWARD_EVAL;
    const double *restrict const inv_std = of->inv_std + first;
    const double *u_sum = a, *u_hat = room[1]; /* sum(u), sum(u * x_hat) */
    if (of->operation == BNFAST_BACKWARD_APPLY) {
        u_sum = of->dbeta + first;
        u_hat = of->dgamma + first;
    } else {
        double *const found = of->dgamma ? of->dgamma + first : room[1];
        FN(sums_of_hats)(n, a, b, mean, mean_rest, inv_std, found);
        if (of->dbeta != NULL)
            FN(copy_values)(n, a, of->dbeta + first);
        u_hat = found;
    }
    if (of->operation == BNFAST_BACKWARD_SUMS)
        return;
    if (constant) {
        /* v + -0.0 is v, the sign of a zero included */
        const double *restrict const vbeta = FN(values_of)(&of->vbeta, NULL, first, n, room[2]);
        for (ptrdiff_t i = 0; i < n; i++) {
            center[i] = 0;
            scale[i] = FN(round_scale)(gamma[i] * inv_std[i]);
            shift[i] = vbeta ? (T)vbeta[i] : (T)-0.0;
        }
        return;
    }
    const double *restrict const vbeta = FN(values_of)(&of->vbeta, FN(zeros), first, n, room[2]);
    const double *restrict const vgamma = FN(values_of)(&of->vgamma, FN(zeros), first, n, room[3]);
    FN(quotients)(n, u_sum, count, u_mean);
    FN(quotients)(n, u_hat, count, hat_mean);
    FN(round_gradient)(n, mean, mean_rest, inv_std, gamma, u_mean, hat_mean, vgamma, vbeta, center, scale,
                       (T *)of->c.u_center + first, (T *)of->c.u_scale + first, (T *)of->c.hat_scale + first, shift);
}

static void FN(make_y_coefficients)(ptrdiff_t n_channels, const bnfast_channels *of)
{
    double room[2][GROUP], slope[GROUP];
    for (ptrdiff_t first = 0; first < n_channels; first += GROUP) {
        const ptrdiff_t n = n_channels - first < GROUP ? n_channels - first : GROUP;
        const double *restrict const inv_std = of->inv_std + first;
        const double *restrict const gamma = FN(values_of)(&of->gamma, FN(ones), first, n, room[0]);
        const double *restrict const beta = FN(values_of)(&of->beta, FN(zeros), first, n, room[1]);
        FN(multiply)(n, gamma, inv_std, slope);
        FN(round_map)(n, of->mean + first, of->mean_rest ? of->mean_rest + first : NULL, slope, beta,
                      (T *)of->c.center + first, (T *)of->c.y_scale + first, (T *)of->c.y_shift + first);
    }
}

static void FN(make_coefficients)(ptrdiff_t n, const bnfast_channels *of)
{
    for (ptrdiff_t first = 0; first < n; first += GROUP)
        FN(make_group)(of, first, n - first < GROUP ? n - first : GROUP);
}

/* The ends of what is normal in T; a size that takes no part in the rounding of the largest numbers; and of a forward the m2
 * up to which no x - mean leaves the range. */
#define SMALL_SCALE (NARROW ? (T)0x1p-100f : (T)0x1p-804) /* results may be subnormal */
#define LEAST_NORMAL (NARROW ? (T)FLT_MIN : (T)DBL_MIN)
#define MOST_SCALE (NARROW ? (T)(FLT_MAX / 2) : (T)(DBL_MAX / 2))
#define NO_PART (NARROW ? (T)1e30f : (T)1e290)
#define MOST_M2 (NARROW ? 1e76 : 1e300)
/* float64: squares below this have lost digits, which matters only where eps is smaller still. */
#define LEAST_M2 1e-290
#define LEAST_EPS 1e-270

/* Plain loops without branches; a NaN is at an edge. */
#define SIZE(v) _Generic((v), float: fabsf, double: fabs)(v)
#define WITHIN(v, least, most) ((SIZE(v) >= (least)) & (SIZE(v) <= (most)))
#define UP_TO(v, most) (SIZE(v) <= (most))
#define IS_SMALL(v) ((SIZE(v) < SMALL_SCALE) & ((v) != 0))

/* Values that differ, but by so little that their squares are zero, are themselves below this. */
#define MOST_VANISHING 1e-138

/* Of how many of n channels the m2 is not to be relied on. It is 0 of a constant. */
static ptrdiff_t FN(edges_of_m2)(ptrdiff_t n, const bnfast_channels *of)
{
    const double *restrict const b = of->b;
    const int counts = !NARROW && !(of->operation == BNFAST_FORWARD && of->eps > LEAST_EPS);
    const double least = counts ? of->count * LEAST_M2 : 0.0;
    int64_t found = 0;
    for (ptrdiff_t i = 0; i < n; i++)
        found += !(((b[i] >= least) & (b[i] <= MOST_M2)) | (b[i] == 0.0));
    for (ptrdiff_t i = 0; counts && i < n; i++) {
        const double mean = of->mean[i], center = (double)((const T *)of->c.center)[i];
        found += (b[i] == 0.0) & ((mean != 0.0) | (center != 0.0)) & (fabs(mean) < MOST_VANISHING);
    }
    return (ptrdiff_t)found;
}

/* How many of n scales are zero, but their gammas are not. */
static ptrdiff_t FN(vanished)(ptrdiff_t n, const T *restrict scale, const bnfast_parameter *of_gamma)
{
    double room[GROUP];
    int64_t found = 0;
    for (ptrdiff_t first = 0; first < n; first += GROUP) {
        const ptrdiff_t some = n - first < GROUP ? n - first : GROUP;
        const double *restrict const gamma = FN(values_of)(of_gamma, FN(ones), first, some, room);
        for (ptrdiff_t i = 0; i < some; i++)
            found += (scale[first + i] == 0) & (gamma[i] != 0.0);
    }
    return (ptrdiff_t)found;
}

/* A gamma of 0 is no edge: layers that begin so are trained as the others are. */
static ptrdiff_t FN(edges)(ptrdiff_t n, const bnfast_channels *of, ptrdiff_t *small)
{
    const T *restrict const center = of->c.center, *restrict const scale = of->c.scale,
                            *restrict const shift = of->c.shift, *restrict const u_center = of->c.u_center,
                            *restrict const u_scale = of->c.u_scale, *restrict const hat_scale = of->c.hat_scale;
    const double *restrict const b = of->b;
    const double lost = of->count * LEAST_M2;
    TI maps = 0, scales = 0, zeros = 0;
    int64_t sums = 0;
    *small = 0;
    switch (of->operation) {
    case BNFAST_MOMENTS:
        for (ptrdiff_t i = 0; i < n; i++)
            sums += !(of->mean[i] - of->mean[i] == 0.0);
        return (ptrdiff_t)sums + (NARROW ? 0 : FN(edges_of_m2)(n, of));
    case BNFAST_FORWARD:
        sums = FN(edges_of_m2)(n, of);
        break;
    case BNFAST_BACKWARD_APPLY:
    case BNFAST_EVAL:
        break;
    default:
        for (ptrdiff_t i = 0; i < n; i++)
            sums += !(b[i] - b[i] == 0.0);
        for (ptrdiff_t i = 0; !NARROW && i < n; i++) /* products that have lost digits */
            sums += (of->inv_std[i] > 1e20) & (b[i] < lost) & (b[i] > -lost);
    }
    if (of->operation == BNFAST_BACKWARD_SUMS)
        return (ptrdiff_t)sums;
    const T *restrict by_gamma = scale; /* what gamma is a factor of */
    if (of->operation == BNFAST_FORWARD || of->operation == BNFAST_BACKWARD_EVAL)
        for (ptrdiff_t i = 0; i < n; i++)
            maps += !UP_TO(shift[i], NO_PART);
    else if (of->operation == BNFAST_EVAL)
        for (ptrdiff_t i = 0; i < n; i++)
            maps += !(UP_TO(shift[i], NO_PART) & UP_TO(center[i], NO_PART));
    else {
        by_gamma = u_scale;
        for (ptrdiff_t i = 0; i < n; i++)
            maps += !(WITHIN(scale[i], (T)(NARROW ? 1e-30 : 1e-290), MOST_SCALE) & UP_TO(shift[i], NO_PART) &
                      UP_TO(hat_scale[i], MOST_SCALE) & UP_TO(u_center[i], NO_PART));
    }
    for (ptrdiff_t i = 0; i < n; i++) {
        maps += !(WITHIN(by_gamma[i], LEAST_NORMAL, MOST_SCALE) | (by_gamma[i] == 0));
        scales += IS_SMALL(by_gamma[i]);
        zeros += by_gamma[i] == 0;
    }
    *small = (ptrdiff_t)scales;
    return (ptrdiff_t)maps + (ptrdiff_t)sums + (zeros ? FN(vanished)(n, by_gamma, &of->gamma) : 0);
}

static ptrdiff_t FN(usable_variances)(ptrdiff_t n, const bnfast_parameter *of, double eps)
{
    double room[GROUP];
    int64_t usable = 0;
    for (ptrdiff_t first = 0; first < n; first += GROUP) {
        const ptrdiff_t some = n - first < GROUP ? n - first : GROUP;
        const double *restrict const var = FN(values_of)(of, FN(zeros), first, some, room);
        for (ptrdiff_t i = 0; i < some; i++)
            usable += (var[i] + eps > 0.0) & (var[i] - var[i] == 0.0);
    }
    return (ptrdiff_t)usable;
}
