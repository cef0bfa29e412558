/* Merging rows of statistics: neighbours in pairs, then pairs of pairs, so that the result depends on their order alone,
 * and its error grows with the logarithm of their number. */

#include "rows.h"

#include <string.h>

/* Chan, Golub, LeVeque (1979): n = a + b, d = mean_b - mean_a, mean = mean_a + d*b/n, m2 = m2_a + m2_b + d*d*a*b/n.
 * rest: what a mean was rounded by, which d would lose: far from zero that is most of the error. far: some distance leaves
 * the range, or a mean is infinite; there the mean is the average. (A constant, so that the usual loop has no branches, and
 * becomes one of vectors.) */
static inline void merge_channels(double *restrict a, const double *restrict b, ptrdiff_t channels, int rests, int far)
{
    const double count = a[0] + b[0], part = b[0] / count, weight = a[0] * part;
    double *restrict const mean_a = a + 1, *restrict const m2_a = mean_a + channels,
                           *restrict const rest_a = m2_a + channels;
    const double *restrict const mean_b = b + 1, *restrict const m2_b = mean_b + channels,
                                 *restrict const rest_b = m2_b + channels;
    for (ptrdiff_t i = 0; i < channels; i++) {
        const double old = mean_a[i];
        const double d = (mean_b[i] - old) + (rests ? rest_b[i] - rest_a[i] : 0.0);
        const double step = (rests ? rest_a[i] : 0.0) + d * part;
        const double mean = !far || d - d == 0.0 ? old + step : old * (a[0] / count) + mean_b[i] * part;
        const double from_step = mean - old;
        mean_a[i] = mean;
        m2_a[i] += m2_b[i] + d * d * weight;
        if (rests) { /* Knuth's two-sum; 0 where something is not finite */
            const double left = (old - (mean - from_step)) + (step - from_step);
            rest_a[i] = left - left == 0.0 ? left : 0.0;
        }
    }
    a[0] = count;
}

static void merge_moments(double *a, const double *b, ptrdiff_t channels, int rests)
{
    double zero = 0.0; /* NaN, if a distance is not finite */
    for (ptrdiff_t i = 1; i <= channels; i++) {
        const ptrdiff_t rest = 2 * channels + i;
        zero += ((b[i] - a[i]) + (rests ? b[rest] - a[rest] : 0.0)) * 0.0;
    }
    if (zero != 0.0)
        merge_channels(a, b, channels, rests, 1);
    else if (rests)
        merge_channels(a, b, channels, 1, 0);
    else
        merge_channels(a, b, channels, 0, 0);
}

void bnfast_merge_moments_rows(double *rows, ptrdiff_t n_rows, ptrdiff_t stride, ptrdiff_t channels, int rests)
{
    const size_t bytes = (size_t)(1 + (rests ? 3 : 2) * channels) * sizeof *rows;
    for (ptrdiff_t step = 1; step < n_rows; step *= 2)
        for (ptrdiff_t i = 0; i + step < n_rows; i += 2 * step) {
            double *const a = rows + i * stride, *const b = a + step * stride;
            if (b[0] == 0.0)
                continue;
            if (a[0] == 0.0)
                memcpy(a, b, bytes);
            else
                merge_moments(a, b, channels, rests);
        }
}

void bnfast_merge_sums_rows(double *rows, ptrdiff_t n_rows, ptrdiff_t stride, ptrdiff_t n_sums)
{
    for (ptrdiff_t step = 1; step < n_rows; step *= 2)
        for (ptrdiff_t i = 0; i + step < n_rows; i += 2 * step)
            for (ptrdiff_t k = 0; k <= n_sums; k++)
                rows[i * stride + k] += rows[(i + step) * stride + k];
}
