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

/* At most this many channels whose rows are taken in the order of memory. */
#define CHANNELS_IN_ORDER 8

/* Steps of the sums between two turns of a map (BY_TURNS). */
#define TURN 8

/* At most this many columns at once, so that what is gathered for them stays in cache. */
#define COLUMNS ((ptrdiff_t)(4096 / sizeof(T)))

/* Of rows of columns, so many elements ahead, of two arrays half as many; but at least the next rows. */
#define ROW_AHEAD ((ptrdiff_t)(16384 / sizeof(S)))

/* How many elements ahead of the sums memory is asked for, in long rows of one array twice as many: the sums of a block
 * are not the simple stream that the hardware expects. */
#define AHEAD ((ptrdiff_t)(4096 / sizeof(S)))

struct FN(pair) {
    FN(vec) sum_v, sum_vd;
};

/* What of u is taken, where there is one: all of it, or what an activation passes. RELU, RECTIFIED: as y alone decides it,
 * with nothing to store, and ReLU or another; MARKED: as marks do, nothing to store (of columns only, and not of halves: elsewhere nothing is
 * gained); PASSED: in any way. */
enum { FN(NO_U), FN(ALL), FN(RELU), FN(RECTIFIED), FN(MARKED), FN(PASSED) };
#define NO_U FN(NO_U)
#define ALL FN(ALL)
#define RELU FN(RELU)
#define RECTIFIED FN(RECTIFIED)
#define MARKED FN(MARKED)
#define PASSED FN(PASSED)
#define TAKES_SOME(kind) ((kind) >= RELU)

/* bnfast_passing, from some element and channel on. */
struct FN(passing) {
    const T *y_scale, *y_shift;
    const S *residual;
    const unsigned char *marks;
    ptrdiff_t number;
    S *stored;
    struct FN(rectifier) rectifier;
};

static ALWAYS_INLINE struct FN(passing) FN(passing_of)(const bnfast_passing *of)
{
    struct FN(passing) passing = {NULL, NULL, NULL, NULL, 0, NULL, {FN(set1)(0), FN(set1)(0), 0}};
    if (of) {
        passing.y_scale = of->y_scale;
        passing.y_shift = of->y_shift;
        passing.residual = of->residual;
        passing.marks = of->marks;
        passing.number = of->number;
        passing.stored = of->passed;
        passing.rectifier = FN(rectifier_of)(&of->rectifier);
    }
    return passing;
}

/* The same, `elements` of the data and `channels` further on. */
static ALWAYS_INLINE struct FN(passing)
    FN(passing_at)(struct FN(passing) passing, ptrdiff_t elements, ptrdiff_t channels, int kind)
{
    if (TAKES_SOME(kind)) {
        passing.y_scale += channels;
        passing.y_shift += channels;
    }
    if (kind == PASSED && passing.residual)
        passing.residual += elements;
    if (kind >= MARKED)
        passing.number += elements;
    if (kind == PASSED && passing.stored)
        passing.stored += elements;
    return passing;
}

/* What is taken of the first n <= VN elements of u at `at`. */
static ALWAYS_INLINE FN(vec) FN(taken)(const struct FN(passing) * passing, ptrdiff_t at, ptrdiff_t n, FN(vec) x,
                                       FN(vec) u, FN(vec) center, FN(vec) y_scale, FN(vec) y_shift, int kind)
{
    if (!TAKES_SOME(kind))
        return u;
    if (kind == RELU)
        return FN(passed_by_relu)(u, (x - center) * y_scale, y_shift);
    if (kind == RECTIFIED)
        return FN(passed)(&passing->rectifier, u, (x - center) * y_scale + y_shift);
    if (kind == MARKED)
        return FN(passed_by_marks)(&passing->rectifier, u, passing->marks, passing->number + at, n);
    if (passing->marks)
        u = FN(passed_by_marks)(&passing->rectifier, u, passing->marks, passing->number + at, n);
    else {
        FN(vec) v = (x - center) * y_scale + y_shift;
        if (passing->residual)
            v = v + FN(read_up_to)(passing->residual + at, n, FN(set1)(0));
        u = FN(passed)(&passing->rectifier, u, v);
    }
    if (passing->stored)
        FN(write_up_to)(passing->stored + at, n, u);
    return u;
}

static ALWAYS_INLINE void FN(take)(struct FN(pair) * s, FN(vec) x, FN(vec) u, FN(vec) center, int with_u)
{
    const FN(vec) d = x - center, v = with_u ? u : d;
    s->sum_v += v;
    s->sum_vd += v * d;
}

#if SPLITS
/* wide: VL lanes, of elements that were split (struct two) */
static ALWAYS_INLINE void FN(put_in_order)(FN(wide) * wide)
{
    double lanes[VL], ordered[VL];
    memcpy(lanes, wide, sizeof lanes);
    for (ptrdiff_t i = 0; i < VL / 2; i++) {
        ordered[2 * i] = lanes[i];
        ordered[2 * i + 1] = lanes[VL / 2 + i];
    }
    memcpy(wide, ordered, sizeof ordered);
}
#endif

/* `steps` terms for every lane of both chains; `ahead`: elements to what is to be brought into cache. */
#define TAKE_STEPS(more) \
    for (ptrdiff_t s = 0; s < steps; s++, row += 2 * VL, row_u += 2 * VL) \
        for (int i = 0; i < 2; i++) { \
            PREFETCH_L2(row + i * VL, ahead * (ptrdiff_t)sizeof(S)); \
            if (with_u) \
                PREFETCH_L2(row_u + i * VL, ahead * (ptrdiff_t)sizeof(S)); \
            for (int k = 0; k < VU; k++) { \
                more; \
                const FN(vec) x_values = FN(read)(row + i * VL + k * VN); \
                FN(vec) u_values = zero; \
                if (with_u) \
                    u_values = FN(taken)(&passing, row - x + i * VL + k * VN, VN, x_values, \
                                         FN(read)(row_u + i * VL + k * VN), center, y_scale, y_shift, with_u); \
                FN(take)(&chain[i][k], x_values, u_values, center, with_u); \
            } \
        }

/* The same of halves, of two vectors at once, which are VL elements (AVX2), or those of both chains (AVX-512); the chains are
 * variables of their own, which as an array were stored at every step (0.6 to 0.95 of the time; of float32 it is the same). */
#define IN_TWOS(kind) (sizeof(S) < sizeof(T) && VU <= 2 && (kind) <= RECTIFIED)
/* That of the k-th vector of a step. */
#define CHAIN_OF(k) chain[(k) / VU][(k) % VU]
#define TAKE_TWO(from, first, second, more) \
    do { \
        PREFETCH_L2(row + (from), ahead * (ptrdiff_t)sizeof(S)); \
        if (with_u) \
            PREFETCH_L2(row_u + (from), ahead * (ptrdiff_t)sizeof(S)); \
        more; \
        const struct FN(two) x_two = FN(read_two)(row + (from)), \
                             u_two = with_u ? FN(read_two)(row_u + (from)) : x_two; \
        FN(take)(&first, x_two.v[0], \
                 FN(taken)(&passing, 0, VN, x_two.v[0], u_two.v[0], center, y_scale, y_shift, with_u), center, \
                 with_u); \
        FN(take)(&second, x_two.v[1], \
                 FN(taken)(&passing, 0, VN, x_two.v[1], u_two.v[1], center, y_scale, y_shift, with_u), center, \
                 with_u); \
    } while (0)
#define TAKE_STEPS_OF_TWO(more) \
    do { \
        struct FN(pair) first = CHAIN_OF(0), second = CHAIN_OF(1), next_first = first, next_second = second; \
        if (VU == 2) { \
            next_first = CHAIN_OF(2); \
            next_second = CHAIN_OF(3); \
        } \
        for (ptrdiff_t s = 0; s < steps; s++, row += 2 * VL, row_u += 2 * VL) { \
            TAKE_TWO(0, first, second, more); \
            if (VU == 2) \
                TAKE_TWO(VL, next_first, next_second, more); \
        } \
        if (VU == 2) { \
            CHAIN_OF(2) = next_first; \
            CHAIN_OF(3) = next_second; \
        } \
        CHAIN_OF(0) = first; \
        CHAIN_OF(1) = second; \
    } while (0)

/* The sums of a channel so far: two chains, which may take `room` more terms, and what they have been added to. */
struct FN(row_sums) {
    struct FN(pair) chain[2][VU];
    FN(wide) wide_v[VU * WIDE_PER_VEC], wide_vd[VU * WIDE_PER_VEC];
    ptrdiff_t room;
};

static ALWAYS_INLINE void FN(begin_rows)(struct FN(row_sums) * sums)
{
    memset(sums, 0, sizeof *sums);
    sums->room = CHAIN;
}

/* A vector of each of two chains; where the chains' elements were split, one of the even ones of both and one of the odd. */
static ALWAYS_INLINE FN(vec) FN(add_chains)(FN(vec) first, FN(vec) second, int with_u)
{
#if SPLITS && VBYTES == 64
    if (IN_TWOS(with_u))
        return PASTE(add_split_, HALF, )(first, second);
#endif
    (void)with_u;
    return first + second;
}

static ALWAYS_INLINE void FN(flush_chains)(struct FN(pair) chain[2][VU], FN(wide) * wide_v, FN(wide) * wide_vd,
                                           int with_u)
{
    const FN(vec) zero = FN(set1)(0);
    for (int k = 0; k < VU; k++) {
        FN(widen_add)(wide_v + k * WIDE_PER_VEC, FN(add_chains)(chain[0][k].sum_v, chain[1][k].sum_v, with_u));
        FN(widen_add)(wide_vd + k * WIDE_PER_VEC, FN(add_chains)(chain[0][k].sum_vd, chain[1][k].sum_vd, with_u));
        for (int i = 0; i < 2; i++)
            chain[i][k].sum_v = chain[i][k].sum_vd = zero;
    }
}

/* x, u: (n_rows, length), rows `stride` apart IN, u where with_u; next: elements to what is reduced next; sums: IN and OUT;
 * w: a map that goes on meanwhile, or NULL; flags: its own, or BY_TURNS */
static ALWAYS_INLINE void FN(sums_of_rows)(struct FN(row_sums) * sums, const S *x, const S *u, ptrdiff_t n_rows,
                                           ptrdiff_t stride, ptrdiff_t length, ptrdiff_t next, T center_value,
                                           struct FN(passing) passing, int with_u, bnfast_writer *w, int flags)
{
    const FN(vec) center = FN(set1)(center_value), zero = FN(set1)(0);
    FN(vec) y_scale = zero, y_shift = zero;
    if (TAKES_SOME(with_u)) {
        y_scale = FN(set1)(*passing.y_scale);
        y_shift = FN(set1)(*passing.y_shift);
    }
    struct FN(pair) chain[2][VU];
    for (int k = 0; k < VU; k++)
        for (int i = 0; i < 2; i++)
            chain[i][k] = sums->chain[i][k];
    ptrdiff_t room = sums->room;
    const ptrdiff_t furthest = with_u ? AHEAD : 2 * AHEAD, reach = length < furthest ? length : furthest;
#define FLUSH_CHAINS \
    if (room == 0) { \
        FN(flush_chains)(chain, sums->wide_v, sums->wide_vd, with_u); \
        room = CHAIN; \
    }
    for (ptrdiff_t r = 0; r < n_rows; r++) {
        const S *row = x + r * stride, *row_u = u + r * stride;
        /* past the end of the row: to its successor, or to what comes next */
        const ptrdiff_t to_next = (r + 1 < n_rows ? stride : next - r * stride) - length + reach;
        ptrdiff_t left = length;
        while (left >= 2 * VL) {
            ptrdiff_t steps = left / (2 * VL) < room ? left / (2 * VL) : room;
            const ptrdiff_t ahead = left > reach ? reach : to_next;
            const ptrdiff_t to_line = w ? FN(left_to_line)(w) : 0;
            const ptrdiff_t together = w && flags != BY_TURNS && to_line == 0 ? FN(vectors_left)(w) / (2 * VU) : 0;
            if (together > 0) {
                const struct FN(map) map = FN(map_of_channel)(&w->coefficients, w->channel, flags);
                struct FN(places) at = FN(further)(FN(places_of)(w->x, w->u, w->out, &w->marked), w->at, flags);
                steps = together < steps ? together : steps;
                w->at += steps * 2 * VL;
#define MAP_ONE(stream) \
    FN(map_elements)(&map, &at, 1, 0, 0, 0, VN, flags, stream); \
    FN(go_on)(&at, VN, VN, VN, flags)
#if SPLITS
#define MAP_TWO(stream) \
    if (MAPS_TWO(flags)) { \
        FN(map_two)(&map, &at, flags, stream); \
        FN(go_on)(&at, 2 * VN, 2 * VN, 2 * VN, flags); \
    } else { \
        MAP_ONE(stream); \
        MAP_ONE(stream); \
    }
#else
#define MAP_TWO(stream) \
    MAP_ONE(stream); \
    MAP_ONE(stream)
#endif
                if (IN_TWOS(with_u)) {
                    const int stream = w->stream; /* which a store could change, as far as the compiler knows */
                    TAKE_STEPS_OF_TWO(MAP_TWO(stream));
                } else if (!SPECIALISES) {
                    TAKE_STEPS(MAP_ONE(w->stream))
                } else if (w->stream) {
                    TAKE_STEPS(MAP_ONE(1))
                } else {
                    TAKE_STEPS(MAP_ONE(0))
                }
#undef MAP_TWO
#undef MAP_ONE
            } else {
                if (w && !FN(written)(w)) {
                    const ptrdiff_t turn = flags == BY_TURNS ? TURN : 1;
                    steps = turn < steps ? turn : steps;
                    FN(write_some)(w, to_line + steps * 2 * VL);
                }
                if (IN_TWOS(with_u))
                    TAKE_STEPS_OF_TWO();
                else
                    TAKE_STEPS()
            }
            left -= steps * 2 * VL;
            room -= steps;
            FLUSH_CHAINS
        }
        if (left > 0) {
            if (w)
                FN(write_some)(w, left);
#if SPLITS
            if (IN_TWOS(with_u)) {
                for (int i = 0; i < VU && left > i * 2 * VN; i++) {
                    const ptrdiff_t from = i * 2 * VN;
                    PREFETCH_L2(row + from, to_next * (ptrdiff_t)sizeof(S));
                    if (with_u)
                        PREFETCH_L2(row_u + from, to_next * (ptrdiff_t)sizeof(S));
                    const struct FN(two) x_two = FN(read_two_part)(row + from, left - from, center),
                                         u_two = with_u ? FN(read_two_part)(row_u + from, left - from, zero) : x_two;
                    for (int k = 0; k < 2; k++) {
                        const FN(vec) u_values =
                            FN(taken)(&passing, 0, VN, x_two.v[k], u_two.v[k], center, y_scale, y_shift, with_u);
                        FN(take)(&CHAIN_OF(2 * i + k), x_two.v[k], u_values, center, with_u);
                    }
                }
            } else
#endif
                for (int i = 0; i < 2 && left > i * VL; i++) {
                    PREFETCH_L2(row + i * VL, to_next * (ptrdiff_t)sizeof(S));
                    if (with_u)
                        PREFETCH_L2(row_u + i * VL, to_next * (ptrdiff_t)sizeof(S));
                    for (int k = 0; k < VU; k++) {
                        const ptrdiff_t j = i * VL + k * VN;
                        const FN(vec) x_values = FN(read_part)(row + j, left - j, center);
                        FN(vec) u_values = zero;
                        if (with_u)
                            u_values =
                                FN(taken)(&passing, row - x + j, FN(within)(left - j), x_values,
                                          FN(read_part)(row_u + j, left - j, zero), center, y_scale, y_shift, with_u);
                        FN(take)(&chain[i][k], x_values, u_values, center, with_u);
                    }
                }
            room -= 1;
            FLUSH_CHAINS
        }
    }
#undef FLUSH_CHAINS
    for (int k = 0; k < VU; k++)
        for (int i = 0; i < 2; i++)
            sums->chain[i][k] = chain[i][k];
    sums->room = room;
}

static ALWAYS_INLINE void FN(end_rows)(struct FN(row_sums) * sums, int with_u, double *sum_v, double *sum_vd)
{
    FN(flush_chains)(sums->chain, sums->wide_v, sums->wide_vd, with_u);
#if SPLITS
    if (IN_TWOS(with_u)) {
        FN(put_in_order)(sums->wide_v);
        FN(put_in_order)(sums->wide_vd);
    }
#else
    (void)with_u;
#endif
    *sum_v = FN(fold_wide)(sums->wide_v);
    *sum_vd = FN(fold_wide)(sums->wide_vd);
}

/* Of rows that are not near: how many are left from a tile's first on; how many rows ahead memory is asked for; elements to
 * what is asked for where no such row is left; and what rows_in_order works in. */
struct FN(far) {
    ptrdiff_t rows_left, rows_ahead, to_next;
    struct FN(pair) (*chains)[COLUMNS / VN];
};

/* From row r of a tile. */
static ALWAYS_INLINE ptrdiff_t FN(elements_ahead)(const struct FN(far) * far, ptrdiff_t r, ptrdiff_t stride)
{
    return r + far->rows_ahead < far->rows_left ? far->rows_ahead * stride : far->to_next;
}

/* A tile: n_rows rows, of which four vectors of columns are added to their sums, or one, or n columns. Everything points to
 * its first column; packed_x, packed_u: (n_rows, .) OUT, rows `packed_stride` apart, the same elements again, or NULL. (Of at
 * most 128 bytes: GCC copies larger ones by an instruction that takes as long as the sums of a few rows.) */
struct FN(tile) {
    const S *x, *u;
    ptrdiff_t n_rows, stride;
    S *packed_x, *packed_u;
    ptrdiff_t packed_stride;
    const T *centers;
    const struct FN(passing) * passing; /* of u, where some of it is taken, from `element` and `channel` on */
    ptrdiff_t element, channel;
    double *sum_v, *sum_vd;
    ptrdiff_t n;
    const struct FN(far) * far;
};
_Static_assert(sizeof(struct FN(tile)) <= 128, "copied by ordinary instructions");

/* The tile `columns` further on. */
static ALWAYS_INLINE struct FN(tile) FN(tile_at)(const struct FN(tile) * from, ptrdiff_t columns)
{
    struct FN(tile) tile = *from;
    tile.x += columns;
    tile.u += columns;
    if (tile.packed_x) {
        tile.packed_x += columns;
        tile.packed_u += columns;
    }
    tile.centers += columns;
    tile.element += columns;
    tile.channel += columns;
    tile.sum_v += columns;
    tile.sum_vd += columns;
    return tile;
}

static ALWAYS_INLINE struct FN(passing) FN(passing_in)(const struct FN(tile) * tile, int kind)
{
    return TAKES_SOME(kind) ? FN(passing_at)(*tile->passing, tile->element, tile->channel, kind) : FN(passing_of)(NULL);
}

/* Rows of x and u that are not near, at most two chains of them: one after another, as one stream of memory each, while
 * what follows is asked for (in tiles they took up to 1.2 times as long). The chains lie in memory, too, (COLUMNS / VN,) of
 * each, which begin and end as zeros. */
static ALWAYS_INLINE void FN(rows_in_order)(const struct FN(tile) * tile, int with_u)
{
    const FN(vec) zero = FN(set1)(0);
    const struct FN(passing) passing = FN(passing_in)(tile, with_u);
    const ptrdiff_t n_rows = tile->n_rows, stride = tile->stride, n_columns = tile->n;
    const struct FN(far) *const far = tile->far;
    const int as_it_is = with_u >= MARKED && passing.marks && !passing.stored; /* the map goes by marks itself */
    const S *x = tile->x, *u = tile->u;
    S *packed_x = tile->packed_x, *packed_u = tile->packed_u;
    ptrdiff_t at = 0;
    for (ptrdiff_t r = 0; r < n_rows; r++, x += stride, u += stride, at += stride) {
        const ptrdiff_t ahead = FN(elements_ahead)(far, r, stride) * (ptrdiff_t)sizeof(S);
        struct FN(pair) *const chain = far->chains[r % 2];
#define TAKE_COLUMNS(n) \
    do { \
        const FN(vec) center = FN(load_up_to)(tile->centers + c, n, zero); \
        FN(vec) y_scale = zero, y_shift = zero; \
        PREFETCH_L2(x + c, ahead); \
        PREFETCH_L2(u + c, ahead); \
        const FN(vec) x_values = FN(read_up_to)(x + c, n, center); \
        FN(vec) u_values = FN(read_up_to)(u + c, n, zero); \
        if (TAKES_SOME(with_u)) { \
            y_scale = FN(load_up_to)(passing.y_scale + c, n, zero); \
            y_shift = FN(load_up_to)(passing.y_shift + c, n, zero); \
        } \
        if (packed_x) { \
            FN(write_up_to)(packed_x + c, n, x_values); \
            if (as_it_is) \
                FN(write_up_to)(packed_u + c, n, u_values); \
        } \
        u_values = FN(taken)(&passing, at + c, n, x_values, u_values, center, y_scale, y_shift, with_u); \
        if (packed_x && !as_it_is) \
            FN(write_up_to)(packed_u + c, n, u_values); \
        FN(take)(&chain[c / VN], x_values, u_values, center, with_u); \
    } while (0)
        ptrdiff_t c = 0;
        for (; c + VN <= n_columns; c += VN)
            TAKE_COLUMNS(VN);
        if (c < n_columns)
            TAKE_COLUMNS(n_columns - c);
#undef TAKE_COLUMNS
        if (packed_x) {
            packed_x += tile->packed_stride;
            packed_u += tile->packed_stride;
        }
    }
    for (ptrdiff_t c = 0; c < n_columns; c += VN) {
        struct FN(pair) *const first = far->chains[0] + c / VN, *const second = far->chains[1] + c / VN;
        FN(widen_add_columns)(tile->sum_v + c, first->sum_v + second->sum_v, FN(within)(n_columns - c));
        FN(widen_add_columns)(tile->sum_vd + c, first->sum_vd + second->sum_vd, FN(within)(n_columns - c));
        first->sum_v = first->sum_vd = second->sum_v = second->sum_vd = zero;
    }
}

/* `vectors` (four or one) of n columns each: row by row, so that a line of memory that two vectors share, and one that the
 * hardware brings with its neighbour, is used before the next rows displace it. Two chains (rows 0, 2, 4, ... and 1, 3, 5,
 * ...), which registers hold where there are 32. asks: of x alone; what follows is asked for meanwhile, and rows may be packed */
static ALWAYS_INLINE void FN(sum_tile)(const struct FN(tile) * tile, int vectors, ptrdiff_t n, int with_u, int asks)
{
    const FN(vec) zero = FN(set1)(0);
    const struct FN(pair) none = {zero, zero};
    const struct FN(passing) passing = FN(passing_in)(tile, with_u);
    const ptrdiff_t n_rows = tile->n_rows, stride = tile->stride;
    const S *x = tile->x, *u = tile->u;
    S *packed_x = asks ? tile->packed_x : NULL;
    double *const sum_v = tile->sum_v, *const sum_vd = tile->sum_vd;
    FN(vec) center[4], y_scale[4], y_shift[4];
    struct FN(pair) chain[2][4];
    ptrdiff_t at = 0, bytes_ahead = 0;
#define FOR_EACH_VECTOR(DO) \
    do { \
        DO(0); \
        if (vectors == 4) { \
            DO(1); \
            DO(2); \
            DO(3); \
        } \
    } while (0)
#define BEGIN(k) \
    do { \
        center[k] = FN(load_up_to)(tile->centers + (k) * VN, n, zero); \
        y_scale[k] = TAKES_SOME(with_u) ? FN(load_up_to)(passing.y_scale + (k) * VN, n, zero) : zero; \
        y_shift[k] = TAKES_SOME(with_u) ? FN(load_up_to)(passing.y_shift + (k) * VN, n, zero) : zero; \
        chain[0][k] = chain[1][k] = none; \
    } while (0)
#define TAKE_VECTOR(i, k) \
    do { \
        if (asks) \
            PREFETCH_L2(x + (k) * VN, bytes_ahead); \
        const FN(vec) x_values = FN(read_up_to)(x + (k) * VN, n, center[k]); \
        FN(vec) u_values = zero; \
        if (packed_x) \
            FN(write_up_to)(packed_x + (k) * VN, n, x_values); \
        if (with_u) \
            u_values = FN(taken)(&passing, at + (k) * VN, n, x_values, FN(read_up_to)(u + (k) * VN, n, zero), \
                                 center[k], y_scale[k], y_shift[k], with_u); \
        FN(take)(&chain[i][k], x_values, u_values, center[k], with_u); \
    } while (0)
#define TAKE_FIRST(k) TAKE_VECTOR(0, k)
#define TAKE_SECOND(k) TAKE_VECTOR(1, k)
#define TAKE_ROW(DO) \
    do { \
        if (asks) \
            bytes_ahead = FN(elements_ahead)(tile->far, r, stride) * (ptrdiff_t)sizeof(S); \
        FOR_EACH_VECTOR(DO); \
        x += stride, u += stride, at += stride; \
        if (packed_x) \
            packed_x += tile->packed_stride; \
    } while (0)
#define END(k) \
    do { \
        FN(widen_add_columns)(sum_v + (k) * VN, chain[0][k].sum_v + chain[1][k].sum_v, n); \
        FN(widen_add_columns)(sum_vd + (k) * VN, chain[0][k].sum_vd + chain[1][k].sum_vd, n); \
        chain[0][k] = chain[1][k] = none; \
    } while (0)
    FOR_EACH_VECTOR(BEGIN);
    for (ptrdiff_t r = 0; r < n_rows;) {
        const ptrdiff_t end = r + 2 * COLUMN_CHAIN < n_rows ? r + 2 * COLUMN_CHAIN : n_rows;
        for (; r < end; r++) {
            TAKE_ROW(TAKE_FIRST);
            if (++r == end)
                break;
            TAKE_ROW(TAKE_SECOND);
        }
        FOR_EACH_VECTOR(END);
    }
#undef FOR_EACH_VECTOR
#undef BEGIN
#undef TAKE_VECTOR
#undef TAKE_FIRST
#undef TAKE_SECOND
#undef TAKE_ROW
#undef END
}

/* One function for each kind of tile: the bodies are long. */
#define TILE(name, vectors, n, kind, asks) \
    static NEVER_INLINE void FN(name)(const struct FN(tile) * tile) { FN(sum_tile)(tile, vectors, n, kind, asks); }
#define TILES_OF(kind) \
    TILE(near_four_##kind, 4, VN, kind, 0) \
    TILE(near_one_##kind, 1, VN, kind, 0) \
    TILE(near_part_##kind, 1, tile->n, kind, 0)
#define IN_ORDER(kind) \
    static NEVER_INLINE void FN(in_order_##kind)(const struct FN(tile) * tile) { FN(rows_in_order)(tile, kind); }

TILES_OF(NO_U)
TILES_OF(ALL)
TILES_OF(RELU)
TILES_OF(RECTIFIED)
TILES_OF(MARKED)
TILES_OF(PASSED)
TILE(far_four, 4, VN, NO_U, 1)
TILE(far_one, 1, VN, NO_U, 1)
TILE(far_part, 1, tile->n, NO_U, 1)
IN_ORDER(ALL)
IN_ORDER(RELU)
IN_ORDER(RECTIFIED)
IN_ORDER(MARKED)
IN_ORDER(PASSED)
#undef TILES_OF
#undef IN_ORDER
#undef TILE

/* A tile from column c on: four vectors, one, or a part of one, `count` columns. */
#define DO_TILE(name, c, count) \
    do { \
        struct FN(tile) some = FN(tile_at)(&tile, c); \
        some.n = count; \
        if (with_u == NO_U && far) \
            FN(far_##name)(&some); \
        else if (with_u == NO_U) \
            FN(near_##name##_NO_U)(&some); \
        else if (with_u == ALL) \
            FN(near_##name##_ALL)(&some); \
        else if (with_u == RELU) \
            FN(near_##name##_RELU)(&some); \
        else if (with_u == RECTIFIED) \
            FN(near_##name##_RECTIFIED)(&some); \
        else if (with_u == MARKED) \
            FN(near_##name##_MARKED)(&some); \
        else \
            FN(near_##name##_PASSED)(&some); \
    } while (0)

/* How far ahead of `all` is asked for. next: elements from the first row to what is needed after these */
static ALWAYS_INLINE struct FN(far)
    FN(far_from)(const struct FN(tile) * all, ptrdiff_t n_columns, ptrdiff_t next, int with_u)
{
    const ptrdiff_t rows = with_u ? 1 : 2 * COLUMN_CHAIN, ahead = with_u ? ROW_AHEAD / 2 : ROW_AHEAD;
    const ptrdiff_t enough = rows * n_columns < ahead ? ahead / n_columns : rows;
    const ptrdiff_t rows_ahead = enough < all->n_rows ? enough : all->n_rows;
    const struct FN(far) far = {0, rows_ahead, next + (rows_ahead - all->n_rows) * all->stride, NULL};
    return far;
}

/* far: of x alone; or NULL, where rows are near. Those are taken all at once; but eight at a time where they displace each other from
 * L1, being a power of two apart. So are all that are far, about in the order of memory. */
static ALWAYS_INLINE void FN(sums_of_tiles)(const struct FN(tile) * all, ptrdiff_t n_columns, int with_u,
                                            struct FN(far) * far)
{
    const ptrdiff_t stride = all->stride, n_rows = all->n_rows;
    const ptrdiff_t tile_rows = far || ROWS_DISPLACE(stride) ? 2 * COLUMN_CHAIN : n_rows;
    /* columns before the first that begins a line of memory, where that is the same one in every row; not for so few
     * that the parts of vectors at both ends would cost more */
    const ptrdiff_t head = stride % LINE == 0 && n_columns >= 16 * VL ? FN(to_line)(all->x, LINE) : 0;
    struct FN(tile) tile = *all;
    tile.far = far;
    for (ptrdiff_t r = 0; r < n_rows; r += tile_rows) {
        ptrdiff_t c = 0;
        tile.n_rows = n_rows - r < tile_rows ? n_rows - r : tile_rows;
        if (far)
            far->rows_left = n_rows - r;
        for (; c + VN <= head; c += VN)
            DO_TILE(one, c, VN);
        if (c < head)
            DO_TILE(part, c, head - c);
        for (c = head; c + 4 * VN <= n_columns; c += 4 * VN)
            DO_TILE(four, c, VN);
        for (; c + VN <= n_columns; c += VN)
            DO_TILE(one, c, VN);
        if (c < n_columns)
            DO_TILE(part, c, n_columns - c);
        tile.x += tile_rows * stride;
        tile.u += tile_rows * stride;
        if (tile.packed_x)
            tile.packed_x += tile_rows * tile.packed_stride;
        tile.element += tile_rows * stride;
    }
}

/* Of x and u, where rows are far. */
static NEVER_INLINE void FN(sums_in_order)(const struct FN(tile) * all, ptrdiff_t n_columns, ptrdiff_t next, int with_u)
{
    const ptrdiff_t tile_rows = 2 * COLUMN_CHAIN, stride = all->stride, n_rows = all->n_rows;
    struct FN(pair) chains[2][COLUMNS / VN];
    struct FN(far) far = FN(far_from)(all, n_columns, next, with_u);
    struct FN(tile) tile = *all;
    memset(chains, 0, sizeof chains);
    far.chains = chains;
    tile.far = &far;
    tile.n = n_columns;
    for (ptrdiff_t r = 0; r < n_rows; r += tile_rows) {
        far.rows_left = n_rows - r;
        tile.n_rows = far.rows_left < tile_rows ? far.rows_left : tile_rows;
        if (with_u == ALL)
            FN(in_order_ALL)(&tile);
        else if (with_u == RELU)
            FN(in_order_RELU)(&tile);
        else if (with_u == RECTIFIED)
            FN(in_order_RECTIFIED)(&tile);
        else if (with_u == MARKED)
            FN(in_order_MARKED)(&tile);
        else
            FN(in_order_PASSED)(&tile);
        tile.x += tile_rows * stride;
        tile.u += tile_rows * stride;
        if (tile.packed_x) {
            tile.packed_x += tile_rows * tile.packed_stride;
            tile.packed_u += tile_rows * tile.packed_stride;
        }
        tile.element += tile_rows * stride;
    }
}

/* Elements from the first row to what is needed after some <= COLUMNS of its columns, from the first-th on. */
static ALWAYS_INLINE ptrdiff_t FN(next_of)(const bnfast_rows *rows, ptrdiff_t first, ptrdiff_t some)
{
    return first + some < rows->n_columns ? some : rows->next - first;
}

/* all: n_rows rows, n_columns <= COLUMNS, sum_v, sum_vd: (n_columns,) OUT; next: elements from the first row to what
 * is needed after these; near: as in bnfast_rows */
static ALWAYS_INLINE void FN(sums_of_columns)(const struct FN(tile) * all, ptrdiff_t n_columns, ptrdiff_t next,
                                              int with_u, int near)
{
    memset(all->sum_v, 0, (size_t)n_columns * sizeof *all->sum_v);
    memset(all->sum_vd, 0, (size_t)n_columns * sizeof *all->sum_vd);
    /* of rows that a tile fills, tiles are the order of memory, and of two arrays the hardware asks for them in time */
    const int in_cache = (near || (with_u && all->stride <= 4 * VN)) && all->packed_x == NULL;
    if (in_cache || with_u == NO_U) {
        struct FN(far) far = FN(far_from)(all, n_columns, next, with_u);
        FN(sums_of_tiles)(all, n_columns, with_u, in_cache ? NULL : &far);
    } else
        FN(sums_in_order)(all, n_columns, next, with_u);
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
static ALWAYS_INLINE void FN(sums_of_short_rows_as)(const S *x, const S *u, const bnfast_runs *runs, ptrdiff_t next,
                                                    const T *centers, struct FN(passing) passing, int with_u,
                                                    double *sum_v, double *sum_vd)
{
    const ptrdiff_t length = runs->length, n_channels = runs->n_channels, group = COLUMNS / length;
    T column_centers[COLUMNS], y_scale[COLUMNS], y_shift[COLUMNS];
    double column_v[COLUMNS], column_vd[COLUMNS];
    for (ptrdiff_t i = 0; i < n_channels; i += group) {
        const ptrdiff_t n = n_channels - i < group ? n_channels - i : group;
        const ptrdiff_t to_next = i + n < n_channels ? n * length : next - i * length;
        struct FN(passing) of_columns = FN(passing_at)(passing, i * length, 0, with_u);
        for (ptrdiff_t c = 0; c < n; c++)
            for (ptrdiff_t j = 0; j < length; j++) {
                column_centers[c * length + j] = centers[i + c];
                if (TAKES_SOME(with_u)) {
                    y_scale[c * length + j] = passing.y_scale[i + c];
                    y_shift[c * length + j] = passing.y_shift[i + c];
                }
            }
        of_columns.y_scale = y_scale;
        of_columns.y_shift = y_shift;
        const struct FN(tile) rows = {.x = x + i * length,
                                      .u = u + i * length,
                                      .n_rows = runs->n_rows,
                                      .stride = runs->stride,
                                      .centers = column_centers,
                                      .passing = &of_columns,
                                      .sum_v = column_v,
                                      .sum_vd = column_vd};
        FN(sums_of_columns)(&rows, n * length, to_next, with_u, runs->near);
        for (ptrdiff_t c = 0; c < n; c++) {
            sum_v[i + c] = FN(fold_columns)(column_v + c * length, length);
            sum_vd[i + c] = FN(fold_columns)(column_vd + c * length, length);
        }
    }
}

static NEVER_INLINE void FN(sums_of_short_rows)(const S *x, const S *u, const bnfast_runs *runs, ptrdiff_t next,
                                                const T *centers, const bnfast_passing *passing, int with_u,
                                                double *sum_v, double *sum_vd)
{
    const struct FN(passing) all = FN(passing_of)(passing);
#define SUMS(kind) FN(sums_of_short_rows_as)(x, u, runs, next, centers, all, kind, sum_v, sum_vd)
    if (with_u == NO_U)
        SUMS(NO_U);
    else if (with_u == ALL)
        SUMS(ALL);
    else if (with_u == RELU)
        SUMS(RELU);
    else if (with_u == RECTIFIED)
        SUMS(RECTIFIED);
    else if (SPECIALISES && with_u == MARKED)
        SUMS(MARKED);
    else
        SUMS(PASSED);
#undef SUMS
}

/* The sums of some channels in rows that are long enough. Shapes as for sums_of_short_rows. w: goes on meanwhile, with
 * these flags; or NULL */
static ALWAYS_INLINE void FN(sums_of_long_rows)(const S *x, const S *u, const bnfast_runs *runs, ptrdiff_t next,
                                                const T *centers, const bnfast_passing *passing, int with_u,
                                                double *sum_v, double *sum_vd, bnfast_writer *w, int flags)
{
    const struct FN(passing) all = FN(passing_of)(passing);
    const ptrdiff_t length = runs->length, stride = runs->stride, n_rows = runs->n_rows;
    const ptrdiff_t group = runs->in_order ? CHANNELS_IN_ORDER : 1, rows = runs->in_order ? 1 : n_rows;
    struct FN(row_sums) sums[CHANNELS_IN_ORDER];
    for (ptrdiff_t first = 0; first < runs->n_channels; first += group) {
        const ptrdiff_t n = runs->n_channels - first < group ? runs->n_channels - first : group;
        const ptrdiff_t to_next = first + n < runs->n_channels ? n * length : next - first * length;
        for (ptrdiff_t c = 0; c < n; c++)
            FN(begin_rows)(sums + c);
        for (ptrdiff_t r = 0; r < n_rows; r += rows)
            for (ptrdiff_t c = 0; c < n; c++) {
                const ptrdiff_t at = r * stride + (first + c) * length, i = first + c;
                FN(sums_of_rows)(sums + c, x + at, u + at, rows, stride, length,
                                 r + rows < n_rows ? rows * stride : to_next - r * stride, centers[i],
                                 FN(passing_at)(all, at, i, with_u), with_u, w, flags);
            }
        for (ptrdiff_t c = 0; c < n; c++)
            FN(end_rows)(sums + c, with_u, sum_v + first + c, sum_vd + first + c);
    }
}
