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

/* Parts of vectors (see vec.h). */
#define ISA_HAS_PARTS 1

static inline __m128 load_part_f32_baseline(const float *p, ptrdiff_t n, __m128 fill)
{
    if (n >= 4)
        return _mm_loadu_ps(p);
    if (n == 3)
        return _mm_movelh_ps(_mm_castsi128_ps(_mm_loadl_epi64((const __m128i *)(const void *)p)),
                             _mm_move_ss(_mm_movehl_ps(fill, fill), _mm_load_ss(p + 2)));
    if (n == 2)
        return _mm_loadl_pi(fill, (const __m64 *)(const void *)p);
    return n == 1 ? _mm_move_ss(fill, _mm_load_ss(p)) : fill;
}
static inline __m128d load_part_f64_baseline(const double *p, ptrdiff_t n, __m128d fill)
{
    return n >= 2 ? _mm_loadu_pd(p) : n == 1 ? _mm_loadl_pd(fill, p) : fill;
}
static inline void store_part_f32_baseline(float *p, ptrdiff_t n, __m128 v)
{
    if (n >= 4)
        _mm_storeu_ps(p, v);
    else {
        if (n >= 2)
            _mm_storel_pi((__m64 *)(void *)p, v);
        if (n == 3)
            _mm_store_ss(p + 2, _mm_movehl_ps(v, v));
        if (n == 1)
            _mm_store_ss(p, v);
    }
}
static inline void store_part_f64_baseline(double *p, ptrdiff_t n, __m128d v)
{
    if (n >= 2)
        _mm_storeu_pd(p, v);
    else if (n == 1)
        _mm_storel_pd(p, v);
}
static inline __m128d widen_f32_baseline(__m128 v, int k) { return _mm_cvtps_pd(k == 0 ? v : _mm_movehl_ps(v, v)); }
static inline __m128d widen_f64_baseline(__m128d v, int k) { return (void)k, v; }

/* Halves (see halves.h). */
#if defined(__GNUC__)
#define ISA_HAS_HALVES 1

typedef __m128i H; /* the lower half of it */
static inline H load_halves(const uint16_t *p) { return _mm_loadl_epi64((const __m128i *)(const void *)p); }
static inline void store_halves(uint16_t *p, H halves) { _mm_storel_epi64((__m128i *)(void *)p, halves); }
static inline void stream_halves(uint16_t *p, H halves)
{
    _mm_stream_si64((long long *)(void *)p, _mm_cvtsi128_si64(halves));
}
static inline H load_part_halves(const uint16_t *p, ptrdiff_t n)
{
    return _mm_cvtsi64_si128((long long)load_fewer_than_four(p, n));
}
static inline void store_part_halves(uint16_t *p, ptrdiff_t n, H halves)
{
    store_fewer_than_four(p, n, (uint64_t)_mm_cvtsi128_si64(halves));
}
typedef uint32_t words_baseline __attribute__((vector_size(16)));
static inline int any_word(words_baseline w) { return _mm_movemask_ps((__m128)w) != 0; }
#define ISA_HAS_LESSER 1
static inline __m128 lesser(__m128 a, __m128 b) { return _mm_min_ps(a, b); }
static inline __m128 greater(__m128 a, __m128 b) { return _mm_max_ps(a, b); }
static inline words_baseline words_of(H halves)
{
    return (words_baseline)_mm_unpacklo_epi16(halves, _mm_setzero_si128());
}
static inline H halves_of(words_baseline w) { return _mm_packs_epi32((__m128i)w, (__m128i)w); }
#endif
#else
#define ISA_HAS_PARTS 0
#define store_stream_f32_baseline store_f32_baseline
#define store_stream_f64_baseline store_f64_baseline
#endif

#define ISA_HAS_BITS 0

#include "isa.inc.h"
