/* Vectors of one dtype: VBYTES bytes wide where the compiler has GCC's vector extension, one element otherwise.
 *
 * Included once per dtype by leaves.inc.h, after T (the dtype), FN (its names) and VBYTES are defined. VL lanes
 * are the fixed virtual width that gives the bits; a virtual vector is VU native vectors of VN lanes. Arithmetic
 * on `vec` is the language's own: + - * elementwise, rounded once each. */

#define VL ((ptrdiff_t)(64 / sizeof(T)))

#if defined(__GNUC__) && VBYTES > 8
typedef T FN(vec) __attribute__((vector_size(VBYTES)));
typedef T FN(unaligned) __attribute__((vector_size(VBYTES), aligned(sizeof(T)), may_alias));
#define VN ((ptrdiff_t)(VBYTES / sizeof(T)))
static inline FN(vec) FN(load)(const T *p) { return *(const FN(unaligned) *)p; }
static inline void FN(store)(T *p, FN(vec) v) { *(FN(unaligned) *)p = v; }
static inline FN(vec) FN(set1)(T value)
{
    FN(vec) v;
    for (ptrdiff_t i = 0; i < VN; i++)
        v[i] = value;
    return v;
}
#else
typedef T FN(vec);
#define VN ((ptrdiff_t)1)
static inline FN(vec) FN(load)(const T *p) { return *p; }
static inline void FN(store)(T *p, FN(vec) v) { *p = v; }
static inline FN(vec) FN(set1)(T value) { return value; }
#endif

#define VU (VL / VN)

/* The first n of VN elements, the other lanes from `fill`; n < 0 counts as 0, n > VN as VN. Never reads past n. */
static inline FN(vec) FN(load_part)(const T *p, ptrdiff_t n, FN(vec) fill)
{
#if VBYTES == 64
    const unsigned mask = n <= 0 ? 0u : n >= VN ? ~0u : (1u << n) - 1u;
    return FN(mask_load)(p, mask, fill);
#else
    T lanes[VN];
    if (n >= VN)
        return FN(load)(p);
    if (n <= 0)
        return fill;
    memcpy(lanes, &fill, sizeof lanes);
    for (ptrdiff_t i = 0; i < n; i++)
        lanes[i] = p[i];
    return FN(load)(lanes);
#endif
}

static inline void FN(store_part)(T *p, ptrdiff_t n, FN(vec) v)
{
#if VBYTES == 64
    const unsigned mask = n <= 0 ? 0u : n >= VN ? ~0u : (1u << n) - 1u;
    FN(mask_store)(p, mask, v);
#else
    T lanes[VN];
    FN(store)(lanes, v);
    for (ptrdiff_t i = 0; i < n && i < VN; i++)
        p[i] = lanes[i];
#endif
}

/* Elements from p to the next address a streaming store may take, at most n. */
static inline ptrdiff_t FN(to_aligned)(const T *p, ptrdiff_t n)
{
    const ptrdiff_t head = (ptrdiff_t)((-(uintptr_t)p & (VN * sizeof(T) - 1)) / sizeof(T));
    return head < n ? head : n;
}

/* wide[0..VL) += the VL lanes of one virtual vector */
static inline void FN(widen_add)(double *wide, const FN(vec) *v)
{
    T lanes[64 / sizeof(T)];
    for (ptrdiff_t u = 0; u < VU; u++)
        FN(store)(lanes + u * VN, v[u]);
    for (ptrdiff_t i = 0; i < VL; i++)
        wide[i] += (double)lanes[i];
}

/* wide[0..n) += the first n lanes of one native vector */
static inline void FN(widen_add_native)(double *wide, FN(vec) v, ptrdiff_t n)
{
    T lanes[VN];
    FN(store)(lanes, v);
    if (n == VN)
        for (ptrdiff_t i = 0; i < VN; i++)
            wide[i] += (double)lanes[i];
    else
        for (ptrdiff_t i = 0; i < n; i++)
            wide[i] += (double)lanes[i];
}

/* Sum of VL float64 lanes, halves folded onto each other. */
static inline double FN(fold_lanes)(double *wide)
{
    for (ptrdiff_t half = VL / 2; half > 0; half /= 2)
        for (ptrdiff_t i = 0; i < half; i++)
            wide[i] += wide[i + half];
    return wide[0];
}
