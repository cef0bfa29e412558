/* Arrays times a power of two, and back (subnormal.c says why): in parts, on all threads. */

#include "block.h"

#include <stdint.h>
#include <string.h>

enum { TASK_BYTES = 1 << 17, LONG = 16 /* elements of a channel that lie together: worth a call */ };

static void lift_task(const bnfast_job *job, ptrdiff_t index, int thread)
{
    (void)thread;
    const ptrdiff_t begin = index * TASK_BYTES, n = least(bytes_of_array(job) - begin, TASK_BYTES);
    if (job->kernels->lift(n / job->kernels->itemsize, (const char *)job->x + begin, (char *)job->out + begin))
        set_flag(job->infinite);
}

static void lower_task(const bnfast_job *job, ptrdiff_t index, int thread)
{
    (void)thread;
    const ptrdiff_t begin = index * TASK_BYTES, n = least(bytes_of_array(job) - begin, TASK_BYTES);
    if (job->kernels->lower((char *)job->out + begin, 1, 0, n / job->kernels->itemsize, NULL) && job->infinite)
        set_flag(job->infinite);
}

static ptrdiff_t rows_of_task(const bnfast_job *job)
{
    return quotient_up(TASK_BYTES, period(job) * job->kernels->itemsize);
}

static void lower_columns_task(const bnfast_job *job, ptrdiff_t index, int thread)
{
    (void)thread;
    enum { COLUMNS = 512 };
    const ptrdiff_t row = index * rows_of_task(job), n_rows = least(rows_of_task(job), job->outer - row);
    const ptrdiff_t size = job->kernels->itemsize;
    union {
        int64_t wide[COLUMNS];
        int32_t narrow[COLUMNS];
    } which; /* for each column a number of the data's size, with all its bits or none */
    for (ptrdiff_t j = 0, n; j < period(job); j += n) {
        n = least(period(job) - j, COLUMNS);
        for (ptrdiff_t k = 0; k < n; k++) {
            const int lifted = job->lifted[job->inner == 1 ? j + k : (j + k) / job->inner];
            if (size == 8)
                which.wide[k] = -lifted;
            else
                which.narrow[k] = -lifted;
        }
        job->kernels->lower((char *)job->out + (row * period(job) + j) * size, n_rows, period(job), n, &which);
    }
}

static void lower_channels_task(const bnfast_job *job, ptrdiff_t index, int thread)
{
    (void)thread;
    const ptrdiff_t row = index * rows_of_task(job), n_rows = least(rows_of_task(job), job->outer - row);
    for (ptrdiff_t i = 0, behind; i < job->channels; i = behind) {
        for (behind = i + 1; behind < job->channels && job->lifted[behind] == job->lifted[i]; behind++)
            ;
        if (job->lifted[i])
            job->kernels->lower((char *)job->out + (row * period(job) + i * job->inner) * job->kernels->itemsize,
                                n_rows, period(job), (behind - i) * job->inner, NULL);
    }
}

void bnfast_lift_phases(bnfast_job *job)
{
    const int lifts = job->operation == BNFAST_LIFT;
    job->workspace_bytes = 0;
    if (lifts || job->lifted == NULL || memchr(job->lifted, 0, (size_t)job->channels) == NULL)
        add_phase(job, lifts ? lift_task : lower_task, quotient_up(bytes_of_array(job), TASK_BYTES), FORWARDS);
    else
        add_phase(job, job->inner >= LONG ? lower_channels_task : lower_columns_task,
                  quotient_up(job->outer, rows_of_task(job)), FORWARDS);
}
