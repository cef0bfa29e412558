/* The two maps of bnfast_coefficients (kernels.h), normalize and gradient, for both layouts: one body, whose
 * constant flags the compiler folds.
 *
 * The mean is subtracted before the scale, never folded into the shift: x*scale + shift loses every digit once
 * |mean| >> std. What rounding the mean to the data's dtype leaves is in the shift (round_centers). Error of
 * normalize, float32: four roundings, at most 2.4e-7 * |gamma * x_hat| + 6e-8 * |y|.
 * Memory traffic: read x (and u), write out; with `stream` the written lines are not read first. */

/* Rows that share a load of interleaved coefficients. */
#define ROWS 4

struct FN(map) {
    FN(vec) center, scale, shift, u_center, u_scale, hat_scale;
};

/* Coefficients of columns j .. j + n - 1 */
static ALWAYS_INLINE struct FN(map) FN(map_of_columns)(const bnfast_coefficients *c, ptrdiff_t j, ptrdiff_t n, int gradient)
{
    const FN(vec) zero = FN(set1)(0);
    struct FN(map) map = {zero, zero, zero, zero, zero, zero};
    map.center = FN(load_up_to)((const T *)c->center + j, n, zero);
    map.scale = FN(load_up_to)((const T *)c->scale + j, n, zero);
    map.shift = FN(load_up_to)((const T *)c->shift + j, n, zero);
    if (gradient) {
        map.u_center = FN(load_up_to)((const T *)c->u_center + j, n, zero);
        map.u_scale = FN(load_up_to)((const T *)c->u_scale + j, n, zero);
        map.hat_scale = FN(load_up_to)((const T *)c->hat_scale + j, n, zero);
    }
    return map;
}

static ALWAYS_INLINE struct FN(map) FN(map_of_channel)(const bnfast_coefficients *c, int gradient)
{
    const FN(vec) zero = FN(set1)(0);
    struct FN(map) map = {zero, zero, zero, zero, zero, zero};
    map.center = FN(set1)(*(const T *)c->center);
    map.scale = FN(set1)(*(const T *)c->scale);
    map.shift = FN(set1)(*(const T *)c->shift);
    if (gradient) {
        map.u_center = FN(set1)(*(const T *)c->u_center);
        map.u_scale = FN(set1)(*(const T *)c->u_scale);
        map.hat_scale = FN(set1)(*(const T *)c->hat_scale);
    }
    return map;
}

static ALWAYS_INLINE FN(vec) FN(map_value)(const struct FN(map) * map, FN(vec) x, FN(vec) u, int gradient)
{
    const FN(vec) scaled = (x - map->center) * map->scale;
    if (gradient)
        return (u - map->u_center) * map->u_scale + (scaled * map->hat_scale + map->shift);
    return scaled + map->shift;
}

/* n <= VN elements of `rows` rows, through one set of coefficients. All loads come before the first store: rows that
 * lie a power of two apart would otherwise wait for stores that only look like theirs (equal low address bits). */
static ALWAYS_INLINE void FN(map_elements)(const struct FN(map) * map, const T *x, const T *u, T *out, ptrdiff_t rows,
                                           ptrdiff_t stride, ptrdiff_t n, int gradient, int stream)
{
    const FN(vec) zero = FN(set1)(0);
    FN(vec) value[ROWS];
    for (ptrdiff_t r = 0; r < rows; r++) {
        const FN(vec) x_values = FN(load_up_to)(x + r * stride, n, zero);
        FN(vec) u_values = zero;
        if (gradient)
            u_values = FN(load_up_to)(u + r * stride, n, zero);
        value[r] = FN(map_value)(map, x_values, u_values, gradient);
    }
    for (ptrdiff_t r = 0; r < rows; r++)
        if (n < VN)
            FN(store_part)(out + r * stride, n, value[r]);
        else if (stream)
            FN(store_stream)(out + r * stride, value[r]);
        else
            FN(store)(out + r * stride, value[r]);
}

/* `rows` rows at once: interleaved coefficients are loaded once for all of them; planar: map has the channel's. */
static ALWAYS_INLINE void FN(map_rows)(const T *x, const T *u, T *out, ptrdiff_t rows, ptrdiff_t stride,
                                       ptrdiff_t length, const bnfast_coefficients *c, struct FN(map) map,
                                       int gradient, int interleaved, int stream)
{
    ptrdiff_t j = 0;
#define ELEMENTS(n, stream)                                                                                            \
    do {                                                                                                               \
        if (interleaved)                                                                                               \
            map = FN(map_of_columns)(c, j, n, gradient);                                                               \
        FN(map_elements)(&map, x + j, u + j, out + j, rows, stride, n, gradient, stream);                              \
        j += (n);                                                                                                      \
    } while (0)
    if (stream) {
        const ptrdiff_t head = FN(to_aligned)(out, length);
        if (head > 0)
            ELEMENTS(head, 0);
        while (j + VN <= length)
            ELEMENTS(VN, 1);
    }
    else
        while (j + VN <= length)
            ELEMENTS(VN, 0);
    if (j < length)
        ELEMENTS(length - j, 0);
#undef ELEMENTS
}

/* n elements of dense interleaved rows, streamed as one run: vectors begin where the memory is aligned, at whatever
 * column that is, and may go on in the next row, for which the coefficients repeat themselves past their end. */
static ALWAYS_INLINE void FN(map_run)(const T *x, const T *u, T *out, ptrdiff_t n, ptrdiff_t n_columns,
                                      const bnfast_coefficients *c, int gradient)
{
    const ptrdiff_t head = FN(to_aligned)(out, n), group = ROWS * n_columns;
    ptrdiff_t j = head, column = head; /* column: j modulo n_columns */
    struct FN(map) map = FN(map_of_columns)(c, 0, head, gradient);
    if (head > 0)
        FN(map_elements)(&map, x, u, out, 1, 0, head, gradient, 0);
    if (n_columns % VN == 0)
        for (; j + group <= n; j += group)
            for (ptrdiff_t i = 0; i < n_columns; i += VN) {
                map = FN(map_of_columns)(c, head + i, VN, gradient);
                FN(map_elements)(&map, x + j + i, u + j + i, out + j + i, ROWS, n_columns, VN, gradient, 1);
            }
    for (; j + VN <= n; j += VN) {
        map = FN(map_of_columns)(c, column, VN, gradient);
        FN(map_elements)(&map, x + j, u + j, out + j, 1, 0, VN, gradient, 1);
        column += VN;
        if (column >= n_columns)
            column -= n_columns;
    }
    if (j < n) {
        map = FN(map_of_columns)(c, column, n - j, gradient);
        FN(map_elements)(&map, x + j, u + j, out + j, 1, 0, n - j, gradient, 0);
    }
}

static ALWAYS_INLINE void FN(map_all)(const T *x, const T *u, T *out, ptrdiff_t n_rows, ptrdiff_t stride,
                                      ptrdiff_t length, const bnfast_coefficients *c, int gradient, int interleaved,
                                      int stream)
{
    const struct FN(map) map = FN(map_of_channel)(c, gradient);
    ptrdiff_t r = 0;
    if (interleaved && stream && stride == length && length >= VN) {
        FN(map_run)(x, u, out, n_rows * length, length, c, gradient);
        return;
    }
    /* rows in groups only if all of a group are aligned alike, should alignment matter */
    if (interleaved && (!stream || stride % VN == 0)) {
        for (; r + ROWS <= n_rows; r += ROWS, x += ROWS * stride, u += ROWS * stride, out += ROWS * stride)
            if (stream)
                FN(map_rows)(x, u, out, ROWS, stride, length, c, map, gradient, interleaved, 1);
            else
                FN(map_rows)(x, u, out, ROWS, stride, length, c, map, gradient, interleaved, 0);
    }
    for (; r < n_rows; r++, x += stride, u += stride, out += stride)
        if (stream)
            FN(map_rows)(x, u, out, 1, stride, length, c, map, gradient, interleaved, 1);
        else
            FN(map_rows)(x, u, out, 1, stride, length, c, map, gradient, interleaved, 0);
}

static void FN(normalize_planar)(const void *x, void *out, ptrdiff_t n_rows, ptrdiff_t stride, ptrdiff_t length,
                                 const bnfast_coefficients *c, int stream)
{
    FN(map_all)(x, x, out, n_rows, stride, length, c, 0, 0, stream);
}

static void FN(normalize_interleaved)(const void *x, void *out, ptrdiff_t n_rows, ptrdiff_t stride, ptrdiff_t n_columns,
                                      const bnfast_coefficients *c, int stream)
{
    FN(map_all)(x, x, out, n_rows, stride, n_columns, c, 0, 1, stream);
}

static void FN(gradient_planar)(const void *x, const void *u, void *out, ptrdiff_t n_rows, ptrdiff_t stride,
                                ptrdiff_t length, const bnfast_coefficients *c, int stream)
{
    FN(map_all)(x, u, out, n_rows, stride, length, c, 1, 0, stream);
}

static void FN(gradient_interleaved)(const void *x, const void *u, void *out, ptrdiff_t n_rows, ptrdiff_t stride,
                                     ptrdiff_t n_columns, const bnfast_coefficients *c, int stream)
{
    FN(map_all)(x, u, out, n_rows, stride, n_columns, c, 1, 1, stream);
}

static void FN(round_centers)(ptrdiff_t n, const double *restrict center, const double *restrict slope,
                              double *restrict shift, void *center_out)
{
    T *restrict c = center_out;
    for (ptrdiff_t i = 0; i < n; i++) {
        c[i] = (T)center[i];
        shift[i] -= (center[i] - (double)c[i]) * slope[i];
    }
}

static void FN(round_values)(ptrdiff_t n, const double *values, void *out)
{
    for (ptrdiff_t i = 0; i < n; i++)
        ((T *)out)[i] = (T)values[i];
}

static void FN(typical_values)(ptrdiff_t n, ptrdiff_t step, const void *x, const ptrdiff_t *offsets, void *out)
{
    for (ptrdiff_t c = 0; c < n; c++) {
        T sorted[BNFAST_SAMPLES];
        for (int i = 0; i < BNFAST_SAMPLES; i++) {
            const T value = ((const T *)x)[c * step + offsets[i]];
            int j = i;
            for (; j > 0 && sorted[j - 1] > value; j--)
                sorted[j] = sorted[j - 1];
            sorted[j] = value;
        }
        const T middle = sorted[BNFAST_SAMPLES / 2];
        ((T *)out)[c] = middle - middle == 0 ? middle : 0;
    }
}
