/* Every leaf of one dtype, and its table. Included once a dtype by each instruction set's file, with
 *   DTYPE   its enumerator (kernels.h)
 *   S       an element as it lies in memory
 *   HALF    f16 or bf16 where they are that; else not defined
 *   SPLITS, JOINS   1 where the instruction set has read_split_, read_split_part_ and write_split_ (and of vectors of 64 bytes
 *           add_split_), or write_joined_, of that half; else 0 or not defined
 *   T       what is computed with: float or double; TI: the integer of its size
 *   FN(x)   x_f32_avx2 and the like
 *   VBYTES  width of a native vector in bytes
 *   ISA     the instruction set's name */

/* Whether there is something wider than T, for sums and for what leaves its range. */
#define NARROW (sizeof(T) == 4)

/* Whether there are bodies for special cases: for each kind of store; for some rows at once that end in parts of
 * vectors; for two results; for marks. Not of halves, where they gain little: less to compile. */
#ifdef HALF
#define SPECIALISES 0
#else
#define SPECIALISES 1
#endif

#include "vec.h"

#include "elements.h"

#include "marks.inc.h"

#include "rectify.inc.h"

#include "normalize.inc.h"

#include "sums.inc.h"

#include "moments.inc.h"

#include "exact.inc.h"

#include "backward.inc.h"

/* Merging and coefficients know no data: those of float32 are for halves, too. */
#ifdef HALF
#define OF_T(name) F32(name)
#else
#define OF_T(name) FN(name)
#include "merge.inc.h"

#include "coefficients.inc.h"
#endif

#include "subnormal.inc.h"

static void FN(floor)(const void *data, const void *data_u, void *result, ptrdiff_t n)
{
    const S *x = data, *u = data_u;
    S *out = result;
    const FN(vec) zero = FN(set1)(0);
    const ptrdiff_t head = FN(to_aligned)(out, n);
    for (ptrdiff_t i = 0, step = head; i < n; i += step, step = VN) {
        const ptrdiff_t left = i < head ? head : n - i < VN ? n - i : VN;
        FN(vec) v = FN(read_up_to)(x + i, left, zero);
        if (u)
            v += FN(read_up_to)(u + i, left, zero);
        if (left < VN)
            FN(write_part)(out + i, left, v);
        else
            FN(write_stream)(out + i, v);
    }
}

static void FN(narrow_values)(ptrdiff_t n, const void *data, void *out)
{
    const T *values = data;
    S *x = out;
    for (ptrdiff_t i = 0; i < n; i += VN)
        FN(write_part)(x + i, n - i, FN(load_part)(values + i, n - i, FN(set1)(0)));
}

const bnfast_kernels FN(bnfast_table) = {
    .isa = ISA,
    .dtype = DTYPE,
    .itemsize = sizeof(S),
    .coefficient_size = sizeof(T),
    .narrow = NARROW,
    .marks_per_byte = MARKS_PER_BYTE,
    .moments_planar = FN(moments_planar),
    .moments_interleaved = FN(moments_interleaved),
    .exact_moments_planar = FN(exact_moments_planar),
    .exact_moments_interleaved = FN(exact_moments_interleaved),
    .sums_planar = FN(sums_planar),
    .sums_interleaved = FN(sums_interleaved),
    .write_rest = FN(write_rest),
    .map_interleaved = FN(map_interleaved),
    .merge_moments = OF_T(merge_moments),
    .merge_sums = OF_T(merge_sums),
    .merge_moments_row = OF_T(merge_moments_row),
    .make_y_coefficients = OF_T(make_y_coefficients),
    .make_coefficients = OF_T(make_coefficients),
    .edges = OF_T(edges),
    .edges_of_m2 = OF_T(edges_of_m2),
    .usable_variances = OF_T(usable_variances),
    .typical_values = FN(typical_values),
    .floor = FN(floor),
    .widen_values = FN(widen_values),
    .narrow_values = FN(narrow_values),
    .round_values = OF_T(round_values),
    .lift_exponent = LIFT,
#ifndef HALF
    .lift = FN(lift),
    .lower = FN(lower),
#endif
};

#undef LINE
#undef SPECIALISES
#undef SPLITS
#undef JOINS
#undef MAPS_TWO
#undef OF_T
#undef NARROW
#undef VL
#undef VN
#undef VU
#undef WN
#undef WIDE_PER_VEC
#undef PIVOT_SAMPLES
#undef COLUMN_SAMPLES
#undef PIVOT_LOSS
#undef CHAIN
#undef COLUMN_CHAIN
#undef FEW_ROWS
#undef AHEAD
#undef CHANNELS_IN_ORDER
#undef COLUMNS
#undef ROW_AHEAD
#undef TRUSTED
#undef IN_RANGE
#undef PIVOT_CHANNELS
#undef SAMPLED_CHANNELS
#undef WIDE_COLUMNS
#undef TAKE_STEPS
#undef IN_TWOS
#undef CHAIN_OF
#undef TAKE_TWO
#undef TAKE_STEPS_OF_TWO
#undef ROWS
#undef FEWER_ROWS
#undef ROWS_DISPLACE
#undef MANY_COLUMNS
#undef GROUP
#undef LEAST_NORMAL
#undef SMALL_SCALE
#undef IS_SMALL
#undef MOST_SCALE
#undef NO_PART
#undef MOST_M2
#undef LEAST_M2
#undef LEAST_EPS
#undef MOST_VANISHING
#undef SIZE
#undef WITHIN
#undef UP_TO
#undef SMALLEST_MEAN_SQUARE
#undef READS_U
#undef PASSES
#undef MARKS
#undef HAS_TWO_RESULTS
#undef COLLECTS
#undef COLLECTED
#undef NONE
#undef FOR_EACH_MAP
#undef NO_U
#undef ALL
#undef PASSED
#undef RELU
#undef RECTIFIED
#undef MARKED
#undef TAKES_SOME
#undef DO_TILE
#undef TURN
#undef MARKS_PER_BYTE
#undef LIFT
