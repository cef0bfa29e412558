/* Where threads wait until the tasks of a phase are done: done, whoever did them. A thread that was late and found no task
 * left is not waited for, as a barrier would. */

#ifndef BNFAST_GATE_H
#define BNFAST_GATE_H

#include <stddef.h>

#if defined(__unix__) || defined(__APPLE__)
#include <sched.h>
#define BNFAST_YIELD() ((void)sched_yield())
#else
#define BNFAST_YIELD() ((void)0) /* one thread: nobody waits */
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#define BNFAST_PAUSE() __builtin_ia32_pause()
#else
#define BNFAST_PAUSE() ((void)0)
#endif

#if defined(_MSC_VER)
#include <intrin.h>
typedef volatile long bnfast_gate_count;
#define BNFAST_GATE_ADD(count) ((void)_InterlockedIncrement(count))
#define BNFAST_GATE_READ(count) _InterlockedOr(count, 0)
#else
typedef long bnfast_gate_count;
#define BNFAST_GATE_ADD(count) ((void)__atomic_add_fetch(count, 1, __ATOMIC_RELEASE))
#define BNFAST_GATE_READ(count) __atomic_load_n(count, __ATOMIC_ACQUIRE)
#endif

typedef struct {
    bnfast_gate_count done; /* tasks */
    char own_cache_line[64 - sizeof(bnfast_gate_count)];
} bnfast_gate;
_Static_assert(sizeof(bnfast_gate) == 64, "gates do not share a line of cache");

static inline void bnfast_gate_close(bnfast_gate *gate) { gate->done = 0; }

/* A task is done, and what it has written is seen by those who pass. */
static inline void bnfast_gate_note(bnfast_gate *gate) { BNFAST_GATE_ADD(&gate->done); }

/* Waits until n_tasks are done: a moment on the CPU, after that for as long as others want it. */
static inline void bnfast_gate_pass(bnfast_gate *gate, ptrdiff_t n_tasks)
{
    enum { MOMENT = 1000 };
    for (int i = 0; BNFAST_GATE_READ(&gate->done) < n_tasks;) {
        if (i < MOMENT) {
            BNFAST_PAUSE();
            i++;
        } else
            BNFAST_YIELD();
    }
}

#endif
