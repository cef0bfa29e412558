/* The planar layout: (outer, channels, inner) with inner runs long enough for vectors.
 *
 * A channel is `outer` rows of `inner` elements, channels * inner apart. A segment is about SEGMENT elements of one
 * channel: a part of one row where rows are long, several rows where they are short.
 *
 * What bounds the speed is memory, which reads and writes at the same time if it is asked to: so while a block of
 * channels is written, the next one is read. */

#include "block.h"

/* SWEEP: elements of a task where the channels do not matter. REDUCE_BYTES: of a row, that a task reduces at least. */
enum { SWEEP = 1 << 16, REDUCE_BYTES = 4096, PENDING_BYTES = 256 };

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
    bnfast_runs runs = {.stride = period(job), .n_channels = n, .near = job->near, .in_order = job->in_order};
    segment(job, s, &row, &begin, &runs.n_rows, &runs.length);
    const ptrdiff_t from = row * period(job) + begin;
    ptrdiff_t next = n * job->inner - from; /* the channels behind these, if this was their last segment */
    if (s + 1 < job->n_segments) {
        segment(job, s + 1, &next_row, &next_begin, &unused, &unused);
        next = next_row * period(job) + next_begin - from;
    }
    const ptrdiff_t size = job->kernels->itemsize, offset = (from + (block->first + i) * job->inner) * size;
    double *a = block->a + s * block->width + i, *b = block->b + s * block->width + i;
    const void *center = (const char *)block->channel.center + i * job->kernels->coefficient_size;
    const bnfast_passing passing = bnfast_passing_at(job, &block->channel, i, offset);
    if (job->u)
        job->kernels->sums_planar((const char *)job->x + offset, (const char *)job->u + offset, &runs, next, center,
                                  passes(job) ? &passing : NULL, a, b, writer);
    else
        (job->exact ? job->kernels->exact_moments_planar
                    : job->kernels->moments_planar)((const char *)job->x + offset, &runs, next, center, a, b, writer);
}

/* Writes n_rows rows from `row` on, of n_channels channels from the block's i-th on; of one channel perhaps only
 * `length` elements from `begin` on. It has not begun; the block has to stay until it is done. */
static bnfast_writer writer_of(const bnfast_job *job, const bnfast_block *block, ptrdiff_t i, ptrdiff_t n_channels,
                               ptrdiff_t row, ptrdiff_t n_rows, ptrdiff_t begin, ptrdiff_t length)
{
    const ptrdiff_t offset = (row * period(job) + (block->first + i) * job->inner + begin) * job->kernels->itemsize;
    const void *const beside = mapped_beside(job);
    bnfast_writer writer = {
        .x = (const char *)(maps_u_only(job) ? beside : job->x) + offset,
        .out = (char *)job->out + offset,
        .marked = bnfast_marked_at(job, offset),
        .runs = {.n_rows = n_rows, .stride = period(job), .n_channels = n_channels, .length = length},
        .coefficients = bnfast_coefficients_at(job, &block->channel, i),
        .map = map_flags(job),
        .stream = job->stream,
    };
    writer.u = beside ? (const char *)beside + offset : writer.x;
    return writer;
}

/* The same, at once; channels at the edges of the range by themselves. */
static void write_all(const bnfast_job *job, const bnfast_block *block, ptrdiff_t i, ptrdiff_t n_channels,
                      ptrdiff_t row, ptrdiff_t n_rows, ptrdiff_t begin, ptrdiff_t length)
{
    for (ptrdiff_t behind, end = i + n_channels; i < end; i = behind) {
        for (behind = i + 1; behind < end && !block->careful[i] && !block->careful[behind]; behind++)
            ;
        bnfast_writer writer = writer_of(job, block, i, behind - i, row, n_rows, begin, length);
        if (!block->careful[i])
            job->kernels->write_rest(&writer);
        else
            for (ptrdiff_t r = 0; r < n_rows; r++) {
                const ptrdiff_t offset = r * period(job) * job->kernels->itemsize;
                const bnfast_marked marked =
                    bnfast_marked_at(job, (const char *)writer.out + offset - (char *)job->out);
                bnfast_map_carefully(job, block, i, writer.map, (const char *)writer.x + offset,
                                     (const char *)writer.u + offset, (char *)writer.out + offset, &marked, length);
            }
    }
}

static void merge_and_make(const bnfast_job *job, const bnfast_block *block, ptrdiff_t i, ptrdiff_t n)
{
    if (reduces(job))
        bnfast_merge(job, block->a + i, block->b + i, block->width, n, 0, job->n_segments, segment_count);
    if (bnfast_make_coefficients(job, block, i, n) > 0)
        bnfast_find_careful(job, block, i, n);
    bnfast_narrow_gradients(job, block, i, n);
}

/* What a thread has reduced but not written yet, and which half of its scratch the next block gets. */
typedef struct {
    bnfast_writer writer;
    int active, odd;
} pending;
_Static_assert(sizeof(pending) <= PENDING_BYTES, "it has its place before a thread's scratch");

/* Bytes before a thread's scratch. */
static ptrdiff_t pending_bytes(const bnfast_job *job) { return job->written_later ? PENDING_BYTES : 0; }

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
    bnfast_choose_centers(job, &block);
    const ptrdiff_t together = job->segment_length == job->inner ? n : 1; /* channels; of cut rows one after another */
    for (ptrdiff_t i = 0; i < n; i += together)
        for (ptrdiff_t s = 0; s < job->n_segments; s++)
            reduce(job, &block, s, i, together, writer);
    if (writer)
        job->kernels->write_rest(writer);
    merge_and_make(job, &block, 0, n);
    if (!applies(job))
        return;
    p->active = 0;
    if (bnfast_some_careful(&block, 0, n)) {
        write_all(job, &block, 0, n, 0, job->outer, 0, job->inner);
        return;
    }
    p->writer = writer_of(job, &block, 0, n, 0, job->outer, 0, job->inner);
    p->active = 1;
    if (job->written_later)
        p->odd = !p->odd;
    else {
        p->writer.ahead = next && job->asked_for ? n * job->inner : 0;
        write_pending(job, p);
    }
}

/* Some neighbouring blocks. */
static void blocks_task(const bnfast_job *job, ptrdiff_t index, int thread)
{
    const ptrdiff_t begin = index * job->task_channels, end = least(begin + job->task_channels, job->channels);
    pending nothing = {.active = 0}, *const p = job->written_later ? pending_of(job, thread) : &nothing;
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
    s.n_rows = s.n_channels < job->channels || s.length < job->inner ? 1 : at_least_one(SWEEP / period(job));
    s.parts = quotient_up(job->channels, s.n_channels);
    s.pieces = quotient_up(job->inner, s.length);
    return s;
}

static bnfast_block whole(const bnfast_job *job) { return bnfast_block_in(job, job->workspace, 0, job->channels, 1); }

static void centers_task(const bnfast_job *job, ptrdiff_t index, int thread)
{
    (void)index, (void)thread;
    const bnfast_block block = whole(job);
    bnfast_choose_centers(job, &block);
}

/* Channels that a task of the reduce phase takes: so many that their part of a row is read well. */
static ptrdiff_t channels_together(const bnfast_job *job)
{
    return least(job->channels, at_least_one(REDUCE_BYTES / (job->inner * job->kernels->itemsize)));
}

static void reduce_task(const bnfast_job *job, ptrdiff_t index, int thread)
{
    (void)thread;
    const bnfast_block block = whole(job);
    /* in the order of memory: rows, channels, pieces of a row */
    const ptrdiff_t pieces = pieces_of_row(job), n = channels_together(job), groups = quotient_up(job->channels, n);
    const ptrdiff_t i = index / pieces % groups * n, s = index / pieces / groups * pieces + index % pieces;
    reduce(job, &block, s, i, least(n, job->channels - i), NULL);
}

static void coefficients_task(const bnfast_job *job, ptrdiff_t index, int thread)
{
    (void)thread;
    const bnfast_block block = whole(job);
    const ptrdiff_t i = index * job->coefficient_channels;
    merge_and_make(job, &block, i, least(job->coefficient_channels, block.n - i));
}

/* In the order of memory, whatever the channels. */
static void apply_task(const bnfast_job *job, ptrdiff_t index, int thread)
{
    (void)thread;
    const bnfast_block block = whole(job);
    const sweep s = sweep_of(job);
    const ptrdiff_t begin = index % s.pieces * s.length, i = index / s.pieces % s.parts * s.n_channels,
                    row = index / s.pieces / s.parts * s.n_rows;
    const ptrdiff_t n = least(s.n_channels, job->channels - i), n_rows = least(s.n_rows, job->outer - row);
    const ptrdiff_t length = least(s.length, job->inner - begin);
    bnfast_writer writer = writer_of(job, &block, i, n, row, n_rows, begin, length);
    bnfast_note_infinity(job, writer.x, n_rows, writer.runs.stride, n * length);
    if (bnfast_some_careful(&block, i, n))
        write_all(job, &block, i, n, row, n_rows, begin, length);
    else
        job->kernels->write_rest(&writer);
    if (job->stream)
        bnfast_stream_fence();
}

static void blocks_phases(bnfast_job *job)
{
    const int threads = job->n_threads;
    job->scratch_bytes =
        pending_bytes(job) + (job->written_later ? 2 : 1) * bnfast_block_bytes(job, job->block_channels, 1);
    job->workspace_bytes = job->scratch_bytes * threads;
    if (job->written_later)
        add_phase(job, begin_task, 1, FORWARDS);
    add_phase(job, blocks_task, quotient_up(job->channels, job->task_channels), FORWARDS);
    if (job->written_later)
        add_phase(job, pending_task, threads, FORWARDS);
}

/* Each step for the whole array. */
static void steps_phases(bnfast_job *job)
{
    job->scratch_bytes = job->workspace_bytes = bnfast_block_bytes(job, job->channels, 1);
    if (reduces(job)) {
        add_phase(job, centers_task, 1, FORWARDS);
        add_phase(job, reduce_task, job->n_segments * quotient_up(job->channels, channels_together(job)), FORWARDS);
    }
    add_phase(job, coefficients_task, quotient_up(job->channels, job->coefficient_channels), FORWARDS);
    if (applies(job)) {
        const sweep s = sweep_of(job);
        add_phase(job, apply_task, s.pieces * s.parts * quotient_up(job->outer, s.n_rows), FORWARDS);
    }
}

void bnfast_planar_phases(bnfast_job *job)
{
    if (job->kind == BNFAST_BLOCKS)
        blocks_phases(job);
    else
        steps_phases(job);
}
