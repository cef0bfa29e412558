/* The interleaved layout: rows whose neighbouring elements are different columns, inner = 1 or short.
 *
 * A row of the array is channels * inner columns; a channel's `inner` columns are reduced apart and merged at the
 * end. Where such a row is narrower than a few vectors, `fold` rows are seen as one row of fold * channels * inner
 * columns (the rows left over are a segment of their own), so that three channels run as fast as sixty-four.
 * A segment is SEGMENT_ROWS such rows of one column.
 *
 * From memory, or from a last level that is far, a block of columns whose rows fit into L2 is copied together while it is
 * reduced: where it came from, lines a power of two apart would displace each other. */

#include "block.h"

#include <stdint.h>
#include <string.h>

enum {
    COEFFICIENT_BYTES = 12 << 10, /* of a part of the columns that is mapped at once: a part of L1 */
    LINE = 64,
    MOST_OF_ROW = COEFFICIENT_BYTES / 3 + LINE, /* bytes of a row in such a part */
};

static double segment_count(const bnfast_job *job, ptrdiff_t s)
{
    return (double)least(job->segment_rows, folded_rows(job) - s * job->segment_rows);
}
static double fold_count(const bnfast_job *job, ptrdiff_t i) { return (void)i, (double)folded_rows(job); }
static double inner_count(const bnfast_job *job, ptrdiff_t i) { return (void)i, (double)job->outer; }

static ptrdiff_t packed_bytes(const bnfast_job *job, ptrdiff_t n_channels)
{
    return job->pack ? (job->outer * (n_channels + job->lead) * job->inner * job->kernels->itemsize + 63) / 64 * 64 *
                           (job->u ? 2 : 1)
                     : 0;
}

/* From a coefficient a channel to one a column, (fold, n, inner), and the first ones again past the end. */
static void spread(const bnfast_job *job, const bnfast_block *block, const void *channel, void *column)
{
    const ptrdiff_t size = job->kernels->coefficient_size, width = block->width;
    char *out = column;
    if (channel != column)
        for (ptrdiff_t f = 0; f < job->fold; f++)
            for (ptrdiff_t i = 0; i < block->n; i++)
                for (ptrdiff_t t = 0; t < job->inner; t++, out += size)
                    memcpy(out, (const char *)channel + i * size, (size_t)size);
    out = column;
    for (ptrdiff_t i = 0; i < BNFAST_PAD; i += width) /* whole periods, then what is left of one */
        memcpy(out + (width + i) * size, out, (size_t)(least(width, BNFAST_PAD - i) * size));
}

static void spread_y(const bnfast_job *job, const bnfast_block *block)
{
    spread(job, block, block->channel.y_scale, block->column.y_scale);
    spread(job, block, block->channel.y_shift, block->column.y_shift);
}

static void choose_centers(const bnfast_job *job, const bnfast_block *block)
{
    bnfast_choose_centers(job, block);
    spread(job, block, block->channel.center, block->column.center);
    if (passes(job))
        spread_y(job, block);
}

/* n_rows folded or plain rows, `stride` apart, from folded row `row` on, n columns from the block's j-th on, into
 * row s of a and b; next: elements from the first of them to what is needed after them */
static void reduce_rows(const bnfast_job *job, const bnfast_block *block, ptrdiff_t s, ptrdiff_t row, ptrdiff_t n_rows,
                        ptrdiff_t stride, ptrdiff_t j, ptrdiff_t n, ptrdiff_t next)
{
    const ptrdiff_t offset = (row * folded_stride(job) + block->first * job->inner + j) * job->kernels->itemsize;
    double *a = block->a + s * block->width + j, *b = block->b + s * block->width + j;
    const void *center = (const char *)block->column.center + j * job->kernels->coefficient_size;
    char *packed_x = block->packed_x, *packed_u = block->packed_u;
    if (packed_x)
        packed_x += row * block->width * job->kernels->itemsize;
    if (packed_u)
        packed_u += row * block->width * job->kernels->itemsize;
    const bnfast_rows rows = {n_rows, stride, n, next, job->near};
    const bnfast_passing passing = bnfast_passing_at(job, &block->column, j, offset);
    if (job->u)
        job->kernels->sums_interleaved((const char *)job->x + offset, (const char *)job->u + offset, &rows, center,
                                       passes(job) ? &passing : NULL, a, b, packed_x, packed_u);
    else
        (job->exact ? job->kernels->exact_moments_interleaved
                    : job->kernels->moments_interleaved)((const char *)job->x + offset, &rows, center, a, b, packed_x);
}

/* next: elements from the first row of the array to what is needed after the last segment */
static void reduce(const bnfast_job *job, const bnfast_block *block, ptrdiff_t s, ptrdiff_t j, ptrdiff_t n,
                   ptrdiff_t next)
{
    const ptrdiff_t row = s * job->segment_rows, stride = folded_stride(job);
    reduce_rows(job, block, s, row, least(job->segment_rows, folded_rows(job) - row), stride, j, n,
                s + 1 < job->n_segments ? job->segment_rows * stride : next - row * stride);
}

static void reduce_left(const bnfast_job *job, const bnfast_block *block)
{
    reduce_rows(job, block, job->n_segments, folded_rows(job), rows_left(job), period(job), 0, period(job), 0);
}

/* Merges all that was reduced for channels i .. i+n-1 and finishes them. With fold or inner over 1: all channels. */
static void merge_and_make(const bnfast_job *job, const bnfast_block *block, ptrdiff_t i, ptrdiff_t n)
{
    if (reduces(job)) {
        double *a = block->a + i * job->inner, *b = block->b + i * job->inner;
        double *extra_a = a + job->n_segments * block->width, *extra_b = b + job->n_segments * block->width;
        const ptrdiff_t columns = n * columns_of_channel(job), one_row = n * job->inner;
        bnfast_merge(job, a, b, block->width, columns, 0, job->n_segments, segment_count);
        if (job->fold > 1)
            bnfast_merge(job, a, b, one_row, one_row, 0, job->fold, fold_count);
        if (rows_left(job) > 0)
            bnfast_merge_pair(job, one_row, (double)(job->fold * folded_rows(job)), a, b, (double)rows_left(job),
                              extra_a, extra_b);
        if (job->inner > 1) {
            for (ptrdiff_t c = 0; c < n; c++)
                for (ptrdiff_t t = 0; t < job->inner; t++) {
                    extra_a[t * n + c] = a[c * job->inner + t];
                    extra_b[t * n + c] = b[c * job->inner + t];
                }
            bnfast_merge(job, extra_a, extra_b, n, n, 0, job->inner, inner_count);
            memcpy(a, extra_a, (size_t)n * sizeof *a);
            memcpy(b, extra_b, (size_t)n * sizeof *b);
        }
    }
    if (bnfast_make_coefficients(job, block, i, n) > 0)
        bnfast_find_careful(job, block, i, n);
    bnfast_narrow_gradients(job, block, i, n);
    if (applies(job) && i == 0) {
        spread(job, block, block->channel.center, block->column.center);
        spread(job, block, block->channel.scale, block->column.scale);
        spread(job, block, block->channel.shift, block->column.shift);
        if (maps_gradient(job)) {
            spread(job, block, block->channel.u_center, block->column.u_center);
            spread(job, block, block->channel.u_scale, block->column.u_scale);
            spread(job, block, block->channel.hat_scale, block->column.hat_scale);
        }
        if (passes(job) && !reduces(job))
            spread_y(job, block);
    }
}

/* One row of a map, columns from the block's j-th on, of which some belong to channels at the edges of the range. Those are
 * mapped again, from copies of what the map of all may have been written over. */
static void apply_with_care(const bnfast_job *job, const bnfast_block *block, ptrdiff_t j, const char *x, const char *u,
                            char *out, const bnfast_marked *marked, const bnfast_columns *columns,
                            const bnfast_coefficients *c, int flags)
{
    const ptrdiff_t size = job->kernels->itemsize, n = columns->n_columns;
    double x_row[MOST_OF_ROW / sizeof(double)], u_row[MOST_OF_ROW / sizeof(double)];
    memcpy(x_row, x, (size_t)(n * size));
    memcpy(u_row, u, (size_t)(n * size));
    job->kernels->map_interleaved(x, u, out, marked, columns, c, flags, 0);
    for (ptrdiff_t k = 0; k < n; k++) {
        const ptrdiff_t i = (j + k) / job->inner % block->n;
        bnfast_marked its = *marked;
        its.number += k;
        if (its.passed)
            its.passed = (char *)its.passed + k * size;
        if (block->careful[i])
            bnfast_map_carefully(job, block, i, flags, (char *)x_row + k * size, (char *)u_row + k * size,
                                 out + k * size, &its, 1);
    }
}

/* n_rows rows of n_columns, `stride` apart, from folded row `row` on, in parts whose coefficients stay in L1. next:
 * elements to what is needed next, or 0 */
static void apply(const bnfast_job *job, const bnfast_block *block, ptrdiff_t row, ptrdiff_t n_rows, ptrdiff_t stride,
                  ptrdiff_t n_columns, ptrdiff_t next)
{
    /* what lies together of u is what was taken of it, but where the map goes by marks itself */
    const int flags = map_flags(job) & ~(block->packed_u && !maps_marks(job) ? BNFAST_RECTIFY | BNFAST_RELU : 0);
    const ptrdiff_t size = job->kernels->itemsize;
    const ptrdiff_t part = COEFFICIENT_BYTES / ((flags & BNFAST_GRADIENT) ? 6 : 3) / job->kernels->coefficient_size;
    const ptrdiff_t offset = (row * folded_stride(job) + block->first * job->inner) * size;
    const void *const beside = mapped_beside(job);
    const char *x = (const char *)job->x + offset, *u = beside ? (const char *)beside + offset : x;
    const char *next_x = x + next * size, *next_u = job->u ? (const char *)job->u + offset + next * size : NULL;
    char *out = (char *)job->out + offset;
    bnfast_columns columns = {
        .n_rows = n_rows, .stride = stride, .u_stride = stride, .out_stride = stride, .row_by_row = job->row_by_row};
    if (block->packed_x) {
        x = block->packed_x;
        columns.stride = block->width;
    }
    if (block->packed_u) {
        u = block->packed_u;
        columns.u_stride = block->width;
    }
    bnfast_note_infinity(job, x, n_rows, columns.stride, n_columns);
    if (maps_u_only(job)) {
        x = u;
        columns.stride = columns.u_stride;
    }
    const int careful = bnfast_some_careful(block, 0, block->n);
    /* all parts but the first begin where a line of `out` does; what would be less than a line is not left for one more */
    const ptrdiff_t odd = (ptrdiff_t)((uintptr_t)out % LINE) / size;
    for (ptrdiff_t j = 0; j < n_columns; j += columns.n_columns) {
        const bnfast_coefficients c = bnfast_coefficients_at(job, &block->column, j);
        const ptrdiff_t left = n_columns - j, n = j == 0 ? part - odd : part;
        columns.n_columns = left - n < LINE / size ? left : n;
        columns.next_x = next > 0 ? next_x + j * size : NULL;
        columns.next_u = next > 0 && next_u ? next_u + j * size : NULL;
        const bnfast_marked marked = bnfast_marked_at(job, offset + j * size);
        if (!careful) {
            job->kernels->map_interleaved(x + j * size, u + j * size, out + j * size, &marked, &columns, &c, flags,
                                          job->stream);
            continue;
        }
        bnfast_columns row = columns;
        row.n_rows = 1;
        row.next_x = row.next_u = NULL;
        for (ptrdiff_t r = 0; r < n_rows; r++) {
            const bnfast_marked of_row = bnfast_marked_at(job, offset + (j + r * stride) * size);
            apply_with_care(job, block, j, x + (j + r * columns.stride) * size, u + (j + r * columns.u_stride) * size,
                            out + (j + r * stride) * size, &of_row, &row, &c, flags);
        }
    }
}

/* All three steps for channels first .. first+n-1; `next`: whether those behind them come next */
static void do_block(const bnfast_job *job, ptrdiff_t first, ptrdiff_t n, int next, char *scratch)
{
    bnfast_block block = bnfast_block_in(job, scratch, first, n, columns_of_channel(job));
    if (job->pack) {
        const ptrdiff_t bytes = job->outer * block.width * job->kernels->itemsize;
        block.packed_x = scratch + job->scratch_bytes - packed_bytes(job, job->block_channels);
        if (job->u)
            block.packed_u = (char *)block.packed_x + bytes;
    }
    if (reduces(job)) {
        choose_centers(job, &block);
        for (ptrdiff_t s = 0; s < job->n_segments; s++)
            reduce(job, &block, s, 0, block.width, next ? block.width : 0);
        if (rows_left(job) > 0)
            reduce_left(job, &block);
    }
    merge_and_make(job, &block, 0, block.n);
    if (applies(job)) {
        apply(job, &block, 0, folded_rows(job), folded_stride(job), block.width, next ? block.width : 0);
        if (rows_left(job) > 0)
            apply(job, &block, folded_rows(job), rows_left(job), period(job), period(job), 0);
    }
}

/* Some neighbouring blocks: while one is written, the next is brought into cache. */
static void blocks_task(const bnfast_job *job, ptrdiff_t index, int thread)
{
    char *scratch = job->workspace + thread * job->scratch_bytes;
    const ptrdiff_t begin = index * job->task_channels, end = least(begin + job->task_channels, job->channels);
    /* all limits but the first and the last are moved by `lead`, so that blocks begin where lines of `out` do */
    for (ptrdiff_t first = begin; first < end; first += job->block_channels) {
        const ptrdiff_t behind = first + job->block_channels, from = first == 0 ? 0 : first + job->lead;
        const ptrdiff_t to = least(behind + job->lead, job->channels);
        if (from < to)
            do_block(job, from, to - from, behind < end, scratch);
    }
    if (job->stream)
        bnfast_stream_fence();
}

static bnfast_block whole(const bnfast_job *job)
{
    return bnfast_block_in(job, job->workspace, 0, job->channels, columns_of_channel(job));
}

static void centers_task(const bnfast_job *job, ptrdiff_t index, int thread)
{
    (void)index, (void)thread;
    const bnfast_block block = whole(job);
    choose_centers(job, &block);
}

static ptrdiff_t column_parts(const bnfast_job *job)
{
    return quotient_up(job->channels * columns_of_channel(job), job->task_columns);
}

static void reduce_task(const bnfast_job *job, ptrdiff_t index, int thread)
{
    (void)thread;
    const bnfast_block block = whole(job);
    const ptrdiff_t parts = column_parts(job), n = job->task_segments, begin = index / parts * n;
    const ptrdiff_t j = index % parts * job->task_columns;
    if (begin >= job->n_segments) {
        reduce_left(job, &block);
        return;
    }
    for (ptrdiff_t s = begin; s < least(begin + n, job->n_segments); s++)
        reduce(job, &block, s, j, least(job->task_columns, block.width - j),
               j + job->task_columns < block.width ? job->task_columns : 0);
}

static void coefficients_task(const bnfast_job *job, ptrdiff_t index, int thread)
{
    (void)thread;
    const bnfast_block block = whole(job);
    const ptrdiff_t i = index * job->coefficient_channels;
    merge_and_make(job, &block, i, least(job->coefficient_channels, block.n - i));
}

static void apply_task(const bnfast_job *job, ptrdiff_t index, int thread)
{
    (void)thread;
    const bnfast_block block = whole(job);
    const ptrdiff_t rows = folded_rows(job), row = index * job->apply_rows;
    if (row < rows)
        apply(job, &block, row, least(job->apply_rows, rows - row), folded_stride(job), block.width, 0);
    else
        apply(job, &block, rows, rows_left(job), period(job), period(job), 0);
    if (job->stream)
        bnfast_stream_fence();
}

static void blocks_phases(bnfast_job *job)
{
    job->scratch_bytes = bnfast_block_bytes(job, job->block_channels + job->lead, columns_of_channel(job)) +
                         packed_bytes(job, job->block_channels);
    job->workspace_bytes = job->scratch_bytes * job->n_threads;
    add_phase(job, blocks_task, quotient_up(job->channels, job->task_channels), FORWARDS);
}

/* Each step for the whole array. */
static void steps_phases(bnfast_job *job)
{
    job->scratch_bytes = job->workspace_bytes = bnfast_block_bytes(job, job->channels, columns_of_channel(job));
    if (reduces(job)) {
        const ptrdiff_t tasks = quotient_up(job->n_segments, job->task_segments) * column_parts(job);
        add_phase(job, centers_task, 1, FORWARDS);
        add_phase(job, reduce_task, tasks + (rows_left(job) > 0), FORWARDS);
    }
    add_phase(job, coefficients_task, quotient_up(job->channels, job->coefficient_channels), FORWARDS);
    if (applies(job))
        add_phase(job, apply_task, quotient_up(folded_rows(job), job->apply_rows) + (rows_left(job) > 0), BACKWARDS);
}

void bnfast_interleaved_phases(bnfast_job *job)
{
    if (job->kind == BNFAST_BLOCKS)
        blocks_phases(job);
    else
        steps_phases(job);
}
