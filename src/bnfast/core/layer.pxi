# The steps of a layer: what its calls change, and how.
#
# All of it is in one `Contents`, which is never changed once others can see it, behind one `AtomicReference`. A call
# computes first and then exchanges the contents for others made of those it finds: an exception, Ctrl-C included, finds
# the layer as it was before the call or as it is after it; threads, signal handlers and forked children need no lock.

# --- a forward ------------------------------------------------------------------------------------------------

cdef enum:
    SAMPLES = 32

# Who keeps a forward: nobody; the layer, for `backward`; a pullback. For Python under other names, as a comparison of
# Python's numbers would cost every forward some look-ups.
cdef enum:
    NOBODY, LAYER, PULLBACK

KEEP_NOTHING, KEEP_LAST, KEEP_PULLBACK = NOBODY, LAYER, PULLBACK


# Multiples of the golden ratio, without their whole parts: spread over the array, and in step with no row.
cdef double[SAMPLES] PLACES
for _i in range(SAMPLES):
    PLACES[_i] = _i * 0.6180339887498949 % 1.0


cdef inline Py_ssize_t sampled(Py_ssize_t i, Py_ssize_t size) noexcept:
    """Where the i-th element of a sample lies, the first and the last among them. Of few elements all are taken."""
    if size <= SAMPLES:
        return min(i, size - 1)
    return size - 1 if i == SAMPLES - 1 else <Py_ssize_t>(PLACES[i] * size)


cdef void take_sample(cnp.ndarray x, unsigned long long *sample) noexcept:
    """The bits of some elements spread over the array."""
    cdef Py_ssize_t size = cnp.PyArray_SIZE(x), itemsize = cnp.PyArray_ITEMSIZE(x), i, position, offset
    cdef const char *data = <const char *>cnp.PyArray_DATA(x)
    cdef int axis
    cdef bint dense = cnp.PyArray_ISALIGNED(x) and (cnp.PyArray_IS_C_CONTIGUOUS(x) or cnp.PyArray_IS_F_CONTIGUOUS(x))
    if size == 0:
        memset(sample, 0, SAMPLES * sizeof(unsigned long long))
    elif dense and itemsize == 4:
        for i in range(SAMPLES):
            sample[i] = (<const unsigned int *>data)[sampled(i, size)]
    elif dense and itemsize == 8:
        for i in range(SAMPLES):
            sample[i] = (<const unsigned long long *>data)[sampled(i, size)]
    else:
        memset(sample, 0, SAMPLES * sizeof(unsigned long long))
        for i in range(SAMPLES):
            position, offset = sampled(i, size), 0
            for axis in range(cnp.PyArray_NDIM(x) - 1, -1, -1):
                offset += position % cnp.PyArray_DIM(x, axis) * cnp.PyArray_STRIDE(x, axis)
                position //= cnp.PyArray_DIM(x, axis)
            memcpy(&sample[i], data + offset, itemsize)


# The rows of a forward's block, in float64: its own copies of the parameters; of a batch also its statistics, and of
# float64 or in a calibration what its mean was rounded by.
cdef enum:
    GAMMA, BETA, PARAMETERS
    MEAN = PARAMETERS, INV_STD, M2, ROWS
    REST = ROWS, ROWS_WITH_REST


@cython.auto_pickle(False)
@cython.final
@cython.freelist(8)
cdef class Forward:
    """What the backward of one forward needs: x itself, and copies of all that the layer may change afterwards.

    Nothing of it changes but `gone`, which says what was written over x, and `used`.
    """

    cdef readonly cnp.ndarray x     # a view, whose shape nobody else can change
    cdef cnp.ndarray mask           # of the positions that take part, a copy; None: all
    cdef Positions there            # those positions, until y is there; made again for the backward
    cdef bint has_residual
    cdef cnp.ndarray residual       # until y is there
    cdef cnp.ndarray marks          # with a residual and an activation, for a backward: what passes (marks.inc.h)
    cdef Py_ssize_t first_mark
    cdef const bnfast_kernels *kernels  # that made them
    cdef bint rectifies
    cdef bnfast_rectifier rectifier
    cdef cnp.ndarray block
    cdef bint has_gamma, has_beta
    cdef Running running          # the statistics it took as constants; None: those of the batch
    cdef Processes processes      # on which the batch lies; None: on this one
    cdef int axis
    cdef double eps
    cdef Py_ssize_t channels
    cdef readonly Py_ssize_t count  # values a channel
    cdef bint training            # the layer's mode
    cdef str gone
    cdef bint used                # by `backward`
    cdef unsigned long long sample[SAMPLES]
    cdef object __weakref__

    cdef double *row(self, int i) noexcept:
        return values(self.block) + i * self.channels

    cdef double *mean_rest(self) noexcept:
        """(C,), or NULL."""
        return self.row(REST) if cnp.PyArray_DIM(self.block, 0) == ROWS_WITH_REST else NULL

    def exact_moments(self):
        """(count, mean, m2, rest) of a batch in a calibration, (C,) float64 each: mean + rest is the mean."""
        return self.count, self.block[MEAN], self.block[M2], self.block[REST]

    cdef Py_ssize_t nonfinite(self) noexcept:
        """The first channel whose batch mean or m2 is not finite, or -1."""
        cdef Py_ssize_t i
        for i in range(self.channels):
            if not is_finite(self.row(MEAN)[i], self.row(M2)[i]):
                return i
        return -1

    cdef int check_finite(self) except -1:
        """FloatingPointError if the statistics of the batch are not finite."""
        cdef Py_ssize_t i = self.nonfinite()
        if i >= 0:
            raise FloatingPointError(
                f"x: expected a batch with finite statistics (nonfinite='raise'), got mean {self.row(MEAN)[i]} and "
                f"variance {self.row(M2)[i] / self.count} in channel {i}"
            )
        return 0

    cdef int check(self) except -1:
        """RuntimeError if x is not what it was."""
        cdef unsigned long long now[SAMPLES]
        if self.gone is not None:
            raise RuntimeError(f"backward: {self.gone} was written into its memory")
        take_sample(self.x, now)
        if memcmp(now, self.sample, sizeof(now)) != 0:
            raise RuntimeError("backward: x has changed since its forward; keep it as it is until the backward, "
                               "or give forward a copy")
        return 0

    cdef Positions positions(self):
        """Those that take part; None: all."""
        if self.mask is None or self.there is not None:
            return self.there
        return positions_of(self.mask, self.x, self.axis)

    cdef int begin_marks(self, bnfast_job *job) except -1:
        """Has a forward leave marks."""
        cdef cnp.npy_intp size
        self.kernels = job.kernels = bnfast_active(dtype_of(self.x))
        size = self.count * self.channels // job.kernels.marks_per_byte + BNFAST_MARKS_PAD
        self.marks = cnp.PyArray_ZEROS(1, &size, cnp.NPY_UINT8, 0)
        job.marks = <unsigned char *>cnp.PyArray_DATA(self.marks)
        return 0

    cdef void set_marks(self, bnfast_job *job) noexcept:
        """Has a backward go by them."""
        if self.marks is not None:
            job.kernels = self.kernels
            job.marks, job.first_mark = <unsigned char *>cnp.PyArray_DATA(self.marks), self.first_mark

    cdef void set_parameters(self, bnfast_job *job) noexcept:
        job.rectifies, job.rectifier = self.rectifies, self.rectifier
        if self.has_gamma:
            job.gamma.wide = self.row(GAMMA)
        if self.has_beta:
            job.beta.wide = self.row(BETA)


cdef bint is_finite(double mean, double m2) noexcept:
    return mean - mean == 0.0 and m2 - m2 == 0.0


cdef void widen(cnp.ndarray array, double *to) noexcept:
    """(C,) float32 or float64, contiguous, to float64."""
    cdef Py_ssize_t i
    cdef const float *narrow = <const float *>cnp.PyArray_DATA(array)
    if cnp.PyArray_TYPE(array) == cnp.NPY_FLOAT64:
        memcpy(to, cnp.PyArray_DATA(array), cnp.PyArray_NBYTES(array))
    else:
        for i in range(cnp.PyArray_SIZE(array)):
            to[i] = narrow[i]


cdef int note_overwritten(object out, tuple living, str what) except -1:
    """Those forwards whose x has an element in the memory of `out` are told so."""
    cdef Forward forward
    for forward in living:
        if shares_memory(out, forward.x):
            forward.gone = f"x is gone: {what}"
    return 0


# --- running statistics ---------------------------------------------------------------------------------------

cdef inline double averaged(double old, double new, double weight) noexcept:
    return (1.0 - weight) * old + weight * new


cdef int check_range(const double *var, const double *batch_mean, Py_ssize_t channels) except -1:
    """OverflowError if a variance has left float64's range: a running one would never come back to it."""
    cdef Py_ssize_t i
    cdef bnfast_parameter wide = [var, NULL]
    if bnfast_active(BNFAST_FLOAT64).usable_variances(channels, &wide, 1.0) == channels:  # all are finite
        return 0
    for i in range(channels):
        if var[i] > DBL_MAX and batch_mean[i] - batch_mean[i] == 0.0:
            raise OverflowError(f"x: the squares of channel {i} add up to more than float64 holds; scale the data")
    return 0


cdef long long MOST_BATCHES = LLONG_MAX  # counts of batches stay there


@cython.auto_pickle(False)
@cython.final
@cython.freelist(4)
cdef class Running:
    """Mean and variance of each channel as eval mode uses them, (C,) float64, read-only, and what they are made of."""

    cdef cnp.ndarray block         # (2, C)
    cdef readonly long long batches  # that came by
    cdef readonly object averaged    # (C,) int64: those of them that were averaged in a channel; None: all
    cdef readonly object skipped     # (C,) int64: those that were left out as they were not finite; None: none

    def __init__(self, mean, var, long long batches=0, averaged=None, skipped=None):
        self.block = np.array([mean, var], np.float64)
        check_range(self.row(1), self.row(0), cnp.PyArray_DIM(self.block, 1))
        cnp.PyArray_CLEARFLAGS(self.block, cnp.NPY_ARRAY_WRITEABLE)
        self.batches, self.averaged, self.skipped = batches, averaged, skipped

    cdef double *row(self, int i) noexcept:
        return values(self.block) + i * cnp.PyArray_DIM(self.block, 1)

    @property
    def mean(self):
        return self.block[0]

    @property
    def var(self):
        return self.block[1]

    cdef tuple counts_in_full(self):
        """`averaged` and `skipped` as arrays of their own."""
        zeros = np.zeros(cnp.PyArray_DIM(self.block, 1), np.int64)
        averaged = zeros + self.batches if self.averaged is None else self.averaged.copy()
        return averaged, zeros if self.skipped is None else self.skipped.copy()

    cdef Running after(self, Forward forward, object momentum, bint unbiased, bint skip):
        """With one batch more: (1 - weight) * old + weight * batch in each channel.

        A weight of 0 or 1 takes the one and leaves the other, whatever it is. momentum None: the average of all batches
        that were averaged in the channel, equally weighted. skip: channels that are not finite stay as they are.
        """
        cdef Py_ssize_t channels = forward.channels, i
        cdef double *batch_mean = forward.row(MEAN)
        cdef double *batch_m2 = forward.row(M2)
        cdef double *old_mean = self.row(0)
        cdef double *old_var = self.row(1)
        cdef double divisor = forward.count - 1 if unbiased else forward.count
        cdef double weight = 0.0 if momentum is None else momentum
        cdef bint cumulative = momentum is None, some_skipped = skip and forward.nonfinite() >= 0
        cdef Running new = Running.__new__(Running)
        cdef double *new_mean
        cdef double *new_var
        cdef long long *counts = NULL
        cdef long long *skips = NULL
        new.batches = self.batches if self.batches == MOST_BATCHES else self.batches + 1
        new.averaged, new.skipped = self.averaged, self.skipped
        if some_skipped or self.averaged is not None or (weight == 0.0 and not cumulative):
            new.averaged, skipped = self.counts_in_full()
            counts = <long long *>cnp.PyArray_DATA(<cnp.ndarray>new.averaged)
            if some_skipped:
                new.skipped = skipped
                skips = <long long *>cnp.PyArray_DATA(<cnp.ndarray>skipped)
        new.block = new_block(2, channels)
        new_mean, new_var = new.row(0), new.row(1)
        if 0.0 < weight < 1.0 and counts == NULL:
            for i in range(channels):  # all alike, without branches
                new_mean[i] = averaged(old_mean[i], batch_mean[i], weight)
                new_var[i] = averaged(old_var[i], batch_m2[i] / divisor, weight)
            channels = 0
        for i in range(channels):
            if some_skipped and not is_finite(batch_mean[i], batch_m2[i]):
                new_mean[i], new_var[i] = old_mean[i], old_var[i]
                if skips[i] < MOST_BATCHES:
                    skips[i] += 1
                continue
            if cumulative:
                weight = 1.0 / (1.0 + (self.batches if counts == NULL else counts[i]))
            if weight == 0.0:
                new_mean[i], new_var[i] = old_mean[i], old_var[i]
                continue
            if weight == 1.0:
                new_mean[i], new_var[i] = batch_mean[i], batch_m2[i] / divisor
            else:
                new_mean[i] = averaged(old_mean[i], batch_mean[i], weight)
                new_var[i] = averaged(old_var[i], batch_m2[i] / divisor, weight)
            if counts != NULL and counts[i] < MOST_BATCHES:
                counts[i] += 1
        check_range(new_var, batch_mean, forward.channels)
        cnp.PyArray_CLEARFLAGS(new.block, cnp.NPY_ARRAY_WRITEABLE)
        return new


# --- contents -------------------------------------------------------------------------------------------------

cdef object added(sum, gradient):
    """Either may be None: the gradient then, which is None for what the layer has not."""
    return gradient if sum is None or gradient is None else sum + gradient


@cython.auto_pickle(False)
@cython.final
@cython.freelist(8)
cdef class Contents:
    """All that the calls of a layer change, of one moment. Whoever has made one sets its fields before it is seen."""

    cdef public Running in_use         # the statistics in use; None: the layer has none
    cdef public Running averages       # those of training, set aside while exact ones are in use; else None
    cdef public object exact           # (Moments, batches) of the last calibration, or None
    cdef public object gathered        # (calibration, Moments, batches) of the one that is going on, or None
    cdef public Forward forward        # the last one, until its backward
    cdef public str why_no_forward     # why there is none
    cdef public bint replaced          # one in training waited for its backward, and another one took its place
    cdef cnp.ndarray batch             # the block of the last forward that took statistics, or None
    cdef Py_ssize_t batch_count
    cdef public tuple gradients        # of gamma and beta, as they are seen: arrays or None
    cdef public tuple accumulated      # the same, as `accumulate` adds to them

    def __cinit__(self, Running running=None):
        self.in_use, self.why_no_forward = running, "no forward"
        self.gradients = self.accumulated = (None, None)

    @property
    def batch_moments(self):
        """(count, mean, m2) of the last batch that a forward normalised with, or None."""
        return None if self.batch is None else (self.batch_count, self.batch[MEAN], self.batch[M2])

    def replace(self, **changes):
        """These, with some fields changed."""
        new = self.copy()
        for name, value in changes.items():
            setattr(new, name, value)
        return new

    cdef Contents copy(self):
        cdef Contents new = Contents.__new__(Contents)
        new.in_use, new.averages, new.exact, new.gathered = self.in_use, self.averages, self.exact, self.gathered
        new.forward, new.why_no_forward, new.replaced = self.forward, self.why_no_forward, self.replaced
        new.batch, new.batch_count = self.batch, self.batch_count
        new.gradients, new.accumulated = self.gradients, self.accumulated
        return new

    cdef Contents after_forward(self, Forward forward, int keep):
        """After a forward that changed no statistics."""
        cdef Contents new = self.copy()
        if forward.running is None:
            new.batch, new.batch_count = forward.block, forward.count
        if keep != PULLBACK:
            new.replaced = self.replaced or (self.forward is not None and self.forward.training)
        if keep == LAYER:
            new.forward, new.why_no_forward = forward, None
            if forward.training:
                new.replaced, new.gradients = False, (None, None)
        elif keep == NOBODY:
            new.forward, new.why_no_forward = None, "a forward under no_grad"
        return new

    cdef Contents after_backward(self, Forward forward, bint last, tuple gradients, bint accumulate):
        """After the backward of a forward. last: through `backward`, which uses the last forward up."""
        cdef Contents new = self.copy()
        if self.forward is forward:
            new.forward, new.why_no_forward, new.replaced = None, "a forward whose backward has been called", False
        if accumulate:
            gradients = (added(self.accumulated[0], gradients[0]), added(self.accumulated[1], gradients[1]))
        new.accumulated = gradients
        if not last or new.forward is None or not new.forward.training:  # else a training forward came between
            new.gradients = gradients
        return new


# --- the steps ------------------------------------------------------------------------------------------------

@cython.auto_pickle(False)
@cython.final
cdef class Options:
    """What of a layer never changes and its forward has to know."""

    cdef object axis
    cdef int place  # the axis as a C number; 64, which no array has, for what is none
    cdef Py_ssize_t channels
    cdef bint tracks, unbiased, skips, raises, rectifies
    cdef bnfast_rectifier rectifier

    def __cinit__(self, axis, Py_ssize_t channels, bint tracks, bint unbiased, str nonfinite, activation=None,
                  negative_slope=None):
        cdef bnfast_job job
        begin_job(&job, BNFAST_FORWARD)
        set_activation(&job, activation, negative_slope)
        self.rectifies, self.rectifier = job.rectifies, job.rectifier
        self.axis, self.channels, self.tracks, self.unbiased = axis, channels, tracks, unbiased
        self.place = axis if -64 <= axis < 64 else 64
        self.skips, self.raises = nonfinite == "skip", nonfinite == "raise"

    cdef int axis_of(self, cnp.ndarray x) except -1:
        """The channel axis, counted from the first one."""
        cdef int ndim = cnp.PyArray_NDIM(x)
        if -ndim <= self.place < ndim:
            return self.place if self.place >= 0 else self.place + ndim
        return as_axis(self.axis, x)


cdef Forward new_forward(AtomicReference contents, Options options, x, gamma, beta, double eps, bint training,
                         residual=None, mask=None, bint exact=False):
    """One that has not been computed, of checked data; gamma and beta of one moment. exact: see `map_with_batch`."""
    cdef Forward forward = Forward.__new__(Forward)
    cdef cnp.ndarray g, b
    forward.x = PyArray_View(as_input(x, options.place, options.channels), NULL, NULL)
    forward.axis, forward.eps, forward.training = options.axis_of(forward.x), eps, training
    forward.channels = options.channels
    forward.count = cnp.PyArray_SIZE(forward.x) // options.channels
    forward.rectifies, forward.rectifier = options.rectifies, options.rectifier
    if residual is not None:
        forward.has_residual = True
        forward.residual = PyArray_View(as_residual(residual, forward.x), NULL, NULL)
    if mask is not None:
        set_mask(forward, mask)
    g = as_parameter(gamma, "gamma", options.channels, None)
    b = as_parameter(beta, "beta", options.channels, None)
    forward.has_gamma, forward.has_beta = g is not None, b is not None
    exact = exact or cnp.PyArray_TYPE(forward.x) == cnp.NPY_FLOAT64
    forward.block = new_block(ROWS_WITH_REST if exact else ROWS, options.channels)
    with cython.critical_section(contents):
        if g is not None:
            widen(g, forward.row(GAMMA))
        if b is not None:
            widen(b, forward.row(BETA))
    return forward


cdef int set_mask(Forward forward, mask) except -1:
    cdef Positions positions = positions_of(mask, forward.x, forward.axis)
    if not positions.all:
        forward.mask, forward.there, forward.count = positions.mask, positions, positions.count
    return 0


cdef int check_batch(Forward forward) except -1:
    """That a forward has the two values a channel that statistics need."""
    return check_count(forward.x, forward.axis) if forward.mask is None else check_positions(forward.count)


cdef cnp.ndarray mapped_there(Forward forward, bnfast_job *job, cnp.ndarray out, int keep):
    """-> y of a job whose statistics are set, at the positions that take part; 0 elsewhere."""
    cdef Positions there
    cdef cnp.ndarray residual = None
    cdef cnp.ndarray y, home, part
    if forward.residual is not None and forward.rectifies and keep != NOBODY:
        forward.begin_marks(job)
    if forward.mask is None:
        y = mapped(job, forward.x, forward.residual, forward.axis, forward.channels, out)
    else:
        there = forward.positions()
        if forward.residual is not None:
            residual = there.gather(forward.residual, "residual")
        home = there.home(out, forward.x)
        part = there.gather(forward.x, "x", home)
        y = there.scatter(mapped(job, part, residual, 1, forward.channels, part), out, home)
    forward.first_mark = job.first_mark
    return y


cdef int seal(Forward forward, out, tuple living) except -1:
    """Once y is there."""
    cnp.PyArray_CLEARFLAGS(forward.block, cnp.NPY_ARRAY_WRITEABLE)
    take_sample(forward.x, forward.sample)
    forward.there = forward.residual = None  # of no use to a backward
    if out is not None:
        note_overwritten(out, (*living, forward), "the forward's out")
    return 0


cdef cnp.ndarray map_with_batch(Forward forward, Options options, int keep, out, tuple living, bint exact=False):
    """-> y: a new forward normalises with the statistics of the batch. living: whose x `out` may overwrite.

    exact: statistics as `moments` has them, of a forward that was made so.
    """
    cdef bnfast_job job
    begin_job(&job, BNFAST_FORWARD)
    cdef cnp.ndarray y, given_out = as_out(out, forward.x)
    check_batch(forward)
    job.eps = forward.eps if forward.eps > 0.0 else as_positive_eps(forward.eps)
    forward.set_parameters(&job)
    job.mean, job.inv_std, job.m2 = forward.row(MEAN), forward.row(INV_STD), forward.row(M2)
    job.exact, job.mean_rest = exact, forward.mean_rest()
    y = mapped_there(forward, &job, given_out, keep)
    seal(forward, out, living)
    if options.raises and forward.training:
        forward.check_finite()
    return y


cdef cnp.ndarray map_with_running(Forward forward, Running running, int keep, out, tuple living):
    """-> y: a new forward normalises with the running statistics, as constants."""
    cdef bnfast_job job
    begin_job(&job, BNFAST_EVAL)
    cdef cnp.ndarray y, given_out = as_out(out, forward.x)
    cdef bnfast_parameter var = [running.row(1), NULL]
    forward.running = running
    check_variance(&var, forward.channels, forward.eps, "running_")
    job.eps = forward.eps
    forward.set_parameters(&job)
    job.mean, job.var = running.row(0), running.row(1)
    y = mapped_there(forward, &job, given_out, keep)
    seal(forward, out, living)
    return y


cdef cnp.ndarray committed(AtomicReference contents, Options options, Forward forward, momentum, int keep, bint update,
                           out, tuple living):
    """-> y of a new forward of a layer that is not calibrating, whose contents are exchanged for those after it."""
    cdef cnp.ndarray y
    if not forward.training and options.tracks:
        y = map_with_running(forward, (<Contents>contents.current()).in_use, keep, out, living)
        commit_forward(contents, forward, keep)
        return y
    y = map_with_batch(forward, options, keep, out, living)
    if forward.training and options.tracks and update:
        commit_training(contents, options, forward, keep, momentum)
    else:
        commit_forward(contents, forward, keep)
    return y


def forward_of(AtomicReference contents, Options options, x, gamma, beta, double eps, momentum, bint training, int keep,
               bint update, out, tuple living, residual=None, mask=None, Processes processes=None):
    """-> (y, Forward) of x; as `committed`."""
    if training and processes is not None:
        return forward_together(contents, options, processes, x, gamma, beta, eps, momentum, keep, update, out, living,
                                residual, mask)
    cdef Forward forward = new_forward(contents, options, x, gamma, beta, eps, training, residual, mask)
    return committed(contents, options, forward, momentum, keep, update, out, living), forward


cpdef tuple living_forwards(AtomicReference contents, set of_pullbacks):
    """Those that may still have a backward: the last one, and those that weak references belong to."""
    cdef Forward last = (<Contents>contents.current()).forward
    if not of_pullbacks:
        return () if last is None else (last,)
    found = [reference() for reference in of_pullbacks.copy()]
    return tuple([forward for forward in (last, *found) if forward is not None])


cdef object plain_forward = None  # `BatchNorm.forward`
cdef object grad_depth = None     # the ContextVar of `no_grad`: how many of them the calling context is in


def set_plain_forward(forward, depth):
    """Installs what `called` takes the place of."""
    global plain_forward, grad_depth
    plain_forward, grad_depth = forward, depth


def called(self, x, out=None, *, residual=None, mask=None, update=True):
    """See `forward`: the same, without the frames of Python, which take a sixth of a small call.

    A class or an instance with a forward of its own is called through that.
    """
    cdef dict its
    cdef AtomicReference calibration, contents
    cdef Options options
    cdef Processes processes
    cdef Forward forward
    cdef tuple living
    cdef int keep
    if update is True and type(self).forward is plain_forward:
        attributes = self.__dict__
        if type(attributes) is dict and "_calibration" in attributes and "forward" not in attributes:
            its = attributes
            calibration = its["_calibration"]
            if calibration.current() is None:
                contents, options, processes = its["_contents"], its["_options"], its["_processes"]
                living = () if out is None else living_forwards(contents, its["_living"])
                keep = NOBODY if get_value(grad_depth) else LAYER
                if processes is not None and its["_training"]:
                    return forward_together(contents, options, processes, x, its["_gamma"], its["_beta"], its["_eps"],
                                            its["_momentum"], keep, True, out, living, residual, mask)[0]
                forward = new_forward(contents, options, x, its["_gamma"], its["_beta"], its["_eps"], its["_training"],
                                      residual, mask)
                return committed(contents, options, forward, its["_momentum"], keep, True, out, living)
    given = {"out": out, "residual": residual, "mask": mask, "update": None if update is True else update}
    return self.forward(x, **{name: value for name, value in given.items() if value is not None})


def forward_in_calibration(AtomicReference contents, Options options, x, gamma, beta, eps, bint training, int keep,
                           out, tuple living, gathers, residual=None, mask=None):
    """-> (y, Forward) of x in a calibration, with the statistics of the batch if it has two values a channel.

    gathers: what makes contents of those after the forward and of the moments of the batch; or None.
    """
    cdef Forward forward = new_forward(contents, options, x, gamma, beta, eps, training, residual, mask, True)
    cdef Contents found
    if forward.count < 2:
        there = forward.positions()
        batch = moments(forward.x, forward.axis) if there is None else moments(there.gather(forward.x, "x"), 1)
        y = map_with_running(forward, (<Contents>contents.current()).in_use, keep, out, living)  # `out` may be x
    else:
        y = map_with_batch(forward, options, keep, out, living, True)
        batch = forward.exact_moments()
    while True:
        found = contents.current()
        new = found.after_forward(forward, keep)
        if gathers is not None:
            new = gathers(new, batch)
        if contents.swap(found, new, NULL, 0):
            return y, forward


cdef tuple mapped_back_there(Forward forward, bnfast_job *job, Positions there, cnp.ndarray x, cnp.ndarray u, int axis,
                             cnp.ndarray out, cnp.ndarray out_residual, cnp.ndarray home_of_x=None,
                             cnp.ndarray home_of_u=None):
    """-> (dx, dresidual) of a backward job of x and u, 0 elsewhere.

    `there` has gathered them, unless it is None, to where they are at home.
    """
    if there is None:
        return mapped_back(job, x, u, None, axis, forward.channels, out, out_residual, forward.has_residual)
    if not forward.has_residual:
        dx = mapped_back(job, x, u, None, axis, forward.channels, u, None, False)[0]
        return there.scatter(dx, out, home_of_u), None
    dx, dresidual = mapped_back(job, x, u, None, axis, forward.channels, x, u, True)
    return there.scatter(dx, out, home_of_x), there.scatter(dresidual, out_residual, home_of_u)


cdef int note_gradients(Forward forward, out, out_residual, tuple living) except -1:
    """The user's arrays have been written: those whose x they were are told so."""
    if out is not None:
        note_overwritten(out, (*living, forward), "the backward's out")
    if out_residual is not None:
        note_overwritten(out_residual, (*living, forward), "the backward's out_residual")
    return 0


def backward_of(Forward forward, dy, out, tuple living, dtype, out_residual=None):
    """-> (dx, dresidual, dgamma, dbeta), the last two in `dtype`, float32 or float64, rounded once from float64;
    dresidual is None without a residual."""
    if forward.processes is not None:
        return backward_together(forward, dy, out, living, dtype, out_residual)
    cdef bnfast_job job
    begin_job(&job, BNFAST_BACKWARD if forward.running is None else BNFAST_BACKWARD_EVAL)
    cdef cnp.ndarray x = forward.x, u, given_out, given_out_residual, inv_std
    cdef int type_number = cnp.NPY_FLOAT32 if dtype.itemsize == 4 else cnp.NPY_FLOAT64, axis = forward.axis
    cdef Py_ssize_t i
    cdef Positions there
    cdef cnp.ndarray home_of_x = None, home_of_u = None
    forward.check()
    u = as_companion(dy, "dy", x)
    given_out = as_out(out, x)
    given_out_residual = as_out_residual(out_residual, given_out, forward.has_residual, x)
    there = forward.positions()
    dgamma, dbeta = new_gradients(&job, forward.channels, type_number, there is not None or cnp.PyArray_SIZE(x) == 0)
    forward.set_parameters(&job)
    if forward.running is None:
        job.mean, job.inv_std, job.mean_rest = forward.row(MEAN), forward.row(INV_STD), forward.mean_rest()
    else:
        inv_std = new_statistics(forward.channels)
        job.mean, job.inv_std = forward.running.row(0), values(inv_std)
        for i in range(forward.channels):
            job.inv_std[i] = 1.0 / sqrt(forward.running.row(1)[i] + forward.eps)
    if there is not None:  # x first, while dy is still there
        if forward.has_residual and (given_out is None or not may_overlap(given_out, u)):
            home_of_x = there.home(given_out, x)
        x, axis = there.gather(x, "x", home_of_x), 1
        home_of_u = there.home(given_out_residual if forward.has_residual else given_out, u)
        u = there.gather(u, "dy", home_of_u)
    forward.set_marks(&job)
    dx, dresidual = mapped_back_there(forward, &job, there, x, u, axis, given_out, given_out_residual, home_of_x,
                                      home_of_u)
    note_gradients(forward, out, out_residual, living)
    return dx, dresidual, dgamma, dbeta


cdef int commit_training(AtomicReference contents, Options options, Forward forward, int keep, momentum) except -1:
    """After a forward that the running statistics take in: from here on they are the averages of training."""
    cdef Contents found, new
    while True:
        found = contents.current()
        new = found.after_forward(forward, keep)
        new.in_use = found.in_use.after(forward, momentum, options.unbiased, options.skips)
        new.averages = None
        if contents.swap(found, new, NULL, 0):
            return 0


cdef int commit_forward(AtomicReference contents, Forward forward, int keep) except -1:
    """After a forward that changed no statistics."""
    cdef Contents found
    while True:
        found = contents.current()
        if contents.swap(found, found.after_forward(forward, keep), NULL, 0):
            return 0


def commit_backward(AtomicReference contents, Forward forward, bint last, tuple gradients, bint accumulate):
    """After a backward. last: through `backward`, which uses a forward up: RuntimeError if another thread has."""
    cdef Contents found, new
    cdef bint used = False, done = False
    while not done:
        found = contents.current()
        new = found.after_backward(forward, last, gradients, accumulate)
        with cython.critical_section(contents):
            used = last and forward.used
            if not used and contents.referent is found:
                contents.referent = new
                forward.used = last
                done = True
        if used:
            raise RuntimeError("backward: another thread has called the backward of this forward meanwhile; "
                               "vjp gives a forward whose backward may be called at any time")


# --- calibration ----------------------------------------------------------------------------------------------

@cython.auto_pickle(False)
@cython.final
@cython.no_gc_clear  # __dealloc__ needs what it refers to
cdef class Calibration:
    """What `with layer.calibrate():` and `with calibrate(layers):` enter and leave.

    In C, because no signal handler runs between its steps: a layer is never left in calibration by an interrupt. From
    Python 3.14 on one may run after `__enter__` and before the block: then the end of this object ends the calibration.
    """

    cdef tuple tokens
    cdef object finish
    cdef object entered
    cdef object token

    def __cinit__(self, tuple tokens, finish, entered):
        """tokens: of each layer the reference to the token of the block that is gathering, or None; finish: called
        with the token at the end of the block, and with what the block raised, or None; entered: what `with ... as`
        gives."""
        for current in tokens:
            if not isinstance(current, AtomicReference):
                raise TypeError("expected AtomicReferences")
        self.tokens, self.finish, self.entered = tokens, finish, entered

    cdef void end(self, Py_ssize_t n) noexcept:
        cdef Py_ssize_t i
        for i in range(n):
            (<AtomicReference>self.tokens[i]).swap(self.token, None, NULL, 0)

    def __dealloc__(self):
        if self.token is not None:
            self.end(len(self.tokens))

    def __enter__(self):
        cdef Py_ssize_t i
        cdef bint free
        token = object()  # of this block: what another one has gathered is not its own
        with cython.critical_section(self):
            free = self.token is None
            if free:
                self.token = token
        if not free:  # of this object there is a block already
            raise RuntimeError("calibrate: this layer is being calibrated already")
        for i in range(len(self.tokens)):
            if not (<AtomicReference>self.tokens[i]).swap(None, token, NULL, 0):
                self.end(i)
                self.token = None
                raise RuntimeError("calibrate: this layer is being calibrated already")
        return self.entered

    def __exit__(self, kind, error, trace):
        token = self.token
        self.end(len(self.tokens))
        self.token = None
        self.finish(token, error)


@cython.auto_pickle(False)
cdef class CountedContext:
    """A context manager that counts a context variable up and down.

    In C, as a calibration is: no signal handler runs between its steps, so none leaves it entered.
    """

    cdef object variable

    def __init__(self, variable):
        self.variable = variable

    def __enter__(self):
        self.variable.set(self.variable.get() + 1)

    def __exit__(self, kind, error, trace):
        self.variable.set(max(0, self.variable.get() - 1))  # another context's, if a generator is closed there
