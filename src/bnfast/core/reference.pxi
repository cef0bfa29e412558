# What a layer's step needs besides operations: its input checked, new running statistics, and a reference to its state
# that is exchanged all at once.

def as_input(value, axis, Py_ssize_t channels):
    """`value` as `as_data` gives it for "x", with so many channels along `axis` (nothing else is checked)."""
    cdef cnp.ndarray array = as_floating(value, "x")
    cdef int ndim = cnp.PyArray_NDIM(array)
    cdef Py_ssize_t i = axis if -64 <= axis <= 64 else 64  # the latter: refused where it is used
    if -ndim <= i < ndim and ndim >= 2 and cnp.PyArray_DIM(array, i if i >= 0 else i + ndim) != channels:
        shape = shape_of(array)
        hint = ""
        for k, n in enumerate(shape):
            if n == channels and k > 0:
                hint = f"; BatchNorm(..., axis={-1 if k == ndim - 1 else k}) would fit"
        raise ValueError(f"x: expected {channels} channels along axis {axis}, got shape {shape}{hint}")
    return array


def updated_running(cnp.ndarray mean, cnp.ndarray var, cnp.ndarray batch_mean, cnp.ndarray batch_m2, Py_ssize_t count,
                    double factor, bint unbiased):
    """-> (mean, var), new: (1 - factor) * old + factor * batch. All (C,) float64, contiguous."""
    cdef Py_ssize_t channels = cnp.PyArray_DIM(mean, 0), i
    cdef cnp.ndarray new_mean = new_statistics(channels), new_var = new_statistics(channels)
    cdef double *old_m = values(mean)
    cdef double *old_v = values(var)
    cdef double *m = values(new_mean)
    cdef double *v = values(new_var)
    cdef double *b = values(batch_mean)
    cdef double *b2 = values(batch_m2)
    cdef double divisor = count - 1 if unbiased else count
    for i in range(channels):
        m[i] = (1.0 - factor) * old_m[i] + factor * b[i]
        v[i] = (1.0 - factor) * old_v[i] + factor * (b2[i] / divisor)
    return new_mean, new_var


cdef extern from *:
    """
    #if defined(Py_GIL_DISABLED)
    #define BNFAST_FREE_THREADED 1
    #else
    #define BNFAST_FREE_THREADED 0
    #endif
    """
    bint BNFAST_FREE_THREADED

FREE_THREADED = bool(BNFAST_FREE_THREADED)

ctypedef struct copy_order:
    void *target
    const void *source
    size_t n_bytes


cdef int to_copy(copy_order *order, cnp.ndarray target, cnp.ndarray source) except -1:
    if not (same_layout(source, target) and cnp.PyArray_NBYTES(source) == cnp.PyArray_NBYTES(target)
            and cnp.PyArray_ISCARRAY(target)):
        raise ValueError("expected contiguous arrays of one shape and dtype")
    order.target, order.source = cnp.PyArray_DATA(target), cnp.PyArray_DATA(source)
    order.n_bytes = cnp.PyArray_NBYTES(source)
    return 0


cdef void copy_all(const copy_order *orders, int n) noexcept:
    cdef int i
    for i in range(n):
        memcpy(orders[i].target, orders[i].source, orders[i].n_bytes)


@cython.auto_pickle(False)
@cython.final
cdef class AtomicReference:
    """A reference to an object, which threads and signal handlers exchange for another, with the contents of arrays.

    With a GIL nothing comes between, because the evaluation loop is not entered. Without one a critical section keeps
    out the others that go through this reference; inside no other lock is taken, as waiting for one would let go of it.
    """

    cdef object referent

    def __cinit__(self, value):
        self.referent = value

    @property
    def value(self):
        with cython.critical_section(self):
            value = self.referent
        return value

    def snapshot(self, tuple arrays):
        """-> (value, copies...), of one moment, of up to two contiguous arrays; None for None."""
        cdef copy_order orders[2]
        cdef int n = 0
        copies = []
        for array in arrays:
            copy = None if array is None else np.empty_like(array, order="C", subok=False)
            copies.append(copy)
            if copy is not None:
                if n == 2:
                    raise ValueError("snapshot: expected up to two arrays")
                to_copy(&orders[n], copy, array)
                n += 1
        with cython.critical_section(self):
            value = self.referent
            copy_all(orders, n)
        return value, *copies

    def compare_and_swap(self, expected, value, tuple copies=()):
        """Copies arrays and refers to `value`, all at once, if it still refers to `expected`; returns whether it did.

        copies: up to two pairs (target, source), each two contiguous arrays of one dtype and shape.
        """
        cdef copy_order orders[2]
        cdef int n = 0
        for target, source in copies:
            if n == 2:
                raise ValueError("compare_and_swap: expected up to two pairs of arrays")
            to_copy(&orders[n], target, source)
            n += 1
        return self.swap(expected, value, orders, n)

    cdef bint swap(self, object expected, object value, copy_order *orders, int n) noexcept:
        """The caller holds `expected`: no object ends in here."""
        cdef bint same
        with cython.critical_section(self):
            same = self.referent is expected
            if same:
                copy_all(orders, n)
                self.referent = value
        return same


@cython.auto_pickle(False)
@cython.final
@cython.no_gc_clear  # __dealloc__ needs what it refers to
cdef class Calibration:
    """What `with layer.calibrate():` enters and leaves.

    In C, because no signal handler runs between its steps: a layer is never left in calibration by an interrupt. From
    Python 3.14 on one may run after `__enter__` and before the block: then the end of this object ends the calibration.
    """

    cdef object layer
    cdef AtomicReference current
    cdef object token

    def __cinit__(self, layer, AtomicReference current not None):
        """current: the layer's, to the token of the block that is gathering, or None."""
        self.layer, self.current = layer, current

    def __dealloc__(self):
        if self.token is not None:
            self.current.swap(self.token, None, NULL, 0)

    def __enter__(self):
        token = object()  # of this block: what another one has gathered is not its own
        if not self.current.swap(None, token, NULL, 0):
            raise RuntimeError("calibrate: this layer is being calibrated already")
        self.token = token
        return self.layer

    def __exit__(self, kind, error, trace):
        self.current.swap(self.token, None, NULL, 0)
        if kind is None:
            self.layer._finish_calibration(self.token)
