/* Elements of the data, as they lie in memory (S) and as they are computed with (T): read, and written, a vector, the
 * first n of one, two at once, or one by one. Included once per dtype by leaves.inc.h, after vec.h.
 *
 * float32 and float64 are computed with as they are. float16 and bfloat16 (HALF) are widened to float32 when read and
 * rounded when written, and but for two vectors at once that is all they differ in. */

/* Elements of a line of memory. */
#define LINE ((ptrdiff_t)(64 / sizeof(S)))

#ifdef HALF

static inline T FN(value)(S element) { return PASTE(widen_, HALF, _one)(element); }
static ALWAYS_INLINE FN(vec) FN(read)(const S *p) { return PASTE(widen_, HALF, )(load_halves(p)); }
static ALWAYS_INLINE FN(vec) FN(read_part)(const S *p, ptrdiff_t n, FN(vec) fill)
{
    if (n >= VN)
        return FN(read)(p);
    return FN(select)(n, PASTE(widen_, HALF, )(load_part_halves(p, n < 0 ? 0 : n)), fill);
}
static ALWAYS_INLINE void FN(write)(S *p, FN(vec) v) { store_halves(p, PASTE(round_, HALF, )(v)); }
static ALWAYS_INLINE void FN(write_stream)(S *p, FN(vec) v) { stream_halves(p, PASTE(round_, HALF, )(v)); }
static ALWAYS_INLINE void FN(copy_stream)(S *p, const S *from) { stream_halves(p, load_halves(from)); }
static ALWAYS_INLINE void FN(write_part)(S *p, ptrdiff_t n, FN(vec) v)
{
    if (n >= VN)
        FN(write)(p, v);
    else if (n > 0)
        store_part_halves(p, n, PASTE(round_, HALF, )(v));
}

#else

static inline T FN(value)(S element) { return element; }
static ALWAYS_INLINE FN(vec) FN(read)(const S *p) { return FN(load)(p); }
static ALWAYS_INLINE FN(vec) FN(read_part)(const S *p, ptrdiff_t n, FN(vec) fill) { return FN(load_part)(p, n, fill); }
static ALWAYS_INLINE void FN(write)(S *p, FN(vec) v) { FN(store)(p, v); }
static ALWAYS_INLINE void FN(write_part)(S *p, ptrdiff_t n, FN(vec) v) { FN(store_part)(p, n, v); }
static ALWAYS_INLINE void FN(write_stream)(S *p, FN(vec) v) { FN(store_stream)(p, v); }
static ALWAYS_INLINE void FN(copy_stream)(S *p, const S *from) { FN(store_stream)(p, FN(load)(from)); }

#endif

/* 2 * VN elements at once. Where they are split (SPLITS), the first vector has every other one of them, from the first on, and
 * the second those between; else one has those before the other's. */
struct FN(two) {
    FN(vec) v[2];
};

static ALWAYS_INLINE struct FN(two) FN(read_two)(const S *p)
{
#if SPLITS
    struct FN(two) two;
    PASTE(read_split_, HALF, )(p, &two.v[0], &two.v[1]);
#else
    const struct FN(two) two = {{FN(read)(p), FN(read)(p + VN)}};
#endif
    return two;
}

/* Where two vectors are written around the caches p is aligned to both. */
#if SPLITS
static ALWAYS_INLINE void FN(write_two)(S *p, struct FN(two) two, int stream)
{
    PASTE(write_split_, HALF, )(p, two.v[0], two.v[1], stream);
}

/* The first n > 0 of them, the other lanes from `fill`. */
static ALWAYS_INLINE struct FN(two) FN(read_two_part)(const S *p, ptrdiff_t n, FN(vec) fill)
{
    if (n >= 2 * VN)
        return FN(read_two)(p);
    struct FN(two) two;
    PASTE(read_split_part_, HALF, )(p, n, &two.v[0], &two.v[1]);
    two.v[0] = FN(select)((n + 1) / 2, two.v[0], fill);
    two.v[1] = FN(select)(n / 2, two.v[1], fill);
    return two;
}
#endif

#if JOINS
/* One after the other. */
static ALWAYS_INLINE void FN(write_joined)(S *p, FN(vec) first, FN(vec) second, int stream)
{
    PASTE(write_joined_, HALF, )(p, first, second, stream);
}
#endif

/* The first n of VN elements; where the compiler sees n = VN without a part. */
static ALWAYS_INLINE FN(vec) FN(read_up_to)(const S *p, ptrdiff_t n, FN(vec) fill)
{
    if (n == VN)
        return FN(read)(p);
    return FN(read_part)(p, n, fill);
}

static ALWAYS_INLINE void FN(write_up_to)(S *p, ptrdiff_t n, FN(vec) v)
{
    if (n == VN)
        FN(write)(p, v);
    else
        FN(write_part)(p, n, v);
}

/* Elements from p to the next address a streaming store may take, at most n. */
static inline ptrdiff_t FN(to_aligned)(const S *p, ptrdiff_t n)
{
    const ptrdiff_t head = (ptrdiff_t)((-(uintptr_t)p & (VN * sizeof(S) - 1)) / sizeof(S));
    return head < n ? head : n;
}

/* Elements from p to the next line of memory, at most n. */
static inline ptrdiff_t FN(to_line)(const S *p, ptrdiff_t n)
{
    const ptrdiff_t head = (ptrdiff_t)((-(uintptr_t)p & 63) / sizeof(S));
    return head < n ? head : n;
}

/* The whole lines of memory among n elements from p on: elements `begin` to before `end`. */
struct FN(lines) {
    ptrdiff_t begin, end;
};

static inline struct FN(lines) FN(lines_of)(const S *p, ptrdiff_t n)
{
    const ptrdiff_t begin = FN(to_line)(p, n);
    return (struct FN(lines)){begin, begin + (n - begin) / LINE * LINE};
}

static void FN(widen_values)(ptrdiff_t n, const void *data, void *out)
{
    const S *x = data;
    T *values = out;
    for (ptrdiff_t i = 0; i < n; i += VN)
        FN(store_part)(values + i, n - i, FN(read_part)(x + i, n - i, FN(set1)(0)));
}

/* n elements, `step` apart, as they are computed with: where they lie, if they do so beside each other and are no halves;
 * else in `copy`. */
static ALWAYS_INLINE const T *FN(values)(const S *x, ptrdiff_t step, ptrdiff_t n, T *copy)
{
    if (step != 1) {
        for (ptrdiff_t i = 0; i < n; i++)
            copy[i] = FN(value)(x[i * step]);
        return copy;
    }
#ifdef HALF
    FN(widen_values)(n, x, copy);
    return copy;
#else
    return x;
#endif
}
