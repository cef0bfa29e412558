/* A block of channels: its scratch, laid out in memory that the caller owns; the centres its reductions take; and the
 * call of the leaf that makes its results a channel and its coefficients. */

#include "block.h"

#include <stdint.h>
#include <string.h>

enum { COEFFICIENT_ARRAYS = 8, LINE = 64 };

static ptrdiff_t whole_lines(ptrdiff_t bytes) { return round_up(bytes, 64); }

static int n_narrow(const bnfast_job *job)
{
    return (job->narrow_mean != NULL) + (job->narrow_inv_std != NULL) + (job->narrow_var != NULL) +
           (job->narrow_dbeta != NULL) + (job->narrow_dgamma != NULL);
}

ptrdiff_t bnfast_block_bytes(const bnfast_job *job, ptrdiff_t n, ptrdiff_t columns)
{
    const ptrdiff_t width = n * columns, size = job->kernels->coefficient_size;
    const ptrdiff_t rows = reduces(job) ? job->n_segments + 1 : 0;
    return whole_lines(2 * rows * width * (ptrdiff_t)sizeof(double)) +
           COEFFICIENT_ARRAYS * (whole_lines((n + BNFAST_PAD) * size + LINE) +
                                 (columns > 1 ? whole_lines((width + BNFAST_PAD) * size + LINE) : 0)) +
           whole_lines(n) + n_narrow(job) * whole_lines(n * (ptrdiff_t)sizeof(double));
}

/* skew: bytes from a line of memory to where the arrays begin */
static char *coefficients_in(char *at, bnfast_coefficients *c, ptrdiff_t bytes, ptrdiff_t skew)
{
    void **const array[COEFFICIENT_ARRAYS] = {&c->center,  &c->scale,     &c->shift,   &c->u_center,
                                              &c->u_scale, &c->hat_scale, &c->y_scale, &c->y_shift};
    for (int i = 0; i < COEFFICIENT_ARRAYS; i++) {
        *array[i] = at + skew;
        at += whole_lines(bytes + LINE);
    }
    return at;
}

static char *values_in(char *at, ptrdiff_t n, double **values)
{
    *values = (double *)at;
    return at + whole_lines(n * (ptrdiff_t)sizeof(double));
}

bnfast_block bnfast_block_in(const bnfast_job *job, char *scratch, ptrdiff_t first, ptrdiff_t n, ptrdiff_t columns)
{
    const ptrdiff_t width = n * columns, size = job->kernels->coefficient_size;
    const ptrdiff_t rows = reduces(job) ? job->n_segments + 1 : 0;
    bnfast_block block = {.first = first, .n = n, .width = width};
    block.a = (double *)scratch;
    block.b = block.a + rows * width;
    scratch += whole_lines(2 * rows * width * (ptrdiff_t)sizeof(double));
    /* the coefficient of a column lies as its first result does, so that vectors of both begin lines together;
     * where rows do not lie alike, at the line (result: counted in elements) */
    const uintptr_t itemsize = (uintptr_t)job->kernels->itemsize;
    const uintptr_t result = (uintptr_t)job->out / itemsize + (uintptr_t)(first * job->inner);
    const ptrdiff_t skew =
        folded_stride(job) * (ptrdiff_t)itemsize % LINE == 0 ? (ptrdiff_t)(result * (uintptr_t)size % LINE) : 0;
    scratch = coefficients_in(scratch, &block.channel, (n + BNFAST_PAD) * size, skew);
    block.column = block.channel;
    if (columns > 1)
        scratch = coefficients_in(scratch, &block.column, (width + BNFAST_PAD) * size, skew);
    if (job->narrow_mean)
        scratch = values_in(scratch, n, &block.mean);
    if (job->narrow_inv_std)
        scratch = values_in(scratch, n, &block.inv_std);
    if (job->narrow_var)
        scratch = values_in(scratch, n, &block.var);
    if (job->narrow_dbeta)
        scratch = values_in(scratch, n, &block.dbeta);
    if (job->narrow_dgamma)
        scratch = values_in(scratch, n, &block.dgamma);
    block.careful = (unsigned char *)scratch;
    return block;
}

bnfast_coefficients bnfast_coefficients_at(const bnfast_job *job, const bnfast_coefficients *c, ptrdiff_t j)
{
    const ptrdiff_t bytes = j * job->kernels->coefficient_size;
    const bnfast_coefficients at = {
        (char *)c->center + bytes,   (char *)c->scale + bytes,   (char *)c->shift + bytes,
        (char *)c->u_center + bytes, (char *)c->u_scale + bytes, (char *)c->hat_scale + bytes,
        (char *)c->y_scale + bytes,  (char *)c->y_shift + bytes, job->rectifier};
    return at;
}

bnfast_passing bnfast_passing_at(const bnfast_job *job, const bnfast_coefficients *c, ptrdiff_t j, ptrdiff_t offset)
{
    const ptrdiff_t bytes = j * job->kernels->coefficient_size;
    const bnfast_passing passing = {
        .y_scale = (const char *)c->y_scale + bytes,
        .y_shift = (const char *)c->y_shift + bytes,
        .residual = job->residual ? (const char *)job->residual + offset : NULL,
        .marks = job->marks,
        .number = job->first_mark + offset / job->kernels->itemsize,
        .passed = passed_early(job) ? (char *)job->passed + offset : NULL,
        .rectifier = job->rectifier,
    };
    return passing;
}

bnfast_marked bnfast_marked_at(const bnfast_job *job, ptrdiff_t offset)
{
    const bnfast_marked marked = {
        maps_marks(job) ? job->marks : NULL,
        job->first_mark + offset / job->kernels->itemsize,
        maps_marks(job) && job->passed ? (char *)job->passed + offset : NULL,
    };
    return marked;
}

static bnfast_parameter parameter_from(const bnfast_parameter *parameter, ptrdiff_t i)
{
    const bnfast_parameter from = {parameter->wide ? parameter->wide + i : NULL,
                                   parameter->narrow ? parameter->narrow + i : NULL};
    return from;
}

static double *values_from(double *values, ptrdiff_t i) { return values ? values + i : NULL; }

bnfast_channels bnfast_channels_of(const bnfast_job *job, const bnfast_block *block, ptrdiff_t i)
{
    const ptrdiff_t at = block->first + i;
    const bnfast_channels channels = {
        .operation = job->operation,
        .count = job->operation == BNFAST_BACKWARD_APPLY || job->operation == BNFAST_EVAL
                     ? job->count
                     : (double)job->outer * (double)job->inner,
        .eps = job->eps,
        .gamma = parameter_from(&job->gamma, at),
        .beta = parameter_from(&job->beta, at),
        .vgamma = parameter_from(&job->vgamma, at),
        .vbeta = parameter_from(&job->vbeta, at),
        .a = block->a + i,
        .b = block->b + i,
        .var = block->var ? block->var + i
               : job->var ? job->var + at
                          : NULL,
        .mean = block->mean ? block->mean + i : values_from(job->mean, at),
        .inv_std = block->inv_std ? block->inv_std + i : values_from(job->inv_std, at),
        .m2 = values_from(job->m2, at),
        .dbeta = block->dbeta ? block->dbeta + i : values_from(job->dbeta, at),
        .dgamma = block->dgamma ? block->dgamma + i : values_from(job->dgamma, at),
        .mean_rest = values_from(job->mean_rest, at),
        .c = bnfast_coefficients_at(job, &block->channel, i),
    };
    return channels;
}

static void widen(const float *narrow, ptrdiff_t n, double *wide)
{
    for (ptrdiff_t k = 0; k < n; k++)
        wide[k] = (double)narrow[k];
}

/* Of the block's channels from the i-th on. */
static void widen_statistics(const bnfast_job *job, const bnfast_block *block, ptrdiff_t i, ptrdiff_t n)
{
    const ptrdiff_t at = block->first + i;
    if (job->narrow_mean)
        widen(job->narrow_mean + at, n, block->mean + i);
    if (job->narrow_inv_std)
        widen(job->narrow_inv_std + at, n, block->inv_std + i);
    if (job->narrow_var)
        widen(job->narrow_var + at, n, block->var + i);
}

void bnfast_narrow_gradients(const bnfast_job *job, const bnfast_block *block, ptrdiff_t i, ptrdiff_t n)
{
    const ptrdiff_t at = block->first + i;
    const bnfast_kernels *const of_float32 =
        bnfast_of_same_isa(job->kernels, BNFAST_FLOAT32); /* whatever the data are */
    if (job->narrow_dbeta)
        of_float32->round_values(n, block->dbeta + i, job->narrow_dbeta + at);
    if (job->narrow_dgamma)
        of_float32->round_values(n, block->dgamma + i, job->narrow_dgamma + at);
}

void bnfast_choose_centers(const bnfast_job *job, const bnfast_block *block)
{
    widen_statistics(job, block, 0, block->n);
    const bnfast_channels channels = bnfast_channels_of(job, block, 0);
    if (passes(job))
        job->kernels->make_y_coefficients(block->n, &channels);
    else if (sums_products(job))
        job->kernels->round_values(block->n, channels.mean, block->channel.center);
    else if (!job->merges && job->kernels->narrow) /* float64 alone cannot hold a mean and what it is rounded by */
        memset(block->channel.center, 0, (size_t)(block->n * job->kernels->coefficient_size));
    else {
        ptrdiff_t offsets[BNFAST_SAMPLES]; /* spread over the channel, its ends included */
        for (int i = 0; i < BNFAST_SAMPLES; i++)
            offsets[i] = (job->outer - 1) * i / (BNFAST_SAMPLES - 1) * job->channels * job->inner +
                         (job->inner - 1) * i / (BNFAST_SAMPLES - 1);
        job->kernels->typical_values(block->n, job->inner,
                                     (const char *)job->x + block->first * job->inner * job->kernels->itemsize, offsets,
                                     block->channel.center);
    }
}

ptrdiff_t bnfast_make_coefficients(const bnfast_job *job, const bnfast_block *block, ptrdiff_t i, ptrdiff_t n)
{
    if (!reduces(job))
        widen_statistics(job, block, i, n);
    const bnfast_channels channels = bnfast_channels_of(job, block, i);
    if (passes(job) && !reduces(job))
        job->kernels->make_y_coefficients(n, &channels);
    job->kernels->make_coefficients(n, &channels);
    memset(block->careful + i, 0, (size_t)n);
    ptrdiff_t small;
    const ptrdiff_t edges = job->kernels->edges(n, &channels, &small);
    return edges + (job->lifted ? small : 0);
}
