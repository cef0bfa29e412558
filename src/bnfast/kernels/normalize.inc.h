/* The map of bnfast_coefficients (kernels.h), for both layouts: one body, whose constant flags the compiler folds.
 *
 * The mean is subtracted before the scale, never folded into the shift: x*scale + shift loses every digit once
 * |mean| >> std. What rounding the mean to the data's dtype leaves is in the shift (round_map). Error of
 * normalize, float32: four roundings, at most 2.4e-7 * |gamma * x_hat| + 6e-8 * |y|.
 * Memory traffic: read x (and u), write out; with `stream` whole lines that are written are not read first. */

/* Rows that share a load of interleaved coefficients; fewer where they lie a multiple of 2 KiB apart, so that their
 * lines stay in L1. */
#define ROWS 4
#define FEWER_ROWS 2
#define ROWS_DISPLACE(stride) ((stride) * (ptrdiff_t)sizeof(S) % 2048 == 0)

/* From so many columns on vectors begin where the memory of `out` is aligned, and both ends are parts of vectors. */
#define MANY_COLUMNS (16 * VN)

struct FN(map) {
    FN(vec) center, scale, shift, u_center, u_scale, hat_scale, y_scale, y_shift;
    struct FN(rectifier) rectifier;
};

/* Whether the map reads u. */
#define READS_U(flags) (((flags) & (BNFAST_GRADIENT | BNFAST_ADD)) != 0)

/* Whether it needs coefficients of y besides, to find out what passes. */
#define PASSES(flags) \
    (((flags) & (BNFAST_GRADIENT | BNFAST_RECTIFY | BNFAST_MARK)) == (BNFAST_GRADIENT | BNFAST_RECTIFY))

/* Whether it makes marks, whole vectors of which begin where the memory of the result is aligned. */
#define MARKS(flags) (((flags) & BNFAST_MARK) && !((flags) & BNFAST_GRADIENT))

/* Whether it writes what passes, too. */
#define HAS_TWO_RESULTS(flags) (((flags) & (BNFAST_GRADIENT | BNFAST_MARK)) == (BNFAST_GRADIENT | BNFAST_MARK))

/* Where a map reads and writes. passed, marks, number: see bnfast_marked */
struct FN(places) {
    const S *x, *u;
    S *out, *passed;
    unsigned char *marks;
    ptrdiff_t number;
};

static ALWAYS_INLINE struct FN(places)
    FN(places_of)(const void *x, const void *u, void *out, const bnfast_marked *marked)
{
    const struct FN(places) places = {x, u, out, marked->passed, marked->marks, marked->number};
    return places;
}

/* Elements further on, in each array. */
static ALWAYS_INLINE void FN(go_on)(struct FN(places) * at, ptrdiff_t x, ptrdiff_t u, ptrdiff_t out, int flags)
{
    at->x += x;
    at->u += u;
    at->out += out;
    if (flags & BNFAST_MARK)
        at->number += out;
    if (HAS_TWO_RESULTS(flags))
        at->passed += out;
}

static ALWAYS_INLINE struct FN(places) FN(further)(struct FN(places) at, ptrdiff_t elements, int flags)
{
    FN(go_on)(&at, elements, elements, elements, flags);
    return at;
}

/* Coefficients of columns j .. j + n - 1. rectifier: theirs, made once; what c shows is read again after each store, which
 * may be anywhere */
static ALWAYS_INLINE struct FN(map)
    FN(map_of_columns)(const bnfast_coefficients *c, const struct FN(rectifier) * rectifier, ptrdiff_t j, ptrdiff_t n,
                       int flags)
{
    const FN(vec) zero = FN(set1)(0);
    struct FN(map) map = {zero, zero, zero, zero, zero, zero, zero, zero, {zero, zero, 0}};
    map.center = FN(load_up_to)((const T *)c->center + j, n, zero);
    map.scale = FN(load_up_to)((const T *)c->scale + j, n, zero);
    map.shift = FN(load_up_to)((const T *)c->shift + j, n, zero);
    if (flags & BNFAST_GRADIENT) {
        map.u_center = FN(load_up_to)((const T *)c->u_center + j, n, zero);
        map.u_scale = FN(load_up_to)((const T *)c->u_scale + j, n, zero);
        map.hat_scale = FN(load_up_to)((const T *)c->hat_scale + j, n, zero);
    }
    if (PASSES(flags)) {
        map.y_scale = FN(load_up_to)((const T *)c->y_scale + j, n, zero);
        map.y_shift = FN(load_up_to)((const T *)c->y_shift + j, n, zero);
    }
    if (flags & BNFAST_RECTIFY)
        map.rectifier = *rectifier;
    return map;
}

/* The same of the vector of columns at *column, which goes on to the next. */
static ALWAYS_INLINE struct FN(map)
    FN(map_of_next)(const bnfast_coefficients *c, const struct FN(rectifier) * rectifier, ptrdiff_t *column,
                    ptrdiff_t n_columns, int flags)
{
    const struct FN(map) map = FN(map_of_columns)(c, rectifier, *column, VN, flags);
    *column += VN;
    if (*column >= n_columns)
        *column -= n_columns;
    return map;
}

static ALWAYS_INLINE struct FN(map) FN(map_of_channel)(const bnfast_coefficients *c, ptrdiff_t i, int flags)
{
    const FN(vec) zero = FN(set1)(0);
    struct FN(map) map = {zero, zero, zero, zero, zero, zero, zero, zero, {zero, zero, 0}};
    map.center = FN(set1)(((const T *)c->center)[i]);
    map.scale = FN(set1)(((const T *)c->scale)[i]);
    map.shift = FN(set1)(((const T *)c->shift)[i]);
    if (flags & BNFAST_GRADIENT) {
        map.u_center = FN(set1)(((const T *)c->u_center)[i]);
        map.u_scale = FN(set1)(((const T *)c->u_scale)[i]);
        map.hat_scale = FN(set1)(((const T *)c->hat_scale)[i]);
    }
    if (PASSES(flags)) {
        map.y_scale = FN(set1)(((const T *)c->y_scale)[i]);
        map.y_shift = FN(set1)(((const T *)c->y_shift)[i]);
    }
    if (flags & BNFAST_RECTIFY)
        map.rectifier = FN(rectifier_of)(&c->rectifier);
    return map;
}

/* marks: of the n <= VN elements */
static ALWAYS_INLINE FN(vec) FN(map_value)(const struct FN(map) * map, FN(vec) x, FN(vec) u, unsigned char *marks,
                                           ptrdiff_t number, ptrdiff_t n, int flags)
{
    const FN(vec) d = x - map->center, scaled = d * map->scale;
    if (flags & BNFAST_GRADIENT) {
        if (flags & BNFAST_RELU)
            u = FN(passed_by_relu)(u, d * map->y_scale, map->y_shift);
        else if (PASSES(flags))
            u = FN(passed)(&map->rectifier, u, d * map->y_scale + map->y_shift);
        return (u - map->u_center) * map->u_scale + (scaled * map->hat_scale + map->shift);
    }
    FN(vec) v = scaled + map->shift;
    if (flags & BNFAST_ADD)
        v = v + u;
    if (flags & BNFAST_MARK)
        FN(mark_passed)(&map->rectifier, marks, number, n, v);
    if (flags & BNFAST_RECTIFY)
        v = FN(rectified)(&map->rectifier, v);
    return v;
}

/* Coefficients of a vector whose first k lanes belong to one channel and the others to the next. */
static ALWAYS_INLINE struct FN(map) FN(map_of_two)(ptrdiff_t k, struct FN(map) first, struct FN(map) next, int flags)
{
    struct FN(map) map = next;
    map.center = FN(select)(k, first.center, next.center);
    map.scale = FN(select)(k, first.scale, next.scale);
    map.shift = FN(select)(k, first.shift, next.shift);
    if (flags & BNFAST_GRADIENT) {
        map.u_center = FN(select)(k, first.u_center, next.u_center);
        map.u_scale = FN(select)(k, first.u_scale, next.u_scale);
        map.hat_scale = FN(select)(k, first.hat_scale, next.hat_scale);
    }
    if (PASSES(flags)) {
        map.y_scale = FN(select)(k, first.y_scale, next.y_scale);
        map.y_shift = FN(select)(k, first.y_shift, next.y_shift);
    }
    return map;
}

static ALWAYS_INLINE void FN(write_as)(S *p, ptrdiff_t n, FN(vec) v, int stream)
{
    if (n < VN)
        FN(write_part)(p, n, v);
    else if (stream)
        FN(write_stream)(p, v);
    else
        FN(write)(p, v);
}

/* n <= VN elements of `rows` rows, through one set of coefficients. All loads come before the first store: rows that
 * lie a power of two apart would otherwise wait for stores that only look like theirs (equal low address bits). A second
 * result goes around the caches only in whole lines; else through them, or where it is collected first. */
static ALWAYS_INLINE void FN(map_elements)(const struct FN(map) * map, const struct FN(places) * at, ptrdiff_t rows,
                                           ptrdiff_t stride, ptrdiff_t u_stride, ptrdiff_t out_stride, ptrdiff_t n,
                                           int flags, int stream)
{
    const FN(vec) zero = FN(set1)(0);
    FN(vec) value[ROWS], passed[ROWS];
    for (ptrdiff_t r = 0; r < rows; r++) {
        const FN(vec) x_values = FN(read_up_to)(at->x + r * stride, n, zero);
        const ptrdiff_t number = at->number + r * out_stride;
        FN(vec) u_values = zero;
        if (READS_U(flags))
            u_values = FN(read_up_to)(at->u + r * u_stride, n, zero);
        if (HAS_TWO_RESULTS(flags))
            u_values = passed[r] = FN(passed_by_marks)(&map->rectifier, u_values, at->marks, number, n);
        value[r] = FN(map_value)(map, x_values, u_values, at->marks, number, n, flags);
    }
    for (ptrdiff_t r = 0; r < rows; r++)
        FN(write_as)(at->out + r * out_stride, n, value[r], stream);
    if (HAS_TWO_RESULTS(flags))
        for (ptrdiff_t r = 0; r < rows; r++)
            FN(write_as)(at->passed + r * out_stride, n, passed[r], stream && VN == LINE);
}

/* Whether two vectors are mapped at once, where they are read or written so. */
#define MAPS_TWO(flags) (!((flags) & BNFAST_MARK))

#if SPLITS
static ALWAYS_INLINE void FN(map_two)(const struct FN(map) * map, const struct FN(places) * at, int flags, int stream)
{
    const struct FN(two) x = FN(read_two)(at->x), u = READS_U(flags) ? FN(read_two)(at->u) : x;
    struct FN(two) value;
    for (int k = 0; k < 2; k++)
        value.v[k] = FN(map_value)(map, x.v[k], u.v[k], NULL, 0, VN, flags);
    FN(write_two)(at->out, value, stream);
}
#endif

/* A second result on its way around the caches, where a vector is only part of a line of memory: parts of two lines in turn
 * reach memory as parts (1.2 to 2.5 times the time), and lines in turn hold up loads that look like theirs (up to 4 times).
 * So it is collected, and written some lines at a time; but of halves, whose time is that of their conversions, it goes
 * through the caches (0.8 to 0.95 of the time). */
#define COLLECTS(flags) (SPECIALISES && BNFAST_X86_VECTORS && HAS_TWO_RESULTS(flags) && VN < LINE)
#define COLLECTED (32 * LINE)

struct FN(collected) {
    S values[COLLECTED];
    ptrdiff_t from; /* which element of the row is the first; NONE: nothing is collected */
};
#define NONE (-1)

/* Writes what is collected. passed: where the row's j-th element belongs, which comes next */
static ALWAYS_INLINE void FN(put_away)(struct FN(collected) * c, S *passed, ptrdiff_t j)
{
    if (c->from == NONE)
        return;
    const ptrdiff_t n = j - c->from;
    ptrdiff_t i = 0;
    for (; n - i >= LINE; i += LINE)
        for (ptrdiff_t k = 0; k < LINE; k += VN)
            FN(copy_stream)(passed - n + i + k, c->values + i + k);
    memcpy(passed - n + i, c->values + i, (size_t)(n - i) * sizeof(S));
    c->from = NONE;
}

/* Where a map writes the vector that begins with the row's j-th element, and belongs `at`. */
static ALWAYS_INLINE struct FN(places) FN(collecting)(struct FN(collected) * c, struct FN(places) at, ptrdiff_t j)
{
    if (c->from != NONE && j - c->from == COLLECTED)
        FN(put_away)(c, at.passed, j);
    if (c->from == NONE && FN(to_line)(at.out, LINE) == 0)
        c->from = j;
    if (c->from != NONE)
        at.passed = c->values + (j - c->from);
    return at;
}

/* Full vectors that the writer's channel still has in this row. */
static ALWAYS_INLINE ptrdiff_t FN(vectors_left)(const bnfast_writer *w) { return (w->end - w->at) / VN; }

/* Elements to the next line of memory, where the writer goes around the caches; else 0. */
static ALWAYS_INLINE ptrdiff_t FN(left_to_line)(const bnfast_writer *w)
{
    return w->stream ? FN(to_line)((const S *)w->out + w->at, LINE) : 0;
}

static ALWAYS_INLINE int FN(written)(const bnfast_writer *w) { return w->row == w->runs.n_rows; }

/* Asks for the lines of memory with which the next row of a result begins and ends, where it does not fill them: a store that goes
 * through the caches waits for its line, and those around them behind it. row: the one before */
static ALWAYS_INLINE void FN(ask_for_ends)(const S *row, ptrdiff_t stride, ptrdiff_t length)
{
    const uintptr_t next = (uintptr_t)row + (uintptr_t)stride * sizeof(S), end = next + (uintptr_t)length * sizeof(S);
    if (next % (LINE * sizeof(S)) != 0)
        PREFETCH_L2(next, 0);
    if (end % (LINE * sizeof(S)) != 0)
        PREFETCH_L2(end, 0);
}

/* At least n elements more, or all that is left. A row is written as one run: a vector may begin in one channel and end
 * in the next, so that no line of memory is written in two parts. Of a row only whole lines go around the caches: one that
 * is written half around them and half through them costs as much as many others. Channels have at least VN elements, but
 * for one that is alone. */
static ALWAYS_INLINE void FN(write_map)(bnfast_writer *w, ptrdiff_t n, int flags, int stream)
{
    const bnfast_coefficients *c = &w->coefficients;
    const ptrdiff_t ahead = w->ahead * (ptrdiff_t)sizeof(S);
    const ptrdiff_t length = w->runs.length, stride = w->runs.stride, row_length = w->runs.n_channels * length;
    struct FN(places) at = FN(places_of)(w->x, w->u, w->out, &w->marked);
    ptrdiff_t row = w->row, i = w->channel, j = w->at, end = w->end;
    struct FN(lines) lines = FN(lines_of)(at.out, row_length);
    struct FN(collected) collected;
    collected.from = NONE;
#define IN_LINES (stream && (VN == LINE || (size_t)(j - lines.begin) < (size_t)(lines.end - lines.begin)))
#define ASK_AHEAD \
    if (stream && ahead) { \
        PREFETCH_L2(at.x + j, ahead); \
        if (READS_U(flags)) \
            PREFETCH_L2(at.u + j, ahead); \
    }
#define MAP_AT(coefficients, n, stream) \
    do { \
        struct FN(places) from_j = FN(further)(at, j, flags); \
        if (COLLECTS(flags) && (stream)) \
            from_j = FN(collecting)(&collected, from_j, j); \
        else if (COLLECTS(flags)) \
            FN(put_away)(&collected, from_j.passed, j); \
        FN(map_elements)(coefficients, &from_j, 1, 0, 0, 0, n, flags, stream); \
    } while (0)
    for (; n > 0 && row < w->runs.n_rows; row++, i = j = end = 0) {
        struct FN(map) map = FN(map_of_channel)(c, i, flags);
        if (end == 0) {
            end = length;
            const int asks = stream && row + 1 < w->runs.n_rows;
            if (asks)
                FN(ask_for_ends)(at.out, stride, row_length);
            if (asks && HAS_TWO_RESULTS(flags))
                FN(ask_for_ends)(at.passed, stride, row_length);
            if (stream || MARKS(flags)) {
                const ptrdiff_t head = FN(to_aligned)(at.out, row_length);
                if (head > 0)
                    MAP_AT(&map, head, 0);
                j = head;
                n -= j;
            }
        }
        for (;;) {
            while (n > 0 && end - j >= VN) {
                const int to_memory = IN_LINES;
                ptrdiff_t until = end;
                if (stream && VN < LINE && lines.begin < end)
                    until = j < lines.begin ? lines.begin : to_memory && lines.end < end ? lines.end : end;
#if SPLITS
                if (MAPS_TWO(flags)) {
                    if (to_memory && (uintptr_t)(at.out + j) % (2 * VN * sizeof(S)) != 0) {
                        MAP_AT(&map, VN, 1);
                        n -= VN;
                        j += VN;
                    }
                    for (; n > 0 && until - j >= 2 * VN; n -= 2 * VN, j += 2 * VN) {
                        const struct FN(places) from_j = FN(further)(at, j, flags);
                        ASK_AHEAD
                        FN(map_two)(&map, &from_j, flags, to_memory);
                    }
                }
#endif
                for (; n > 0 && until - j >= VN; n -= VN, j += VN) {
                    ASK_AHEAD
                    MAP_AT(&map, VN, to_memory);
                }
            }
            if (n <= 0)
                goto enough;
            if (end == row_length)
                break;
            const struct FN(map) next = FN(map_of_channel)(c, ++i, flags);
            if (j < end) {
                ASK_AHEAD
                const struct FN(map) both = FN(map_of_two)(end - j, map, next, flags);
                MAP_AT(&both, VN, IN_LINES);
                n -= VN;
                j += VN;
            }
            end += length;
            map = next;
        }
        if (j < row_length)
            MAP_AT(&map, row_length - j, 0);
        if (COLLECTS(flags))
            FN(put_away)(&collected, at.passed + j, j);
        n -= row_length - j;
        FN(go_on)(&at, stride, stride, stride, flags);
        lines = FN(lines_of)(at.out, row_length);
    }
enough:
    if (COLLECTS(flags))
        FN(put_away)(&collected, at.passed + j, j);
#undef IN_LINES
#undef ASK_AHEAD
#undef MAP_AT
    w->x = at.x;
    w->u = at.u;
    w->out = at.out;
    w->marked.number = at.number;
    w->marked.passed = at.passed;
    w->row = row;
    w->channel = i;
    w->at = j;
    w->end = end;
}

/* One body for each combination of flags there is; each has a name. */
#define FOR_EACH_MAP(DO) \
    DO(plain, 0) \
    DO(added, BNFAST_ADD) \
    DO(rectified, BNFAST_RECTIFY) \
    DO(added_rectified, BNFAST_ADD | BNFAST_RECTIFY) \
    DO(added_marked, BNFAST_ADD | BNFAST_RECTIFY | BNFAST_MARK) \
    DO(gradient_marked, BNFAST_GRADIENT | BNFAST_RECTIFY | BNFAST_MARK) \
    DO(gradient, BNFAST_GRADIENT) \
    DO(gradient_rectified, BNFAST_GRADIENT | BNFAST_RECTIFY) \
    DO(gradient_relu, BNFAST_GRADIENT | BNFAST_RECTIFY | BNFAST_RELU)

static void FN(write_some)(bnfast_writer *w, ptrdiff_t n)
{
    switch (w->map) {
#define WRITE(name, flags) \
    case flags: \
        if (!SPECIALISES) \
            FN(write_map)(w, n, flags, w->stream); \
        else if (w->stream) \
            FN(write_map)(w, n, flags, 1); \
        else \
            FN(write_map)(w, n, flags, 0); \
        break;
        FOR_EACH_MAP(WRITE)
#undef WRITE
    }
}

static void FN(write_rest)(bnfast_writer *w) { FN(write_some)(w, PTRDIFF_MAX); }

/* `rows` rows of interleaved columns at once, whose coefficients are loaded once for all of them. */
static ALWAYS_INLINE void FN(map_rows)(struct FN(places) at, const S *next_x, const S *next_u, ptrdiff_t rows,
                                       const bnfast_columns *columns, const bnfast_coefficients *c, int flags,
                                       int stream)
{
    const struct FN(rectifier) rectifier = FN(rectifier_of)(&c->rectifier);
    const ptrdiff_t n_columns = columns->n_columns, out_stride = columns->out_stride;
    struct FN(collected) collected;
    collected.from = NONE;
    ptrdiff_t j = 0;
#define ELEMENTS(n, stream) \
    do { \
        const struct FN(map) map = FN(map_of_columns)(c, &rectifier, j, n, flags); \
        const struct FN(places) its = COLLECTS(flags) && (stream) ? FN(collecting)(&collected, at, j) : at; \
        FN(map_elements)(&map, &its, rows, columns->stride, columns->u_stride, out_stride, n, flags, stream); \
        FN(go_on)(&at, n, n, n, flags); \
        j += (n); \
    } while (0)
    if (stream) {
        const ptrdiff_t head = FN(to_aligned)(at.out, n_columns);
        if (head > 0)
            ELEMENTS(head, 0);
        for (ptrdiff_t vectors = (n_columns - j) / VN; vectors > 0; vectors--) {
            if (next_x)
                for (ptrdiff_t r = 0; r < rows; r++) {
                    PREFETCH_L2(next_x + r * out_stride + j, 0);
                    if (next_u)
                        PREFETCH_L2(next_u + r * out_stride + j, 0);
                }
            else if (n_columns < columns->stride) {
                /* a part of wide rows is not the one stream that the hardware expects */
                PREFETCH_L2(at.x, 2 * columns->stride * (ptrdiff_t)sizeof(S));
                if (READS_U(flags))
                    PREFETCH_L2(at.u, 2 * columns->u_stride * (ptrdiff_t)sizeof(S));
            }
            ELEMENTS(VN, 1);
        }
        if (COLLECTS(flags))
            FN(put_away)(&collected, at.passed, j);
    } else {
        const int aligns = MARKS(flags) || (out_stride % VN == 0 && n_columns >= MANY_COLUMNS);
        const ptrdiff_t head = aligns ? FN(to_aligned)(at.out, n_columns) : 0;
        if (head > 0)
            ELEMENTS(head, 0);
        for (ptrdiff_t vectors = (n_columns - j) / VN; vectors > 0; vectors--)
            ELEMENTS(VN, 0);
    }
    if (j < n_columns)
        ELEMENTS(n_columns - j, 0);
#undef ELEMENTS
}

/* n elements of dense interleaved rows, written as one run: vectors begin where the memory is aligned, at whatever
 * column that is, and may go on in the next row, for which the coefficients repeat themselves past their end. */
static ALWAYS_INLINE void FN(map_run)(struct FN(places) at, ptrdiff_t n, ptrdiff_t n_columns,
                                      const bnfast_coefficients *c, int flags, int stream)
{
    const struct FN(rectifier) rectifier = FN(rectifier_of)(&c->rectifier);
    const ptrdiff_t head = FN(to_aligned)(at.out, n);
    ptrdiff_t j = head, column = head; /* column: j modulo n_columns */
    struct FN(map) map = FN(map_of_columns)(c, &rectifier, 0, head, flags);
    if (head > 0)
        FN(map_elements)(&map, &at, 1, 0, 0, 0, head, flags, 0);
    FN(go_on)(&at, head, head, head, flags);
    struct FN(collected) collected;
    collected.from = NONE;
#define MAP_NEXT_VECTOR \
    do { \
        const struct FN(places) its = COLLECTS(flags) && stream ? FN(collecting)(&collected, at, j) : at; \
        map = FN(map_of_next)(c, &rectifier, &column, n_columns, flags); \
        FN(map_elements)(&map, &its, 1, 0, 0, 0, VN, flags, stream); \
        FN(go_on)(&at, VN, VN, VN, flags); \
        j += VN; \
    } while (0)
#if JOINS
    if (MAPS_TWO(flags)) {
        if (j + VN <= n && (uintptr_t)at.out % (2 * VN * sizeof(S)) != 0)
            MAP_NEXT_VECTOR;
        for (; j + 2 * VN <= n; j += 2 * VN, FN(go_on)(&at, 2 * VN, 2 * VN, 2 * VN, flags)) {
            FN(vec) value[2];
            for (int k = 0; k < 2; k++) {
                map = FN(map_of_next)(c, &rectifier, &column, n_columns, flags);
                const FN(vec) x = FN(read)(at.x + k * VN), u = READS_U(flags) ? FN(read)(at.u + k * VN) : x;
                value[k] = FN(map_value)(&map, x, u, NULL, 0, VN, flags);
            }
            FN(write_joined)(at.out, value[0], value[1], stream);
        }
    }
#endif
    while (j + VN <= n)
        MAP_NEXT_VECTOR;
#undef MAP_NEXT_VECTOR
    if (COLLECTS(flags))
        FN(put_away)(&collected, at.passed, j);
    if (j < n) {
        map = FN(map_of_columns)(c, &rectifier, column, n - j, flags);
        FN(map_elements)(&map, &at, 1, 0, 0, 0, n - j, flags, 0);
    }
}

/* The same for rows of whole vectors: as rows that begin where the memory is aligned, some of which share the loads
 * of coefficients. */
static ALWAYS_INLINE void FN(map_shifted_rows)(struct FN(places) at, const bnfast_columns *columns,
                                               const bnfast_coefficients *c, int flags)
{
    const struct FN(rectifier) rectifier = FN(rectifier_of)(&c->rectifier);
    const ptrdiff_t n_columns = columns->n_columns;
    ptrdiff_t n_rows = columns->n_rows;
    const ptrdiff_t head = FN(to_aligned)(at.out, n_columns);
    if (head > 0) {
        const struct FN(map) map = FN(map_of_columns)(c, &rectifier, 0, head, flags);
        FN(map_elements)(&map, &at, 1, 0, 0, 0, head, flags, 0);
        FN(go_on)(&at, head, head, head, flags);
        n_rows--; /* of the last row the part behind `head` is left */
    }
#define SHIFTED_ROWS(rows, width) \
    do { \
        for (ptrdiff_t j = 0; j + VN <= (width); j += VN) { \
            const struct FN(map) map = FN(map_of_columns)(c, &rectifier, head + j, VN, flags); \
            const struct FN(places) from_j = FN(further)(at, j, flags); \
            FN(map_elements)(&map, &from_j, rows, n_columns, n_columns, n_columns, VN, flags, 0); \
        } \
        at = FN(further)(at, (rows) * n_columns, flags); \
    } while (0)
    ptrdiff_t r = 0;
    if (!columns->row_by_row && !ROWS_DISPLACE(n_columns))
        for (; r + ROWS <= n_rows; r += ROWS)
            SHIFTED_ROWS(ROWS, n_columns);
    if (!columns->row_by_row)
        for (; r + FEWER_ROWS <= n_rows; r += FEWER_ROWS)
            SHIFTED_ROWS(FEWER_ROWS, n_columns);
    for (; r < n_rows; r++)
        SHIFTED_ROWS(1, n_columns);
    if (head > 0) {
        const ptrdiff_t left = n_columns - head, whole = left / VN * VN;
        for (ptrdiff_t j = 0; j < left; j += VN) {
            const ptrdiff_t n = j < whole ? VN : left - j;
            const struct FN(map) map = FN(map_of_columns)(c, &rectifier, head + j, n, flags);
            FN(map_elements)(&map, &at, 1, 0, 0, 0, n, flags, 0);
            FN(go_on)(&at, n, n, n, flags);
        }
    }
#undef SHIFTED_ROWS
}

static ALWAYS_INLINE void FN(map_columns)(struct FN(places) at, const bnfast_columns *columns,
                                          const bnfast_coefficients *c, int flags, int stream)
{
    const ptrdiff_t n_rows = columns->n_rows, stride = columns->stride, out_stride = columns->out_stride;
    const S *next_x = columns->next_x, *next_u = columns->next_u;
    ptrdiff_t r = 0;
    const int dense = stride == columns->n_columns && out_stride == stride && stride >= VN &&
                      (!READS_U(flags) || columns->u_stride == stride);
    if (dense && !stream && stride % VN == 0) {
        FN(map_shifted_rows)(at, columns, c, flags);
        return;
    }
    /* rows that end in parts of vectors; where those are cheap, rows by themselves are faster in cache */
    if (dense && (!SPECIALISES || stream || VBYTES < 64 || MARKS(flags))) {
        if (!SPECIALISES)
            FN(map_run)(at, n_rows * stride, stride, c, flags, stream);
        else if (stream)
            FN(map_run)(at, n_rows * stride, stride, c, flags, 1);
        else
            FN(map_run)(at, n_rows * stride, stride, c, flags, 0);
        return;
    }
#define DO_ROWS(rows) \
    do { \
        FN(map_rows)(at, next_x, next_u, rows, columns, c, flags, stream); \
        FN(go_on)(&at, (rows) * stride, (rows) * columns->u_stride, (rows) * out_stride, flags); \
        if (next_x) \
            next_x += (rows) * out_stride; \
        if (next_u) \
            next_u += (rows) * out_stride; \
        r += (rows); \
    } while (0)
    /* What comes from cache waits for instructions, but where loads are cheap; what comes from memory, or a last level that is
     * far, is best read as one stream. */
    const int together = !(dense && columns->row_by_row) && (!MARKS(flags) || out_stride % VN == 0);
    if (SPECIALISES && !stream && together) {
        if (!ROWS_DISPLACE(stride))
            while (r + ROWS <= n_rows)
                DO_ROWS(ROWS);
        while (r + FEWER_ROWS <= n_rows)
            DO_ROWS(FEWER_ROWS);
    }
    while (r < n_rows)
        DO_ROWS(1);
#undef DO_ROWS
}

/* A function for each: in one that held all bodies the compiler ran out of registers for pointers. */
#define MAPS(name, flags) \
    static NEVER_INLINE void FN(map_##name##_to_cache)(struct FN(places) at, const bnfast_columns *columns, \
                                                       const bnfast_coefficients *c) \
    { \
        FN(map_columns)(at, columns, c, flags, 0); \
    } \
    static NEVER_INLINE void FN(map_##name##_to_memory)(struct FN(places) at, const bnfast_columns *columns, \
                                                        const bnfast_coefficients *c) \
    { \
        FN(map_columns)(at, columns, c, flags, 1); \
    }
FOR_EACH_MAP(MAPS)
#undef MAPS

static void FN(map_interleaved)(const void *x, const void *u, void *out, const bnfast_marked *marked,
                                const bnfast_columns *columns, const bnfast_coefficients *c, int map, int stream)
{
    const struct FN(places) at = FN(places_of)(x, u, out, marked);
    switch (map) {
#define MAP(name, flags) \
    case flags: \
        if (stream) \
            FN(map_##name##_to_memory)(at, columns, c); \
        else \
            FN(map_##name##_to_cache)(at, columns, c); \
        break;
        FOR_EACH_MAP(MAP)
#undef MAP
    }
}
