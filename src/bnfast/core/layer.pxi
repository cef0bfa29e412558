# The steps of a layer: what its calls change, and how.
#
# All of it is in one `Contents`, which is never changed once others can see it, behind one `AtomicReference`. A call
# computes first and then exchanges the contents for others made of those it finds: an exception, Ctrl-C included, finds
# the layer as it was before the call or as it is after it, and threads, signal handlers and forked children need no lock.

# --- a forward ------------------------------------------------------------------------------------------------

cdef enum:
    SAMPLES = 16

# Which forwards are kept: by the layer, for `backward`; by a pullback; by nobody.
KEEP_NOTHING, KEEP_LAST, KEEP_PULLBACK = range(3)


cdef void take_sample(cnp.ndarray x, unsigned long long *sample) noexcept:
    """The bits of some elements spread over the array, the first and the last among them."""
    cdef Py_ssize_t size = cnp.PyArray_SIZE(x), itemsize = cnp.PyArray_ITEMSIZE(x), step = (size - 1) // (SAMPLES - 1)
    cdef Py_ssize_t i, position, offset
    cdef int axis
    cdef bint dense = cnp.PyArray_IS_C_CONTIGUOUS(x) or cnp.PyArray_IS_F_CONTIGUOUS(x)
    memset(sample, 0, SAMPLES * sizeof(unsigned long long))
    if size == 0:
        return
    for i in range(SAMPLES):
        position = i * step if i < SAMPLES - 1 else size - 1
        if dense:
            offset = position * itemsize
        else:
            offset = 0
            for axis in range(cnp.PyArray_NDIM(x) - 1, -1, -1):
                offset += position % cnp.PyArray_DIM(x, axis) * cnp.PyArray_STRIDE(x, axis)
                position //= cnp.PyArray_DIM(x, axis)
        memcpy(&sample[i], <const char *>cnp.PyArray_DATA(x) + offset, itemsize)


@cython.auto_pickle(False)
@cython.final
@cython.freelist(8)
cdef class Forward:
    """What the backward of one forward needs: x itself, and copies of all that the layer may change afterwards.

    Nothing of it changes but `gone`, which says what was written over x, and `used`.
    """

    cdef readonly cnp.ndarray x
    cdef readonly object mean     # (C,) float64: what was subtracted
    cdef readonly object inv_std  # (C,) float64 of the batch; None: the statistics were constants, with `var`
    cdef readonly object m2       # (C,) float64 of the batch, or None
    cdef readonly object var
    cdef readonly object gamma
    cdef readonly object beta
    cdef readonly object axis
    cdef readonly double eps
    cdef readonly bint training   # the layer's mode
    cdef readonly str gone
    cdef bint used                # by `backward`
    cdef unsigned long long sample[SAMPLES]
    cdef object __weakref__

    cdef readonly Py_ssize_t count  # values a channel

    cdef Py_ssize_t nonfinite(self) noexcept:
        """The first channel whose batch mean or m2 is not finite, or -1."""
        cdef Py_ssize_t i
        cdef double *mean = values(self.mean)
        cdef double *m2 = values(self.m2)
        for i in range(cnp.PyArray_DIM(<cnp.ndarray>self.mean, 0)):
            if not is_finite(mean[i], m2[i]):
                return i
        return -1

    cdef int check_finite(self) except -1:
        """FloatingPointError if the statistics of the batch are not finite."""
        cdef Py_ssize_t channel = self.nonfinite()
        if channel >= 0:
            raise FloatingPointError(
                f"x: expected a batch with finite statistics (nonfinite='raise'), got mean {self.mean[channel]} and "
                f"variance {self.m2[channel] / self.count} in channel {channel}"
            )
        return 0

    cdef int check(self) except -1:
        """RuntimeError if x is not what it was."""
        cdef unsigned long long now[SAMPLES]
        if self.gone is not None:
            raise RuntimeError(f"backward: x is gone: {self.gone} was written into its memory")
        take_sample(self.x, now)
        if memcmp(now, self.sample, sizeof(now)) != 0:
            raise RuntimeError("backward: x has changed since its forward; keep it as it is until the backward, "
                               "or give forward a copy")
        return 0


cdef bint is_finite(double mean, double m2) noexcept:
    return mean - mean == 0.0 and m2 - m2 == 0.0


cdef Forward new_forward(cnp.ndarray x, mean, gamma, beta, axis, double eps, bint training):
    cdef Forward forward = Forward.__new__(Forward)
    forward.x, forward.mean, forward.gamma, forward.beta = x, mean, gamma, beta
    forward.axis, forward.eps, forward.training = axis, eps, training
    forward.count = cnp.PyArray_SIZE(x) // cnp.PyArray_DIM(<cnp.ndarray>mean, 0)
    take_sample(x, forward.sample)
    return forward


cdef cnp.ndarray new_copy(cnp.ndarray array, copy_order *order):
    """An array to copy into, and the order to do so."""
    cdef cnp.ndarray copy
    if not cnp.PyArray_ISCARRAY_RO(array):  # as it was when it was set
        raise ValueError("gamma, beta: expected contiguous arrays")
    copy = cnp.PyArray_EMPTY(cnp.PyArray_NDIM(array), cnp.PyArray_DIMS(array), cnp.PyArray_TYPE(array), 0)
    order.target, order.source, order.n_bytes = cnp.PyArray_DATA(copy), cnp.PyArray_DATA(array), cnp.PyArray_NBYTES(copy)
    return copy


cdef tuple copies_of(AtomicReference contents, gamma, beta):
    """Copies of gamma and beta of one moment."""
    cdef copy_order orders[2]
    cdef int n = 0
    cdef object g = None, b = None
    if gamma is not None:
        g = new_copy(gamma, &orders[n])
        n += 1
    if beta is not None:
        b = new_copy(beta, &orders[n])
        n += 1
    with cython.critical_section(contents):
        copy_all(orders, n)
    return g, b


cdef int note_overwritten(object out, tuple living, str what) except -1:
    """Those forwards whose x has an element in the memory of `out` are told so."""
    cdef Forward forward
    for forward in living:
        if shares_memory(out, forward.x):
            forward.gone = what
    return 0


cdef object read_only(cnp.ndarray array):
    cnp.PyArray_CLEARFLAGS(array, cnp.NPY_ARRAY_WRITEABLE)
    return array


# --- running statistics ---------------------------------------------------------------------------------------

cdef enum:
    MOST_BATCHES = 0x7fffffffffffffff  # num_batches_tracked stays there


@cython.auto_pickle(False)
@cython.final
@cython.freelist(4)
cdef class Running:
    """Mean and variance of each channel as eval mode uses them, (C,) float64, read-only, and what they are made of."""

    cdef readonly object mean
    cdef readonly object var
    cdef readonly long long batches  # that came by
    cdef readonly object averaged    # (C,) int64: those of them that were averaged in a channel; None: all
    cdef readonly object skipped     # (C,) int64: those that were left out as they were not finite; None: none

    def __init__(self, cnp.ndarray mean, cnp.ndarray var, long long batches=0, averaged=None, skipped=None):
        self.mean, self.var, self.batches = read_only(mean), read_only(var), batches
        self.averaged, self.skipped = averaged, skipped

    def __eq__(self, other):
        return (isinstance(other, Running) and self.batches == other.batches
                and all([np.array_equal(a, b, equal_nan=True) for a, b in zip(self.arrays(), other.arrays())]))

    def arrays(self):
        """mean, var, averaged and skipped, in full."""
        zeros = np.zeros(len(self.mean), np.int64)
        averaged = zeros + self.batches if self.averaged is None else self.averaged
        return self.mean, self.var, averaged, zeros if self.skipped is None else self.skipped

    cdef Running after(self, Forward forward, object momentum, bint unbiased, bint skip):
        """With one batch more: (1 - weight) * old + weight * batch in each channel.

        A weight of 0 or 1 takes the one and leaves the other, whatever it is. momentum None: the average of all batches
        that were averaged in the channel, equally weighted. skip: channels that are not finite stay as they are.
        """
        cdef Py_ssize_t channels = cnp.PyArray_DIM(<cnp.ndarray>self.mean, 0), i
        cdef double *batch_mean = values(forward.mean)
        cdef double *batch_m2 = values(forward.m2)
        cdef double *old_mean = values(self.mean)
        cdef double *old_var = values(self.var)
        cdef double divisor = forward.count - 1 if unbiased else forward.count
        cdef double weight = 0.0 if momentum is None else momentum
        cdef bint cumulative = momentum is None, some_skipped = False
        cdef long long batches = self.batches if self.batches == MOST_BATCHES else self.batches + 1
        cdef cnp.ndarray mean, var
        cdef Running new
        cdef double *new_mean
        cdef double *new_var
        averaged, skipped = self.averaged, self.skipped
        cdef long long *counts = NULL
        cdef long long *skips = NULL
        if skip:
            some_skipped = forward.nonfinite() >= 0
        if some_skipped or averaged is not None or (weight == 0.0 and not cumulative):
            _, _, averaged, skipped_in_full = self.arrays()
            averaged = averaged.copy()
            counts = <long long *>cnp.PyArray_DATA(<cnp.ndarray>averaged)
            if some_skipped:
                skipped = skipped_in_full.copy()
                skips = <long long *>cnp.PyArray_DATA(<cnp.ndarray>skipped)
        mean, var = new_statistics(channels), new_statistics(channels)
        new_mean, new_var = values(mean), values(var)
        for i in range(channels):
            if some_skipped and not is_finite(batch_mean[i], batch_m2[i]):
                new_mean[i], new_var[i] = old_mean[i], old_var[i]
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
                new_mean[i] = (1.0 - weight) * old_mean[i] + weight * batch_mean[i]
                new_var[i] = (1.0 - weight) * old_var[i] + weight * (batch_m2[i] / divisor)
            if counts != NULL and counts[i] < MOST_BATCHES:
                counts[i] += 1
        new = Running.__new__(Running)
        new.mean, new.var, new.batches = read_only(mean), read_only(var), batches
        new.averaged, new.skipped = averaged, skipped
        return new


# --- contents -------------------------------------------------------------------------------------------------

@cython.auto_pickle(False)
@cython.final
@cython.freelist(8)
cdef class Contents:
    """All that the calls of a layer change, of one moment. Whoever has made one may set its fields before it is seen."""

    cdef public Running running        # the statistics in use; None: the layer has none
    cdef public Running averages       # those of training, set aside while exact ones are in use; else None
    cdef public object exact           # (Moments, batches) of the last calibration, or None
    cdef public object gathered        # (calibration, Moments, batches) of the one that is going on, or None
    cdef public Forward forward        # the last one, until its backward
    cdef public str absent             # why there is none
    cdef public bint replaced          # `forward`, of eval mode, took the place of one in training that waited for its backward
    cdef public object batch_mean      # of the last forward that took statistics, (C,) float64, or None
    cdef public object batch_m2
    cdef public Py_ssize_t batch_count
    cdef public tuple gradients        # of gamma and beta, as they are seen: arrays or None
    cdef public tuple sums             # the same, as `accumulate` adds to them

    def __cinit__(self, Running running=None):
        self.running, self.absent = running, "no forward"
        self.gradients = self.sums = (None, None)

    def replace(self, **changes):
        """These, with some fields changed."""
        new = self.copy()
        for name, value in changes.items():
            setattr(new, name, value)
        return new

    cdef Contents copy(self):
        cdef Contents new = Contents.__new__(Contents)
        new.running, new.averages, new.exact, new.gathered = self.running, self.averages, self.exact, self.gathered
        new.forward, new.absent, new.replaced = self.forward, self.absent, self.replaced
        new.batch_mean, new.batch_m2, new.batch_count = self.batch_mean, self.batch_m2, self.batch_count
        new.gradients, new.sums = self.gradients, self.sums
        return new

    cdef Contents after_forward(self, Forward forward, int keep):
        """After a forward that changed no statistics."""
        cdef Contents new = self.copy()
        if forward.inv_std is not None:
            new.batch_mean, new.batch_m2, new.batch_count = forward.mean, forward.m2, forward.count
        if keep == KEEP_LAST:
            new.forward, new.absent = forward, None
            if forward.training:
                new.replaced, new.gradients = False, (None, None)
            else:
                new.replaced = self.replaced if self.forward is None or not self.forward.training else True
        elif keep == KEEP_NOTHING:
            new.forward, new.absent, new.replaced = None, "a forward under no_grad", False
        return new

    cdef Contents after_backward(self, Forward forward, tuple gradients, bint accumulate):
        """After the backward of a forward; if that was the last one, it is used up."""
        cdef Contents new = self.copy()
        if self.forward is forward:
            new.forward, new.absent, new.replaced = None, "a forward whose backward has been called", False
        if accumulate:
            gradients = tuple([g if s is None or g is None else s + g for s, g in zip(self.sums, gradients)])
        new.sums = gradients
        if new.forward is None or not new.forward.training:  # else it is stale already: the next forward came between
            new.gradients = gradients
        return new


# --- the steps ------------------------------------------------------------------------------------------------

@cython.auto_pickle(False)
@cython.final
cdef class Options:
    """What of a layer never changes and its forward has to know."""

    cdef object axis
    cdef Py_ssize_t channels
    cdef bint tracks, unbiased, skips, raises

    def __cinit__(self, axis, Py_ssize_t channels, bint tracks, bint unbiased, str nonfinite):
        self.axis, self.channels, self.tracks, self.unbiased = axis, channels, tracks, unbiased
        self.skips, self.raises = nonfinite == "skip", nonfinite == "raise"


cdef tuple forward_with_batch(AtomicReference contents, Options options, x, gamma, beta, eps, bint training, out,
                              tuple living):
    """-> (y, Forward): normalises with the statistics of the batch. living: forwards whose x `out` may overwrite."""
    cdef Forward forward
    cdef cnp.ndarray data = as_input(x, options.axis, options.channels)
    gamma, beta = copies_of(contents, gamma, beta)
    y, mean, inv_std, m2 = batch_norm(data, gamma, beta, options.axis, eps, out, True)
    forward = new_forward(data, read_only(mean), gamma, beta, options.axis, eps, training)
    forward.inv_std, forward.m2 = inv_std, read_only(m2)
    if out is not None:
        note_overwritten(out, (*living, forward), "the forward's out")
    if options.raises and training:
        forward.check_finite()
    return y, forward


cdef tuple forward_with_running(AtomicReference contents, Options options, x, gamma, beta, eps, bint training, out,
                                tuple living):
    """-> (y, Forward): normalises with the running statistics, as constants."""
    cdef Forward forward
    cdef Running running = (<Contents>contents.value).running
    cdef cnp.ndarray data = as_input(x, options.axis, options.channels)
    gamma, beta = copies_of(contents, gamma, beta)
    y = batch_norm_eval(data, running.mean, running.var, gamma, beta, options.axis, eps, out, "running_")
    forward = new_forward(data, running.mean, gamma, beta, options.axis, eps, training)
    forward.var = running.var
    if out is not None:
        note_overwritten(out, (*living, forward), "the forward's out")
    return y, forward


def forward_of(AtomicReference contents, Options options, x, gamma, beta, eps, momentum, bint training, int keep,
               bint update, out, tuple living):
    """-> (y, Forward) of a layer that is not being calibrated, whose contents are exchanged for those after it."""
    if not training and options.tracks:
        found = forward_with_running(contents, options, x, gamma, beta, eps, training, out, living)
        commit_forward(contents, found[1], keep)
    else:
        found = forward_with_batch(contents, options, x, gamma, beta, eps, training, out, living)
        if training and options.tracks and update:
            commit_training(contents, options, found[1], keep, momentum)
        else:
            commit_forward(contents, found[1], keep)
    return found


def forward_in_calibration(AtomicReference contents, Options options, x, gamma, beta, eps, bint training, int keep,
                           out, tuple living, gathers):
    """The same in a calibration, with the statistics of the batch if it has two values a channel. gathers: what makes
    contents of those after the forward and of the forward, or None."""
    cdef Forward forward
    cdef Contents found
    if cnp.PyArray_SIZE(as_input(x, options.axis, options.channels)) < 2 * options.channels:
        y, forward = forward_with_running(contents, options, x, gamma, beta, eps, training, out, living)
    else:
        y, forward = forward_with_batch(contents, options, x, gamma, beta, eps, True, out, living)
        forward.training = training
    while True:
        found = contents.value
        new = found.after_forward(forward, keep)
        if gathers is not None:
            new = gathers(new, forward)
        if contents.swap(found, new, NULL, 0):
            return y, forward


def backward_of(Forward forward, dy, out, tuple living, dtype):
    """-> (dx, dgamma, dbeta), the last two in `dtype`, rounded once from float64."""
    forward.check()
    inv_std = 1 / np.sqrt(forward.var + forward.eps) if forward.inv_std is None else forward.inv_std
    dx, dgamma, dbeta = batch_norm_backward(
        dy, forward.x, forward.mean, inv_std, forward.gamma, forward.axis, forward.inv_std is not None, out, dtype
    )
    if out is not None:
        note_overwritten(out, (*living, forward), "the backward's out")
    return dx, dgamma, dbeta


cdef int commit_training(AtomicReference contents, Options options, Forward forward, int keep, momentum) except -1:
    """After a forward that the running statistics take in: from here on they are the averages of training."""
    cdef Contents found, new
    while True:
        found = contents.value
        new = found.after_forward(forward, keep)
        new.running = found.running.after(forward, momentum, options.unbiased, options.skips)
        new.averages = new.gathered = None
        if contents.swap(found, new, NULL, 0):
            return 0


cdef int commit_forward(AtomicReference contents, Forward forward, int keep) except -1:
    """After a forward that changed no statistics."""
    cdef Contents found
    while True:
        found = contents.value
        if contents.swap(found, found.after_forward(forward, keep), NULL, 0):
            return 0


def commit_backward(AtomicReference contents, Forward forward, bint last, tuple gradients, bint accumulate):
    """After a backward. last: through `backward`, which uses a forward up: RuntimeError if another thread has."""
    cdef Contents found, new
    cdef bint used = False, done = False
    while not done:
        found = contents.value
        new = found.after_backward(forward, gradients, accumulate)
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

    cdef tuple currents
    cdef object finish
    cdef object entered
    cdef object token

    def __cinit__(self, tuple currents, finish, entered):
        """currents: of each layer the reference to the token of the block that is gathering, or None; finish: called
        with the token at the end of a block that did not raise; entered: what `with ... as` gives."""
        for current in currents:
            if not isinstance(current, AtomicReference):
                raise TypeError("expected AtomicReferences")
        self.currents, self.finish, self.entered = currents, finish, entered

    cdef void end(self, Py_ssize_t n) noexcept:
        cdef Py_ssize_t i
        for i in range(n):
            (<AtomicReference>self.currents[i]).swap(self.token, None, NULL, 0)

    def __dealloc__(self):
        if self.token is not None:
            self.end(len(self.currents))

    def __enter__(self):
        cdef Py_ssize_t i
        token = object()  # of this block: what another one has gathered is not its own
        if self.token is not None:
            self.check_ended()
        self.token = token
        for i in range(len(self.currents)):
            if not (<AtomicReference>self.currents[i]).swap(None, token, NULL, 0):
                self.end(i)
                self.token = None
                raise RuntimeError("calibrate: this layer is being calibrated already")
        return self.entered

    cdef int check_ended(self) except -1:
        """That no block of this object is going on."""
        for current in self.currents:
            if (<AtomicReference>current).referent is self.token:
                raise RuntimeError("calibrate: this layer is being calibrated already")
        return 0

    def __exit__(self, kind, error, trace):
        self.end(len(self.currents))
        if kind is None:
            self.finish(self.token)
