# What was built, what this machine has, and what is running: for reports, tests and the modules of runtime/.

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


def blas_supported():
    """Whether this build can run the jobs of OpenBLAS."""
    return bool(bnfast_blas_supported())


def blas_share(copies, list shared):
    """Shares copies of OpenBLAS, each (set_callback, exec_blas, callback, num_threads, places), addresses and a number
    (blas.h); appends to `shared` what blas_release needs. Returns whether there was room for all.
    """
    cdef int copy
    for set_callback, exec_blas, callback, num_threads, places in copies:
        copy = bnfast_blas_share(set_callback, exec_blas, callback, num_threads, places)
        if copy < 0:
            return False
        shared.append(copy)
    return True


def blas_release(list shared):
    """Ends what blas_share began, and empties the list. Nothing interrupts it."""
    while shared:
        bnfast_blas_release(shared.pop())


def blas_state(set_callback):
    """("off", "shared" or "given back", calls run on a team, calls run on threads of their own) of a copy."""
    cdef int copy = bnfast_blas_find(set_callback)
    cdef long on_team = 0, on_threads = 0
    if copy < 0:
        return "off", 0, 0
    bnfast_blas_calls(copy, &on_team, &on_threads)
    if bnfast_blas_was_given_back(copy):
        return "given back", on_team, on_threads
    return "shared" if bnfast_blas_is_shared(copy) else "off", on_team, on_threads


def blas_break(int what):
    """Spoils the running of jobs (blas.h), for the tests that show what the guards prevent."""
    bnfast_blas_break(what)
