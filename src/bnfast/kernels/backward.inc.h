/* The two reductions of the backward pass over one segment: sum(u) and sum(u * (x - center)).
 *
 * u is dy (or, for the forward-mode derivative, the direction). Summed as sums.inc.h does it; products beyond the range
 * of float32 send the segment through float64. Memory traffic: one read of x and of u. */

/* One column in float64. x, u: (n_rows, length), rows `stride` apart IN; passing: of this column, from x on; or NULL */
static void FN(sums_wide)(const T *x, const T *u, ptrdiff_t n_rows, ptrdiff_t stride, ptrdiff_t length, T center,
                          const bnfast_passing *passing, ptrdiff_t at, ptrdiff_t channel, double *sum_u, double *sum_ud)
{
    double wide_u[64 / sizeof(T)] = {0}, wide_ud[64 / sizeof(T)] = {0};
    T y_scale = 0, y_shift = 0;
    if (passing && passing->passed) {
        u = (const T *)passing->passed + at; /* as it was taken */
        passing = NULL;
    }
    if (passing) {
        y_scale = ((const T *)passing->y_scale)[channel];
        y_shift = ((const T *)passing->y_shift)[channel];
    }
    for (ptrdiff_t r = 0; r < n_rows; r++)
        for (ptrdiff_t j = 0; j < length; j += VL)
            for (ptrdiff_t i = 0; i < VL && j + i < length; i++) {
                const T value = x[r * stride + j + i];
                T taken = u[r * stride + j + i];
                if (passing) {
                    T v = (value - center) * y_scale + y_shift;
                    if (passing->residual)
                        v += ((const T *)passing->residual)[at + r * stride + j + i];
                    taken = FN(passed_one)(&passing->rectifier, taken, v);
                }
                wide_u[i] += (double)taken;
                wide_ud[i] += (double)taken * ((double)value - (double)center);
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
                            const void *center_in, const bnfast_passing *passing, double *sum_u, double *sum_ud,
                            bnfast_writer *writer)
{
    const T *x = data, *u = data_u, *centers = center_in;
    const int kind = passing ? PASSED : ALL;
#define SUMS(kind, w, flags) FN(sums_of_long_rows)(x, u, runs, next, centers, passing, kind, sum_u, sum_ud, w, flags)
    if (FN(summed_as_columns)(runs))
        FN(sums_of_short_rows)(x, u, runs, next, centers, passing, kind, sum_u, sum_ud);
    else if (kind == ALL && writer)
        SUMS(ALL, writer, BNFAST_GRADIENT);
    else if (kind == ALL)
        SUMS(ALL, NULL, 0);
    else if (writer == NULL)
        SUMS(PASSED, NULL, 0);
    else if (passing->passed)
        SUMS(PASSED, writer, BNFAST_GRADIENT);
    else
        SUMS(PASSED, writer, BNFAST_GRADIENT | BNFAST_RECTIFY);
#undef SUMS
    for (ptrdiff_t i = 0; i < runs->n_channels; i++)
        if (!IN_RANGE((double)runs->n_rows * (double)runs->length * 1e-30, sum_u[i], sum_ud[i]))
            FN(sums_wide)(x + i * runs->length, u + i * runs->length, runs->n_rows, runs->stride, runs->length,
                          centers[i], passing, i * runs->length, i, sum_u + i, sum_ud + i);
}

static void FN(sums_interleaved)(const void *data, const void *data_u, const bnfast_rows *rows, const void *center,
                                 const bnfast_passing *passing, double *sum_u, double *sum_ud, void *packed_x,
                                 void *packed_u)
{
    const T *x = data, *u = data_u, *centers = center;
    const ptrdiff_t n_rows = rows->n_rows, stride = rows->stride, n_columns = rows->n_columns;
    const struct FN(tile) all = {.x = x,
                                 .u = u,
                                 .n_rows = n_rows,
                                 .stride = stride,
                                 .packed_x = packed_x,
                                 .packed_u = packed_u,
                                 .packed_stride = n_columns,
                                 .centers = centers,
                                 .passing = FN(passing_of)(passing),
                                 .sum_v = sum_u,
                                 .sum_vd = sum_ud};
    const double least = (double)n_rows * 1e-30;
    for (ptrdiff_t first = 0; first < n_columns; first += COLUMNS) {
        const ptrdiff_t n = n_columns - first < COLUMNS ? n_columns - first : COLUMNS;
        double *restrict const sum = sum_u + first, *restrict const product = sum_ud + first;
        const struct FN(tile) some = FN(tile_at)(&all, first, passing ? PASSED : ALL);
        if (passing)
            FN(sums_of_columns)(&some, n, PASSED, rows->near);
        else
            FN(sums_of_columns)(&some, n, ALL, rows->near);
        int n_outside = 0;
        for (ptrdiff_t c = 0; c < n; c++)
            n_outside += !IN_RANGE(least, sum[c], product[c]);
        for (ptrdiff_t c = 0; n_outside > 0 && c < n; c++)
            if (!IN_RANGE(least, sum[c], product[c]))
                FN(sums_wide)(x + first + c, u + first + c, n_rows, stride, 1, centers[first + c], passing, first + c,
                              first + c, sum + c, product + c);
    }
}
