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

#include "isa.inc.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else
typedef int bnfast_no_avx2; /* an empty translation unit is not C */
#endif
