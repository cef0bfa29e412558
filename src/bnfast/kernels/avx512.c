/* AVX-512 (F, as of Skylake-X and Zen 4): 64-byte vectors, and masks for the ends of rows. */

#include "target.h"

#if BNFAST_X86_VECTORS

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f"))), apply_to = function)
#else
#pragma GCC target("avx512f")
#endif

#define ISA "avx512"
#define ISA_SUFFIX avx512
#define VBYTES 64

static inline void store_stream_f32_avx512(float *p, __m512 v) { _mm512_stream_ps(p, v); }
static inline void store_stream_f64_avx512(double *p, __m512d v) { _mm512_stream_pd(p, v); }

static inline __m512 mask_load_f32_avx512(const float *p, unsigned mask, __m512 fill)
{
    return _mm512_mask_loadu_ps(fill, (__mmask16)mask, p);
}
static inline __m512d mask_load_f64_avx512(const double *p, unsigned mask, __m512d fill)
{
    return _mm512_mask_loadu_pd(fill, (__mmask8)mask, p);
}
static inline void mask_store_f32_avx512(float *p, unsigned mask, __m512 v) { _mm512_mask_storeu_ps(p, (__mmask16)mask, v); }
static inline void mask_store_f64_avx512(double *p, unsigned mask, __m512d v) { _mm512_mask_storeu_pd(p, (__mmask8)mask, v); }

#include "isa.inc.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else
typedef int bnfast_no_avx512; /* an empty translation unit is not C */
#endif
