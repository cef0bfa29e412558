# Where an array lies: as (outer, channels, inner) for the kernels (DESIGN: one shape for every array), packed where it
# does not collapse to that, and what shares memory with what.

cdef bint collapse(cnp.ndarray array, int axis, bnfast_job *job) noexcept:
    """Sets outer, channels, inner if the array is dense in some order of its axes and fit for C; returns whether."""
    cdef int ndim = cnp.PyArray_NDIM(array), i, j, n = 0, k
    cdef int order[64]
    cdef cnp.npy_intp *shape = cnp.PyArray_DIMS(array)
    cdef cnp.npy_intp *strides = cnp.PyArray_STRIDES(array)
    cdef Py_ssize_t expected = cnp.PyArray_ITEMSIZE(array)
    if not cnp.PyArray_ISBEHAVED_RO(array):
        return False
    for i in range(ndim):  # axes longer than 1, by stride, longest first
        if shape[i] == 1:
            continue
        j = n
        while j > 0 and strides[order[j - 1]] < strides[i]:
            order[j] = order[j - 1]
            j -= 1
        order[j] = i
        n += 1
    job.outer = job.inner = 1
    job.channels = shape[axis]
    cdef bint passed = job.channels == 1  # one channel: everything is its run
    for k in range(n - 1, -1, -1):
        i = order[k]
        if strides[i] != expected:
            return False
        expected *= shape[i]
        if i == axis:
            passed = True
        elif passed and job.channels != 1:
            job.outer *= shape[i]
        else:
            job.inner *= shape[i]
    return True


cdef bint same_layout(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Whether equal indices are equal offsets; both have the same shape and dtype."""
    cdef int i
    if not cnp.PyArray_ISBEHAVED_RO(a):
        return False
    for i in range(cnp.PyArray_NDIM(a)):
        if cnp.PyArray_DIM(a, i) != 1 and cnp.PyArray_STRIDE(a, i) != cnp.PyArray_STRIDE(b, i):
            return False
    return True


cdef cnp.ndarray packed(cnp.ndarray array, int axis, bnfast_job *job):
    """The array, or a dense native copy of it in the same order of axes where the kernels need one."""
    if (cnp.PyArray_SIZE(array) == 0 and cnp.PyArray_ISNOTSWAPPED(array)) or collapse(array, axis, job):
        return array
    array = np.array(array, dtype=array.dtype.newbyteorder("="), order="K", copy=True, subok=False)
    if not collapse(array, axis, job) and cnp.PyArray_SIZE(array) > 0:
        raise AssertionError("a copy in its own order is dense")
    return array


cdef cnp.ndarray empty_like(cnp.ndarray array):
    return PyArray_NewLikeArray(array, cnp.NPY_KEEPORDER, NULL, 0)


cdef cnp.ndarray packed_like(cnp.ndarray array, cnp.ndarray model):
    """The array, or a copy of it, in the layout of the dense array `model`."""
    cdef cnp.ndarray copy
    if same_layout(array, model):
        return array
    copy = empty_like(model)
    cnp.PyArray_CopyInto(copy, array)
    return copy


cdef bint disjoint_or_same(cnp.ndarray out, cnp.ndarray array):
    return array is None or cnp.PyArray_DATA(out) == cnp.PyArray_DATA(array) or not may_overlap(out, array)


cdef cnp.ndarray target_of(cnp.ndarray out, cnp.ndarray x, cnp.ndarray u):
    """Where the kernels write: `out` itself if it lies as x does and overlaps nothing, else a new array."""
    if (out is not None and same_layout(out, x) and disjoint_or_same(out, x) and disjoint_or_same(out, u)):
        return out
    return empty_like(x)


cdef cnp.ndarray delivered(cnp.ndarray target, cnp.ndarray out):
    if out is None or target is out:
        return target
    cnp.PyArray_CopyInto(out, target)
    return out


cdef bint may_overlap(cnp.ndarray a, cnp.ndarray b) noexcept:
    """Whether the address ranges of two arrays meet."""
    cdef uintptr_t a_begin, a_end, b_begin, b_end
    extent(a, &a_begin, &a_end)
    extent(b, &b_begin, &b_end)
    return a_begin < b_end and b_begin < a_end


cdef void extent(cnp.ndarray array, uintptr_t *begin, uintptr_t *end) noexcept:
    cdef int i
    cdef Py_ssize_t reach
    begin[0] = <uintptr_t>cnp.PyArray_DATA(array)
    end[0] = begin[0] + cnp.PyArray_ITEMSIZE(array)
    for i in range(cnp.PyArray_NDIM(array)):
        if cnp.PyArray_DIM(array, i) == 0:
            end[0] = begin[0]
            return
        reach = (cnp.PyArray_DIM(array, i) - 1) * cnp.PyArray_STRIDE(array, i)
        if reach > 0:
            end[0] += reach
        else:
            begin[0] += reach


cpdef bint shares_memory(a, x) except -1:
    """Whether `a` has an element in the memory of `x` (if that is too hard to say: yes); False if `a` is no ndarray."""
    if not cnp.PyArray_Check(a) or not may_overlap(a, x):
        return False
    try:
        return np.shares_memory(a, x, max_work=100_000)
    except TooHardError:
        return True


cdef bint overlaps_itself(cnp.ndarray array) except? -1:
    """Whether two elements of the array share memory."""
    if cnp.PyArray_IS_C_CONTIGUOUS(array) or cnp.PyArray_IS_F_CONTIGUOUS(array):
        return False
    extents = sorted((abs(s), n) for s, n in zip((<object>array).strides, shape_of(array)) if n > 1)
    reach = cnp.PyArray_ITEMSIZE(array)
    for stride, n in extents:
        if stride < reach:
            break
        reach += stride * (n - 1)
    else:
        return False
    if any(stride == 0 for stride, _ in extents):
        return True
    # strides that interlock (as_strided): count the addresses
    offsets = np.zeros(shape_of(array), np.intp)
    for axis, (stride, n) in enumerate(zip((<object>array).strides, shape_of(array))):
        offsets += (np.arange(n) * stride).reshape([-1 if i == axis else 1 for i in range(offsets.ndim)])
    gaps = np.diff(np.sort(offsets, axis=None))
    return bool((gaps < cnp.PyArray_ITEMSIZE(array)).any())


def elements_overlap(cnp.ndarray array not None):
    """Whether two elements of the array share memory."""
    return overlaps_itself(array)
