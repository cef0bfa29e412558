/* AVX2, and F16C, which every CPU with AVX2 has: 32-byte vectors. */

#include "target.h"

#if BNFAST_X86_VECTORS

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,f16c")
#endif

#define ISA "avx2"
#define ISA_SUFFIX avx2
#define VBYTES 32

static inline void store_stream_f32_avx2(float *p, __m256 v) { _mm256_stream_ps(p, v); }
static inline void store_stream_f64_avx2(double *p, __m256d v) { _mm256_stream_pd(p, v); }

/* Parts of vectors through masks (see vec.h). */
#define ISA_HAS_PARTS 1

/* All ones in the first n of 8 (or 4) lanes: a window on ones followed by zeros. */
static const int32_t ones_then_zeros[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};

static inline ptrdiff_t within(ptrdiff_t n, ptrdiff_t most) { return n < 0 ? 0 : n > most ? most : n; }
static inline __m256i lanes_mask_f32(ptrdiff_t n)
{
    return _mm256_loadu_si256((const __m256i *)(ones_then_zeros + 8 - within(n, 8)));
}
static inline __m256i lanes_mask_f64(ptrdiff_t n)
{
    return _mm256_loadu_si256((const __m256i *)(ones_then_zeros + 8 - 2 * within(n, 4)));
}
static inline __m256 load_part_f32_avx2(const float *p, ptrdiff_t n, __m256 fill)
{
    const __m256i mask = lanes_mask_f32(n);
    return _mm256_blendv_ps(fill, _mm256_maskload_ps(p, mask), _mm256_castsi256_ps(mask));
}
static inline __m256d load_part_f64_avx2(const double *p, ptrdiff_t n, __m256d fill)
{
    const __m256i mask = lanes_mask_f64(n);
    return _mm256_blendv_pd(fill, _mm256_maskload_pd(p, mask), _mm256_castsi256_pd(mask));
}
static inline void store_part_f32_avx2(float *p, ptrdiff_t n, __m256 v)
{
    _mm256_maskstore_ps(p, lanes_mask_f32(n), v);
}
static inline void store_part_f64_avx2(double *p, ptrdiff_t n, __m256d v)
{
    _mm256_maskstore_pd(p, lanes_mask_f64(n), v);
}
static inline __m256d widen_f32_avx2(__m256 v, int k)
{
    return _mm256_cvtps_pd(k == 0 ? _mm256_castps256_ps128(v) : _mm256_extractf128_ps(v, 1));
}
static inline __m256d widen_f64_avx2(__m256d v, int k) { return (void)k, v; }

/* Whether low < a < high or a is NaN, a bit a lane; and in each lane: its bit ? yes : no (see marks.inc.h). */
#define ISA_HAS_BITS 1

static inline unsigned inside_f32_avx2(__m256 a, __m256 low, __m256 high)
{
    const __m256 above = _mm256_cmp_ps(a, low, _CMP_NLE_UQ), below = _mm256_cmp_ps(high, a, _CMP_NLE_UQ);
    return (unsigned)_mm256_movemask_ps(_mm256_and_ps(above, below));
}
static inline __m256 if_bits_f32_avx2(unsigned bits, __m256 yes, __m256 no)
{
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i its = _mm256_and_si256(_mm256_set1_epi32((int)bits), lane);
    return _mm256_blendv_ps(no, yes, _mm256_castsi256_ps(_mm256_cmpeq_epi32(its, lane)));
}
static inline unsigned inside_f64_avx2(__m256d a, __m256d low, __m256d high)
{
    const __m256d above = _mm256_cmp_pd(a, low, _CMP_NLE_UQ), below = _mm256_cmp_pd(high, a, _CMP_NLE_UQ);
    return (unsigned)_mm256_movemask_pd(_mm256_and_pd(above, below));
}
static inline __m256d if_bits_f64_avx2(unsigned bits, __m256d yes, __m256d no)
{
    const __m256i lane = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256i its = _mm256_and_si256(_mm256_set1_epi64x((long long)bits), lane);
    return _mm256_blendv_pd(no, yes, _mm256_castsi256_pd(_mm256_cmpeq_epi64(its, lane)));
}

/* Halves (see halves.h). */
#define ISA_HAS_HALVES 1
#define ISA_HAS_F16 1
#define ISA_ROUNDS_BF16 1

typedef __m128i H;
static inline H load_halves(const uint16_t *p) { return _mm_loadu_si128((const __m128i *)(const void *)p); }
static inline void store_halves(uint16_t *p, H halves) { _mm_storeu_si128((__m128i *)(void *)p, halves); }
static inline void stream_halves(uint16_t *p, H halves) { _mm_stream_si128((__m128i *)(void *)p, halves); }

/* n < 4 of them, in 64 bits */
static inline H load_part_halves(const uint16_t *p, ptrdiff_t n)
{
    uint64_t four;
    if (n < 4)
        return _mm_cvtsi64_si128((long long)load_fewer_than_four(p, n));
    memcpy(&four, p, sizeof four);
    return _mm_set_epi64x((long long)load_fewer_than_four(p + 4, n - 4), (long long)four);
}
static inline void store_part_halves(uint16_t *p, ptrdiff_t n, H halves)
{
    if (n & 4) {
        _mm_storel_epi64((__m128i *)(void *)p, halves);
        halves = _mm_unpackhi_epi64(halves, halves);
        p += 4;
    }
    store_fewer_than_four(p, n & 3, (uint64_t)_mm_cvtsi128_si64(halves));
}
typedef uint32_t words_avx2 __attribute__((vector_size(32)));
static inline int any_word(words_avx2 w) { return _mm256_movemask_ps((__m256)w) != 0; }
static inline words_avx2 words_of(H halves) { return (words_avx2)_mm256_cvtepu16_epi32(halves); }
static inline __m256 widen_f16(H halves) { return _mm256_cvtph_ps(halves); }
static inline H round_f16(__m256 v) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }
/* The upper halves of the words are the numbers that they round to. */
static inline __m256i rounded_upper_bf16(__m256 v)
{
    const __m256i bits = _mm256_castps_si256(v),
                  odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
}
static inline __m256i quiet_bf16(__m256 v, __m256i number)
{
    const __m256i quiet = _mm256_or_si256(_mm256_castps_si256(v), _mm256_set1_epi32(1 << 22));
    return _mm256_blendv_epi8(number, quiet, _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)));
}
static inline H round_bf16(__m256 v)
{
    __m256i number = rounded_upper_bf16(v);
    if (__builtin_expect(_mm256_movemask_ps(_mm256_cmp_ps(v, v, _CMP_UNORD_Q)), 0))
        number = quiet_bf16(v, number);
    /* the upper halves of the words, side by side in each half of the vector, then in the lower one */
    const __m256i upper = _mm256_setr_epi8(2, 3, 6, 7, 10, 11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1, 2, 3, 6, 7, 10,
                                           11, 14, 15, -1, -1, -1, -1, -1, -1, -1, -1);
    return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_shuffle_epi8(number, upper), 0x08));
}

/* Two vectors of bfloat16 at once, one of every other element from the first on and one of those between: no element has to
 * move to another half of a vector. */
#define ISA_SPLITS_BF16 1

static inline void read_split_bf16(const uint16_t *p, __m256 *even, __m256 *odd)
{
    const __m256i both = _mm256_loadu_si256((const __m256i *)(const void *)p);
    *even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    *odd = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32((int)0xffff0000)));
}
/* The first n of them, and zeros; 0 < n < 16 */
static inline void read_split_part_bf16(const uint16_t *p, ptrdiff_t n, __m256 *even, __m256 *odd)
{
    uint16_t some[16] = {0};
    memcpy(some, p, (size_t)n * sizeof *some);
    read_split_bf16(some, even, odd);
}
static inline void round_two_bf16(__m256 a, __m256 b, __m256i *upper_a, __m256i *upper_b)
{
    *upper_a = rounded_upper_bf16(a);
    *upper_b = rounded_upper_bf16(b);
    if (__builtin_expect(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_UNORD_Q)), 0)) {
        *upper_a = quiet_bf16(a, *upper_a);
        *upper_b = quiet_bf16(b, *upper_b);
    }
}
static inline void write_both(uint16_t *p, __m256i both, int stream)
{
    if (stream)
        _mm256_stream_si256((__m256i *)(void *)p, both);
    else
        _mm256_storeu_si256((__m256i *)(void *)p, both);
}
static inline void write_split_bf16(uint16_t *p, __m256 even, __m256 odd, int stream)
{
    __m256i first, second;
    round_two_bf16(even, odd, &first, &second);
    write_both(p, _mm256_blend_epi16(_mm256_srli_epi32(first, 16), second, 0xaa), stream);
}

/* Two vectors that lie one after the other, to memory that is aligned to both where they go around the caches. */
#define ISA_JOINS_HALVES 1

static inline void write_joined_f16(uint16_t *p, __m256 first, __m256 second, int stream)
{
    write_both(p, _mm256_set_m128i(round_f16(second), round_f16(first)), stream);
}
static inline void write_joined_bf16(uint16_t *p, __m256 first, __m256 second, int stream)
{
    __m256i one, other;
    round_two_bf16(first, second, &one, &other);
    const __m256i both = _mm256_packus_epi32(_mm256_srli_epi32(one, 16), _mm256_srli_epi32(other, 16));
    write_both(p, _mm256_permute4x64_epi64(both, 0xd8), stream);
}

#include "isa.inc.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else
typedef int bnfast_no_avx2; /* an empty translation unit is not C */
#endif
