/* The two reductions of the backward pass over one segment: sum(u) and sum(u * (x - center)).
 *
 * u is dy (or, for the forward-mode derivative, the direction). Summed as sums.inc.h does it; products beyond the range
 * of float32 send the segment through float64. Memory traffic: one read of x and of u. */

/* One column in float64. x, u: (n_rows, length), rows `stride` apart IN */
static void FN(sums_wide)(const T *x, const T *u, ptrdiff_t n_rows, ptrdiff_t stride, ptrdiff_t length, double center,
                          double *sum_u, double *sum_ud)
{
    double wide_u[64 / sizeof(T)] = {0}, wide_ud[64 / sizeof(T)] = {0};
    for (ptrdiff_t r = 0; r < n_rows; r++)
        for (ptrdiff_t j = 0; j < length; j += VL)
            for (ptrdiff_t i = 0; i < VL && j + i < length; i++) {
                const double v = (double)u[r * stride + j + i];
                wide_u[i] += v;
                wide_ud[i] += v * ((double)x[r * stride + j + i] - center);
            }
    *sum_u = FN(fold_lanes)(wide_u);
    *sum_ud = FN(fold_lanes)(wide_ud);
}

/* Whether no product of float32 has overflowed, or lost digits to underflow; least: of n terms the sum should be so
 * much. Without branches, for loops over columns. */
#define IN_RANGE(least, sum_u, sum_ud) \
    ((sizeof(T) != 4) | (((sum_u) == 0.0) & ((sum_ud) == 0.0)) | \
     (((sum_u) - (sum_u) == 0.0) & ((sum_ud) - (sum_ud) == 0.0) & (((sum_ud) >= (least)) | ((sum_ud) <= -(least)))))

static void FN(sums_planar)(const void *data, const void *data_u, const bnfast_runs *runs, ptrdiff_t next,
                            const void *center_in, double *sum_u, double *sum_ud, bnfast_writer *writer)
{
    const T *x = data, *u = data_u, *centers = center_in;
    FN(sums_of_runs)(x, u, runs, next, centers, 1, sum_u, sum_ud, writer);
    for (ptrdiff_t i = 0; i < runs->n_channels; i++)
        if (!IN_RANGE((double)runs->n_rows * (double)runs->length * 1e-30, sum_u[i], sum_ud[i]))
            FN(sums_wide)(x + i * runs->length, u + i * runs->length, runs->n_rows, runs->stride, runs->length,
                          (double)centers[i], sum_u + i, sum_ud + i);
}

static void FN(sums_interleaved)(const void *data, const void *data_u, const bnfast_rows *rows, const void *center,
                                 double *sum_u, double *sum_ud, void *packed_x, void *packed_u)
{
    const T *x = data, *u = data_u, *centers = center;
    const ptrdiff_t n_rows = rows->n_rows, stride = rows->stride, n_columns = rows->n_columns;
    const double least = (double)n_rows * 1e-30;
    for (ptrdiff_t first = 0; first < n_columns; first += COLUMNS) {
        const ptrdiff_t n = n_columns - first < COLUMNS ? n_columns - first : COLUMNS;
        double *restrict const sum = sum_u + first, *restrict const product = sum_ud + first;
        FN(sums_of_columns)(x + first, u + first, n_rows, stride, packed_x ? (T *)packed_x + first : NULL,
                            packed_x ? (T *)packed_u + first : NULL, n_columns, n, centers + first, 1, sum, product,
                            rows->near);
        int n_outside = 0;
        for (ptrdiff_t c = 0; c < n; c++)
            n_outside += !IN_RANGE(least, sum[c], product[c]);
        for (ptrdiff_t c = 0; n_outside > 0 && c < n; c++)
            if (!IN_RANGE(least, sum[c], product[c]))
                FN(sums_wide)(x + first + c, u + first + c, n_rows, stride, 1, (double)centers[first + c], sum + c,
                              product + c);
    }
}
