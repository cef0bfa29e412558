# Rows of statistics, merged: what `Moments` and `Sums` do, and what processes send each other.

cdef extern from "kernels/rows.h" nogil:
    void bnfast_merge_moments_rows(double *rows, Py_ssize_t n_rows, Py_ssize_t stride,
                                   Py_ssize_t channels) noexcept
    void bnfast_merge_sums_rows(double *rows, Py_ssize_t n_rows, Py_ssize_t stride, Py_ssize_t n_sums) noexcept


def merge_moments_rows(cnp.ndarray rows):
    """-> (1 + 3 C,) float64: (count, mean, m2, rest) of all rows, (P, 1 + 3 C) C-contiguous float64, overwritten."""
    if not (cnp.PyArray_NDIM(rows) == 2 and cnp.PyArray_TYPE(rows) == cnp.NPY_FLOAT64 and cnp.PyArray_ISCARRAY(rows)):
        raise TypeError("rows: expected a C-contiguous float64 array of 2 dimensions")
    cdef Py_ssize_t n_rows = cnp.PyArray_DIM(rows, 0), width = cnp.PyArray_DIM(rows, 1)
    cdef double *numbers = values(rows)
    with nogil:
        bnfast_merge_moments_rows(numbers, n_rows, width, width // 3)
    return rows[0]
