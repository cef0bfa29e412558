/* Every leaf of one dtype, and its table. Included twice by each instruction set's file, with
 *   T       float or double
 *   FN(x)   x_f32_avx2 and the like
 *   VBYTES  width of a native vector in bytes
 *   ISA     the instruction set's name */

#include "vec.h"

#include "rectify.inc.h"

#include "normalize.inc.h"

#include "sums.inc.h"

#include "moments.inc.h"

#include "backward.inc.h"

#include "merge.inc.h"

#include "coefficients.inc.h"

static void FN(floor)(const void *data, const void *data_u, void *result, ptrdiff_t n)
{
    const T *x = data, *u = data_u;
    T *out = result;
    ptrdiff_t i = 0;
    for (const ptrdiff_t head = FN(to_aligned)(out, n); i < head; i++)
        out[i] = u ? x[i] + u[i] : x[i];
    if (u)
        for (; i + VN <= n; i += VN)
            FN(store_stream)(out + i, FN(load)(x + i) + FN(load)(u + i));
    else
        for (; i + VN <= n; i += VN)
            FN(store_stream)(out + i, FN(load)(x + i));
    for (; i < n; i++)
        out[i] = u ? x[i] + u[i] : x[i];
}

const bnfast_kernels FN(bnfast_table) = {
    .isa = ISA,
    .itemsize = sizeof(T),
    .moments_planar = FN(moments_planar),
    .moments_interleaved = FN(moments_interleaved),
    .sums_planar = FN(sums_planar),
    .sums_interleaved = FN(sums_interleaved),
    .write_rest = FN(write_rest),
    .map_interleaved = FN(map_interleaved),
    .merge_moments = FN(merge_moments),
    .merge_sums = FN(merge_sums),
    .make_y_coefficients = FN(make_y_coefficients),
    .make_coefficients = FN(make_coefficients),
    .usable_variances = FN(usable_variances),
    .typical_values = FN(typical_values),
    .floor = FN(floor),
    .round_values = FN(round_values),
};

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
#undef COLUMNS
#undef COLUMN_VECTORS
#undef TILE_ROWS
#undef TRUSTED
#undef IN_RANGE
#undef PIVOT_CHANNELS
#undef TAKE_STEPS
#undef ROWS
#undef FEWER_ROWS
#undef ROWS_DISPLACE
#undef MANY_COLUMNS
#undef GROUP
#undef SMALLEST_MEAN_SQUARE
#undef READS_U
#undef PASSES
#undef FOR_EACH_MAP
#undef NO_U
#undef ALL
#undef PASSED
#undef DO_TILE
