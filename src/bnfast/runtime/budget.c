/* Six loads and two questions to the OpenMP runtime: some tens of nanoseconds a call. */

#include "budget.h"

#include "clock.h"
#include "counter.h"
#include "openmp.h"

static const int64_t CPUS_LAST = 1000000000; /* nanoseconds */

static bnfast_counter process, environment, omp_num_threads_is_set, cpus;
static bnfast_moment cpus_read;

static bnfast_budget limited(long n, bnfast_why why, int chosen, long limit)
{
    const int in_code = why == BNFAST_WHY_CONTEXT || why == BNFAST_WHY_PROCESS;
    if (n > limit)
        return (bnfast_budget){limit, BNFAST_WHY_LIMIT, chosen, in_code};
    return (bnfast_budget){n > 1 ? n : 1, why, chosen, in_code};
}

bnfast_budget bnfast_decide(const bnfast_facts *facts)
{
    const long limit = facts->limit > 1 ? facts->limit : 1;
    if (facts->forked_serial)
        return (bnfast_budget){1, BNFAST_WHY_FORKED, 0, 0};
    if (facts->context)
        return limited(facts->context, BNFAST_WHY_CONTEXT, 1, limit);
    if (facts->process)
        return limited(facts->process, BNFAST_WHY_PROCESS, 1, limit);
    if (facts->environment)
        return limited(facts->environment, BNFAST_WHY_ENVIRONMENT, 1, limit);
    if (facts->omp_num_threads_is_set || facts->cpus > facts->openmp)
        return limited(facts->openmp, facts->has_openmp ? BNFAST_WHY_OPENMP : BNFAST_WHY_NO_OPENMP,
                       facts->omp_num_threads_is_set, limit);
    return limited(facts->cpus, BNFAST_WHY_CPUS, 0, limit);
}

bnfast_budget bnfast_budget_now(long context)
{
    const bnfast_facts facts = {
        .context = context,
        .process = bnfast_value(&process),
        .environment = bnfast_value(&environment),
        .omp_num_threads_is_set = bnfast_value(&omp_num_threads_is_set) != 0,
        .openmp = bnfast_openmp_max_threads(),
        .limit = bnfast_openmp_thread_limit(),
        .has_openmp = bnfast_openmp_version() != 0,
        .forked_serial = bnfast_openmp_forked_serial(),
        .cpus = bnfast_value(&cpus),
    };
    return bnfast_decide(&facts);
}

void bnfast_set_process_threads(long n) { bnfast_exchange(&process, n); }

void bnfast_set_environment_threads(long n, int is_set)
{
    bnfast_exchange(&environment, n);
    bnfast_exchange(&omp_num_threads_is_set, is_set);
}

int bnfast_cpus_are_old(void)
{
    const int64_t now = bnfast_now(), read = bnfast_read_moment(&cpus_read);
    if (read != 0 && now - read <= CPUS_LAST && now >= read)
        return 0;
    bnfast_write_moment(&cpus_read, bnfast_value(&cpus) ? now : 0); /* without a number to go on with, all ask */
    return 1;
}

void bnfast_set_cpus(long n)
{
    bnfast_exchange(&cpus, n);
    bnfast_write_moment(&cpus_read, bnfast_now());
}

void bnfast_age_cpus(long long nanoseconds)
{
    bnfast_write_moment(&cpus_read, bnfast_read_moment(&cpus_read) - nanoseconds);
}

void bnfast_forget_cpus(void)
{
    bnfast_exchange(&cpus, 0);
    bnfast_write_moment(&cpus_read, 0);
}
