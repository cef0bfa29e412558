/* Merging rows of statistics: neighbours in pairs, then pairs of pairs, so that the result depends on their order alone,
 * and its error grows with the logarithm of their number. */

#include "rows.h"

#include <string.h>

void bnfast_merge_moments_rows(double *rows, ptrdiff_t n_rows, ptrdiff_t stride, ptrdiff_t channels)
{
    const size_t bytes = (size_t)(1 + 3 * channels) * sizeof *rows;
    for (ptrdiff_t step = 1; step < n_rows; step *= 2)
        for (ptrdiff_t i = 0; i + step < n_rows; i += 2 * step) {
            double *const a = rows + i * stride, *const b = a + step * stride;
            if (b[0] == 0.0)
                continue;
            if (a[0] == 0.0)
                memcpy(a, b, bytes);
            else
                bnfast_active(BNFAST_FLOAT64)->merge_moments_row(channels, a, b);
        }
}

void bnfast_merge_sums_rows(double *rows, ptrdiff_t n_rows, ptrdiff_t stride, ptrdiff_t n_sums)
{
    for (ptrdiff_t step = 1; step < n_rows; step *= 2)
        for (ptrdiff_t i = 0; i + step < n_rows; i += 2 * step)
            for (ptrdiff_t k = 0; k <= n_sums; k++)
                rows[i * stride + k] += rows[(i + step) * stride + k];
}
