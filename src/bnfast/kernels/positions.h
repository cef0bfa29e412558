/* Some of an array's positions, all its axes but the channel's, and what lies at them brought together. */

#ifndef BNFAST_POSITIONS_H
#define BNFAST_POSITIONS_H

#include "kernels.h"

/* Neighbouring positions that take part, in one row of the array. */
typedef struct {
    ptrdiff_t begin, length;
} bnfast_run;

/* mask: (n,) bytes IN, nonzero: takes part; row: a run ends where a row of so many positions does. Returns the number of
 * runs; positions: how many take part OUT; runs: OUT, or NULL */
ptrdiff_t bnfast_list_runs(const unsigned char *mask, ptrdiff_t n, ptrdiff_t row, ptrdiff_t *positions,
                           bnfast_run *runs);

/* whole: (outer, channels, inner); part: (positions, channels) where inner is 1, else (channels, positions).
 * gather: part <- whole at the runs; scatter: whole at the runs <- part, 0 elsewhere.
 * size: bytes an element. Where inner is 1, `part` may be the beginning of `whole` in a gather. */
void bnfast_gather(const bnfast_run *runs, ptrdiff_t n_runs, ptrdiff_t channels, ptrdiff_t inner, ptrdiff_t positions,
                   ptrdiff_t size, const void *whole, void *part);
void bnfast_scatter(const bnfast_run *runs, ptrdiff_t n_runs, ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner,
                    ptrdiff_t positions, ptrdiff_t size, const void *part, void *whole);

/* The same of a part that lies at the beginning of `whole`, where inner is 1. */
void bnfast_spread(const bnfast_run *runs, ptrdiff_t n_runs, ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t positions,
                   ptrdiff_t size, void *whole);

#endif
