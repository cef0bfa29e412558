/* From reductions to results: the merge tree, and the arithmetic per channel, all in float64.
 *
 * With M values a channel, hi = mean rounded to the data's dtype, lo = mean - hi:
 *   forward   scale = gamma * inv_std
 *   sums      sum(u), and sum(u * (x - mean)) = dot - lo * sum
 *   backward  dx = gamma*inv_std * (dy - dbeta/M - x_hat * dgamma/M)
 *   jvp       dy = gamma*inv_std * (v - mean(v) - x_hat * mean(v*x_hat)) + vgamma * x_hat + vbeta
 * (Ioffe and Szegedy 2015, section 3, the backward pass collected by terms.) */

#include "block.h"

#include <float.h>
#include <math.h>
#include <string.h>

int bnfast_reduces(const bnfast_job *job) { return job->operation != BNFAST_EVAL; }
int bnfast_applies(const bnfast_job *job) { return job->operation != BNFAST_MOMENTS; }
int bnfast_maps_u_only(const bnfast_job *job) { return job->operation == BNFAST_BACKWARD_EVAL; }
int bnfast_needs_gradient(const bnfast_job *job)
{
    return job->operation == BNFAST_BACKWARD || job->operation == BNFAST_JVP;
}

static int has_sums(const bnfast_job *job) { return bnfast_needs_gradient(job) || bnfast_maps_u_only(job); }

/* Shorter runs than this do not fill vectors: their elements are taken as columns. */
enum { PLANAR_INNER = 16 };

enum { WORK_ARRAYS = 8, COEFFICIENT_ARRAYS = 6 };

static ptrdiff_t round_up(ptrdiff_t bytes) { return (bytes + 63) & ~(ptrdiff_t)63; }

ptrdiff_t bnfast_block_bytes(const bnfast_job *job, ptrdiff_t n, ptrdiff_t columns)
{
    const ptrdiff_t width = n * columns, size = job->kernels->itemsize;
    const ptrdiff_t rows = bnfast_reduces(job) ? job->n_segments + 1 : 0;
    return round_up(2 * rows * width * (ptrdiff_t)sizeof(double)) +
           round_up(WORK_ARRAYS * n * (ptrdiff_t)sizeof(double)) +
           COEFFICIENT_ARRAYS *
               (round_up((n + BNFAST_PAD) * size) + (columns > 1 ? round_up((width + BNFAST_PAD) * size) : 0));
}

static char *coefficients_in(char *at, bnfast_coefficients *c, ptrdiff_t bytes)
{
    void **const array[COEFFICIENT_ARRAYS] = {&c->center,   &c->scale,   &c->shift,
                                              &c->u_center, &c->u_scale, &c->hat_scale};
    for (int i = 0; i < COEFFICIENT_ARRAYS; i++) {
        *array[i] = at;
        at += round_up(bytes);
    }
    return at;
}

bnfast_block bnfast_block_in(const bnfast_job *job, char *scratch, ptrdiff_t first, ptrdiff_t n, ptrdiff_t columns)
{
    const ptrdiff_t width = n * columns, size = job->kernels->itemsize;
    const ptrdiff_t rows = bnfast_reduces(job) ? job->n_segments + 1 : 0;
    bnfast_block block = {.first = first, .n = n, .width = width};
    block.a = (double *)scratch;
    block.b = block.a + rows * width;
    scratch += round_up(2 * rows * width * (ptrdiff_t)sizeof(double));
    block.work = (double *)scratch;
    scratch += round_up(WORK_ARRAYS * n * (ptrdiff_t)sizeof(double));
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

void bnfast_merge_pair(const bnfast_job *job, ptrdiff_t n, double count, double *a, double *b, double count2,
                       const double *a2, const double *b2)
{
    if (has_sums(job))
        job->kernels->merge_sums(n, a, b, a2, b2);
    else
        job->kernels->merge_moments(n, count, a, b, count2, a2, b2);
}

double bnfast_merge(const bnfast_job *job, double *a, double *b, ptrdiff_t stride, ptrdiff_t n, ptrdiff_t lo,
                    ptrdiff_t hi, double (*counts)(const bnfast_job *job, ptrdiff_t i))
{
    if (hi - lo == 1)
        return counts(job, lo);
    const ptrdiff_t mid = lo + (hi - lo + 1) / 2;
    const double count_lo = bnfast_merge(job, a, b, stride, n, lo, mid, counts);
    const double count_hi = bnfast_merge(job, a, b, stride, n, mid, hi, counts);
    bnfast_merge_pair(job, n, count_lo, a + lo * stride, b + lo * stride, count_hi, a + mid * stride, b + mid * stride);
    return count_lo + count_hi;
}

void bnfast_prepare(const bnfast_job *job, const bnfast_block *block)
{
    if (has_sums(job))
        job->kernels->round_values(block->n, job->mean + block->first, block->channel.center);
    else if (!job->merges)
        memset(block->channel.center, 0, (size_t)(block->n * job->kernels->itemsize));
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

static double rounded(const bnfast_job *job, double value)
{
    return job->kernels->itemsize == 4 ? (double)(float)value : value;
}

/* A scale that float32 cannot hold would make 0 * inf of a constant channel. */
static void keep_in_range(const bnfast_job *job, ptrdiff_t n, double *scale)
{
    if (job->kernels->itemsize == 4)
        for (ptrdiff_t j = 0; j < n; j++)
            scale[j] = scale[j] > FLT_MAX ? FLT_MAX : scale[j] < -FLT_MAX ? -FLT_MAX : scale[j];
}

static double value_at(const bnfast_job *job, const void *values, ptrdiff_t i)
{
    return job->kernels->itemsize == 4 ? (double)((const float *)values)[i] : ((const double *)values)[i];
}

/* n values from the first-th channel on; `otherwise` where the parameter is left out. */
static void read_parameter(const bnfast_parameter *parameter, double otherwise, ptrdiff_t first, ptrdiff_t n,
                           double *restrict values)
{
    if (parameter->wide)
        memcpy(values, parameter->wide + first, (size_t)n * sizeof *values);
    else
        for (ptrdiff_t j = 0; j < n; j++)
            values[j] = parameter->narrow ? (double)parameter->narrow[first + j] : otherwise;
}

void bnfast_finish(const bnfast_job *job, const bnfast_block *block, ptrdiff_t i, ptrdiff_t n)
{
    const ptrdiff_t c0 = block->first + i;
    const double *restrict a = block->a + i, *restrict b = block->b + i;
    const double count = (double)job->outer * (double)job->inner;
    double *restrict mean = job->mean + c0;
    /* the coefficients before they are rounded; slope: derivative of the result by x */
    double *restrict const work = block->work + i;
    const ptrdiff_t stride = block->n;
    double *restrict const gamma = work, *restrict const center = work + stride,
                           *restrict const slope = work + 2 * stride, *restrict const scale = work + 3 * stride,
                           *restrict const shift = work + 4 * stride, *restrict const u_center = work + 5 * stride,
                           *restrict const u_scale = work + 6 * stride, *restrict const hat_scale = work + 7 * stride;

    if (job->operation == BNFAST_MOMENTS) {
        for (ptrdiff_t j = 0; j < n; j++)
            mean[j] = value_at(job, block->channel.center, i + j) + a[j];
        memcpy(job->m2 + c0, b, (size_t)n * sizeof *mean);
        return;
    }
    read_parameter(&job->gamma, 1.0, c0, n, gamma);

    switch (job->operation) {
    case BNFAST_FORWARD: {
        double *restrict inv_std = job->inv_std + c0;
        job->kernels->inverse_roots(n, b, count, job->eps, inv_std);
        if (job->m2 != NULL)
            memcpy(job->m2 + c0, b, (size_t)n * sizeof *b);
        for (ptrdiff_t j = 0; j < n; j++) {
            mean[j] = value_at(job, block->channel.center, i + j) + a[j];
            center[j] = mean[j];
            scale[j] = slope[j] = gamma[j] * inv_std[j];
        }
        read_parameter(&job->beta, 0.0, c0, n, shift);
        break;
    }
    case BNFAST_EVAL: {
        const double *restrict var = job->var == NULL ? NULL : job->var + c0;
        for (ptrdiff_t j = 0; j < n; j++) {
            center[j] = mean[j];
            scale[j] = slope[j] = var == NULL ? gamma[j] : gamma[j] * (1.0 / sqrt(var[j] + job->eps));
        }
        read_parameter(&job->beta, 0.0, c0, n, shift);
        break;
    }
    case BNFAST_BACKWARD:
    case BNFAST_BACKWARD_EVAL:
    case BNFAST_JVP: {
        const double *restrict inv_std = job->inv_std + c0;
        const int constant = job->operation == BNFAST_BACKWARD_EVAL;
        /* constant: v + -0.0 is v, the sign of a zero included */
        read_parameter(&job->vbeta, constant ? -0.0 : 0.0, c0, n, shift);
        read_parameter(&job->vgamma, 0.0, c0, n, hat_scale);
        for (ptrdiff_t j = 0; j < n; j++) {
            const double dot = (b[j] - (mean[j] - rounded(job, mean[j])) * a[j]) * inv_std[j]; /* sum(u * x_hat) */
            if (job->dot != NULL) {
                job->sum[c0 + j] = a[j];
                job->dot[c0 + j] = dot;
            }
            u_center[j] = a[j] / count;
            u_scale[j] = gamma[j] * inv_std[j];
            hat_scale[j] -= u_scale[j] * (dot / count);
            center[j] = constant ? 0.0 : mean[j];
            scale[j] = constant ? u_scale[j] : inv_std[j];
            slope[j] = constant ? 0.0 : inv_std[j] * hat_scale[j];
        }
        break;
    }
    default:
        return;
    }
    const bnfast_coefficients c = bnfast_coefficients_at(job, &block->channel, i);
    keep_in_range(job, n, scale);
    job->kernels->round_centers(n, center, slope, shift, c.center);
    job->kernels->round_values(n, scale, c.scale);
    if (bnfast_needs_gradient(job)) {
        keep_in_range(job, n, u_scale);
        job->kernels->round_centers(n, u_center, u_scale, shift, c.u_center);
        job->kernels->round_values(n, u_scale, c.u_scale);
        job->kernels->round_values(n, hat_scale, c.hat_scale);
    }
    job->kernels->round_values(n, shift, c.shift);
}

void bnfast_plan(bnfast_job *job)
{
    job->n_phases = 0;
    if (job->operation == BNFAST_FLOOR) {
        bnfast_plan_floor(job);
        return;
    }
    const int planar = job->inner >= PLANAR_INNER;
    if (planar)
        bnfast_plan_planar(job);
    else
        bnfast_plan_interleaved(job);
    /* What a call writes first is gone from the last-level cache by its end if the call touches more than that. What is
     * reduced is read again and should not be displaced meanwhile, and interleaved rows that do not come from cache are
     * best read as one stream: half of the cache then. */
    const ptrdiff_t bytes = job->outer * job->channels * job->inner * job->kernels->itemsize;
    const ptrdiff_t arrays = job->u ? 3 : 2,
                    room = bnfast_last_level_bytes() / (planar && !bnfast_reduces(job) ? 1 : 2);
    job->stream = bnfast_applies(job) && job->out != job->x && job->out != job->u && arrays * bytes >= room;
}
