/* Threads of this process that are none of ours and use CPUs: OpenBLAS's, which go on spinning for a tenth of a second
 * after a matrix product, another package's pool, Python threads that have made no large call of ours yet. A team that
 * has to share CPUs with them waits, in every phase, for its thread that is not running just now: on 2 CPUs it is
 * slower than one thread. */

#ifndef BNFAST_RIVALS_H
#define BNFAST_RIVALS_H

void bnfast_rivals_init(void);

/* In every thread of a team, the calling one too: it is none of them. */
void bnfast_rivals_exclude_me(void);

/* The team to ask for instead of `team`, for work on that many elements. */
int bnfast_rivals_leave(int team, long long elements);

#endif
