/* Channels whose gamma is so small that results are subnormal, and gradients that are: with those, some CPUs take a hundred
 * times as long for an instruction. Gamma and beta of such a channel are taken times a power of two, and the results
 * less it when all are there (BNFAST_LOWER); so are gradients before their backward (BNFAST_LIFT). */

#include "block.h"

#include <math.h>
#include <stdint.h>
#include <string.h>

/* ---- channels ---------------------------------------------------------------------------------------------------- */

enum { GROUP = 128 }; /* channels at once */

/* Whether results may be lifted: they are gamma times something, plus beta. */
static int lifts_channels(const bnfast_job *job)
{
    const int flags = map_flags(job), forward = !sums_products(job);
    const int has_top = job->rectifies && job->rectifier.top == job->rectifier.top;
    return job->lifted && job->kernels->lift_exponent && applies(job) && job->operation != BNFAST_JVP &&
           !(forward && (flags & (BNFAST_ADD | BNFAST_MARK) || has_top));
}

static void read_values(const bnfast_parameter *parameter, double otherwise, ptrdiff_t n, double *values)
{
    for (ptrdiff_t k = 0; k < n; k++)
        values[k] = parameter->wide ? parameter->wide[k] : parameter->narrow ? (double)parameter->narrow[k] : otherwise;
}

static void read_inv_std(const bnfast_channels *of, ptrdiff_t n, double *values)
{
    for (ptrdiff_t k = 0; k < n; k++)
        values[k] = of->inv_std ? of->inv_std[k] : of->var ? 1.0 / sqrt(of->var[k] + of->eps) : 1.0;
}

/* Whether nothing but gamma is out of the ordinary. limit: numbers below it, times 2**lift_exponent and any finite one,
 * stay within the range */
static int is_small(const bnfast_job *job, const bnfast_channels *of, ptrdiff_t k, double gamma, double beta,
                    double inv_std, double limit)
{
    const double most = 1 / limit;
    if (gamma == 0.0 || !(fabs(gamma) < limit && fabs(gamma * inv_std) < limit && inv_std >= 0.0625))
        return 0;
    if (sums_products(job))
        return maps_u_only(job) ||
               (inv_std < most && fabs(of->dbeta[k]) < most * of->count && fabs(of->dgamma[k]) < most * of->count);
    return fabs(beta) < 1e7 && fabs(of->mean[k]) < most && (of->operation == BNFAST_EVAL || of->b[k] < 1e75);
}

/* Of n numbers of `size` bytes those that are small. */
static void take_values(const unsigned char *small, ptrdiff_t n, ptrdiff_t size, const void *values, void *out)
{
    for (ptrdiff_t k = 0; k < n; k++)
        if (small[k] && size == 8)
            ((double *)out)[k] = ((const double *)values)[k];
        else if (small[k])
            ((float *)out)[k] = ((const float *)values)[k];
}

/* Of the block's i-th channel and those behind it, n <= GROUP of them. */
static void lift_group(const bnfast_job *job, const bnfast_block *block, ptrdiff_t i, ptrdiff_t n)
{
    bnfast_channels of = bnfast_channels_of(job, block, i);
    const double up = ldexp(1.0, job->kernels->lift_exponent), limit = ldexp(1.0, -job->kernels->lift_exponent - 4);
    const bnfast_coefficients there = of.c;
    double gamma[GROUP], beta[GROUP], inv_std[GROUP], made[6][GROUP];
    unsigned char small[GROUP];
    int any = 0;
    read_values(&of.gamma, 1.0, n, gamma);
    read_values(&of.beta, 0.0, n, beta);
    read_inv_std(&of, n, inv_std);
    for (ptrdiff_t k = 0; k < n; k++)
        any |= small[k] = (unsigned char)is_small(job, &of, k, gamma[k], beta[k], inv_std[k], limit);
    if (!any)
        return;
    if (job->operation == BNFAST_FORWARD && !job->kernels->narrow) { /* whose shift has what the mean was rounded by */
        for (ptrdiff_t k = 0; k < n; k++)
            if (small[k]) {
                ((double *)there.scale)[k] *= up;
                ((double *)there.shift)[k] *= up;
            }
        memcpy(job->lifted + block->first + i, small, (size_t)n);
        return;
    }
    for (ptrdiff_t k = 0; k < n; k++) {
        gamma[k] *= up * (sums_products(job) ? 1.0 : inv_std[k]);
        beta[k] *= up;
    }
    of.gamma = (bnfast_parameter){gamma, NULL};
    of.beta = (bnfast_parameter){beta, NULL};
    if (!sums_products(job)) { /* eval with a scale as it is */
        of.operation = BNFAST_EVAL;
        of.var = of.m2 = NULL;
    } else if (!maps_u_only(job))
        of.operation = BNFAST_BACKWARD_APPLY;
    of.c = (bnfast_coefficients){made[0], made[1], made[2], made[3], made[4], made[5], NULL, NULL, of.c.rectifier};
    job->kernels->make_coefficients(n, &of);
    void *const to[6] = {there.center, there.scale, there.shift, there.u_center, there.u_scale, there.hat_scale};
    for (int each = 0; each < (maps_gradient(job) ? 6 : 3); each++)
        take_values(small, n, job->kernels->coefficient_size, made[each], to[each]);
    memcpy(job->lifted + block->first + i, small, (size_t)n);
}

void bnfast_lift_channels(const bnfast_job *job, const bnfast_block *block, ptrdiff_t i, ptrdiff_t n)
{
    for (ptrdiff_t first = i; lifts_channels(job) && first < i + n; first += GROUP)
        lift_group(job, block, first, least(i + n - first, GROUP));
}

/* ---- gradients --------------------------------------------------------------------------------------------------- */

int bnfast_is_subnormal(const bnfast_job *job)
{
    enum { SAMPLES = 16, ENOUGH = 2 };
    const ptrdiff_t size = job->kernels->itemsize, n = job->outer * job->channels * job->inner;
    int found = 0;
    if (!job->kernels->lift_exponent || !sums_products(job) || job->operation == BNFAST_JVP)
        return 0;
    for (int i = 0; i < SAMPLES; i++) {
        const ptrdiff_t at = (n - 1) / (SAMPLES - 1) * i + (n - 1) % (SAMPLES - 1) * i / (SAMPLES - 1);
        const char *const element = (const char *)job->u + at * size;
        uint64_t wide;
        uint32_t narrow;
        if (size == 8) {
            memcpy(&wide, element, sizeof wide);
            found += (wide << 1) - 1 < ((uint64_t)1 << 53) - 1; /* without its sign below the least normal, not 0 */
        } else {
            memcpy(&narrow, element, sizeof narrow);
            found += (narrow << 1) - 1 < ((uint32_t)1 << 24) - 1;
        }
    }
    return found >= ENOUGH;
}
