/* The memory floor: what no forward (read x, write out) and no backward (read x and u, write out) can beat. A copy, or
 * a sum of two arrays, with streaming stores and nothing else; for benchmarks to measure against. */

#include "block.h"

enum { TASK_BYTES = 1 << 18 };

static void floor_task(const bnfast_job *job, ptrdiff_t index, int thread)
{
    (void)thread;
    const ptrdiff_t begin = index * TASK_BYTES, left = bytes_of_array(job) - begin;
    const ptrdiff_t n = least(left, TASK_BYTES) / job->kernels->itemsize;
    const char *u = job->u ? (const char *)job->u + begin : NULL;
    job->kernels->floor((const char *)job->x + begin, u, (char *)job->out + begin, n);
    bnfast_stream_fence();
}

void bnfast_floor_phases(bnfast_job *job)
{
    job->workspace_bytes = 0;
    add_phase(job, floor_task, quotient_up(bytes_of_array(job), TASK_BYTES), FORWARDS);
}
