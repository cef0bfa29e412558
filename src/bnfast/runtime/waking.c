/* A thread remembers when its last call ended, and how many elements its calls had since the last pause, one in which
 * workers fall asleep. Others are woken for a call once this call and those before it in the burst have WAKING_PAYS
 * elements together: one large call wakes them at once, small ones when they have shown to come in numbers (they have
 * lost by then what a needless waking would have cost). From then on, until the next pause, they are awake. */

#include "waking.h"

#include "clock.h"

#include <stdint.h>

#if defined(__unix__) || defined(__APPLE__)

#include <pthread.h>

/* Measured in calls between 300 microseconds of other work, on 2 CPUs: below, one thread is as fast or faster. */
enum { WAKING_PAYS = 600000 };

static int64_t awake; /* nanoseconds, 0: not known */

/* A thread's value, as a pointer: the end of its last call in the upper half, in microseconds, which may wrap around;
 * the elements of the burst in the lower one, in thousands. Nothing to allocate, nothing to free. */
static pthread_key_t key;
static int has_key;
enum { HALF = sizeof(uintptr_t) * 4, MOMENT_UNIT = 1 << 10, ELEMENT_UNIT = 1 << 12 };
static const uintptr_t LARGEST = ((uintptr_t)1 << HALF) - 1;

static uintptr_t moment(int64_t nanoseconds) { return (uintptr_t)(nanoseconds / MOMENT_UNIT) & LARGEST; }

static void remember(uintptr_t ended, uintptr_t burst)
{
    pthread_setspecific(key, (void *)(ended << HALF | (burst < LARGEST ? burst : LARGEST)));
}

static uintptr_t remembered(void) { return (uintptr_t)pthread_getspecific(key); }

static void wait_a_turn(void)
{
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__GNUC__)
    __asm__ volatile("" ::: "memory");
#endif
}

/* How long a worker of libgomp waits: in each turn it looks, and does what wait_a_turn does, which takes from 5 to 60
 * nanoseconds. */
static int64_t duration_of(long turns)
{
    enum { TRIES = 4, TURNS = 32 };
    int64_t best = INT64_MAX;
    for (int i = 0; i < TRIES; i++) {
        const int64_t begun = bnfast_now();
        for (int turn = 0; turn < TURNS; turn++)
            wait_a_turn();
        const int64_t took = bnfast_now() - begun;
        best = took < best ? took : best;
    }
    return best * turns / TURNS;
}

void bnfast_waking_init(long spin_count)
{
    if (!has_key)
        has_key = pthread_key_create(&key, NULL) == 0;
    awake = has_key && spin_count > 0 ? duration_of(spin_count) : 0;
}

int bnfast_waking_pays(long long elements)
{
    if (awake == 0)
        return 1;
    const uintptr_t before = remembered(), now = moment(bnfast_now());
    const uintptr_t pause = (now - (before >> HALF)) & LARGEST;
    const uintptr_t burst = pause <= moment(awake) ? before & LARGEST : 0;
    const uintptr_t more = elements < WAKING_PAYS ? (uintptr_t)elements / ELEMENT_UNIT : WAKING_PAYS / ELEMENT_UNIT;
    remember(now, burst + more);
    return burst + more >= WAKING_PAYS / ELEMENT_UNIT;
}

void bnfast_waking_call_ended(void)
{
    if (awake != 0)
        remember(moment(bnfast_now()), remembered() & LARGEST);
}

void bnfast_waking_pretend(long long nanoseconds, long long elements)
{
    if (awake != 0)
        remember(moment(bnfast_now() - nanoseconds), (uintptr_t)(elements / ELEMENT_UNIT));
}

long long bnfast_waking_awake(void) { return awake; }

#else

void bnfast_waking_init(long spin_count) { (void)spin_count; }
int bnfast_waking_pays(long long elements) { return (void)elements, 1; }
void bnfast_waking_call_ended(void) {}
void bnfast_waking_pretend(long long nanoseconds, long long elements) { (void)nanoseconds, (void)elements; }
long long bnfast_waking_awake(void) { return 0; }

#endif
