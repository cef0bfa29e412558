/* Merging what segments gave: float64, whatever the data are. */

/* Chan, Golub, LeVeque (1979): n = a + b, d = mean_b - mean_a, mean = mean_a + d*b/n, m2 = m2_a + m2_b + d*d*a*b/n */
static void FN(merge_moments)(ptrdiff_t n, double count_a, double *restrict mean_a, double *restrict m2_a,
                              double count_b, const double *restrict mean_b, const double *restrict m2_b)
{
    const double part = count_b / (count_a + count_b), weight = count_a * part;
    for (ptrdiff_t i = 0; i < n; i++) {
        const double d = mean_b[i] - mean_a[i];
        mean_a[i] += d * part;
        m2_a[i] += m2_b[i] + d * d * weight;
    }
}

static void FN(merge_sums)(ptrdiff_t n, double *restrict u_a, double *restrict ud_a, const double *restrict u_b,
                           const double *restrict ud_b)
{
    for (ptrdiff_t i = 0; i < n; i++) {
        u_a[i] += u_b[i];
        ud_a[i] += ud_b[i];
    }
}
