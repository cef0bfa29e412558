/* OpenBLAS's parallel jobs on the OpenMP threads of bnfast (blas.c). Where that is not possible at all, supported is
 * 0 and nothing else is called. */

#ifndef BNFAST_BLAS_H
#define BNFAST_BLAS_H

#include <stdint.h>

int bnfast_blas_supported(void);

/* Hands the jobs of a copy of OpenBLAS to bnfast, until release has been called as often as share. Returns the number
 * of the copy for the other functions, -1 if there is no room for a further one.
 * The addresses are OpenBLAS's: openblas_set_threads_callback_function, exec_blas, and the variables
 * openblas_threads_callback_ (0: not known) and blas_num_threads. places: how many threads it was built for. */
int bnfast_blas_share(uintptr_t set_callback, uintptr_t exec_blas, uintptr_t callback, uintptr_t num_threads,
                      int places);
void bnfast_blas_release(int copy);

int bnfast_blas_find(uintptr_t set_callback); /* number of a copy that was shared before, -1: none */
int bnfast_blas_is_shared(int copy);
int bnfast_blas_was_given_back(int copy);                          /* its jobs could not be run together */
void bnfast_blas_calls(int copy, long *on_team, long *on_threads); /* how often jobs ran here, and on what */

/* For tests. 1: no team is large enough; 2: no thread can be started either; 4: run the jobs one after another;
 * 8: use the places of OpenBLAS's own threads. */
void bnfast_blas_break(int what);

#endif
