/* The one door to OpenMP: what the parallel loop in core/run.pxi needs to know of the runtime, and the faults of
 * runtimes that have to be worked around (fork, the float environment of workers). Without OpenMP every function
 * is here too and describes one thread. */

#ifndef BNFAST_OPENMP_H
#define BNFAST_OPENMP_H

long bnfast_openmp_version(void);        /* _OPENMP, 0 without */
const char *bnfast_openmp_library(void); /* path of the runtime, "" if not known */
int bnfast_openmp_max_threads(void);     /* of the calling thread, as threadpoolctl and the environment set it */
int bnfast_openmp_thread_limit(void);

/* At import, once: makes fork safe (openmp.c). Starts nothing. */
void bnfast_openmp_init(void);
int bnfast_openmp_fork_handled(void);   /* fork handlers are in place and the runtime can be paused */
void bnfast_openmp_handle_fork(int on); /* off: for the test that shows what happens without the handlers */
int bnfast_openmp_forked_serial(void);  /* this is a child whose pool could not be paused: one thread */

/* Around every parallel region. enter returns the team to ask for: the budget shared among the threads that are
 * calling right now, at least 1. All teams together have no more workers than the budget; pools that are asleep, no
 * more than 64, or two budgets if that is more. */
int bnfast_openmp_enter(int budget);
void bnfast_openmp_leave(int budget, int team);
int bnfast_openmp_take_shortage(void); /* whether, since the last time this was asked, threads were refused anew */

/* Control bits of the float environment (rounding, flush to zero). Workers have their own, so each task takes the
 * caller's and puts the worker's back: another library may use the same threads. */
unsigned long long bnfast_float_control(void);
void bnfast_set_float_control(unsigned long long control);

#endif
