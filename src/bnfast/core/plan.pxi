# The plan that kernels/plan.c makes for a call, in words; and its choices forced, for tests.

cdef dict OPERATIONS = {
    "moments": BNFAST_MOMENTS,
    "forward": BNFAST_FORWARD,
    "eval": BNFAST_EVAL,
    "backward": BNFAST_BACKWARD,
    "backward_eval": BNFAST_BACKWARD_EVAL,
    "jvp": BNFAST_JVP,
}


def explain(shape, axis, dtype, str operation, int n_threads, bint residual=False):
    """What is done, in which pieces, for C-contiguous arrays of a shape and a result in memory of its own.

    residual: with one, which is read forward and whose gradient is written backward; in training by marks of an
    activation, as a layer keeps them.

    -> dict: layout ("planar", "interleaved"), outer, channels, inner, plan ("blocks", "phases"), threads, worth (how
    many threads at most, where they are free), stream, bytes_of_arrays, workspace_bytes, segments (a channel),
    block_channels, tasks (of each phase), packed, near, written_later, row_by_row, in_order, and words: the same as
    text, a line for each.
    """
    cdef bnfast_job job
    begin_job(&job, BNFAST_MOMENTS)
    cdef int ndim = len(shape), i, place
    cdef Py_ssize_t size
    dtype = np.dtype(dtype)
    if operation not in OPERATIONS or dtype_of(np.empty(0, dtype)) == BNFAST_N_DTYPES or ndim < 2 or n_threads < 1:
        raise ValueError(f"explain: expected an operation of {', '.join(OPERATIONS)}, {DTYPES}, at least 2 "
                         f"dimensions and a thread, got {operation!r}, {dtype}, {tuple(shape)}, {n_threads}")
    place = axis if axis >= 0 else axis + ndim
    job.operation = OPERATIONS[operation]
    job.exact = operation == "moments"
    job.outer, job.channels, job.inner = 1, shape[place], 1
    for i in range(ndim):
        size = shape[i]
        if i < place and job.channels > 1:
            job.outer *= size
        elif i != place:
            job.inner *= size
    if job.outer * job.channels * job.inner == 0:
        raise ValueError(f"explain: expected values, got shape {tuple(shape)}")
    # a plan asks whether these are the same, and how they lie; it never reads them
    job.x, job.out = <const void *>64, <void *>128
    if operation in ("backward", "backward_eval", "jvp"):
        job.u = <const void *>192
    if residual and job.u == NULL:
        job.residual = <const void *>256
    elif residual:
        job.passed = <void *>256
        if operation == "backward":
            job.marks, job.rectifies = <unsigned char *>320, 1
    job.kernels = bnfast_active(dtype_of(np.empty(0, dtype)))
    job.n_threads = n_threads
    bnfast_plan(&job)
    arrays = (0 if operation == "moments" else 1) + (2 if job.u != NULL else 1)
    found = {
        "layout": "planar" if bnfast_is_planar(&job) else "interleaved",
        "outer": job.outer,
        "channels": job.channels,
        "inner": job.inner,
        "plan": "blocks" if job.kind == BNFAST_BLOCKS else "phases",
        "threads": n_threads,
        "worth": bnfast_threads_worth(&job),
        "stream": bool(job.stream),
        "bytes_of_arrays": arrays * job.outer * job.channels * job.inner * dtype.itemsize,
        "workspace_bytes": job.workspace_bytes,
        "segments": job.n_segments,
        "block_channels": job.block_channels,
        "tasks": [job.phases[i].n_tasks for i in range(job.n_phases)],
        "packed": bool(job.pack),
        "near": bool(job.near),
        "written_later": bool(job.written_later),
        "row_by_row": bool(job.row_by_row),
        "in_order": bool(job.in_order),
    }
    found["words"] = in_words(found, operation)
    return found


cdef str in_words(dict plan, str operation):
    lines = [f"{plan['layout']}: (outer, channels, inner) = ({plan['outer']}, {plan['channels']}, {plan['inner']})"]
    tasks = " + ".join(map(str, plan["tasks"]))
    if plan["plan"] == "blocks":
        lines.append(f"blocks of {plan['block_channels']} channels, all steps back to back in L2; {tasks} tasks")
    elif operation in ("eval", "affine"):
        lines.append(f"nothing to reduce: coefficients, then the map; {tasks} tasks")
    else:
        lines.append(f"each step for the whole array, split over rows; {tasks} tasks")
    if operation != "eval":
        lines.append(f"{plan['segments']} segments a channel or column, merged as a tree")
    if plan["packed"]:
        lines.append("the rows of a block are copied together while they are reduced")
    if plan["written_later"]:
        lines.append("a block is written while the next is reduced")
    if plan["layout"] == "planar" and plan["in_order"] and plan["block_channels"] > 1 and operation != "moments":
        lines.append("short rows of neighbouring channels are reduced in the order of memory")
    if plan["layout"] == "interleaved" and operation != "eval":
        lines.append("eight rows or all at a time, a few columns of them" if plan["near"]
                     else {"moments": "a few columns of 32 rows at a time", "forward": "eight rows at a time"}.get(
                         operation, "rows are taken in the order of memory") + ", what follows is asked for ahead")
    if plan["layout"] == "interleaved" and operation != "moments" and not plan["stream"]:
        lines.append("whole rows are mapped one by one" if plan["row_by_row"]
                     else "some rows are mapped together, which share the loads of coefficients")
    if operation != "moments":
        lines.append("the result is written around the caches" if plan["stream"]
                     else "the result is written through the caches")
    lines.append(f"{plan['bytes_of_arrays']} bytes of arrays, {plan['workspace_bytes']} of workspace, "
                 f"{plan['threads']} threads, and the work is worth {plan['worth']} at most")
    return "\n".join(lines)


def force_plan(
    kind=None, stream=None, near=None, pack=None, written_later=None, row_by_row=None, in_order=None
):
    """For tests: what plans choose from now on; None: by themselves. kind: "blocks" or "phases", the others: bool.

    A choice that cannot be had for some shape is passed over. None changes a bit of a result.
    """
    cdef bnfast_choices choices
    choices.kind = {None: -1, "phases": BNFAST_PHASES, "blocks": BNFAST_BLOCKS}[kind]
    choices.stream, choices.near = as_choice(stream), as_choice(near)
    choices.pack, choices.written_later = as_choice(pack), as_choice(written_later)
    choices.row_by_row, choices.in_order = as_choice(row_by_row), as_choice(in_order)
    bnfast_force(&choices)


cdef int as_choice(object value) except -2:
    return -1 if value is None else bool(value)
