/* OpenBLAS's parallel jobs on the OpenMP threads of bnfast.
 *
 * With openblas_set_threads_callback_function OpenBLAS hands the jobs of a call to a function instead of to threads of
 * its own. What it expects of that function is not written down; read in its sources (0.3.29 to 0.3.31):
 *
 * 1. All jobs have to run at the same time: those of a matrix product wait for each other in a loop. So no job is
 *    started before there is a thread for each: a team of that size, else as many new threads, else the call is given
 *    back to OpenBLAS, and all later ones with it.
 * 2. A job works in the buffer of its place, and marks the place as busy in the table in which OpenBLAS's own threads
 *    find their work. Two calls at once must not use the same places, so there is one call at a time; and OpenBLAS's
 *    own threads, which go on serving what does not come here (the LU factorisation), have the first places, so ours
 *    are the last ones.
 * 3. Before a fork OpenBLAS frees the buffers of all places, whoever works in them. So a fork waits for the call. */

#if !defined(_GNU_SOURCE)
#define _GNU_SOURCE /* recursive mutexes */
#endif

#include "blas.h"

#include "openmp.h"
#include "rivals.h"

#if defined(__linux__)

#include <pthread.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

typedef void job_function(int place, void *job, int data);
typedef void callback_function(int sync, job_function *run, int n_jobs, size_t job_bytes, void *jobs, int data);
typedef void set_callback_function(callback_function *callback);
typedef int exec_blas_function(long n_jobs, void *jobs);

enum { NO_TEAM = 1, NO_THREADS = 2, IN_TURN = 4, FIRST_PLACES = 8 };
static int broken;

typedef struct {
    set_callback_function *set_callback;
    exec_blas_function *exec_blas;
    callback_function *const *callback;
    const int *num_threads;
    int places;
    int users; /* how many times it is shared */
    int given_back;
    long on_team, on_threads;
} copy_t;

enum { MAX_COPIES = 8 };
static copy_t copies[MAX_COPIES];
static int n_copies;
static pthread_mutex_t table = PTHREAD_MUTEX_INITIALIZER; /* of copies: who shares, for how long */

static pthread_mutex_t turn; /* one call at a time; recursive, because a fork may take it once for every copy */
static pthread_key_t inside; /* not NULL in a thread that is running a job */
static int initialised;

/* --- a call ---------------------------------------------------------------------------------------------------- */

typedef struct {
    job_function *run;
    char *jobs;
    size_t job_bytes;
    int data, first_place;
    unsigned long long control;
} call_t;

static void run_job(int i, void *context)
{
    const call_t *call = context;
    pthread_setspecific(inside, call);
    bnfast_rivals_exclude_me();
    const unsigned long long own = bnfast_float_control();
    bnfast_set_float_control(call->control);
    call->run(call->first_place + i, call->jobs + (size_t)i * call->job_bytes, call->data);
    bnfast_set_float_control(own);
    pthread_setspecific(inside, NULL);
}

typedef struct {
    pthread_mutex_t closed;
    int all_there;
    call_t *call;
} gate_t;

typedef struct {
    pthread_t thread;
    gate_t *gate;
    int i;
} worker_t;

static void *wait_and_work(void *context)
{
    const worker_t *worker = context;
    pthread_mutex_lock(&worker->gate->closed);
    const int all_there = worker->gate->all_there;
    pthread_mutex_unlock(&worker->gate->closed);
    if (all_there)
        run_job(worker->i, worker->gate->call);
    return NULL;
}

/* On threads made for this call; none is let in before all are there. Returns whether the jobs were run. */
static int run_on_threads(call_t *call, int n_jobs)
{
    gate_t gate = {PTHREAD_MUTEX_INITIALIZER, 0, call};
    worker_t *const workers = malloc((size_t)n_jobs * sizeof *workers);
    int started = 1; /* job 0 is the calling thread's */
    if (workers == NULL)
        return 0;
    pthread_mutex_lock(&gate.closed);
    for (; started < n_jobs && !(broken & NO_THREADS); started++) {
        worker_t *const worker = &workers[started];
        worker->gate = &gate;
        worker->i = started;
        if (pthread_create(&worker->thread, NULL, wait_and_work, worker) != 0)
            break;
    }
    gate.all_there = started == n_jobs;
    pthread_mutex_unlock(&gate.closed);
    if (gate.all_there)
        run_job(0, call);
    for (int i = 1; i < started; i++)
        pthread_join(workers[i].thread, NULL);
    free(workers);
    return gate.all_there;
}

/* Returns whether the jobs were run; if not, none has been started. */
static int run_call(copy_t *copy, call_t *call, int n_jobs)
{
    if (broken & IN_TURN) {
        for (int i = 0; i < n_jobs; i++)
            run_job(i, call);
        return 1;
    }
    if (!(broken & NO_TEAM) && bnfast_openmp_run_together(n_jobs, run_job, call)) {
        copy->on_team++;
        return 1;
    }
    if (run_on_threads(call, n_jobs)) {
        copy->on_threads++;
        return 1;
    }
    return 0;
}

static void give_back(copy_t *copy, int n_jobs, void *jobs)
{
    pthread_mutex_lock(&table);
    copy->given_back = 1;
    copy->set_callback(NULL);
    pthread_mutex_unlock(&table);
    copy->exec_blas(n_jobs, jobs);
}

static void take_call(copy_t *copy, job_function *run, int n_jobs, size_t job_bytes, void *jobs, int data)
{
    int done = 0;
    /* A job that makes a call: has not been seen. It would wait for its own turn. */
    if (pthread_getspecific(inside) == NULL) {
        call_t call = {run, jobs, job_bytes, data, copy->places - n_jobs, bnfast_float_control()};
        if (broken & FIRST_PLACES)
            call.first_place = 0;
        pthread_mutex_lock(&turn);
        if (n_jobs <= copy->places - (*copy->num_threads - 1))
            done = run_call(copy, &call, n_jobs);
        pthread_mutex_unlock(&turn);
    }
    if (!done)
        give_back(copy, n_jobs, jobs);
}

/* OpenBLAS does not say which copy of it is calling, so each has a function of its own. */
#define CALLBACK(i) \
    static void callback_##i(int sync, job_function *run, int n_jobs, size_t job_bytes, void *jobs, int data) \
    { \
        (void)sync; /* always 1: return when all is done */ \
        take_call(&copies[i], run, n_jobs, job_bytes, jobs, data); \
    }
CALLBACK(0)
CALLBACK(1)
CALLBACK(2)
CALLBACK(3)
CALLBACK(4)
CALLBACK(5)
CALLBACK(6)
CALLBACK(7)

static callback_function *const callbacks[MAX_COPIES] = {callback_0, callback_1, callback_2, callback_3,
                                                         callback_4, callback_5, callback_6, callback_7};

/* --- fork ------------------------------------------------------------------------------------------------------ */

static void before_fork(void) { pthread_mutex_lock(&turn); }
static void after_fork_in_parent(void) { pthread_mutex_unlock(&turn); }

static void renew_turn(void)
{
    pthread_mutexattr_t recursive;
    pthread_mutexattr_init(&recursive);
    pthread_mutexattr_settype(&recursive, PTHREAD_MUTEX_RECURSIVE);
    pthread_mutex_init(&turn, &recursive);
    pthread_mutexattr_destroy(&recursive);
}

static void after_fork_in_child(void)
{
    pthread_mutex_init(&table, NULL);
    renew_turn();
}

/* --- sharing --------------------------------------------------------------------------------------------------- */

int bnfast_blas_supported(void) { return bnfast_openmp_version() != 0; }

int bnfast_blas_find(uintptr_t set_callback)
{
    for (int i = 0; i < n_copies; i++)
        if ((uintptr_t)copies[i].set_callback == set_callback)
            return i;
    return -1;
}

/* Number of a copy not seen before, -1 if it cannot be taken. */
static int new_copy(uintptr_t set_callback)
{
    if (!initialised) {
        if (pthread_key_create(&inside, NULL) != 0)
            return -1;
        renew_turn();
        initialised = 1;
    }
    /* For every copy, because what is registered last is called first, and this has to come before what OpenBLAS
     * registered when it was loaded. */
    if (n_copies == MAX_COPIES || pthread_atfork(before_fork, after_fork_in_parent, after_fork_in_child) != 0)
        return -1;
    memset(&copies[n_copies], 0, sizeof copies[n_copies]);
    copies[n_copies].set_callback = (set_callback_function *)set_callback;
    return n_copies++;
}

int bnfast_blas_share(uintptr_t set_callback, uintptr_t exec_blas, uintptr_t callback, uintptr_t num_threads,
                      int places)
{
    pthread_mutex_lock(&table);
    int i = bnfast_blas_find(set_callback);
    if (i < 0)
        i = new_copy(set_callback);
    if (i >= 0) {
        copy_t *const copy = &copies[i];
        copy->exec_blas = (exec_blas_function *)exec_blas;
        copy->callback = (callback_function *const *)callback;
        copy->num_threads = (const int *)num_threads;
        copy->places = places;
        copy->users++;
        copy->given_back = 0;
        copy->set_callback(callbacks[i]);
    }
    pthread_mutex_unlock(&table);
    return i;
}

void bnfast_blas_release(int i)
{
    pthread_mutex_lock(&table);
    copy_t *const copy = &copies[i];
    /* A call that is running goes on to its end. */
    if (--copy->users == 0 && (copy->callback == NULL || *copy->callback == callbacks[i]))
        copy->set_callback(NULL);
    pthread_mutex_unlock(&table);
}

int bnfast_blas_is_shared(int i) { return copies[i].users > 0 && !copies[i].given_back; }
int bnfast_blas_was_given_back(int i) { return copies[i].users > 0 && copies[i].given_back; }

void bnfast_blas_calls(int i, long *on_team, long *on_threads)
{
    *on_team = copies[i].on_team;
    *on_threads = copies[i].on_threads;
}

void bnfast_blas_break(int what) { broken = what; }

#else

int bnfast_blas_supported(void) { return 0; }
int bnfast_blas_share(uintptr_t s, uintptr_t e, uintptr_t c, uintptr_t n, int p)
{
    return (void)s, (void)e, (void)c, (void)n, (void)p, -1;
}
void bnfast_blas_release(int copy) { (void)copy; }
int bnfast_blas_find(uintptr_t s) { return (void)s, -1; }
int bnfast_blas_is_shared(int copy) { return (void)copy, 0; }
int bnfast_blas_was_given_back(int copy) { return (void)copy, 0; }
void bnfast_blas_calls(int copy, long *on_team, long *on_threads)
{
    (void)copy;
    *on_team = *on_threads = 0;
}
void bnfast_blas_break(int what) { (void)what; }

#endif
