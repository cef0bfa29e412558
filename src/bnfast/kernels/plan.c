/* The plan of a job: what one leaf call reduces (segments), what a task does, and in which order. The one place that
 * knows of the sizes of caches and the number of threads and decides by them; planar.c and interleaved.c then make the
 * tasks.
 *
 * Segments depend on the shape and on the dtypes of data and sums alone, as the bits of a result depend on them. All
 * else here only moves work about. */

#include "block.h"

#include <stdint.h>

/* Shorter runs than this do not fill vectors: their elements are taken as columns. */
enum { PLANAR_INNER = 16 };

/* Of a last level that is said to be larger others have their part. */
enum { MOST_LAST_LEVEL = 96 << 20 };

/* What lies a multiple of this apart shares a set of L1, 8 or 12 lines. */
enum { L1_WAY_BYTES = 4096 };

static ptrdiff_t believed_last_level(void) { return least(bnfast_last_level_bytes(), MOST_LAST_LEVEL); }

/* Whether it is slow to read twice from, and what one core has written slow to reach another: it is said to be larger. */
int bnfast_last_level_is_far(void) { return bnfast_last_level_bytes() > MOST_LAST_LEVEL; }

static bnfast_choices forced = {-1, -1, -1, -1, -1, -1, -1};

void bnfast_force(const bnfast_choices *choices) { forced = *choices; }

static int choice(int forced_one, int own) { return forced_one < 0 ? own : forced_one; }

/* Whether the arrays of a call fill half of the last level of cache, so that what is read or written first is gone from it by
 * the end, or by the next call: from there on results are better written around the caches, whether a call finds its data in
 * cache or not and whether the result is read next or not (0.5 to 1 of the time, seldom 1.02; measured with 32 MiB, and with
 * what is believed of 480). The rest of a plan takes the arrays to come from memory, too. */
static int comes_from_memory(const bnfast_job *job)
{
    const ptrdiff_t arrays =
        arrays_read(job) + 1 + (job->residual != NULL) + (job->passed != NULL && job->passed != job->out);
    return arrays * bytes_of_array(job) >= believed_last_level() / 2;
}

static int rows_displace_in_l1(const bnfast_job *job)
{
    return folded_stride(job) * job->kernels->itemsize % L1_WAY_BYTES == 0;
}

/* Whether nothing is asked for ahead, and a gradient's two arrays, too, are summed in tiles: where each array takes half of the
 * threads' L2 at most (0.8 to 1.05 of the time), or all together a quarter of a last level that is near (0.7 to 1; measured
 * with 32 MiB). */
static int is_near(const bnfast_job *job)
{
    const ptrdiff_t bytes = bytes_of_array(job) * arrays_read(job);
    return bytes_of_array(job) <= bnfast_l2_bytes() / 2 * job->n_threads ||
           (!bnfast_last_level_is_far() && bytes <= bnfast_last_level_bytes() / 4);
}

/* Channels that a task of the phase of coefficients makes: about one task a thread, of at least FEWEST. */
static ptrdiff_t coefficient_channels(const bnfast_job *job)
{
    enum { FEWEST = 64, MOST = 1024, LINES = 16 };
    return most(FEWEST, least(MOST, round_up(quotient_up(job->channels, job->n_threads), LINES)));
}

/* ---- planar ------------------------------------------------------------------------------------------------------ */

/* Elements of a segment: many, as each costs a division or two; fewer for float64, whose sums have nothing wider to
 * go to. TASKS: a thread, where there are enough channels. */
enum { SEGMENT = 16384, SEGMENT_F64 = 4096, PLANAR_TASKS = 4 };

/* Bytes of a row that is read fast by itself, and of one that is when it comes from a near last level. */
enum { LONG_ROW = 3584, LONG_ROW_FROM_NEARBY = 1536 };

/* Bytes of a row that a block of channels has at least, or the array is better taken in the order of memory, although
 * it is read twice then; of channels that stay in L2, of those that do not and are read twice anyway, from memory, and
 * from there where two results go around the caches (0.75 to 0.95 of the time). (Measured with 512 KiB and 1 MiB of L2 and
 * 32 MiB behind it; from afar with 2 MiB and 480 MiB.) */
enum {
    RUN_BYTES = 8192,
    RUN_BYTES_FROM_AFAR = 2560,
    RUN_BYTES_OUT_OF_L2 = 32768,
    RUN_BYTES_FROM_MEMORY = 1024,
    RUN_BYTES_OF_TWO_RESULTS = 2560,
};

/* Whether blocks read from memory but once what phases read twice: the next one is asked for while one is written, or one is
 * written while the next is reduced. (0.6 to 1 of the time where a call does not find its arrays in cache; 0.75 to 1.2 where
 * it does. Halves, whose time is that of their conversions, gain nothing.) */
static int is_read_once(const bnfast_job *job, ptrdiff_t channel_bytes)
{
    const ptrdiff_t row = job->inner * job->kernels->itemsize;
    return !has_halves(job) && (job->u ? channel_bytes <= bnfast_l2_bytes() / 4 : row >= LONG_ROW_FROM_NEARBY);
}

static ptrdiff_t enough_of_a_row(const bnfast_job *job, ptrdiff_t channel_bytes)
{
    if (!applies(job)) /* nothing is read twice */
        return RUN_BYTES;
    const ptrdiff_t written = job->outer * job->inner * job->kernels->itemsize;
    const int two_results = job->stream && passed_late(job) && !has_halves(job) && !bnfast_last_level_is_far();
    const ptrdiff_t from_memory = two_results ? RUN_BYTES_OF_TWO_RESULTS : RUN_BYTES_FROM_MEMORY;
    if (channel_bytes * job->channels > believed_last_level() / 4 * 3)
        return from_memory;
    if (bnfast_last_level_is_far())
        return channel_bytes + written <= bnfast_l2_bytes() ? RUN_BYTES_FROM_AFAR : RUN_BYTES_OUT_OF_L2;
    if (comes_from_memory(job) && is_read_once(job, channel_bytes))
        return from_memory;
    return channel_bytes <= bnfast_l2_bytes() / 4 ? RUN_BYTES : RUN_BYTES_OUT_OF_L2;
}

/* Whether what is read is more than the threads' L2 hold. */
static int comes_from_beyond_l2(const bnfast_job *job)
{
    return bytes_of_array(job) * arrays_read(job) > bnfast_l2_bytes() * job->n_threads;
}

static void cut_planar_segments(bnfast_job *job)
{
    const ptrdiff_t elements = job->kernels->narrow ? SEGMENT : SEGMENT_F64;
    job->fold = 1;
    job->segment_length = least(job->inner, elements);
    job->segment_rows = job->inner < elements ? elements / job->inner : 1;
    job->n_segments = quotient_up(job->outer, job->segment_rows) * pieces_of_row(job);
    job->merges = job->n_segments > 1 || job->exact;
}

/* Whether a block is written while the next is reduced, in one loop. The backward pass, two arrays to read for one to
 * write, is faster if the next block is asked for while this one is written, as long as both stay in L2. Where they do
 * not, what is asked for displaces what is being mapped, and from a last level that is far so does what is reduced
 * meanwhile. Short rows are read best in the order of memory; but those of large arrays, whose blocks take more than a quarter
 * of L2 and come a second time from a near last level, are better read while others are (0.65 to 1 of the time; measured
 * with 512 KiB of L2 and 32 MiB behind it). */
static int is_written_later(const bnfast_job *job)
{
    const int nearby = !bnfast_last_level_is_far(), from_memory = comes_from_memory(job);
    const ptrdiff_t long_row = nearby && from_memory && !job->asked_for ? LONG_ROW_FROM_NEARBY : LONG_ROW;
    return applies(job) && !job->exact && job->inner * job->kernels->itemsize >= long_row &&
           (job->u == NULL || (maps_gradient(job) && !job->asked_for && (from_memory || nearby)));
}

/* Blocks keep their channels in L2, and what comes next: a quarter each, as more displaces itself (measured: half
 * of L2 took up to 1.2 times as long); a channel alone may take all of it. With few channels, short runs far apart, or
 * nothing to reduce: each step for the whole array. */
static void choose_planar(bnfast_job *job)
{
    const int threads = job->n_threads;
    job->block_channels = job->channels;
    job->coefficient_channels = coefficient_channels(job);
    job->near = choice(forced.near, is_near(job));
    /* from beyond L2 short rows, far apart, are read at half the speed otherwise (0.65 to 1 of the time; in L2 what a
     * channel has summed so far had to be stored after each row) */
    job->in_order = choice(forced.in_order, reduces(job) && job->segment_rows > 1 && comes_from_beyond_l2(job));
    const int enough = threads == 1 || job->channels % threads == 0 || job->channels >= 4 * threads;
    const ptrdiff_t run = job->inner * job->kernels->itemsize, channel_bytes = job->outer * run * arrays_read(job);
    const ptrdiff_t share = threads == 1 ? job->channels : quotient_up(job->channels, PLANAR_TASKS * threads);
    const ptrdiff_t n = most(1, least(bnfast_l2_bytes() / 4 / channel_bytes, share));
    const int scattered = comes_from_beyond_l2(job) && n * run < enough_of_a_row(job, channel_bytes);
    if (!reduces(job) || choice(forced.kind, enough && !scattered ? BNFAST_BLOCKS : BNFAST_PHASES) == BNFAST_PHASES)
        return;
    job->kind = BNFAST_BLOCKS;
    job->block_channels = n;
    job->task_channels = share / job->block_channels * job->block_channels;
    job->asked_for = job->block_channels * channel_bytes <= bnfast_l2_bytes() / 4;
    job->written_later =
        choice(applies(job) && !job->exact && !maps_u_only(job) ? forced.written_later : -1, is_written_later(job));
}

/* ---- interleaved ------------------------------------------------------------------------------------------------- */

enum {
    SEGMENT_ROWS = 256,
    FOLD_COLUMNS = 64,
    RANGE_BYTES = 1024,    /* of a row that is read well by itself, out of cache: a range of columns has as many */
    WIDEST_RANGE = 4096,   /* and no more: its sums and coefficients stay in L1 and L2 */
    BLOCK_BYTES = 256,     /* of a row that a block of columns that is copied together has at least */
    INTERLEAVED_TASKS = 2, /* a thread, where there are enough blocks */
    WAY_BYTES = 128
        << 10, /* of L2: what lies a multiple of this apart shares WAYS places (1 MiB and 8, 2 MiB and 16) */
    WAYS = 8,
    TASK_COLUMNS = 2048,
    FEWEST_TASK_COLUMNS = 512,
    FEWEST_NEAR_COLUMNS = 64, /* a tile of float32 has as many, or fewer (sums.inc.h) */
    FEW_ROWS = 32,
    REDUCE_BYTES = 1 << 19, /* of a task, where there are enough tasks for all threads */
    APPLY_BYTES = 1 << 18,
};

static void cut_interleaved_segments(bnfast_job *job)
{
    job->fold = 1;
    while (job->fold * period(job) < FOLD_COLUMNS && job->outer >= job->fold * FOLD_COLUMNS)
        job->fold *= 2;
    job->segment_rows = SEGMENT_ROWS;
    job->segment_length = 1;
    job->n_segments = quotient_up(folded_rows(job), SEGMENT_ROWS);
    job->merges = job->n_segments > 1 || columns_of_channel(job) > 1 || job->exact;
}

/* Whether rows of `bytes` bytes each displace each other from L2 before they are mapped, being a power of two apart. */
static int displaces_itself(const bnfast_job *job, ptrdiff_t bytes)
{
    const ptrdiff_t stride = period(job) * job->kernels->itemsize, apart = stride & -stride;
    const ptrdiff_t places = WAYS * (WAY_BYTES / most(bytes, least(apart, WAY_BYTES)));
    return job->outer * (arrays_read(job) + 1) > places;
}

/* All rows of some channels, which stay in L2 until they are mapped: a range of columns wide enough to be read well, or
 * a narrower one. Where its rows displace each other they are copied together while they are reduced, which pays only
 * if the array itself, or what a phase leaves for the next, does not stay in cache; and not of near rows, nor
 * from a near last level where rows fall on the same lines of L1 (0.5 to 1 of the time; a second time they come from there).
 * Returns the channels, in whole lines; 0: each step for the whole array. */
static ptrdiff_t channels_of_block(bnfast_job *job)
{
    const ptrdiff_t size = job->kernels->itemsize, line = 64 / size, column_bytes = job->inner * size;
    const ptrdiff_t channel_bytes = job->outer * column_bytes * arrays_read(job);
    const ptrdiff_t share = job->channels / (INTERLEAVED_TASKS * job->n_threads);
    const ptrdiff_t most_channels = least(bnfast_l2_bytes() / 2 / channel_bytes, share) / line * line;
    const ptrdiff_t n = least(most_channels, most(1, WIDEST_RANGE / column_bytes / line) * line);
    const int stays = (applies(job) && channel_bytes * job->channels <= bnfast_last_level_bytes() / 2) &&
                      bnfast_block_bytes(job, job->channels, columns_of_channel(job)) <= bnfast_l2_bytes();
    const int wide = n * column_bytes >= RANGE_BYTES;
    if (job->fold > 1 || n * column_bytes < BLOCK_BYTES)
        return 0;
    if (wide && !displaces_itself(job, n * column_bytes))
        return n;
    if (stays || period(job) % line != 0)
        return 0;
    job->pack = may_pack(job) && !job->near && (bnfast_last_level_is_far() || !rows_displace_in_l1(job));
    return wide ? n : most_channels;
}

/* Blocks that begin where lines of `out` do. */
static void take_lead(bnfast_job *job)
{
    const ptrdiff_t size = job->kernels->itemsize;
    if (job->inner == 1 && applies(job) && period(job) * size % 64 == 0)
        job->lead = (ptrdiff_t)(-(uintptr_t)job->out % 64) / size;
}

/* Channels of a thread where each takes its own for all steps, so that none waits for another: where rows are few, and
 * coefficients weigh as much as the map. (With many rows each would end in a line of memory that two threads write.) Not
 * where a reduction asks ahead, but for two arrays from a near last level. 0: that would not pay. */
static ptrdiff_t channels_of_thread(const bnfast_job *job)
{
    const ptrdiff_t size = job->kernels->itemsize, line = 64 / size, threads = job->n_threads;
    const ptrdiff_t even = quotient_up(job->channels, threads), n = period(job) % line ? even : round_up(even, line);
    if (threads == 1 || n * job->inner * size < RANGE_BYTES || job->outer > FEW_ROWS ||
        (reduces(job) && !job->near && (job->u == NULL || bnfast_last_level_is_far())) ||
        n * threads > job->channels + job->channels / 8)
        return 0;
    return n;
}

/* Tasks of the phases: enough for all threads, and no smaller than that asks for. */
static void cut_interleaved_phases(bnfast_job *job)
{
    const ptrdiff_t threads = job->n_threads, row_bytes = folded_stride(job) * job->kernels->itemsize;
    const ptrdiff_t fewest = job->near ? FEWEST_NEAR_COLUMNS : FEWEST_TASK_COLUMNS, tasks = 4 * threads;
    job->task_columns = TASK_COLUMNS;
    while (job->task_columns > fewest && job->n_segments * quotient_up(folded_stride(job), job->task_columns) < tasks)
        job->task_columns /= 2;
    job->task_segments =
        most(1, least(quotient_up(REDUCE_BYTES, job->segment_rows * row_bytes), job->n_segments / tasks));
    job->coefficient_channels = columns_of_channel(job) > 1 ? job->channels : coefficient_channels(job);
    job->apply_rows = least(APPLY_BYTES / row_bytes + 1, most(1, quotient_up(folded_rows(job), 2 * threads)));
}

/* Whether the map goes through each whole row by itself, as one stream of memory, or through some at once, which share the
 * loads of their coefficients. Where the last level is far one stream takes 0.55 to 1 of the time: these are CPUs that load two
 * vectors a cycle. Where a map reads two arrays, only if they come from there and rows are not of whole lines (0.8 to 0.9;
 * else up to 1.4). (Measured with AVX-512 and AVX2, 2 MiB of L2 and 300 MiB behind it.) */
static int goes_row_by_row(const bnfast_job *job)
{
    const int whole_lines = folded_stride(job) * job->kernels->itemsize % 64 == 0;
    const int reads_two = (map_flags(job) & (BNFAST_GRADIENT | BNFAST_ADD)) != 0;
    return bnfast_last_level_is_far() && !(reads_two && (job->near || whole_lines));
}

static void choose_interleaved(bnfast_job *job)
{
    const ptrdiff_t bytes = bytes_of_array(job) * arrays_read(job);
    job->block_channels = job->channels;
    job->near = choice(forced.near, is_near(job));
    job->row_by_row = choice(forced.row_by_row, goes_row_by_row(job));
    if (forced.kind != BNFAST_PHASES && job->n_threads == 1 && bytes <= bnfast_l2_bytes() / 2) {
        job->kind = BNFAST_BLOCKS;
        job->task_channels = job->channels;
        return;
    }
    cut_interleaved_phases(job);
    const ptrdiff_t line = 64 / job->kernels->itemsize, own = channels_of_thread(job);
    if (forced.kind != BNFAST_PHASES && own > 0) {
        job->kind = BNFAST_BLOCKS;
        job->block_channels = own;
        while (bnfast_block_bytes(job, job->block_channels, columns_of_channel(job)) > bnfast_l2_bytes() / 2 &&
               job->block_channels > line)
            job->block_channels = round_up(job->block_channels / 2, line);
        job->task_channels = round_up(own, job->block_channels); /* whole blocks */
        take_lead(job);
        return;
    }
    if (!reduces(job)) {
        /* so many coefficients that they would not stay in L2 between being made and being used */
        if (job->fold == 1 && bnfast_block_bytes(job, job->channels, columns_of_channel(job)) > bnfast_l2_bytes()) {
            job->kind = BNFAST_BLOCKS;
            job->block_channels = most(1, WIDEST_RANGE / (job->inner * job->kernels->itemsize) / line) * line;
            job->task_channels =
                job->block_channels * most(1, job->channels / job->block_channels / (4 * job->n_threads));
        }
        return;
    }
    ptrdiff_t n = channels_of_block(job);
    if (forced.kind == BNFAST_BLOCKS && n == 0 && job->fold == 1)
        n = least(4 * line, job->channels);
    if (forced.kind == BNFAST_PHASES)
        n = 0;
    if (n == 0)
        job->pack = 0;
    else if (may_pack(job) && period(job) % line == 0)
        job->pack = choice(forced.pack, job->pack);
    if (n > 0) {
        job->kind = BNFAST_BLOCKS;
        job->block_channels = n;
        job->task_channels = n * quotient_up(job->channels / n, INTERLEAVED_TASKS * job->n_threads);
        take_lead(job);
    }
}

/* ---- both -------------------------------------------------------------------------------------------------------- */

/* Whether the result is written around the caches: it would displace meanwhile what is still to be read. */
static int is_streamed(const bnfast_job *job)
{
    const int passed_alike =
        !passed_late(job) || (job->passed != job->u && ((uintptr_t)job->passed - (uintptr_t)job->out) % 64 == 0);
    return applies(job) && job->out != job->x && job->out != mapped_beside(job) && job->out != job->u && passed_alike &&
           choice(forced.stream, comes_from_memory(job));
}

/* About the time that an operation takes on one thread where its arrays lie in L2: measured with AVX-512, and near
 * enough elsewhere for what it decides. */
static ptrdiff_t nanoseconds(const bnfast_job *job)
{
    enum { SECOND_RESULT = 200 }; /* picoseconds an element, too */
    static const struct {
        int element, channel; /* picoseconds; of float32 */
    } costs[] = {
        [BNFAST_MOMENTS] = {125, 2000},
        [BNFAST_FORWARD] = {180, 3000},
        [BNFAST_EVAL] = {125, 1000},
        [BNFAST_BACKWARD] = {250, 3000},
        [BNFAST_JVP] = {250, 3000},
        [BNFAST_FLOOR] = {125, 0},
        [BNFAST_LIFT] = {125, 0},
        [BNFAST_LOWER] = {125, 0},
        [BNFAST_BACKWARD_EVAL] = {180, 2000},
        [BNFAST_BACKWARD_SUMS] = {125, 1000},
        [BNFAST_BACKWARD_APPLY] = {125, 2000},
    };
    const int second = job->passed && job->passed != job->out ? SECOND_RESULT : 0;
    /* halves are computed with as float32; float64 sums of float32 take half as long again */
    const double floats = (double)bytes_of_array(job) / (double)least(job->kernels->itemsize, 4);
    const double elements = floats * (job->exact && job->kernels->narrow ? 1.5 : 1.0);
    return (ptrdiff_t)((elements * (costs[job->operation].element + second) +
                        (double)job->channels * costs[job->operation].channel) /
                       1000);
}

/* A team that is awake costs one to two microseconds a call, and more the larger it is; four to six where the cores are
 * far from each other and rows are what they share: then they hand over sums and coefficients in most plans, and in a loop
 * that does other work between, two threads took up to 1.4 times as long as one for work of 17 microseconds. */
ptrdiff_t bnfast_threads_worth(const bnfast_job *job)
{
    enum { ENOUGH = 8000, ENOUGH_FROM_AFAR = 18000, SHARE = 5000 };
    const ptrdiff_t enough = bnfast_last_level_is_far() && !bnfast_is_planar(job) ? ENOUGH_FROM_AFAR : ENOUGH;
    const ptrdiff_t time = nanoseconds(job);
    return time < enough ? 1 : most(2, time / SHARE);
}

int bnfast_is_planar(const bnfast_job *job) { return job->inner >= PLANAR_INNER; }

void bnfast_plan(bnfast_job *job)
{
    job->n_phases = 0;
    job->kind = BNFAST_PHASES;
    if (job->operation == BNFAST_FLOOR) {
        bnfast_floor_phases(job);
        return;
    }
    if (job->operation == BNFAST_LIFT || job->operation == BNFAST_LOWER) {
        bnfast_lift_phases(job);
        return;
    }
    job->stream = is_streamed(job);
    if (maps_marks(job) && !maps_gradient(job) && job->kernels->marks_per_byte > 1)
        job->first_mark = (ptrdiff_t)((uintptr_t)job->out / (uintptr_t)job->kernels->itemsize % 16);
    if (bnfast_is_planar(job)) {
        cut_planar_segments(job);
        choose_planar(job);
        bnfast_planar_phases(job);
    } else {
        cut_interleaved_segments(job);
        choose_interleaved(job);
        bnfast_interleaved_phases(job);
    }
}
