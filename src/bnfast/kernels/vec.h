/* Vectors of one dtype: VBYTES bytes wide where the compiler has GCC's vector extension, one element otherwise.
 *
 * Included once per dtype by leaves.inc.h, after T (the dtype), FN (its names) and VBYTES are defined. VL lanes
 * are the fixed virtual width that gives the bits; a virtual vector is VU native vectors of VN lanes. Arithmetic
 * on `vec` is the language's own: + - * elementwise, rounded once each. Sums end in float64: a `vec` widens to
 * WIDE_PER_VEC vectors `wide` of WN float64 lanes each. An instruction set's file may bring its own load_part,
 * store_part and widen (ISA_HAS_PARTS); the loops here say what they do. */

#define VL ((ptrdiff_t)(64 / sizeof(T)))

#if defined(__GNUC__) && VBYTES > 8
typedef T FN(vec) __attribute__((vector_size(VBYTES)));
typedef T FN(unaligned) __attribute__((vector_size(VBYTES), aligned(sizeof(T)), may_alias));
typedef double FN(wide) __attribute__((vector_size(VBYTES)));
typedef double FN(unaligned_wide) __attribute__((vector_size(VBYTES), aligned(8), may_alias));
#define VN ((ptrdiff_t)(VBYTES / sizeof(T)))
#define WN ((ptrdiff_t)(VBYTES / sizeof(double)))
static inline FN(vec) FN(set1)(T value) { return value - (FN(vec)){0}; } /* one broadcast; keeps the sign of zero */

/* The first k lanes of a, the others of b. */
static ALWAYS_INLINE FN(vec) FN(select)(ptrdiff_t k, FN(vec) a, FN(vec) b)
{
    typedef TI lanes __attribute__((vector_size(VBYTES)));
    static const TI number[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    lanes index;
    memcpy(&index, number, sizeof index);
    const lanes from_a = index < (TI)k;
    return (FN(vec))((from_a & (lanes)a) | (~from_a & (lanes)b));
}

#ifdef HALF
static ALWAYS_INLINE FN(vec) FN(if_at_most)(FN(vec) a, FN(vec) b, FN(vec) yes, FN(vec) no)
{
    return F32(if_at_most)(a, b, yes, no);
}
static ALWAYS_INLINE FN(vec) FN(zero_if_at_most)(FN(vec) a, FN(vec) b, FN(vec) no)
{
    return F32(zero_if_at_most)(a, b, no);
}
static ALWAYS_INLINE FN(vec) FN(if_outside)(FN(vec) a, FN(vec) low, FN(vec) high, FN(vec) yes, FN(vec) no)
{
    return F32(if_outside)(a, low, high, yes, no);
}
#elif !ISA_HAS_CHOICE
/* In each lane: a <= b ? yes : no; a NaN is not <= anything. */
static ALWAYS_INLINE FN(vec) FN(if_at_most)(FN(vec) a, FN(vec) b, FN(vec) yes, FN(vec) no)
{
    typedef TI lanes __attribute__((vector_size(VBYTES)));
    const lanes chosen = a <= b;
    return (FN(vec))((chosen & (lanes)yes) | (~chosen & (lanes)no));
}

/* a <= b ? 0 : no */
static ALWAYS_INLINE FN(vec) FN(zero_if_at_most)(FN(vec) a, FN(vec) b, FN(vec) no)
{
    typedef TI lanes __attribute__((vector_size(VBYTES)));
    return (FN(vec))(~(lanes)(a <= b) & (lanes)no);
}

/* a <= low or high <= a ? yes : no */
static ALWAYS_INLINE FN(vec) FN(if_outside)(FN(vec) a, FN(vec) low, FN(vec) high, FN(vec) yes, FN(vec) no)
{
    typedef TI lanes __attribute__((vector_size(VBYTES)));
    const lanes chosen = (a <= low) | (high <= a);
    return (FN(vec))((chosen & (lanes)yes) | (~chosen & (lanes)no));
}
#endif
#else
typedef T FN(vec), FN(unaligned);
typedef double FN(wide), FN(unaligned_wide);
#define VN ((ptrdiff_t)1)
#define WN ((ptrdiff_t)1)
static inline FN(vec) FN(set1)(T value) { return value; }
static inline FN(vec) FN(select)(ptrdiff_t k, FN(vec) a, FN(vec) b) { return k > 0 ? a : b; }
static inline FN(vec) FN(if_at_most)(FN(vec) a, FN(vec) b, FN(vec) yes, FN(vec) no) { return a <= b ? yes : no; }
static inline FN(vec) FN(zero_if_at_most)(FN(vec) a, FN(vec) b, FN(vec) no) { return a <= b ? 0 : no; }
static inline FN(vec) FN(if_outside)(FN(vec) a, FN(vec) low, FN(vec) high, FN(vec) yes, FN(vec) no)
{
    return (a <= low) | (high <= a) ? yes : no;
}
#endif

#define VU (VL / VN)
#define WIDE_PER_VEC (VN / WN)

/* n as the count of a vector's elements. */
static ALWAYS_INLINE ptrdiff_t FN(within)(ptrdiff_t n) { return n < 0 ? 0 : n < VN ? n : VN; }

static inline FN(vec) FN(load)(const T *p) { return *(const FN(unaligned) *)p; }
static inline void FN(store)(T *p, FN(vec) v) { *(FN(unaligned) *)p = v; }
static inline FN(wide) FN(load_wide)(const double *p) { return *(const FN(unaligned_wide) *)p; }
static inline void FN(store_wide)(double *p, FN(wide) v) { *(FN(unaligned_wide) *)p = v; }

#ifdef HALF

/* What is computed with is float32. */
static inline FN(vec) FN(load_part)(const T *p, ptrdiff_t n, FN(vec) fill) { return F32(load_part)(p, n, fill); }
static inline void FN(store_part)(T *p, ptrdiff_t n, FN(vec) v) { F32(store_part)(p, n, v); }
static inline FN(wide) FN(widen)(FN(vec) v, int k) { return F32(widen)(v, k); }

#elif !ISA_HAS_PARTS

/* The first n of VN elements, the other lanes from `fill`; n < 0 counts as 0, n > VN as VN. Never reads past n. */
static inline FN(vec) FN(load_part)(const T *p, ptrdiff_t n, FN(vec) fill)
{
    T lanes[VN];
    FN(store)(lanes, fill);
    for (ptrdiff_t i = 0; i < n && i < VN; i++)
        lanes[i] = p[i];
    return FN(load)(lanes);
}

/* The first n of VN lanes. Never writes past n. */
static inline void FN(store_part)(T *p, ptrdiff_t n, FN(vec) v)
{
    T lanes[VN];
    FN(store)(lanes, v);
    for (ptrdiff_t i = 0; i < n && i < VN; i++)
        p[i] = lanes[i];
}

/* The k-th WN lanes of v in float64. */
static inline FN(wide) FN(widen)(FN(vec) v, int k)
{
    T lanes[VN];
    double wide[WN];
    FN(store)(lanes, v);
    for (ptrdiff_t i = 0; i < WN; i++)
        wide[i] = (double)lanes[k * WN + i];
    return FN(load_wide)(wide);
}

#endif

/* The same, where the compiler sees n = VN a plain load. */
static ALWAYS_INLINE FN(vec) FN(load_up_to)(const T *p, ptrdiff_t n, FN(vec) fill)
{
    if (n == VN)
        return FN(load)(p);
    return FN(load_part)(p, n, fill);
}

/* wide: (WIDE_PER_VEC,), the lanes of one vector in float64, plus those of v */
static ALWAYS_INLINE void FN(widen_add)(FN(wide) * wide, FN(vec) v)
{
    for (int k = 0; k < WIDE_PER_VEC; k++)
        wide[k] += FN(widen)(v, k);
}

/* values[0..n) += the first n <= VN lanes of one native vector */
static ALWAYS_INLINE void FN(widen_add_columns)(double *values, FN(vec) v, ptrdiff_t n)
{
    if (n == VN)
        for (int k = 0; k < WIDE_PER_VEC; k++)
            FN(store_wide)(values + k * WN, FN(load_wide)(values + k * WN) + FN(widen)(v, k));
    else {
        T lanes[VN];
        FN(store)(lanes, v);
        for (ptrdiff_t i = 0; i < n; i++)
            values[i] += (double)lanes[i];
    }
}

/* Sum of VL float64 lanes, halves folded onto each other. */
static inline double FN(fold_lanes)(double *lanes)
{
    for (ptrdiff_t half = VL / 2; half > 0; half /= 2)
        for (ptrdiff_t i = 0; i < half; i++)
            lanes[i] += lanes[i + half];
    return lanes[0];
}

static inline double FN(fold_wide)(FN(wide) * wide)
{
    double lanes[WN];
    for (ptrdiff_t half = VU * WIDE_PER_VEC / 2; half > 0; half /= 2)
        for (ptrdiff_t i = 0; i < half; i++)
            wide[i] += wide[i + half];
    FN(store_wide)(lanes, wide[0]);
    for (ptrdiff_t half = WN / 2; half > 0; half /= 2)
        for (ptrdiff_t i = 0; i < half; i++)
            lanes[i] += lanes[i + half];
    return lanes[0];
}
