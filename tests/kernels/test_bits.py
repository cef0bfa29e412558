"""Same bits everywhere: for every number of threads, instruction set, alignment and process."""

import digests
import numpy as np
import pytest
from campaign import short_and_long
from digests import CASES, ISAS, LARGEST, N_THREADS, arguments, case_name, digest, digest_of, digest_of_all, results
from layouts import LAYOUTS
from scripts import completed
from tolerances import assert_same_bits

import bnfast
from bnfast import _core
from bnfast import functional as F
from bnfast.commands.bench.shapes import dtype_named

every_case = pytest.mark.parametrize("case", CASES, ids=case_name)


@every_case
def test_bits_do_not_depend_on_threads_or_instruction_set(case, dtype):
    found = digests.digests(case, dtype)
    assert len(found) == len(ISAS) * len(N_THREADS)
    unlike = {key for key, value in found.items() if value != found[ISAS[0], 1]}
    assert not unlike, f"these differ from {ISAS[0]} on one thread: {sorted(unlike)}"


@pytest.fixture
def caches():
    """Sets the sizes of the caches that bnfast believes in."""
    before = _core.cache_bytes()
    yield _core.set_cache_bytes
    _core.set_cache_bytes(*before)


CACHES = [(2**15, 2**16), (2**17, 2**18), (2**20, 2**18), (2**22, 2**40)]  # the second level, the last one
# few rows, and few in the last segment; blocks that are copied together
FEW_ROWS = [((12, 2048), 1, "C"), ((256 + 7, 1024), 1, "C"), ((301, 1280), 1, "C")]


@pytest.mark.parametrize("case", CASES + FEW_ROWS, ids=case_name)
def test_bits_do_not_depend_on_the_caches(caches, case, dtype):
    """They decide about blocks of channels, about copying them together, and about streaming stores."""
    expected = digest_of(case, dtype, 2)
    for l2, last_level in CACHES:
        caches(l2, last_level)
        for n_threads in (1, 2):
            assert digest_of(case, dtype, n_threads) == expected, (l2, last_level, n_threads)


PLANS = [
    {"kind": "phases", "row_by_row": False},
    {"kind": "phases", "row_by_row": True},
    {"kind": "phases", "near": True, "stream": True},
    {"kind": "phases", "near": False, "in_order": True},
    {"kind": "blocks", "row_by_row": False},
    {"kind": "blocks", "pack": True, "stream": True, "row_by_row": True},
    {"kind": "blocks", "pack": False, "near": True, "written_later": True, "in_order": True},
    {"kind": "blocks", "written_later": False, "stream": True, "in_order": False},
]


@pytest.mark.parametrize("case", CASES + FEW_ROWS, ids=case_name)
def test_bits_do_not_depend_on_the_plan(case, dtype):
    """Every choice of kernels/plan.c, forced, whatever it would choose for these shapes."""
    expected = digest_of(case, dtype, 2)
    try:
        for plan in PLANS:
            _core.force_plan(**plan)
            for n_threads in (1, 2):
                assert digest_of(case, dtype, n_threads) == expected, (plan, n_threads)
    finally:
        _core.force_plan()


def through_statistics(case, dtype, dtype_of_statistics):
    """What functions make of statistics they are given, rounded to float32 and then held in another dtype."""
    axis = case[1]
    x, dy, v, gamma, beta, vgamma, vbeta = arguments(case, dtype)
    mean, inv_std, var = (
        a.astype(np.float32).astype(dtype_of_statistics) for a in F.batch_norm(x, axis=axis, return_var=True)[1:]
    )
    gamma = gamma.copy()
    gamma[3:4], inv_std[4:5], var[4:5] = np.float32([1e-40, 1e-25, 1e35])  # the edges of the range
    through = {"axis": axis, "activation": "relu", "beta": beta}
    yield F.batch_norm_eval(x, mean, var, gamma, beta, axis=axis)
    yield from F.batch_norm_backward(dy, x, mean, inv_std, gamma, axis=axis)
    yield from F.batch_norm_backward(dy, x, mean, inv_std, gamma, **through)
    yield from F.batch_norm_backward(dy, x, mean, inv_std, gamma, training=False, residual=v, **through)
    yield F.batch_norm_jvp(v, x, mean, inv_std, gamma, axis=axis, vgamma=vgamma, vbeta=vbeta)
    sums = F.batch_norm_backward_sums(dy, x, mean, inv_std, gamma, **through)
    yield from (sums.dgamma, sums.dbeta)
    yield F.batch_norm_backward_apply(dy, x, mean, inv_std, gamma, sums, **through)


@every_case
def test_statistics_in_float32_give_the_bits_of_the_same_values_in_float64(case, dtype):
    """They are widened a block at a time, in each plan, and those of channels that are done with care, too."""
    expected = digest(through_statistics(case, dtype, np.float64))
    try:
        for plan in PLANS:
            _core.force_plan(**plan)
            for n_threads in (1, 2):
                with bnfast.num_threads(n_threads):
                    assert digest(through_statistics(case, dtype, np.float32)) == expected, (plan, n_threads)
    finally:
        _core.force_plan()


def test_plans_are_explained_and_can_be_forced():
    def plan(shape, operation="forward", n_threads=1, axis=1):
        return _core.explain(shape, axis, np.float32, operation, n_threads)

    assert plan((8, 4, 30, 30))["layout"] == "planar"
    assert plan((8, 30, 30, 4), axis=-1)["layout"] == "interleaved"
    assert plan((100, 70))["plan"] == "blocks"
    before, large = _core.cache_bytes(), (256, 1024, 40, 40)
    try:
        _core.set_cache_bytes(2**20, 2**25)
        assert plan(large)["stream"]
        assert not plan((4, 8, 5, 5))["stream"]
        assert plan(large, "backward")["written_later"]
        assert not plan((4, 8, 40, 40), "backward")["written_later"]
        assert plan((2, 500_000))["workspace_bytes"] < 2**20
        assert plan((2, 500_000), "eval")["workspace_bytes"] < 2**20
        # what is believed of a last level has its limits
        _core.set_cache_bytes(2**21, 480 * 2**20)
        assert plan((32, 64, 112, 112))["stream"]
        assert plan((16, 65536))["packed"]  # rows a power of two apart
        assert not plan((16, 65536 + 48))["packed"]
        for kind in ("phases", "blocks"):
            _core.force_plan(kind=kind)
            assert plan((1000, 320))["plan"] == kind
            assert plan((8, 64, 20, 20))["plan"] == kind
            assert kind[:-1] in plan((1000, 320))["words"] or kind == "phases"
    finally:
        _core.set_cache_bytes(*before)
        _core.force_plan()
    with pytest.raises(ValueError, match="explain: expected an operation"):
        plan((3, 4), "nonsense")


def test_maps_whose_channels_stay_in_l2_are_taken_channel_by_channel(caches):
    """On a machine with such caches as the first, the order of memory took 1.2 to 1.5 times as long for large maps."""

    def kinds(*shapes):
        return [_core.explain(shape, 1, np.float32, "backward", 2)["plan"] for shape in shapes]

    large_maps = (32, 32, 56, 56), (64, 64, 28, 28), (8, 32, 112, 112)
    short_runs = (256, 64, 14, 14), (512, 64, 7, 7)
    caches(2**21, 480 * 2**20)
    assert kinds(*large_maps) == ["blocks"] * 3
    assert kinds(*short_runs) == ["phases"] * 2
    later = [_core.explain(shape, 1, np.float32, "backward", 2)["written_later"] for shape in large_maps]
    assert later == [False] * 3
    assert _core.explain((32, 64, 112, 112), 1, np.float32, "backward", 2)["written_later"]
    caches(2**20, 2**25)  # a last level that is near may be read twice
    assert kinds((32, 12, 56, 56), (32, 48, 28, 28), *short_runs) == ["phases"] * 4


def test_large_arrays_are_written_later_where_rows_are_shorter_too_if_the_last_level_is_near(caches):
    """With such caches as the first that took 0.65 to 1 of the time."""

    def later(shape):
        found = [_core.explain(shape, 1, np.float32, operation, 2) for operation in ("forward", "backward")]
        assert [plan["plan"] for plan in found] == ["blocks"] * 2
        return [plan["written_later"] for plan in found]

    caches(2**19, 2**25)
    assert later((64, 512, 28, 28)) == later((128, 256, 20, 20)) == later((128, 256, 16, 24)) == [True, True]
    assert later((32, 512, 28, 28)) == [False, True]  # of one array a channel is less than a quarter of L2
    assert later((256, 512, 16, 23)) == [False, False]
    assert not _core.explain((128, 4, 20, 20), 1, np.float32, "forward", 2)["written_later"]  # all stays in cache
    caches(2**21, 480 * 2**20)
    assert later((512, 512, 28, 28)) == [False, False]


def test_what_fills_half_of_the_last_level_is_written_around_it(caches):
    """So it takes 0.5 to 1 of the time with such caches, whether a call finds its arrays there or not."""
    half = [((16, 128, 32, 32), 1, "eval"), ((16, 32, 32, 128), -1, "forward"), ((16, 88000), 1, "backward")]
    for l2, last_level, times in ((2**19, 2**25, 1), (2**21, 480 * 2**20, 3)):  # of the latter 96 MiB are believed
        caches(l2, last_level)
        for (outer, *rest), axis, operation in half:
            for n, streamed in ((outer * times, True), (outer * times - 1, False)):
                assert _core.explain((n, *rest), axis, np.float32, operation, 2)["stream"] is streamed


def test_from_memory_arrays_are_read_once(caches):
    """With such caches that takes 0.6 to 0.8 of the time, unless a call finds its arrays in cache."""

    def kind(shape, operation, dtype=np.float32):
        return _core.explain(shape, 1, dtype, operation, 2)["plan"]

    caches(2**19, 2**25)
    assert kind((16, 128, 32, 32), "backward") == kind((24, 256, 16, 16), "backward") == "blocks"
    assert kind((12, 64, 56, 56), "forward") == kind((64, 64, 24, 24), "forward") == "blocks"
    assert kind((16, 64, 32, 32), "backward") == "phases"  # all stays in cache
    assert kind((12, 64, 56, 56), "backward") == "phases"  # channels take more than a quarter of L2
    assert kind((66, 320, 10, 10), "forward") == "phases"  # rows too short to be written later
    assert kind((32, 128, 32, 32), "backward", np.float16) == "phases"


def test_of_two_results_short_runs_are_written_in_the_order_of_memory(caches):
    """With such caches as the first that takes 0.75 to 0.95 of the time."""

    def kinds(shape):
        return [_core.explain(shape, 1, np.float32, "backward", 2, residual)["plan"] for residual in (False, True)]

    caches(2**19, 2**25)
    for shape in ((32, 256, 14, 14), (32, 2048, 7, 7), (64, 256, 500)):
        assert kinds(shape) == ["blocks", "phases"], shape
    assert kinds((32, 512, 28, 28)) == ["blocks", "blocks"]
    caches(2**21, 480 * 2**20)
    assert kinds((128, 1024, 14, 14)) == ["blocks", "blocks"]


@pytest.mark.parametrize("name", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("inner", [16, 25, 49, 70])
def test_results_around_the_caches_lie_anywhere(name, inner):
    """Parts of lines at the ends of their rows go through the caches: the same bits, and nothing beside them."""
    if name == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed: there is no bfloat16")
    dtype = dtype_named(name)
    x, dy = np.random.default_rng(inner).standard_normal((2, 3, 5, inner), dtype=np.float32).astype(dtype)
    gamma, beta = np.linspace(-1, 1, 10, dtype=np.float32).reshape(2, 5)
    at_once = F.batch_norm(x, gamma, beta)[0], F.batch_norm_backward(dy, x, beta, gamma**2, gamma)[0]
    size, line, before = x.size, 64 // x.itemsize, _core.isa()
    memory = np.empty(size + 3 * line, dtype)
    memory = memory[-memory.ctypes.data % 64 // x.itemsize :]
    try:
        for isa in ISAS:
            _core.select_isa(isa)
            for plan in ({"kind": "phases"}, {"written_later": False}, {"written_later": True}):
                _core.force_plan(**{"kind": "blocks", "stream": True} | plan)
                for offset in range(line):
                    memory[...] = 7
                    out = memory[offset : offset + size].reshape(x.shape)
                    y = F.batch_norm(x, gamma, beta, out=out)[0].copy()
                    dx = F.batch_norm_backward(dy, x, beta, gamma**2, gamma, out=out)[0]
                    assert digest((y, dx)) == digest(at_once), (isa, plan, offset)
                    around = np.delete(memory, slice(offset, offset + size))
                    assert (around == 7).all(), (isa, plan, offset)
    finally:
        _core.select_isa(before)
        _core.force_plan()


def test_every_phase_of_work_for_two_threads_has_tasks_for_both(caches):
    caches(2**20, 2**25)
    for shape in ((512, 128), (1024, 64), (256, 256), (1176, 64), (64, 1024), (4096, 256)):
        for operation in ("forward", "backward", "eval"):
            tasks = _core.explain(shape, 1, np.float32, operation, 2)["tasks"]
            assert tasks[-1] >= 2, (shape, operation, tasks)
            if operation != "eval" and len(tasks) > 1:  # after the centres, which one task chooses
                assert tasks[1] >= 2, (shape, operation, tasks)
                assert shape[1] < 128 or tasks[2] >= 2, (shape, operation, tasks)  # coefficients of few channels: one


def test_threads_are_for_work_that_is_worth_them(caches):
    def worth(shape, operation, dtype=np.float32, residual=False):
        return _core.explain(shape, 1, dtype, operation, 1, residual)["worth"]

    caches(2**21, 480 * 2**20)  # cores far from each other
    assert [worth((256, 256), operation) for operation in ("eval", "backward")] == [1, 1]
    assert [worth((400, 256), operation) for operation in ("eval", "backward")] == [1, 5]
    assert worth((4, 64, 14, 14), "forward") == 2  # each thread its own channels
    caches(2**20, 2**25)
    assert [worth((32, 64), operation) for operation in ("moments", "forward", "eval", "backward")] == [1, 1, 1, 1]
    assert [worth((1024, 64), operation) for operation in ("moments", "forward", "eval", "backward")] == [2, 2, 2, 3]
    assert worth((512, 64), "forward") == 1
    assert worth((512, 64), "forward", np.float64) == 2
    assert worth((1024, 64), "forward", np.float16) == 2  # computed as float32
    assert [worth((320, 64), "backward", residual=residual) for residual in (False, True)] == [1, 2]  # a second result
    assert worth((8, 4096), "forward") == 3 > worth((4096, 8), "forward")  # each channel costs, too
    assert worth((4096, 4096), "forward") > 500


def test_threads_take_columns_of_their_own_where_rows_are_few(caches):
    caches(2**20, 2**25)
    for operation in ("forward", "backward", "eval"):
        assert _core.explain((12, 2048), 1, np.float32, operation, 2)["block_channels"] == 1024
    for n_threads in (1, 2, 8):  # and what is made of many channels stays in L2
        assert _core.explain((8, 2**20), 1, np.float32, "eval", n_threads)["workspace_bytes"] <= n_threads * 2**20
    assert _core.explain((64, 2048), 1, np.float32, "eval", 2)["plan"] == "phases"


def test_rows_are_near_in_half_of_l2_and_in_a_quarter_of_a_last_level_that_is_near(caches):
    def near(shape, dtype=np.float32):
        found = [_core.explain(shape, 1, dtype, operation, 2) for operation in ("forward", "backward")]
        assert not any(plan["packed"] for plan in found)
        return [plan["near"] for plan in found]

    caches(2**19, 2**25)
    assert near((1000, 1000)) == near((1024, 1024)) == [True, True]  # of a gradient two arrays are read
    assert near((2048, 1024)) == [True, False]  # a quarter
    assert near((2049, 1024)) == [False] * 2
    assert near((2000, 1000), np.float64) == [False] * 2
    for shape in ((2048, 1024), (64, 65536), (8192, 2048)):  # rows that displace each other are no exception
        assert near(shape) == near((shape[0], shape[1] - 16))
    caches(2**21, 480 * 2**20)  # what is far has to be asked for, but for arrays of which each takes half of L2
    assert near((8192, 2048)) == [False] * 2
    assert near((2048, 256)) == [True] * 2
    assert near((2052, 256)) == [False] * 2


def test_a_plan_says_how_rows_are_summed(caches):
    caches(2**19, 2**25)

    def words(rows, operation):
        return _core.explain((rows, 1024), 1, np.float32, operation, 2)["words"]

    assert "eight rows at a time" in words(8192, "forward")
    assert "order of memory" in words(8192, "backward")
    assert all("eight rows or all at a time" in words(64, operation) for operation in ("forward", "backward"))


def test_short_rows_from_beyond_l2_are_planned_in_the_order_of_memory(caches):
    def in_order(shape):
        operations = ("forward", "backward", "eval")
        return [_core.explain(shape, 1, np.float32, operation, 2)["in_order"] for operation in operations]

    caches(2**19, 2**25)
    assert in_order((128, 256, 14, 14)) == [True, True, False]
    assert in_order((2, 256, 14, 14)) == [False] * 3  # in L2
    assert in_order((8, 256, 128, 128)) == [False] * 3  # long: segment by segment, each a part of one
    assert in_order((20, 64, 14, 14)) == [False, True, False]  # two arrays are beyond it


def test_few_rows_of_a_gradient_are_copied_together_where_the_last_level_is_far(caches):
    def packed():
        return _core.explain((16, 65536), 1, np.float32, "backward", 2)["packed"]

    caches(2**19, 2**25)
    assert not packed()
    caches(2**21, 480 * 2**20)
    assert packed()


def test_rows_are_mapped_one_by_one_where_the_last_level_is_far(caches):
    """And where a map reads two arrays, where that pays: from there, in rows that are not of whole lines of memory."""

    def one_by_one(shape, residual=False):
        operations = ("forward", "eval", "backward")
        found = [_core.explain(shape, 1, np.float32, operation, 2, residual) for operation in operations]
        return [plan["row_by_row"] for plan in found]

    caches(2**21, 480 * 2**20)
    assert one_by_one((5000, 200)) == [True, True, True]
    assert one_by_one((5000, 256)) == [True, True, False]
    assert one_by_one((500, 200)) == [True, True, False]
    assert one_by_one((5000, 200), residual=True) == [True, True, True]
    assert one_by_one((5000, 256), residual=True) == [False, False, False]
    assert one_by_one((500, 200), residual=True) == [False, False, False]
    caches(2**20, 2**25)
    assert one_by_one((5000, 200)) == [False] * 3


@pytest.fixture(params=[False, True], ids=["together", "row by row"])
def rows_of_a_map(request):
    _core.force_plan(row_by_row=request.param)
    yield
    _core.force_plan()


@pytest.mark.usefixtures("rows_of_a_map")
@pytest.mark.parametrize("offset", [0, 1, 4, 15])
@pytest.mark.parametrize("n_columns", [16, 48, 100, 512, 1024, 1040])
def test_a_row_does_not_depend_on_the_rows_that_are_mapped_with_it(make_data, dtype, n_columns, offset):
    """Four rows share the loads of coefficients, or two where they lie a multiple of 2 KiB apart, or none."""
    data = make_data((9, n_columns), dtype)
    x, dy = (placed_at(offset, array) for array in (data.x, data.dy))
    y, mean, inv_std = F.batch_norm(x, data.gamma, data.beta)
    var = 1 / inv_std**2
    y = F.batch_norm_eval(x, mean, var, data.gamma, data.beta, out=placed_at(offset, x))
    dx = F.batch_norm_backward(dy, x, mean, inv_std, data.gamma, training=False, out=placed_at(offset, x))[0]
    for n_rows in range(1, 9):
        for first in (0, 9 - n_rows):
            rows = slice(first, first + n_rows)
            some = F.batch_norm_eval(x[rows], mean, var, data.gamma, data.beta)
            assert np.array_equal(some, y[rows])
            some = F.batch_norm_backward(dy[rows], x[rows], mean, inv_std, data.gamma, training=False)[0]
            assert np.array_equal(some, dx[rows])


def placed_at(offset, array):
    """A copy that begins so many elements behind a line of memory."""
    memory = np.empty(array.size + 64, array.dtype)
    begin = -memory.ctypes.data % 64 // array.itemsize + offset
    copy = memory[begin : begin + array.size].reshape(array.shape)
    copy[...] = array
    return copy


def random_shapes(n):
    """(N, C, ...) of rank 2 to 5, the first large enough for 16 threads."""
    rng = np.random.default_rng(50)
    for i in range(n):
        elements = 2**19 + 2**14 if i % 5 == 0 else int(2 ** rng.uniform(16, 18.5))
        inner = [(), (7, 7), (1,), (3, 5, 2), (28, 28), (2,), (49,), (4, 4), (200,)][int(rng.integers(9))]
        channels = int(2 ** rng.uniform(0, 8))
        yield (max(2, elements // (channels * int(np.prod(inner)))), channels, *inner)


@pytest.mark.parametrize("n_shapes", short_and_long(1, 50))
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_bits_do_not_depend_on_1_to_16_threads(make_data, dtype, layout, n_shapes):
    for shape in random_shapes(n_shapes):
        data = make_data(shape, dtype).placed(layout)
        found = set()
        for n_threads in range(1, 17):
            with bnfast.num_threads(n_threads):
                found.add(digest(results(*data, axis=layout.axis)))
        assert len(found) == 1, shape


def test_the_cases_are_large_enough_for_every_team():
    sizes = [int(np.prod(shape)) for shape, _, _ in CASES]
    worth = [_core.explain(shape, axis, np.float32, "forward", 1)["worth"] for shape, axis, _ in CASES]
    assert max(sizes) >= LARGEST
    assert max(worth) >= N_THREADS[-1]
    assert sum(n > 1 for n in worth) >= 25


def test_digests_see_a_single_bit(dtype):
    """The guard's guard: a digest of results that differ in one bit is another one."""
    case = CASES[-1]
    arrays = [np.array(a) for a in results(*arguments(case, dtype), axis=case[1])]
    before = digest(arrays)
    for array in arrays:
        array.reshape(-1).view(np.uint8)[-1] ^= 1
        assert digest(arrays) != before
        array.reshape(-1).view(np.uint8)[-1] ^= 1
    assert digest(arrays) == before


def at(array, offset):
    """A copy that begins `offset` elements after a multiple of 64 bytes."""
    memory = np.empty(array.size + 64, array.dtype)
    start = -memory.ctypes.data % 64 // array.itemsize + offset
    moved = memory[start : start + array.size].reshape(array.shape)
    moved[...] = array
    assert moved.ctypes.data % 64 == offset * array.itemsize % 64
    return moved


OFFSET_CASES = [
    ((5, 4, 33), 1, "C"),
    ((600, 3), 1, "C"),
    ((17, 70), 1, "C"),
    ((9, 5, 7), 1, "C"),
    ((70_000, 3), 1, "C"),
]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case_name(case)) for case in OFFSET_CASES]
    + [
        pytest.param(case, id=case_name(case), marks=pytest.mark.campaign)
        for case in CASES
        if case[1] == 1 and case[2] == "C"
    ],
)
def test_bits_do_not_depend_on_alignment(isa, dtype, case):
    x, dy, v, *parameters = arguments(case, dtype)
    expected = digest(results(x, dy, v, *parameters, axis=1))
    for offset in range(16):
        assert digest(results(*(at(a, offset) for a in (x, dy, v)), *parameters, axis=1)) == expected
        assert digest(results(at(x, offset), at(dy, 15 - offset), v, *parameters, axis=1)) == expected
        out = at(x, offset)
        assert digest([F.batch_norm(x, out=out)[0]]) == digest([F.batch_norm(x)[0]])


@pytest.mark.parametrize(
    "shape", [(3, 2, -1), (20, -1, 49), (-1, 3), (-1, 64), (-1, 67), (-1, 20, 7), (1000, -16)], ids=str
)
def test_bits_do_not_depend_on_streaming_stores(caches, isa, dtype, shape):
    """Results that would displace much of the last-level cache are written around it; those over an input are not.

    -1: as many as it takes, -16: in whole sixteens, so that blocks of columns begin where cache lines do.
    """
    last_level = 2**21
    caches(2**18, last_level)
    step = -min(shape)
    length = (last_level // 2 // np.dtype(dtype).itemsize // -np.prod(shape) + 17) * step
    x = np.random.default_rng(0).standard_normal([length if n < 0 else n for n in shape], dtype)
    assert _core.explain(x.shape, 1, dtype, "forward", 1)["stream"]
    y, mean, inv_std = F.batch_norm(x)
    dx = F.batch_norm_backward(y, x, mean, inv_std)[0]
    dy, odd = y.copy(), at(x, 3)
    assert_same_bits(F.batch_norm_backward(dy, x, mean, inv_std, out=odd)[0], dx, "dx, streamed to odd addresses")
    assert_same_bits(F.batch_norm_backward(dy, x, mean, inv_std, out=dy)[0], dx, "dx over dy")
    for n_threads in (1, 3):
        with bnfast.num_threads(n_threads):
            assert_same_bits(F.batch_norm(x, out=odd)[0], y, f"y, streamed to odd addresses by {n_threads} threads")
    assert_same_bits(F.batch_norm(x, out=x)[0], y, "y over x")


@pytest.mark.parametrize("shape", [(3, 2, -1), (20, -1, 49)], ids=str)
def test_bits_of_eval_do_not_depend_on_streaming_stores(isa, shape):
    """Planar and without a reduction: one read and one write."""
    last_level = _core.cache_bytes()[1]
    if last_level > 2**27:
        pytest.skip(f"a last-level cache of {last_level >> 20} MiB would need too much memory")
    length = last_level // 2 // 4 // -np.prod(shape) + 17
    x = np.random.default_rng(0).standard_normal([length if n < 0 else n for n in shape], np.float32)
    assert 2 * x.nbytes > last_level
    mean, var, odd = np.full(x.shape[1], 0.1), np.full(x.shape[1], 0.7), at(x, 3)
    y = F.batch_norm_eval(x, mean, var)
    assert_same_bits(F.batch_norm_eval(x, mean, var, out=odd), y, "y, streamed to odd addresses")
    assert_same_bits(F.batch_norm_eval(x, mean, var, out=x), y, "y over x")


@pytest.fixture(scope="module")
def digest_here():
    return digest_of_all()


@pytest.mark.parametrize(("isa_name", "n_threads"), [("baseline", 2), ("avx2", 1), ("avx512", 3)])
def test_a_fresh_process_gives_the_same_bits(digest_here, isa_name, n_threads):
    if isa_name not in ISAS:
        pytest.skip(f"{isa_name} is not compiled in or not on this CPU")
    run = completed([digests.__file__, "--digest"], BNFAST_ISA=isa_name, BNFAST_NUM_THREADS=str(n_threads))
    assert run.stdout.split() == [isa_name, str(n_threads), digest_here], run.stderr


@pytest.mark.campaign
def test_twenty_fresh_processes_give_the_same_bits(digest_here):
    for i in range(20):
        isa, n_threads = ISAS[i % len(ISAS)], 1 + i % 7
        run = completed(
            [digests.__file__, "--digest"], BNFAST_ISA=isa, BNFAST_NUM_THREADS=str(n_threads), PYTHONHASHSEED=str(i),
            PADDING="x" * (37 * i), MALLOC_ARENA_MAX=str(1 + i % 3), MALLOC_PERTURB_=str(i),
        )  # fmt: skip
        assert run.stdout.split() == [isa, str(n_threads), digest_here], run.stderr


@pytest.mark.parametrize("name", ["sse9", "AVX2", "avx2 "])
def test_an_unknown_instruction_set_is_an_error_at_import(name):
    run = completed("import bnfast", BNFAST_ISA=name)
    assert run.returncode != 0
    message = run.stderr.splitlines()[-1]
    assert "BNFAST_ISA" in message
    assert repr(name) in message
    for known in _core.isas():
        assert known in message


def test_an_empty_instruction_set_takes_the_widest():
    run = completed("import bnfast; print(bnfast.config()['isa'])", BNFAST_ISA="")
    assert run.stdout.split() == [ISAS[-1]], run.stderr
