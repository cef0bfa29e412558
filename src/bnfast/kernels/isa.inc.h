/* Both dtypes of one instruction set. The file that includes this defines ISA_SUFFIX, ISA, VBYTES, the streaming
 * stores, and with ISA_HAS_PARTS the instructions for parts of vectors that plain C cannot say (see vec.h). */

#define PASTE_(a, b, c) a##b##c
#define PASTE(a, b, c) PASTE_(a, b, c)

#define T float
#define TI int32_t
#define FN(name) PASTE(name, _f32_, ISA_SUFFIX)
#include "leaves.inc.h"
#undef T
#undef TI
#undef FN

#define T double
#define TI int64_t
#define FN(name) PASTE(name, _f64_, ISA_SUFFIX)
#include "leaves.inc.h"
#undef T
#undef TI
#undef FN
