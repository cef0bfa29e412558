/* Merging what segments gave, as a tree in index order: so the bits do not depend on who reduced which segment when. */

#include "block.h"

void bnfast_merge_pair(const bnfast_job *job, ptrdiff_t n, double count, double *a, double *b, double count2,
                       const double *a2, const double *b2)
{
    if (sums_products(job))
        job->kernels->merge_sums(n, a, b, a2, b2);
    else
        job->kernels->merge_moments(n, count, a, b, count2, a2, b2);
}

double bnfast_merge(const bnfast_job *job, double *a, double *b, ptrdiff_t stride, ptrdiff_t n, ptrdiff_t lo,
                    ptrdiff_t hi, double (*counts)(const bnfast_job *job, ptrdiff_t i))
{
    if (hi - lo == 1)
        return counts(job, lo);
    const ptrdiff_t mid = lo + (hi - lo + 1) / 2;
    const double count_lo = bnfast_merge(job, a, b, stride, n, lo, mid, counts);
    const double count_hi = bnfast_merge(job, a, b, stride, n, mid, hi, counts);
    bnfast_merge_pair(job, n, count_lo, a + lo * stride, b + lo * stride, count_hi, a + mid * stride, b + mid * stride);
    return count_lo + count_hi;
}
