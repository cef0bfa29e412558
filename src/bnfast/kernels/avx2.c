/* AVX2: 32-byte vectors. */

#include "target.h"

#if BNFAST_X86_VECTORS

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC target("avx2")
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

#include "isa.inc.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else
typedef int bnfast_no_avx2; /* an empty translation unit is not C */
#endif
