/* The kernels without Python: every leaf of every table this CPU can run, and whole jobs, on buffers that end (or
 * begin) where a guard page does, or that malloc gave to the byte, for AddressSanitizer and Valgrind to watch. What
 * they write is compared with plain loops in long double, and, bit for bit, with what the other instruction sets write.
 *
 *   driver [leaves] [jobs] [poison] [isa=NAME] [sizes=N] [threads=N]
 *
 * A job's tasks run on N threads of their own, made and joined for each job, with the gates between phases that the
 * extension has: ThreadSanitizer sees joins and gates, which it does not in libgomp. It prints digests of what was
 * written, for comparison with other processors and compilers. Built with -DFUZZ it is a target
 * for libFuzzer. The exit status is 1 at the first wrong value; a byte too far is a signal, or the tool's report. */

#define _GNU_SOURCE
#include "kernels/job.h"
#include "runtime/gate.h"
#include "runtime/shares.h"

#include <float.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* ---- buffers ----------------------------------------------------------------------------------------------------- */

/* BEHIND, BEFORE: a guard page right behind the last, right before the first element. SHIFTED: `shift` elements into a
 * cache line. HEAP: malloc, to the byte. Canaries in the rest of the page tell of what was written there. */
typedef enum { BEHIND, BEFORE, SHIFTED, HEAP, N_PLACES } place;

enum { PAGE = 4096, SLOT = 1 << 21, N_SLOTS = 40, MARGIN = 320, CANARY = 0xA5 };

typedef struct {
    unsigned char *base, *at; /* of the slot; of the buffer */
    size_t bytes;
    int heap;
} buffer;

static buffer buffers[N_SLOTS];
static int n_used;
static place where;
static ptrdiff_t shift;
static char context[300];

static void fail(const char *what, ptrdiff_t i, double got, double expected)
{
    fprintf(stderr, "%s: %s [%td] is %.17g, not %.17g\n", context, what, i, got, expected);
    abort();
}

static void on_signal(int number)
{
    if (write(2, context, strlen(context)) < 0 || write(2, ": signal\n", 9) < 0)
        _exit(3);
    signal(number, SIG_DFL);
    raise(number);
}

static ptrdiff_t least(ptrdiff_t a, ptrdiff_t b) { return a < b ? a : b; }
static ptrdiff_t round_up(ptrdiff_t a, ptrdiff_t step) { return (a + step - 1) / step * step; }

static void *new_buffer(ptrdiff_t n, size_t size)
{
    buffer *b = &buffers[n_used++];
    if (n_used > N_SLOTS) {
        fprintf(stderr, "driver: more than %d buffers\n", N_SLOTS);
        abort();
    }
    b->bytes = (size_t)n * size;
    b->heap = where == HEAP || b->bytes + MARGIN + PAGE > SLOT;
    if (b->heap) {
        b->at = malloc(b->bytes);
        if (b->at == NULL && b->bytes > 0)
            abort();
        return b->at;
    }
    if (b->base == NULL) {
        unsigned char *all = mmap(NULL, SLOT + 2 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (all == MAP_FAILED || mprotect(all + PAGE, SLOT, PROT_READ | PROT_WRITE) != 0)
            abort();
        b->base = all + PAGE;
    }
    b->at = where == BEHIND ? b->base + SLOT - b->bytes : b->base + (where == SHIFTED ? (size_t)shift * size : 0);
    unsigned char *from = b->at - least(MARGIN, b->at - b->base), *to = b->at + b->bytes;
    memset(from, CANARY, (size_t)(b->at - from));
    memset(to, CANARY, (size_t)least(MARGIN, b->base + SLOT - to));
    return b->at;
}

static void release_buffers(void)
{
    while (n_used > 0) {
        buffer *b = &buffers[--n_used];
        if (b->heap) {
            free(b->at);
            continue;
        }
        const unsigned char *end = b->at + b->bytes;
        for (const unsigned char *p = b->at - least(MARGIN, b->at - b->base); p < b->at; p++)
            if (*p != CANARY)
                fail("written before the buffer", p - b->at, *p, CANARY);
        for (const unsigned char *p = end; p < end + least(MARGIN, b->base + SLOT - end); p++)
            if (*p != CANARY)
                fail("written behind the buffer", p - end, *p, CANARY);
    }
}

/* ---- values ------------------------------------------------------------------------------------------------------ */

static uint64_t random_state = 88172645463325252u;
static double random_value(void) /* in (-1, 1) */
{
    random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
    return (double)(int64_t)(random_state >> 11) / 4503599627370496.0 - 1.0;
}

static const bnfast_kernels *k; /* the table under test */

static double get(const void *p, ptrdiff_t i)
{
    if (k->itemsize == 2) {
        float value;
        k->widen_values(1, (const uint16_t *)p + i, &value);
        return (double)value;
    }
    return k->narrow ? (double)((const float *)p)[i] : ((const double *)p)[i];
}
static void put(void *p, ptrdiff_t i, double value)
{
    const float narrow = (float)value;
    if (k->itemsize == 2)
        k->narrow_values(1, &narrow, (uint16_t *)p + i);
    else if (k->narrow)
        ((float *)p)[i] = narrow;
    else
        ((double *)p)[i] = value;
}

static void *new_values(ptrdiff_t n, double center)
{
    void *p = new_buffer(n, (size_t)k->itemsize);
    for (ptrdiff_t i = 0; i < n; i++)
        put(p, i, center + random_value());
    return p;
}
static double *new_doubles(ptrdiff_t n, double center)
{
    double *p = new_buffer(n, sizeof *p);
    for (ptrdiff_t i = 0; i < n; i++)
        p[i] = center + random_value();
    return p;
}

/* n statistics as float32; they, and what is kept of them, become what that holds. */
static float *narrow_of(double *values, double *kept, ptrdiff_t n)
{
    float *narrow = new_buffer(n, sizeof *narrow);
    for (ptrdiff_t i = 0; i < n; i++) {
        narrow[i] = (float)values[i];
        values[i] = (double)narrow[i];
        if (kept)
            kept[i] = values[i];
    }
    return narrow;
}

/* float32 or float64, by chance. */
static bnfast_parameter new_parameter(ptrdiff_t n, double center)
{
    double *const values = new_doubles(n, center);
    if (random_value() < 0)
        return (bnfast_parameter){values, NULL};
    float *const narrow = new_buffer(n, sizeof *narrow);
    for (ptrdiff_t i = 0; i < n; i++)
        narrow[i] = (float)values[i];
    return (bnfast_parameter){NULL, narrow};
}

static long double parameter_at(const bnfast_parameter *parameter, ptrdiff_t i, double otherwise)
{
    return parameter->wide ? parameter->wide[i] : parameter->narrow ? (double)parameter->narrow[i] : otherwise;
}

/* NaN in the gaps between rows: what reads one shows it. */
static void *new_rows(ptrdiff_t n_rows, ptrdiff_t stride, ptrdiff_t length, double center)
{
    const ptrdiff_t n = n_rows > 0 ? (n_rows - 1) * stride + length : 0;
    void *p = new_values(n, center);
    for (ptrdiff_t i = 0; i < n; i++)
        if (i % stride >= length)
            put(p, i, (double)NAN);
    return p;
}

/* Of all bytes that the tables wrote, one number for each: the same for every instruction set. */
static uint64_t digest;
static void note(const void *p, size_t bytes)
{
    const unsigned char *c = p;
    for (size_t i = 0; i < bytes; i++)
        digest = (digest ^ c[i]) * 1099511628211u;
}

/* Which NaN it is (its sign, its payload) no standard says, and compilers swap the operands of an addition. */
static void note_values(const void *p, ptrdiff_t n, ptrdiff_t itemsize)
{
    static const char nan[8] = "not one";
    for (ptrdiff_t i = 0; i < n; i++) {
        const char *value = (const char *)p + i * itemsize;
        const int is_nan = itemsize == 8 ? isnan(*(const double *)value) : isnan(get(value, 0));
        note(is_nan ? nan : value, (size_t)itemsize);
    }
}

/* Of the data: what is more exact, statistics of halves say, tests in Python judge. */
static double epsilon(void)
{
    return k->dtype == BNFAST_FLOAT16    ? 0x1p-10
           : k->dtype == BNFAST_BFLOAT16 ? 0x1p-7
           : k->narrow                   ? (double)FLT_EPSILON
                                         : DBL_EPSILON;
}

/* *sum += value, and what that rounds away into *rest (Knuth): under Valgrind a long double has 53 bits only, and plain
 * sums of thousands of values would be less exact than what they judge. */
static void add(long double *sum, long double *rest, long double value)
{
    const long double s = *sum, t = s + value, v = t - s;
    *rest += (s - (t - v)) + (value - v);
    *sum = t;
}

static void expect(const char *what, ptrdiff_t i, double got, long double expected, long double scale)
{
    if (!(fabsl((long double)got - expected) <= 40 * (long double)epsilon() * scale))
        fail(what, i, got, (double)expected);
}

/* ---- activations ------------------------------------------------------------------------------------------------- */

/* With slopes whose products are exact. */
static const bnfast_rectifier rectifiers[] = {{0, (double)NAN}, {0, 2}, {0.25, (double)NAN}};
enum { N_RECTIFIERS = sizeof rectifiers / sizeof rectifiers[0] };

static long double rectified(const bnfast_rectifier *r, long double v)
{
    return v <= 0 ? (r->slope > 0 ? (long double)r->slope * v : 0) : v >= (long double)r->top ? (long double)r->top : v;
}

/* u times the derivative at v */
static double taken(const bnfast_rectifier *r, double u, double v)
{
    return v <= 0 ? (r->slope > 0 ? r->slope * u : 0) : v >= r->top ? 0 : u;
}

/* (x - center) * scale + shift + residual in the dtype: the side of a kink on which it lies has no tolerance. */
static double y_of(double x, double center, double scale, double shift_, double residual)
{
    if (!k->narrow) {
        const double scaled = (x - center) * scale, y = scaled + shift_;
        return y + residual;
    }
    const float scaled = ((float)x - (float)center) * (float)scale, y = scaled + (float)shift_;
    return (double)(y + (float)residual);
}

/* What sums take of u: all; what an activation passes, with a residual or without; and whether that is stored. */
typedef enum { ALL, PASSED, PASSED_WITH_RESIDUAL, STORED, STORED_WITH_RESIDUAL, N_KINDS } kind_of_sums;

typedef struct {
    bnfast_passing passing;
    const void *taken; /* like u: what it should take */
} taking;

/* Of n_rows rows, `stride` apart, of n_channels channels of `length`. */
static taking new_taking(kind_of_sums kind, const void *x, const void *u, const void *center, ptrdiff_t n_rows,
                         ptrdiff_t stride, ptrdiff_t n_channels, ptrdiff_t length)
{
    taking t = {.taken = u};
    if (kind == ALL)
        return t;
    const ptrdiff_t n = n_channels * length;
    const void *residual =
        kind == PASSED_WITH_RESIDUAL || kind == STORED_WITH_RESIDUAL ? new_rows(n_rows, stride, n, -1) : NULL;
    void *expected = new_rows(n_rows, stride, n, 0);
    t.passing.rectifier = rectifiers[(n_rows + n + (ptrdiff_t)kind) % N_RECTIFIERS];
    t.passing.y_scale = new_values(n_channels, 1), t.passing.y_shift = new_values(n_channels, 0.5);
    t.passing.residual = residual;
    t.passing.passed = kind >= STORED ? new_rows(n_rows, stride, n, 9) : NULL;
    for (ptrdiff_t r = 0; r < n_rows; r++)
        for (ptrdiff_t j = 0; j < n; j++) {
            const ptrdiff_t at = r * stride + j, i = j / length;
            const double y = y_of(get(x, at), get(center, i), get(t.passing.y_scale, i), get(t.passing.y_shift, i),
                                  residual ? get(residual, at) : 0);
            put(expected, at, taken(&t.passing.rectifier, get(u, at), y));
        }
    t.taken = expected;
    return t;
}

static void expect_stored(const taking *t, ptrdiff_t n_rows, ptrdiff_t stride, ptrdiff_t n)
{
    for (ptrdiff_t i = 0; t->passing.passed && i < (n_rows - 1) * stride + n; i++) {
        const double found = get(t->passing.passed, i), expected = i % stride < n ? get(t->taken, i) : (double)NAN;
        if (!(found == expected || (isnan(found) && isnan(expected))))
            fail("stored", i, found, expected);
    }
}

/* ---- leaves ------------------------------------------------------------------------------------------------------ */

/* One column against what the leaf says of it. x, u: first element, then n_rows of `length`, `stride` apart */
static void expect_reduced(const void *x, const void *u, ptrdiff_t first, ptrdiff_t n_rows, ptrdiff_t stride,
                           ptrdiff_t length, double center, double a, double b)
{
    long double sum = 0, dot = 0, size = 0, size_dot = 0, m2 = 0;
    for (ptrdiff_t r = 0; r < n_rows; r++)
        for (ptrdiff_t j = 0; j < length; j++) {
            const ptrdiff_t at = first + r * stride + j;
            const long double d = (long double)get(x, at) - (long double)center, v = u ? (long double)get(u, at) : d;
            sum += v, dot += v * d;
            size += fabsl(v), size_dot += fabsl(v * d);
        }
    if (u) {
        expect("sum", first, a, sum, size);
        expect("dot", first, b, dot, size_dot);
        return;
    }
    const long double n = (long double)n_rows * (long double)length, mean = sum / n;
    for (ptrdiff_t r = 0; r < n_rows; r++)
        for (ptrdiff_t j = 0; j < length; j++) {
            const long double d = (long double)get(x, first + r * stride + j) - (long double)center - mean;
            m2 += d * d;
        }
    expect("mean", first, a, mean, 4 + fabsl((long double)center));
    expect("m2", first, b, m2, m2 + (long double)epsilon());
    if (b < 0)
        fail("negative m2", first, b, 0);
}

static void expect_packed(const char *what, const void *packed, const void *x, ptrdiff_t n_rows, ptrdiff_t stride,
                          ptrdiff_t n)
{
    for (ptrdiff_t i = 0; i < n_rows * n; i++)
        if (get(packed, i) != get(x, i / n * stride + i % n))
            fail(what, i, get(packed, i), get(x, i / n * stride + i % n));
}

static void reductions(ptrdiff_t n_rows, ptrdiff_t n, ptrdiff_t gap, kind_of_sums kind)
{
    const ptrdiff_t stride = n + gap;
    const void *x = new_rows(n_rows, stride, n, 3), *u = new_rows(n_rows, stride, n, 0.5);
    const void *center = new_values(n, 3);
    double *a = new_buffer(n, 8), *b = new_buffer(n, 8);
    void *packed_x = new_buffer(n_rows * n, (size_t)k->itemsize),
         *packed_u = new_buffer(n_rows * n, (size_t)k->itemsize);
    const taking t = new_taking(kind, x, u, center, n_rows, stride, n, 1);
    for (int option = 0; option < 3; option++) {
        const bnfast_rows rows = {n_rows, stride, n, 0, option == 2};
        const int pack = option == 1;
        k->moments_interleaved(x, &rows, center, a, b, pack ? packed_x : NULL);
        for (ptrdiff_t j = 0; j < n; j++)
            expect_reduced(x, NULL, j, n_rows, stride, 1, get(center, j), a[j], b[j]);
        note(a, (size_t)n * 8), note(b, (size_t)n * 8);
        if (pack)
            expect_packed("packed x", packed_x, x, n_rows, stride, n);
        k->exact_moments_interleaved(x, &rows, center, a, b, NULL);
        for (ptrdiff_t j = 0; j < n; j++)
            expect_reduced(x, NULL, j, n_rows, stride, 1, get(center, j), a[j], b[j]);
        note(a, (size_t)n * 8), note(b, (size_t)n * 8);
        k->sums_interleaved(x, u, &rows, center, kind == ALL ? NULL : &t.passing, a, b, pack ? packed_x : NULL,
                            pack ? packed_u : NULL);
        for (ptrdiff_t j = 0; j < n; j++)
            expect_reduced(x, t.taken, j, n_rows, stride, 1, get(center, j), a[j], b[j]);
        note(a, (size_t)n * 8), note(b, (size_t)n * 8);
        expect_stored(&t, n_rows, stride, n);
        if (pack) {
            expect_packed("packed x", packed_x, x, n_rows, stride, n);
            expect_packed("packed u", packed_u, t.taken, n_rows, stride, n);
        }
    }
    release_buffers();
}

enum { N_COEFFICIENTS = 8 };

static bnfast_coefficients new_coefficients(ptrdiff_t n, ptrdiff_t pad, int flags)
{
    bnfast_coefficients c = {.rectifier = rectifiers[flags & BNFAST_RELU ? 0 : (n + flags) % N_RECTIFIERS]};
    void **array[N_COEFFICIENTS] = {&c.center,  &c.scale,     &c.shift,   &c.u_center,
                                    &c.u_scale, &c.hat_scale, &c.y_scale, &c.y_shift};
    for (int i = 0; i < N_COEFFICIENTS; i++) {
        /* y, which an activation meets, on both sides of its kinks */
        const int moved = array[i] == &c.y_shift || (array[i] == &c.shift && !(flags & BNFAST_GRADIENT));
        *array[i] = new_values(n + pad, moved ? -1 : 1);
        for (ptrdiff_t j = 0; j < pad; j++)
            put(*array[i], n + j, get(*array[i], j % n));
    }
    return c;
}

static void expect_mapped(const bnfast_coefficients *c, ptrdiff_t j, double x, double u, int flags, double got)
{
    const long double scaled = ((long double)x - get(c->center, j)) * get(c->scale, j), shift_ = get(c->shift, j);
    if (flags & BNFAST_GRADIENT) {
        if (flags & BNFAST_RECTIFY)
            u = taken(&c->rectifier, u, y_of(x, get(c->center, j), get(c->y_scale, j), get(c->y_shift, j), 0));
        const long double first = ((long double)u - get(c->u_center, j)) * get(c->u_scale, j),
                          second = scaled * get(c->hat_scale, j);
        expect("gradient", j, got, first + second + shift_, fabsl(first) + fabsl(second) + fabsl(shift_));
        return;
    }
    const long double residual = flags & BNFAST_ADD ? u : 0, y = scaled + shift_ + residual;
    expect("normalize", j, got, flags & BNFAST_RECTIFY ? rectified(&c->rectifier, y) : y,
           fabsl(scaled) + fabsl(shift_) + fabsl(residual));
}

static int reads_u(int flags) { return (flags & (BNFAST_GRADIENT | BNFAST_ADD)) != 0; }

/* planar: n_rows of n_channels runs of `length`; interleaved: n_rows of `length` columns, n_channels being 0 */
static void map(ptrdiff_t n_rows, ptrdiff_t n_channels, ptrdiff_t length, ptrdiff_t gap, int flags, int stream,
                int in_place, int look_ahead)
{
    const ptrdiff_t n = n_channels ? n_channels * length : length, stride = n + gap;
    const ptrdiff_t out_stride = n_channels || in_place ? stride : n + 2 * gap;
    const ptrdiff_t u_stride = n_channels || in_place == 2 ? stride : n + 3 * gap;
    void *x = new_rows(n_rows, stride, n, 3), *u = new_rows(n_rows, u_stride, n, 0.5);
    void *out = in_place == 1 ? x : in_place == 2 ? u : new_rows(n_rows, out_stride, n, 9);
    const bnfast_coefficients c = new_coefficients(n_channels ? n_channels : n, n_channels ? 0 : BNFAST_PAD, flags);
    const void *old_x = x, *old_u = u;
    const ptrdiff_t total = n_rows > 0 ? (n_rows - 1) * stride + n : 0;
    if (in_place) {
        void *copy = new_buffer(total, (size_t)k->itemsize);
        memcpy(copy, out, (size_t)(total * k->itemsize));
        if (in_place == 1)
            old_x = copy;
        else
            old_u = copy;
    }
    if (n_channels) {
        bnfast_writer writer = {.x = x,
                                .u = reads_u(flags) ? u : x,
                                .out = out,
                                .runs = {n_rows, stride, n_channels, length},
                                .coefficients = c,
                                .map = flags,
                                .stream = stream,
                                .ahead = look_ahead ? n : 0};
        k->write_rest(&writer);
    } else {
        const bnfast_columns columns = {.n_rows = n_rows,
                                        .n_columns = n,
                                        .stride = stride,
                                        .u_stride = u_stride,
                                        .out_stride = out_stride,
                                        .next_x = look_ahead ? (const char *)x + n * k->itemsize : NULL,
                                        .next_u = look_ahead ? (const char *)u + n * k->itemsize : NULL,
                                        .row_by_row = (n_rows + n) % 2 == 0};
        const bnfast_marked marked = {NULL, 0, NULL};
        k->map_interleaved(x, reads_u(flags) ? u : x, out, &marked, &columns, &c, flags, stream);
    }
    bnfast_stream_fence();
    for (ptrdiff_t r = 0; r < n_rows; r++)
        for (ptrdiff_t j = 0; j < n; j++) {
            const ptrdiff_t at = r * stride + j;
            expect_mapped(&c, n_channels ? j / length : j, get(old_x, at), get(old_u, r * u_stride + j), flags,
                          get(out, r * out_stride + j));
        }
    for (ptrdiff_t r = 0; r < n_rows; r++)
        note((char *)out + r * out_stride * k->itemsize, (size_t)(n * k->itemsize));
    for (ptrdiff_t i = 0; i < (n_rows > 0 ? (n_rows - 1) * out_stride + n : 0); i++)
        if (i % out_stride >= n && !isnan(get(out, i)))
            fail("written between rows", i, get(out, i), (double)NAN);
    release_buffers();
}

/* Reductions of n_channels runs of `length`; beside: a map of as many goes on meanwhile, normalize during moments and
 * gradient during sums. */
static void planar_reductions(ptrdiff_t n_rows, ptrdiff_t n_channels, ptrdiff_t length, ptrdiff_t gap, int beside,
                              int stream, kind_of_sums kind)
{
    const ptrdiff_t n = n_channels * length, stride = n + gap;
    const bnfast_runs runs = {n_rows, stride, n_channels, length, length % 2 == 0, (n_rows + length) % 2 == 0};
    const void *x = new_rows(n_rows, stride, n, 3), *u = new_rows(n_rows, stride, n, 0.5);
    const void *center = new_values(n_channels, 3), *from = new_rows(n_rows, stride, n, 1);
    void *out = new_rows(n_rows, stride, n, 9);
    double *a = new_buffer(n_channels, 8), *b = new_buffer(n_channels, 8);
    const taking t = new_taking(kind, x, u, center, n_rows, stride, n_channels, length);
    bnfast_coefficients c = new_coefficients(n_channels, 0, BNFAST_GRADIENT);
    if (kind != ALL)
        c.rectifier = t.passing.rectifier;
    k->exact_moments_planar(x, &runs, n, center, a, b, NULL);
    for (ptrdiff_t i = 0; i < n_channels; i++)
        expect_reduced(x, NULL, i * length, n_rows, stride, length, get(center, i), a[i], b[i]);
    note(a, (size_t)n_channels * 8), note(b, (size_t)n_channels * 8);
    for (int gradient = kind == ALL ? 0 : 1; gradient < 2; gradient++) {
        /* the map of a gradient takes of u what the sums do, or finds it stored */
        const int passed = BNFAST_RECTIFY | (bnfast_is_relu(&c.rectifier) ? BNFAST_RELU : 0);
        const int flags = !gradient ? 0 : BNFAST_GRADIENT | (kind == PASSED ? passed : 0);
        bnfast_writer writer = {
            .x = from, .u = u, .out = out, .runs = runs, .coefficients = c, .map = flags, .stream = stream};
        if (gradient)
            k->sums_planar(x, u, &runs, n, center, kind == ALL ? NULL : &t.passing, a, b, beside ? &writer : NULL);
        else
            k->moments_planar(x, &runs, n, center, a, b, beside ? &writer : NULL);
        for (ptrdiff_t i = 0; i < n_channels; i++)
            expect_reduced(x, gradient ? t.taken : NULL, i * length, n_rows, stride, length, get(center, i), a[i],
                           b[i]);
        note(a, (size_t)n_channels * 8), note(b, (size_t)n_channels * 8);
        expect_stored(&t, n_rows, stride, n);
        if (!beside)
            continue;
        k->write_rest(&writer);
        bnfast_stream_fence();
        for (ptrdiff_t r = 0; r < n_rows; r++)
            for (ptrdiff_t j = 0; j < n; j++)
                expect_mapped(&c, j / length, get(from, r * stride + j), get(u, r * stride + j), flags,
                              get(out, r * stride + j));
        for (ptrdiff_t i = 0; i < (n_rows - 1) * stride + n; i++)
            if (i % stride >= n && !isnan(get(out, i)))
                fail("written between rows", i, get(out, i), (double)NAN);
    }
    release_buffers();
}

/* Results a channel and coefficients of every operation, against the formulas. */
static void coefficients(ptrdiff_t n, bnfast_operation operation, int few)
{
    const double count = 11;
    bnfast_channels of = {.operation = operation, .count = count, .eps = 1e-5};
    const double *a = new_doubles(n, 1), *b = new_doubles(n, 2);
    double *mean = new_doubles(n, 3), *inv_std = new_doubles(n, 2), *m2 = new_buffer(n, 8);
    const int given_sums = operation == BNFAST_BACKWARD_APPLY;
    double *dbeta = given_sums ? new_doubles(n, 1) : new_buffer(n, 8),
           *dgamma = given_sums ? new_doubles(n, 2) : new_buffer(n, 8);
    const void *center = new_values(n, 3);
    void **array[N_COEFFICIENTS] = {&of.c.center,  &of.c.scale,     &of.c.shift,   &of.c.u_center,
                                    &of.c.u_scale, &of.c.hat_scale, &of.c.y_scale, &of.c.y_shift};
    for (int i = 0; i < N_COEFFICIENTS; i++)
        *array[i] = new_values(n, 0);
    memcpy(of.c.center, center, (size_t)(n * k->itemsize));
    of.a = a, of.b = b, of.mean = mean, of.inv_std = inv_std;
    of.m2 = operation == BNFAST_EVAL || (few && operation != BNFAST_MOMENTS) ? NULL : m2; /* eval: of a batch, or var */
    if (!few) {
        of.gamma = new_parameter(n, 2), of.beta = new_parameter(n, 0), of.var = new_doubles(n, 2);
        if (operation == BNFAST_JVP)
            of.vgamma = new_parameter(n, 0), of.vbeta = new_parameter(n, 0);
    }
    if (!few || given_sums)
        of.dbeta = dbeta, of.dgamma = dgamma;
    double *given_mean = new_buffer(n, 8);
    memcpy(given_mean, mean, (size_t)n * 8);
    k->make_coefficients(n, &of);
    const int gradient = operation == BNFAST_BACKWARD || operation == BNFAST_JVP || given_sums;
    /* what rounding a centre of up to 5 leaves is rounded itself, to float64 and to the dtype */
    const long double rest = 5 * ((long double)epsilon() + DBL_EPSILON / (long double)epsilon());
    for (ptrdiff_t i = 0; i < n; i++) {
        const long double gamma = parameter_at(&of.gamma, i, 1), beta = parameter_at(&of.beta, i, 0);
        const long double vgamma = parameter_at(&of.vgamma, i, 0), vbeta = parameter_at(&of.vbeta, i, 0);
        if (operation == BNFAST_MOMENTS || operation == BNFAST_FORWARD)
            expect("mean", i, mean[i], (long double)get(center, i) + a[i], 5 * DBL_EPSILON / (long double)epsilon());
        if (of.m2 && (operation == BNFAST_MOMENTS || operation == BNFAST_FORWARD) && m2[i] != b[i])
            fail("m2", i, m2[i], b[i]);
        if (operation == BNFAST_MOMENTS)
            continue;
        long double s = inv_std[i];
        if (operation == BNFAST_FORWARD) {
            s = 1 / sqrtl((long double)b[i] / count + of.eps);
            expect("inv_std", i, inv_std[i], s, s);
        }
        if (operation == BNFAST_EVAL)
            s = of.var ? 1 / sqrtl((long double)of.var[i] + of.eps) : 1;
        const long double slope = gamma * s;
        if (operation == BNFAST_FORWARD || operation == BNFAST_EVAL) {
            /* at x = mean the map gives beta */
            expect("scale", i, get(of.c.scale, i), slope, fabsl(slope));
            const long double at_mean = ((long double)mean[i] - get(of.c.center, i)) * slope + get(of.c.shift, i);
            expect("shift", i, (double)at_mean, beta, fabsl(beta) + fabsl(slope) * rest);
            continue;
        }
        const long double lo = (long double)given_mean[i] - (k->narrow ? (float)given_mean[i] : given_mean[i]);
        const long double u_sum = given_sums ? dbeta[i] : a[i], u_hat = given_sums ? dgamma[i] : (b[i] - lo * a[i]) * s;
        if (!few && !given_sums) {
            expect("dbeta", i, dbeta[i], a[i], 0);
            expect("dgamma", i, dgamma[i], u_hat, (3 + fabsl(u_hat)) * (DBL_EPSILON / (long double)epsilon()));
        }
        if (operation == BNFAST_BACKWARD_SUMS)
            continue;
        if (!gradient) {
            expect("scale", i, get(of.c.scale, i), slope, fabsl(slope));
            if (get(of.c.center, i) != 0 || get(of.c.shift, i) != 0)
                fail("shift", i, get(of.c.shift, i), 0);
            continue;
        }
        const long double hat = vgamma - slope * u_hat / count;
        const long double at_means = (u_sum / count - get(of.c.u_center, i)) * slope +
                                     ((long double)mean[i] - get(of.c.center, i)) * s * hat + get(of.c.shift, i);
        expect("u_scale", i, get(of.c.u_scale, i), slope, fabsl(slope));
        expect("hat_scale", i, get(of.c.hat_scale, i), hat, fabsl(vgamma) + fabsl(slope * u_hat));
        expect("scale", i, get(of.c.scale, i), s, fabsl(s));
        expect("shift", i, (double)at_means, vbeta, fabsl(vbeta) + (fabsl(slope) + fabsl(s * hat)) * rest);
    }
    const int none = operation == BNFAST_MOMENTS || operation == BNFAST_BACKWARD_SUMS;
    for (int i = 0; i < (gradient ? 6 : none ? 0 : 3); i++)
        note(*array[i], (size_t)(n * k->itemsize));
    if (operation == BNFAST_BACKWARD || operation == BNFAST_BACKWARD_SUMS) {
        memcpy(mean, given_mean, (size_t)n * 8);
        k->make_y_coefficients(n, &of);
        for (ptrdiff_t i = 0; i < n; i++) {
            const long double slope = parameter_at(&of.gamma, i, 1) * inv_std[i], beta = parameter_at(&of.beta, i, 0);
            if (get(of.c.center, i) != (k->narrow ? (double)(float)mean[i] : mean[i]))
                fail("center of y", i, get(of.c.center, i), mean[i]);
            expect("y_scale", i, get(of.c.y_scale, i), slope, fabsl(slope));
            expect("y_shift", i, (double)((mean[i] - (long double)get(of.c.center, i)) * slope + get(of.c.y_shift, i)),
                   beta, fabsl(beta) + fabsl(slope) * rest);
        }
        note(of.c.center, (size_t)(n * k->itemsize));
        note(of.c.y_scale, (size_t)(n * k->itemsize)), note(of.c.y_shift, (size_t)(n * k->itemsize));
    }
    note(mean, (size_t)n * 8), note(inv_std, (size_t)n * 8);
    release_buffers();
}

static void small_leaves(ptrdiff_t n)
{
    const double count_a = 5, count_b = 11;
    double *mean_a = new_doubles(n, 1), *m2_a = new_doubles(n, 2), *mean_b = new_doubles(n, 1),
           *m2_b = new_doubles(n, 2);
    double *old_mean = new_doubles(n, 0), *old_m2 = new_doubles(n, 0);
    memcpy(old_mean, mean_a, (size_t)n * 8), memcpy(old_m2, m2_a, (size_t)n * 8);

    k->merge_moments(n, count_a, mean_a, m2_a, count_b, mean_b, m2_b);
    for (ptrdiff_t i = 0; i < n; i++) {
        const long double d = (long double)mean_b[i] - old_mean[i], all = count_a + count_b;
        expect("merged mean", i, mean_a[i], old_mean[i] + d * count_b / all, 3);
        expect("merged m2", i, m2_a[i], old_m2[i] + m2_b[i] + d * d * count_a * count_b / all, 30);
    }
    note(mean_a, (size_t)n * 8), note(m2_a, (size_t)n * 8);
    memcpy(old_mean, mean_a, (size_t)n * 8), memcpy(old_m2, m2_a, (size_t)n * 8);
    k->merge_sums(n, mean_a, m2_a, mean_b, m2_b);
    for (ptrdiff_t i = 0; i < n; i++) {
        expect("merged sum", i, mean_a[i], (long double)old_mean[i] + mean_b[i], 9);
        expect("merged dot", i, m2_a[i], (long double)old_m2[i] + m2_b[i], 90);
    }
    void *rounded = new_buffer(n, (size_t)k->itemsize);
    k->round_values(n, m2_b, rounded);
    for (ptrdiff_t i = 0; i < n; i++)
        if (get(rounded, i) != (k->narrow ? (double)(float)m2_b[i] : m2_b[i]))
            fail("rounded", i, get(rounded, i), m2_b[i]);

    const ptrdiff_t step = 3, offsets[BNFAST_SAMPLES] = {4, 0, 1, 3, 2};
    const void *x = new_values(n > 0 ? (n - 1) * step + 5 : 0, 0);
    k->typical_values(n, step, x, offsets, rounded);
    for (ptrdiff_t i = 0; i < n; i++) {
        int below = 0, equal = 0;
        for (int j = 0; j < BNFAST_SAMPLES; j++) {
            below += get(x, i * step + j) < get(rounded, i);
            equal += get(x, i * step + j) == get(rounded, i);
        }
        if (equal < 1 || below > 2 || below + equal < 3)
            fail("typical", i, get(rounded, i), 0);
    }

    const void *a = new_values(n, 0), *b = new_values(n, 0);
    for (int two = 0; two < 2; two++) {
        k->floor(a, two ? b : NULL, rounded, n);
        bnfast_stream_fence();
        for (ptrdiff_t i = 0; i < n; i++)
            expect("floor", i, get(rounded, i), get(a, i) + (two ? (long double)get(b, i) : 0), two ? 2 : 0);
    }
    release_buffers();
}

/* Planar runs of several channels hold whole vectors (plan.c, PLANAR_INNER). */
enum { SHORTEST_RUN = 16 };

static void leaves_of_size(ptrdiff_t n)
{
    snprintf(context, sizeof context, "leaves %s itemsize %td place %d shift %td size %td", k->isa, k->itemsize, where,
             shift, n);
    small_leaves(n);
    for (int operation = BNFAST_MOMENTS; operation <= BNFAST_JVP; operation++)
        for (int few = 0; operation != BNFAST_FLOOR && few < 2; few++)
            coefficients(n, (bnfast_operation)operation, few);
    if (n == 0)
        return; /* a segment has elements */
    static const ptrdiff_t row_counts[] = {1, 2, 7, 37};
    for (int i = 0; i < 4; i++)
        for (kind_of_sums kind = ALL; kind < N_KINDS; kind++) {
            reductions(row_counts[i], n, i % 2 * 3, kind);
            /* beside sums that meet a residual a map finds stored what they took */
            const int beside_too = n >= SHORTEST_RUN && kind != PASSED_WITH_RESIDUAL;
            const int most_channels = row_counts[i] == 7 ? 19 : 3; /* more than are taken together, or a few */
            for (int n_channels = 1; n_channels <= most_channels; n_channels += most_channels - 1)
                for (int beside = 0; beside <= beside_too; beside++)
                    planar_reductions(row_counts[i], n_channels, n, i % 2 * 3, beside, i % 2, kind);
        }
    static const int maps[] = {0,
                               BNFAST_ADD,
                               BNFAST_RECTIFY,
                               BNFAST_ADD | BNFAST_RECTIFY,
                               BNFAST_GRADIENT,
                               BNFAST_GRADIENT | BNFAST_RECTIFY,
                               BNFAST_GRADIENT | BNFAST_RECTIFY | BNFAST_RELU};
    for (int m = 0; m < (int)(sizeof maps / sizeof maps[0]); m++)
        for (int stream = 0; stream < 2; stream++)
            for (int in_place = 0; in_place < (reads_u(maps[m]) ? 3 : 2); in_place++) {
                map(1, 1, n, 0, maps[m], stream, in_place, stream);
                map(9, 0, n, 0, maps[m], stream, in_place, 0);
                map(6, 0, n, 2, maps[m], stream, in_place, stream);
                if (n >= SHORTEST_RUN)
                    map(2, 3, n, 1, maps[m], stream, in_place, stream);
            }
}

/* ---- jobs -------------------------------------------------------------------------------------------------------- */

enum { MOST_THREADS = 64, MOST_PHASES = 4 };

typedef struct {
    bnfast_gate gate;
    bnfast_share shares[MOST_THREADS];
} shared_phase;

typedef struct {
    const bnfast_job *job;
    shared_phase *phases;
    int thread;
} worker;

static void *work(void *argument)
{
    const worker *w = argument;
    const int n = w->job->n_threads;
    for (int p = 0; p < w->job->n_phases; p++) {
        if (p > 0)
            bnfast_gate_pass(&w->phases[p - 1].gate, w->job->phases[p - 1].n_tasks);
        for (int s = 0; s < n; s++)
            for (ptrdiff_t i; (i = bnfast_take(&w->phases[p].shares[(w->thread + s) % n])) >= 0;) {
                w->job->phases[p].task(w->job, i, w->thread);
                bnfast_gate_note(&w->phases[p].gate);
            }
    }
    return NULL;
}

/* Every task once, those of a share in order, shares of neighbours and as even as can be. */
static void check_shares(void)
{
    for (int n_shares = 1; n_shares <= 7; n_shares++)
        for (ptrdiff_t n_tasks = 0; n_tasks <= 1000; n_tasks = n_tasks < 30 ? n_tasks + 1 : n_tasks * 5 + 3)
            for (int backwards = 0; backwards < 2; backwards++) {
                bnfast_share shares[7];
                ptrdiff_t next = 0;
                snprintf(context, sizeof context, "%td tasks in %d shares", n_tasks, n_shares);
                bnfast_share_out(shares, n_shares, n_tasks, backwards);
                for (int s = 0; s < n_shares; s++) {
                    const ptrdiff_t n = shares[s].end - shares[s].begin;
                    if (shares[s].begin != next || n < n_tasks / n_shares || n > n_tasks / n_shares + 1)
                        fail("share", s, (double)shares[s].begin, (double)next);
                    for (ptrdiff_t i = 0; i < n; i++) {
                        const ptrdiff_t task = bnfast_take(&shares[s]);
                        if (task != next + (backwards ? n - 1 - i : i))
                            fail("task", i, (double)task, (double)(next + (backwards ? n - 1 - i : i)));
                    }
                    for (int i = 0; i < 3; i++)
                        if (bnfast_take(&shares[s]) != -1)
                            fail("task too many in share", s, 0, -1);
                    next += n;
                }
                if (next != n_tasks)
                    fail("tasks", n_shares, (double)next, (double)n_tasks);
            }
}

static int max_threads = 3, on_threads; /* on_threads: else one after another, the last first, threads in turn */

static void run(const bnfast_job *job)
{
    if (!on_threads || job->n_threads == 1) {
        for (int p = 0; p < job->n_phases; p++)
            for (ptrdiff_t i = job->phases[p].n_tasks - 1; i >= 0; i--)
                job->phases[p].task(job, i, (int)(i % job->n_threads));
        return;
    }
    pthread_t threads[MOST_THREADS];
    worker workers[MOST_THREADS];
    shared_phase phases[MOST_PHASES];
    for (int p = 0; p < job->n_phases; p++) {
        bnfast_gate_close(&phases[p].gate);
        bnfast_share_out(phases[p].shares, job->n_threads, job->phases[p].n_tasks, job->phases[p].backwards);
    }
    for (int t = 0; t < job->n_threads; t++) {
        workers[t] = (worker){job, phases, t};
        if (pthread_create(&threads[t], NULL, work, &workers[t]) != 0)
            abort();
    }
    for (int t = 0; t < job->n_threads; t++)
        pthread_join(threads[t], NULL);
}

typedef struct {
    bnfast_operation operation;
    ptrdiff_t outer, channels, inner;
    int n_threads, stream, in_place; /* in_place: out is x, 2: u, 3: the residual */
    int rectifies, residual;         /* y goes through an activation; and has a residual */
    int marks;                       /* a forward leaves marks of what passes; a backward goes by marks */
    int stored;                 /* what is taken of u: in memory of its own, 2: u's, 3: the residual's; 0: nowhere */
    int few;                    /* leave out what may be left out: gamma, beta, vgamma, vbeta, m2 or var */
    ptrdiff_t poisoned;         /* this channel has a NaN and an Inf; -1: none */
    ptrdiff_t left_out;         /* this channel's results are not in the digest; -1: all are */
    const unsigned char *bytes; /* of x and u, again and again; NULL: numbers near 3 */
    size_t n_bytes;
} example;

static int has_u(bnfast_operation operation)
{
    return operation == BNFAST_BACKWARD || operation == BNFAST_BACKWARD_EVAL || operation == BNFAST_BACKWARD_SUMS ||
           operation == BNFAST_BACKWARD_APPLY || operation == BNFAST_JVP;
}

static void fill(void *p, ptrdiff_t n, const example *e)
{
    if (e->n_bytes > 0)
        for (size_t i = 0; i < (size_t)(n * k->itemsize); i++)
            ((unsigned char *)p)[i] = e->bytes[i % e->n_bytes];
}

static void expect_job(const example *e, const bnfast_job *job, const void *x, const void *u, const void *residual,
                       double *given_mean, double *given_inv_std);

/* Whether the i-th element is marked for a backward. */
static int is_marked(ptrdiff_t i) { return (uint32_t)i * 2654435761u >> 13 & 1; }

/* Of a forward: zeros; of a backward: as is_marked says. In whole lines, as vectors' marks are aligned. */
static void make_marks(bnfast_job *job, ptrdiff_t n)
{
    const ptrdiff_t per_byte = k->marks_per_byte;
    job->marks = new_buffer(round_up(n / per_byte + BNFAST_MARKS_PAD, 64), 1);
    memset(job->marks, 0, (size_t)round_up(n / per_byte + BNFAST_MARKS_PAD, 64));
    if (!has_u(job->operation))
        return;
    job->first_mark = shift % 8;
    for (ptrdiff_t i = 0, number = job->first_mark; i < n; i++, number++)
        if (is_marked(i))
            job->marks[number / per_byte] |= per_byte == 1 ? 0xFF : (unsigned char)(1u << number % per_byte);
}

static void *copy_of(const void *values, ptrdiff_t n)
{
    if (values == NULL)
        return NULL;
    return memcpy(new_buffer(n, (size_t)k->itemsize), values, (size_t)(n * k->itemsize));
}

static int modified(const bnfast_job *job, const void *now, const void *old, ptrdiff_t n)
{
    return now && now != job->out && now != job->passed && memcmp(now, old, (size_t)(n * k->itemsize)) != 0;
}

static uint64_t run_job(const example *e)
{
    const ptrdiff_t n = e->outer * e->channels * e->inner, channels = e->channels;
    digest = 14695981039346656037u;
    snprintf(context, sizeof context,
             "job %d (%td, %td, %td) %s itemsize %td place %d shift %td threads %d stream %d in place %d few %d "
             "rectifies %d residual %d marks %d stored %d poisoned %td",
             e->operation, e->outer, channels, e->inner, k->isa, k->itemsize, where, shift, e->n_threads, e->stream,
             e->in_place, e->few, e->rectifies, e->residual, e->marks, e->stored, e->poisoned);
    random_state = 88172645463325252u;
    void *x = new_values(n, 3),
         *u = has_u(e->operation) || (e->operation == BNFAST_FLOOR && !e->few) ? new_values(n, 0.5) : NULL;
    fill(x, n, e);
    if (u)
        fill(u, n, e);
    if (e->poisoned >= 0) {
        put(x, e->poisoned * e->inner, (double)NAN);
        put(x, n - (channels - e->poisoned - 1) * e->inner - 1, -(double)INFINITY);
    }
    void *residual = e->residual ? new_values(n, -2) : NULL;
    if (residual)
        fill(residual, n, e);
    void *const old_x = copy_of(x, n), *const old_u = copy_of(u, n), *const old_residual = copy_of(residual, n);
    double *mean = new_doubles(channels, 3), *inv_std = new_doubles(channels, 2),
           *given_mean = new_doubles(channels, 0), *given_inv_std = new_doubles(channels, 0);
    memcpy(given_mean, mean, (size_t)channels * 8), memcpy(given_inv_std, inv_std, (size_t)channels * 8);
    int infinite = 0;
    bnfast_job job = {.kernels = k,
                      .operation = e->operation,
                      .outer = e->outer,
                      .channels = channels,
                      .inner = e->inner,
                      .x = x,
                      .u = u,
                      .residual = residual,
                      .rectifies = e->rectifies,
                      .rectifier = rectifiers[(e->outer + channels) % N_RECTIFIERS],
                      .eps = 1e-5,
                      .mean = mean,
                      .inv_std = inv_std,
                      .n_threads = e->n_threads};
    if (e->operation != BNFAST_MOMENTS && e->operation != BNFAST_BACKWARD_SUMS)
        job.out = e->in_place == 2 && u            ? u
                  : e->in_place == 3 && residual   ? residual
                  : e->in_place && e->in_place < 3 ? x
                                                   : new_values(n, 9);
    if (e->stored)
        job.passed = e->stored == 2 ? u : e->stored == 3 && residual ? residual : new_values(n, 9);
    if (job.passed == job.out && e->operation != BNFAST_BACKWARD_EVAL)
        job.passed = e->stored ? new_values(n, 9) : NULL;
    if (e->marks)
        make_marks(&job, n);
    if (!e->few) {
        job.gamma = new_parameter(channels, 2), job.beta = new_parameter(channels, 0);
        if (e->operation == BNFAST_JVP)
            job.vgamma = new_parameter(channels, 0), job.vbeta = new_parameter(channels, 0);
        job.infinite = e->operation == BNFAST_EVAL ? &infinite : NULL; /* others do not say */
    }
    if (!e->few || e->operation == BNFAST_MOMENTS)
        job.m2 = e->operation == BNFAST_EVAL ? NULL : new_doubles(channels, 0);
    if (e->operation == BNFAST_EVAL && !e->few)
        job.var = new_doubles(channels, 2);
    if (has_u(e->operation) && !(e->few && e->operation == BNFAST_JVP))
        job.dbeta = new_doubles(channels, 0), job.dgamma = new_doubles(channels, 0);
    if (e->operation != BNFAST_MOMENTS && e->operation != BNFAST_FORWARD && (e->outer + channels) % 3 == 0) {
        job.narrow_mean = narrow_of(mean, given_mean, channels);
        job.narrow_inv_std = narrow_of(inv_std, given_inv_std, channels);
        if (job.var)
            job.narrow_var = narrow_of((double *)job.var, NULL, channels);
    }
    job.count = 1.5 * (double)(e->outer * e->inner); /* of an apply: there are other parts */
    /* caches of any size: they decide about blocks, and about copying them together */
    bnfast_set_caches((ptrdiff_t)1 << (15 + e->channels % 6), (ptrdiff_t)1 << (15 + e->outer % 11));
    bnfast_plan(&job);
    if (e->stream && !e->in_place)
        job.stream = job.out != NULL;
    void *workspace = NULL;
    if (posix_memalign(&workspace, 64, (size_t)job.workspace_bytes) != 0)
        abort();
    /* A guard page right behind it, too; and what is not written before it is read is a NaN. */
    job.workspace = where == HEAP ? workspace : new_buffer((job.workspace_bytes + 63) / 64 * 64, 1);
    if (where == SHIFTED)
        job.workspace = workspace;
    if (where != HEAP) /* there Valgrind sees it */
        memset(job.workspace, 0xFF, (size_t)job.workspace_bytes);
    run(&job);
    expect_job(e, &job, old_x, old_u, old_residual, given_mean, given_inv_std);
    const void *const written[] = {job.out, job.passed};
    for (int w = 0; w < 2; w++)
        for (ptrdiff_t i = 0; written[w] && i < e->outer * channels; i++)
            if (i % channels != e->left_out)
                note_values((const char *)written[w] + i * e->inner * k->itemsize, e->inner, k->itemsize);
    const double *const results[] = {mean, inv_std, job.m2, job.dbeta, job.dgamma};
    for (int i = 0; i < 5; i++)
        for (ptrdiff_t c = 0; results[i] && c < channels; c++)
            if (c != e->left_out)
                note_values(results[i] + c, 1, 8);
    if (e->left_out < 0)
        note(&infinite, sizeof infinite);
    if (modified(&job, x, old_x, n) || modified(&job, u, old_u, n) || modified(&job, residual, old_residual, n))
        fail("an input was modified", 0, 0, 0);
    free(workspace);
    release_buffers();
    return digest;
}

/* Whether every value is finite and of a size for which the bounds below were made. */
static int ordinary(const void *x, ptrdiff_t first, ptrdiff_t rows, ptrdiff_t stride, ptrdiff_t length)
{
    for (ptrdiff_t r = 0; r < rows; r++)
        for (ptrdiff_t j = 0; j < length; j++) {
            const double value = get(x, first + r * stride + j);
            if (!(value == 0 || (fabs(value) < 1e6 && fabs(value) > 1e-6)))
                return 0;
        }
    return 1;
}

/* What is taken of u at `at`, in channel c. */
static double taken_in_job(const bnfast_job *job, const void *x, const void *u, const void *residual, ptrdiff_t at,
                           ptrdiff_t c, double mean, double inv_std)
{
    if (!job->rectifies)
        return get(u, at);
    if (job->marks)
        return is_marked(at) ? get(u, at) : taken(&job->rectifier, get(u, at), -1);
    const double slope = (double)parameter_at(&job->gamma, c, 1) * inv_std;
    const double center = k->narrow ? (double)(float)mean : mean;
    const double shift_ = (double)parameter_at(&job->beta, c, 0) - (mean - center) * slope;
    return taken(&job->rectifier, get(u, at),
                 y_of(get(x, at), center, slope, shift_, residual ? get(residual, at) : 0));
}

static void expect_job(const example *e, const bnfast_job *job, const void *x, const void *u, const void *residual,
                       double *given_mean, double *given_inv_std)
{
    const ptrdiff_t inner = e->inner, stride = e->channels * inner;
    const bnfast_operation operation = e->operation;
    const long double count = (long double)e->outer * inner;
    if (k->itemsize == 2) /* here what they touch, and that all give the same bits; tests/test_half.py judges values */
        return;
    for (ptrdiff_t c = 0; c < e->channels; c++) {
        if (e->poisoned == c || !ordinary(x, c * inner, e->outer, stride, inner) ||
            (has_u(operation) && !ordinary(u, c * inner, e->outer, stride, inner)) ||
            (residual && !ordinary(residual, c * inner, e->outer, stride, inner)))
            continue;
        long double mean = 0, m2 = 0, largest = 0, sum = 0, dot = 0, size = 0, size_dot = 0, rest = 0, rest_dot = 0;
#define EACH \
    for (ptrdiff_t r = 0; r < e->outer; r++) \
        for (ptrdiff_t at = r * stride + c * inner; at < r * stride + (c + 1) * inner; at++)
        EACH
        {
            add(&mean, &rest, get(x, at));
            largest = fmaxl(largest, fabsl((long double)get(x, at)));
        }
        mean = (mean + rest) / count;
        rest = 0;
        EACH add(&m2, &rest, ((long double)get(x, at) - mean) * ((long double)get(x, at) - mean));
        m2 += rest;
        rest = 0;
        const long double gamma = parameter_at(&job->gamma, c, 1), beta = parameter_at(&job->beta, c, 0);
        long double center = mean, inv_std = 1 / sqrtl(m2 / count + (long double)job->eps);
        if (operation == BNFAST_MOMENTS || operation == BNFAST_FORWARD) {
            expect("mean", c, job->mean[c], mean, largest);
            if (job->m2)
                expect("m2", c, job->m2[c], m2, m2 + largest * largest * (long double)epsilon() * count);
            if (operation == BNFAST_FORWARD)
                expect("inv_std", c, job->inv_std[c], inv_std,
                       inv_std * (1 + largest * largest * (long double)epsilon() * inv_std * inv_std));
        }
        if (operation != BNFAST_MOMENTS && operation != BNFAST_FORWARD) {
            center = given_mean[c];
            inv_std = operation == BNFAST_EVAL
                          ? (job->var ? 1 / sqrtl((long double)job->var[c] + (long double)job->eps) : 1)
                          : (long double)given_inv_std[c];
        }
        if (has_u(operation)) {
            EACH
            {
                const long double v = taken_in_job(job, x, u, residual, at, c, given_mean[c], given_inv_std[c]),
                                  hat = ((long double)get(x, at) - center) * inv_std;
                add(&sum, &rest, v), add(&dot, &rest_dot, v * hat), size += fabsl(v),
                    size_dot += fabsl(v * hat) + fabsl(v * inv_std);
            }
            sum += rest, dot += rest_dot;
            if (operation == BNFAST_BACKWARD_APPLY) /* those of all parts, as given */
                sum = job->dbeta[c], dot = job->dgamma[c];
            else if (job->dbeta) {
                expect("dbeta", c, job->dbeta[c], sum, size);
                expect("dgamma", c, job->dgamma[c], dot,
                       size_dot + size * largest * (long double)epsilon() * fabsl(inv_std));
            }
        }
        if (job->out == NULL)
            continue;
        EACH
        {
            const double got = get(job->out, at);
            const long double hat = ((long double)get(x, at) - center) * inv_std,
                              v = has_u(operation)
                                      ? taken_in_job(job, x, u, residual, at, c, given_mean[c], given_inv_std[c])
                                  : u ? (long double)get(u, at)
                                      : 0;
            if (job->passed && job->passed != job->out && (long double)get(job->passed, at) != v)
                fail("what is taken of u", at, get(job->passed, at), (double)v);
            /* the mean is a rounded float64, whatever the data are */
            const long double spread = fabsl(hat) + largest * (DBL_EPSILON / epsilon()) * fabsl(inv_std) + 1;
            switch (operation) {
            case BNFAST_FORWARD:
            case BNFAST_EVAL: {
                const ptrdiff_t number = job->first_mark + at, per_byte = k->marks_per_byte;
                if (job->marks && (job->marks[number / per_byte] >> number % per_byte & 1) !=
                                      (got > 0 && !(got >= job->rectifier.top)))
                    fail("mark", at, !(got > 0), got);
                const long double added = residual ? get(residual, at) : 0, y = gamma * hat + beta + added;
                expect("y", at, got, job->rectifies ? rectified(&job->rectifier, y) : y,
                       fabsl(gamma) * spread * (1 + fabsl(hat)) + fabsl(beta) + fabsl(added));
                break;
            }
            case BNFAST_BACKWARD_EVAL:
                expect("dx", at, got, gamma * inv_std * v, fabsl(gamma * inv_std * v));
                break;
            case BNFAST_BACKWARD:
            case BNFAST_BACKWARD_APPLY:
            case BNFAST_JVP: {
                const long double values = operation == BNFAST_BACKWARD_APPLY ? (long double)job->count : count;
                const long double vgamma = parameter_at(&job->vgamma, c, 0), vbeta = parameter_at(&job->vbeta, c, 0);
                expect("dx or dy", at, got,
                       gamma * inv_std * (v - sum / values - hat * (dot / values)) + vgamma * hat + vbeta,
                       fabsl(gamma * inv_std) *
                               (fabsl(v) + (size + fabsl(sum)) / values + spread * ((size_dot + fabsl(dot)) / values)) +
                           fabsl(vgamma) * spread + fabsl(vbeta));
                break;
            }
            default: /* the floor */
                expect("floor", at, got, (long double)get(x, at) + v, fabsl((long double)get(x, at)) + fabsl(v));
            }
        }
#undef EACH
    }
    if (e->operation == BNFAST_EVAL && job->infinite) {
        int any = 0;
        for (ptrdiff_t i = 0; i < e->outer * stride; i++)
            any |= isinf(get(x, i)) != 0;
        if (*job->infinite != any)
            fail("infinite", 0, *job->infinite, any);
    }
}

static const char *only_isa;

static int next_isa(int i) /* the i-th or a later one that can run here and was asked for; -1: none */
{
    for (; bnfast_isa_name(i) != NULL; i++)
        if (bnfast_isa_supported(i) && (only_isa == NULL || strcmp(only_isa, bnfast_isa_name(i)) == 0))
            return i;
    return -1;
}

/* what: 1: an activation, 2: a residual, 3: both, 4: both, and marks, by which a backward goes without. What is taken of u is stored where the extension has it stored: where
 * there is a residual, and in eval. */
static void fuse(example *e, int what, int how)
{
    e->rectifies = what != 2, e->residual = what >= 2, e->marks = what == 4;
    if (e->marks && has_u(e->operation)) {
        e->residual = 0;
        e->stored = e->operation == BNFAST_BACKWARD_SUMS ? 0 : e->operation == BNFAST_BACKWARD_EVAL ? 1 : 1 + how % 2;
    } else if (has_u(e->operation)) {
        e->residual &= e->rectifies;
        e->stored = e->operation == BNFAST_BACKWARD_SUMS ? 0
                    : e->residual                        ? 1 + how % 3
                                                         : e->rectifies && e->operation == BNFAST_BACKWARD_EVAL;
    }
}

/* The same example for every instruction set, on one thread and on several: same bits. */
static uint64_t run_everywhere(example e, bnfast_dtype dtype)
{
    uint64_t first = 0;
    int known = 0;
    for (int i = next_isa(0); i >= 0; i = next_isa(i + 1)) {
        if (bnfast_select(bnfast_isa_name(i)) != 0)
            abort();
        k = bnfast_active((bnfast_dtype)dtype);
        for (int threads = 1; threads <= max_threads; threads++) {
            e.n_threads = threads;
            const uint64_t bits = run_job(&e);
            if (known && bits != first) {
                fprintf(stderr, "%s: other bits than the first instruction set on one thread\n", context);
                abort();
            }
            first = bits, known = 1;
        }
    }
    return first;
}

#ifndef FUZZ

static const ptrdiff_t shapes[][3] = {
    {1, 1, 1},    {1, 1, 16},    {2, 1, 1},    {2, 3, 1},    {5, 7, 1},    {33, 3, 1},   {130, 3, 1},  {300, 65, 1},
    {17, 130, 1}, {70, 64, 1},   {64, 3, 5},   {3, 33, 15},  {130, 2, 15}, {2, 5, 16},   {3, 4, 17},   {2, 9, 49},
    {5, 3, 130},  {1, 2, 4099},  {3, 1, 9000}, {40, 5, 900}, {40, 256, 1}, {30, 320, 1}, {21, 264, 3}, {600, 130, 1},
    {7, 19, 23},  {2, 2, 70000}, {66, 1, 1},   {4097, 1, 1}, {257, 64, 1}, {513, 80, 2}, {8, 40, 31},  {1, 2100, 1}};
enum { N_SHAPES = sizeof shapes / sizeof shapes[0] };

/* The options of a job from here on: an activation, a residual, both, both and marks. */
enum { FUSED = 4, N_OPTIONS = 8 };

static int fuses(bnfast_operation operation)
{
    return operation != BNFAST_MOMENTS && operation != BNFAST_FLOOR && operation != BNFAST_JVP;
}

static void all_jobs(int poison, ptrdiff_t largest)
{
    uint64_t all = 0;
    for (int s = 0; s < N_SHAPES; s++) {
        const ptrdiff_t *shape = shapes[s];
        if (shape[0] * shape[1] * shape[2] > largest)
            continue;
        for (int operation = BNFAST_MOMENTS; operation <= BNFAST_JVP; operation++)
            for (int option = 0; option < (fuses((bnfast_operation)operation) ? N_OPTIONS : FUSED); option++)
                for (int dtype = 0; dtype < BNFAST_N_DTYPES; dtype++) {
                    where = (place)((s + option) % N_PLACES);
                    shift = (s * 5 + option + operation) % 16;
                    example e = {.operation = (bnfast_operation)operation,
                                 .outer = shape[0],
                                 .channels = shape[1],
                                 .inner = shape[2],
                                 .stream = option == 1,
                                 .few = option == 3,
                                 .in_place = operation == BNFAST_FLOOR ? 0
                                             : option == 2             ? 1 + (operation % 2)
                                             : option >= FUSED         ? (s + option) % 4
                                                                       : 0,
                                 .poisoned = -1,
                                 .left_out = -1};
                    if (option >= FUSED)
                        fuse(&e, option - FUSED + 1, s);
                    if (!poison)
                        all = all * 1099511628211u ^ run_everywhere(e, (bnfast_dtype)dtype);
                    for (ptrdiff_t c = 0; poison && c < least(shape[1], 5); c++) {
                        e.poisoned = -1, e.left_out = (c * 31) % shape[1];
                        const uint64_t without = run_everywhere(e, (bnfast_dtype)dtype);
                        e.poisoned = e.left_out;
                        if (run_everywhere(e, (bnfast_dtype)dtype) != without) {
                            fprintf(stderr, "%s: a NaN moved other channels' bits\n", context);
                            abort();
                        }
                    }
                }
    }
    if (!poison)
        printf("jobs: %016llx\n", (unsigned long long)all);
}

int main(int argc, char **argv)
{
    signal(SIGSEGV, on_signal);
    int leaves = 0, jobs = 0, poison = 0;
    ptrdiff_t sizes = 130, largest = (ptrdiff_t)1 << 20;
    for (int i = 1; i < argc; i++) {
        leaves |= strcmp(argv[i], "leaves") == 0;
        jobs |= strcmp(argv[i], "jobs") == 0;
        poison |= strcmp(argv[i], "poison") == 0;
        if (strncmp(argv[i], "isa=", 4) == 0)
            only_isa = argv[i] + 4;
        if (strncmp(argv[i], "sizes=", 6) == 0)
            sizes = atoi(argv[i] + 6);
        if (strncmp(argv[i], "largest=", 8) == 0)
            largest = atoi(argv[i] + 8);
        if (strncmp(argv[i], "threads=", 8) == 0)
            max_threads = atoi(argv[i] + 8), on_threads = 1;
    }
    if (next_isa(0) < 0 || max_threads < 1 || max_threads > 64) {
        fprintf(stderr, "driver: no such instruction set here, or not 1 to 64 threads\n");
        return 2;
    }
    if (jobs)
        check_shares();
    /* the leaves of halves are those of float32, but for the reads and writes: jobs see them */
    for (int dtype = 0; leaves && dtype < BNFAST_FLOAT16; dtype++) {
        uint64_t first = 0;
        int known = 0;
        for (int i = next_isa(0); i >= 0; i = next_isa(i + 1)) {
            if (bnfast_select(bnfast_isa_name(i)) != 0)
                return 2;
            k = bnfast_active((bnfast_dtype)dtype);
            digest = 14695981039346656037u;
            random_state = 88172645463325252u;
            for (ptrdiff_t n = 0; n <= sizes; n++) {
                for (int p = BEHIND; p < N_PLACES; p++) {
                    where = (place)p, shift = p == SHIFTED ? n % 16 : 0;
                    leaves_of_size(n);
                }
            }
            where = SHIFTED; /* every alignment a line has, at the sizes around the vectors */
            for (shift = 0; shift < 16; shift++)
                for (ptrdiff_t n = 1; n <= 129 && n <= sizes; n = n < 8 ? n + 1 : n % 2 ? n * 2 - 3 : n + 1)
                    leaves_of_size(n);
            where = BEHIND;
            for (ptrdiff_t n = 500; n <= 2100 && sizes >= 130; n += 533) /* more columns than a leaf takes at once */
                leaves_of_size(n);
            printf("leaves %s itemsize %td: %016llx\n", k->isa, k->itemsize, (unsigned long long)digest);
            if (known && digest != first) {
                fprintf(stderr, "leaves %s itemsize %td: other bits than the first instruction set\n", k->isa,
                        k->itemsize);
                return 1;
            }
            first = digest, known = 1;
        }
    }
    if (jobs)
        all_jobs(0, largest);
    if (poison)
        all_jobs(1, largest);
    puts("done");
    return 0;
}

#else

int LLVMFuzzerTestOneInput(const unsigned char *data, size_t n);

/* operation, shape, places, options; the rest are the bytes of x and u. */
int LLVMFuzzerTestOneInput(const unsigned char *data, size_t n)
{
    enum { HEADER = 12 };
    if (n < HEADER)
        return 0;
    where = (place)(data[8] % N_PLACES), shift = data[9] % 16;
    on_threads = 0;
    example e = {.operation = (bnfast_operation)(data[0] % (BNFAST_JVP + 1)),
                 .outer = 1 + data[1] + data[2] % 4 * 200,
                 .channels = 1 + data[3] + data[4] % 2 * 40,
                 .inner = 1 + data[5] % (data[6] % 2 ? 16 : 200),
                 .stream = data[10] & 1,
                 .few = data[10] >> 1 & 1,
                 .in_place = (data[10] >> 2) % 3,
                 .poisoned = -1,
                 .left_out = -1,
                 .bytes = data + HEADER,
                 .n_bytes = n - HEADER};
    if (e.operation == BNFAST_FLOOR)
        e.in_place = 0;
    if (e.operation != BNFAST_MOMENTS && e.operation != BNFAST_FLOOR && e.operation != BNFAST_JVP)
        fuse(&e, data[11] >> 1 & 3, data[11] >> 3);
    while (e.outer * e.channels * e.inner > 20000)
        e.outer = (e.outer + 1) / 2, e.channels = (e.channels + 1) / 2;
    if (data[10] & 128) /* numbers near 3, for which there is a reference */
        e.n_bytes = 0;
    run_everywhere(e, (bnfast_dtype)(data[11] % BNFAST_N_DTYPES));
    return 0;
}

#endif
