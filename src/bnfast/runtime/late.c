/* Times are in units of about a microsecond, and may wrap around. A thread's values are pairs of them, in the halves of a
 * pointer: nothing to allocate, nothing to free. */

#include "late.h"

#include "clock.h"
#include "counter.h"

#if defined(__unix__) || defined(__APPLE__)

#include <pthread.h>
#include <stdint.h>

/* To wake a thread takes up to 60 microseconds where CPUs are free; beside other processes it took 350 to 900. Alone for
 * 5 milliseconds, then twice as long each time up to 40: what trying costs stays about a hundredth. */
enum { PATIENCE = 200, SHORTEST = 5000, LONGEST = 40000 };

/* So many elements are worth waiting a time slice for (rivals.c). */
static const long long WORTH_A_SLICE = 5000000;

enum { HALF = sizeof(uintptr_t) * 4, NANOSECONDS = 1 << 10 };
static const uintptr_t LARGEST = ((uintptr_t)1 << HALF) - 1;

static bnfast_counter patience = PATIENCE;
static pthread_key_t region; /* its begin; then the moment when nothing was left, and the time of a task until then */
static pthread_key_t alone;  /* until when, and how long that was from the beginning; 0: nobody has come late */
static int has_keys;

static uintptr_t moment(void) { return (uintptr_t)(bnfast_now() / NANOSECONDS) & LARGEST; }

static void put(pthread_key_t key, uintptr_t first, uintptr_t second)
{
    pthread_setspecific(key, (void *)((first & LARGEST) << HALF | (second & LARGEST)));
}

static uintptr_t first(pthread_key_t key) { return (uintptr_t)pthread_getspecific(key) >> HALF; }
static uintptr_t second(pthread_key_t key) { return (uintptr_t)pthread_getspecific(key) & LARGEST; }

void bnfast_late_init(void)
{
    if (!has_keys)
        has_keys = pthread_key_create(&region, NULL) == 0 && pthread_key_create(&alone, NULL) == 0;
}

void bnfast_late_region_begins(void)
{
    if (has_keys)
        put(region, moment(), 0);
}

void bnfast_late_nothing_left(int thread, ptrdiff_t tasks)
{
    if (thread != 0 || !has_keys)
        return;
    const uintptr_t now = moment();
    put(region, now, (now - first(region)) / (uintptr_t)(tasks > 0 ? tasks : 1));
}

static int is_alone(uintptr_t now)
{
    const uintptr_t time = second(alone);
    return time != 0 && ((first(alone) - now) & LARGEST) <= time;
}

static void judge(uintptr_t now, uintptr_t task, uintptr_t waited)
{
    if (waited <= (uintptr_t)bnfast_value(&patience) || waited <= 2 * task || is_alone(now))
        return;
    const uintptr_t before = second(alone), since = (now - first(alone)) & LARGEST;
    const uintptr_t twice = since <= 4 * before ? 2 * before : SHORTEST, time = twice < LONGEST ? twice : LONGEST;
    put(alone, now + time, time);
}

void bnfast_late_region_ends(void)
{
    if (!has_keys)
        return;
    const uintptr_t now = moment();
    judge(now, second(region), (now - first(region)) & LARGEST);
}

int bnfast_late_better_alone(long long elements)
{
    return has_keys && elements < WORTH_A_SLICE && second(alone) != 0 && is_alone(moment());
}

void bnfast_late_pretend(long long task, long long waited)
{
    if (has_keys)
        judge(moment(), (uintptr_t)task, (uintptr_t)waited);
}

void bnfast_late_set_patience(long long microseconds)
{
    bnfast_exchange(&patience, microseconds < 0 ? PATIENCE : (long)microseconds);
}

#else

void bnfast_late_init(void) {}
void bnfast_late_region_begins(void) {}
void bnfast_late_nothing_left(int thread, ptrdiff_t tasks) { (void)thread, (void)tasks; }
void bnfast_late_region_ends(void) {}
int bnfast_late_better_alone(long long elements) { return (void)elements, 0; }
void bnfast_late_pretend(long long task, long long waited) { (void)task, (void)waited; }
void bnfast_late_set_patience(long long microseconds) { (void)microseconds; }

#endif
