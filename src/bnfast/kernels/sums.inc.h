/* The sums that all statistics are made of: of v and of v * (x - center), over rows of one channel (planar) or over the
 * rows of some columns (interleaved). v is u in the backward pass, and x - center itself in the forward pass.
 *
 * A lane takes CHAIN terms in the data's dtype, in each of two chains so that additions need not wait for each other;
 * then the chains are added and go to float64. Relative to the sum of the absolute terms the error of a sum is at most
 * (CHAIN + 3) * 2^-24 for float32, 1e-8 typically, however many terms there are. */

#define CHAIN 16
#define FLUSH (2 * CHAIN)

/* At most this many columns at once, so that what is gathered for them stays in cache; and this many rows, streams of
 * memory that the hardware follows. */
#define COLUMNS ((ptrdiff_t)(4096 / sizeof(T)))
#define TILE_ROWS 8

/* How many elements ahead of the sums memory is asked for: the sums of a block are not the simple stream that the hardware
 * expects. */
#define AHEAD ((ptrdiff_t)(4096 / sizeof(T)))

struct FN(pair) {
    FN(vec) sum, dot;
};

static ALWAYS_INLINE void FN(take)(struct FN(pair) * s, FN(vec) x, FN(vec) u, FN(vec) center, int with_u)
{
    const FN(vec) d = x - center, v = with_u ? u : d;
    s->sum += v;
    s->dot += v * d;
}

/* What is known of a channel between two of its rows. BNFAST_STATE_BYTES at most. */
struct FN(state) {
    struct FN(pair) chain[2][VU];
    FN(wide) sum[VU * WIDE_PER_VEC], dot[VU * WIDE_PER_VEC];
    T center;
};

static ALWAYS_INLINE void FN(flush_state)(struct FN(state) * state, struct FN(pair) chain[2][VU])
{
    for (int k = 0; k < VU; k++) {
        FN(widen_add)(state->sum + k * WIDE_PER_VEC, chain[0][k].sum + chain[1][k].sum);
        FN(widen_add)(state->dot + k * WIDE_PER_VEC, chain[0][k].dot + chain[1][k].dot);
    }
    memset(chain, 0, 2 * VU * sizeof(struct FN(pair)));
}

/* Where a reduction reads. */
struct FN(source) {
    const T *x, *u;
};

static ALWAYS_INLINE void FN(advance)(struct FN(source) * from, ptrdiff_t n)
{
    from->x += n;
    from->u += n;
}

/* The first n <= VN elements from the j-th on. */
static ALWAYS_INLINE void FN(take_from)(struct FN(pair) * s, const struct FN(source) * from, ptrdiff_t j, ptrdiff_t n,
                                        FN(vec) center, int with_u)
{
    const FN(vec) zero = FN(set1)(0), x = FN(load_up_to)(from->x + j, n, center);
    FN(vec) u = zero;
    if (with_u)
        u = FN(load_up_to)(from->u + j, n, zero);
    FN(take)(s, x, u, center, with_u);
}

/* `steps` terms for every lane of both chains; `ahead`: elements to what is to be brought into cache. Where together is
 * not 0, w writes as many elements meanwhile, all of one channel. */
static ALWAYS_INLINE void FN(take_steps)(struct FN(pair) chain[2][VU], struct FN(source) * from, ptrdiff_t steps,
                                         ptrdiff_t ahead, FN(vec) center, int with_u, const bnfast_writer *w,
                                         int gradient, int stream)
{
    struct FN(map) map;
    const T *x = NULL, *u = NULL;
    T *out = NULL;
    if (w) {
        map = FN(map_of_channel)(&w->coefficients, w->channel, gradient);
        x = (const T *)w->x + w->at;
        u = (const T *)w->u + w->at;
        out = (T *)w->out + w->at;
    }
    for (ptrdiff_t s = 0; s < steps; s++, FN(advance)(from, 2 * VL))
        for (int i = 0; i < 2; i++) {
            PREFETCH(from->x + i * VL, ahead * (ptrdiff_t)sizeof(T));
            if (with_u)
                PREFETCH(from->u + i * VL, ahead * (ptrdiff_t)sizeof(T));
            for (int k = 0; k < VU; k++) {
                if (w) {
                    FN(map_elements)(&map, x, u, out, 1, 0, 0, VN, gradient, stream);
                    x += VN;
                    u += VN;
                    out += VN;
                }
                FN(take_from)(&chain[i][k], from, i * VL + k * VN, VN, center, with_u);
            }
        }
}

/* Reduces all channels of a segment row by row, as they lie in memory. from: (n_rows, n_channels, length), rows `stride`
 * apart IN, u where with_u; next: elements to what is reduced next; states: (n_channels,) IN OUT; w: writes about as much
 * meanwhile, or NULL; gradient: what it does. A chain goes to float64 at the end of a row, where it might get full in the
 * next, and after CHAIN terms. */
static ALWAYS_INLINE void FN(sums_of_runs)(struct FN(source) from, const bnfast_runs *runs, ptrdiff_t next,
                                           struct FN(state) * states, int with_u, bnfast_writer *w, int gradient)
{
    const ptrdiff_t n_rows = runs->n_rows, stride = runs->stride, row_length = runs->n_channels * runs->length;
    const ptrdiff_t rows_ahead = row_length < AHEAD ? AHEAD / row_length : 1;
    const ptrdiff_t terms = (runs->length + 2 * VL - 1) / (2 * VL), flush_rows = terms < CHAIN ? CHAIN / terms : 1;
    ptrdiff_t rows_to_flush = flush_rows;
    for (ptrdiff_t r = 0; r < n_rows; r++) {
        /* to the same place some rows on; the last rows ask for the first ones of what comes next */
        const ptrdiff_t to_row = r + rows_ahead < n_rows ? rows_ahead * stride : next + (rows_ahead - n_rows) * stride;
        ptrdiff_t row_left = row_length;
        rows_to_flush -= 1;
        for (ptrdiff_t i = 0; i < runs->n_channels; i++) {
            struct FN(state) *state = states + i;
            struct FN(pair) chain[2][VU];
            memcpy(chain, state->chain, sizeof chain);
            const FN(vec) center = FN(set1)(state->center);
            ptrdiff_t left = runs->length, room = CHAIN;
            while (left >= 2 * VL) {
                ptrdiff_t steps = left / (2 * VL) < room ? left / (2 * VL) : room, ahead = to_row;
                if (row_left > AHEAD + 2 * VL) {
                    const ptrdiff_t here = (row_left - AHEAD) / (2 * VL);
                    steps = here < steps ? here : steps;
                    ahead = AHEAD;
                }
                else if (row_length >= AHEAD)
                    ahead = to_row - row_length + AHEAD;
                const ptrdiff_t together = w ? FN(vectors_left)(w) / (2 * VU) : 0;
                if (together > 0) {
                    steps = together < steps ? together : steps;
                    if (w->stream)
                        FN(take_steps)(chain, &from, steps, ahead, center, with_u, w, gradient, 1);
                    else
                        FN(take_steps)(chain, &from, steps, ahead, center, with_u, w, gradient, 0);
                    w->at += steps * 2 * VL;
                }
                else {
                    if (w && !FN(written)(w)) {
                        FN(write_some)(w, 2 * VL);
                        steps = 1;
                    }
                    FN(take_steps)(chain, &from, steps, ahead, center, with_u, NULL, 0, 0);
                }
                left -= steps * 2 * VL;
                row_left -= steps * 2 * VL;
                room -= steps;
                if (room == 0) {
                    FN(flush_state)(state, chain);
                    room = CHAIN;
                }
            }
            if (left > 0) {
                if (w)
                    FN(write_some)(w, left);
                PREFETCH(from.x, to_row * (ptrdiff_t)sizeof(T));
                if (with_u)
                    PREFETCH(from.u, to_row * (ptrdiff_t)sizeof(T));
                for (int h = 0; h < 2 && left > h * VL; h++)
                    for (int k = 0; k < VU && left > h * VL + k * VN; k++) {
                        const ptrdiff_t j = h * VL + k * VN;
                        FN(take_from)(&chain[h][k], &from, j, left - j < VN ? left - j : VN, center, with_u);
                    }
                FN(advance)(&from, left);
                row_left -= left;
            }
            if (rows_to_flush == 0)
                FN(flush_state)(state, chain);
            memcpy(state->chain, chain, sizeof chain);
        }
        if (rows_to_flush == 0)
            rows_to_flush = flush_rows;
        from.x += stride - row_length;
        from.u += stride - row_length;
    }
    for (ptrdiff_t i = 0; i < runs->n_channels; i++)
        FN(flush_state)(states + i, states[i].chain);
}

static void FN(begin_state)(struct FN(state) * state, T center)
{
    memset(state, 0, sizeof *state);
    state->center = center;
}

/* Chains of many columns: 0 and 1, of sums and of dots. They are in memory between tiles. */
struct FN(chains) {
    T sum[2][COLUMNS], dot[2][COLUMNS];
};

/* Adds a tile of at most TILE_ROWS rows to the chains of `vectors` vectors of columns from c on, or of n < VN columns.
 * packed_x, packed_u: (n_rows, .) OUT, rows `packed_stride` apart, the same elements again; or NULL */
static ALWAYS_INLINE void FN(sums_of_tile)(const T *x, const T *u, ptrdiff_t n_rows, ptrdiff_t stride, T *packed_x,
                                           T *packed_u, ptrdiff_t packed_stride, const T *centers, ptrdiff_t c,
                                           int vectors, ptrdiff_t n, int with_u, struct FN(chains) * chains)
{
    const FN(vec) zero = FN(set1)(0);
    FN(vec) center[COLUMN_VECTORS];
    struct FN(pair) chain[2][COLUMN_VECTORS];
    for (int k = 0; k < vectors; k++) {
        center[k] = FN(load_up_to)(centers + c + k * VN, n, zero);
        for (int i = 0; i < 2; i++) {
            chain[i][k].sum = FN(load)(chains->sum[i] + c + k * VN);
            chain[i][k].dot = FN(load)(chains->dot[i] + c + k * VN);
        }
    }
    x += c;
    u += c;
    if (packed_x) {
        packed_x += c;
        packed_u += c;
    }
#define TAKE_ROW(i)                                                                                                    \
    for (int k = 0; k < vectors; k++) {                                                                                \
        PREFETCH_L2(x + k * VN, 2 * TILE_ROWS * stride * (ptrdiff_t)sizeof(T));                                            \
        const FN(vec) x_values = FN(load_up_to)(x + k * VN, n, center[k]);                                             \
        FN(vec) u_values = zero;                                                                                       \
        if (packed_x)                                                                                                  \
            FN(store_up_to)(packed_x + k * VN, n, x_values);                                                           \
        if (with_u) {                                                                                                  \
            PREFETCH_L2(u + k * VN, 2 * TILE_ROWS * stride * (ptrdiff_t)sizeof(T));                                        \
            u_values = FN(load_up_to)(u + k * VN, n, zero);                                                            \
            if (packed_x)                                                                                              \
                FN(store_up_to)(packed_u + k * VN, n, u_values);                                                       \
        }                                                                                                              \
        FN(take)(&chain[i][k], x_values, u_values, center[k], with_u);                                                 \
    }                                                                                                                  \
    x += stride;                                                                                                       \
    u += stride;                                                                                                       \
    if (packed_x) {                                                                                                    \
        packed_x += packed_stride;                                                                                     \
        packed_u += packed_stride;                                                                                     \
    }
    ptrdiff_t t = 0;
    for (; t + 2 <= n_rows; t += 2) {
        TAKE_ROW(0)
        TAKE_ROW(1)
    }
    if (t < n_rows) {
        TAKE_ROW(0)
    }
#undef TAKE_ROW
    for (int k = 0; k < vectors; k++)
        for (int i = 0; i < 2; i++) {
            FN(store)(chains->sum[i] + c + k * VN, chain[i][k].sum);
            FN(store)(chains->dot[i] + c + k * VN, chain[i][k].dot);
        }
}

/* The chains go to float64, and begin again. */
static void FN(flush_chains)(struct FN(chains) * chains, ptrdiff_t n_columns, double *sum, double *dot)
{
    const FN(vec) zero = FN(set1)(0);
    for (ptrdiff_t c = 0; c < n_columns; c += VN) {
        const ptrdiff_t n = n_columns - c < VN ? n_columns - c : VN;
        FN(widen_add_columns)(sum + c, FN(load)(chains->sum[0] + c) + FN(load)(chains->sum[1] + c), n);
        FN(widen_add_columns)(dot + c, FN(load)(chains->dot[0] + c) + FN(load)(chains->dot[1] + c), n);
        for (int i = 0; i < 2; i++) {
            FN(store)(chains->sum[i] + c, zero);
            FN(store)(chains->dot[i] + c, zero);
        }
    }
}

static ALWAYS_INLINE void FN(sums_of_columns_as)(const T *x, const T *u, ptrdiff_t n_rows, ptrdiff_t stride, T *packed_x,
                                                 T *packed_u, ptrdiff_t packed_stride, ptrdiff_t n_columns,
                                                 const T *centers, int with_u, double *sum, double *dot)
{
    struct FN(chains) chains;
    for (ptrdiff_t c = 0; c < n_columns; c++)
        sum[c] = dot[c] = 0.0;
    for (int i = 0; i < 2; i++) {
        memset(chains.sum[i], 0, (size_t)(n_columns + VN - 1) / VN * VN * sizeof(T));
        memset(chains.dot[i], 0, (size_t)(n_columns + VN - 1) / VN * VN * sizeof(T));
    }
    for (ptrdiff_t r = 0; r < n_rows; r += TILE_ROWS) {
        const ptrdiff_t rows = n_rows - r < TILE_ROWS ? n_rows - r : TILE_ROWS;
        ptrdiff_t c = 0;
#define TILE(vectors, n)                                                                                               \
    FN(sums_of_tile)(x + r * stride, u + r * stride, rows, stride, packed_x ? packed_x + r * packed_stride : NULL,     \
                     packed_x ? packed_u + r * packed_stride : NULL, packed_stride, centers, c, vectors, n, with_u,    \
                     &chains)
        for (; c + COLUMN_VECTORS * VN <= n_columns; c += COLUMN_VECTORS * VN)
            TILE(COLUMN_VECTORS, VN);
        for (; c + VN <= n_columns; c += VN)
            TILE(1, VN);
        if (c < n_columns)
            TILE(1, n_columns - c);
#undef TILE
        if ((r + TILE_ROWS) % FLUSH == 0 || r + TILE_ROWS >= n_rows)
            FN(flush_chains)(&chains, n_columns, sum, dot);
    }
}

/* x, u: (n_rows, n_columns <= COLUMNS), rows `stride` apart IN; centers: (n_columns,) IN; sum, dot: (n_columns,) OUT;
 * packed_x, packed_u: NULL, or (n_rows, n_columns) with rows packed_stride apart OUT */
static ALWAYS_INLINE void FN(sums_of_columns)(const T *x, const T *u, ptrdiff_t n_rows, ptrdiff_t stride, T *packed_x,
                                              T *packed_u, ptrdiff_t packed_stride, ptrdiff_t n_columns, const T *centers,
                                              int with_u, double *sum, double *dot)
{
    if (packed_x)
        FN(sums_of_columns_as)(x, u, n_rows, stride, packed_x, packed_u, packed_stride, n_columns, centers, with_u, sum, dot);
    else
        FN(sums_of_columns_as)(x, u, n_rows, stride, NULL, NULL, 0, n_columns, centers, with_u, sum, dot);
}
