/* The scratch of a block of channels, laid out in memory that the caller owns. */

#include "block.h"

enum { WORK_ARRAYS = 8, COEFFICIENT_ARRAYS = 6 };

static ptrdiff_t whole_lines(ptrdiff_t bytes) { return round_up(bytes, 64); }

ptrdiff_t bnfast_block_bytes(const bnfast_job *job, ptrdiff_t n, ptrdiff_t columns)
{
    const ptrdiff_t width = n * columns, size = job->kernels->itemsize;
    const ptrdiff_t rows = reduces(job) ? job->n_segments + 1 : 0;
    return whole_lines(2 * rows * width * (ptrdiff_t)sizeof(double)) +
           whole_lines(WORK_ARRAYS * n * (ptrdiff_t)sizeof(double)) +
           COEFFICIENT_ARRAYS *
               (whole_lines((n + BNFAST_PAD) * size) + (columns > 1 ? whole_lines((width + BNFAST_PAD) * size) : 0));
}

static char *coefficients_in(char *at, bnfast_coefficients *c, ptrdiff_t bytes)
{
    void **const array[COEFFICIENT_ARRAYS] = {&c->center,   &c->scale,   &c->shift,
                                              &c->u_center, &c->u_scale, &c->hat_scale};
    for (int i = 0; i < COEFFICIENT_ARRAYS; i++) {
        *array[i] = at;
        at += whole_lines(bytes);
    }
    return at;
}

bnfast_block bnfast_block_in(const bnfast_job *job, char *scratch, ptrdiff_t first, ptrdiff_t n, ptrdiff_t columns)
{
    const ptrdiff_t width = n * columns, size = job->kernels->itemsize;
    const ptrdiff_t rows = reduces(job) ? job->n_segments + 1 : 0;
    bnfast_block block = {.first = first, .n = n, .width = width};
    block.a = (double *)scratch;
    block.b = block.a + rows * width;
    scratch += whole_lines(2 * rows * width * (ptrdiff_t)sizeof(double));
    block.work = (double *)scratch;
    scratch += whole_lines(WORK_ARRAYS * n * (ptrdiff_t)sizeof(double));
    scratch = coefficients_in(scratch, &block.channel, (n + BNFAST_PAD) * size);
    block.column = block.channel;
    if (columns > 1)
        coefficients_in(scratch, &block.column, (width + BNFAST_PAD) * size);
    return block;
}

bnfast_coefficients bnfast_coefficients_at(const bnfast_job *job, const bnfast_coefficients *c, ptrdiff_t j)
{
    const ptrdiff_t bytes = j * job->kernels->itemsize;
    const bnfast_coefficients at = {(char *)c->center + bytes,  (char *)c->scale + bytes,
                                    (char *)c->shift + bytes,   (char *)c->u_center + bytes,
                                    (char *)c->u_scale + bytes, (char *)c->hat_scale + bytes};
    return at;
}
