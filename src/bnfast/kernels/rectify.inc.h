/* Activations of the rectifier family (bnfast_rectifier, kernels.h), and their derivatives times a gradient.
 *
 * One body for all of them, as what differs are two constants; and a shorter one for ReLU, which most are: in cache the
 * choices that it does not need were up to a third of the time, with AVX2 half. */

struct FN(rectifier) {
    FN(vec) slope, top;
    int is_relu; /* no slope, no top */
};

static ALWAYS_INLINE struct FN(rectifier) FN(rectifier_of)(const bnfast_rectifier *of)
{
    const struct FN(rectifier) rectifier = {FN(set1)((T)of->slope), FN(set1)((T)of->top), bnfast_is_relu(of)};
    return rectifier;
}

/* slope * v, and +0 for a slope of 0, whatever v is. */
static ALWAYS_INLINE FN(vec) FN(below)(const struct FN(rectifier) * of, FN(vec) v)
{
    return FN(zero_if_at_most)(of->slope, FN(set1)(0), of->slope * v);
}

static ALWAYS_INLINE FN(vec) FN(rectified)(const struct FN(rectifier) * of, FN(vec) v)
{
    const FN(vec) zero = FN(set1)(0);
    if (of->is_relu)
        return FN(zero_if_at_most)(v, zero, v);
    return FN(if_at_most)(v, zero, FN(below)(of, v), FN(if_at_most)(of->top, v, of->top, v));
}

/* u times the derivative at v: where there is a top, slope is 0 */
static ALWAYS_INLINE FN(vec) FN(passed)(const struct FN(rectifier) * of, FN(vec) u, FN(vec) v)
{
    const FN(vec) zero = FN(set1)(0);
    if (of->is_relu)
        return FN(zero_if_at_most)(v, zero, u);
    return FN(if_outside)(v, zero, of->top, FN(below)(of, u), u);
}

/* The same of ReLU at v = scaled + shift. A rounded sum has the sign of the exact one, so a comparison is enough. (Where the
 * caller has subnormal results flushed, sums that would be have none; here they pass, if they are above 0.) */
static ALWAYS_INLINE FN(vec) FN(passed_by_relu)(FN(vec) u, FN(vec) scaled, FN(vec) shift)
{
    return FN(zero_if_at_most)(scaled, -shift, u);
}

/* Marks of what passes at v, and u by such marks, to the same bits. */
static ALWAYS_INLINE void FN(mark_passed)(const struct FN(rectifier) * of, unsigned char *marks, ptrdiff_t number,
                                          ptrdiff_t n, FN(vec) v)
{
    FN(mark_inside)(marks, number, n, v, FN(set1)(0), of->top);
}
static ALWAYS_INLINE FN(vec) FN(passed_by_marks)(const struct FN(rectifier) * of, FN(vec) u, const unsigned char *marks,
                                                 ptrdiff_t number, ptrdiff_t n)
{
    return FN(if_marked)(marks, number, n, u, of->is_relu ? FN(set1)(0) : FN(below)(of, u));
}
