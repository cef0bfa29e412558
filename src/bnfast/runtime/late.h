/* Whether the other threads of a team come late. On a machine whose CPUs other processes use, a thread that is woken waits
 * for a CPU, and the caller waits for it: a call of 20 microseconds then takes 400. So a caller that has waited for others
 * for longer than patience allows, and longer than it has worked itself or than three times that, does without them for a
 * while. What threads of this process do is seen earlier (rivals.h). No result depends on it. */

#ifndef BNFAST_LATE_H
#define BNFAST_LATE_H

void bnfast_late_init(void); /* at import, once */

/* Around a parallel region, in the calling thread; between them in every thread of the team, thread 0 being the calling
 * one, when it has nothing left to do. */
void bnfast_late_region_begins(void);
void bnfast_late_nothing_left(int thread);
void bnfast_late_region_ends(void);

/* Whether the calling thread had better work alone, on so many elements. */
int bnfast_late_better_alone(long long elements);

/* For tests: as if a region had ended in which the caller worked and waited so long; microseconds. And how long a caller
 * waits before it calls others late: 200 microseconds; a negative number: those again. */
void bnfast_late_pretend(long long worked, long long waited);
void bnfast_late_set_patience(long long microseconds);

#endif
