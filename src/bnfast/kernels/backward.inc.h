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

/* Whether products of float32 may have overflowed, or lost digits to underflow. */
static int FN(out_of_range)(double n, double sum_u, double sum_ud)
{
    if (sizeof(T) != 4 || (sum_u == 0.0 && sum_ud == 0.0))
        return 0;
    return !(sum_u - sum_u == 0.0 && sum_ud - sum_ud == 0.0) || (sum_ud < n * 1e-30 && sum_ud > n * -1e-30);
}

static void FN(sums_planar)(const void *data, const void *data_u, const bnfast_runs *runs, ptrdiff_t next,
                            const void *center_in, double *sum_u, double *sum_ud)
{
    const T *x = data, *u = data_u, *centers = center_in;
    FN(sums_of_runs)(x, u, runs, next, centers, 1, sum_u, sum_ud, NULL);
    for (ptrdiff_t i = 0; i < runs->n_channels; i++)
        if (FN(out_of_range)((double)runs->n_rows * (double)runs->length, sum_u[i], sum_ud[i]))
            FN(sums_wide)(x + i * runs->length, u + i * runs->length, runs->n_rows, runs->stride, runs->length,
                          (double)centers[i], sum_u + i, sum_ud + i);
}

static void FN(sums_interleaved)(const void *data, const void *data_u, ptrdiff_t n_rows, ptrdiff_t stride,
                                 ptrdiff_t n_columns, const void *center, double *sum_u, double *sum_ud, void *packed_x,
                                 void *packed_u)
{
    const T *x = data, *u = data_u, *centers = center;
    for (ptrdiff_t c = 0; c < n_columns; c += COLUMNS)
        FN(sums_of_columns)(x + c, u + c, n_rows, stride, packed_x ? (T *)packed_x + c : NULL,
                            packed_x ? (T *)packed_u + c : NULL, n_columns,
                            n_columns - c < COLUMNS ? n_columns - c : COLUMNS, centers + c, 1, sum_u + c, sum_ud + c);
    for (ptrdiff_t c = 0; c < n_columns; c++)
        if (FN(out_of_range)((double)n_rows, sum_u[c], sum_ud[c]))
            FN(sums_wide)(x + c, u + c, n_rows, stride, 1, (double)centers[c], sum_u + c, sum_ud + c);
}
