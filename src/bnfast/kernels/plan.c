/* The plan of a job: what one leaf call reduces (segments), what a task does, and in which order. The one place that
 * knows of the sizes of caches and the number of threads and decides by them; planar.c and interleaved.c then make the
 * tasks.
 *
 * Segments depend on the shape and the dtype alone, as the bits of a result depend on them. All else here only moves
 * work about. */

#include "block.h"

#include <stdint.h>

/* Shorter runs than this do not fill vectors: their elements are taken as columns. */
enum { PLANAR_INNER = 16 };

/* ---- planar ------------------------------------------------------------------------------------------------------ */

/* Elements of a segment: many, as each costs a division or two; fewer for float64, whose sums have nothing wider to
 * go to. LONG_ROW: bytes of a row that is read fast by itself. TASKS: a thread, where there are enough channels. */
enum { SEGMENT = 16384, SEGMENT_F64 = 4096, LONG_ROW = 3584, PLANAR_TASKS = 4 };

static void cut_planar_segments(bnfast_job *job)
{
    const ptrdiff_t elements = job->kernels->itemsize == 4 ? SEGMENT : SEGMENT_F64;
    job->fold = 1;
    job->segment_length = least(job->inner, elements);
    job->segment_rows = job->inner < elements ? elements / job->inner : 1;
    job->n_segments = quotient_up(job->outer, job->segment_rows) * pieces_of_row(job);
    job->merges = job->n_segments > 1;
}

/* Whether a block is written while the next is reduced, in one loop. The backward pass, two arrays to read for one to
 * write, and short rows, read best in the order of memory, are faster if the next block is asked for while this one is
 * written. */
static int is_written_later(const bnfast_job *job)
{
    return applies(job) && job->u == NULL && job->inner * job->kernels->itemsize >= LONG_ROW;
}

/* Blocks keep their channels in L2, and what comes next: a quarter each, as more displaces itself (measured: half
 * of L2 took up to 1.2 times as long). With few channels, or nothing to reduce: each step for the whole array. */
static void choose_planar(bnfast_job *job)
{
    const int threads = job->n_threads;
    job->block_channels = job->channels;
    if (!reduces(job) || !(threads == 1 || job->channels % threads == 0 || job->channels >= 4 * threads))
        return;
    const ptrdiff_t channel_bytes = job->outer * job->inner * job->kernels->itemsize * arrays_read(job);
    const ptrdiff_t share = threads == 1 ? job->channels : quotient_up(job->channels, PLANAR_TASKS * threads);
    job->kind = BNFAST_BLOCKS;
    job->block_channels = most(1, least(bnfast_l2_bytes() / 4 / channel_bytes, share));
    job->task_channels = share / job->block_channels * job->block_channels;
    job->written_later = is_written_later(job);
}

/* ---- interleaved ------------------------------------------------------------------------------------------------- */

enum {
    SEGMENT_ROWS = 256,
    FOLD_COLUMNS = 64,
    BLOCK_BYTES = 256,    /* of a row that a block of columns has at least */
    INTERLEAVED_TASKS = 2 /* a thread, where there are enough blocks */
};

static void cut_interleaved_segments(bnfast_job *job)
{
    job->fold = 1;
    while (job->fold * period(job) < FOLD_COLUMNS && job->outer >= job->fold * FOLD_COLUMNS)
        job->fold *= 2;
    job->segment_rows = SEGMENT_ROWS;
    job->segment_length = 1;
    job->n_segments = quotient_up(folded_rows(job), SEGMENT_ROWS);
    job->merges = job->n_segments > 1 || columns_of_channel(job) > 1;
}

/* Channels of a block all rows of which stay in L2 when they lie together; whole cache lines of columns. 0: too few, or
 * the whole array stays in the last-level cache between reduction and map, which is faster. */
static ptrdiff_t channels_of_block(const bnfast_job *job)
{
    const ptrdiff_t size = job->kernels->itemsize, line = 64 / size;
    const ptrdiff_t channel_bytes = job->outer * job->inner * size * arrays_read(job);
    ptrdiff_t n = bnfast_l2_bytes() / 2 / channel_bytes / line * line;
    if (job->fold > 1 || period(job) % line != 0 ||
        (applies(job) && channel_bytes * job->channels <= bnfast_last_level_bytes() / 2))
        return 0;
    n = least(n, job->channels / (INTERLEAVED_TASKS * job->n_threads) / line * line);
    return n * job->inner * size < BLOCK_BYTES ? 0 : n;
}

static void choose_interleaved(bnfast_job *job)
{
    ptrdiff_t n = 0;
    job->block_channels = job->channels;
    job->near = bytes_of_array(job) * arrays_read(job) <= bnfast_l2_bytes() / 2 * job->n_threads;
    if (!reduces(job))
        return;
    if (job->n_threads == 1 && bytes_of_array(job) * arrays_read(job) <= bnfast_l2_bytes() / 2)
        n = job->task_channels = job->channels;
    else {
        n = channels_of_block(job);
        job->pack = n > 0 && applies(job);
        job->task_channels = n > 0 ? n * quotient_up(job->channels / n, INTERLEAVED_TASKS * job->n_threads) : 0;
        if (n > 0 && job->inner == 1 && applies(job))
            job->lead = (ptrdiff_t)(-(uintptr_t)job->out % 64) / job->kernels->itemsize;
    }
    if (n > 0) {
        job->kind = BNFAST_BLOCKS;
        job->block_channels = n;
    }
}

/* ---- both -------------------------------------------------------------------------------------------------------- */

/* What a call writes first is gone from the last-level cache by its end if the call touches more than that. What is
 * reduced is read again and should not be displaced meanwhile, and interleaved rows that do not come from cache are
 * best read as one stream: half of the cache then. */
static int is_streamed(const bnfast_job *job, int planar)
{
    const ptrdiff_t arrays = arrays_read(job) + 1, room = bnfast_last_level_bytes() / (planar && !reduces(job) ? 1 : 2);
    return applies(job) && job->out != job->x && job->out != job->u && arrays * bytes_of_array(job) >= room;
}

void bnfast_plan(bnfast_job *job)
{
    job->n_phases = 0;
    job->kind = BNFAST_PHASES;
    if (job->operation == BNFAST_FLOOR) {
        bnfast_floor_phases(job);
        return;
    }
    const int planar = job->inner >= PLANAR_INNER;
    job->stream = is_streamed(job, planar);
    if (planar) {
        cut_planar_segments(job);
        choose_planar(job);
        bnfast_planar_phases(job);
    } else {
        cut_interleaved_segments(job);
        choose_interleaved(job);
        bnfast_interleaved_phases(job);
    }
}
