"""The extension module: checks arguments, allocates, releases the GIL, runs the parallel loop, calls the kernels.

Every function reads check, allocate, compute, return, in this order: an error leaves nothing half done. The C below
this module cannot fail: what can go wrong in the extension is found here. One shared object, cut by subject:

    arguments.pxi    what users give, checked
    layout.pxi       how an array lies in memory, as (outer, channels, inner); packed copies; overlaps
    run.pxi          a job planned and run: threads, workspace, the only parallel loop
    operations.pxi   the functions under bnfast.functional: check, allocate, compute, return
    rows.pxi         rows of statistics, merged
    atomic.pxi       references to objects, exchanged all at once
    processes.pxi    rows of statistics to and from all processes
    layer.pxi        the steps of a layer: forwards and backwards, its running statistics, calibration
    together.pxi     the steps of a layer whose batch lies on several processes
    plan.pxi         the plan of a call in words, and choices forced for tests
    runtime.pxi      what was built and what this machine has

The included files see each other's names; who uses whom goes down this list, plan.pxi and runtime.pxi aside.
"""

import math
import os
import warnings

import numpy as np
from numpy.exceptions import AxisError, TooHardError

cimport cython
cimport numpy as cnp
from cpython.contextvars cimport get_value
from cpython.long cimport PyLong_AsLongAndOverflow
from cpython.number cimport PyNumber_Index
from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from cython.parallel cimport prange
from libc.float cimport DBL_MAX
from libc.limits cimport LLONG_MAX
from libc.math cimport ldexp, sqrt
from libc.stdint cimport uintptr_t
from libc.string cimport memchr, memcmp, memcpy, memset

include "externs.pxi"

cnp.import_array()
bnfast_openmp_init()
bnfast_rivals_init()
bnfast_late_init()
bnfast_read_caches()

include "arguments.pxi"
include "layout.pxi"
include "run.pxi"
include "subnormal.pxi"
include "positions.pxi"
include "operations.pxi"
include "rows.pxi"
include "atomic.pxi"
include "processes.pxi"
include "layer.pxi"
include "together.pxi"
include "plan.pxi"
include "runtime.pxi"
