"""What the pytest-benchmark suites share: contenders, shapes, the record of a measurement.

All contenders live in one process here, so the figures tell how one of them changes from commit to commit. To compare
libraries use `python -m bnfast bench`, which gives each a process of its own.
"""

import functools
import timeit

import pytest
from shapes import SHAPES

import bnfast
from bnfast.commands.bench.compare import machine
from bnfast.commands.bench.contenders import CONTENDERS, Case, Unavailable, check, create

NAMES = [name for name in CONTENDERS if name != "torch.compile"]  # it compiles for seconds, for every case


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("default"))  # other people's packages warn
        item.add_marker(pytest.mark.benchmark(max_time=0.3, min_rounds=3, disable_gc=True))


@functools.cache
def contender(name, threads):
    """The contender, or the reason why there is none."""
    try:
        return create(name, threads)
    except Unavailable as error:
        return error


@functools.lru_cache(maxsize=1)
def arrays(shape):
    return Case(SHAPES[shape], "float32")


# The shape varies slowest, so that the arrays of one shape are made once.
@pytest.fixture(params=SHAPES, scope="module")
def shape(request):
    return request.param


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture
def run(benchmark, name, shape):
    """Measure one operation of one contender, in its fastest variant, and check the result."""

    def run(operation):
        threads = bnfast.get_num_threads()
        found = contender(name, threads)
        if isinstance(found, Unavailable):
            pytest.skip(str(found))
        case = arrays(shape)
        try:
            variants, result = found.operations(case)[operation]
        except Unavailable as error:
            pytest.skip(str(error))
        variant = min(variants, key=lambda each: seconds(variants[each]))
        moved = SHAPES[shape].bytes_moved(operation, case.x.itemsize)
        benchmark.group = f"{operation} {shape}"
        benchmark.extra_info.update(machine(), contender=found.about, variant=variant, threads=threads, bytes=moved)
        benchmark(variants[variant])
        if values := result(variant):
            check(case, operation, values)

    return run


def seconds(call):
    """The least time of three calls."""
    return min(timeit.repeat(call, number=1, repeat=3))
