/* From merged reductions to results a channel and to the coefficients of the map, all in float64.
 *
 * With M values a channel, variance = m2 / M, inv_std = 1 / sqrt(variance + eps), hi = mean rounded to the data's
 * dtype, lo = mean - hi:
 *   forward   scale = gamma * inv_std
 *   sums      sum(u), and sum(u * (x - mean)) = sum_ud - lo * sum_u, as d = x - hi there
 *   backward  dx = gamma*inv_std * (dy - dbeta/M - x_hat * dgamma/M)
 *   jvp       dy = gamma*inv_std * (v - mean(v) - x_hat * mean(v*x_hat)) + vgamma * x_hat + vbeta
 * (Ioffe and Szegedy 2015, section 3, the backward pass collected by terms.) */

#include "block.h"

#include <float.h>
#include <math.h>
#include <string.h>

void bnfast_choose_centers(const bnfast_job *job, const bnfast_block *block)
{
    if (sums_products(job))
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

void bnfast_make_coefficients(const bnfast_job *job, const bnfast_block *block, ptrdiff_t i, ptrdiff_t n)
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
        job->kernels->inv_std_of_m2(n, b, count, job->eps, inv_std);
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
            const double u_hat = (b[j] - (mean[j] - rounded(job, mean[j])) * a[j]) * inv_std[j]; /* sum(u * x_hat) */
            if (job->dgamma != NULL) {
                job->dbeta[c0 + j] = a[j];
                job->dgamma[c0 + j] = u_hat;
            }
            u_center[j] = a[j] / count;
            u_scale[j] = gamma[j] * inv_std[j];
            hat_scale[j] -= u_scale[j] * (u_hat / count);
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
    if (maps_gradient(job)) {
        keep_in_range(job, n, u_scale);
        job->kernels->round_centers(n, u_center, u_scale, shift, c.u_center);
        job->kernels->round_values(n, u_scale, c.u_scale);
        job->kernels->round_values(n, hat_scale, c.hat_scale);
    }
    job->kernels->round_values(n, shift, c.shift);
}
