/* A job: one operation on one array, cut into tasks that may run in any order and on any thread. The way of an array:
 *
 *   core/run.pxi        a job is filled in, planned, given memory, and its phases are run
 *      |
 *   plan.c              segments, blocks, caches, threads: what is done where and in which order
 *      |
 *   planar.c            the tasks, by memory layout (geometry.h: where things lie)
 *   interleaved.c
 *      |
 *      |-> reduce       leaf: moments.inc.h or backward.inc.h, both on sums.inc.h, or exact.inc.h; one segment
 *      |                of some channels
 *      |-> merge        merge.c: segments to channels, a tree in index order (leaf: merge.inc.h)
 *      |-> coefficients leaf: coefficients.inc.h; variance, inv_std, dgamma, dbeta; what the map takes, a channel
 *      '-> apply        leaf: normalize.inc.h; y or dx; careful.c for channels at the edges of the dtype's range
 *
 * Leaves are compiled once for each dtype (leaves.inc.h) and instruction set (isa.inc.h; vec.h: vectors), and called
 * through a table (kernels.h, dispatch.c).
 *
 * What one leaf call reduces is a *segment*; segments depend on the shape and the layout alone and are merged in index
 * order, so the bits of a result depend neither on the number of threads nor on how the tasks are scheduled. A *block*
 * is a range of channels whose steps are done back to back while the data are in cache (the last one perhaps while the
 * next block is reduced); where channels are few or too long for that, the whole array is one block and each step is a
 * phase of its own, split over rows.
 *
 * The caller fills the first part, calls bnfast_plan, gives `workspace`, then runs the phases one after another,
 * the tasks of a phase in parallel. Neighbouring tasks take neighbouring memory, and so do tasks of two phases at the
 * same fraction of each: a thread that does the same share of every phase finds what it needs in its own caches.
 * Nothing here allocates, locks or knows of threads. */

#ifndef BNFAST_JOB_H
#define BNFAST_JOB_H

#include "kernels.h"

typedef struct bnfast_job bnfast_job;

typedef enum {
    BNFAST_PHASES, /* each step a phase over the whole array */
    BNFAST_BLOCKS  /* all steps of some channels, block by block */
} bnfast_plan_kind;

typedef struct {
    void (*task)(const bnfast_job *job, ptrdiff_t index, int thread);
    ptrdiff_t n_tasks;
    int backwards; /* best done from the last task to the first */
} bnfast_phase;

struct bnfast_job {
    const bnfast_kernels *kernels;
    bnfast_operation operation;
    ptrdiff_t outer, channels, inner; /* dense, in this order in memory */
    const void *x, *u;                /* (outer, channels, inner) IN; u: backward and jvp */
    const void *residual;             /* (outer, channels, inner) IN: added to y before the activation, or NULL */
    void *passed; /* (outer, channels, inner) OUT: u as the activation passes it; NULL: made again */
    unsigned char
        *marks; /* where the activation passes (marks.inc.h) OUT, 0 before, of a forward with a residual; backward: IN,
                           * and no residual is asked for; or NULL */
    ptrdiff_t first_mark; /* the first element's number OUT; backward: IN */
    void *out;            /* (outer, channels, inner) OUT; not for moments */
    int rectifies;        /* there is an activation of y, forward or backward: */
    bnfast_rectifier rectifier;
    bnfast_parameter gamma, beta;   /* left out: ones, zeros */
    bnfast_parameter vgamma, vbeta; /* left out: zeros; jvp */
    /* (channels,) IN, in place of mean, inv_std and var; or NULL */
    const float *narrow_mean, *narrow_inv_std, *narrow_var;
    const double *var; /* (channels,) IN; eval, NULL and no m2: inv_std is 1, so out = (x - mean) * gamma + beta */
    double eps;        /* forward and eval */
    double *mean, *inv_std, *m2; /* (channels,) OUT of forward (m2 may be NULL) and moments, IN elsewhere; eval: m2 IN
                                     * of the batch that `count` values a channel belong to, inv_std OUT, or both NULL */
    int exact;                   /* moments and forward: sums in float64 whatever the dtype */
    double *mean_rest;           /* (channels,) OUT of moments and forward: mean + mean_rest is the mean; IN of
                                       eval, backward and jvp; or NULL */
    double *dbeta, *dgamma;      /* (channels,) OUT of backward: sums of u and of u * x_hat; jvp: may be NULL;
                                       * IN of BNFAST_BACKWARD_APPLY */
    /* (channels,) OUT, the same rounded, in place of dbeta and dgamma, where those are not IN; or NULL */
    float *narrow_dbeta, *narrow_dgamma;
    double count;          /* values a channel that sums or m2 are of which are given */
    int *infinite;         /* OUT of eval, NULL: not asked for; set to 1 if x has an infinity */
    unsigned char *lifted; /* (channels,) OUT, 0 before: whose results are left times a power of two, for
                                     * BNFAST_LOWER (subnormal.c); NULL: none may be */
    int n_threads;         /* threads that will run the tasks, >= 1 */

    /* set by bnfast_plan */
    bnfast_plan_kind kind;
    ptrdiff_t n_segments;     /* a channel, or a column */
    int merges;               /* a channel has several of them, or several columns */
    ptrdiff_t segment_rows;   /* interleaved: folded rows; planar: rows of a channel, 1 where a row is cut */
    ptrdiff_t segment_length; /* planar: elements of a row in a segment */
    ptrdiff_t fold;           /* interleaved: rows seen as one, so that narrow rows fill vectors */
    ptrdiff_t block_channels;
    ptrdiff_t task_channels;        /* of the neighbouring blocks that a task does one after another */
    ptrdiff_t task_columns;         /* interleaved: of a segment that a task of the reduce phase takes */
    ptrdiff_t task_segments;        /* interleaved: that it takes one after another */
    ptrdiff_t coefficient_channels; /* that a task of the phase of coefficients makes */
    ptrdiff_t lead;                 /* interleaved: columns before the first that begins a cache line of `out` */
    int near;                       /* of what is summed as columns: nothing is asked for ahead */
    int pack;                       /* interleaved: copy a block's rows together while they are reduced */
    int written_later;              /* planar: a block is written while the next is reduced, in one loop */
    int asked_for;                  /* planar: else, the next block is brought into cache while one is written */
    int row_by_row;                 /* interleaved: see bnfast_columns */
    int in_order;                   /* planar: see bnfast_runs */
    ptrdiff_t apply_rows;           /* rows a task of the apply phase takes */
    int stream;                     /* write around the caches */
    ptrdiff_t scratch_bytes;
    ptrdiff_t workspace_bytes;
    int n_phases;
    bnfast_phase phases[4];

    /* set by the caller after bnfast_plan: workspace_bytes bytes, aligned to 64 */
    char *workspace;
};

ptrdiff_t bnfast_threads_worth(const bnfast_job *job); /* before the plan: how many threads the work is worth */
int bnfast_last_level_is_far(void);
void bnfast_plan(bnfast_job *job);
int bnfast_is_subnormal(const bnfast_job *job); /* whether a backward's u is in places, by some elements of it */
int bnfast_is_planar(const bnfast_job *job);    /* the layout that a plan is made for */

/* For tests: what plans choose from now on, -1: by themselves. A choice that a job cannot be run with is passed over.
 * No bit of a result depends on any. */
typedef struct {
    int kind, stream, near, pack, written_later, row_by_row, in_order;
} bnfast_choices;
void bnfast_force(const bnfast_choices *choices);

#endif
