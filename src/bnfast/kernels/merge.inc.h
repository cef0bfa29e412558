/* Merging what segments, or processes, gave: float64, whatever the data are. */

/* Chan, Golub, LeVeque (1979): n = a + b, d = mean_b - mean_a, mean = mean_a + d*b/n, m2 = m2_a + m2_b + d*d*a*b/n */
static void FN(merge_moments)(ptrdiff_t n, double count_a, double *restrict mean_a, double *restrict m2_a,
                              double count_b, const double *restrict mean_b, const double *restrict m2_b)
{
    const double part = count_b / (count_a + count_b), weight = count_a * part;
    for (ptrdiff_t i = 0; i < n; i++) {
        const double d = mean_b[i] - mean_a[i];
        mean_a[i] += d * part;
        m2_a[i] += m2_b[i] + d * d * weight;
    }
}

static void FN(merge_sums)(ptrdiff_t n, double *restrict u_a, double *restrict ud_a, const double *restrict u_b,
                           const double *restrict ud_b)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        u_a[i] += u_b[i];
        ud_a[i] += ud_b[i];
    }
}

/* As merge_moments, of rows of statistics (rows.h), with what the means were rounded by, which d would lose: far from zero
 * that is most of the error. far: some distance leaves the range, or a mean is infinite; there the mean is the average. (A
 * constant, so that the usual loop has no branches, and becomes one of vectors.) */
static ALWAYS_INLINE void FN(merge_row)(ptrdiff_t channels, double *restrict a, const double *restrict b, int far)
{
    const double count = a[0] + b[0], part = b[0] / count, weight = a[0] * part;
    double *restrict const mean_a = a + 1, *restrict const m2_a = mean_a + channels,
                           *restrict const rest_a = m2_a + channels;
    const double *restrict const mean_b = b + 1, *restrict const m2_b = mean_b + channels,
                                 *restrict const rest_b = m2_b + channels;
    for (ptrdiff_t i = 0; i < channels; i++) {
        const double old = mean_a[i], d = (mean_b[i] - old) + (rest_b[i] - rest_a[i]), step = rest_a[i] + d * part;
        const double mean = !far || d - d == 0.0 ? old + step : old * (a[0] / count) + mean_b[i] * part;
        /* Knuth's two-sum; 0 where something is not finite */
        const double from_step = mean - old, left = (old - (mean - from_step)) + (step - from_step);
        mean_a[i] = mean;
        m2_a[i] += m2_b[i] + d * d * weight;
        rest_a[i] = left - left == 0.0 ? left : 0.0;
    }
    a[0] = count;
}

static void FN(merge_moments_row)(ptrdiff_t channels, double *a, const double *b)
{
    const double *const rest_a = a + 2 * channels, *const rest_b = b + 2 * channels;
    int64_t far = 0;
    for (ptrdiff_t i = 1; i <= channels; i++) {
        const double d = (b[i] - a[i]) + (rest_b[i] - rest_a[i]);
        far += d - d != 0.0;
    }
    if (far > 0)
        FN(merge_row)(channels, a, b, 1);
    else
        FN(merge_row)(channels, a, b, 0);
}
