/* Fork. libgomp keeps a pool a calling thread; after fork the child has the bookkeeping but no workers, and its
 * next region waits for ever. So the thread that forks gives its pool back first (omp_pause_resource_all, tens of
 * microseconds; the next region starts a new one, in parent and child). Where that is not possible the child
 * runs on one thread. Other runtimes start anew in the child by themselves. */

#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* dladdr */
#endif

#include "openmp.h"

#include "clock.h"
#include "counter.h"
#include "waking.h"

#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(_OPENMP)
#include <omp.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#define HAVE_FORK 1
#include <dlfcn.h>
#include <pthread.h>
#else
#define HAVE_FORK 0
#endif
#if defined(__x86_64__) || defined(_M_X64)
#include <xmmintrin.h>
#endif

static int forked_serial;

int bnfast_openmp_forked_serial(void) { return forked_serial; }

#if defined(_OPENMP)

static bnfast_counter callers;  /* threads inside a call of ours */
static bnfast_counter busy;     /* workers of theirs */
static bnfast_counter shortage; /* threads have been refused, and nobody has asked yet */

long bnfast_openmp_version(void) { return _OPENMP; }
int bnfast_openmp_max_threads(void) { return omp_get_max_threads(); }
int bnfast_openmp_thread_limit(void)
{
#if _OPENMP >= 200805
    return omp_get_thread_limit();
#else
    return 1 << 30;
#endif
}

#if HAVE_FORK

const char *bnfast_openmp_library(void)
{
    int (*const function)(void) = omp_get_max_threads;
    void *address;
    Dl_info info;
    memcpy(&address, &function, sizeof address);
    return dladdr(address, &info) && info.dli_fname ? info.dli_fname : "";
}

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 9 /* _OPENMP says 4.5 there, the function is there */
#pragma weak omp_pause_resource_all
#define PAUSE_IS_DECLARED 1
extern int omp_pause_resource_all(omp_pause_resource_t);
#else
#define PAUSE_IS_DECLARED 0
#endif

static int is_libgomp(void) { return strstr(bnfast_openmp_library(), "gomp") != NULL; }

static int pause_pool(void)
{
#if PAUSE_IS_DECLARED
    if (omp_pause_resource_all)
        return omp_pause_resource_all(omp_pause_soft) == 0;
#endif
    return 0;
}

static int has_pause(void)
{
#if PAUSE_IS_DECLARED
    return omp_pause_resource_all != NULL;
#else
    return 0;
#endif
}

static bnfast_counter started; /* workers of all pools, asleep or not */
static int handlers_installed, handlers_off, pool_survives, gives_pools_back;

/* A thread's value: how many workers its pool has, as a pointer. libgomp's pool has the size of the last team: a
 * smaller team ends the threads it has no use for, and the next larger one starts them again. */
static pthread_key_t pool_key;
static int has_pool_key;

static int pool_size(void) { return has_pool_key ? (int)(intptr_t)pthread_getspecific(pool_key) : 0; }

static void set_pool_size(int workers)
{
    const int before = pool_size();
    if (workers != before && has_pool_key && pthread_setspecific(pool_key, (void *)(intptr_t)workers) == 0)
        bnfast_add(&started, workers - before);
}

static void thread_ended(void *workers) { bnfast_add(&started, -(long)(intptr_t)workers); }

/* The pool is the calling thread's, whoever has used it: another library may share this runtime. Without a pool the
 * pause does nothing. */
static void before_fork(void)
{
    pool_survives = !handlers_off && is_libgomp() && !pause_pool();
    set_pool_size(0);
}

static void after_fork_in_child(void)
{
    callers = busy = started = 0; /* this is the only thread */
    if (pool_survives)
        forked_serial = 1;
}

void bnfast_openmp_init(void)
{
    if (!has_pool_key)
        has_pool_key = pthread_key_create(&pool_key, thread_ended) == 0;
    if (!handlers_installed)
        handlers_installed = pthread_atfork(before_fork, NULL, after_fork_in_child) == 0;
    gives_pools_back = is_libgomp() && has_pause();
}

int bnfast_openmp_fork_handled(void) { return handlers_installed && !handlers_off && (!is_libgomp() || has_pause()); }

void bnfast_openmp_handle_fork(int on) { handlers_off = !on; }

static void *wait_for(void *gate)
{
    pthread_mutex_lock(gate);
    pthread_mutex_unlock(gate);
    return NULL;
}

/* How many of n threads can be started at once; they are gone afterwards. */
static int startable(int n)
{
    pthread_mutex_t gate = PTHREAD_MUTEX_INITIALIZER;
    pthread_t *const threads = malloc((size_t)n * sizeof *threads);
    int count = 0;
    if (threads == NULL)
        return 0;
    pthread_mutex_lock(&gate);
    while (count < n && pthread_create(&threads[count], NULL, wait_for, &gate) == 0)
        count++;
    pthread_mutex_unlock(&gate);
    for (int i = 0; i < count; i++)
        pthread_join(threads[i], NULL);
    free(threads);
    return count;
}

/* libgomp ends the process when it cannot start a thread. So before the pool of the calling thread grows, as many
 * threads are started for a try; a team that cannot be had is made smaller, and for a second no pool grows. Between the
 * try and the region others may still take the room. */
static int possible_team(int team)
{
    static int64_t last; /* when threads were refused; 0: the last try went well */
    const int workers = pool_size();
    if (!has_pool_key || team - 1 <= workers)
        return team;
    const int64_t refused = __atomic_load_n(&last, __ATOMIC_RELAXED);
    if (refused != 0 && bnfast_now() - refused < 1000000000)
        return 1 + workers;
    const int possible = 1 + workers + startable(team - 1 - workers);
    if (possible < team && refused == 0)
        bnfast_exchange(&shortage, 1);
    __atomic_store_n(&last, possible < team ? bnfast_now() : 0, __ATOMIC_RELAXED);
    return possible;
}

/* A pool that is asleep is kept for its thread's next call, because to end it and to start it again costs more than
 * many a call (measured: 65 us with 1 worker, 135 with 3, where the call itself takes 95). But not without limit: where
 * all that are asleep have more workers than MAX_ASLEEP and than two teams, this thread's goes. */
enum { MAX_ASLEEP = 64 };

static void keep_or_give_back(int budget)
{
    static bnfast_counter largest_budget;
    if (budget > bnfast_value(&largest_budget))
        bnfast_exchange(&largest_budget, budget);
    if (!gives_pools_back || pool_size() == 0)
        return;
    const long asleep = bnfast_value(&started) - bnfast_value(&busy);
    if (asleep > MAX_ASLEEP && asleep > 2 * (bnfast_value(&largest_budget) - 1) && pause_pool())
        set_pool_size(0);
}

#else /* no fork */
static int possible_team(int team) { return team; }
static void set_pool_size(int workers) { (void)workers; }
static void keep_or_give_back(int budget) { (void)budget; }

const char *bnfast_openmp_library(void) { return ""; }
void bnfast_openmp_init(void) {}
int bnfast_openmp_fork_handled(void) { return 1; }
void bnfast_openmp_handle_fork(int on) { (void)on; }

#endif

/* Workers for this call, of the budget that other calls have left. */
static int take_workers(int budget, int wanted)
{
    const long over = bnfast_add(&busy, wanted) - budget;
    const int refused = over <= 0 ? 0 : over < wanted ? (int)over : wanted;
    if (refused > 0)
        bnfast_add(&busy, -refused);
    return wanted - refused;
}

int bnfast_openmp_enter(int budget)
{
    const int share = (int)(budget / bnfast_add(&callers, 1));
    if (forked_serial || share <= 1 || omp_in_parallel())
        return 1;
    const int workers = take_workers(budget, share - 1), team = workers > 0 ? possible_team(1 + workers) : 1;
    if (team - 1 < workers)
        bnfast_add(&busy, team - 1 - workers);
    if (team > 1)
        set_pool_size(team - 1);
    return team;
}

void bnfast_openmp_leave(int budget, int team)
{
    if (team > 1)
        bnfast_add(&busy, 1 - team);
    keep_or_give_back(budget);
    bnfast_add(&callers, -1);
    bnfast_waking_call_ended();
}

int bnfast_openmp_take_shortage(void) { return bnfast_exchange(&shortage, 0) != 0; }

#else /* no OpenMP */

long bnfast_openmp_version(void) { return 0; }
const char *bnfast_openmp_library(void) { return ""; }
int bnfast_openmp_max_threads(void) { return 1; }
int bnfast_openmp_thread_limit(void) { return 1; }
void bnfast_openmp_init(void) {}
int bnfast_openmp_fork_handled(void) { return 1; }
void bnfast_openmp_handle_fork(int on) { (void)on; }
int bnfast_openmp_enter(int budget) { return (void)budget, 1; }
void bnfast_openmp_leave(int budget, int team) { (void)budget, (void)team; }
int bnfast_openmp_take_shortage(void) { return 0; }

#endif

/* Exception flags are left out: only what changes results. */
unsigned long long bnfast_float_control(void)
{
#if defined(__x86_64__) || defined(_M_X64)
    return _mm_getcsr() & ~0x3fu;
#elif defined(__aarch64__) && defined(__GNUC__)
    unsigned long long fpcr;
    __asm__ volatile("mrs %0, fpcr" : "=r"(fpcr));
    return fpcr;
#else
    return 0;
#endif
}

void bnfast_set_float_control(unsigned long long control)
{
    if (bnfast_float_control() == control)
        return;
#if defined(__x86_64__) || defined(_M_X64)
    _mm_setcsr((unsigned)control | (_mm_getcsr() & 0x3fu));
#elif defined(__aarch64__) && defined(__GNUC__)
    __asm__ volatile("msr fpcr, %0" : : "r"(control));
#endif
}
