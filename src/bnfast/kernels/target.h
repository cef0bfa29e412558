/* Included first by every instruction set's file. */

#ifndef BNFAST_TARGET_H
#define BNFAST_TARGET_H

#include "kernels.h"

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) || defined(_M_X64)
#define BNFAST_X86_64 1
#include <immintrin.h>
#else
#define BNFAST_X86_64 0
#endif

/* AVX2 and AVX-512 need GCC's or Clang's vector types and a switch of target inside one file. */
#if BNFAST_X86_64 && defined(__GNUC__)
#define BNFAST_X86_VECTORS 1
#else
#define BNFAST_X86_VECTORS 0
#endif

#if defined(__GNUC__)
#define ALWAYS_INLINE inline __attribute__((always_inline))
#define NEVER_INLINE __attribute__((noinline))
/* Asks for the cache line `bytes` past p, into L2; any address will do. */
#define PREFETCH_L2(p, bytes) __builtin_prefetch((const void *)((uintptr_t)(p) + (uintptr_t)(bytes)), 0, 2)
#else
#define ALWAYS_INLINE inline
#define NEVER_INLINE
#define PREFETCH_L2(p, bytes) ((void)0)
#endif

#if BNFAST_X86_VECTORS
/* n < 4 halves, the first in the lowest bits; zeros behind them. */
static inline uint64_t load_fewer_than_four(const uint16_t *p, ptrdiff_t n)
{
    uint32_t two;
    if (n < 2)
        return n == 1 ? p[0] : 0;
    memcpy(&two, p, sizeof two);
    return n == 3 ? two | (uint64_t)p[2] << 32 : two;
}
static inline void store_fewer_than_four(uint16_t *p, ptrdiff_t n, uint64_t halves)
{
    if (n & 2) {
        const uint32_t two = (uint32_t)halves;
        memcpy(p, &two, sizeof two);
        halves >>= 32;
        p += 2;
    }
    if (n & 1)
        *p = (uint16_t)halves;
}
#endif

/* In place of the flags of a map: it stands in no loop with the sums, but is done some elements at a time between. */
enum { BY_TURNS = -1 };

#endif
