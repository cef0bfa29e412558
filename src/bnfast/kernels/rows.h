/* Rows of statistics: what parts of the data gave, in float64 numbers that can be sent, and their merging. */

#ifndef BNFAST_ROWS_H
#define BNFAST_ROWS_H

#include "kernels.h"

/* rows: (n_rows, stride), each (count, mean of the channels, m2 of the channels, what the means were
 * rounded by) IN; the first: those of all OUT, the others are overwritten. A count of 0 changes nothing. */
void bnfast_merge_moments_rows(double *rows, ptrdiff_t n_rows, ptrdiff_t stride, ptrdiff_t channels);

/* The same for rows (count, sums ...) of `n_sums` sums. */
void bnfast_merge_sums_rows(double *rows, ptrdiff_t n_rows, ptrdiff_t stride, ptrdiff_t n_sums);

#endif
