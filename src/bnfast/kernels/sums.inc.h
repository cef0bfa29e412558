/* The sums that all statistics are made of: of v and of v * d, d = x - center, over rows of one channel (planar) or
 * over the rows of some columns (interleaved). v is u in the backward pass; in the forward pass it is d itself, and the
 * sum of v * d is a sum of squares.
 *
 * A lane takes CHAIN terms in the data's dtype, in each of two chains so that additions need not wait for each other;
 * then the chains are added and go to float64. Relative to the sum of the absolute terms the error of a sum is at most
 * (CHAIN + 3) * 2^-24 for float32, 1e-8 typically, however many terms there are.
 * A column has a single lane, whose roundings average out the less the fewer its rows are: chains of COLUMN_CHAIN
 * terms. */

#define CHAIN 16
#define COLUMN_CHAIN 4

/* At most this many columns at once, so that what is gathered for them stays in cache; and this many rows of each
 * array, streams of memory that the hardware follows and the distance of what is asked for ahead: of one array 32 were
 * faster than 16 by up to a fifth, of two arrays 8 were, by as much. */
#define COLUMNS ((ptrdiff_t)(4096 / sizeof(T)))
#define TILE_ROWS(with_u) ((with_u) ? 8 : 32)
_Static_assert(TILE_ROWS(0) % (2 * COLUMN_CHAIN) == 0 && TILE_ROWS(1) % (2 * COLUMN_CHAIN) == 0,
               "chains end where tiles do, or bits would depend on the tiles");

/* How many elements ahead of the sums memory is asked for, in long rows of one array twice as many: the sums of a block
 * are not the simple stream that the hardware expects. */
#define AHEAD ((ptrdiff_t)(4096 / sizeof(T)))

struct FN(pair) {
    FN(vec) sum_v, sum_vd;
};

static ALWAYS_INLINE void FN(take)(struct FN(pair) * s, FN(vec) x, FN(vec) u, FN(vec) center, int with_u)
{
    const FN(vec) d = x - center, v = with_u ? u : d;
    s->sum_v += v;
    s->sum_vd += v * d;
}

/* `steps` terms for every lane of both chains; `ahead`: elements to what is to be brought into cache. */
#define TAKE_STEPS(more) \
    for (ptrdiff_t s = 0; s < steps; s++, row += 2 * VL, row_u += 2 * VL) \
        for (int i = 0; i < 2; i++) { \
            PREFETCH_L2(row + i * VL, ahead * (ptrdiff_t)sizeof(T)); \
            if (with_u) \
                PREFETCH_L2(row_u + i * VL, ahead * (ptrdiff_t)sizeof(T)); \
            for (int k = 0; k < VU; k++) { \
                more; \
                FN(take)(&chain[i][k], FN(load)(row + i * VL + k * VN), \
                         with_u ? FN(load)(row_u + i * VL + k * VN) : zero, center, with_u); \
            } \
        }

/* x, u: (n_rows, length), rows `stride` apart IN, u where with_u; next: elements to what is reduced next; sum_v,
 * sum_vd: scalars OUT; w: a normalize that goes on meanwhile, or NULL */
static ALWAYS_INLINE void FN(sums_of_rows)(const T *x, const T *u, ptrdiff_t n_rows, ptrdiff_t stride, ptrdiff_t length,
                                           ptrdiff_t next, T center_value, int with_u, double *sum_v, double *sum_vd,
                                           bnfast_writer *w)
{
    const FN(vec) center = FN(set1)(center_value), zero = FN(set1)(0);
    struct FN(pair) chain[2][VU];
    FN(wide) wide_v[VU * WIDE_PER_VEC], wide_vd[VU * WIDE_PER_VEC];
    memset(wide_v, 0, sizeof wide_v);
    memset(wide_vd, 0, sizeof wide_vd);
    memset(chain, 0, sizeof chain);
    ptrdiff_t room = CHAIN; /* terms a chain may still take */
    const ptrdiff_t reach = !with_u && length > 2 * AHEAD ? 2 * AHEAD : AHEAD;
#define FLUSH_CHAINS \
    if (room == 0) { \
        for (int k = 0; k < VU; k++) { \
            FN(widen_add)(wide_v + k * WIDE_PER_VEC, chain[0][k].sum_v + chain[1][k].sum_v); \
            FN(widen_add)(wide_vd + k * WIDE_PER_VEC, chain[0][k].sum_vd + chain[1][k].sum_vd); \
        } \
        memset(chain, 0, sizeof chain); \
        room = CHAIN; \
    }
    for (ptrdiff_t r = 0; r < n_rows; r++) {
        const T *row = x + r * stride, *row_u = u + r * stride;
        /* past the end of the row: to its successor, or to what comes next */
        const ptrdiff_t to_next = (r + 1 < n_rows ? stride : next - r * stride) - length + reach;
        ptrdiff_t left = length;
        while (left >= 2 * VL) {
            ptrdiff_t steps = left / (2 * VL) < room ? left / (2 * VL) : room;
            const ptrdiff_t ahead = left > reach ? reach : to_next;
            const ptrdiff_t together = w ? FN(vectors_left)(w) / (2 * VU) : 0;
            if (together > 0) {
                const struct FN(map) map = FN(map_of_channel)(&w->coefficients, w->channel, with_u);
                const T *from = (const T *)w->x + w->at, *from_u = (const T *)w->u + w->at;
                T *out = (T *)w->out + w->at;
                steps = together < steps ? together : steps;
                w->at += steps * 2 * VL;
#define MAP_ONE(stream) \
    FN(map_elements)(&map, from, from_u, out, 1, 0, 0, VN, with_u, stream); \
    from += VN; \
    from_u += VN; \
    out += VN
                if (w->stream) {
                    TAKE_STEPS(MAP_ONE(1))
                } else {
                    TAKE_STEPS(MAP_ONE(0))
                }
#undef MAP_ONE
            } else {
                if (w && !FN(written)(w)) {
                    FN(write_some)(w, 2 * VL);
                    steps = 1;
                }
                TAKE_STEPS()
            }
            left -= steps * 2 * VL;
            room -= steps;
            FLUSH_CHAINS
        }
        if (left > 0) {
            if (w)
                FN(write_some)(w, left);
            for (int i = 0; i < 2 && left > i * VL; i++) {
                PREFETCH_L2(row + i * VL, to_next * (ptrdiff_t)sizeof(T));
                if (with_u)
                    PREFETCH_L2(row_u + i * VL, to_next * (ptrdiff_t)sizeof(T));
                for (int k = 0; k < VU; k++) {
                    const ptrdiff_t j = i * VL + k * VN;
                    FN(vec) u_values = zero;
                    if (with_u)
                        u_values = FN(load_part)(row_u + j, left - j, zero);
                    FN(take)(&chain[i][k], FN(load_part)(row + j, left - j, center), u_values, center, with_u);
                }
            }
            room -= 1;
            FLUSH_CHAINS
        }
    }
    room = 0;
    FLUSH_CHAINS
#undef FLUSH_CHAINS
    *sum_v = FN(fold_wide)(wide_v);
    *sum_vd = FN(fold_wide)(wide_vd);
}

/* Rows that do not lie in L2: adds a tile of at most TILE_ROWS of them to the sums of `vectors` vectors of columns from
 * c on, or of n < VN columns, in the order of memory, while `ahead` elements on from what is taken is asked for.
 * packed_x, packed_u: (n_rows, .) OUT, rows `packed_stride` apart, the same elements again; or NULL */
static ALWAYS_INLINE void FN(sums_of_far_tile)(const T *x, const T *u, ptrdiff_t n_rows, ptrdiff_t stride, T *packed_x,
                                               T *packed_u, ptrdiff_t packed_stride, const T *centers, ptrdiff_t c,
                                               int vectors, ptrdiff_t n, int with_u, double *sum_v, double *sum_vd,
                                               ptrdiff_t ahead)
{
    const FN(vec) zero = FN(set1)(0);
    FN(vec) center[COLUMN_VECTORS];
    struct FN(pair) chain[2][COLUMN_VECTORS];
    for (int k = 0; k < vectors; k++)
        center[k] = FN(load_up_to)(centers + c + k * VN, n, zero);
    x += c;
    u += c;
    if (packed_x) {
        packed_x += c;
        packed_u += c;
    }
#define TAKE_ROW(i) \
    for (int k = 0; k < vectors; k++) { \
        PREFETCH_L2(x + k * VN, ahead * (ptrdiff_t)sizeof(T)); \
        const FN(vec) x_values = FN(load_up_to)(x + k * VN, n, center[k]); \
        FN(vec) u_values = zero; \
        if (packed_x) \
            FN(store_up_to)(packed_x + k * VN, n, x_values); \
        if (with_u) { \
            PREFETCH_L2(u + k * VN, ahead * (ptrdiff_t)sizeof(T)); \
            u_values = FN(load_up_to)(u + k * VN, n, zero); \
            if (packed_x) \
                FN(store_up_to)(packed_u + k * VN, n, u_values); \
        } \
        FN(take)(&chain[i][k], x_values, u_values, center[k], with_u); \
    } \
    x += stride; \
    u += stride; \
    if (packed_x) { \
        packed_x += packed_stride; \
        packed_u += packed_stride; \
    }
    for (ptrdiff_t r = 0; r < n_rows; r += 2 * COLUMN_CHAIN) {
        const ptrdiff_t end = n_rows - r < 2 * COLUMN_CHAIN ? n_rows : r + 2 * COLUMN_CHAIN;
        ptrdiff_t t = r;
        for (int k = 0; k < vectors; k++)
            for (int i = 0; i < 2; i++)
                chain[i][k].sum_v = chain[i][k].sum_vd = zero;
        for (; t + 2 <= end; t += 2) {
            TAKE_ROW(0)
            TAKE_ROW(1)
        }
        if (t < end) {
            TAKE_ROW(0)
        }
        for (int k = 0; k < vectors; k++) {
            FN(widen_add_columns)(sum_v + c + k * VN, chain[0][k].sum_v + chain[1][k].sum_v, n);
            FN(widen_add_columns)(sum_vd + c + k * VN, chain[0][k].sum_vd + chain[1][k].sum_vd, n);
        }
    }
#undef TAKE_ROW
}

/* The sums of one vector of columns, in float64, while their rows are taken. */
struct FN(columns) {
    FN(vec) center;
    FN(wide) v0, v1, vd0, vd1; /* v1, vd1: where a vector widens to two */
};

/* Two chains of at most COLUMN_CHAIN rows each (rows 0, 2, 4, ... and 1, 3, 5, ...) of the first n columns. */
static ALWAYS_INLINE void FN(take_rows)(struct FN(columns) * c, const T *x, const T *u, ptrdiff_t n_rows,
                                        ptrdiff_t stride, ptrdiff_t n, int with_u)
{
    const FN(vec) zero = FN(set1)(0);
    struct FN(pair) chain[2] = {{zero, zero}, {zero, zero}};
#define TAKE_ROW(r, i) \
    FN(take)(&chain[i], FN(load_up_to)(x + (r) * stride, n, c->center), \
             with_u ? FN(load_up_to)(u + (r) * stride, n, zero) : zero, c->center, with_u)
    if (n_rows == 2 * COLUMN_CHAIN) {
        TAKE_ROW(0, 0);
        TAKE_ROW(1, 1);
        TAKE_ROW(2, 0);
        TAKE_ROW(3, 1);
        TAKE_ROW(4, 0);
        TAKE_ROW(5, 1);
        TAKE_ROW(6, 0);
        TAKE_ROW(7, 1);
    } else
        for (ptrdiff_t r = 0; r < n_rows; r += 2) {
            TAKE_ROW(r, 0);
            if (r + 1 < n_rows)
                TAKE_ROW(r + 1, 1);
        }
#undef TAKE_ROW
    const FN(vec) v = chain[0].sum_v + chain[1].sum_v, vd = chain[0].sum_vd + chain[1].sum_vd;
    c->v0 += FN(widen)(v, 0);
    c->vd0 += FN(widen)(vd, 0);
    if (WIDE_PER_VEC > 1) {
        c->v1 += FN(widen)(v, 1);
        c->vd1 += FN(widen)(vd, 1);
    }
}
_Static_assert(COLUMN_CHAIN == 4, "take_rows has its rows written out");

static ALWAYS_INLINE void FN(begin_columns)(struct FN(columns) * c, const T *centers, ptrdiff_t n, const double *sum_v,
                                            const double *sum_vd)
{
    c->center = FN(load_up_to)(centers, n, FN(set1)(0));
    if (n == VN) {
        c->v0 = FN(load_wide)(sum_v);
        c->vd0 = FN(load_wide)(sum_vd);
        if (WIDE_PER_VEC > 1) {
            c->v1 = FN(load_wide)(sum_v + WN);
            c->vd1 = FN(load_wide)(sum_vd + WN);
        }
        return;
    }
    double v[2 * WN] = {0}, vd[2 * WN] = {0};
    for (ptrdiff_t i = 0; i < n; i++) {
        v[i] = sum_v[i];
        vd[i] = sum_vd[i];
    }
    c->v0 = FN(load_wide)(v);
    c->v1 = FN(load_wide)(v + WN);
    c->vd0 = FN(load_wide)(vd);
    c->vd1 = FN(load_wide)(vd + WN);
}

static ALWAYS_INLINE void FN(end_columns)(const struct FN(columns) * c, ptrdiff_t n, double *sum_v, double *sum_vd)
{
    if (n == VN) {
        FN(store_wide)(sum_v, c->v0);
        FN(store_wide)(sum_vd, c->vd0);
        if (WIDE_PER_VEC > 1) {
            FN(store_wide)(sum_v + WN, c->v1);
            FN(store_wide)(sum_vd + WN, c->vd1);
        }
        return;
    }
    double v[2 * WN] = {0}, vd[2 * WN] = {0};
    FN(store_wide)(v, c->v0);
    FN(store_wide)(vd, c->vd0);
    if (WIDE_PER_VEC > 1) {
        FN(store_wide)(v + WN, c->v1);
        FN(store_wide)(vd + WN, c->vd1);
    }
    for (ptrdiff_t i = 0; i < n; i++) {
        sum_v[i] = v[i];
        sum_vd[i] = vd[i];
    }
}

/* Rows that lie in L2: adds them to the sums of one or two vectors of columns, or of n < VN columns; two, because their
 * sums fit into registers. */
static ALWAYS_INLINE void FN(sums_of_near_tile)(const T *x, const T *u, ptrdiff_t n_rows, ptrdiff_t stride,
                                                const T *centers, int vectors, ptrdiff_t n, int with_u, double *sum_v,
                                                double *sum_vd)
{
    struct FN(columns) first, second;
    FN(begin_columns)(&first, centers, n, sum_v, sum_vd);
    if (vectors == 2)
        FN(begin_columns)(&second, centers + VN, VN, sum_v + VN, sum_vd + VN);
    for (ptrdiff_t rows; n_rows > 0; n_rows -= rows, x += rows * stride, u += rows * stride) {
        rows = 2 * COLUMN_CHAIN;
        if (n_rows >= rows) {
            FN(take_rows)(&first, x, u, 2 * COLUMN_CHAIN, stride, n, with_u);
            if (vectors == 2)
                FN(take_rows)(&second, x + VN, u + VN, 2 * COLUMN_CHAIN, stride, VN, with_u);
        } else {
            rows = n_rows;
            FN(take_rows)(&first, x, u, rows, stride, n, with_u);
            if (vectors == 2)
                FN(take_rows)(&second, x + VN, u + VN, rows, stride, VN, with_u);
        }
    }
    FN(end_columns)(&first, n, sum_v, sum_vd);
    if (vectors == 2)
        FN(end_columns)(&second, VN, sum_v + VN, sum_vd + VN);
}

/* The rows are taken all at once, so that the sums stay in registers; but eight at a time where they displace each
 * other from L1, being a power of two apart. */
static ALWAYS_INLINE void FN(sums_of_near_columns)(const T *x, const T *u, ptrdiff_t n_rows, ptrdiff_t stride,
                                                   ptrdiff_t n_columns, const T *centers, int with_u, double *sum_v,
                                                   double *sum_vd)
{
    const ptrdiff_t tile_rows = stride * (ptrdiff_t)sizeof(T) % 2048 == 0 ? 2 * COLUMN_CHAIN : n_rows;
    /* columns before the first that begins a line of memory, where that is the same one in every row; not for so few
     * that the parts of vectors at both ends would cost more */
    const ptrdiff_t head = stride % VL == 0 && n_columns >= 16 * VL ? FN(to_line)(x, VL) : 0;
    memset(sum_v, 0, (size_t)n_columns * sizeof *sum_v);
    memset(sum_vd, 0, (size_t)n_columns * sizeof *sum_vd);
    for (ptrdiff_t r = 0; r < n_rows; r += tile_rows, x += tile_rows * stride, u += tile_rows * stride) {
        const ptrdiff_t rows = n_rows - r < tile_rows ? n_rows - r : tile_rows;
        ptrdiff_t c = 0;
#define TILE(vectors, n) \
    FN(sums_of_near_tile)(x + c, u + c, rows, stride, centers + c, vectors, n, with_u, sum_v + c, sum_vd + c)
        for (; c + VN <= head; c += VN)
            TILE(1, VN);
        if (c < head)
            TILE(1, head - c);
        for (c = head; c + 2 * VN <= n_columns; c += 2 * VN)
            TILE(2, VN);
        for (; c + VN <= n_columns; c += VN)
            TILE(1, VN);
        if (c < n_columns)
            TILE(1, n_columns - c);
#undef TILE
    }
}

static ALWAYS_INLINE void FN(sums_of_far_columns)(const T *x, const T *u, ptrdiff_t n_rows, ptrdiff_t stride,
                                                  T *packed_x, T *packed_u, ptrdiff_t packed_stride,
                                                  ptrdiff_t n_columns, const T *centers, int with_u, double *sum_v,
                                                  double *sum_vd, ptrdiff_t next)
{
    const ptrdiff_t tile_rows = TILE_ROWS(with_u);
    memset(sum_v, 0, (size_t)n_columns * sizeof *sum_v);
    memset(sum_vd, 0, (size_t)n_columns * sizeof *sum_vd);
    for (ptrdiff_t r = 0; r < n_rows; r += tile_rows) {
        const ptrdiff_t rows = n_rows - r < tile_rows ? n_rows - r : tile_rows;
        ptrdiff_t c = 0, ahead = tile_rows * stride;
        if (r + tile_rows >= n_rows)
            ahead = next + (n_rows < tile_rows ? 0 : tile_rows - n_rows) * stride;
#define TILE(vectors, n) \
    FN(sums_of_far_tile)(x + r * stride, u + r * stride, rows, stride, packed_x ? packed_x + r * packed_stride : NULL, \
                         packed_x ? packed_u + r * packed_stride : NULL, packed_stride, centers, c, vectors, n, \
                         with_u, sum_v, sum_vd, ahead)
        for (; c + COLUMN_VECTORS * VN <= n_columns; c += COLUMN_VECTORS * VN)
            TILE(COLUMN_VECTORS, VN);
        for (; c + VN <= n_columns; c += VN)
            TILE(1, VN);
        if (c < n_columns)
            TILE(1, n_columns - c);
#undef TILE
    }
}

/* rows: (n_rows, n_columns <= COLUMNS) of x, u IN; centers: (n_columns,) IN; sum_v, sum_vd: (n_columns,) OUT; packed_x,
 * packed_u: NULL, or (n_rows, n_columns) with rows packed_stride apart OUT */
static ALWAYS_INLINE void FN(sums_of_columns)(const T *x, const T *u, ptrdiff_t n_rows, ptrdiff_t stride, T *packed_x,
                                              T *packed_u, ptrdiff_t packed_stride, ptrdiff_t n_columns,
                                              const T *centers, int with_u, double *sum_v, double *sum_vd, int near)
{
    const ptrdiff_t next = n_rows * stride;
    if (packed_x)
        FN(sums_of_far_columns)(x, u, n_rows, stride, packed_x, packed_u, packed_stride, n_columns, centers, with_u,
                                sum_v, sum_vd, next);
    else if (near)
        FN(sums_of_near_columns)(x, u, n_rows, stride, n_columns, centers, with_u, sum_v, sum_vd);
    else
        FN(sums_of_far_columns)(x, u, n_rows, stride, NULL, NULL, 0, n_columns, centers, with_u, sum_v, sum_vd, next);
}

/* Where rows are short and many, their elements are summed as columns, and the columns of a channel added at the end:
 * rows that do not fill vectors cost nothing then. */
static int FN(summed_as_columns)(const bnfast_runs *runs) { return runs->length < 4 * VL && runs->n_rows >= CHAIN; }

/* Sum of a channel's columns, VL at a time. columns: (length,) IN */
static ALWAYS_INLINE double FN(fold_columns)(const double *columns, ptrdiff_t length)
{
    double rest[64 / sizeof(T)] = {0};
    FN(wide) lanes[VU * WIDE_PER_VEC];
    memset(lanes, 0, sizeof lanes);
    ptrdiff_t j = 0;
    for (; j + VL <= length; j += VL)
        for (int k = 0; k < VU * WIDE_PER_VEC; k++)
            lanes[k] += FN(load_wide)(columns + j + k * WN);
    for (ptrdiff_t i = 0; j + i < length; i++)
        rest[i] = columns[j + i];
    for (int k = 0; k < VU * WIDE_PER_VEC; k++)
        lanes[k] += FN(load_wide)(rest + k * WN);
    return FN(fold_wide)(lanes);
}

/* x, u: (n_rows, n_channels, length) IN; centers, sum_v, sum_vd: (n_channels,) IN, OUT, OUT; the rest as for
 * sums_of_rows */
static void FN(sums_of_short_rows)(const T *x, const T *u, const bnfast_runs *runs, ptrdiff_t next, const T *centers,
                                   int with_u, double *sum_v, double *sum_vd)
{
    const ptrdiff_t length = runs->length, n_channels = runs->n_channels, group = COLUMNS / length;
    T column_centers[COLUMNS];
    double column_v[COLUMNS], column_vd[COLUMNS];
    for (ptrdiff_t i = 0; i < n_channels; i += group) {
        const ptrdiff_t n = n_channels - i < group ? n_channels - i : group;
        const ptrdiff_t to_next = i + n < n_channels ? n * length : next - i * length;
        for (ptrdiff_t c = 0; c < n; c++)
            for (ptrdiff_t j = 0; j < length; j++)
                column_centers[c * length + j] = centers[i + c];
        if (with_u)
            FN(sums_of_far_columns)(x + i * length, u + i * length, runs->n_rows, runs->stride, NULL, NULL, 0,
                                    n * length, column_centers, 1, column_v, column_vd, to_next);
        else
            FN(sums_of_far_columns)(x + i * length, u + i * length, runs->n_rows, runs->stride, NULL, NULL, 0,
                                    n * length, column_centers, 0, column_v, column_vd, to_next);
        for (ptrdiff_t c = 0; c < n; c++) {
            sum_v[i + c] = FN(fold_columns)(column_v + c * length, length);
            sum_vd[i + c] = FN(fold_columns)(column_vd + c * length, length);
        }
    }
}

/* The sums of some channels. Shapes as for sums_of_short_rows. w: may go on meanwhile; or NULL */
static void FN(sums_of_runs)(const T *x, const T *u, const bnfast_runs *runs, ptrdiff_t next, const T *centers,
                             int with_u, double *sum_v, double *sum_vd, bnfast_writer *w)
{
    if (FN(summed_as_columns)(runs)) {
        FN(sums_of_short_rows)(x, u, runs, next, centers, with_u, sum_v, sum_vd);
        return;
    }
    for (ptrdiff_t i = 0; i < runs->n_channels; i++) {
        const ptrdiff_t at = i * runs->length, to_next = i + 1 < runs->n_channels ? runs->length : next - at;
#define SUMS(with_u, w) \
    FN(sums_of_rows)(x + at, u + at, runs->n_rows, runs->stride, runs->length, to_next, centers[i], with_u, sum_v + i, \
                     sum_vd + i, w)
        if (with_u && w)
            SUMS(1, w);
        else if (with_u)
            SUMS(1, NULL);
        else if (w)
            SUMS(0, w);
        else
            SUMS(0, NULL);
#undef SUMS
    }
}
