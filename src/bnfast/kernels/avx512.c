/* AVX-512 (F, BW and VL, as of Skylake-X and Zen 4): 64-byte vectors, and masks for the ends of rows. */

#include "target.h"

#if BNFAST_X86_VECTORS

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl")
#endif

#define ISA "avx512"
#define ISA_SUFFIX avx512
#define VBYTES 64

static inline void store_stream_f32_avx512(float *p, __m512 v) { _mm512_stream_ps(p, v); }
static inline void store_stream_f64_avx512(double *p, __m512d v) { _mm512_stream_pd(p, v); }

/* Parts of vectors through masks (see vec.h). */
#define ISA_HAS_PARTS 1

static inline unsigned lanes_mask(ptrdiff_t n) { return n <= 0 ? 0u : n >= 16 ? 0xffffu : (1u << n) - 1u; }

static inline __m512 load_part_f32_avx512(const float *p, ptrdiff_t n, __m512 fill)
{
    return _mm512_mask_loadu_ps(fill, (__mmask16)lanes_mask(n), p);
}
static inline __m512d load_part_f64_avx512(const double *p, ptrdiff_t n, __m512d fill)
{
    return _mm512_mask_loadu_pd(fill, (__mmask8)lanes_mask(n), p);
}
/* A part that lies in one line of memory is stored from where the line begins: a store that reaches into the next one has that
 * brought into cache, even if its mask lets nothing be written there, and stores around the caches then wait for it (maps of 28x28
 * took 1.2 times as long forward, 1.35 backward, where they begin in the middle of a line). p: aligned to its elements */
static inline void store_part_f32_avx512(float *p, ptrdiff_t n, __m512 v)
{
    const uintptr_t before = (uintptr_t)p % 64;
    const unsigned lanes = lanes_mask(n), of_line = lanes << before / sizeof *p;
    if (of_line > 0xffff)
        _mm512_mask_storeu_ps(p, (__mmask16)lanes, v);
    else
        _mm512_mask_storeu_ps((void *)((uintptr_t)p - before), (__mmask16)of_line,
                              _mm512_maskz_expand_ps((__mmask16)of_line, v));
}
static inline void store_part_f64_avx512(double *p, ptrdiff_t n, __m512d v)
{
    const uintptr_t before = (uintptr_t)p % 64;
    const unsigned lanes = lanes_mask(n), of_line = lanes << before / sizeof *p;
    if (of_line > 0xff)
        _mm512_mask_storeu_pd(p, (__mmask8)lanes, v);
    else
        _mm512_mask_storeu_pd((void *)((uintptr_t)p - before), (__mmask8)of_line,
                              _mm512_maskz_expand_pd((__mmask8)of_line, v));
}
static inline __m512d widen_f32_avx512(__m512 v, int k)
{
    const __m256 half =
        k == 0 ? _mm512_castps512_ps256(v) : _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1));
    return _mm512_cvtps_pd(half);
}
static inline __m512d widen_f64_avx512(__m512d v, int k) { return (void)k, v; }

/* In each lane: a <= b ? yes : no; a <= b ? 0 : no; a <= low or high <= a ? yes : no (see vec.h). Zeros come with a load
 * of `no` for nothing. */
#define ISA_HAS_CHOICE 1
#define ISA_HAS_BITS 1

static inline __m512 if_at_most_f32_avx512(__m512 a, __m512 b, __m512 yes, __m512 no)
{
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LE_OQ), no, yes);
}
static inline __m512 zero_if_at_most_f32_avx512(__m512 a, __m512 b, __m512 no)
{
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_NLE_UQ), no);
}
static inline __m512 if_outside_f32_avx512(__m512 a, __m512 low, __m512 high, __m512 yes, __m512 no)
{
    const __mmask16 inside = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(a, low, _CMP_NLE_UQ), high, a, _CMP_NLE_UQ);
    return _mm512_mask_blend_ps(inside, yes, no);
}
static inline __m512d if_at_most_f64_avx512(__m512d a, __m512d b, __m512d yes, __m512d no)
{
    return _mm512_mask_blend_pd(_mm512_cmp_pd_mask(a, b, _CMP_LE_OQ), no, yes);
}
static inline __m512d zero_if_at_most_f64_avx512(__m512d a, __m512d b, __m512d no)
{
    return _mm512_maskz_mov_pd(_mm512_cmp_pd_mask(a, b, _CMP_NLE_UQ), no);
}
static inline __m512d if_outside_f64_avx512(__m512d a, __m512d low, __m512d high, __m512d yes, __m512d no)
{
    const __mmask8 inside = _mm512_mask_cmp_pd_mask(_mm512_cmp_pd_mask(a, low, _CMP_NLE_UQ), high, a, _CMP_NLE_UQ);
    return _mm512_mask_blend_pd(inside, yes, no);
}

/* Whether low < a < high or a is NaN, a bit a lane; and in each lane: its bit ? yes : no (see marks.inc.h). */
static inline unsigned inside_f32_avx512(__m512 a, __m512 low, __m512 high)
{
    return _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask(a, low, _CMP_NLE_UQ), high, a, _CMP_NLE_UQ);
}
static inline __m512 if_bits_f32_avx512(unsigned bits, __m512 yes, __m512 no)
{
    return _mm512_mask_blend_ps((__mmask16)bits, no, yes);
}
static inline unsigned inside_f64_avx512(__m512d a, __m512d low, __m512d high)
{
    return _mm512_mask_cmp_pd_mask(_mm512_cmp_pd_mask(a, low, _CMP_NLE_UQ), high, a, _CMP_NLE_UQ);
}
static inline __m512d if_bits_f64_avx512(unsigned bits, __m512d yes, __m512d no)
{
    return _mm512_mask_blend_pd((__mmask8)bits, no, yes);
}

/* 1 / sqrt(variance + eps) of eight channels, to the bits of a root and a division, in a third of their time: from an estimate
 * of 14 bits by Newton's steps for g = sqrt(v) and h = 1 / (2 sqrt(v)), whose last, on an exact remainder, is rounded rightly
 * (Markstein 1990, "Computation of elementary functions on the IBM RISC System/6000 processor"; the arguments that come
 * nearest to the middle of two numbers are in the tests). That holds where numbers are rounded to nearest. */
#define ISA_HAS_INVERSE_ROOT 1
#define INVERSE_ROOTS 8

static inline int rounds_to_nearest(void) { return (_mm_getcsr() & _MM_ROUND_MASK) == _MM_ROUND_NEAREST; }

static inline void inverse_root(const double *variance, double eps, double *inv_std)
{
    const __m512d v = _mm512_add_pd(_mm512_loadu_pd(variance), _mm512_set1_pd(eps));
    const __m512d half = _mm512_set1_pd(0.5), one = _mm512_set1_pd(1.0);
    const __mmask8 within = _mm512_mask_cmp_pd_mask(_mm512_cmp_pd_mask(v, _mm512_set1_pd(0x1p-500), _CMP_GE_OQ), v,
                                                    _mm512_set1_pd(0x1p500), _CMP_LE_OQ);
    if (within != 0xff) { /* zero, a NaN, or so far from 1 that a step might leave the range */
        _mm512_storeu_pd(inv_std, _mm512_div_pd(one, _mm512_sqrt_pd(v)));
        return;
    }
    const __m512d estimate = _mm512_rsqrt14_pd(v);
    __m512d g = _mm512_mul_pd(v, estimate), h = _mm512_mul_pd(half, estimate);
    for (int i = 0; i < 2; i++) {
        const __m512d rest = _mm512_fnmadd_pd(g, h, half);
        g = _mm512_fmadd_pd(g, rest, g);
        h = _mm512_fmadd_pd(h, rest, h);
    }
    const __m512d root = _mm512_fmadd_pd(_mm512_fnmadd_pd(g, g, v), h, g);
    __m512d inverse = _mm512_add_pd(h, h);
    for (int i = 0; i < 2; i++)
        inverse = _mm512_fmadd_pd(inverse, _mm512_fnmadd_pd(root, inverse, one), inverse);
    /* of a root whose bits are all ones the inverse would be halfway between two numbers, and is the one above */
    const __m512i digits = _mm512_set1_epi64(0xfffffffffffff), last = _mm512_set1_epi64(1);
    const __mmask8 ones = _mm512_cmpeq_epi64_mask(_mm512_and_si512(_mm512_castpd_si512(root), digits), digits);
    const __m512i bits = _mm512_castpd_si512(inverse);
    _mm512_storeu_si512(inv_std, _mm512_mask_or_epi64(bits, ones, bits, last));
}

/* Halves (see halves.h). */
#define ISA_HAS_HALVES 1
#define ISA_HAS_F16 1
#define ISA_ROUNDS_BF16 1

typedef __m256i H;
static inline H load_halves(const uint16_t *p) { return _mm256_loadu_si256((const __m256i *)(const void *)p); }
static inline void store_halves(uint16_t *p, H halves) { _mm256_storeu_si256((__m256i *)(void *)p, halves); }
static inline void stream_halves(uint16_t *p, H halves) { _mm256_stream_si256((__m256i *)(void *)p, halves); }
static inline H load_part_halves(const uint16_t *p, ptrdiff_t n)
{
    return _mm256_maskz_loadu_epi16((__mmask16)lanes_mask(n), p);
}
static inline void store_part_halves(uint16_t *p, ptrdiff_t n, H halves)
{
    _mm256_mask_storeu_epi16(p, (__mmask16)lanes_mask(n), halves);
}
typedef uint32_t words_avx512 __attribute__((vector_size(64)));
static inline int any_word(words_avx512 w) { return _mm512_test_epi32_mask((__m512i)w, (__m512i)w) != 0; }
static inline words_avx512 words_of(H halves) { return (words_avx512)_mm512_cvtepu16_epi32(halves); }
static inline __m512 widen_f16(H halves) { return _mm512_cvtph_ps(halves); }
static inline H round_f16(__m512 v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
/* The upper halves of the words are the numbers that they round to. */
static inline __m512i rounded_upper_bf16(__m512 v)
{
    const __m512i bits = _mm512_castps_si512(v), even = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
    const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(1 << 16));
    return _mm512_mask_add_epi32(even, odd, bits, _mm512_set1_epi32(0x8000));
}
static inline __m512i quiet_bf16(__m512 v, __m512i number)
{
    return _mm512_mask_or_epi32(number, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_castps_si512(v),
                                _mm512_set1_epi32(1 << 22));
}
/* Of the words of one vector and of the next. */
static const uint16_t upper_halves[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                          33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
static inline H round_bf16(__m512 v)
{
    __m512i number = rounded_upper_bf16(v);
    if (__builtin_expect(_mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), 0))
        number = quiet_bf16(v, number);
    return _mm512_castsi512_si256(_mm512_permutexvar_epi16(_mm512_loadu_si512(upper_halves), number));
}

/* Two vectors of bfloat16 at once, one of every other element from the first on and one of those between: a line of memory, whose
 * elements stay where they are. */
#define ISA_SPLITS_BF16 1

static inline void split_bf16(__m512i both, __m512 *even, __m512 *odd)
{
    *even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    *odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32((int)0xffff0000)));
}
static inline void read_split_bf16(const uint16_t *p, __m512 *even, __m512 *odd)
{
    split_bf16(_mm512_loadu_si512(p), even, odd);
}
/* The first n of them, and zeros; 0 < n < 32 */
static inline void read_split_part_bf16(const uint16_t *p, ptrdiff_t n, __m512 *even, __m512 *odd)
{
    split_bf16(_mm512_maskz_loadu_epi16((__mmask32)((1u << n) - 1u), p), even, odd);
}
static inline void round_two_bf16(__m512 a, __m512 b, __m512i *upper_a, __m512i *upper_b)
{
    *upper_a = rounded_upper_bf16(a);
    *upper_b = rounded_upper_bf16(b);
    if (__builtin_expect(_mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q), 0)) {
        *upper_a = quiet_bf16(a, *upper_a);
        *upper_b = quiet_bf16(b, *upper_b);
    }
}
static inline void write_both(uint16_t *p, __m512i both, int stream)
{
    if (stream)
        _mm512_stream_si512((__m512i *)(void *)p, both);
    else
        _mm512_storeu_si512(p, both);
}
static inline void write_split_bf16(uint16_t *p, __m512 even, __m512 odd, int stream)
{
    __m512i first, second;
    round_two_bf16(even, odd, &first, &second);
    write_both(p, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(first, 16), second), stream);
}

/* Two vectors that lie one after the other, to memory that is aligned to both where they go around the caches. */
#define ISA_JOINS_HALVES 1

static inline void write_joined_f16(uint16_t *p, __m512 first, __m512 second, int stream)
{
    write_both(p, _mm512_inserti64x4(_mm512_castsi256_si512(round_f16(first)), round_f16(second), 1), stream);
}
static inline void write_joined_bf16(uint16_t *p, __m512 first, __m512 second, int stream)
{
    __m512i one, other;
    round_two_bf16(first, second, &one, &other);
    write_both(p, _mm512_permutex2var_epi16(one, _mm512_loadu_si512(upper_halves), other), stream);
}

/* Sums of the even elements of two runs of 16, then of the odd ones: the first run's are the lower halves of the vectors. */
static inline __m512 add_split_bf16(__m512 even, __m512 odd)
{
    return _mm512_add_ps(_mm512_shuffle_f32x4(even, odd, 0x44), _mm512_shuffle_f32x4(even, odd, 0xee));
}

#include "isa.inc.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else
typedef int bnfast_no_avx512; /* an empty translation unit is not C */
#endif
