/* A thread counts as a rival if its CPU clock has gone on, since the last look, for a quarter of the time or more;
 * where the last look was too long ago, if it goes on between two readings now. A reading takes a fraction of a
 * microsecond. Which threads there are is read from /proc once a second. Elsewhere than on Linux there are no
 * rivals.
 *
 * The workers of the calling thread's own pool are none. Another package may share the runtime (PyTorch, in a build from
 * source), and then they have run, and spin, before any call of ours has used them. So a busy thread counts only if the
 * calling thread has run a team since it was seen first: had it been in that team, it would have said so (exclude_me).
 * Until then the call goes on as if it were none, which costs one call for each thread that appears. */

#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* sched_getaffinity */
#endif

#include "rivals.h"

#if defined(__linux__)

#include <dirent.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { MAX_OURS = 256, MAX_OTHERS = 1024, MAX_WATCHED = 8 };
static const int64_t LIST_LASTS = 1000000000, LOOK_LASTS = 200000000; /* nanoseconds */

/* What a team gains has to exceed what its phases lose when one of its threads has to wait for a CPU: about a time
 * slice of the scheduler, in which one thread does this many elements. Measured on 2 CPUs beside one spinning thread:
 * two threads are slower than one up to 13 million elements, and as fast at 26 million. */
static const double ELEMENTS_OF_A_SLICE = 5e6;

typedef struct {
    pid_t tid;
    long seen; /* in which list first */
} known_t;

typedef struct {
    known_t thread;
    int64_t used; /* its CPU clock at the last look, in nanoseconds; -1: has not been looked at */
} other_t;

typedef struct {
    pid_t tid; /* 0: free */
    long team; /* the number of the newest list when it ran in a team last */
} place_t;

static pthread_mutex_t looking = PTHREAD_MUTEX_INITIALIZER; /* what follows, but for `ours` */
static known_t others[MAX_OTHERS];
static other_t watched[MAX_WATCHED]; /* spread over the others: the threads of a pool are busy together */
static int n_watched, n_others, n_cpus;
static int64_t listed, looked;

static long lists; /* how many have been made; read by all */
static place_t ours[MAX_OURS];
static place_t nowhere;         /* the place of threads that have found none */
static pthread_key_t place_key; /* a thread's value: its place, NULL: it has been in no team */
static int has_place_key;

static int64_t clock_of(clockid_t id)
{
    struct timespec t;
    return clock_gettime(id, &t) == 0 ? (int64_t)t.tv_sec * 1000000000 + t.tv_nsec : -1;
}

/* Time on a CPU of any thread of this process (the kernel's encoding, as pthread_getcpuclockid makes it); -1: it
 * ended. */
static int64_t cpu_time_of(pid_t tid) { return clock_of((clockid_t)(~(unsigned)tid << 3 | 6)); }

static pid_t my_tid(void) { return (pid_t)syscall(SYS_gettid); }

/* --- ours ------------------------------------------------------------------------------------------------------ */

static void leave_place(void *place) { __atomic_store_n(&((place_t *)place)->tid, 0, __ATOMIC_RELAXED); }

static place_t *new_place(void)
{
    const pid_t tid = my_tid();
    for (int i = 0; i < MAX_OURS; i++) {
        pid_t nobody = 0;
        if (__atomic_compare_exchange_n(&ours[i].tid, &nobody, tid, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED))
            return &ours[i];
    }
    return &nowhere;
}

void bnfast_rivals_exclude_me(void)
{
    if (!has_place_key)
        return;
    place_t *place = pthread_getspecific(place_key);
    if (place == NULL) {
        place = new_place();
        pthread_setspecific(place_key, place);
    }
    const long newest = __atomic_load_n(&lists, __ATOMIC_RELAXED);
    if (__atomic_load_n(&place->team, __ATOMIC_RELAXED) != newest) /* the line is written once a second, not always */
        __atomic_store_n(&place->team, newest, __ATOMIC_RELAXED);
}

static int is_ours(pid_t tid)
{
    for (int i = 0; i < MAX_OURS; i++)
        if (__atomic_load_n(&ours[i].tid, __ATOMIC_RELAXED) == tid)
            return 1;
    return 0;
}

/* Whether it may be in the pool of the calling thread, for all that is known. */
static int may_be_mine(const known_t *thread)
{
    const place_t *const me = pthread_getspecific(place_key);
    return me == NULL || __atomic_load_n(&me->team, __ATOMIC_RELAXED) < thread->seen;
}

static void after_fork_in_child(void) /* this is the only thread */
{
    pthread_mutex_init(&looking, NULL);
    for (int i = 0; i < MAX_OURS; i++)
        ours[i].tid = 0;
    if (has_place_key)
        pthread_setspecific(place_key, NULL);
    n_others = 0;
    listed = 0;
}

void bnfast_rivals_init(void)
{
    if (!has_place_key && pthread_atfork(NULL, NULL, after_fork_in_child) == 0)
        has_place_key = pthread_key_create(&place_key, leave_place) == 0;
}

/* --- the others ------------------------------------------------------------------------------------------------ */

/* The list in which a thread was seen first. Threads come in the order of the last list, so that one looks at few. */
static long first_seen(pid_t tid, const known_t *before, int n_before, int *at)
{
    for (int i = 0; i < n_before; i++, *at = (*at + 1) % n_before)
        if (before[*at].tid == tid)
            return before[*at].seen;
    return lists;
}

static void list_others(int64_t now)
{
    static known_t before[MAX_OTHERS]; /* under the mutex */
    cpu_set_t cpus;
    DIR *const tasks = opendir("/proc/self/task");
    const int n_before = n_others;
    int at = 0;
    memcpy(before, others, (size_t)n_before * sizeof *before);
    listed = now;
    looked = n_others = n_watched = 0;
    n_cpus = sched_getaffinity(0, sizeof cpus, &cpus) == 0 ? CPU_COUNT(&cpus) : 0;
    if (tasks == NULL)
        return;
    __atomic_store_n(&lists, lists + 1, __ATOMIC_RELAXED);
    const pid_t me = my_tid();
    for (const struct dirent *task; n_others < MAX_OTHERS && (task = readdir(tasks)) != NULL;) {
        const pid_t tid = (pid_t)atol(task->d_name); /* 0 for . and .. */
        if (tid > 0 && tid != me && !is_ours(tid))
            others[n_others++] = (known_t){tid, first_seen(tid, before, n_before, &at)};
    }
    closedir(tasks);
    n_watched = n_others < MAX_WATCHED ? n_others : MAX_WATCHED;
    for (int i = 0; i < n_watched; i++)
        watched[i] = (other_t){others[i * n_others / n_watched], -1};
}

static int count_rivals(void)
{
    int busy = 0;
    const int64_t now = clock_of(CLOCK_MONOTONIC);
    if (listed == 0 || now - listed > LIST_LASTS)
        list_others(now);
    const int64_t passed = now - looked;
    const int is_recent = looked != 0 && passed < LOOK_LASTS;
    looked = now;
    for (int i = 0; i < n_watched; i++) {
        other_t *const other = &watched[i];
        const int64_t before = other->used, used = cpu_time_of(other->thread.tid);
        if (used < 0)
            listed = 0; /* it has ended: make a new list next time */
        else if (is_recent && before >= 0 ? used - before > passed / 4 : cpu_time_of(other->thread.tid) > used)
            busy += !is_ours(other->thread.tid) && !may_be_mine(&other->thread);
        other->used = used;
    }
    return n_watched == 0 ? 0 : busy * n_others / n_watched;
}

int bnfast_rivals_leave(int team, long long elements)
{
    if (!has_place_key || team <= 1 || pthread_mutex_trylock(&looking) != 0)
        return team;
    const int rivals = count_rivals();
    const int cpus = n_cpus;
    pthread_mutex_unlock(&looking);
    const int free_cpus = cpus > rivals ? cpus - rivals : 1;
    if (rivals == 0 || free_cpus >= team)
        return team;
    /* All threads together get this much of the CPUs, compared with one thread that has one for itself. */
    const double speedup = (double)cpus * team / (team + rivals);
    if ((double)elements * (1 - 1 / speedup) > ELEMENTS_OF_A_SLICE)
        return team;
    return free_cpus;
}

#else

void bnfast_rivals_init(void) {}
void bnfast_rivals_exclude_me(void) {}
int bnfast_rivals_leave(int team, long long elements) { return (void)elements, team; }

#endif
