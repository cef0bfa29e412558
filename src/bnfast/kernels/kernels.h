/* The contract of the kernels.
 *
 * Every array is seen as (outer, channels, inner), dense, in this order in memory. Two layouts follow:
 *
 *   planar       runs of `length` neighbouring elements belong to one channel (NCHW)
 *   interleaved  neighbours belong to different columns, a column to one channel (NHWC, NC)
 *
 * A *leaf* is an inner loop over one dtype for one instruction set. Every operation of the package is the
 * same steps: reduce (leaf), merge (merge.c), make coefficients (leaf), apply (leaf). The leaves see one segment
 * at a time, of one or of several channels; who decides what a segment is, and in which order the results are merged,
 * stands in job.h. A leaf knows no Python, no NumPy, no OpenMP and no malloc, and gives the same bits for every
 * instruction set: sums run in two chains of fixed virtual lanes (64 bytes each: 16 float32 or 8 float64), and nothing
 * is contracted into an fma.
 *
 * All strides and sizes count elements. `x`, `u` and `out` point to elements of the leaf's dtype and need no
 * alignment beyond the dtype's own. `out` may be `x` or `u`, the very same elements, and must not overlap them
 * in any other way. */

#ifndef BNFAST_KERNELS_H
#define BNFAST_KERNELS_H

#include <stddef.h>

#if defined(__FAST_MATH__) || (defined(__FINITE_MATH_ONLY__) && __FINITE_MATH_ONLY__) || \
    defined(__ASSOCIATIVE_MATH__) || defined(__RECIPROCAL_MATH__) || (defined(__GCC_IEC_559) && __GCC_IEC_559 == 0)
#error "bnfast must not be built with fast-math (-Ofast, -ffast-math and what they contain): check CFLAGS"
#endif

/* The dtypes of data: enumerator, and suffix of the names of its table (isa.inc.h says what it is; its table what the
 * kernels ask of it). */
#define BNFAST_FOR_EACH_DTYPE(ROW) \
    ROW(BNFAST_FLOAT32, f32) \
    ROW(BNFAST_FLOAT64, f64) \
    ROW(BNFAST_FLOAT16, f16) \
    ROW(BNFAST_BFLOAT16, bf16)

#define BNFAST_ENUMERATOR(dtype, suffix) dtype,
typedef enum { BNFAST_FOR_EACH_DTYPE(BNFAST_ENUMERATOR) BNFAST_N_DTYPES } bnfast_dtype;
#undef BNFAST_ENUMERATOR

typedef enum {
    BNFAST_MOMENTS,        /* mean, m2 of x */
    BNFAST_FORWARD,        /* the same, and inv_std; out = gamma * x_hat + beta */
    BNFAST_EVAL,           /* out likewise, with mean and var as given */
    BNFAST_BACKWARD,       /* u: dy; dbeta, dgamma; out: dx through mean and inv_std */
    BNFAST_BACKWARD_EVAL,  /* the same with mean and inv_std as constants */
    BNFAST_BACKWARD_SUMS,  /* dbeta, dgamma of BNFAST_BACKWARD alone */
    BNFAST_BACKWARD_APPLY, /* out of BNFAST_BACKWARD alone, with dbeta, dgamma and their count as given */
    BNFAST_FLOOR,          /* out = x, or x + u: not an operation, a measure for them */
    BNFAST_JVP,            /* u: direction of x; out: derivative of y along it, vgamma and vbeta */
    BNFAST_LIFT,           /* out = x times a power of two; what that cannot hold sets `infinite` (lift.c) */
    BNFAST_LOWER           /* out less it again: all channels, or those that are `lifted`; `infinite` likewise */
} bnfast_operation;

typedef struct { /* (channels,) IN, of either dtype; both NULL: left out */
    const double *wide;
    const float *narrow;
} bnfast_parameter;

/* An activation of the rectifier family: v where 0 < v < top; slope * v where v <= 0 (+0 if slope is 0); top where
 * v >= top (NaN: there is no top). NaN stays NaN. Its derivative is 1, slope and 0. */
typedef struct {
    double slope, top;
} bnfast_rectifier;

/* ReLU: no slope, no top. */
static inline int bnfast_is_relu(const bnfast_rectifier *r) { return r->slope == 0.0 && r->top != r->top; }

/* What the map does with an element, per column, in what is computed with; flags, for each combination of which there is
 * one body:
 *   0                 v = (x - center) * scale + shift
 *     BNFAST_ADD      v + u, a residual
 *     BNFAST_RECTIFY  the rectifier of that
 *   BNFAST_GRADIENT   (u - u_center) * u_scale + ((x - center) * scale * hat_scale + shift), scale being inv_std:
 *                     its square would leave the range of float32 for data beyond 1e19 or below 1e-19
 *     BNFAST_RECTIFY  u times the rectifier's derivative at (x - center) * y_scale + y_shift, in the place of u
 *       BNFAST_RELU   that rectifier being ReLU, which most are: a shorter body
 *   BNFAST_MARK       with BNFAST_RECTIFY: what passes is marked; a gradient goes by the marks that a forward has left
 * Each pointer: (columns,) IN; interleaved: (columns + BNFAST_PAD,), the first ones again past the end. */
enum { BNFAST_GRADIENT = 1, BNFAST_ADD = 2, BNFAST_RECTIFY = 4, BNFAST_MARK = 8, BNFAST_RELU = 16 };
/* BNFAST_MARKS_PAD: bytes of marks besides: they may begin in the second, and more may be read than there are. */
enum { BNFAST_PAD = 16, BNFAST_SAMPLES = 5, BNFAST_MARKS_PAD = 8 };

typedef struct {
    void *center, *scale, *shift, *u_center, *u_scale, *hat_scale, *y_scale, *y_shift;
    bnfast_rectifier rectifier;
} bnfast_coefficients;

/* Of a map with BNFAST_MARK. marks: of all elements, whether the rectifier passes there (marks.inc.h) OUT; of a gradient
 * IN; number: of the first element of the result; passed: as the result, of a gradient what passes of u OUT */
typedef struct {
    unsigned char *marks;
    ptrdiff_t number;
    void *passed;
} bnfast_marked;

/* For the sums of a backward pass through an activation: u is taken times the rectifier's derivative at
 * (x - center) * y_scale + y_shift + residual, or by marks. residual: as u IN, or NULL; marks: IN, or NULL;
 * number: of the first element; passed: as u, what is taken OUT, or NULL */
typedef struct {
    const void *y_scale, *y_shift; /* a channel, or a column */
    const void *residual;
    const unsigned char *marks;
    ptrdiff_t number;
    void *passed;
    bnfast_rectifier rectifier;
} bnfast_passing;

/* n_rows rows, `stride` apart, of n_channels neighbouring channels with `length` neighbouring elements each; near: as in
 * bnfast_rows, where `length` is so short that elements are summed as columns; in_order: else, the rows of some channels are
 * taken in the order of memory, not channel by channel. */
typedef struct {
    ptrdiff_t n_rows, stride, n_channels, length;
    int near, in_order;
} bnfast_runs;

/* A map of planar runs that can be done little by little, while something else is reduced: memory reads and writes at
 * the same time only if both stand in one loop. x, u: (n_rows, n_channels, length), rows `stride` apart IN; out: the
 * same OUT; map: its flags; stream: write around the cache (the caller then issues
 * bnfast_stream_fence);
 * ahead: where not 0, the elements so far behind those of x and u are brought into cache (only with stream).
 * The last four say how far it is; they begin as 0: row, channel of it, elements of the row that are written, and where
 * the channel ends in the row (0: nothing of the row has been touched). */
typedef struct {
    const void *x, *u;
    void *out;
    bnfast_marked marked;
    bnfast_runs runs;
    bnfast_coefficients coefficients;
    int map, stream;
    ptrdiff_t ahead;
    ptrdiff_t row, channel, at, end;
} bnfast_writer;

/* n_rows rows, `stride` apart, of n_columns; next: elements from the first to what is needed after these; near:
 * nothing is asked for ahead, and two arrays are taken in tiles, too (sums.inc.h) */
typedef struct {
    ptrdiff_t n_rows, stride, n_columns, next;
    int near;
} bnfast_rows;

/* n_rows rows of n_columns: of x `stride` apart, of u `u_stride`, of out `out_stride`. next_x, next_u: as many elements, rows
 * out_stride apart, to be brought into cache meanwhile; or NULL. row_by_row: of rows that lie together each is mapped by
 * itself; else some share the loads of coefficients, in cache */
typedef struct {
    ptrdiff_t n_rows, n_columns, stride, u_stride, out_stride;
    const void *next_x, *next_u;
    int row_by_row;
} bnfast_columns;

/* What the results a channel and its coefficients are made of; every pointer is to the first channel's.
 * a, b: the merged reductions; c.center holds the centre of the reduction of moments, IN, all of c: OUT */
typedef struct {
    bnfast_operation operation;
    double count, eps; /* count: values a channel */
    bnfast_parameter gamma, beta, vgamma, vbeta;
    const double *a, *b, *var;
    double *mean, *inv_std, *m2, *dbeta, *dgamma;
    double *mean_rest; /* what rounding the mean leaves, OUT of forward and moments, else IN; or NULL */
    bnfast_coefficients c;
} bnfast_channels;

typedef struct {
    const char *isa; /* "baseline", "avx2", "avx512" */
    bnfast_dtype dtype;
    ptrdiff_t itemsize;         /* bytes an element of the data */
    ptrdiff_t coefficient_size; /* bytes of what is computed with, float32 or float64, and so of a coefficient */
    int narrow;                 /* that is float32: sums go to something wider */
    ptrdiff_t marks_per_byte;

    /* Mean less center, and sum of squared deviations, of one segment of some channels. center: some value of the
     * channel, finite
     * planar: x: (n_rows, n_channels, length), rows `stride` apart IN; center: (n_channels,) IN; mean, m2: the same
     * OUT; next: elements from x to what is reduced next, to be brought into cache; writer: a map that may go on
     * meanwhile, beside sums a gradient and beside moments none, or NULL
     * interleaved: x: (n_rows, n_columns) IN; center: (n_columns,) IN; mean, m2: the same OUT;
     * packed: the elements of x once more, dense OUT, or NULL */
    void (*moments_planar)(const void *x, const bnfast_runs *runs, ptrdiff_t next, const void *center, double *mean,
                           double *m2, bnfast_writer *writer);
    void (*moments_interleaved)(const void *x, const bnfast_rows *rows, const void *center, double *mean, double *m2,
                                void *packed);
    /* The same for statistics that have to be exact: summed in float64 whatever the dtype. No map goes on meanwhile
     * and nothing is packed. */
    void (*exact_moments_planar)(const void *x, const bnfast_runs *runs, ptrdiff_t next, const void *center,
                                 double *mean, double *m2, bnfast_writer *writer);
    void (*exact_moments_interleaved)(const void *x, const bnfast_rows *rows, const void *center, double *mean,
                                      double *m2, void *packed);

    /* Sum of u, and of u * d, d = x - center, over one segment; shapes as above, center: the mean, rounded; passing:
     * what of u is taken, NULL: all; the writer's map takes of its u what passes there, by the same rectifier */
    void (*sums_planar)(const void *x, const void *u, const bnfast_runs *runs, ptrdiff_t next, const void *center,
                        const bnfast_passing *passing, double *sum_u, double *sum_ud, bnfast_writer *writer);
    void (*sums_interleaved)(const void *x, const void *u, const bnfast_rows *rows, const void *center,
                             const bnfast_passing *passing, double *sum_u, double *sum_ud, void *packed_x,
                             void *packed_u);

    /* Writes what is left of a planar map. */
    void (*write_rest)(bnfast_writer *writer);
    /* The map of bnfast_coefficients; c points to the first column's coefficients; map: its flags; marked: where they
     * want it, else NULL. `stream`: write around the cache (the caller then issues bnfast_stream_fence). */
    void (*map_interleaved)(const void *x, const void *u, void *out, const bnfast_marked *marked,
                            const bnfast_columns *columns, const bnfast_coefficients *c, int map, int stream);

    /* a <- a merged with b, for n columns. Moments: Chan, Golub, LeVeque with count_a and count_b values.
     * Sums: addition. */
    void (*merge_moments)(ptrdiff_t n, double count_a, double *mean_a, double *m2_a, double count_b,
                          const double *mean_b, const double *m2_b);
    void (*merge_sums)(ptrdiff_t n, double *u_a, double *ud_a, const double *u_b, const double *ud_b);
    /* Moments, of rows a, IN and OUT, and b of some channels: see rows.h. Both have a count above 0. (Asked of float64.) */
    void (*merge_moments_row)(ptrdiff_t channels, double *a, const double *b);

    /* Of n channels: the rounded mean, and y as an activation meets it in a backward pass: center, y_scale, y_shift. */
    void (*make_y_coefficients)(ptrdiff_t n, const bnfast_channels *of);
    /* The results of n channels, and their coefficients. */
    void (*make_coefficients)(ptrdiff_t n, const bnfast_channels *of);
    /* Whether some of n channels, whose coefficients are made, lie at the edges of a dtype's range: what they are made of,
     * or what the map makes with them, may not be what it should (careful.c); 0: none. small: how many have so small a
     * scale that results may be subnormal OUT */
    ptrdiff_t (*edges)(ptrdiff_t n, const bnfast_channels *of, ptrdiff_t *small);
    ptrdiff_t (*edges_of_m2)(ptrdiff_t n, const bnfast_channels *of); /* the same of a forward's or moments' m2 alone */
    /* How many of n variances are finite and, with eps, above 0. */
    ptrdiff_t (*usable_variances)(ptrdiff_t n, const bnfast_parameter *var, double eps);
    /* For each of n channels, `step` apart, the middle one of the BNFAST_SAMPLES values at x + offsets[i], so that one
     * or two outliers are never taken; 0 where it is not finite. out: (n,) OUT */
    void (*typical_values)(ptrdiff_t n, ptrdiff_t step, const void *x, const ptrdiff_t *offsets, void *out);
    /* The memory floor: out = x, or x + u where u is not NULL, streamed. n: elements */
    void (*floor)(const void *x, const void *u, void *out, ptrdiff_t n);
    /* float64 to what is computed with */
    void (*round_values)(ptrdiff_t n, const double *values, void *out);
    /* From the dtype to what is computed with, exactly, and back, rounded to nearest even. */
    void (*widen_values)(ptrdiff_t n, const void *x, void *out);
    void (*narrow_values)(ptrdiff_t n, const void *values, void *out);

    /* Numbers by their bits, where subnormal ones would be slow (subnormal.inc.h); lift_exponent 0: not of this dtype.
     * lift: out = x * 2**lift_exponent, n of them; returns whether some cannot be. lower: the other way round, rounded
     * to nearest even, n_rows rows, `stride` apart, of n_columns, of which only those where `which`, numbers of the
     * data's size, has all its bits; NULL: all; returns whether some are too large and have been left */
    int lift_exponent;
    int (*lift)(ptrdiff_t n, const void *x, void *out);
    int (*lower)(void *data, ptrdiff_t n_rows, ptrdiff_t stride, ptrdiff_t n_columns, const void *which);
} bnfast_kernels;

/* One table per dtype for each instruction set that was compiled. */
#define BNFAST_TABLES(dtype, suffix) \
    extern const bnfast_kernels bnfast_table_##suffix##_baseline, bnfast_table_##suffix##_avx2, \
        bnfast_table_##suffix##_avx512;
BNFAST_FOR_EACH_DTYPE(BNFAST_TABLES)
#undef BNFAST_TABLES

/* dispatch.c: the active instruction set. bnfast_select(NULL) takes the widest one of this CPU; with a name it
 * takes that one. 0: done; -1: no such name; -2: not compiled in, or not on this CPU (nothing changed). */
int bnfast_select(const char *isa);
const bnfast_kernels *bnfast_active(bnfast_dtype dtype);
const bnfast_kernels *bnfast_of_same_isa(const bnfast_kernels *kernels, bnfast_dtype dtype);
const char *bnfast_isa_name(int i); /* i-th known name, narrowest first; NULL past the last */
int bnfast_isa_compiled(int i);
int bnfast_isa_supported(int i); /* compiled, and this CPU has it */

/* Bytes of the data caches: usual sizes until bnfast_read_caches (at import) has asked the system. */
void bnfast_read_caches(void);
void bnfast_set_caches(ptrdiff_t l2, ptrdiff_t last_level); /* for tests: as if this CPU had such caches */
ptrdiff_t bnfast_l2_bytes(void);
ptrdiff_t bnfast_last_level_bytes(void);

void bnfast_stream_fence(void); /* makes streamed stores visible before the task ends */

#endif
