/* Gathering and scattering by runs: copies of memory, as fast as the memory is where runs are long. */

#include "positions.h"

#include <stdint.h>
#include <string.h>

/* The first from i on that is not 0, or end: any other byte is true, as NumPy reads views of bytes. */
static ptrdiff_t first_true(const unsigned char *mask, ptrdiff_t i, ptrdiff_t end)
{
    for (uint64_t eight; i + 8 <= end; i += 8) {
        memcpy(&eight, mask + i, 8);
        if (eight != 0)
            break;
    }
    while (i < end && mask[i] == 0)
        i++;
    return i;
}

ptrdiff_t bnfast_list_runs(const unsigned char *mask, ptrdiff_t n, ptrdiff_t row, ptrdiff_t *positions,
                           bnfast_run *runs)
{
    ptrdiff_t n_runs = 0;
    *positions = 0;
    for (ptrdiff_t first = 0; first < n; first += row) {
        const ptrdiff_t end = first + row < n ? first + row : n;
        for (ptrdiff_t begin, i = first; (begin = first_true(mask, i, end)) < end;) {
            const unsigned char *const behind = memchr(mask + begin, 0, (size_t)(end - begin));
            i = behind ? behind - mask : end;
            if (runs) {
                runs[n_runs].begin = begin;
                runs[n_runs].length = i - begin;
            }
            *positions += i - begin;
            n_runs++;
        }
    }
    return n_runs;
}

/* Bytes from the beginning of `whole` to a position of a channel. */
static ptrdiff_t offset_of(ptrdiff_t position, ptrdiff_t channel, ptrdiff_t channels, ptrdiff_t inner, ptrdiff_t size)
{
    return ((position / inner * channels + channel) * inner + position % inner) * size;
}

void bnfast_gather(const bnfast_run *runs, ptrdiff_t n_runs, ptrdiff_t channels, ptrdiff_t inner, ptrdiff_t positions,
                   ptrdiff_t size, const void *whole, void *part)
{
    const char *const from = whole;
    char *to = part;
    ptrdiff_t done = 0;
    for (ptrdiff_t r = 0; r < n_runs; done += runs[r].length, r++)
        if (inner == 1) {
            const ptrdiff_t bytes = runs[r].length * channels * size;
            memmove(to, from + offset_of(runs[r].begin, 0, channels, inner, size), (size_t)bytes);
            to += bytes;
        } else
            for (ptrdiff_t c = 0; c < channels; c++)
                memcpy(to + (c * positions + done) * size, from + offset_of(runs[r].begin, c, channels, inner, size),
                       (size_t)(runs[r].length * size));
}

/* Positions begin .. end - 1, in one row, of all channels */
static void clear(ptrdiff_t begin, ptrdiff_t end, ptrdiff_t channels, ptrdiff_t inner, ptrdiff_t size, char *whole)
{
    if (inner == 1)
        memset(whole + offset_of(begin, 0, channels, inner, size), 0, (size_t)((end - begin) * channels * size));
    else
        for (ptrdiff_t c = 0; begin < end && c < channels; c++)
            memset(whole + offset_of(begin, c, channels, inner, size), 0, (size_t)((end - begin) * size));
}

void bnfast_scatter(const bnfast_run *runs, ptrdiff_t n_runs, ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t inner,
                    ptrdiff_t positions, ptrdiff_t size, const void *part, void *whole)
{
    const char *from = part;
    char *const to = whole;
    ptrdiff_t done = 0, at = 0; /* positions that were copied; that were written */
    for (ptrdiff_t r = 0; r <= n_runs; r++) {
        const ptrdiff_t next = r < n_runs ? runs[r].begin : outer * inner;
        while (at < next) { /* what lies between, row by row */
            const ptrdiff_t row_end = inner == 1 ? next : (at / inner + 1) * inner,
                            end = row_end < next ? row_end : next;
            clear(at, end, channels, inner, size, to);
            at = end;
        }
        if (r == n_runs)
            break;
        if (inner == 1) {
            const ptrdiff_t bytes = runs[r].length * channels * size;
            memcpy(to + offset_of(at, 0, channels, inner, size), from, (size_t)bytes);
            from += bytes;
        } else
            for (ptrdiff_t c = 0; c < channels; c++)
                memcpy(to + offset_of(at, c, channels, inner, size), from + (c * positions + done) * size,
                       (size_t)(runs[r].length * size));
        done += runs[r].length;
        at += runs[r].length;
    }
}

/* From the last run to the first: none is moved over what is still to be moved, as each lies at its place or before it. */
void bnfast_spread(const bnfast_run *runs, ptrdiff_t n_runs, ptrdiff_t outer, ptrdiff_t channels, ptrdiff_t positions,
                   ptrdiff_t size, void *whole)
{
    char *const all = whole;
    ptrdiff_t written = outer, left = positions; /* from where on all is in its place; positions not yet moved */
    for (ptrdiff_t r = n_runs - 1; r >= 0; r--) {
        const ptrdiff_t end = runs[r].begin + runs[r].length;
        left -= runs[r].length;
        clear(end, written, channels, 1, size, all);
        memmove(all + offset_of(runs[r].begin, 0, channels, 1, size), all + left * channels * size,
                (size_t)(runs[r].length * channels * size));
        written = runs[r].begin;
    }
    clear(0, written, channels, 1, size, all);
}
