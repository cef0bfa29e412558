/* The two reductions of the backward pass over one segment: sum(u) and sum(u * (x - center)).
 *
 * u is dy (or, for the forward-mode derivative, the direction). The lanes take FLUSH terms in the data's dtype and
 * then go to float64, so no digit is lost with the number of elements: relative to the sum of the absolute terms
 * the error is at most FLUSH * 2^-25 for float32, 1e-8 typically. Products beyond the range of float32 send
 * the segment through float64. Memory traffic: one read of x and of u. */

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

static void FN(sums_planar)(const void *data, const void *data_u, ptrdiff_t n_rows, ptrdiff_t stride, ptrdiff_t length,
                            const void *center_in, double *sum_out, double *dot_out)
{
    const T *x = data, *u = data_u, center_value = *(const T *)center_in;
    const FN(vec) center = FN(set1)(center_value), zero = FN(set1)(0);
    FN(vec) sum[VU], dot[VU];
    FN(wide) wide_sum[VU * WIDE_PER_VEC], wide_dot[VU * WIDE_PER_VEC];
    memset(wide_sum, 0, sizeof wide_sum);
    memset(wide_dot, 0, sizeof wide_dot);
    for (ptrdiff_t k = 0; k < VU; k++)
        sum[k] = dot[k] = zero;
    ptrdiff_t room = FLUSH; /* terms a lane may still take */
#define FLUSH_LANES                                                                                                    \
    if (room == 0) {                                                                                                   \
        FN(widen_add)(wide_sum, sum);                                                                                  \
        FN(widen_add)(wide_dot, dot);                                                                                  \
        for (ptrdiff_t k = 0; k < VU; k++)                                                                             \
            sum[k] = dot[k] = zero;                                                                                    \
        room = FLUSH;                                                                                                  \
    }
    for (ptrdiff_t r = 0; r < n_rows; r++) {
        const T *row = x + r * stride, *row_u = u + r * stride;
        ptrdiff_t left = length;
        while (left >= VL) {
            const ptrdiff_t steps = left / VL < room ? left / VL : room;
            for (ptrdiff_t s = 0; s < steps; s++, row += VL, row_u += VL)
                {
                    PREFETCH(row, AHEAD_BYTES);
                    PREFETCH(row_u, AHEAD_BYTES);
                    for (ptrdiff_t k = 0; k < VU; k++) {
                        const FN(vec) v = FN(load)(row_u + k * VN);
                        sum[k] += v;
                        dot[k] += v * (FN(load)(row + k * VN) - center);
                    }
                }
            left -= steps * VL;
            room -= steps;
            FLUSH_LANES
        }
        if (left > 0) {
            for (ptrdiff_t k = 0; k < VU; k++) {
                const FN(vec) v = FN(load_part)(row_u + k * VN, left - k * VN, zero);
                sum[k] += v;
                dot[k] += v * (FN(load_part)(row + k * VN, left - k * VN, center) - center);
            }
            room -= 1;
            FLUSH_LANES
        }
    }
    room = 0;
    FLUSH_LANES
#undef FLUSH_LANES
    *sum_out = FN(fold_wide)(wide_sum);
    *dot_out = FN(fold_wide)(wide_dot);
    if (FN(out_of_range)((double)n_rows * (double)length, *sum_out, *dot_out))
        FN(sums_wide)(x, u, n_rows, stride, length, (double)center_value, sum_out, dot_out);
}

static void FN(sums_interleaved)(const void *data, const void *data_u, ptrdiff_t n_rows, ptrdiff_t stride,
                                 ptrdiff_t n_columns, const void *center_in, double *sum_out, double *dot_out)
{
    const T *centers = center_in;
    const FN(vec) zero = FN(set1)(0);
    for (ptrdiff_t c = 0; c < n_columns; c++)
        sum_out[c] = dot_out[c] = 0.0;
    for (ptrdiff_t r = 0; r < n_rows; r += FLUSH) {
        const ptrdiff_t terms = n_rows - r < FLUSH ? n_rows - r : FLUSH;
        const T *rows = (const T *)data + r * stride, *rows_u = (const T *)data_u + r * stride;
        ptrdiff_t c = 0;
        for (; c + VN <= n_columns; c += VN) {
            const FN(vec) center = FN(load)(centers + c);
            FN(vec) sum = zero, dot = zero;
            for (ptrdiff_t t = 0; t < terms; t++) {
                PREFETCH(rows + t * stride + c, FLUSH * stride * (ptrdiff_t)sizeof(T));
                PREFETCH(rows_u + t * stride + c, FLUSH * stride * (ptrdiff_t)sizeof(T));
                const FN(vec) v = FN(load)(rows_u + t * stride + c);
                sum += v;
                dot += v * (FN(load)(rows + t * stride + c) - center);
            }
            FN(widen_add_columns)(sum_out + c, sum, VN);
            FN(widen_add_columns)(dot_out + c, dot, VN);
        }
        if (c < n_columns) {
            const ptrdiff_t n = n_columns - c;
            const FN(vec) center = FN(load_part)(centers + c, n, zero);
            FN(vec) sum = zero, dot = zero;
            for (ptrdiff_t t = 0; t < terms; t++) {
                const FN(vec) v = FN(load_part)(rows_u + t * stride + c, n, zero);
                sum += v;
                dot += v * (FN(load_part)(rows + t * stride + c, n, center) - center);
            }
            FN(widen_add_columns)(sum_out + c, sum, n);
            FN(widen_add_columns)(dot_out + c, dot, n);
        }
    }
    for (ptrdiff_t c = 0; c < n_columns; c++)
        if (FN(out_of_range)((double)n_rows, sum_out[c], dot_out[c]))
            FN(sums_wide)((const T *)data + c, (const T *)data_u + c, n_rows, stride, 1, (double)centers[c], sum_out + c,
                          dot_out + c);
}
