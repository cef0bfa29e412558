/* A number that several threads change at once. Only the number: nothing else is ordered by it. */

#ifndef BNFAST_COUNTER_H
#define BNFAST_COUNTER_H

#if defined(_MSC_VER)
#include <intrin.h>
typedef volatile long bnfast_counter;
static inline long bnfast_add(bnfast_counter *to, long n) { return _InterlockedExchangeAdd(to, n) + n; }
static inline long bnfast_exchange(bnfast_counter *old, long value) { return _InterlockedExchange(old, value); }
static inline long bnfast_value(bnfast_counter *of) { return *of; }
#else
typedef long bnfast_counter;
static inline long bnfast_add(bnfast_counter *to, long n) { return __atomic_add_fetch(to, n, __ATOMIC_RELAXED); }
static inline long bnfast_exchange(bnfast_counter *old, long value)
{
    return __atomic_exchange_n(old, value, __ATOMIC_RELAXED);
}
static inline long bnfast_value(bnfast_counter *of) { return __atomic_load_n(of, __ATOMIC_RELAXED); }
#endif

#endif
