/* The two reductions of the backward pass over one segment: sum(u) and sum(u * (x - center)).
 *
 * u is dy (or, for the forward-mode derivative, the direction). Summed as sums.inc.h does it; products beyond the range
 * of float32 send the segment through float64. Memory traffic: one read of x and of u. */

/* One column in float64. x, u: (n_rows, length), rows `stride` apart IN */
static void FN(sums_wide)(const T *x, const T *u, ptrdiff_t n_rows, ptrdiff_t stride, ptrdiff_t length, double center,
                          double *sum, double *dot)
{
    double wide_sum[64 / sizeof(T)] = {0}, wide_dot[64 / sizeof(T)] = {0};
    for (ptrdiff_t r = 0; r < n_rows; r++)
        for (ptrdiff_t j = 0; j < length; j += VL)
            for (ptrdiff_t i = 0; i < VL && j + i < length; i++) {
                const double v = (double)u[r * stride + j + i];
                wide_sum[i] += v;
                wide_dot[i] += v * ((double)x[r * stride + j + i] - center);
            }
    *sum = FN(fold_lanes)(wide_sum);
    *dot = FN(fold_lanes)(wide_dot);
}

/* Whether products of float32 may have overflowed, or lost digits to underflow. */
static int FN(out_of_range)(double n, double sum, double dot)
{
    if (sizeof(T) != 4 || (sum == 0.0 && dot == 0.0))
        return 0;
    return !(sum - sum == 0.0 && dot - dot == 0.0) || (dot < n * 1e-30 && dot > n * -1e-30);
}

static void FN(sums_planar)(const void *data, const void *data_u, const bnfast_runs *runs, ptrdiff_t next,
                            const void *center_in, double *sum, double *dot)
{
    const T *x = data, *u = data_u, *centers = center_in;
    FN(sums_of_runs)(x, u, runs, next, centers, 1, sum, dot, NULL);
    for (ptrdiff_t i = 0; i < runs->n_channels; i++)
        if (FN(out_of_range)((double)runs->n_rows * (double)runs->length, sum[i], dot[i]))
            FN(sums_wide)(x + i * runs->length, u + i * runs->length, runs->n_rows, runs->stride, runs->length,
                          (double)centers[i], sum + i, dot + i);
}

static void FN(sums_interleaved)(const void *data, const void *data_u, ptrdiff_t n_rows, ptrdiff_t stride,
                                 ptrdiff_t n_columns, const void *center, double *sum, double *dot, void *packed_x,
                                 void *packed_u)
{
    const T *x = data, *u = data_u, *centers = center;
    for (ptrdiff_t c = 0; c < n_columns; c += COLUMNS)
        FN(sums_of_columns)(x + c, u + c, n_rows, stride, packed_x ? (T *)packed_x + c : NULL,
                            packed_x ? (T *)packed_u + c : NULL, n_columns,
                            n_columns - c < COLUMNS ? n_columns - c : COLUMNS, centers + c, 1, sum + c, dot + c);
    for (ptrdiff_t c = 0; c < n_columns; c++)
        if (FN(out_of_range)((double)n_rows, sum[c], dot[c]))
            FN(sums_wide)(x + c, u + c, n_rows, stride, 1, (double)centers[c], sum + c, dot + c);
}
