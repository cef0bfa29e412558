/* Vectors of float16 and bfloat16 in memory: H, VN of them, as the vectors of float32 that they stand for. Included once by
 * isa.inc.h, after float32's own vectors. An instruction set's file may bring what plain C cannot say: with ISA_HAS_HALVES
 * loads and stores of H and words of H, with ISA_HAS_F16 the conversions of float16 as well, with ISA_ROUNDS_BF16 the
 * rounding to bfloat16, with ISA_HAS_LESSER the lesser and the greater of two vectors; with ISA_SPLITS_BF16 and
 * ISA_JOINS_HALVES two vectors at once (elements.h). */

#define F32(name) PASTE(name, _f32_, ISA_SUFFIX)

typedef union {
    float value;
    uint32_t bits;
} float_or_bits;

static ALWAYS_INLINE uint32_t bits_of_one(float value) { return ((float_or_bits){.value = value}).bits; }
static ALWAYS_INLINE float one_of_bits(uint32_t bits) { return ((float_or_bits){.bits = bits}).value; }

#define W uint32_t
#define F float
#define BITS bits_of_one
#define FLOATS one_of_bits
#define LESS(a, b) (0u - (uint32_t)((a) < (b)))
#define LESSER(f, g) ((f) < (g) ? (f) : (g))
#define GREATER(f, g) ((f) > (g) ? (f) : (g))
#define UNORDERED(f) (0u - (uint32_t)((f) != (f)))
#define ANY(w) ((w) != 0)
#define ALL(number) (number)
#define UPPER(w) ((uint32_t)((int32_t)(w) >> 16))
#define HALF(name) name##_one
#include "half.inc.h"

enum { HALVES = VBYTES > 8 ? VBYTES / 4 : 1 };

#if VBYTES > 8
typedef uint32_t words __attribute__((vector_size(VBYTES)));
typedef int32_t signed_words __attribute__((vector_size(VBYTES)));
#if !ISA_HAS_HALVES
/* masks of lanes: whether any is set */
static ALWAYS_INLINE int any_word(words w)
{
    uint32_t any = 0;
    for (int i = 0; i < HALVES; i++)
        any |= w[i];
    return any != 0;
}
#endif
#define W words
#define F F32(vec)
#define BITS(f) ((words)(f))
#define FLOATS(w) ((F32(vec))(w))
#define LESS(a, b) ((words)((signed_words)(a) < (signed_words)(b)))
#if ISA_HAS_LESSER
#define LESSER lesser
#define GREATER greater
#else
#define LESSER(f, g) F32(if_at_most)(f, g, f, g)
#define GREATER(f, g) F32(if_at_most)(f, g, g, f)
#endif
#define UNORDERED(f) ((words)((f) != (f)))
#define ANY(w) any_word(w)
#define ALL(number) ((number) - (words){0})
#define UPPER(w) ((words)((signed_words)(w) >> 16))
#define HALF(name) name##_words
#include "half.inc.h"
#else
typedef uint32_t words;
#define widen_f16_words widen_f16_one
#define round_f16_words round_f16_one
#define widen_bf16_words widen_bf16_one
#define round_bf16_words round_bf16_one
#endif

#if !ISA_HAS_HALVES

#if VBYTES > 8
typedef uint16_t H __attribute__((vector_size(VBYTES / 2)));
static ALWAYS_INLINE words words_of(H halves) { return __builtin_convertvector(halves, words); }
static ALWAYS_INLINE H halves_of(words w) { return __builtin_convertvector(w, H); }
#else
typedef uint16_t H;
static ALWAYS_INLINE words words_of(H halves) { return halves; }
static ALWAYS_INLINE H halves_of(words w) { return (H)w; }
#endif

static ALWAYS_INLINE H load_halves(const uint16_t *p)
{
    H halves;
    memcpy(&halves, p, sizeof halves);
    return halves;
}
static ALWAYS_INLINE void store_halves(uint16_t *p, H halves) { memcpy(p, &halves, sizeof halves); }
#define stream_halves store_halves

/* The first n of HALVES, and zeros; 0 <= n < HALVES */
static ALWAYS_INLINE H load_part_halves(const uint16_t *p, ptrdiff_t n)
{
    uint16_t part[HALVES] = {0};
    for (ptrdiff_t i = 0; i < n; i++)
        part[i] = p[i];
    return load_halves(part);
}
static ALWAYS_INLINE void store_part_halves(uint16_t *p, ptrdiff_t n, H halves)
{
    uint16_t part[HALVES];
    store_halves(part, halves);
    for (ptrdiff_t i = 0; i < n; i++)
        p[i] = part[i];
}

#endif

#if !ISA_HAS_F16
static ALWAYS_INLINE F32(vec) widen_f16(H halves) { return widen_f16_words(words_of(halves)); }
static ALWAYS_INLINE H round_f16(F32(vec) v) { return halves_of(round_f16_words(v)); }
#endif
static ALWAYS_INLINE F32(vec) widen_bf16(H halves) { return widen_bf16_words(words_of(halves)); }
#if !ISA_ROUNDS_BF16
static ALWAYS_INLINE H round_bf16(F32(vec) v) { return halves_of(round_bf16_words(v)); }
#endif
