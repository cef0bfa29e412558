"""The extension module: checks arguments, allocates, releases the GIL, runs the parallel loop, calls the kernels.

Every function reads check, allocate, compute, return, in this order: an error leaves nothing half done. The only
parallel loop of the project is in `run`. The C below this module cannot fail: what can go wrong in the extension is
found here.
"""

import math
import warnings

import numpy as np
from numpy.exceptions import AxisError, TooHardError

cimport cython
cimport numpy as cnp
from cpython.contextvars cimport get_value
from cpython.number cimport PyNumber_Index
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from cython.parallel cimport prange
from libc.stdint cimport uintptr_t
from libc.string cimport memcpy, memset

cnp.import_array()

cdef extern from "kernels/job.h" nogil:
    ctypedef struct bnfast_kernels:
        const char *isa
        void (*round_values)(Py_ssize_t n, const double *values, void *out) noexcept nogil

    const bnfast_kernels *bnfast_active(Py_ssize_t itemsize) noexcept
    int bnfast_select(const char *isa) noexcept
    const char *bnfast_isa_name(int i) noexcept
    int bnfast_isa_compiled(int i) noexcept
    int bnfast_isa_supported(int i) noexcept
    void bnfast_read_caches() noexcept
    void bnfast_set_caches(Py_ssize_t l2, Py_ssize_t last_level) noexcept
    Py_ssize_t bnfast_l2_bytes() noexcept
    Py_ssize_t bnfast_last_level_bytes() noexcept

    ctypedef enum bnfast_operation:
        BNFAST_MOMENTS
        BNFAST_FORWARD
        BNFAST_EVAL
        BNFAST_BACKWARD
        BNFAST_BACKWARD_EVAL
        BNFAST_FLOOR
        BNFAST_JVP

    ctypedef struct bnfast_job

    ctypedef struct bnfast_parameter:
        const double *wide
        const float *narrow

    ctypedef struct bnfast_phase:
        void (*task)(const bnfast_job *job, Py_ssize_t index, int thread) noexcept nogil
        Py_ssize_t n_tasks
        int backwards

    ctypedef struct bnfast_job:
        const bnfast_kernels *kernels
        bnfast_operation operation
        Py_ssize_t outer, channels, inner
        const void *x
        const void *u
        void *out
        bnfast_parameter gamma
        bnfast_parameter beta
        bnfast_parameter vgamma
        bnfast_parameter vbeta
        const double *var
        double eps
        double *mean
        double *inv_std
        double *m2
        double *sum
        double *dot
        int *infinite
        int n_threads
        Py_ssize_t workspace_bytes
        int n_phases
        bnfast_phase *phases
        char *workspace

    void bnfast_plan(bnfast_job *job) noexcept

cdef extern from "numpy/arrayobject.h":
    cnp.ndarray PyArray_NewLikeArray(cnp.ndarray prototype, cnp.NPY_ORDER order, void *dtype, int subok)

cdef extern from "runtime/openmp.h" nogil:
    long bnfast_openmp_version() noexcept
    const char *bnfast_openmp_library() noexcept
    int bnfast_openmp_max_threads() noexcept
    int bnfast_openmp_thread_limit() noexcept
    void bnfast_openmp_init() noexcept
    int bnfast_openmp_fork_handled() noexcept
    void bnfast_openmp_handle_fork(int on) noexcept
    int bnfast_openmp_forked_serial() noexcept
    int bnfast_openmp_enter(int budget) noexcept
    void bnfast_openmp_leave(int budget, int team) noexcept
    int bnfast_openmp_take_shortage() noexcept
    unsigned long long bnfast_float_control() noexcept
    void bnfast_set_float_control(unsigned long long control) noexcept

cdef extern from "runtime/budget.h" nogil:
    ctypedef struct bnfast_facts:
        long context, process, environment
        int omp_num_threads_is_set
        long openmp
        long limit
        int has_openmp, forked_serial
        long cpus

    ctypedef struct bnfast_budget:
        long n
        int why
        int chosen
        int in_code

    bnfast_budget bnfast_decide(const bnfast_facts *facts) noexcept
    bnfast_budget bnfast_budget_now(long context) noexcept
    void bnfast_set_process_threads(long n) noexcept
    void bnfast_set_environment_threads(long n, int omp_num_threads_is_set) noexcept
    int bnfast_cpus_are_old() noexcept
    void bnfast_set_cpus(long n) noexcept
    void bnfast_age_cpus(long long nanoseconds) noexcept
    void bnfast_forget_cpus() noexcept

cdef extern from "runtime/waking.h" nogil:
    void bnfast_waking_init(long spin_count) noexcept
    int bnfast_waking_pays(long long elements) noexcept
    void bnfast_waking_pretend(long long nanoseconds, long long elements) noexcept
    long long bnfast_waking_awake() noexcept

cdef extern from "runtime/shares.h" nogil:
    ctypedef struct bnfast_share:
        pass

    void bnfast_share_out(bnfast_share *shares, int n_shares, Py_ssize_t n_tasks, int backwards) noexcept
    Py_ssize_t bnfast_take(bnfast_share *share) noexcept

cdef extern from "runtime/rivals.h" nogil:
    void bnfast_rivals_init() noexcept
    void bnfast_rivals_exclude_me() noexcept
    int bnfast_rivals_leave(int team, long long elements) noexcept

bnfast_openmp_init()
bnfast_rivals_init()
bnfast_read_caches()

# Work of fewer elements than this is done at once by the calling thread, which keeps the GIL.
cdef Py_ssize_t SMALL = 1 << 16

# What a thread of a team should at least have to do, in elements.
cdef Py_ssize_t SHARE = 1 << 15

# Of threads.py: the ContextVar of `with num_threads` (to a pair whose first is a number, or None), and () -> int, the
# CPUs that the system grants. Asked only for work that is not small.
cdef object threads_in_context = None
cdef object available_cpus = None


# --- checks ---------------------------------------------------------------------------------------------------

cdef cnp.ndarray as_floating(object value, str name):
    """The argument as a plain float32 or float64 array, its memory untouched."""
    cdef cnp.ndarray array
    given = value
    if not cnp.PyArray_CheckExact(value):
        if isinstance(value, np.ma.MaskedArray):
            raise TypeError(f"{name}: expected an array without a mask, got {type(value).__name__}; "
                            f"fill it first: {name}.filled(value)")
        if isinstance(value, np.matrix):
            raise TypeError(f"{name}: expected an array, got numpy.matrix; use numpy.asarray({name})")
        if hasattr(value, "nnz") and hasattr(value, "toarray"):
            raise TypeError(f"{name}: expected a dense array, got sparse {type(value).__name__}; "
                            f"use {name}.toarray()")
        try:
            value = np.asarray(value)
        except ValueError as error:  # a ragged list
            kind = type(value).__name__
            raise ValueError(f"{name}: expected an array, got a {kind} that makes none ({error})") from None
    array = value
    if cnp.PyArray_TYPE(array) != cnp.NPY_FLOAT32 and cnp.PyArray_TYPE(array) != cnp.NPY_FLOAT64:
        hint = ""
        if array.dtype.kind in "biuf":
            way = f"{name}.astype(" if isinstance(given, np.ndarray) else f"numpy.asarray({name}, "
            hint = f"; use {way}numpy.float32)"
        raise TypeError(f"{name}: expected dtype float32 or float64, got {array.dtype}{hint}")
    return array


def shares_memory(a, x):
    """Whether `a` has an element in the memory of `x` (if that is too hard to say: yes); False if `a` is no ndarray."""
    if not isinstance(a, np.ndarray) or not may_overlap(a, x):
        return False
    try:
        return np.shares_memory(a, x, max_work=100_000)
    except TooHardError:
        return True


def as_data(value, str name):
    """`value` as a plain float32 or float64 ndarray (no copy where it is one); TypeError for anything else."""
    return as_floating(value, name)


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


cdef cnp.ndarray as_samples(object value, str name):
    cdef cnp.ndarray array = as_floating(value, name)
    if cnp.PyArray_NDIM(array) < 2:
        raise ValueError(f"{name}: expected at least 2 dimensions, got shape {shape_of(array)}")
    return array


cdef tuple shape_of(cnp.ndarray array):
    return (<object>array).shape


cdef cnp.ndarray new_statistics(Py_ssize_t channels):
    cdef cnp.npy_intp shape[1]
    shape[0] = channels
    return cnp.PyArray_EMPTY(1, shape, cnp.NPY_FLOAT64, 0)


cdef bint same_shape(cnp.ndarray a, cnp.ndarray b) noexcept:
    cdef int i
    if cnp.PyArray_NDIM(a) != cnp.PyArray_NDIM(b):
        return False
    for i in range(cnp.PyArray_NDIM(a)):
        if cnp.PyArray_DIM(a, i) != cnp.PyArray_DIM(b, i):
            return False
    return True


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


cdef int as_axis(object axis, cnp.ndarray array) except -1:
    cdef int ndim = cnp.PyArray_NDIM(array)
    try:
        i = PyNumber_Index(axis)
    except TypeError:
        raise TypeError(f"axis: expected an int, got {type(axis).__name__}") from None
    if not -ndim <= i < ndim:
        raise AxisError(i, ndim, "axis")
    return i if i >= 0 else i + ndim


cpdef double as_eps(object eps) except? -1.0:
    """A positive finite number as a float."""
    cdef double value
    if type(eps) is float and 0.0 < <double>eps < 1e300:
        return eps
    try:
        if isinstance(eps, (bool, str)):
            raise TypeError
        value = float(eps)
    except (TypeError, ValueError):
        raise TypeError(f"eps: expected a number, got {eps!r}") from None
    except OverflowError:  # an int beyond float64
        value = math.inf
    if not (value > 0.0 and math.isfinite(value)):
        raise ValueError(f"eps: expected a positive finite number, got {eps!r}")
    return value


cdef cnp.ndarray as_parameter(object value, str name, Py_ssize_t channels, cnp.ndarray out):
    """(channels,) float32 or float64, native and contiguous, not in the memory of `out`; None stays None."""
    cdef cnp.ndarray array
    if value is None:
        return None
    array = as_floating(value, name)
    if cnp.PyArray_NDIM(array) != 1 or cnp.PyArray_DIM(array, 0) != channels:
        raise ValueError(f"{name}: expected shape ({channels},), one value a channel, got {shape_of(array)}")
    if cnp.PyArray_ISCARRAY_RO(array) and (out is None or not may_overlap(array, out)):
        return array
    return np.array(array, array.dtype.newbyteorder("="), order="C")


cdef cnp.ndarray as_statistics(object value, str name, Py_ssize_t channels, cnp.ndarray out):
    """As a parameter, but float64, and not None."""
    cdef cnp.ndarray array, wide
    if value is None:
        raise TypeError(f"{name}: expected an array of shape ({channels},), got None")
    array = as_parameter(value, name, channels, out)
    if cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT64:
        return array
    wide = new_statistics(channels)
    cnp.PyArray_CopyInto(wide, array)
    return wide


cdef bnfast_parameter parameter(cnp.ndarray array) noexcept:
    cdef bnfast_parameter result
    result.wide = NULL
    result.narrow = NULL
    if array is not None:
        if cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT32:
            result.narrow = <const float *>cnp.PyArray_DATA(array)
        else:
            result.wide = <const double *>cnp.PyArray_DATA(array)
    return result


cdef double *values(cnp.ndarray array) noexcept:
    return NULL if array is None else <double *>cnp.PyArray_DATA(array)


cdef bint overlaps_itself(cnp.ndarray array):
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


cdef cnp.ndarray as_out(object out, cnp.ndarray x):
    """The user's `out` for a result like x: checked, or None."""
    if out is None:
        return None
    if not cnp.PyArray_CheckExact(out) and (
            not isinstance(out, np.ndarray) or isinstance(out, (np.ma.MaskedArray, np.matrix))):
        raise TypeError(f"out: expected a numpy.ndarray, got {type(out).__name__}")
    if not same_shape(out, x):
        raise ValueError(f"out: expected shape {shape_of(x)}, got {shape_of(out)}")
    if cnp.PyArray_TYPE(<cnp.ndarray>out) != cnp.PyArray_TYPE(x) or not cnp.PyArray_ISNOTSWAPPED(<cnp.ndarray>out):
        raise TypeError(f"out: expected dtype {x.dtype.newbyteorder('=')}, got {out.dtype}")
    if not cnp.PyArray_ISWRITEABLE(<cnp.ndarray>out):
        raise ValueError("out: expected a writeable array, got a read-only one")
    if cnp.PyArray_SIZE(<cnp.ndarray>out) > 0 and overlaps_itself(out):
        raise ValueError("out: expected an array whose elements do not overlap, got one that shares memory with itself")
    return out


# --- layout ---------------------------------------------------------------------------------------------------

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


cdef bnfast_job new_job(bnfast_operation operation) noexcept:
    cdef bnfast_job job
    memset(&job, 0, sizeof(job))
    job.operation = operation
    return job


# --- running a job --------------------------------------------------------------------------------------------

cdef void run_alone(bnfast_job *job) noexcept nogil:
    """The phases one after another, on this thread."""
    cdef int phase
    for phase in range(job.n_phases):
        run_phase_alone(job, &job.phases[phase])


cdef void run_phase_alone(bnfast_job *job, bnfast_phase *phase) noexcept nogil:
    cdef Py_ssize_t i, n = phase.n_tasks
    for i in range(n):
        phase.task(job, n - 1 - i if phase.backwards else i, 0)


cdef void run(bnfast_job *job, bnfast_share *shares) noexcept:
    """The parallel loop: the phases one after another, the tasks of each on job.n_threads threads, without the GIL.

    It lets go of the GIL itself: in a function without it, Cython's prange asks CPython whether there is one to let go
    of, and before 3.12 the answer is wrong once there has been a sub-interpreter; the process aborts.
    """
    cdef int p, thread, n_threads = job.n_threads
    cdef bnfast_phase *phase
    cdef unsigned long long control, workers_own
    with nogil:
        control = bnfast_float_control()
        for p in range(job.n_phases):
            phase = &job.phases[p]
            if n_threads == 1 or phase.n_tasks == 1:
                run_phase_alone(job, phase)
                continue
            bnfast_share_out(shares, n_threads, phase.n_tasks, phase.backwards)
            for thread in prange(n_threads, schedule="static", chunksize=1, num_threads=n_threads):
                bnfast_rivals_exclude_me()
                workers_own = bnfast_float_control()
                bnfast_set_float_control(control)
                run_shares(job, phase, shares, thread)
                bnfast_set_float_control(workers_own)


cdef void run_shares(bnfast_job *job, bnfast_phase *phase, bnfast_share *shares, int thread) noexcept nogil:
    """A thread's own share of the tasks of a phase, and what is left of the others'."""
    cdef int i
    cdef Py_ssize_t task
    for i in range(job.n_threads):
        while True:
            task = bnfast_take(&shares[(thread + i) % job.n_threads])
            if task < 0:
                break
            phase.task(job, task, thread)


cdef int find_budget(bnfast_budget *found) except -1:
    """What the calling thread may use."""
    cdef object in_context = get_value(threads_in_context)
    cdef long n = 0 if in_context is None else (<tuple>in_context)[0]
    if bnfast_cpus_are_old():
        bnfast_set_cpus(available_cpus())
    found[0] = bnfast_budget_now(n)
    return 0


cpdef int team_for(Py_ssize_t elements) except -1:
    """How many threads the calling thread may use for work that is not small."""
    cdef bnfast_budget budget
    find_budget(&budget)
    cdef int team = min(budget.n, max(1, elements // SHARE))
    if team > 1 and not budget.in_code and not bnfast_waking_pays(elements):
        return 1
    return team if budget.chosen else bnfast_rivals_leave(team, elements)


cdef char *kept(bnfast_parameter *parameter, Py_ssize_t channels, char *at) noexcept:
    """Copies a parameter to `at`, and has it read from there; returns what is behind it."""
    if parameter.wide != NULL:
        memcpy(at, parameter.wide, channels * 8)
        parameter.wide = <const double *>at
    elif parameter.narrow != NULL:
        memcpy(at, parameter.narrow, channels * 4)
        parameter.narrow = <const float *>at
    return at + channels * 8


cdef int compute(bnfast_job *job, cnp.ndarray x) except -1:
    """Plans and runs a job whose arrays are set; job.u, if any, lies as x does."""
    cdef Py_ssize_t elements = job.outer * job.channels * job.inner
    cdef Py_ssize_t more
    cdef char *memory
    cdef char *at
    cdef bnfast_share *shares
    cdef bint small = elements < SMALL
    cdef int budget = 1
    job.kernels = bnfast_active(cnp.PyArray_ITEMSIZE(x))
    job.n_threads = 1
    if not small:
        budget = team_for(elements)
        job.n_threads = bnfast_openmp_enter(budget)
    bnfast_plan(job)
    # what the threads need besides: their shares, and the parameters as they are now, which others may change meanwhile
    more = 0 if small else job.n_threads * <Py_ssize_t>sizeof(bnfast_share) + 4 * job.channels * 8
    memory = <char *>PyMem_RawMalloc(more + job.workspace_bytes + 64)
    if memory == NULL:
        if not small:
            bnfast_openmp_leave(budget, job.n_threads)
        raise MemoryError(f"no memory for {job.workspace_bytes} bytes of workspace")
    job.workspace = memory + (-<uintptr_t>memory & 63)
    if small:
        run_alone(job)
    else:
        shares = <bnfast_share *>job.workspace
        job.workspace += job.n_threads * sizeof(bnfast_share)
        at = job.workspace + job.workspace_bytes
        at = kept(&job.gamma, job.channels, at)
        at = kept(&job.beta, job.channels, at)
        at = kept(&job.vgamma, job.channels, at)
        at = kept(&job.vbeta, job.channels, at)
        run(job, shares)
        bnfast_openmp_leave(budget, job.n_threads)
    PyMem_RawFree(memory)
    if bnfast_openmp_take_shortage():
        warnings.warn("bnfast: the system refused to start threads; calls go on with fewer", RuntimeWarning,
                      stacklevel=3)
    return 0


cdef int check_count(cnp.ndarray x, int axis) except -1:
    """Training needs two values a channel (PyTorch's wording)."""
    cdef Py_ssize_t channels = cnp.PyArray_DIM(x, axis)
    cdef Py_ssize_t count = 1
    cdef int i
    for i in range(cnp.PyArray_NDIM(x)):
        if i != axis:
            count *= cnp.PyArray_DIM(x, i)
    if count < 2 and channels > 0:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {shape_of(x)}")
    return 0


# --- the operations -------------------------------------------------------------------------------------------

def moments(x, axis):
    """-> (count, mean, m2): values a channel, and two (C,) float64 arrays."""
    cdef bnfast_job job = new_job(BNFAST_MOMENTS)
    cdef cnp.ndarray data = as_samples(x, "x")
    cdef int channel_axis = as_axis(axis, data)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(data, channel_axis)
    cdef cnp.ndarray mean, m2
    if cnp.PyArray_SIZE(data) == 0:
        return 0, np.zeros(channels), np.zeros(channels)
    data = packed(data, channel_axis, &job)
    mean, m2 = new_statistics(channels), new_statistics(channels)
    job.x = cnp.PyArray_DATA(data)
    job.mean, job.m2 = values(mean), values(m2)
    compute(&job, data)
    return job.outer * job.inner, mean, m2


def batch_norm(x, gamma, beta, axis, eps, out, bint with_m2=False):
    """-> (y, mean, inv_std), with_m2: and m2; y like x, the others (C,) float64 arrays."""
    cdef bnfast_job job = new_job(BNFAST_FORWARD)
    cdef cnp.ndarray data = as_samples(x, "x")
    cdef int channel_axis = as_axis(axis, data)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(data, channel_axis)
    cdef cnp.ndarray given_out, g, b, y, mean, inv_std, m2 = None
    job.eps = as_eps(eps)
    given_out = as_out(out, data)
    g = as_parameter(gamma, "gamma", channels, given_out)
    b = as_parameter(beta, "beta", channels, given_out)
    check_count(data, channel_axis)

    data = packed(data, channel_axis, &job)
    y = target_of(given_out, data, None)
    mean, inv_std = new_statistics(channels), new_statistics(channels)
    if with_m2:
        m2 = new_statistics(channels)
    if cnp.PyArray_SIZE(data) > 0:
        job.x, job.out = cnp.PyArray_DATA(data), cnp.PyArray_DATA(y)
        job.gamma, job.beta = parameter(g), parameter(b)
        job.mean, job.inv_std, job.m2 = values(mean), values(inv_std), values(m2)
        compute(&job, data)
    y = delivered(y, given_out)
    return (y, mean, inv_std, m2) if with_m2 else (y, mean, inv_std)


def batch_norm_eval(x, mean, var, gamma, beta, axis, eps, out, str prefix=""):
    """-> y like x. prefix: what the caller's names for mean and var begin with, for messages."""
    cdef bnfast_job job = new_job(BNFAST_EVAL)
    cdef cnp.ndarray data = as_samples(x, "x")
    cdef int channel_axis = as_axis(axis, data)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(data, channel_axis), i
    cdef cnp.ndarray given_out, g, b, m, v, y
    job.eps = as_eps(eps)
    given_out = as_out(out, data)
    m = as_statistics(mean, prefix + "mean", channels, given_out)
    v = as_statistics(var, prefix + "var", channels, given_out)
    for i in range(channels):
        if not values(v)[i] >= 0.0:
            raise ValueError(f"{prefix}var: expected values of at least 0, got {values(v)[i]} for channel {i}")
    g = as_parameter(gamma, "gamma", channels, given_out)
    b = as_parameter(beta, "beta", channels, given_out)

    data = packed(data, channel_axis, &job)
    y = target_of(given_out, data, None)
    if cnp.PyArray_SIZE(data) > 0:
        job.x, job.out = cnp.PyArray_DATA(data), cnp.PyArray_DATA(y)
        job.gamma, job.beta = parameter(g), parameter(b)
        job.mean, job.var = values(m), values(v)
        compute(&job, data)
    return delivered(y, given_out)


def affine(x, center, scale, shift, out, bint search):
    """-> (y, infinite): y = (x - center) * scale + shift, by columns of a 2-dimensional x; shift may be None.

    infinite: whether x has an infinity, False unless `search`; y is of no use then.
    """
    cdef bnfast_job job = new_job(BNFAST_EVAL)
    cdef cnp.ndarray data = as_samples(x, "x")
    cdef int channel_axis = as_axis(1, data), infinite = 0
    cdef Py_ssize_t channels = cnp.PyArray_DIM(data, channel_axis)
    cdef cnp.ndarray given_out, c, s, t, y
    given_out = as_out(out, data)
    c = as_statistics(center, "center", channels, given_out)
    s = as_statistics(scale, "scale", channels, given_out)
    t = as_parameter(shift, "shift", channels, given_out)

    data = packed(data, channel_axis, &job)
    y = target_of(given_out, data, None)
    if cnp.PyArray_SIZE(data) > 0:
        job.x, job.out = cnp.PyArray_DATA(data), cnp.PyArray_DATA(y)
        job.mean, job.gamma, job.beta = values(c), parameter(s), parameter(t)
        if search:
            job.infinite = &infinite
        compute(&job, data)
    if infinite:
        return y, True
    return delivered(y, given_out), False


def check_out(out, x):
    """TypeError or ValueError if `out` cannot take a result like x."""
    as_out(out, x)


cdef cnp.ndarray as_companion(object value, str name, cnp.ndarray x):
    """An array of x's shape and dtype."""
    cdef cnp.ndarray array = as_floating(value, name)
    if not same_shape(array, x):
        raise ValueError(f"{name}: expected shape {shape_of(x)}, that of x, got {shape_of(array)}")
    if cnp.PyArray_TYPE(array) != cnp.PyArray_TYPE(x):
        raise TypeError(f"{name}: expected dtype {x.dtype.newbyteorder('=')}, that of x, got {array.dtype}")
    return array


cdef cnp.ndarray rounded_like(cnp.ndarray statistics, cnp.ndarray x):
    """(C,) float64 in the dtype of x."""
    cdef cnp.npy_intp channels = cnp.PyArray_DIM(statistics, 0)
    cdef cnp.ndarray result
    if cnp.PyArray_TYPE(x) == cnp.NPY_FLOAT64:
        return statistics
    result = cnp.PyArray_EMPTY(1, &channels, cnp.NPY_FLOAT32, 0)
    bnfast_active(4).round_values(channels, values(statistics), cnp.PyArray_DATA(result))
    return result


def batch_norm_backward(dy, x, mean, inv_std, gamma, axis, training, out):
    """-> (dx, dgamma, dbeta): dx like x, two (C,) arrays of x's dtype."""
    cdef bnfast_job job = new_job(BNFAST_BACKWARD if training else BNFAST_BACKWARD_EVAL)
    cdef cnp.ndarray data = as_samples(x, "x")
    cdef int channel_axis = as_axis(axis, data)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(data, channel_axis)
    cdef cnp.ndarray u = as_companion(dy, "dy", data)
    cdef cnp.ndarray given_out, g, m, s, dx, dgamma, dbeta
    given_out = as_out(out, data)
    m = as_statistics(mean, "mean", channels, given_out)
    s = as_statistics(inv_std, "inv_std", channels, given_out)
    g = as_parameter(gamma, "gamma", channels, given_out)
    if training:
        check_count(data, channel_axis)

    data = packed(data, channel_axis, &job)
    u = packed_like(u, data)
    dx = target_of(given_out, data, u)
    if cnp.PyArray_SIZE(data) == 0:
        dgamma, dbeta = np.zeros(channels), np.zeros(channels)
    else:
        dgamma, dbeta = new_statistics(channels), new_statistics(channels)
        job.x, job.u, job.out = cnp.PyArray_DATA(data), cnp.PyArray_DATA(u), cnp.PyArray_DATA(dx)
        job.gamma, job.mean, job.inv_std = parameter(g), values(m), values(s)
        job.sum, job.dot = values(dbeta), values(dgamma)
        compute(&job, data)
    return delivered(dx, given_out), rounded_like(dgamma, data), rounded_like(dbeta, data)


def batch_norm_jvp(v, x, mean, inv_std, gamma, axis, vgamma, vbeta, out):
    """-> dy like x."""
    cdef bnfast_job job = new_job(BNFAST_JVP)
    cdef cnp.ndarray data = as_samples(x, "x")
    cdef int channel_axis = as_axis(axis, data)
    cdef Py_ssize_t channels = cnp.PyArray_DIM(data, channel_axis)
    cdef cnp.ndarray u = as_companion(v, "v", data)
    cdef cnp.ndarray given_out, g, m, s, vg, vb, dy
    given_out = as_out(out, data)
    m = as_statistics(mean, "mean", channels, given_out)
    s = as_statistics(inv_std, "inv_std", channels, given_out)
    g = as_parameter(gamma, "gamma", channels, given_out)
    vg = as_parameter(vgamma, "vgamma", channels, given_out)
    vb = as_parameter(vbeta, "vbeta", channels, given_out)
    check_count(data, channel_axis)

    data = packed(data, channel_axis, &job)
    u = packed_like(u, data)
    dy = target_of(given_out, data, u)
    if cnp.PyArray_SIZE(data) > 0:
        job.x, job.u, job.out = cnp.PyArray_DATA(data), cnp.PyArray_DATA(u), cnp.PyArray_DATA(dy)
        job.gamma, job.vgamma, job.vbeta = parameter(g), parameter(vg), parameter(vb)
        job.mean, job.inv_std = values(m), values(s)
        compute(&job, data)
    return delivered(dy, given_out)


def memory_floor(cnp.ndarray x, cnp.ndarray u, cnp.ndarray out):
    """out = x, or x + u: the least time an operation on such arrays can take. For benchmarks.

    All C-contiguous, of one shape and dtype, float32 or float64; u may be None.
    """
    cdef bnfast_job job = new_job(BNFAST_FLOOR)
    cdef cnp.ndarray array
    for array in (x, out) if u is None else (x, u, out):
        if not (cnp.PyArray_ISCARRAY(array) and same_shape(array, x)
                and cnp.PyArray_TYPE(array) == cnp.PyArray_TYPE(x)):
            raise ValueError("memory_floor: expected contiguous arrays of one shape and dtype")
    as_floating(x, "x")
    job.outer, job.channels, job.inner = 1, 1, cnp.PyArray_SIZE(x)
    job.x, job.out = cnp.PyArray_DATA(x), cnp.PyArray_DATA(out)
    if u is not None:
        job.u = cnp.PyArray_DATA(u)
    compute(&job, x)


# --- state ----------------------------------------------------------------------------------------------------

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


# --- what was built, and what is running ----------------------------------------------------------------------

def set_thread_sources(context, cpus):
    """Installs what says how many threads a call may use: see `threads_in_context` and `available_cpus`."""
    global threads_in_context, available_cpus
    threads_in_context, available_cpus = context, cpus
    bnfast_forget_cpus()


def set_process_threads(long n):
    """For the process; 0: nothing is said."""
    bnfast_set_process_threads(n)


def set_environment_threads(long n, bint omp_num_threads_is_set):
    """BNFAST_NUM_THREADS, 0 without, and whether OMP_NUM_THREADS has a number."""
    bnfast_set_environment_threads(n, omp_num_threads_is_set)


def thread_budget():
    """-> (n, why, chosen): as budget.h says, for a large call from here."""
    cdef bnfast_budget budget
    find_budget(&budget)
    return budget.n, budget.why, bool(budget.chosen)


def set_spin_count(long turns):
    """How many turns an idle worker waits before it sleeps; 0: not known, waking is taken to cost nothing."""
    bnfast_waking_init(turns)


def pretend_last_call(double seconds_ago, long long elements=0):
    """As if this thread's last large call had ended so long ago, and so many elements were the burst's. For tests."""
    bnfast_waking_pretend(<long long>(seconds_ago * 1e9), elements)


def seconds_awake():
    """How long a worker waits before it sleeps, 0 if that is not known."""
    return bnfast_waking_awake() * 1e-9


def age_cpus(double seconds):
    """As if the system had been asked for its CPUs so much earlier. For tests."""
    bnfast_age_cpus(<long long>(seconds * 1e9))


def decide_threads(**facts):
    """-> (n, why, chosen): what the rules say where these facts (budget.h) are so, the others 0. For tests."""
    cdef bnfast_facts given = {
        name: facts.pop(name, 0)
        for name in ("context", "process", "environment", "omp_num_threads_is_set", "openmp", "limit", "has_openmp",
                     "forked_serial", "cpus")}
    cdef bnfast_budget budget = bnfast_decide(&given)
    return budget.n, budget.why, bool(budget.chosen)


def isa():
    """Name of the active instruction set."""
    return bnfast_active(4).isa.decode()


def isas():
    """{name: (compiled, supported by this CPU)}, narrowest first."""
    cdef int i = 0
    found = {}
    while bnfast_isa_name(i) != NULL:
        found[bnfast_isa_name(i).decode()] = (bool(bnfast_isa_compiled(i)), bool(bnfast_isa_supported(i)))
        i += 1
    return found


def select_isa(str name=None):
    """Makes an instruction set the active one; None: the widest this CPU has. ValueError if that cannot be."""
    cdef bytes encoded
    cdef int status
    if name is None:
        status = bnfast_select(NULL)
    else:
        encoded = name.encode()
        status = bnfast_select(encoded)
    if status == -1:
        raise ValueError(f"BNFAST_ISA: expected one of {', '.join(isas())}, got {name!r}")
    if status == -2:
        usable = [known for known, (_, supported) in isas().items() if supported]
        raise ValueError(f"BNFAST_ISA: {name!r} was not compiled in or is not on this CPU; usable: {', '.join(usable)}")


def cache_bytes():
    """(L2, last level) of this CPU."""
    return bnfast_l2_bytes(), bnfast_last_level_bytes()


def set_cache_bytes(Py_ssize_t l2, Py_ssize_t last_level):
    """For tests: as if this CPU had such caches. They decide what is done in which order, never a bit of a result."""
    bnfast_set_caches(l2, last_level)


def openmp_version():
    """The compiler's _OPENMP date, 0 for a build without OpenMP."""
    return bnfast_openmp_version()


def openmp_library():
    """Path of the OpenMP runtime, '' if unknown."""
    return bnfast_openmp_library().decode("utf-8", "replace")


def openmp_max_threads():
    """What OpenMP would use in the calling thread (environment, threadpoolctl)."""
    return bnfast_openmp_max_threads()


def openmp_thread_limit():
    """OMP_THREAD_LIMIT, or a very large number."""
    return bnfast_openmp_thread_limit()


def fork_handled():
    """Whether a forked child may use threads whatever its parent did."""
    return bool(bnfast_openmp_fork_handled())


def handle_fork(bint on):
    """Switches the fork handlers off and on, for the test that shows the hang they prevent."""
    bnfast_openmp_handle_fork(on)


def forked_serial():
    """Whether this process is a child that has to stay on one thread."""
    return bool(bnfast_openmp_forked_serial())
