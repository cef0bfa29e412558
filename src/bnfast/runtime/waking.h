/* Whether a call should take other threads besides its own, where those may be asleep. To wake one takes 20 to 60
 * microseconds, which the call waits for; one that has just been at work is there in less than one. So in a loop that
 * does other things between its calls two threads pay later than in a burst of calls. No result depends on it. */

#ifndef BNFAST_WAKING_H
#define BNFAST_WAKING_H

/* At import, once. spin_count: how many turns a worker waits before it sleeps; 0: not known, waking is free then. */
void bnfast_waking_init(long spin_count);

/* Of a call that begins, is not small, and may use more than one thread. */
int bnfast_waking_pays(long long elements);

/* Of a call that ends, whatever threads it used. */
void bnfast_waking_call_ended(void);

/* For tests, in the calling thread: as if its last call had ended so long ago, and such a burst with it. */
void bnfast_waking_pretend(long long nanoseconds, long long elements);
long long bnfast_waking_awake(void); /* nanoseconds that a worker stays awake; 0: not known */

#endif
