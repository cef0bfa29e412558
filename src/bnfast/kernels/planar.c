/* The planar layout: (outer, channels, inner) with inner runs long enough for vectors.
 *
 * A channel is `outer` rows of `inner` elements, channels * inner apart. A segment is about SEGMENT elements of one
 * channel: a part of one row where rows are long, several rows where they are short.
 *
 * What bounds the speed is memory, which reads and writes at the same time if it is asked to: so while a block of
 * channels is written, the next one is read. */

#include "block.h"

/* Elements of a segment: many, as each costs a division or two; fewer for float64, whose sums have nothing wider to
 * go to.
 * TASKS: a thread, where there are enough channels. SWEEP: elements of a task where the channels do not matter.
 * LONG_ROW: bytes of a row that is read fast by itself. */
enum { SEGMENT = 16384, SEGMENT_F64 = 4096, TASKS = 4, SWEEP = 1 << 16, LONG_ROW = 3584, PENDING_BYTES = 256 };

static ptrdiff_t row_stride(const bnfast_job *job) { return job->channels * job->inner; }

static ptrdiff_t pieces_of_row(const bnfast_job *job) { return quotient_up(job->inner, job->segment_length); }

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

/* Segment s of n channels from the block's i-th on; `writer` goes on meanwhile, or NULL. */
static void reduce(const bnfast_job *job, const bnfast_block *block, ptrdiff_t s, ptrdiff_t i, ptrdiff_t n,
                   bnfast_writer *writer)
{
    ptrdiff_t row, begin, next_row, next_begin, unused;
    bnfast_runs runs = {.stride = row_stride(job), .n_channels = n};
    segment(job, s, &row, &begin, &runs.n_rows, &runs.length);
    const ptrdiff_t from = row * row_stride(job) + begin;
    ptrdiff_t next = n * job->inner - from; /* the channels behind these, if this was their last segment */
    if (s + 1 < job->n_segments) {
        segment(job, s + 1, &next_row, &next_begin, &unused, &unused);
        next = next_row * row_stride(job) + next_begin - from;
    }
    const ptrdiff_t size = job->kernels->itemsize, offset = (from + (block->first + i) * job->inner) * size;
    double *a = block->a + s * block->width + i, *b = block->b + s * block->width + i;
    const void *center = (const char *)block->channel.center + i * size;
    if (job->u)
        job->kernels->sums_planar((const char *)job->x + offset, (const char *)job->u + offset, &runs, next, center, a,
                                  b);
    else
        job->kernels->moments_planar((const char *)job->x + offset, &runs, next, center, a, b, writer);
}

/* Writes n_rows rows from `row` on, of n_channels channels from the block's i-th on; of one channel perhaps only
 * `length` elements from `begin` on. It has not begun; the block has to stay until it is done. */
static bnfast_writer writer_of(const bnfast_job *job, const bnfast_block *block, ptrdiff_t i, ptrdiff_t n_channels,
                               ptrdiff_t row, ptrdiff_t n_rows, ptrdiff_t begin, ptrdiff_t length)
{
    const ptrdiff_t offset = (row * row_stride(job) + (block->first + i) * job->inner + begin) * job->kernels->itemsize;
    bnfast_writer writer = {
        .x = (const char *)job->x + offset,
        .u = job->u ? (const char *)job->u + offset : NULL,
        .out = (char *)job->out + offset,
        .runs = {n_rows, row_stride(job), n_channels, length},
        .coefficients = bnfast_coefficients_at(job, &block->channel, i),
        .gradient = bnfast_needs_gradient(job),
        .stream = job->stream,
    };
    if (bnfast_maps_u_only(job))
        writer.x = writer.u;
    if (!writer.gradient)
        writer.u = writer.x;
    return writer;
}

static void finish(const bnfast_job *job, const bnfast_block *block, ptrdiff_t i, ptrdiff_t n)
{
    if (bnfast_reduces(job))
        bnfast_merge(job, block->a + i, block->b + i, block->width, n, 0, job->n_segments, segment_count);
    bnfast_finish(job, block, i, n);
}

/* Whether a block is written while the next is reduced, in one loop. The backward pass, two arrays to read for one to
 * write, and short rows, read best in the order of memory, are faster if the next block is asked for while this one is
 * written. */
static int writes_later(const bnfast_job *job)
{
    return bnfast_applies(job) && job->u == NULL && job->inner * job->kernels->itemsize >= LONG_ROW;
}

/* What a thread has reduced but not written yet, and which half of its scratch the next block gets. */
typedef struct {
    bnfast_writer writer;
    int active, odd;
} pending;
_Static_assert(sizeof(pending) <= PENDING_BYTES, "it has its place before a thread's scratch");

/* Bytes before a thread's scratch. */
static ptrdiff_t pending_bytes(const bnfast_job *job) { return writes_later(job) ? PENDING_BYTES : 0; }

static pending *pending_of(const bnfast_job *job, ptrdiff_t thread)
{
    return (pending *)(job->workspace + thread * job->scratch_bytes);
}

static void write_pending(const bnfast_job *job, pending *p)
{
    if (p->active)
        job->kernels->write_rest(&p->writer);
    p->active = 0;
}

static void begin_task(const bnfast_job *job, ptrdiff_t index, int thread)
{
    (void)index, (void)thread;
    for (int t = 0; t < job->n_threads; t++)
        pending_of(job, t)->active = pending_of(job, t)->odd = 0;
}

/* The steps for channels first .. first+n-1, but perhaps for the last. `next`: whether those behind them come next */
static void do_block(const bnfast_job *job, ptrdiff_t first, ptrdiff_t n, int next, int thread, pending *p)
{
    char *scratch = job->workspace + thread * job->scratch_bytes + pending_bytes(job);
    scratch += p->odd * ((job->scratch_bytes - pending_bytes(job)) / 2);
    const bnfast_block block = bnfast_block_in(job, scratch, first, n, 1);
    bnfast_writer *writer = p->active ? &p->writer : NULL;
    bnfast_prepare(job, &block);
    const ptrdiff_t together = job->segment_length == job->inner ? n : 1; /* channels; of cut rows one after another */
    for (ptrdiff_t i = 0; i < n; i += together)
        for (ptrdiff_t s = 0; s < job->n_segments; s++)
            reduce(job, &block, s, i, together, writer);
    if (writer)
        job->kernels->write_rest(writer);
    finish(job, &block, 0, n);
    if (!bnfast_applies(job))
        return;
    p->writer = writer_of(job, &block, 0, n, 0, job->outer, 0, job->inner);
    p->active = 1;
    if (writes_later(job))
        p->odd = !p->odd;
    else {
        p->writer.ahead = next ? n * job->inner : 0;
        write_pending(job, p);
    }
}

/* Some neighbouring blocks. */
static void blocks_task(const bnfast_job *job, ptrdiff_t index, int thread)
{
    const ptrdiff_t begin = index * job->task_channels, end = least(begin + job->task_channels, job->channels);
    pending nothing = {.active = 0}, *const p = writes_later(job) ? pending_of(job, thread) : &nothing;
    for (ptrdiff_t first = begin; first < end; first += job->block_channels) {
        const ptrdiff_t n = least(job->block_channels, end - first);
        do_block(job, first, n, first + n < end, thread, p);
    }
    if (job->stream)
        bnfast_stream_fence();
}

/* What the threads have left. */
static void pending_task(const bnfast_job *job, ptrdiff_t index, int thread)
{
    (void)thread;
    write_pending(job, pending_of(job, index));
    if (job->stream)
        bnfast_stream_fence();
}

/* The array cut into about SWEEP neighbouring elements each: several rows; several channels of one row; or a piece of
 * one channel's row. */
typedef struct {
    ptrdiff_t n_rows, n_channels, length; /* of a task */
    ptrdiff_t parts, pieces;              /* of channels in a row, of a channel's row */
} sweep;

static ptrdiff_t at_least_one(ptrdiff_t n) { return n < 1 ? 1 : n; }

static sweep sweep_of(const bnfast_job *job)
{
    sweep s;
    s.length = least(job->inner, SWEEP);
    s.n_channels = least(job->channels, at_least_one(SWEEP / job->inner));
    s.n_rows = s.n_channels < job->channels || s.length < job->inner ? 1 : at_least_one(SWEEP / row_stride(job));
    s.parts = quotient_up(job->channels, s.n_channels);
    s.pieces = quotient_up(job->inner, s.length);
    return s;
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
    /* in the order of memory: rows, channels, pieces of a row */
    const ptrdiff_t pieces = pieces_of_row(job), i = index / pieces % job->channels;
    const ptrdiff_t s = index / pieces / job->channels * pieces + index % pieces;
    reduce(job, &block, s, i, 1, NULL);
}

static void finish_task(const bnfast_job *job, ptrdiff_t index, int thread)
{
    (void)index, (void)thread;
    const bnfast_block block = whole(job);
    finish(job, &block, 0, block.n);
}

/* In the order of memory, whatever the channels. */
static void apply_task(const bnfast_job *job, ptrdiff_t index, int thread)
{
    (void)thread;
    const bnfast_block block = whole(job);
    const sweep s = sweep_of(job);
    const ptrdiff_t begin = index % s.pieces * s.length, i = index / s.pieces % s.parts * s.n_channels,
                    row = index / s.pieces / s.parts * s.n_rows;
    bnfast_writer writer = writer_of(job, &block, i, least(s.n_channels, job->channels - i), row,
                                     least(s.n_rows, job->outer - row), begin, least(s.length, job->inner - begin));
    bnfast_note_infinity(job, writer.x, writer.runs.n_rows, writer.runs.stride,
                         writer.runs.n_channels * writer.runs.length);
    job->kernels->write_rest(&writer);
    if (job->stream)
        bnfast_stream_fence();
}

/* Blocks keep their channels in L2, and what comes next: a quarter each, as more displaces itself (measured: half
 * of L2 took up to 1.2 times as long). */
static void plan_blocks(bnfast_job *job, ptrdiff_t channel_bytes)
{
    const int threads = job->n_threads;
    const ptrdiff_t share = threads == 1 ? job->channels : quotient_up(job->channels, TASKS * threads);
    const ptrdiff_t n = least(bnfast_l2_bytes() / 4 / channel_bytes, share);
    job->block_channels = n < 1 ? 1 : n;
    job->task_channels = share / job->block_channels * job->block_channels;
    job->scratch_bytes =
        pending_bytes(job) + (writes_later(job) ? 2 : 1) * bnfast_block_bytes(job, job->block_channels, 1);
    job->workspace_bytes = job->scratch_bytes * threads;
    if (writes_later(job))
        add_phase(job, begin_task, 1, FORWARDS);
    add_phase(job, blocks_task, quotient_up(job->channels, job->task_channels), FORWARDS);
    if (writes_later(job))
        add_phase(job, pending_task, threads, FORWARDS);
}

/* Few channels, or nothing to reduce: each step for the whole array. */
static void plan_phases(bnfast_job *job)
{
    job->block_channels = job->channels;
    job->scratch_bytes = job->workspace_bytes = bnfast_block_bytes(job, job->channels, 1);
    if (bnfast_reduces(job)) {
        add_phase(job, prepare_task, 1, FORWARDS);
        add_phase(job, reduce_task, job->n_segments * job->channels, FORWARDS);
    }
    add_phase(job, finish_task, 1, FORWARDS);
    if (bnfast_applies(job)) {
        const sweep s = sweep_of(job);
        add_phase(job, apply_task, s.pieces * s.parts * quotient_up(job->outer, s.n_rows), FORWARDS);
    }
}

void bnfast_plan_planar(bnfast_job *job)
{
    job->fold = 1;
    const ptrdiff_t elements = job->kernels->itemsize == 4 ? SEGMENT : SEGMENT_F64;
    job->segment_length = least(job->inner, elements);
    job->segment_rows = job->inner < elements ? elements / job->inner : 1;
    job->n_segments = quotient_up(job->outer, job->segment_rows) * pieces_of_row(job);
    job->merges = job->n_segments > 1;

    const int threads = job->n_threads;
    if (bnfast_reduces(job) && (threads == 1 || job->channels % threads == 0 || job->channels >= 4 * threads))
        plan_blocks(job, job->outer * job->inner * job->kernels->itemsize * (job->u ? 2 : 1));
    else
        plan_phases(job);
}
