/* The two reductions of the backward pass over one segment: sum(u) and sum(u * (x - center)).
 *
 * u is dy (or, for the forward-mode derivative, the direction). Summed as sums.inc.h does it; products beyond the range
 * of float32 send the segment through float64. Memory traffic: one read of x and of u. */

/* In float64, of products of which float32 loses digits: of one channel in the lanes that sums_of_rows has.
 * x, u: (n_rows, length), rows `stride` apart IN */
static ALWAYS_INLINE void FN(sums_of_rows_wide)(const S *x, const S *u, ptrdiff_t n_rows, ptrdiff_t stride,
                                                ptrdiff_t length, T center_value, struct FN(passing) passing, int kind,
                                                double *sum_u, double *sum_ud)
{
    const FN(vec) center = FN(set1)(center_value), zero = FN(set1)(0);
    const FN(wide) center_wide = FN(widen)(center, 0);
    FN(vec) y_scale = zero, y_shift = zero;
    if (TAKES_SOME(kind)) {
        y_scale = FN(set1)(*passing.y_scale);
        y_shift = FN(set1)(*passing.y_shift);
    }
    FN(wide) wide_u[VU * WIDE_PER_VEC], wide_ud[VU * WIDE_PER_VEC];
    memset(wide_u, 0, sizeof wide_u);
    memset(wide_ud, 0, sizeof wide_ud);
    for (ptrdiff_t r = 0; r < n_rows; r++)
        for (ptrdiff_t j = 0; j < length; j += VL)
            for (int k = 0; k < VU; k++) {
                const ptrdiff_t at = r * stride + j + k * VN, left = length - j - k * VN;
                const FN(vec) values = FN(read_part)(x + at, left, center);
                const FN(vec) taken = FN(taken)(&passing, at, FN(within)(left), values,
                                                FN(read_part)(u + at, left, zero), center, y_scale, y_shift, kind);
                for (int h = 0; h < WIDE_PER_VEC; h++) {
                    const FN(wide) t = FN(widen)(taken, h);
                    wide_u[k * WIDE_PER_VEC + h] += t;
                    wide_ud[k * WIDE_PER_VEC + h] += t * (FN(widen)(values, h) - center_wide);
                }
            }
    *sum_u = FN(fold_wide)(wide_u);
    *sum_ud = FN(fold_wide)(wide_ud);
}

/* The same of n <= VN columns, row by row. sum_u, sum_ud: (VN,) OUT */
static ALWAYS_INLINE void FN(sums_of_columns_wide)(const S *x, const S *u, ptrdiff_t n_rows, ptrdiff_t stride,
                                                   ptrdiff_t n, const T *centers, struct FN(passing) passing, int kind,
                                                   double *sum_u, double *sum_ud)
{
    const FN(vec) zero = FN(set1)(0), center = FN(load_part)(centers, n, zero);
    FN(vec) y_scale = zero, y_shift = zero;
    if (TAKES_SOME(kind)) {
        y_scale = FN(load_part)(passing.y_scale, n, zero);
        y_shift = FN(load_part)(passing.y_shift, n, zero);
    }
    FN(wide) wide_u[WIDE_PER_VEC], wide_ud[WIDE_PER_VEC];
    memset(wide_u, 0, sizeof wide_u);
    memset(wide_ud, 0, sizeof wide_ud);
    for (ptrdiff_t r = 0; r < n_rows; r++) {
        const FN(vec) values = FN(read_part)(x + r * stride, n, center);
        const FN(vec) taken = FN(taken)(&passing, r * stride, n, values, FN(read_part)(u + r * stride, n, zero), center,
                                        y_scale, y_shift, kind);
        for (int h = 0; h < WIDE_PER_VEC; h++) {
            const FN(wide) t = FN(widen)(taken, h);
            wide_u[h] += t;
            wide_ud[h] += t * (FN(widen)(values, h) - FN(widen)(center, h));
        }
    }
    for (int h = 0; h < WIDE_PER_VEC; h++) {
        FN(store_wide)(sum_u + h * WN, wide_u[h]);
        FN(store_wide)(sum_ud + h * WN, wide_ud[h]);
    }
}

/* What is left to take of u once a reduction has stored what it took. */
static ALWAYS_INLINE int FN(is_left)(const bnfast_passing *passing) { return passing && !passing->passed; }
static ALWAYS_INLINE const S *FN(what_is_left)(const bnfast_passing *passing, const S *u)
{
    return passing && passing->passed ? (const S *)passing->passed : u;
}

static ALWAYS_INLINE int FN(kind_of)(const bnfast_passing *passing)
{
    if (!passing)
        return ALL;
    if (passing->residual || passing->passed)
        return PASSED;
    if (passing->marks)
        return SPECIALISES ? MARKED : PASSED;
    return bnfast_is_relu(&passing->rectifier) ? RELU : RECTIFIED;
}

/* Whether no product of float32 has overflowed, or lost digits to underflow; least: of n terms the sum should be so
 * much. Without branches, for loops over columns. */
#define IN_RANGE(least, sum_u, sum_ud) \
    ((NARROW == 0) | (((sum_u) == 0.0) & ((sum_ud) == 0.0)) | \
     (((sum_u) - (sum_u) == 0.0) & ((sum_ud) - (sum_ud) == 0.0) & (((sum_ud) >= (least)) | ((sum_ud) <= -(least)))))

static void FN(sums_planar)(const void *data, const void *data_u, const bnfast_runs *runs, ptrdiff_t next,
                            const void *center_in, const bnfast_passing *passing, double *sum_u, double *sum_ud,
                            bnfast_writer *writer)
{
    const S *x = data, *u = data_u;
    const T *centers = center_in;
    const int kind = FN(kind_of)(passing);
#define SUMS(kind, w, flags) FN(sums_of_long_rows)(x, u, runs, next, centers, passing, kind, sum_u, sum_ud, w, flags)
    if (FN(summed_as_columns)(runs))
        FN(sums_of_short_rows)(x, u, runs, next, centers, passing, kind, sum_u, sum_ud);
    else if (kind == ALL && writer)
        SUMS(ALL, writer, BNFAST_GRADIENT);
    else if (kind == ALL)
        SUMS(ALL, NULL, 0);
    else if (kind == RELU && writer == NULL)
        SUMS(RELU, NULL, 0);
    else if (kind == RELU)
        SUMS(RELU, writer, BNFAST_GRADIENT | BNFAST_RECTIFY | BNFAST_RELU);
    else if (kind == RECTIFIED && writer == NULL)
        SUMS(RECTIFIED, NULL, 0);
    else if (kind == RECTIFIED)
        SUMS(RECTIFIED, writer, BNFAST_GRADIENT | BNFAST_RECTIFY);
    else if (writer == NULL)
        SUMS(PASSED, NULL, 0);
    else if (passing->passed)
        SUMS(PASSED, writer, BNFAST_GRADIENT);
    else /* too much beside it for one loop */
        SUMS(PASSED, writer, BY_TURNS);
#undef SUMS
    for (ptrdiff_t i = 0; i < runs->n_channels; i++) {
        if (IN_RANGE((double)runs->n_rows * (double)runs->length * 1e-30, sum_u[i], sum_ud[i]))
            continue;
        const ptrdiff_t at = i * runs->length;
        const S *const left = FN(what_is_left)(passing, u) + at;
#define WIDE(kind) \
    FN(sums_of_rows_wide)(x + at, left, runs->n_rows, runs->stride, runs->length, centers[i], \
                          FN(passing_at)(FN(passing_of)(passing), at, i, kind), kind, sum_u + i, sum_ud + i)
        if (FN(is_left)(passing))
            WIDE(PASSED);
        else
            WIDE(ALL);
#undef WIDE
    }
}

static void FN(sums_interleaved)(const void *data, const void *data_u, const bnfast_rows *rows, const void *center,
                                 const bnfast_passing *passing, double *sum_u, double *sum_ud, void *packed_x,
                                 void *packed_u)
{
    const S *x = data, *u = data_u;
    const T *centers = center;
    const ptrdiff_t n_rows = rows->n_rows, stride = rows->stride, n_columns = rows->n_columns;
    const int kind = FN(kind_of)(passing);
    const struct FN(passing) taken = FN(passing_of)(passing);
    const struct FN(tile) all = {.x = x,
                                 .u = u,
                                 .n_rows = n_rows,
                                 .stride = stride,
                                 .packed_x = packed_x,
                                 .packed_u = packed_u,
                                 .packed_stride = n_columns,
                                 .centers = centers,
                                 .passing = &taken,
                                 .sum_v = sum_u,
                                 .sum_vd = sum_ud};
    const double least = (double)n_rows * 1e-30;
    for (ptrdiff_t first = 0; first < n_columns; first += COLUMNS) {
        const ptrdiff_t n = n_columns - first < COLUMNS ? n_columns - first : COLUMNS;
        const ptrdiff_t next = FN(next_of)(rows, first, n);
        double *restrict const sum = sum_u + first, *restrict const product = sum_ud + first;
        const struct FN(tile) some = FN(tile_at)(&all, first);
        if (kind == ALL)
            FN(sums_of_columns)(&some, n, next, ALL, rows->near);
        else if (kind == RELU)
            FN(sums_of_columns)(&some, n, next, RELU, rows->near);
        else if (kind == RECTIFIED)
            FN(sums_of_columns)(&some, n, next, RECTIFIED, rows->near);
        else if (SPECIALISES && kind == MARKED)
            FN(sums_of_columns)(&some, n, next, MARKED, rows->near);
        else
            FN(sums_of_columns)(&some, n, next, PASSED, rows->near);
        int64_t n_outside = 0;
        for (ptrdiff_t c = 0; c < n; c++)
            n_outside += !IN_RANGE(least, sum[c], product[c]);
        for (ptrdiff_t c = 0; n_outside > 0 && c < n; c += VN) {
            const ptrdiff_t at = first + c, some_columns = n - c < VN ? n - c : VN;
            const S *const left = FN(what_is_left)(passing, u) + at;
            double wide_u[VN], wide_ud[VN];
#define WIDE(kind) \
    FN(sums_of_columns_wide)(x + at, left, n_rows, stride, some_columns, centers + at, \
                             FN(passing_at)(taken, at, at, kind), kind, wide_u, wide_ud)
            if (FN(is_left)(passing))
                WIDE(PASSED);
            else
                WIDE(ALL);
#undef WIDE
            for (ptrdiff_t k = 0; k < some_columns; k++)
                if (!IN_RANGE(least, sum[c + k], product[c + k])) {
                    sum[c + k] = wide_u[k];
                    product[c + k] = wide_ud[k];
                }
        }
    }
}
