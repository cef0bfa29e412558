/* Where things lie: both layouts as arithmetic on a job, for the plan (plan.c) and for the tasks (planar.c,
 * interleaved.c). Nothing here decides anything. */

#ifndef BNFAST_GEOMETRY_H
#define BNFAST_GEOMETRY_H

#include "job.h"

static inline ptrdiff_t least(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
static inline ptrdiff_t most(ptrdiff_t a, ptrdiff_t b) { return a > b ? a : b; }
static inline ptrdiff_t quotient_up(ptrdiff_t a, ptrdiff_t b) { return (a + b - 1) / b; }
static inline ptrdiff_t round_up(ptrdiff_t a, ptrdiff_t step) { return quotient_up(a, step) * step; }

/* What an operation does. */
static inline int applies(const bnfast_job *job)
{
    return job->operation != BNFAST_MOMENTS && job->operation != BNFAST_BACKWARD_SUMS;
}
static inline int maps_u_only(const bnfast_job *job) { return job->operation == BNFAST_BACKWARD_EVAL; }
static inline int maps_gradient(const bnfast_job *job)
{
    return job->operation == BNFAST_BACKWARD || job->operation == BNFAST_BACKWARD_APPLY || job->operation == BNFAST_JVP;
}
static inline int sums_products(const bnfast_job *job) /* its reductions are sums of u, not moments of x */
{
    return maps_gradient(job) || maps_u_only(job) || job->operation == BNFAST_BACKWARD_SUMS;
}
static inline int passes(const bnfast_job *job) /* u goes through the derivative of an activation */
{
    return job->rectifies && sums_products(job);
}

/* Whether its data are float16 or bfloat16. */
static inline int has_halves(const bnfast_job *job) { return job->kernels->itemsize < job->kernels->coefficient_size; }

/* Whether its map goes by marks, or makes them. */
static inline int maps_marks(const bnfast_job *job)
{
    return job->marks && job->rectifies && (maps_gradient(job) || !sums_products(job));
}
static inline int passed_early(const bnfast_job *job) /* what passes of u is stored by the reduction, not by the map */
{
    return job->passed && !maps_marks(job);
}
static inline int passed_late(const bnfast_job *job) { return job->passed && maps_marks(job); }
static inline int reduces(const bnfast_job *job)
{
    return job->operation != BNFAST_EVAL && (job->operation != BNFAST_BACKWARD_APPLY || passed_early(job));
}

/* Whether its elements may be copied together while they are reduced: what an activation passes of halves, times a slope,
 * would be rounded there. */
static inline int may_pack(const bnfast_job *job)
{
    return applies(job) && !job->exact &&
           (!has_halves(job) || !passes(job) || job->rectifier.slope == 0 || maps_marks(job));
}

/* The flags of its map (kernels.h), and what its map reads beside x. */
static inline int map_flags(const bnfast_job *job)
{
    const int mark = maps_marks(job) ? BNFAST_MARK : 0;
    const int relu = !mark && bnfast_is_relu(&job->rectifier) ? BNFAST_RELU : 0;
    if (maps_gradient(job))
        return BNFAST_GRADIENT | mark | (passes(job) && !passed_early(job) ? BNFAST_RECTIFY | relu : 0);
    if (maps_u_only(job))
        return 0;
    return (job->residual ? BNFAST_ADD : 0) | mark | (job->rectifies ? BNFAST_RECTIFY : 0);
}
static inline const void *mapped_beside(const bnfast_job *job)
{
    return !sums_products(job) ? job->residual : passed_early(job) ? job->passed : job->u;
}

/* Bytes of one array, and how many of them are read both to reduce and to map. */
static inline ptrdiff_t bytes_of_array(const bnfast_job *job)
{
    return job->outer * job->channels * job->inner * job->kernels->itemsize;
}
static inline ptrdiff_t arrays_read(const bnfast_job *job) { return job->u ? 2 : 1; }

/* A row of the array: all channels. */
static inline ptrdiff_t period(const bnfast_job *job) { return job->channels * job->inner; }

/* planar: pieces into which a channel's part of a row is cut */
static inline ptrdiff_t pieces_of_row(const bnfast_job *job) { return quotient_up(job->inner, job->segment_length); }

/* interleaved: rows as they are folded */
static inline ptrdiff_t folded_stride(const bnfast_job *job) { return job->fold * period(job); }
static inline ptrdiff_t folded_rows(const bnfast_job *job) { return job->outer / job->fold; }
static inline ptrdiff_t rows_left(const bnfast_job *job) { return job->outer % job->fold; }
static inline ptrdiff_t columns_of_channel(const bnfast_job *job) { return job->fold * job->inner; }

#endif
