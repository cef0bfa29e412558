/* The search for infinities, in rows that lie in cache because the map is about to read them. A plain loop, which every
 * compiler turns into vectors: it takes a small part of the time that the memory takes. */

#include "block.h"

#include <float.h>
#include <stdint.h>
#include <string.h>

/* x - x is 0, of which all bits are 0, unless x is infinite or NaN; which of them it is we ask only then. bits: an
 * integer as wide as type */
#define HAS_INFINITY(name, type, bits, largest) \
    static int name(const void *data, ptrdiff_t n) \
    { \
        const type *x = data; \
        bits any = 0; \
        for (ptrdiff_t i = 0; i < n; i++) { \
            const type zero = x[i] - x[i]; \
            bits pattern; \
            memcpy(&pattern, &zero, sizeof pattern); \
            any |= pattern; \
        } \
        int found = 0; \
        if (any) \
            for (ptrdiff_t i = 0; i < n; i++) \
                found |= x[i] > largest || x[i] < -largest; \
        return found; \
    }

HAS_INFINITY(has_infinity_f32, float, uint32_t, FLT_MAX)
HAS_INFINITY(has_infinity_f64, double, uint64_t, DBL_MAX)

/* halves: whether any has the bits of one, but for the sign */
#define HAS_INFINITY_BITS(name, infinity) \
    static int name(const void *data, ptrdiff_t n) \
    { \
        const uint16_t *x = data; \
        int found = 0; \
        for (ptrdiff_t i = 0; i < n; i++) \
            found |= (x[i] & 0x7fff) == (infinity); \
        return found; \
    }

HAS_INFINITY_BITS(has_infinity_f16, 0x7c00)
HAS_INFINITY_BITS(has_infinity_bf16, 0x7f80)

static int (*const has_infinity[BNFAST_N_DTYPES])(const void *data, ptrdiff_t n) = {
    [BNFAST_FLOAT32] = has_infinity_f32,
    [BNFAST_FLOAT64] = has_infinity_f64,
    [BNFAST_FLOAT16] = has_infinity_f16,
    [BNFAST_BFLOAT16] = has_infinity_bf16,
};

void bnfast_note_infinity(const bnfast_job *job, const void *x, ptrdiff_t n_rows, ptrdiff_t stride, ptrdiff_t length)
{
    if (job->infinite == NULL)
        return;
    if (stride == length) { /* one run */
        length *= n_rows;
        n_rows = 1;
    }
    int found = 0;
    for (ptrdiff_t r = 0; r < n_rows; r++)
        found |= has_infinity[job->kernels->dtype]((const char *)x + r * stride * job->kernels->itemsize, length);
    if (found)
        set_flag(job->infinite);
}
