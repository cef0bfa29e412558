/* All dtypes of one instruction set. The file that includes this defines ISA_SUFFIX, ISA, VBYTES, the streaming
 * stores, and with ISA_HAS_PARTS the instructions for parts of vectors that plain C cannot say (see vec.h). */

#define PASTE_(a, b, c) a##b##c
#define PASTE(a, b, c) PASTE_(a, b, c)

#define DTYPE BNFAST_FLOAT32
#define S float
#define T float
#define TI int32_t
#define FN(name) PASTE(name, _f32_, ISA_SUFFIX)
#include "leaves.inc.h"
#undef DTYPE
#undef S
#undef T
#undef TI
#undef FN

#define DTYPE BNFAST_FLOAT64
#define S double
#define T double
#define TI int64_t
#define FN(name) PASTE(name, _f64_, ISA_SUFFIX)
#include "leaves.inc.h"
#undef DTYPE
#undef S
#undef T
#undef TI
#undef FN

#include "halves.h"

#define S uint16_t
#define T float
#define TI int32_t

#define DTYPE BNFAST_FLOAT16
#define HALF f16
#define JOINS ISA_JOINS_HALVES
#define FN(name) PASTE(name, _f16_, ISA_SUFFIX)
#include "leaves.inc.h"
#undef DTYPE
#undef HALF
#undef FN

#define DTYPE BNFAST_BFLOAT16
#define HALF bf16
#define SPLITS ISA_SPLITS_BF16
#define JOINS ISA_JOINS_HALVES
#define FN(name) PASTE(name, _bf16_, ISA_SUFFIX)
#include "leaves.inc.h"
#undef DTYPE
#undef HALF
#undef FN
