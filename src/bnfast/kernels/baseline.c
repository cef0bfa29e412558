/* What every CPU of the architecture has: SSE2 on x86-64, NEON on arm64 (both through 16-byte vector types), and
 * plain C where the compiler has no vector types. */

#include "target.h"

#define ISA "baseline"
#define ISA_SUFFIX baseline
#if defined(__GNUC__)
#define VBYTES 16
#else
#define VBYTES 0
#endif

#if BNFAST_X86_VECTORS
static inline void store_stream_f32_baseline(float *p, __m128 v) { _mm_stream_ps(p, v); }
static inline void store_stream_f64_baseline(double *p, __m128d v) { _mm_stream_pd(p, v); }
#else
#define store_stream_f32_baseline store_f32_baseline
#define store_stream_f64_baseline store_f64_baseline
#endif

#include "isa.inc.h"
