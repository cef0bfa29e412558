/* Numbers times a power of two and back, by their bits: an instruction with a subnormal takes some CPUs as long as a
 * hundred others, so the maps get numbers that are not, and what they give is made smaller here. Times 2**LIFT a
 * subnormal is an ordinary number. */

#ifdef HALF

#define LIFT 0 /* what has been rounded to a half cannot be rounded again */

#else

#define LIFT (NARROW ? 96 : 800)
#define MANTISSA (NARROW ? 23 : 52)
#define EXPONENTS (NARROW ? (TI)255 : (TI)2047)
/* In a lifted number's bits: of the least normal one. */
#define LEAST_LIFTED ((TI)(LIFT + 1) << MANTISSA)

#if defined(__GNUC__) && VBYTES > 8
typedef TI FN(bits) __attribute__((vector_size(VBYTES)));
static ALWAYS_INLINE FN(bits) FN(bits_of)(FN(vec) v) { return (FN(bits))v; }
static ALWAYS_INLINE FN(vec) FN(of_bits)(FN(bits) bits) { return (FN(vec))bits; }
static ALWAYS_INLINE FN(bits) FN(all_bits)(TI value) { return value - (FN(bits)){0}; }
#else
typedef TI FN(bits);
static ALWAYS_INLINE FN(bits) FN(bits_of)(FN(vec) v)
{
    FN(bits) bits;
    memcpy(&bits, &v, sizeof bits);
    return bits;
}
static ALWAYS_INLINE FN(vec) FN(of_bits)(FN(bits) bits)
{
    FN(vec) v;
    memcpy(&v, &bits, sizeof v);
    return v;
}
static ALWAYS_INLINE FN(bits) FN(all_bits)(TI value) { return value; }
#endif

static ALWAYS_INLINE FN(bits) FN(chosen)(FN(bits) which, FN(bits) yes, FN(bits) no)
{
    return (which & yes) | (~which & no);
}

/* All ones where a < b; both are above 0. */
static ALWAYS_INLINE FN(bits) FN(is_less)(FN(bits) a, FN(bits) b)
{
    const FN(bits) difference = a - b;
    return difference >> (int)(8 * sizeof(T) - 1); /* its sign */
}

/* Without the sign. */
static ALWAYS_INLINE FN(bits) FN(size_of)(FN(bits) bits)
{
    return bits & FN(all_bits)((TI)((EXPONENTS << MANTISSA) | (((TI)1 << MANTISSA) - 1)));
}

/* Largest exponents: of what is lifted (below 1), and of what is lowered. */
#define MOST_TO_LIFT ((TI)(EXPONENTS >> 1) << MANTISSA)
#define MOST_LIFTED ((TI)(EXPONENTS - 1) << MANTISSA)

/* v * 2**-LIFT, rounded to nearest even. Added to the least number that stays normal, a smaller one is rounded to multiples of
 * the least subnormal, which the sum's bits count; what is larger, added to itself, keeps all its digits, and its exponent
 * comes out the same way. What is beyond MOST_LIFTED, NaN and infinity stay, and are noted in `beyond`. */
static ALWAYS_INLINE FN(vec) FN(lowered)(FN(vec) v, FN(bits) * beyond)
{
    const FN(vec) least = FN(of_bits)(FN(all_bits)(LEAST_LIFTED));
    const FN(bits) bits = FN(bits_of)(v), size = FN(size_of)(bits);
    const FN(vec) a = FN(of_bits)(size);
    const FN(bits) small = FN(is_less)(size, FN(all_bits)(LEAST_LIFTED));
    const FN(vec) sum = a + FN(of_bits)(FN(chosen)(small, FN(bits_of)(least), size));
    const FN(bits) lower = FN(bits_of)(sum) - FN(all_bits)(LEAST_LIFTED);
    const FN(bits) fits = FN(is_less)(size, FN(all_bits)(MOST_LIFTED));
    *beyond |= ~fits;
    return FN(of_bits)(FN(chosen)(fits, lower | (bits ^ size), bits));
}

static int FN(any_bit)(FN(bits) bits)
{
    T lanes[VN];
    TI any = 0, lane;
    FN(store)(lanes, FN(of_bits)(bits));
    for (ptrdiff_t i = 0; i < VN; i++) {
        memcpy(&lane, &lanes[i], sizeof lane);
        any |= lane;
    }
    return any != 0;
}

/* n_rows rows, `stride` apart, of n_columns elements, where `which`, (n_columns,), is not NULL only of those columns where
 * all its bits are ones. Returns whether something is left as it was, being too large. */
static int FN(lower)(void *data, ptrdiff_t n_rows, ptrdiff_t stride, ptrdiff_t n_columns, const void *which)
{
    const FN(vec) zero = FN(set1)(0);
    FN(bits) beyond = FN(all_bits)(0);
    for (ptrdiff_t r = 0; r < n_rows; r++) {
        T *const row = (T *)data + r * stride;
        for (ptrdiff_t j = 0, n; j < n_columns; j += n) {
            n = n_columns - j < VN ? n_columns - j : VN;
            const FN(vec) v = FN(load_up_to)(row + j, n, zero);
            FN(vec) result = FN(lowered)(v, &beyond);
            if (which) {
                const FN(bits) these = FN(bits_of)(FN(load_up_to)((const T *)which + j, n, zero));
                result = FN(of_bits)(FN(chosen)(these, FN(bits_of)(result), FN(bits_of)(v)));
            }
            if (n == VN)
                FN(store)(row + j, result);
            else
                FN(store_part)(row + j, n, result);
        }
    }
    return FN(any_bit)(beyond);
}

/* out = x * 2**LIFT. Returns whether something is too large for that, or not finite; out is of no use then. */
static int FN(lift)(ptrdiff_t n, const void *data, void *result)
{
    const T *x = data;
    T *out = result;
    const FN(vec) zero = FN(set1)(0), unit = FN(of_bits)(FN(all_bits)(LEAST_LIFTED));
    FN(bits) beyond = FN(all_bits)(0);
    for (ptrdiff_t i = 0, step; i < n; i += step) {
        step = n - i < VN ? n - i : VN;
        const FN(bits) bits = FN(bits_of)(FN(load_up_to)(x + i, step, zero)), size = FN(size_of)(bits);
        const FN(bits) fits = FN(is_less)(size, FN(all_bits)(MOST_TO_LIFT));
        const FN(bits) subnormal = FN(is_less)(size, FN(all_bits)((TI)1 << MANTISSA));
        /* of a subnormal: its count of the least */
        const FN(vec) counted = FN(of_bits)((size & subnormal) + FN(all_bits)(LEAST_LIFTED)) - unit;
        const FN(bits) ordinary = (size & fits) + FN(all_bits)((TI)LIFT << MANTISSA);
        const FN(vec) value = FN(of_bits)(FN(chosen)(subnormal, FN(bits_of)(counted), ordinary) | (bits ^ size));
        beyond |= ~fits;
        if (step == VN)
            FN(store)(out + i, value);
        else
            FN(store_part)(out + i, step, value);
    }
    return FN(any_bit)(beyond);
}

#undef MOST_TO_LIFT
#undef MOST_LIFTED
#undef MANTISSA
#undef EXPONENTS
#undef LEAST_LIFTED

#endif
