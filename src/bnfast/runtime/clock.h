/* The time since some moment, in nanoseconds. A reading takes 20 of them. */

#ifndef BNFAST_CLOCK_H
#define BNFAST_CLOCK_H

#include <stdint.h>
#include <time.h>

static inline int64_t bnfast_now(void)
{
    struct timespec t;
#if defined(CLOCK_MONOTONIC)
    clock_gettime(CLOCK_MONOTONIC, &t);
#else
    timespec_get(&t, TIME_UTC);
#endif
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* A moment that several threads read and write. Only the number: nothing else is ordered by it. */
#if defined(_MSC_VER)
typedef volatile int64_t bnfast_moment;
static inline int64_t bnfast_read_moment(bnfast_moment *from) { return *from; }
static inline void bnfast_write_moment(bnfast_moment *to, int64_t value) { *to = value; }
#else
typedef int64_t bnfast_moment;
static inline int64_t bnfast_read_moment(bnfast_moment *from) { return __atomic_load_n(from, __ATOMIC_RELAXED); }
static inline void bnfast_write_moment(bnfast_moment *to, int64_t value)
{
    __atomic_store_n(to, value, __ATOMIC_RELAXED);
}
#endif

#endif
