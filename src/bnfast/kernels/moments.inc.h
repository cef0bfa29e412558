/* Mean and sum of squared deviations of a segment, in one pass over memory.
 *
 * Textbook Welford divides once an element. Instead a pivot close to the mean is subtracted, d = x - pivot, and
 * d and d*d are summed as sums.inc.h does it. Then mean = pivot + sum(d)/n and
 * m2 = sum(d*d) - sum(d)^2/n. The subtraction loses log2(sum(d*d) / m2) bits, so a pivot far from the mean shows
 * in the sums themselves: PIVOT_LOSS is how much we accept. A segment that exceeds it, is not finite, or is so
 * small that d*d may have lost digits to underflow is done again in two passes of float64 while it lies in cache;
 * ordinary data never get there. The pivot is the mean of a few elements spread over the segment (the first ones
 * are often unlike the rest: image borders), summed as a tree so that a constant channel's pivot is exact.
 * The mean is given relative to `center`, a value typical of the channel: merging means far from zero would lose what
 * the pivot has saved. Relative error of m2 for float32: 1e-8 typically, 3e-7 in small segments, 1e-6 where one outlier
 * is most of it.
 * Memory traffic: one read. */

/* SAMPLES: elements for a pivot, spread over the segment, a power of two. PIVOT_CHANNELS: pivots at once, whose samples
 * are gathered for some at a time. WIDE_COLUMNS: columns that are summed in float64 at once. FEW_ROWS:
 * columns of float32 with fewer are always done in two passes of float64, as too few roundings average out */
#define PIVOT_SAMPLES 16
#define COLUMN_SAMPLES 8
#define PIVOT_CHANNELS 64
#define SAMPLED_CHANNELS 16
#define WIDE_COLUMNS ((ptrdiff_t)(1024 / sizeof(T)))
#define PIVOT_LOSS 3.0
#define FEW_ROWS (NARROW ? 16 : 0)
/* d*d of float32 is normal above 1.2e-38: a mean square below this is not trusted. float64 has nothing wider. */
#define SMALLEST_MEAN_SQUARE (NARROW ? 1e-30 : 0.0)

/* 1 / count where it has no rounding, so that a product with it is the quotient, which takes four times as long; or 0 */
static ALWAYS_INLINE double FN(exact_inverse)(double count)
{
    int exponent;
    return frexp(count, &exponent) == 0.5 ? 1.0 / count : 0.0;
}

static ALWAYS_INLINE double FN(quotient)(double sum, double count, double inverse)
{
    return inverse != 0.0 ? sum * inverse : sum / count;
}

/* Whether a segment's sums can be believed; without branches, so that a loop over columns becomes one of vectors.
 * sum and square 0: a constant channel; or every |d| < 2^-75, whose variance of less than 2^-150 is then given as zero.
 * NaN and Inf fail the comparisons. */
#define TRUSTED(least_square, sum, square, m2) \
    ((((sum) == 0.0) & ((square) == 0.0)) | \
     (((square) <= PIVOT_LOSS * (m2)) & ((square) - (square) == 0.0) & ((square) >= (least_square))))

/* A segment in two passes of float64, one column, in so many lanes. x: (n_rows, length), rows `stride` apart IN */
static void FN(moments_wide)(const S *x, ptrdiff_t n_rows, ptrdiff_t stride, ptrdiff_t length, ptrdiff_t lanes,
                             double center, double *mean, double *m2)
{
    const double n = (double)n_rows * (double)length;
    double sum[64 / sizeof(T)] = {0}, square[64 / sizeof(T)] = {0};
    for (ptrdiff_t r = 0; r < n_rows; r++)
        for (ptrdiff_t j = 0; j < length; j += lanes)
            for (ptrdiff_t i = 0; i < lanes && j + i < length; i++)
                sum[i] += (double)FN(value)(x[r * stride + j + i]);
    const double pivot = FN(fold_lanes)(sum) / n;
    memset(sum, 0, sizeof sum);
    for (ptrdiff_t r = 0; r < n_rows; r++)
        for (ptrdiff_t j = 0; j < length; j += lanes)
            for (ptrdiff_t i = 0; i < lanes && j + i < length; i++) {
                const double d = (double)FN(value)(x[r * stride + j + i]) - pivot;
                sum[i] += d;
                square[i] += d * d;
            }
    const double rest = FN(fold_lanes)(sum);
    *mean = (pivot - center) + rest / n;
    *m2 = FN(fold_lanes)(square) - rest * (rest / n);
    if (*m2 < 0.0)
        *m2 = 0.0;
}

/* For each of n_channels <= SAMPLED_CHANNELS channels the mean of a few elements spread over its segment.
 * x: (n_rows, n_channels, length), rows `stride` apart IN; pivots: (n_channels,) OUT */
static void FN(some_pivots_wide)(const S *x, ptrdiff_t n_rows, ptrdiff_t stride, ptrdiff_t n_channels, ptrdiff_t length,
                                 double *pivots)
{
    double sample[PIVOT_SAMPLES][SAMPLED_CHANNELS];
    ptrdiff_t samples = PIVOT_SAMPLES;
    while (samples > n_rows * length)
        samples /= 2;
    for (ptrdiff_t i = 0; i < samples; i++) {
        const S *from = x + i * n_rows / samples * stride + i * length / samples;
        for (ptrdiff_t c = 0; c < n_channels; c++)
            sample[i][c] = (double)FN(value)(from[c * length]);
    }
    for (ptrdiff_t half = samples / 2; half > 0; half /= 2)
        for (ptrdiff_t i = 0; i < half; i++)
            for (ptrdiff_t c = 0; c < n_channels; c++)
                sample[i][c] += sample[i + half][c];
    for (ptrdiff_t c = 0; c < n_channels; c++)
        pivots[c] = sample[0][c] / (double)samples;
}

/* The same for any number of channels. */
static void FN(pivots_wide)(const S *x, ptrdiff_t n_rows, ptrdiff_t stride, ptrdiff_t n_channels, ptrdiff_t length,
                            double *pivots)
{
    for (ptrdiff_t c = 0; c < n_channels; c += SAMPLED_CHANNELS)
        FN(some_pivots_wide)(x + c * length, n_rows, stride,
                             n_channels - c < SAMPLED_CHANNELS ? n_channels - c : SAMPLED_CHANNELS, length, pivots + c);
}

/* The same in the data's dtype, of n_channels <= PIVOT_CHANNELS. */
static void FN(pivots)(const S *x, ptrdiff_t n_rows, ptrdiff_t stride, ptrdiff_t n_channels, ptrdiff_t length,
                       T *pivots)
{
    double wide[PIVOT_CHANNELS];
    FN(pivots_wide)(x, n_rows, stride, n_channels, length, wide);
    for (ptrdiff_t c = 0; c < n_channels; c++)
        pivots[c] = (T)wide[c];
}

static void FN(moments_planar)(const void *data, const bnfast_runs *runs, ptrdiff_t next, const void *center_in,
                               double *mean, double *m2, bnfast_writer *writer)
{
    const S *x = data;
    const T *centers = center_in;
    const ptrdiff_t length = runs->length;
    const double n = (double)runs->n_rows * (double)length;
    for (ptrdiff_t first = 0; first < runs->n_channels; first += PIVOT_CHANNELS) {
        bnfast_runs some = *runs;
        some.n_channels = runs->n_channels - first < PIVOT_CHANNELS ? runs->n_channels - first : PIVOT_CHANNELS;
        const ptrdiff_t behind = first + some.n_channels;
        const S *from = x + first * length;
        T pivots[PIVOT_CHANNELS];
        FN(pivots)(from, runs->n_rows, runs->stride, some.n_channels, length, pivots);
        const ptrdiff_t to_next = behind < runs->n_channels ? some.n_channels * length : next - first * length;
#define SUMS(w, flags) \
    FN(sums_of_long_rows)(from, from, &some, to_next, pivots, NULL, NO_U, mean + first, m2 + first, w, flags)
        if (FN(summed_as_columns)(&some))
            FN(sums_of_short_rows)(from, from, &some, to_next, pivots, NULL, NO_U, mean + first, m2 + first);
        else if (writer == NULL)
            SUMS(NULL, 0);
        else if (writer->map == 0)
            SUMS(writer, 0);
        else if (writer->map == BNFAST_ADD)
            SUMS(writer, BNFAST_ADD);
        else if (writer->map == BNFAST_RECTIFY)
            SUMS(writer, BNFAST_RECTIFY);
        else if (writer->map == (BNFAST_ADD | BNFAST_RECTIFY))
            SUMS(writer, BNFAST_ADD | BNFAST_RECTIFY);
        else
            SUMS(writer, BNFAST_ADD | BNFAST_RECTIFY | BNFAST_MARK);
#undef SUMS
        for (ptrdiff_t i = first; i < behind; i++) {
            const double center = (double)centers[i], sum = mean[i], square = m2[i];
            mean[i] = ((double)pivots[i - first] - center) + sum / n;
            m2[i] = square - sum * (sum / n);
            if (!TRUSTED(n * SMALLEST_MEAN_SQUARE, sum, square, m2[i]))
                FN(moments_wide)(x + i * length, runs->n_rows, runs->stride, length, VL, center, mean + i, m2 + i);
        }
    }
}

/* The same two passes for n_columns <= WIDE_COLUMNS; writes the columns marked in `wanted` alone, so that what one column
 * holds (a NaN, say) never moves another's bits. wanted: (n_columns,) IN, or NULL: all; mean, m2: (n_columns,) OUT
 * where wanted */
static void FN(moments_of_columns_wide)(const S *x, ptrdiff_t n_rows, ptrdiff_t stride, ptrdiff_t n_columns,
                                        const int *wanted, const T *center, double *mean, double *m2)
{
    const double n = (double)n_rows, inverse = FN(exact_inverse)(n);
    double pivot[WIDE_COLUMNS], sum[WIDE_COLUMNS], square[WIDE_COLUMNS];
    T copy[WIDE_COLUMNS];
    for (ptrdiff_t c = 0; c < n_columns; c++)
        pivot[c] = sum[c] = square[c] = 0.0;
    for (ptrdiff_t r = 0; r < n_rows; r++) {
        const T *const row = FN(values)(x + r * stride, 1, n_columns, copy);
        for (ptrdiff_t c = 0; c < n_columns; c++)
            pivot[c] += (double)row[c];
    }
    for (ptrdiff_t c = 0; c < n_columns; c++)
        pivot[c] = FN(quotient)(pivot[c], n, inverse);
    for (ptrdiff_t r = 0; r < n_rows; r++) {
        const T *const row = FN(values)(x + r * stride, 1, n_columns, copy);
        for (ptrdiff_t c = 0; c < n_columns; c++) {
            const double d = (double)row[c] - pivot[c];
            sum[c] += d;
            square[c] += d * d;
        }
    }
    for (ptrdiff_t c = 0; c < n_columns; c++)
        if (wanted == NULL || wanted[c]) {
            const double shift = FN(quotient)(sum[c], n, inverse), rest = square[c] - sum[c] * shift;
            mean[c] = (pivot[c] - (double)center[c]) + shift;
            m2[c] = rest < 0.0 ? 0.0 : rest;
        }
}

/* The same of any number of columns. */
static void FN(moments_interleaved_wide)(const S *x, ptrdiff_t n_rows, ptrdiff_t stride, ptrdiff_t n_columns,
                                         const int *wanted, const T *center, double *mean, double *m2)
{
    for (ptrdiff_t c = 0; c < n_columns; c += WIDE_COLUMNS)
        FN(moments_of_columns_wide)(x + c, n_rows, stride, n_columns - c < WIDE_COLUMNS ? n_columns - c : WIDE_COLUMNS,
                                    wanted ? wanted + c : NULL, center + c, mean + c, m2 + c);
}

/* Pivots of n_columns <= COLUMNS columns, in P: the mean of a few rows of each, as a tree. Of halves some at a time, widened
 * together. */
#define PIVOTS_AT_ONCE (sizeof(S) == sizeof(T) ? COLUMNS : PIVOT_CHANNELS)
#define COLUMN_PIVOTS(name, P) \
    static ALWAYS_INLINE void FN(name##_of)(const S *x, ptrdiff_t n_rows, ptrdiff_t stride, ptrdiff_t n_columns, \
                                            P *restrict pivots) \
    { \
        ptrdiff_t samples = COLUMN_SAMPLES; \
        while (samples > n_rows) \
            samples /= 2; \
        const T *row[COLUMN_SAMPLES]; \
        T copy[COLUMN_SAMPLES][PIVOT_CHANNELS]; \
        for (ptrdiff_t i = 0; i < samples; i++) \
            row[i] = FN(values)(x + i * n_rows / samples * stride, 1, n_columns, copy[i]); \
        if (samples == 8) \
            for (ptrdiff_t c = 0; c < n_columns; c++) \
                pivots[c] = (P)((((SAMPLE(0) + SAMPLE(4)) + (SAMPLE(2) + SAMPLE(6))) + \
                                 ((SAMPLE(1) + SAMPLE(5)) + (SAMPLE(3) + SAMPLE(7)))) / \
                                8.0); \
        else if (samples == 4) \
            for (ptrdiff_t c = 0; c < n_columns; c++) \
                pivots[c] = (P)(((SAMPLE(0) + SAMPLE(2)) + (SAMPLE(1) + SAMPLE(3))) / 4.0); \
        else if (samples == 2) \
            for (ptrdiff_t c = 0; c < n_columns; c++) \
                pivots[c] = (P)((SAMPLE(0) + SAMPLE(1)) / 2.0); \
        else \
            for (ptrdiff_t c = 0; c < n_columns; c++) \
                pivots[c] = (P)row[0][c]; \
    } \
    static void FN(name)(const S *x, ptrdiff_t n_rows, ptrdiff_t stride, ptrdiff_t n_columns, P *pivots) \
    { \
        for (ptrdiff_t c = 0; c < n_columns; c += PIVOTS_AT_ONCE) \
            FN(name##_of)(x + c, n_rows, stride, n_columns - c < PIVOTS_AT_ONCE ? n_columns - c : PIVOTS_AT_ONCE, \
                          pivots + c); \
    }
#define SAMPLE(i) ((double)row[i][c])
COLUMN_PIVOTS(column_pivots, T)
COLUMN_PIVOTS(column_pivots_wide, double)
#undef SAMPLE
#undef COLUMN_PIVOTS
#undef PIVOTS_AT_ONCE

/* Asks for the rows that the pivots of what is at x are made of, if it has as many rows and columns as this: each would be
 * waited for. */
static ALWAYS_INLINE void FN(ask_for_samples)(const S *x, ptrdiff_t n_rows, ptrdiff_t stride, ptrdiff_t n_columns)
{
    for (ptrdiff_t i = 0; i < COLUMN_SAMPLES; i++)
        for (ptrdiff_t c = 0; c < n_columns; c += LINE)
            PREFETCH_L2(x, (i * n_rows / COLUMN_SAMPLES * stride + c) * (ptrdiff_t)sizeof(S));
}

static void FN(moments_interleaved_block)(const S *x, const bnfast_rows *rows, S *packed, ptrdiff_t n_columns,
                                          ptrdiff_t next, const T *restrict center, double *restrict mean,
                                          double *restrict m2)
{
    const ptrdiff_t n_rows = rows->n_rows, stride = rows->stride;
    const double n = (double)n_rows;
    if (n_rows < FEW_ROWS && packed == NULL) {
        FN(moments_interleaved_wide)(x, n_rows, stride, n_columns, NULL, center, mean, m2);
        return;
    }
    T pivots[COLUMNS];
    int untrusted[COLUMNS];
    int64_t n_untrusted = 0; /* as wide as what is compared */
    FN(column_pivots)(x, n_rows, stride, n_columns, pivots);
    const struct FN(tile) all = {.x = x,
                                 .u = x,
                                 .n_rows = n_rows,
                                 .stride = stride,
                                 .packed_x = packed,
                                 .packed_u = packed,
                                 .packed_stride = rows->n_columns,
                                 .centers = pivots,
                                 .passing = NULL,
                                 .sum_v = mean,
                                 .sum_vd = m2};
    if (!rows->near && next != 0 && n_rows >= COLUMN_SAMPLES)
        FN(ask_for_samples)(x + next, n_rows, stride, n_columns);
    FN(sums_of_columns)(&all, n_columns, next, NO_U, rows->near);
    if (n_rows < FEW_ROWS) {
        FN(moments_interleaved_wide)(x, n_rows, stride, n_columns, NULL, center, mean, m2);
        return;
    }
    const double least_square = n * SMALLEST_MEAN_SQUARE, inverse = FN(exact_inverse)(n);
    for (ptrdiff_t c = 0; c < n_columns; c++) {
        const double sum = mean[c], square = m2[c], shift = FN(quotient)(sum, n, inverse);
        mean[c] = ((double)pivots[c] - (double)center[c]) + shift;
        m2[c] = square - sum * shift;
        n_untrusted += untrusted[c] = !TRUSTED(least_square, sum, square, m2[c]);
    }
    if (n_untrusted == 0)
        return;
    if (n_untrusted > n_columns / 8)
        FN(moments_interleaved_wide)(x, n_rows, stride, n_columns, untrusted, center, mean, m2);
    else
        for (ptrdiff_t c = 0; c < n_columns; c++)
            if (untrusted[c])
                FN(moments_wide)(x + c, n_rows, stride, 1, VL, (double)center[c], mean + c, m2 + c);
}

static void FN(moments_interleaved)(const void *data, const bnfast_rows *rows, const void *center, double *mean,
                                    double *m2, void *packed)
{
    const S *x = data;
    const ptrdiff_t n_columns = rows->n_columns;
    for (ptrdiff_t c = 0; c < n_columns; c += COLUMNS) {
        const ptrdiff_t some = n_columns - c < COLUMNS ? n_columns - c : COLUMNS;
        FN(moments_interleaved_block)(x + c, rows, packed ? (S *)packed + c : NULL, some, FN(next_of)(rows, c, some),
                                      (const T *)center + c, mean + c, m2 + c);
    }
}

static ALWAYS_INLINE T FN(lesser)(T a, T b) { return a < b ? a : b; }
static ALWAYS_INLINE T FN(greater)(T a, T b) { return a > b ? a : b; }

static void FN(typical_values)(ptrdiff_t n, ptrdiff_t step, const void *data, const ptrdiff_t *offsets, void *out)
{
    const S *const x = data;
    T *const typical = out;
    for (ptrdiff_t first = 0; first < n; first += PIVOT_CHANNELS) {
        const ptrdiff_t some = n - first < PIVOT_CHANNELS ? n - first : PIVOT_CHANNELS;
        const T *p[BNFAST_SAMPLES];
        T copy[BNFAST_SAMPLES][PIVOT_CHANNELS];
        for (int i = 0; i < BNFAST_SAMPLES; i++)
            p[i] = FN(values)(x + offsets[i] + first * step, step, some, copy[i]);
        for (ptrdiff_t i = 0; i < some; i++) {
            /* neither the least nor the greatest of four is the middle one of five */
            const T low = FN(greater)(FN(lesser)(p[0][i], p[1][i]), FN(lesser)(p[2][i], p[3][i]));
            const T high = FN(lesser)(FN(greater)(p[0][i], p[1][i]), FN(greater)(p[2][i], p[3][i]));
            const T middle = FN(greater)(FN(lesser)(low, high), FN(lesser)(FN(greater)(low, high), p[4][i]));
            typical[first + i] = middle - middle == 0 ? middle : 0;
        }
    }
}
_Static_assert(BNFAST_SAMPLES == 5, "typical_values takes the middle of five");
