/* Which instruction set runs: chosen once, at import, from what was compiled and what this CPU and its operating
 * system have. Also the cache sizes and the fence, the other things that are asked of the machine. */

#include "target.h"

#include <stdio.h>

#if BNFAST_X86_VECTORS
#include <cpuid.h>
#endif

#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

static const struct isa {
    const char *name;
    const bnfast_kernels *tables[BNFAST_N_DTYPES]; /* NULL: not compiled */
} isas[] = {
#define BASELINE(dtype, suffix) &bnfast_table_##suffix##_baseline,
#define AVX2(dtype, suffix) &bnfast_table_##suffix##_avx2,
#define AVX512(dtype, suffix) &bnfast_table_##suffix##_avx512,
    {"baseline", {BNFAST_FOR_EACH_DTYPE(BASELINE)}},
#if BNFAST_X86_VECTORS
    {"avx2", {BNFAST_FOR_EACH_DTYPE(AVX2)}},
    {"avx512", {BNFAST_FOR_EACH_DTYPE(AVX512)}},
#else
    {"avx2", {NULL}},
    {"avx512", {NULL}},
#endif
};
enum { N_ISAS = sizeof isas / sizeof isas[0] };

/* A thread may select while others compute: each of their jobs reads it once. */
static const struct isa *active = &isas[0];
#if defined(__GNUC__)
#define ACTIVE __atomic_load_n(&active, __ATOMIC_RELAXED)
#define ACTIVATE(isa) __atomic_store_n(&active, (isa), __ATOMIC_RELAXED)
#else
#define ACTIVE (*(const struct isa *volatile *)&active)
#define ACTIVATE(isa) (ACTIVE = (isa))
#endif

const char *bnfast_isa_name(int i) { return i >= 0 && i < N_ISAS ? isas[i].name : NULL; }

int bnfast_isa_compiled(int i) { return bnfast_isa_name(i) != NULL && isas[i].tables[0] != NULL; }

#if BNFAST_X86_VECTORS
/* __builtin_cpu_supports knows this name since GCC 11 alone. */
static int has_f16c(void)
{
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}
#endif

int bnfast_isa_supported(int i)
{
    if (!bnfast_isa_compiled(i))
        return 0;
#if BNFAST_X86_VECTORS
    __builtin_cpu_init();
    if (i == 1)
        return __builtin_cpu_supports("avx2") != 0 && has_f16c();
    if (i == 2)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl");
#endif
    return i == 0;
}

int bnfast_select(const char *isa)
{
    int widest = 0;
    for (int i = 0; i < N_ISAS; i++) {
        const int named = isa != NULL && strcmp(isa, isas[i].name) == 0;
        if (named && !bnfast_isa_supported(i))
            return -2;
        if (named) {
            ACTIVATE(&isas[i]);
            return 0;
        }
        if (bnfast_isa_supported(i))
            widest = i;
    }
    if (isa != NULL)
        return -1;
    ACTIVATE(&isas[widest]);
    return 0;
}

const bnfast_kernels *bnfast_active(bnfast_dtype dtype) { return ACTIVE->tables[dtype]; }

const bnfast_kernels *bnfast_of_same_isa(const bnfast_kernels *kernels, bnfast_dtype dtype)
{
    for (int i = 0; i < N_ISAS; i++)
        if (isas[i].tables[kernels->dtype] == kernels)
            return isas[i].tables[dtype];
    return NULL;
}

/* Linux says what a cache level holds in sysfs. sysconf knows it too, but adds up what a virtual machine's CPUID
 * claims (320 MiB where there are 32), so it comes second. */
static ptrdiff_t system_cache(int level, ptrdiff_t usual)
{
    long kib = 0, bytes = 0;
    (void)level; /* where neither is known */
#if defined(__linux__)
    for (int i = 0; i < 8 && kib == 0; i++) {
        char path[80];
        int found = 0;
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/level", i);
        FILE *file = fopen(path, "r");
        if (file == NULL)
            break;
        if (fscanf(file, "%d", &found) != 1)
            found = 0;
        fclose(file);
        if (found != level)
            continue;
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu0/cache/index%d/size", i);
        file = fopen(path, "r");
        if (file != NULL) {
            if (fscanf(file, "%ldK", &kib) != 1)
                kib = 0;
            fclose(file);
        }
    }
#endif
#if defined(_SC_LEVEL2_CACHE_SIZE)
    if (kib == 0)
        bytes = sysconf(level == 2 ? _SC_LEVEL2_CACHE_SIZE : _SC_LEVEL3_CACHE_SIZE);
#endif
    if (kib > 0)
        return (ptrdiff_t)kib << 10;
    return bytes > 0 ? (ptrdiff_t)bytes : usual;
}

static ptrdiff_t l2_bytes = (ptrdiff_t)1 << 19, last_level_bytes = (ptrdiff_t)1 << 23;

void bnfast_read_caches(void)
{
    l2_bytes = system_cache(2, l2_bytes);
    last_level_bytes = system_cache(3, last_level_bytes);
}

void bnfast_set_caches(ptrdiff_t l2, ptrdiff_t last_level)
{
    l2_bytes = l2;
    last_level_bytes = last_level;
}

ptrdiff_t bnfast_l2_bytes(void) { return l2_bytes; }
ptrdiff_t bnfast_last_level_bytes(void) { return last_level_bytes; }

void bnfast_stream_fence(void)
{
#if BNFAST_X86_64
    _mm_sfence();
#endif
}
