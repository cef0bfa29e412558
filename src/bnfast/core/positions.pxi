# Masks: the positions that take part (all axes but the channel's), brought together in an array of their own, on which
# every operation works as on any other, and the results back to where they belong, 0 elsewhere.

cdef extern from "kernels/positions.h" nogil:
    ctypedef struct bnfast_run:
        Py_ssize_t begin, length
    Py_ssize_t bnfast_list_runs(const unsigned char *mask, Py_ssize_t n, Py_ssize_t row, Py_ssize_t *positions,
                                bnfast_run *runs) noexcept
    void bnfast_gather(const bnfast_run *runs, Py_ssize_t n_runs, Py_ssize_t channels, Py_ssize_t inner,
                       Py_ssize_t positions, Py_ssize_t size, const void *whole, void *part) noexcept
    void bnfast_spread(const bnfast_run *runs, Py_ssize_t n_runs, Py_ssize_t outer, Py_ssize_t channels,
                       Py_ssize_t positions, Py_ssize_t size, void *whole) noexcept
    void bnfast_scatter(const bnfast_run *runs, Py_ssize_t n_runs, Py_ssize_t outer, Py_ssize_t channels,
                        Py_ssize_t inner, Py_ssize_t positions, Py_ssize_t size, const void *part,
                        void *whole) noexcept


cdef cnp.ndarray as_mask(object mask, cnp.ndarray x, int axis):
    """The user's mask as a bool array of x's shape without its channel axis, perhaps a view."""
    cdef int ndim = cnp.PyArray_NDIM(x)
    if isinstance(mask, np.ma.MaskedArray):
        raise TypeError(f"mask: expected an array without a mask, got {type(mask).__name__}")
    try:
        given = np.asarray(mask)
    except ValueError as error:  # a ragged list
        kind = type(mask).__name__
        raise ValueError(f"mask: expected an array, got a {kind} that makes none ({error})") from None
    shape = shape_of(x)
    expected = shape[:axis] + shape[axis + 1:]
    if given.dtype != np.bool_:
        raise TypeError(f"mask: expected dtype bool, True where a position takes part, got {given.dtype}")
    if given.ndim >= ndim:
        raise ValueError(f"mask: expected x's shape without its channel axis, {expected}, got {given.shape}; "
                         "a position takes part with all its channels")
    try:
        return np.broadcast_to(given, expected)
    except ValueError:
        raise ValueError(f"mask: expected a shape that broadcasts to {expected}, that of x without its channel axis, "
                         f"got {given.shape}") from None


def mask_of(mask, cnp.ndarray x, int axis):
    """A user's mask as a bool array of x's shape without its channel axis, perhaps a view."""
    return as_mask(mask, x, axis)


@cython.auto_pickle(False)
@cython.final
cdef class Positions:
    """Those of an array x that take part.

    `gather` brings what lies at them together, as (M, C) or (1, C, M), whose channel axis is 1; `scatter` is the way
    back. Memory is new, and the system's work to hand it out, only where neither `home` can be had nor a part be
    written over: an (M, C) may lie in the array that it will be scattered over.
    """

    cdef readonly cnp.ndarray model  # x, dense
    cdef cnp.ndarray mask       # a copy, as positions lie in memory
    cdef bnfast_job layout      # outer, channels, inner of x
    cdef cnp.ndarray runs       # (n, 2) intp
    cdef readonly Py_ssize_t count

    @property
    def all(self):
        """Whether every position takes part."""
        return self.count == self.layout.outer * self.layout.inner

    def home(self, out, cnp.ndarray array not None):
        """`out`, checked, or a new array like x, in which a part of `array` may lie before it is scattered over it.

        None where none may.
        """
        cdef cnp.ndarray given_out = as_out(out, self.model)
        if self.layout.inner != 1:
            return None
        if given_out is not None and same_layout(given_out, self.model) and disjoint_or_same(given_out, array):
            return given_out
        return empty_like(self.model)

    def gather(self, array, str name, cnp.ndarray home=None):
        """What lies at them in an array of x's shape and dtype, checked under its name; in the memory of `home`."""
        cdef cnp.ndarray whole = packed_like(as_companion(array, name, self.model), self.model)
        cdef cnp.npy_intp shape[3]
        cdef cnp.ndarray part
        if self.layout.inner == 1:
            shape[0], shape[1] = self.count, self.layout.channels
        else:
            shape[0], shape[1], shape[2] = 1, self.layout.channels, self.count
        if home is None:
            part = cnp.PyArray_EMPTY(2 if self.layout.inner == 1 else 3, shape, cnp.PyArray_TYPE(whole), 0)
        else:
            part = cnp.PyArray_SimpleNewFromData(2, shape, cnp.PyArray_TYPE(whole), cnp.PyArray_DATA(home))
            cnp.set_array_base(part, home)
        with nogil:
            bnfast_gather(<bnfast_run *>cnp.PyArray_DATA(self.runs), cnp.PyArray_DIM(self.runs, 0),
                          self.layout.channels, self.layout.inner, self.count, cnp.PyArray_ITEMSIZE(whole),
                          cnp.PyArray_DATA(whole), cnp.PyArray_DATA(part))
        return part

    def scatter(self, cnp.ndarray part not None, out, cnp.ndarray home=None):
        """-> an array like x, or `out`: what `part` has at the positions, 0 elsewhere. home: where it lies."""
        cdef cnp.ndarray given_out = as_out(out, self.model)
        cdef cnp.ndarray whole = given_out
        if home is not None:
            with nogil:
                bnfast_spread(<bnfast_run *>cnp.PyArray_DATA(self.runs), cnp.PyArray_DIM(self.runs, 0),
                              self.layout.outer, self.layout.channels, self.count, cnp.PyArray_ITEMSIZE(part),
                              cnp.PyArray_DATA(home))
            return delivered(home, given_out)
        if whole is None or not same_layout(whole, self.model):
            whole = empty_like(self.model)
        with nogil:
            bnfast_scatter(<bnfast_run *>cnp.PyArray_DATA(self.runs), cnp.PyArray_DIM(self.runs, 0), self.layout.outer,
                           self.layout.channels, self.layout.inner, self.count, cnp.PyArray_ITEMSIZE(part),
                           cnp.PyArray_DATA(part), cnp.PyArray_DATA(whole))
        return delivered(whole, given_out)


cpdef int check_positions(Py_ssize_t count) except -1:
    """That so many positions are enough for statistics."""
    if count < 2:
        raise ValueError(f"mask: expected at least 2 positions that take part when training, got {count}")
    return 0


def positions_of(mask, x, axis):
    """-> Positions of x where a mask is True."""
    cdef Positions positions = Positions.__new__(Positions)
    cdef cnp.ndarray data = as_samples(x, "x"), broadcast
    cdef int channel_axis = as_axis(axis, data)
    cdef Py_ssize_t n, n_runs, row
    broadcast = as_mask(mask, data, channel_axis)
    positions.model = data = packed(data, channel_axis, &positions.layout)
    if cnp.PyArray_SIZE(data) == 0:
        positions.layout.channels = cnp.PyArray_DIM(data, channel_axis)
        positions.layout.outer, positions.layout.inner = cnp.PyArray_SIZE(broadcast), 1
    one_channel = (slice(None),) * channel_axis + (0,)
    positions.mask = np.empty_like(broadcast if positions.layout.channels == 0 else (<object>data)[one_channel],
                                   dtype=np.bool_)
    cnp.PyArray_CopyInto(positions.mask, broadcast)
    n = cnp.PyArray_SIZE(positions.mask)
    row = n if positions.layout.inner == 1 else positions.layout.inner
    n_runs = bnfast_list_runs(<const unsigned char *>cnp.PyArray_DATA(positions.mask), n, row, &positions.count, NULL)
    positions.runs = np.empty((n_runs, 2), np.intp)
    bnfast_list_runs(<const unsigned char *>cnp.PyArray_DATA(positions.mask), n, row, &positions.count,
                     <bnfast_run *>cnp.PyArray_DATA(positions.runs))
    return positions
