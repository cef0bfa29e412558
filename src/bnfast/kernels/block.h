/* What the two layouts share: the scratch memory of a block, merging, and the arithmetic per channel. */

#ifndef BNFAST_BLOCK_H
#define BNFAST_BLOCK_H

#include "geometry.h"

/* Threads may do so at the same time. */
static inline void set_flag(int *flag)
{
#if defined(__GNUC__)
    __atomic_store_n(flag, 1, __ATOMIC_RELAXED);
#else
    *(volatile int *)flag = 1;
#endif
}

/* BACKWARDS: best from the last task to the first, as what the phase before ended with is still in cache. */
enum { FORWARDS, BACKWARDS };

static inline void add_phase(bnfast_job *job, void (*task)(const bnfast_job *, ptrdiff_t, int), ptrdiff_t n_tasks,
                             int backwards)
{
    const bnfast_phase phase = {task, n_tasks, backwards};
    job->phases[job->n_phases++] = phase;
}

/* Scratch of a block: `n` channels from `first` on, which are `width` columns.
 * a, b: (n_segments + 1, width); what the reductions give: mean less center and m2, or sums of u and of u * d. Merged,
 * they are row 0.
 * channel: coefficients a channel; column: coefficients a column (may be the same memory)
 * mean, inv_std, var, dbeta, dgamma: (n,) of the job's narrow ones, as float64; or NULL */
typedef struct {
    ptrdiff_t first, n, width;
    double *a, *b, *mean, *inv_std, *var, *dbeta, *dgamma;
    bnfast_coefficients channel, column;
    unsigned char *careful;    /* (n,) whether careful.c maps the channel; once its coefficients are made */
    void *packed_x, *packed_u; /* interleaved: (rows, width), what was reduced once more, lying together; or NULL */
} bnfast_block;

/* Bytes of a block's scratch, and the block laid out in it. columns: of one channel */
ptrdiff_t bnfast_block_bytes(const bnfast_job *job, ptrdiff_t n, ptrdiff_t columns);
bnfast_block bnfast_block_in(const bnfast_job *job, char *scratch, ptrdiff_t first, ptrdiff_t n, ptrdiff_t columns);

/* The coefficients from the j-th column on. */
bnfast_coefficients bnfast_coefficients_at(const bnfast_job *job, const bnfast_coefficients *c, ptrdiff_t j);

/* What the sums take of u, from the j-th channel or column and `offset` bytes of the data on. */
bnfast_passing bnfast_passing_at(const bnfast_job *job, const bnfast_coefficients *c, ptrdiff_t j, ptrdiff_t offset);

/* What a map marks, or goes by, from `offset` bytes of the data on. */
bnfast_marked bnfast_marked_at(const bnfast_job *job, ptrdiff_t offset);

/* Merges rows lo .. hi-1 of a and b, `stride` apart, for n columns, into row lo, as a tree in index order.
 * Row i stands for counts(job, i) values. Returns the count of all. */
double bnfast_merge(const bnfast_job *job, double *a, double *b, ptrdiff_t stride, ptrdiff_t n, ptrdiff_t lo,
                    ptrdiff_t hi, double (*counts)(const bnfast_job *job, ptrdiff_t i));

/* a, b <- merged with a2, b2, for n columns */
void bnfast_merge_pair(const bnfast_job *job, ptrdiff_t n, double count, double *a, double *b, double count2,
                       const double *a2, const double *b2);

/* Before the reductions: the centres they take, in the data's dtype, and y's coefficients where they meet an activation.
 * Narrow statistics are widened first; where nothing is reduced, by bnfast_make_coefficients. */
void bnfast_choose_centers(const bnfast_job *job, const bnfast_block *block);

/* From the merged reductions a[i], b[i] of the block's channels to the results a channel (mean, variance, inv_std;
 * dgamma, dbeta), and to its coefficients. Returns whether some lie at the edges of the dtype's range, or may be lifted
 * (0: none); none is careful yet. */
ptrdiff_t bnfast_make_coefficients(const bnfast_job *job, const bnfast_block *block, ptrdiff_t i, ptrdiff_t n);

/* Rounds the gradients of n channels from the block's i-th on to the job's narrow ones, if it has them. */
void bnfast_narrow_gradients(const bnfast_job *job, const bnfast_block *block, ptrdiff_t i, ptrdiff_t n);

/* Of the block's channels from the i-th on, as the leaves take them. */
bnfast_channels bnfast_channels_of(const bnfast_job *job, const bnfast_block *block, ptrdiff_t i);

/* careful.c: of n channels from the block's i-th on, some of which lie at the edges of the dtype's range, puts right the
 * statistics of those, and marks those whose map it has to do. x and u still have to be there. */
void bnfast_find_careful(const bnfast_job *job, const bnfast_block *block, ptrdiff_t i, ptrdiff_t n);
int bnfast_some_careful(const bnfast_block *block, ptrdiff_t i, ptrdiff_t n); /* whether any is marked */
/* Maps n elements of the block's i-th channel as a map with these flags does. x, u: IN; out,
 * marked->passed: OUT, may be x or u */
void bnfast_map_carefully(const bnfast_job *job, const bnfast_block *block, ptrdiff_t i, int flags, const void *x,
                          const void *u, void *out, const bnfast_marked *marked, ptrdiff_t n);

/* subnormal.c: where channels of n from the block's i-th on have a gamma so small that results would be subnormal, has their
 * map make those times a power of two, as job->lifted then says. Their coefficients are made. */
void bnfast_lift_channels(const bnfast_job *job, const bnfast_block *block, ptrdiff_t i, ptrdiff_t n);

/* Sets job->infinite if a value of the rows is infinite; nothing to do where it is NULL. For the apply step to call
 * just before its map, so that both find the rows in cache. x: (n_rows, length), rows `stride` apart IN */
void bnfast_note_infinity(const bnfast_job *job, const void *x, ptrdiff_t n_rows, ptrdiff_t stride, ptrdiff_t length);

/* The phases of a job whose plan is made otherwise, and the workspace they need. */
void bnfast_planar_phases(bnfast_job *job);
void bnfast_interleaved_phases(bnfast_job *job);
void bnfast_floor_phases(bnfast_job *job);
void bnfast_lift_phases(bnfast_job *job);

#endif
