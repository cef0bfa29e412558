/* Marks: what an activation passes, kept from a forward for its backward, so that the residual need not be kept.
 *
 * One bit an element where a vector has eight lanes or more, else one byte: four bits of a byte, two vectors of two threads
 * perhaps, would have to wait for each other. Element e of the data is number `first + e`, `first` being chosen so that
 * vectors that begin where the memory of the result is aligned begin with a whole byte. Ends of rows, parts of vectors,
 * may share their bytes with others, and add their own bits to what is 0 at first. */

#define MARKS_PER_BYTE (VN >= 8 && ISA_HAS_BITS ? 8 : 1)

#if ISA_HAS_BITS

#ifdef HALF
static ALWAYS_INLINE unsigned FN(inside)(FN(vec) a, FN(vec) low, FN(vec) high) { return F32(inside)(a, low, high); }
static ALWAYS_INLINE FN(vec) FN(if_bits)(unsigned bits, FN(vec) yes, FN(vec) no) { return F32(if_bits)(bits, yes, no); }
#endif

/* n < VN bits from `number` on, within a vector's whole bytes, which are 0 before: one operation, as each waits until all
 * stores before it are done. */
static inline void FN(add_bits)(unsigned char *marks, ptrdiff_t number, ptrdiff_t n, unsigned bits)
{
    bits = (bits & ((1u << n) - 1u)) << number % VN;
    if (VN == 16)
        __atomic_fetch_or((uint16_t *)(void *)marks + number / VN, (uint16_t)bits, __ATOMIC_RELAXED);
    else
        __atomic_fetch_or(marks + number / 8, (unsigned char)bits, __ATOMIC_RELAXED);
}

#endif

/* Marks n <= VN elements from `number` on: where a <= low or high <= a, they do not pass. If n is VN, `number` is a
 * multiple of it. */
static ALWAYS_INLINE void FN(mark_inside)(unsigned char *marks, ptrdiff_t number, ptrdiff_t n, FN(vec) a, FN(vec) low,
                                          FN(vec) high)
{
#if ISA_HAS_BITS
    if (MARKS_PER_BYTE == 8) {
        const unsigned bits = FN(inside)(a, low, high);
        if (n < VN)
            FN(add_bits)(marks, number, n, bits);
        else if (VN == 16) {
            const uint16_t both = (uint16_t)bits;
            memcpy(marks + (size_t)number / 8, &both, sizeof both);
        } else
            marks[(size_t)number / 8] = (unsigned char)bits;
        return;
    }
#endif
#if defined(__GNUC__) && VBYTES > 8
    typedef TI lanes __attribute__((vector_size(VBYTES)));
    typedef signed char bytes __attribute__((vector_size(VBYTES / sizeof(T))));
    const lanes inside = ~((a <= low) | (high <= a));
    const bytes all = __builtin_convertvector(inside, bytes);
    memcpy(marks + number, &all, (size_t)FN(within)(n));
#else
    if (n > 0)
        marks[number] = !((a <= low) | (high <= a));
#endif
}

/* In each of n <= VN lanes, from any `number` on: marked ? yes : no; in the others either. */
static ALWAYS_INLINE FN(vec)
    FN(if_marked)(const unsigned char *marks, ptrdiff_t number, ptrdiff_t n, FN(vec) yes, FN(vec) no)
{
#if ISA_HAS_BITS
    if (MARKS_PER_BYTE == 8) {
        uint32_t bits; /* there are MARKS_PAD bytes behind the last */
        memcpy(&bits, marks + (size_t)number / 8, sizeof bits);
        return FN(if_bits)(bits >> (size_t)number % 8, yes, no);
    }
#endif
#if defined(__GNUC__) && VBYTES > 8
    typedef TI lanes __attribute__((vector_size(VBYTES)));
    typedef signed char bytes __attribute__((vector_size(VBYTES / sizeof(T))));
    bytes all = {0};
    memcpy(&all, marks + number, (size_t)FN(within)(n));
    const lanes chosen = __builtin_convertvector(all, lanes);
    return (FN(vec))((chosen & (lanes)yes) | (~chosen & (lanes)no));
#else
    return n > 0 && marks[number] ? yes : no;
#endif
}
