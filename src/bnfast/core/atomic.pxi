# References to objects, exchanged for others all at once: what a layer changes is behind one.

cdef extern from *:
    """
    #if defined(Py_GIL_DISABLED)
    #define BNFAST_FREE_THREADED 1
    #else
    #define BNFAST_FREE_THREADED 0
    #endif
    """
    bint BNFAST_FREE_THREADED

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
        return self.current()

    cdef object current(self):
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

    def update(self, function, *arguments):
        """Exchanges the referent for `function(referent, *arguments)`; looks again if another call came between."""
        while True:
            found = self.current()
            if self.swap(found, function(found, *arguments), NULL, 0):
                return

    cdef bint swap(self, object expected, object value, copy_order *orders, int n) noexcept:
        """Copies and exchanges if the referent is still `expected`; the caller holds it: no object ends in here."""
        cdef bint same
        with cython.critical_section(self):
            same = self.referent is expected
            if same:
                copy_all(orders, n)
                self.referent = value
        return same


@cython.auto_pickle(False)
@cython.final
cdef class _Orders:
    """Copies to do, one after another."""

    cdef copy_order *orders
    cdef int n

    def __cinit__(self, copies):
        self.orders = <copy_order *>PyMem_RawMalloc((len(copies) + 1) * sizeof(copy_order))
        if self.orders == NULL:
            raise MemoryError()
        for target, source in copies:
            to_copy(&self.orders[self.n], target, source)
            self.n += 1

    def __dealloc__(self):
        PyMem_RawFree(self.orders)


def update_all(list updates, list arrays=[], list attributes=[]):
    """Changes several layers and arrays at once; what raises, raises before anything has changed.

    updates: (reference, function, copies): as `update`, and (target, source) arrays, contiguous and of one shape and
    dtype, copied at the same moment; arrays: (target, source) of one shape and dtype; attributes: (dict, dict of what
    changes in it). Without a GIL calls of other threads may come between two references, never into one; a reference
    that one of them has changed is looked at again, and what raises then leaves the ones before it exchanged.
    """
    cdef AtomicReference reference
    cdef _Orders orders
    cdef Py_ssize_t i, n = len(updates)
    cdef list found = [None] * n, new = [None] * n, copies = [None] * n
    cdef bint changed = True
    for i in range(n):
        copies[i] = _Orders(updates[i][2])
    while changed:
        for i in range(n):
            found[i] = (<AtomicReference?>updates[i][0]).current()
            new[i] = updates[i][1](found[i])
        changed = False
        for i in range(n):
            changed = changed or (<AtomicReference>updates[i][0]).referent is not found[i]
    for i in range(n):
        reference, orders = updates[i][0], copies[i]
        while not reference.swap(found[i], new[i], orders.orders, orders.n):
            found[i] = reference.current()
            new[i] = updates[i][1](found[i])
    for target, source in arrays:
        cnp.PyArray_CopyInto(target, source)
    for target, changes in attributes:
        (<dict>target).update(<dict>changes)
