/* float16 and bfloat16 to float32 and back, in integers: the same bits on every CPU, whatever it is told about subnormals
 * (FTZ, DAZ). One body for one element and for vectors of them; halves are the lower 16 bits of a word, the upper ones of a
 * rounded one its sign. Included with
 *   W, F         uint32_t and float, or vectors of them; BITS(f), FLOATS(w): the one as the other
 *   LESS(a, b)   all bits of a word where a < b, both below 2^31; UNORDERED(f): where f is NaN; ANY(w): whether any bit is set
 *   LESSER(f, g), GREATER(f, g)   of two numbers, neither NaN nor subnormal
 *   ALL(number)  W of equal words; UPPER(w): the upper 16 bits of each, and its sign
 *   HALF(x)      names
 * which end here.
 *
 * To float32 they are exact. From float32: to nearest, ties to even; beyond the largest, infinity; NaN a quiet NaN with the
 * sign and the leading bits of what it carries, as the instructions of F16C give it. What ordinary data never have is done
 * by a function of its own. */

#define CHOOSE(mask, yes, no) (((mask) & (yes)) | (~(mask) & (no)))

/* Exponents of float16 are 112 less. Zeros and subnormals have an exponent that is one too small, and one before the point
 * that is too much: twice the number less 2^-14, which of larger ones is no less than the number. */
static ALWAYS_INLINE W HALF(widen_finite_f16)(W half)
{
    const W size = (half & 0x7fffu) << 13, sign = (half & 0x8000u) << 16;
    const F number = FLOATS(size + (112u << 23)), subnormal = number + number - FLOATS(ALL(113u << 23));
    return sign | BITS(LESSER(subnormal, number));
}

static NEVER_INLINE F HALF(widen_any_f16)(W half)
{
    const W bits = (half & 0x7fffu) << 13, finite = HALF(widen_finite_f16)(half);
    const W special = ((half & 0x8000u) << 16) | bits | (255u << 23) | (LESS(ALL(31u << 23), bits) & (1u << 22));
    return FLOATS(CHOOSE(LESS(bits, ALL(31u << 23)), finite, special));
}

static ALWAYS_INLINE F HALF(widen_f16)(W half)
{
    if (ANY(LESS(ALL(0x7bffu), half & 0x7fffu)))
        return HALF(widen_any_f16)(half);
    return FLOATS(HALF(widen_finite_f16)(half));
}

/* Added to the power of two whose last place is that of the half, a number is rounded there; `first`: the power of two
 * it is not less than, or that of the smallest normal half. */
static ALWAYS_INLINE W HALF(round_finite_f16)(F value)
{
    const W bits = BITS(value), size = bits & 0x7fffffffu, power = bits & 0x7f800000u;
    const W first = BITS(GREATER(FLOATS(power), FLOATS(ALL(113u << 23)))), above = first + (13u << 23);
    const F sum = FLOATS(size) + FLOATS(above);
    return (UPPER(bits) & 0xffff8000u) | ((BITS(sum) - above) + (first >> 13) - (113u << 10));
}

static NEVER_INLINE W HALF(round_any_f16)(F value)
{
    const W bits = BITS(value), size = bits & 0x7fffffffu, finite = HALF(round_finite_f16)(value);
    const W nan = UNORDERED(value) & (0x200u | ((size >> 13) & 0x3ffu));
    return CHOOSE(LESS(size, ALL(143u << 23)), finite, (UPPER(bits) & 0xffff8000u) | 0x7c00u | nan);
}

static ALWAYS_INLINE W HALF(round_f16)(F value)
{
    if (ANY(LESS(ALL((143u << 23) - 1), BITS(value) & 0x7fffffffu)))
        return HALF(round_any_f16)(value);
    return HALF(round_finite_f16)(value);
}

static ALWAYS_INLINE F HALF(widen_bf16)(W half) { return FLOATS(half << 16); }

static ALWAYS_INLINE W HALF(round_numbers_bf16)(F value)
{
    const W bits = BITS(value);
    return UPPER(bits + 0x7fffu + ((bits >> 16) & 1u));
}

static NEVER_INLINE W HALF(round_any_bf16)(F value)
{
    const W quiet = UPPER(BITS(value) | (1u << 22));
    return CHOOSE(UNORDERED(value), quiet, HALF(round_numbers_bf16)(value));
}

static ALWAYS_INLINE W HALF(round_bf16)(F value)
{
    if (ANY(UNORDERED(value)))
        return HALF(round_any_bf16)(value);
    return HALF(round_numbers_bf16)(value);
}

#undef CHOOSE
#undef W
#undef F
#undef BITS
#undef FLOATS
#undef LESS
#undef LESSER
#undef GREATER
#undef UNORDERED
#undef ANY
#undef ALL
#undef UPPER
#undef HALF
