# Arguments as users give them: checked, with a message that says which one, what came and what was expected. Nothing
# here allocates results.

# The dtypes of data, as messages name them.
cdef str DTYPES = "float16, bfloat16, float32 or float64"

# The number under which NumPy knows ml_dtypes' bfloat16, once an array of it was met.
cdef int bfloat16_number = -1


cdef bint is_bfloat16(cnp.ndarray array, int number) noexcept:
    """Of an array of a dtype that was registered with NumPy: ml_dtypes may be imported, or not, at any time."""
    global bfloat16_number
    if number == bfloat16_number:
        return True
    if array.dtype.kind != "V" or array.dtype.name != "bfloat16":
        return False
    bfloat16_number = number
    return True


cdef bnfast_dtype dtype_of(cnp.ndarray array) noexcept:
    """The kernels' name of an array's dtype, in whatever byte order; BNFAST_N_DTYPES: they do not take it."""
    cdef int number = cnp.PyArray_TYPE(array)
    if number == cnp.NPY_FLOAT32:
        return BNFAST_FLOAT32
    if number == cnp.NPY_FLOAT64:
        return BNFAST_FLOAT64
    if number == cnp.NPY_FLOAT16:
        return BNFAST_FLOAT16
    if cnp.PyTypeNum_ISUSERDEF(number) and is_bfloat16(array, number):
        return BNFAST_BFLOAT16
    return BNFAST_N_DTYPES


cdef bint is_half(cnp.ndarray array) noexcept:
    """Whether its elements are computed with in a wider dtype, float32."""
    return cnp.PyArray_ITEMSIZE(array) == 2


cdef int gradient_type(cnp.ndarray x) noexcept:
    """NumPy's number of the dtype of dgamma and dbeta: that of the data, or float32."""
    return cnp.NPY_FLOAT32 if is_half(x) else cnp.PyArray_TYPE(x)


cdef cnp.ndarray as_floating(object value, str name):
    """The argument as a plain array of a dtype that the kernels take, its memory untouched."""
    cdef cnp.ndarray array
    given = value
    if not cnp.PyArray_CheckExact(value):
        if isinstance(value, np.ma.MaskedArray):
            way = f"fill it first: {name}.filled(value)"
            if name in ("x", "dy", "v", "residual", "vresidual"):  # (its True means the opposite)
                way = f"use {name}.data, and mask=~numpy.ma.getmaskarray({name}).any(axis)"
            raise TypeError(f"{name}: expected an array without a mask, got {type(value).__name__}; {way}")
        if isinstance(value, np.matrix):
            raise TypeError(f"{name}: expected an array, got numpy.matrix; use numpy.asarray({name})")
        if hasattr(value, "nnz") and hasattr(value, "toarray"):
            raise TypeError(f"{name}: expected a dense array, got sparse {type(value).__name__}; "
                            f"use {name}.toarray()")
        if value is None:
            raise TypeError(f"{name}: expected an array, got None")
        try:
            value = np.asarray(value)
        except ValueError as error:  # a ragged list
            kind = type(value).__name__
            raise ValueError(f"{name}: expected an array, got a {kind} that makes none ({error})") from None
        except (TypeError, RuntimeError) as error:  # such as tensors with a graph, or of a dtype that NumPy has not
            way = "; tensors go through bnfast.torch" if hasattr(value, "detach") else ""
            raise TypeError(f"{name}: expected an array, got {type(value).__name__} ({error}){way}") from error
    array = value
    if dtype_of(array) == BNFAST_N_DTYPES:
        hint = ""
        if array.dtype.kind in "biuf":
            way = f"{name}.astype(" if isinstance(given, np.ndarray) else f"numpy.asarray({name}, "
            hint = f"; use {way}numpy.float32)"
        raise TypeError(f"{name}: expected dtype {DTYPES}, got {array.dtype}{hint}")
    return array


def as_data(value, str name):
    """`value` as a plain float32 or float64 ndarray (no copy where it is one); TypeError for anything else."""
    return as_floating(value, name)


cdef cnp.ndarray as_input(object value, Py_ssize_t axis, Py_ssize_t channels):
    """`value` as `as_samples` gives it for "x", with so many channels along `axis`, if it has such an axis."""
    cdef cnp.ndarray array = as_samples(value, "x")
    cdef int ndim = cnp.PyArray_NDIM(array)
    if -ndim <= axis < ndim and cnp.PyArray_DIM(array, axis if axis >= 0 else axis + ndim) != channels:
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
    return new_vector(channels, cnp.NPY_FLOAT64, False)


cdef cnp.ndarray new_block(Py_ssize_t rows, Py_ssize_t channels):
    """(rows, channels) float64, not set."""
    cdef cnp.npy_intp shape[2]
    shape[0], shape[1] = rows, channels
    return cnp.PyArray_EMPTY(2, shape, cnp.NPY_FLOAT64, 0)


cdef cnp.ndarray new_vector(cnp.npy_intp channels, int dtype, bint zero):
    """(channels,) of NumPy's dtype of this number."""
    return cnp.PyArray_ZEROS(1, &channels, dtype, 0) if zero else cnp.PyArray_EMPTY(1, &channels, dtype, 0)


cdef bint same_shape(cnp.ndarray a, cnp.ndarray b) noexcept:
    cdef int i
    if cnp.PyArray_NDIM(a) != cnp.PyArray_NDIM(b):
        return False
    for i in range(cnp.PyArray_NDIM(a)):
        if cnp.PyArray_DIM(a, i) != cnp.PyArray_DIM(b, i):
            return False
    return True


cdef int as_axis(object axis, cnp.ndarray array) except -1:
    cdef int ndim = cnp.PyArray_NDIM(array), beyond = 0
    cdef long i
    try:
        number = PyNumber_Index(axis)
    except TypeError:
        raise TypeError(f"axis: expected an int, got {type(axis).__name__}") from None
    i = PyLong_AsLongAndOverflow(number, &beyond)
    if beyond or not -ndim <= i < ndim:
        raise AxisError(number, ndim, "axis")
    return i if i >= 0 else i + ndim


cpdef double as_eps(object eps) except? -1.0:
    """A finite number of at least 0 as a float."""
    cdef double value
    if type(eps) is float and 0.0 <= <double>eps < 1e300:
        return eps
    try:
        if isinstance(eps, (bool, np.bool_, str, bytes)):
            raise TypeError
        value = float(eps)
    except (TypeError, ValueError):
        raise TypeError(f"eps: expected a number, got {eps!r}") from None
    except OverflowError:  # an int beyond float64
        value = math.inf
    if not (value >= 0.0 and math.isfinite(value)):
        raise ValueError(f"eps: expected a finite number of at least 0, got {eps!r}")
    return value


cdef double as_positive_eps(object eps) except? -1.0:
    """The same for training, where a channel may be constant."""
    cdef double value = as_eps(eps)
    if value == 0.0:
        raise ValueError("eps: expected a positive number when training, got 0")
    return value


cdef cnp.ndarray as_parameter(object value, str name, Py_ssize_t channels, cnp.ndarray out,
                              cnp.ndarray second_out=None):
    """(channels,) float32 or float64, native and contiguous, not in the memory of the outs; None stays None."""
    cdef cnp.ndarray array
    if value is None:
        return None
    array = as_floating(value, name)
    if is_half(array):
        raise TypeError(f"{name}: expected dtype float32 or float64, whatever the data are, got {array.dtype}; "
                        f"use {name}.astype(numpy.float32)")
    if cnp.PyArray_NDIM(array) != 1 or cnp.PyArray_DIM(array, 0) != channels:
        raise ValueError(f"{name}: expected shape ({channels},), one value a channel, got {shape_of(array)}")
    if cnp.PyArray_ISCARRAY_RO(array) and (out is None or not may_overlap(array, out)) and (
            second_out is None or not may_overlap(array, second_out)):
        return array
    return np.array(array, array.dtype.newbyteorder("="), order="C")


cdef cnp.ndarray as_given(object value, str name, Py_ssize_t channels, cnp.ndarray out, cnp.ndarray second_out=None):
    """As a parameter, but not None."""
    if value is None:
        raise TypeError(f"{name}: expected an array of shape ({channels},), got None")
    return as_parameter(value, name, channels, out, second_out)


cdef cnp.ndarray as_statistics(object value, str name, Py_ssize_t channels, cnp.ndarray out,
                               cnp.ndarray second_out=None):
    """The same, but float64."""
    cdef cnp.ndarray array = as_given(value, name, channels, out, second_out), wide
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


cdef double *float64s_of(cnp.ndarray array) noexcept:
    return <double *>parameter(array).wide


cdef const float *float32s_of(cnp.ndarray array) noexcept:
    return parameter(array).narrow


cdef double *values(cnp.ndarray array) noexcept:
    return NULL if array is None else <double *>cnp.PyArray_DATA(array)


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


cdef cnp.ndarray as_companion(object value, str name, cnp.ndarray x):
    """An array of x's shape and dtype."""
    cdef cnp.ndarray array = as_floating(value, name)
    if not same_shape(array, x):
        raise ValueError(f"{name}: expected shape {shape_of(x)}, that of x, got {shape_of(array)}")
    if cnp.PyArray_TYPE(array) != cnp.PyArray_TYPE(x):
        raise TypeError(f"{name}: expected dtype {x.dtype.newbyteorder('=')}, that of x, got {array.dtype}")
    return array


def check_out(out, x):
    """TypeError or ValueError if `out` cannot take a result like x."""
    as_out(out, x)


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
