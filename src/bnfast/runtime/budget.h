/* How many threads a call may use. The rules and their order are those at the top of threads.py; every call that is not
 * small asks, so nothing is read here that has not been read before: neither the environment nor files. */

#ifndef BNFAST_BUDGET_H
#define BNFAST_BUDGET_H

/* What decided; threads.py has the words. */
typedef enum {
    BNFAST_WHY_FORKED,      /* a child whose pool could not be paused */
    BNFAST_WHY_CONTEXT,     /* with num_threads(n) */
    BNFAST_WHY_PROCESS,     /* set_num_threads(n) */
    BNFAST_WHY_ENVIRONMENT, /* BNFAST_NUM_THREADS */
    BNFAST_WHY_OPENMP,      /* OMP_NUM_THREADS, threadpoolctl */
    BNFAST_WHY_CPUS,        /* affinity, cgroup */
    BNFAST_WHY_NO_OPENMP,
    BNFAST_WHY_LIMIT /* OMP_THREAD_LIMIT */
} bnfast_why;

/* What the rules ask for. A number of 0: nothing was said. */
typedef struct {
    long context, process, environment;
    int omp_num_threads_is_set;
    long openmp; /* what OpenMP would use in the calling thread */
    long limit;
    int has_openmp, forked_serial;
    long cpus;
} bnfast_facts;

typedef struct {
    long n; /* at least 1 */
    bnfast_why why;
    int chosen;  /* by the user, who then gets that many, whoever else uses the CPUs */
    int in_code; /* by a line of the program, not by its environment: also where they have to be woken */
} bnfast_budget;

bnfast_budget bnfast_decide(const bnfast_facts *facts);

/* Of the calling thread, now; context: what `with num_threads` says there. */
bnfast_budget bnfast_budget_now(long context);

void bnfast_set_process_threads(long n);
void bnfast_set_environment_threads(long n, int omp_num_threads_is_set);

/* CPUs that the system grants. Whether it has to be asked again: it has not been asked, or not within a second. Of
 * several threads one is told so then, and the others go on with the old number. */
int bnfast_cpus_are_old(void);
void bnfast_set_cpus(long n);
void bnfast_forget_cpus(void);
void bnfast_age_cpus(long long nanoseconds); /* for tests: as if it had been asked so much earlier */

#endif
