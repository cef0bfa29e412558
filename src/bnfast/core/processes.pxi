# Several processes: rows of numbers to all of them and from all of them, which say by their first number what they are
# for; and what a process does that refuses its input, so that no other waits for it for ever.

# What a row is for. Its first number is that plus PURPOSES times the layer's number, negative from a process that
# raised.
cdef enum:
    FOR_AGREEMENT = 1, FOR_FORWARD, FOR_BACKWARD, FOR_CALIBRATION, PURPOSES

cdef tuple PURPOSE_NAMES = ("", "the agreement on a layer", "a forward", "a backward", "the end of a calibration")

cdef enum:
    TEXT_NUMBERS = 64  # of a row with an error's text

cdef long long layers_agreed = 0  # by this process: numbers that the first of all processes proposes
cdef int generation = 0           # of forked children


def _new_generation():
    global generation
    generation += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_new_generation)


cdef str what_for(double code):
    cdef long long number = <long long>abs(code)
    return f"{PURPOSE_NAMES[number % PURPOSES] if 0 < number % PURPOSES < PURPOSES else 'something else'} " \
           f"(layer {number // PURPOSES})"


@cython.auto_pickle(False)
@cython.final
cdef class Processes:
    """All processes that hold one layer.

    comm: the user's; None: there was one, and it has to be set again. send: a float64 vector to (processes, n) of all,
    in their order. names, values_of(), words(name, number): what they have to agree on, as numbers, and what such a
    number means.
    """

    cdef readonly object comm
    cdef object send
    cdef tuple names
    cdef object values_of
    cdef object words
    cdef long long number  # of the layer; 0: they have not agreed yet
    cdef int generation

    def __init__(self, comm, send, tuple names, values_of, words):
        self.comm, self.send, self.names, self.values_of, self.words = comm, send, names, values_of, words
        self.number, self.generation = 0, generation

    cdef int begin(self) except -1:
        """Before a row is sent: that it can be, and that all agree on the layer."""
        if self.send is None:
            raise RuntimeError("comm: this layer had a communicator when it was pickled or saved, which neither can "
                               "keep; set bn.comm to one, or to None")
        if self.generation != generation:
            raise RuntimeError("comm: this process was forked from the one that the communicator belongs to; engines "
                               "do not survive that: start processes by 'spawn', or set bn.comm here")
        return 0 if self.number > 0 else self.agree()

    cdef int agree(self) except -1:
        global layers_agreed
        values = self.values_of()
        row = np.array([FOR_AGREEMENT, layers_agreed + 1, *values], np.float64)
        rows = self.sent(row, FOR_AGREEMENT)
        for place, name in enumerate(self.names, 2):
            unequal = np.flatnonzero(rows[:, place] != rows[0, place])
            if unequal.size:
                first, other = self.words(name, rows[0, place]), self.words(name, rows[unequal[0], place])
                raise ValueError(f"comm: expected the same layer on all processes, got {name} {first} on process 0 and "
                                 f"{other} on process {unequal[0]}")
        self.number = <long long>rows[0, 1]
        layers_agreed = max(layers_agreed + 1, self.number)
        return 0

    cdef double code(self, int purpose) noexcept:
        return purpose + PURPOSES * <double>self.number

    cdef cnp.ndarray sent(self, cnp.ndarray row, double code):
        """-> (processes, n) float64, of which all are for the same as the row."""
        cdef cnp.ndarray rows = self.rows_of(row)
        cdef Py_ssize_t n_rows = cnp.PyArray_DIM(rows, 0), width = cnp.PyArray_DIM(rows, 1), i
        cdef const double *numbers = values(rows)
        for i in range(n_rows):
            if numbers[i * width] < 0.0:
                self.raise_others(i, numbers[i * width])
        for i in range(n_rows):
            if numbers[i * width] != code:
                raise RuntimeError(f"comm: process {i} is in {what_for(numbers[i * width])}, this one in "
                                   f"{what_for(code)}: all processes have to call the same layers in the same order")
        return rows

    cdef cnp.ndarray rows_of(self, cnp.ndarray row):
        cdef cnp.ndarray rows
        found = self.send(row)
        if type(found) is np.ndarray:
            rows = found
            if (cnp.PyArray_NDIM(rows) == 2 and cnp.PyArray_TYPE(rows) == cnp.NPY_FLOAT64 and cnp.PyArray_ISCARRAY(rows)
                    and cnp.PyArray_DIM(rows, 0) > 0 and cnp.PyArray_DIM(rows, 1) == cnp.PyArray_DIM(row, 0)):
                return rows
        given = np.asarray(found)
        if given.dtype != np.float64:
            raise TypeError(f"comm: expected rows of float64 from its gather, got {given.dtype}")
        if given.ndim != 2 or given.shape[0] < 1 or given.shape[1] != row.shape[0]:
            raise ValueError(f"comm: expected rows of shape (processes, {row.shape[0]}) from its gather, "
                             f"got {given.shape}")
        return np.array(given, order="C")

    cdef int raise_others(self, Py_ssize_t process, double code) except -1:
        """All have seen that a process raised: it sends what."""
        text = bytes(self.rows_of(np.zeros(TEXT_NUMBERS))[process]).rstrip(b"\0").decode("utf-8", "replace")
        raise RuntimeError(f"comm: process {process} raised in {what_for(code)}: {text}")

    cdef int refuse(self, int purpose, Py_ssize_t width, error) except -1:
        """Says to the others that this process raises, instead of sending them a row."""
        text = f"{type(error).__name__}: {error}".encode()[:TEXT_NUMBERS * 8]
        try:
            marked = np.zeros(width)
            marked[0] = -self.code(purpose)
            self.rows_of(marked)
            self.rows_of(np.frombuffer(text.ljust(TEXT_NUMBERS * 8, b"\0")))
        except Exception:  # the error itself says more
            pass
        return 0

    def calibrated(self, row, long long batches, error):
        """-> (row of Moments, batches) of all processes, from those of this one; error: what was raised here, or
        None."""
        cdef Py_ssize_t width = len(row) + 2
        self.begin()
        if error is not None:
            self.refuse(FOR_CALIBRATION, width, error)
            return None
        rows = self.sent(np.concatenate([[self.code(FOR_CALIBRATION), batches], row]), self.code(FOR_CALIBRATION))
        return merge_moments_rows(np.ascontiguousarray(rows[:, 2:])), int(rows[:, 1].sum())
