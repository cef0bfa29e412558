/* Channels at the edges of their dtype's range: whose scale is subnormal or beyond it, whose values lie further apart than
 * its largest number, whose squares leave float64. They are few, if any, and found when coefficients are made. Their
 * statistics are made again here, with a power of two taken out, and their elements are mapped one by one, in float64,
 * factor by factor, so that no product leaves the range before the result does. */

#include "block.h"

#include <float.h>
#include <math.h>
#include <string.h>

/* ---- elements and numbers ---------------------------------------------------------------------------------------- */

static double read_one(const bnfast_kernels *kernels, const void *p)
{
    float narrow;
    double wide;
    if (kernels->narrow) {
        kernels->widen_values(1, p, &narrow);
        return (double)narrow;
    }
    memcpy(&wide, p, sizeof wide); /* of float64, the only one */
    return wide;
}

static void write_one(const bnfast_kernels *kernels, void *p, double value)
{
    const float narrow = (float)value;
    if (kernels->narrow)
        kernels->narrow_values(1, &narrow, p);
    else
        kernels->narrow_values(1, &value, p);
}

static int is_finite(double value) { return value - value == 0.0; }

/* a * b * c, in whatever order it does not leave the range. */
static double product(double a, double b, double c)
{
    int of_a, of_b, of_c;
    const double digits = frexp(a, &of_a) * frexp(b, &of_b) * frexp(c, &of_c);
    return is_finite(digits) ? ldexp(digits, of_a + of_b + of_c) : a * b * c;
}

static double one_of(const bnfast_parameter *parameter, double otherwise)
{
    return parameter->wide ? *parameter->wide : parameter->narrow ? (double)*parameter->narrow : otherwise;
}

/* ---- a channel --------------------------------------------------------------------------------------------------- */

/* mean + rest is the mean; of a gradient: u_mean, hat_mean: means of u and of u * x_hat */
typedef struct {
    double mean, rest, inv_std, gamma, beta, vgamma, vbeta, u_mean, hat_mean;
} channel;

static channel channel_of(const bnfast_job *job, const bnfast_channels *of)
{
    channel c = {
        .mean = *of->mean,
        .gamma = one_of(&of->gamma, 1.0),
        .beta = one_of(&of->beta, 0.0),
        .vgamma = one_of(&of->vgamma, 0.0),
        .vbeta = one_of(&of->vbeta, maps_u_only(job) ? -0.0 : 0.0),
    };
    c.inv_std = of->inv_std ? *of->inv_std : of->var ? 1.0 / sqrt(*of->var + of->eps) : 1.0;
    if (job->operation == BNFAST_FORWARD)
        c.rest = *of->a; /* where `again` has left it */
    else if (of->mean_rest)
        c.rest = *of->mean_rest;
    if (maps_gradient(job)) {
        c.u_mean = (of->dbeta ? *of->dbeta : *of->a) / of->count;
        c.hat_mean = (of->dgamma ? *of->dgamma : *of->b) / of->count;
    }
    return c;
}

static double hat_of(const channel *c, double x)
{
    const double d = x - c->mean;
    if (d == 0.0 && c->rest == 0.0)
        return 0.0; /* whatever inv_std is */
    if (is_finite(d) || !is_finite(x) || !is_finite(c->mean))
        return (d - c->rest) * c->inv_std;
    return (x / 2 - c->mean / 2) * c->inv_std * 2;
}

static double passed_one(const bnfast_rectifier *r, double u, double v)
{
    return v <= 0.0 ? (r->slope <= 0.0 ? 0.0 : r->slope * u) : r->top <= v ? 0.0 : u;
}

static double rectified(const bnfast_rectifier *r, double v)
{
    return v <= 0.0 ? (r->slope <= 0.0 ? 0.0 : r->slope * v) : r->top <= v ? r->top : v;
}

/* Whether an element is marked, and marking it: other threads may mark the others of its byte. */
static int is_marked(const bnfast_job *job, const bnfast_marked *marked, ptrdiff_t i)
{
    const ptrdiff_t per_byte = job->kernels->marks_per_byte, number = marked->number + i;
    return marked->marks[number / per_byte] >> number % per_byte & 1;
}
static void mark(const bnfast_job *job, const bnfast_marked *marked, ptrdiff_t i, int passes)
{
    const ptrdiff_t per_byte = job->kernels->marks_per_byte, number = marked->number + i;
    unsigned char *const byte = marked->marks + number / per_byte;
    const unsigned char bit = (unsigned char)(1u << number % per_byte);
    if (per_byte == 1) { /* nobody else's, and all its bits alike, as vectors want them (marks.inc.h) */
        *byte = passes ? 0xFF : 0;
        return;
    }
#if defined(__GNUC__)
    if (passes)
        __atomic_fetch_or(byte, bit, __ATOMIC_RELAXED);
    else
        __atomic_fetch_and(byte, (unsigned char)~bit, __ATOMIC_RELAXED);
#endif
}

void bnfast_map_carefully(const bnfast_job *job, const bnfast_block *block, ptrdiff_t i, int flags, const void *x,
                          const void *u, void *out, const bnfast_marked *marked, ptrdiff_t n)
{
    const bnfast_kernels *const kernels = job->kernels;
    const bnfast_channels of = bnfast_channels_of(job, block, i);
    const channel c = channel_of(job, &of);
    const bnfast_rectifier *const r = &job->rectifier;
    for (ptrdiff_t at = 0; at < n; at++) {
        const ptrdiff_t offset = at * kernels->itemsize;
        const double x_value = read_one(kernels, (const char *)x + offset), hat = hat_of(&c, x_value);
        double u_value = read_one(kernels, (const char *)u + offset), v;
        if (maps_u_only(job))
            v = product(x_value, c.gamma, c.inv_std) + c.vbeta;
        else if (flags & BNFAST_GRADIENT) {
            if (flags & BNFAST_MARK)
                u_value = is_marked(job, marked, at) ? u_value : passed_one(r, u_value, 0.0);
            else if (flags & BNFAST_RECTIFY)
                u_value = passed_one(r, u_value, hat * c.gamma + c.beta);
            v = product(u_value - c.u_mean - hat * c.hat_mean, c.gamma, c.inv_std) + (hat * c.vgamma + c.vbeta);
            if (flags & BNFAST_MARK && marked->passed)
                write_one(kernels, (char *)marked->passed + offset, u_value);
        } else {
            v = hat * c.gamma + c.beta;
            if (flags & BNFAST_ADD)
                v += u_value;
            if (flags & BNFAST_MARK)
                mark(job, marked, at, !(v <= 0.0 || r->top <= v));
            if (flags & BNFAST_RECTIFY)
                v = rectified(r, v);
        }
        write_one(kernels, (char *)out + offset, v);
    }
}

/* ---- its statistics, again --------------------------------------------------------------------------------------- */

/* For each element e of a channel, in the order of memory, by its offset in bytes. */
#define FOR_EACH(job, channel, offset) \
    for (ptrdiff_t row_ = 0; row_ < (job)->outer; row_++) \
        for (ptrdiff_t offset = (row_ * period(job) + (channel) * (job)->inner) * (job)->kernels->itemsize, \
                       end_ = offset + (job)->inner * (job)->kernels->itemsize; \
             offset < end_; offset += (job)->kernels->itemsize)

/* Mean, m2 and inv_std, where float64 have not been wide enough. Twice through the elements: less their mean, of which a power
 * of two is taken out, so that the largest is between 1/2 and 1. Those that are not finite: as they are, but for the mean
 * of moments, which is their sum's. mean_rest: OUT, for the map */
static void moments_again(const bnfast_job *job, const bnfast_channels *of, ptrdiff_t at, double *mean_rest)
{
    const char *const x = job->x;
    const double first = read_one(job->kernels, x + at * job->inner * job->kernels->itemsize);
    double largest = 0.0, all = 0.0;
    int constant = 1;
    *mean_rest = 0.0;
    FOR_EACH(job, at, e)
    {
        const double value = read_one(job->kernels, x + e);
        largest = fabs(value) > largest ? fabs(value) : largest;
        all += is_finite(value) ? 0.0 : value;
        constant &= value == first;
    }
    if (all != 0.0) { /* an infinity or a NaN: it is all there is to the mean */
        if (job->operation == BNFAST_MOMENTS)
            *of->mean = all;
        return;
    }
    if (constant) { /* exactly, which sums of many would not be */
        *of->mean = first;
        if (of->mean_rest)
            *of->mean_rest = 0.0;
        if (of->m2)
            *of->m2 = 0.0;
        if (job->operation == BNFAST_FORWARD)
            *of->inv_std = 1.0 / sqrt(of->eps);
        return;
    }
    int exponent;
    frexp(largest, &exponent);
    double sum = 0.0, rest = 0.0, square = 0.0;
    FOR_EACH(job, at, e)
    sum += ldexp(read_one(job->kernels, x + e), -exponent);
    const double pivot = sum / of->count;
    FOR_EACH(job, at, e)
    {
        const double d = ldexp(read_one(job->kernels, x + e), -exponent) - pivot;
        rest += d;
        square += d * d;
    }
    const double mean = pivot + rest / of->count, left_of_m2 = square - rest * (rest / of->count);
    const double m2 = left_of_m2 < 0.0 ? 0.0 : left_of_m2;
    const double left = rest / of->count - (mean - pivot);
    *of->mean = ldexp(mean, exponent);
    if (of->mean_rest)
        *of->mean_rest = ldexp(left, exponent);
    if (of->m2) {
        *of->m2 = ldexp(m2, 2 * exponent);
        if (m2 > 0.0 && *of->m2 < of->count * DBL_TRUE_MIN)
            *of->m2 = of->count * DBL_TRUE_MIN; /* a variance that says that it is no constant */
    }
    if (job->operation == BNFAST_FORWARD) {
        const double eps = ldexp(of->eps, -2 * exponent);
        *of->inv_std = is_finite(eps) ? ldexp(1.0 / sqrt(m2 / of->count + eps), -exponent) : 1.0 / sqrt(of->eps);
        *mean_rest = ldexp(left, exponent);
    }
}

/* The sums of a gradient, where products have left the range: of u * x_hat, each factor by itself. Not where what is
 * summed is not finite itself. */
static void sums_again(const bnfast_job *job, const bnfast_channels *of, ptrdiff_t at)
{
    const channel c = channel_of(job, of);
    const char *const x = job->x, *const u = passed_early(job) ? job->passed : job->u;
    const bnfast_marked marked = {job->marks, job->first_mark, NULL};
    double sum = 0.0, sum_hat = 0.0;
    FOR_EACH(job, at, e)
    {
        const double hat = hat_of(&c, read_one(job->kernels, x + e));
        double value = read_one(job->kernels, u + e);
        if (passes(job) && !passed_early(job) && job->marks)
            value =
                is_marked(job, &marked, e / job->kernels->itemsize) ? value : passed_one(&job->rectifier, value, 0.0);
        else if (passes(job) && !passed_early(job)) {
            double v = hat * c.gamma + c.beta;
            if (job->residual)
                v += read_one(job->kernels, (const char *)job->residual + e);
            value = passed_one(&job->rectifier, value, v);
        }
        if (!is_finite(value) || !is_finite(hat))
            return;
        sum += value;
        sum_hat += value * hat;
    }
    *of->dbeta = sum;
    *of->dgamma = sum_hat;
}

/* ---- which channels ---------------------------------------------------------------------------------------------- */

static int is_at_most(double value, double most) { return fabs(value) <= most; }

/* Whether all that is out of the ordinary is a gamma that is zero, or, of y, so small that what its product with inv_std
 * loses is less than a few of the least number that the result can be. */
static int is_only_gamma(const bnfast_job *job, const channel *c, double m2)
{
    const int narrow = job->kernels->narrow;
    const double most = narrow ? 1e30 : 1e290, least_inv_std = c->gamma == 0.0 ? 1 / most : 0.0625;
    return is_at_most(c->gamma, sums_products(job) ? 0.0 : 1 / most) && c->inv_std >= least_inv_std &&
           is_at_most(c->inv_std, most) && is_at_most(c->beta, most) && is_at_most(c->vgamma, most) &&
           is_at_most(c->vbeta, most) && is_at_most(c->u_mean, most) && is_at_most(c->hat_mean, most) &&
           (job->operation == BNFAST_FORWARD ? m2 <= (narrow ? 1e75 : 1e299)
                                             : job->operation != BNFAST_EVAL || is_at_most(c->mean, most));
}

static int is_at_edge(const bnfast_job *job, const bnfast_channels *of)
{
    ptrdiff_t small;
    return job->kernels->edges(1, of, &small) > 0;
}

/* What is to be made again of a channel at an edge; whether its map has to be careful, too. */
static unsigned char again(const bnfast_job *job, const bnfast_block *block, ptrdiff_t i, bnfast_channels of)
{
    double *const a = block->a + i, *const b = block->b + i;
    if (!sums_products(job)) {
        if (reduces(job)) {
            const int narrow = job->kernels->narrow;
            const int lost = narrow ? job->operation == BNFAST_MOMENTS && !is_finite(*of.mean)
                                    : job->kernels->edges_of_m2(1, &of) > 0;
            *a = 0.0;                                           /* no rest */
            if (!lost && applies(job) && is_finite(*of.mean)) { /* a gamma near 0, perhaps: its statistics stay */
                const channel c = channel_of(job, &of);
                if (is_only_gamma(job, &c, *b))
                    return 0;
            }
            if (lost || !narrow) /* float64: also for the rest of its mean, which the map takes off */
                moments_again(job, &of, block->first + i, a);
        }
        if (!applies(job) || !is_finite(*of.mean))
            return 0;
        const channel c = channel_of(job, &of);
        return !is_only_gamma(job, &c, reduces(job) ? *b : 0.0);
    }
    int sums_too = 0;
    if (reduces(job) && job->operation != BNFAST_BACKWARD_APPLY) { /* whose sums are given */
        of.operation = BNFAST_BACKWARD_SUMS;
        sums_too = is_at_edge(job, &of);
        if (of.dbeta == NULL) { /* a place for them */
            const double hi = job->kernels->narrow ? (double)(float)*of.mean : *of.mean;
            *b = (*b - (*of.mean - hi) * *a) * *of.inv_std;
            of.dbeta = a;
            of.dgamma = b;
        }
        if (sums_too)
            sums_again(job, &of, block->first + i);
    }
    if (!applies(job))
        return 0;
    const channel c = channel_of(job, &of);
    if (is_only_gamma(job, &c, 0.0) && (!sums_too || maps_u_only(job))) /* else its coefficients are to be made again */
        return 0;
    if (maps_u_only(job))
        of.operation = BNFAST_EVAL; /* whose coefficients these are, for `edges` */
    else {
        if (!is_finite(*of.dbeta) || !is_finite(*of.dgamma))
            return 0;
        of.operation = BNFAST_BACKWARD_APPLY;
        job->kernels->make_coefficients(1, &of);
    }
    return (unsigned char)is_at_edge(job, &of);
}

void bnfast_find_careful(const bnfast_job *job, const bnfast_block *block, ptrdiff_t i, ptrdiff_t n)
{
    const bnfast_channels all = bnfast_channels_of(job, block, i);
    ptrdiff_t small;
    bnfast_lift_channels(job, block, i, n);
    if (job->kernels->edges(n, &all, &small) == 0) /* what there was is lifted */
        return;
    for (ptrdiff_t c = i; c < i + n; c++) {
        if (job->lifted && job->lifted[block->first + c])
            continue;
        const bnfast_channels one = bnfast_channels_of(job, block, c);
        if (is_at_edge(job, &one))
            block->careful[c] = again(job, block, c, one);
    }
}

int bnfast_some_careful(const bnfast_block *block, ptrdiff_t i, ptrdiff_t n)
{
    return memchr(block->careful + i, 1, (size_t)n) != NULL;
}
