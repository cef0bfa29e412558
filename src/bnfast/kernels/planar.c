/* The planar layout: (outer, channels, inner) with inner runs long enough for vectors.
 *
 * A channel is `outer` rows of `inner` elements, channels * inner apart. A segment is about SEGMENT elements of one
 * channel: a part of one row where rows are long, several rows where they are short. */

#include "block.h"

enum { SEGMENT = 4096 };

static ptrdiff_t least(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }

static ptrdiff_t row_stride(const bnfast_job *job) { return job->channels * job->inner; }

static ptrdiff_t pieces_of_row(const bnfast_job *job) { return (job->inner + job->segment_length - 1) / job->segment_length; }

/* Where segment s of a channel begins (row, column of the row), and its extent. */
static void segment(const bnfast_job *job, ptrdiff_t s, ptrdiff_t *row, ptrdiff_t *begin, ptrdiff_t *n_rows,
                    ptrdiff_t *length)
{
    const ptrdiff_t pieces = pieces_of_row(job);
    *row = s / pieces * job->segment_rows;
    *begin = s % pieces * job->segment_length;
    *n_rows = least(job->segment_rows, job->outer - *row);
    *length = least(job->segment_length, job->inner - *begin);
}

static double segment_count(const bnfast_job *job, ptrdiff_t s)
{
    ptrdiff_t row, begin, n_rows, length;
    segment(job, s, &row, &begin, &n_rows, &length);
    return (double)n_rows * (double)length;
}

static void reduce(const bnfast_job *job, const bnfast_block *block, ptrdiff_t s, ptrdiff_t i)
{
    ptrdiff_t row, begin, n_rows, length;
    segment(job, s, &row, &begin, &n_rows, &length);
    const ptrdiff_t offset =
        (row * row_stride(job) + (block->first + i) * job->inner + begin) * job->kernels->itemsize;
    double *a = block->a + s * block->width + i, *b = block->b + s * block->width + i;
    const void *center = (const char *)block->channel.center + i * job->kernels->itemsize;
    if (job->u)
        job->kernels->sums_planar((const char *)job->x + offset, (const char *)job->u + offset, n_rows, row_stride(job),
                                  length, center, a, b);
    else
        job->kernels->moments_planar((const char *)job->x + offset, n_rows, row_stride(job), length, center, a, b);
}

static void apply(const bnfast_job *job, const bnfast_block *block, ptrdiff_t i, ptrdiff_t row, ptrdiff_t begin,
                  ptrdiff_t n_rows, ptrdiff_t length)
{
    const ptrdiff_t offset =
        (row * row_stride(job) + (block->first + i) * job->inner + begin) * job->kernels->itemsize;
    const bnfast_coefficients c = bnfast_coefficients_at(job, &block->channel, i);
    const char *x = (const char *)(bnfast_maps_u_only(job) ? job->u : job->x) + offset;
    char *out = (char *)job->out + offset;
    if (bnfast_needs_gradient(job))
        job->kernels->gradient_planar(x, (const char *)job->u + offset, out, n_rows, row_stride(job), length, &c,
                                      job->stream);
    else
        job->kernels->normalize_planar(x, out, n_rows, row_stride(job), length, &c, job->stream);
}

static void finish(const bnfast_job *job, const bnfast_block *block, ptrdiff_t i, ptrdiff_t n)
{
    if (bnfast_reduces(job))
        bnfast_merge(job, block->a + i, block->b + i, block->width, n, 0, job->n_segments, segment_count);
    bnfast_finish(job, block, i, n);
}

/* All three steps for the index-th block of channels. */
static void block_task(const bnfast_job *job, ptrdiff_t index, int thread)
{
    const ptrdiff_t first = index * job->block_channels;
    const bnfast_block block =
        bnfast_block_in(job, job->workspace + thread * job->scratch_bytes, first,
                        least(job->block_channels, job->channels - first), 1);
    if (bnfast_reduces(job)) {
        bnfast_prepare(job, &block);
        for (ptrdiff_t i = 0; i < block.n; i++)
            for (ptrdiff_t s = 0; s < job->n_segments; s++)
                reduce(job, &block, s, i);
    }
    finish(job, &block, 0, block.n);
    if (bnfast_applies(job))
        for (ptrdiff_t i = 0; i < block.n; i++)
            apply(job, &block, i, 0, 0, job->outer, job->inner);
    if (job->stream)
        bnfast_stream_fence();
}

static bnfast_block whole(const bnfast_job *job) { return bnfast_block_in(job, job->workspace, 0, job->channels, 1); }

static void prepare_task(const bnfast_job *job, ptrdiff_t index, int thread)
{
    (void)index, (void)thread;
    const bnfast_block block = whole(job);
    bnfast_prepare(job, &block);
}

static void reduce_task(const bnfast_job *job, ptrdiff_t index, int thread)
{
    (void)thread;
    const bnfast_block block = whole(job);
    const ptrdiff_t s = index / job->channels, i = index % job->channels;
    reduce(job, &block, s, i);
}

static void finish_task(const bnfast_job *job, ptrdiff_t index, int thread)
{
    (void)index, (void)thread;
    const bnfast_block block = whole(job);
    finish(job, &block, 0, block.n);
}

/* Backwards: what was reduced last is still in cache. */
static void apply_task(const bnfast_job *job, ptrdiff_t index, int thread)
{
    (void)thread;
    const bnfast_block block = whole(job);
    index = job->n_segments * job->channels - 1 - index;
    const ptrdiff_t s = index / job->channels, i = index % job->channels;
    ptrdiff_t row, begin, n_rows, length;
    segment(job, s, &row, &begin, &n_rows, &length);
    apply(job, &block, i, row, begin, n_rows, length);
    if (job->stream)
        bnfast_stream_fence();
}

void bnfast_plan_planar(bnfast_job *job)
{
    const ptrdiff_t channel_bytes =
        job->outer * job->inner * job->kernels->itemsize * (job->u && bnfast_reduces(job) ? 2 : 1);
    job->fold = 1;
    job->segment_length = least(job->inner, SEGMENT);
    job->segment_rows = job->inner < SEGMENT ? SEGMENT / job->inner : 1;
    job->n_segments = (job->outer + job->segment_rows - 1) / job->segment_rows * pieces_of_row(job);

    job->merges = job->n_segments > 1;

    const int threads = job->n_threads;
    if (threads == 1 || job->channels % threads == 0 || job->channels >= 4 * threads) {
        ptrdiff_t n = bnfast_l2_bytes() / 4 / channel_bytes;
        n = least(n, threads == 1 ? job->channels : (job->channels + 4 * threads - 1) / (4 * threads));
        job->block_channels = n < 1 ? 1 : n;
        job->scratch_bytes = bnfast_block_bytes(job, job->block_channels, 1);
        job->workspace_bytes = job->scratch_bytes * threads;
        job->phases[job->n_phases++] =
            (bnfast_phase){block_task, (job->channels + job->block_channels - 1) / job->block_channels};
        return;
    }
    job->block_channels = job->channels;
    job->scratch_bytes = job->workspace_bytes = bnfast_block_bytes(job, job->channels, 1);
    if (bnfast_reduces(job)) {
        job->phases[job->n_phases++] = (bnfast_phase){prepare_task, 1};
        job->phases[job->n_phases++] = (bnfast_phase){reduce_task, job->n_segments * job->channels};
    }
    job->phases[job->n_phases++] = (bnfast_phase){finish_task, 1};
    if (bnfast_applies(job))
        job->phases[job->n_phases++] = (bnfast_phase){apply_task, job->n_segments * job->channels};
}
