/* Mean and sum of squared deviations of a segment, summed in float64 whatever the data: what statistics that call
 * themselves exact are made of. The training forward sums float32 in float32 (moments.inc.h), which is faster in cache;
 * beyond it both wait for memory.
 *
 * Elements are widened when they are read, and all else is as moments.inc.h and sums.inc.h do it for float64, in the
 * same lanes and chains: so the result is, to the bit, that of the same numbers given as float64.
 * Relative error of m2: 1e-15 (docs/theory/error-bounds.md).
 * Memory traffic: one read.
 *
 * VN elements, a vector of the narrow dtype, are WIDE_PER_VEC vectors `wide`. */

/* Lanes of a virtual vector of float64, and the vectors it has. */
#define LANES ((ptrdiff_t)8)
#define LANE_VECTORS (LANES / WN)

struct FN(exact_pair) {
    FN(wide) sum, square;
};

static ALWAYS_INLINE FN(wide) FN(set1_wide)(double value) { return value - (FN(wide)){0}; }

static ALWAYS_INLINE void FN(take_exact)(struct FN(exact_pair) * s, FN(wide) x, FN(wide) pivot)
{
    const FN(wide) d = x - pivot;
    s->sum += d;
    s->square += d * d;
}

/* The first n of VN elements, zeros behind them. values: (WIDE_PER_VEC,) OUT */
static ALWAYS_INLINE void FN(read_widened)(const S *p, ptrdiff_t n, FN(wide) * values)
{
    const FN(vec) v = FN(read_up_to)(p, n, FN(set1)(0));
    for (int h = 0; h < WIDE_PER_VEC; h++)
        values[h] = FN(widen)(v, h);
}

/* Sum of LANES lanes, halves folded onto each other. */
static inline double FN(fold_exact)(double *lanes)
{
    for (ptrdiff_t half = LANES / 2; half > 0; half /= 2)
        for (ptrdiff_t i = 0; i < half; i++)
            lanes[i] += lanes[i + half];
    return lanes[0];
}

/* Sum of a channel's columns. columns: (length,) IN */
static double FN(fold_exact_columns)(const double *columns, ptrdiff_t length)
{
    double lanes[LANES] = {0};
    for (ptrdiff_t j = 0; j < length; j++)
        lanes[j % LANES] += columns[j];
    return FN(fold_exact)(lanes);
}

/* x: (n_rows, length), rows `stride` apart IN; next: elements to what is reduced next; sum, square: scalars OUT */
static void FN(exact_sums_of_rows)(const S *x, ptrdiff_t n_rows, ptrdiff_t stride, ptrdiff_t length, ptrdiff_t next,
                                   double pivot_value, double *sum, double *square)
{
    const FN(wide) pivot = FN(set1_wide)(pivot_value), zero = FN(set1_wide)(0.0);
    const ptrdiff_t reach = length > 2 * AHEAD ? 2 * AHEAD : AHEAD, tail = length % (2 * LANES);
    struct FN(exact_pair) chain[2 * LANE_VECTORS], wide[LANE_VECTORS];                        /* two chains */
    static const double window[4 * LANES] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1}; /* then zeros */
    FN(wide) tail_pivot[2 * LANE_VECTORS]; /* zero where there is no element: d is zero there */
    double lanes[LANES];
    for (ptrdiff_t k = 0; k < 2 * LANE_VECTORS; k++)
        tail_pivot[k] = pivot * FN(load_wide)(window + 2 * LANES - tail + k * WN);
    memset(chain, 0, sizeof chain);
    memset(wide, 0, sizeof wide);
    ptrdiff_t room = CHAIN; /* terms a chain may still take */
#define FLUSH_CHAINS \
    if (room == 0) { \
        for (ptrdiff_t k = 0; k < LANE_VECTORS; k++) { \
            wide[k].sum += chain[k].sum + chain[LANE_VECTORS + k].sum; \
            wide[k].square += chain[k].square + chain[LANE_VECTORS + k].square; \
        } \
        for (ptrdiff_t k = 0; k < 2 * LANE_VECTORS; k++) \
            chain[k].sum = chain[k].square = zero; \
        room = CHAIN; \
    }
/* `steps` terms for the n vectors from the first-th on, of both chains */
#define TAKE_EXACT(first, n) \
    for (ptrdiff_t s = 0; s < steps; s++) { \
        const S *const from = row + 2 * LANES * s; \
        if ((first) == 0) \
            PREFETCH_L2(from, ahead * (ptrdiff_t)sizeof(S)); \
        for (ptrdiff_t k = first; k < (first) + (n); k += WIDE_PER_VEC) { \
            FN(wide) values[WIDE_PER_VEC]; \
            FN(read_widened)(from + k * WN, VN, values); \
            for (int h = 0; h < WIDE_PER_VEC; h++) \
                FN(take_exact)(&chain[k + h], values[h], pivot); \
        } \
    }
    for (ptrdiff_t r = 0; r < n_rows; r++) {
        const S *row = x + r * stride;
        /* past the end of the row: to its successor, or to what comes next */
        const ptrdiff_t to_next = (r + 1 < n_rows ? stride : next - r * stride) - length + reach;
        ptrdiff_t left = length;
        while (left >= 2 * LANES) {
            const ptrdiff_t steps = left / (2 * LANES) < room ? left / (2 * LANES) : room;
            const ptrdiff_t ahead = left > reach ? reach : to_next;
            if (LANE_VECTORS >= 4) { /* there are registers for one chain at a time */
                TAKE_EXACT(0, LANE_VECTORS)
                TAKE_EXACT(LANE_VECTORS, LANE_VECTORS)
            } else {
                TAKE_EXACT(0, 2 * LANE_VECTORS)
            }
            row += steps * 2 * LANES;
            left -= steps * 2 * LANES;
            room -= steps;
            FLUSH_CHAINS
        }
        if (left > 0) {
            PREFETCH_L2(row, to_next * (ptrdiff_t)sizeof(S));
            for (ptrdiff_t k = 0; k < 2 * LANE_VECTORS && left > k * WN; k += WIDE_PER_VEC) {
                FN(wide) values[WIDE_PER_VEC];
                const ptrdiff_t n = left - k * WN;
                FN(read_widened)(row + k * WN, n < VN ? n : VN, values);
                for (int h = 0; h < WIDE_PER_VEC; h++)
                    FN(take_exact)(&chain[k + h], values[h], tail_pivot[k + h]);
            }
            room -= 1;
            FLUSH_CHAINS
        }
    }
    room = 0;
    FLUSH_CHAINS
#undef FLUSH_CHAINS
#undef TAKE_EXACT
    for (ptrdiff_t k = 0; k < LANE_VECTORS; k++)
        FN(store_wide)(lanes + k * WN, wide[k].sum);
    *sum = FN(fold_exact)(lanes);
    for (ptrdiff_t k = 0; k < LANE_VECTORS; k++)
        FN(store_wide)(lanes + k * WN, wide[k].square);
    *square = FN(fold_exact)(lanes);
}

/* Rows of VN columns, or of the first n < VN of them; pivots, sum, square: (VN,) IN, IN and OUT twice */
static ALWAYS_INLINE void FN(exact_tile)(const S *x, ptrdiff_t n_rows, ptrdiff_t stride, ptrdiff_t n, ptrdiff_t ahead,
                                         const double *pivots, double *sum, double *square)
{
    FN(wide) pivot[WIDE_PER_VEC], sums[WIDE_PER_VEC], squares[WIDE_PER_VEC];
    for (int h = 0; h < WIDE_PER_VEC; h++) {
        pivot[h] = FN(load_wide)(pivots + h * WN);
        sums[h] = FN(load_wide)(sum + h * WN);
        squares[h] = FN(load_wide)(square + h * WN);
    }
#define TAKE_ROW(i) \
    do { \
        FN(wide) values[WIDE_PER_VEC]; \
        PREFETCH_L2(x, ahead * (ptrdiff_t)sizeof(S)); \
        FN(read_widened)(x, n, values); \
        for (int h = 0; h < WIDE_PER_VEC; h++) \
            FN(take_exact)(&chain[i][h], values[h], pivot[h]); \
        x += stride; \
    } while (0)
    for (ptrdiff_t r = 0; r < n_rows; r += 2 * COLUMN_CHAIN) {
        struct FN(exact_pair) chain[2][WIDE_PER_VEC];
        for (int h = 0; h < WIDE_PER_VEC; h++)
            for (int i = 0; i < 2; i++)
                chain[i][h].sum = chain[i][h].square = FN(set1_wide)(0.0);
        if (n_rows - r >= 2 * COLUMN_CHAIN) {
            for (int t = 0; t < COLUMN_CHAIN; t++) {
                TAKE_ROW(0);
                TAKE_ROW(1);
            }
        } else
            for (ptrdiff_t t = r; t < n_rows; t += 2) {
                TAKE_ROW(0);
                if (t + 1 < n_rows)
                    TAKE_ROW(1);
            }
        for (int h = 0; h < WIDE_PER_VEC; h++) {
            sums[h] += chain[0][h].sum + chain[1][h].sum;
            squares[h] += chain[0][h].square + chain[1][h].square;
        }
    }
#undef TAKE_ROW
    for (int h = 0; h < WIDE_PER_VEC; h++) {
        FN(store_wide)(sum + h * WN, sums[h]);
        FN(store_wide)(square + h * WN, squares[h]);
    }
}

/* Rows of a tile where they are not near: streams of memory, and the distance of what is asked for ahead. */
#define EXACT_TILE_ROWS 32

/* Arrays of n_columns <= COLUMNS, with room for a whole vector behind them, where pivots are zero. */
struct FN(exact_columns) {
    double pivots[COLUMNS + VL], sum[COLUMNS + VL], square[COLUMNS + VL];
};

/* x: (n_rows, n_columns), rows `stride` apart IN; next: elements from the first row to what is needed after these */
static void FN(exact_sums_of_columns)(const S *x, ptrdiff_t n_rows, ptrdiff_t stride, ptrdiff_t n_columns,
                                      ptrdiff_t next, int near, struct FN(exact_columns) * columns)
{
    ptrdiff_t tile_rows = EXACT_TILE_ROWS;
    if (near) /* all at once, but for rows that displace each other from L1 */
        tile_rows = ROWS_DISPLACE(stride) ? 2 * COLUMN_CHAIN : n_rows;
    for (ptrdiff_t c = n_columns; c < n_columns + VL; c++)
        columns->pivots[c] = 0.0;
    memset(columns->sum, 0, (size_t)(n_columns + VL) * sizeof *columns->sum);
    memset(columns->square, 0, (size_t)(n_columns + VL) * sizeof *columns->square);
    for (ptrdiff_t r = 0; r < n_rows; r += tile_rows, x += tile_rows * stride) {
        const ptrdiff_t rows = n_rows - r < tile_rows ? n_rows - r : tile_rows;
        const ptrdiff_t ahead = near ? 0 : r + tile_rows < n_rows ? tile_rows * stride : next - r * stride;
        ptrdiff_t c = 0;
        for (; c + VN <= n_columns; c += VN)
            FN(exact_tile)(x + c, rows, stride, VN, ahead, columns->pivots + c, columns->sum + c, columns->square + c);
        if (c < n_columns)
            FN(exact_tile)(x + c, rows, stride, n_columns - c, ahead, columns->pivots + c, columns->sum + c,
                           columns->square + c);
    }
}

/* As for moments_planar; `writer` is not used. */
static void FN(exact_moments_planar)(const void *data, const bnfast_runs *runs, ptrdiff_t next, const void *center_in,
                                     double *mean, double *m2, bnfast_writer *writer)
{
    const S *x = data;
    const T *centers = center_in;
    const ptrdiff_t length = runs->length, n_rows = runs->n_rows, stride = runs->stride;
    const ptrdiff_t group = COLUMNS / length;
    const int as_columns = length < 4 * LANES && n_rows >= CHAIN;
    const double n = (double)n_rows * (double)length;
    (void)writer;
    for (ptrdiff_t first = 0; first < runs->n_channels; first += PIVOT_CHANNELS) {
        const ptrdiff_t left = runs->n_channels - first, some = left < PIVOT_CHANNELS ? left : PIVOT_CHANNELS;
        double pivots[PIVOT_CHANNELS];
        FN(pivots_wide)(x + first * length, n_rows, stride, some, length, pivots);
        if (as_columns)
            for (ptrdiff_t i = 0; i < some; i += group) {
                const ptrdiff_t of = some - i < group ? some - i : group, at = (first + i) * length;
                struct FN(exact_columns) columns;
                for (ptrdiff_t c = 0; c < of; c++)
                    for (ptrdiff_t j = 0; j < length; j++)
                        columns.pivots[c * length + j] = pivots[i + c];
                FN(exact_sums_of_columns)(x + at, n_rows, stride, of * length, of < left - i ? of * length : next - at,
                                          runs->near, &columns);
                for (ptrdiff_t c = 0; c < of; c++) {
                    mean[first + i + c] = FN(fold_exact_columns)(columns.sum + c * length, length);
                    m2[first + i + c] = FN(fold_exact_columns)(columns.square + c * length, length);
                }
            }
        else
            for (ptrdiff_t i = 0; i < some; i++) {
                const ptrdiff_t at = (first + i) * length, to_next = i + 1 < left ? length : next - at;
                for (ptrdiff_t s = 0; s < PIVOT_SAMPLES; s++) /* what the next pivot is made of */
                    PREFETCH_L2(x + at, (to_next + s * n_rows / PIVOT_SAMPLES * stride + s * length / PIVOT_SAMPLES) *
                                            (ptrdiff_t)sizeof(S));
                FN(exact_sums_of_rows)(x + at, n_rows, stride, length, to_next, pivots[i], mean + first + i,
                                       m2 + first + i);
            }
        for (ptrdiff_t i = first; i < first + some; i++) {
            const double center = (double)centers[i], sum = mean[i], square = m2[i];
            mean[i] = (pivots[i - first] - center) + sum / n;
            m2[i] = square - sum * (sum / n);
            if (!TRUSTED(0.0, sum, square, m2[i]))
                FN(moments_wide)(x + i * length, n_rows, stride, length, LANES, center, mean + i, m2 + i);
        }
    }
}

/* As for moments_interleaved; `packed` is not used. */
static void FN(exact_moments_interleaved)(const void *data, const bnfast_rows *rows, const void *center_in,
                                          double *mean, double *m2, void *packed)
{
    const ptrdiff_t n_rows = rows->n_rows, stride = rows->stride;
    const double n = (double)n_rows;
    struct FN(exact_columns) columns;
    (void)packed;
    for (ptrdiff_t first = 0; first < rows->n_columns; first += COLUMNS) {
        const ptrdiff_t some = rows->n_columns - first < COLUMNS ? rows->n_columns - first : COLUMNS;
        const S *const x = (const S *)data + first;
        const T *const center = (const T *)center_in + first;
        FN(column_pivots_wide)(x, n_rows, stride, some, columns.pivots);
        FN(exact_sums_of_columns)(x, n_rows, stride, some, FN(next_of)(rows, first, some), rows->near, &columns);
        int untrusted[COLUMNS], n_untrusted = 0;
        for (ptrdiff_t c = 0; c < some; c++) {
            const double shift = columns.sum[c] / n;
            mean[first + c] = (columns.pivots[c] - (double)center[c]) + shift;
            m2[first + c] = columns.square[c] - columns.sum[c] * shift;
            untrusted[c] = !TRUSTED(0.0, columns.sum[c], columns.square[c], m2[first + c]);
            n_untrusted += untrusted[c];
        }
        if (n_untrusted > 0)
            FN(moments_interleaved_wide)(x, n_rows, stride, some, untrusted, center, mean + first, m2 + first);
    }
}

#undef EXACT_TILE_ROWS
#undef LANES
#undef LANE_VECTORS
