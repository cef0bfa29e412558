/* How the threads share the tasks of a phase. Each has a share of neighbouring tasks, does them, then helps with the
 * others' shares. So in every phase and every call a thread comes to the same part of an array, which lies in the
 * caches near it (a processor may have several last-level caches, and several memories), and yet none waits while there
 * is work. */

#ifndef BNFAST_SHARES_H
#define BNFAST_SHARES_H

#include "counter.h"

#include <stddef.h>

typedef struct {
    ptrdiff_t begin, end; /* its tasks: begin .. end - 1 */
    bnfast_counter taken; /* so many of them, or more: some were asked for when none was left */
    int backwards;        /* the last task first */
    char own_cache_line[64 - 2 * sizeof(ptrdiff_t) - sizeof(bnfast_counter) - sizeof(int)];
} bnfast_share;
_Static_assert(sizeof(bnfast_share) == 64, "shares do not share a line of cache");

static inline void bnfast_share_out(bnfast_share *shares, int n_shares, ptrdiff_t n_tasks, int backwards)
{
    const ptrdiff_t whole = n_tasks / n_shares, rest = n_tasks % n_shares;
    for (int i = 0; i < n_shares; i++) {
        shares[i].begin = whole * i + rest * i / n_shares;
        shares[i].end = whole * (i + 1) + rest * (i + 1) / n_shares;
        shares[i].taken = 0;
        shares[i].backwards = backwards;
    }
}

/* A task that nobody else gets, or -1: none is left. */
static inline ptrdiff_t bnfast_take(bnfast_share *share)
{
    const long taken = bnfast_add(&share->taken, 1);
    if (taken > share->end - share->begin)
        return -1;
    return share->backwards ? share->end - taken : share->begin + taken - 1;
}

#endif
