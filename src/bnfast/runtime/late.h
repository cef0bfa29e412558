/* Whether the other threads of a team come late. On a machine whose CPUs other processes use, a thread that is woken waits
 * for a CPU, and the caller waits for it: a call of 20 microseconds then takes 400. So a caller that has waited for others
 * for longer than patience allows, and longer than two of its own tasks took (who waits for a thread that works waits for
 * one), does without them for a while. What threads of this process do is seen earlier (rivals.h). No result depends on it. */

#ifndef BNFAST_LATE_H
#define BNFAST_LATE_H

#include <stddef.h>

void bnfast_late_init(void); /* at import, once */

/* Around a parallel region, in the calling thread; between them in every thread of the team, thread 0 being the calling
 * one, when it has done so many tasks and nothing is left to do. */
void bnfast_late_region_begins(void);
void bnfast_late_nothing_left(int thread, ptrdiff_t tasks);
void bnfast_late_region_ends(void);

/* Whether the calling thread had better work alone, on so many elements. */
int bnfast_late_better_alone(long long elements);

/* For tests: as if a region had ended in which the caller's tasks took so long, and it waited; microseconds. And how long
 * a caller waits before it calls others late: 200 microseconds; a negative number: those again. */
void bnfast_late_pretend(long long task, long long waited);
void bnfast_late_set_patience(long long microseconds);

#endif
