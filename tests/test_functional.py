"""The functions against `bnfast.reference`, and everything that an argument may be."""

import doctest
import hashlib
import importlib
import inspect
import pkgutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from memory import leave_nan
from tolerances import (
    TABLE,
    assert_same_bits,
    check_batch_norm,
    check_batch_norm_backward,
    check_batch_norm_eval,
    check_batch_norm_jvp,
    check_moments,
)

import bnfast
from bnfast import _core, reference
from bnfast import functional as F

# --- shapes ----------------------------------------------------------------------------------------------------

RANKS = [(6, 4), (5, 3, 4), (4, 3, 5, 6), (3, 2, 3, 2, 4)]
VECTOR = [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65]  # around the widths of vectors, and the 16 terms of a lane
SHAPES = {
    "channels": [(5, n) for n in VECTOR] + [(3, n) for n in (255, 257, 1024, 1025)],  # 1024 columns at once
    "rows": [(1, 6, 2)] + [(n, 6) for n in VECTOR if n > 1],
    "inner": [(3, 4, n) for n in VECTOR],
    "columns": [(9, 4, n) for n in range(2, 16)],  # short runs, taken as columns
    "columns_folded": [(300, 2, 3), (131, 1, 1, 2), (517, 3, 5)],
    "fold": [(n, c) for c in (1, 2, 3, 5) for n in (128, 1024, 1031)],  # 1031 leaves rows over
    "segments": [(2, 3, n) for n in (4095, 4096, 4097, 16383, 16384, 16385, 32769)] + [(18, 3, 1000), (300, 2, 60)],
    "segments_of_rows": [(n, 70) for n in (255, 256, 257, 513)] + [(8300, 5), (600, 9, 8)],
}
ALL_SHAPES = [
    pytest.param(shape, id=f"{kind}-{'x'.join(map(str, shape))}") for kind, shapes in SHAPES.items() for shape in shapes
]


@pytest.fixture(params=ALL_SHAPES)
def planar(request, make_data, isa, dtype):
    """Data of one shape, NCHW; with 1 inner element that is interleaved already."""
    return make_data(request.param, dtype)


@pytest.fixture(params=RANKS, ids=lambda shape: f"{len(shape)}d")
def placed(request, make_data, isa, dtype, layout):
    """(data, axis) for every rank and layout."""
    return make_data(request.param, dtype).placed(layout), layout.axis


def statistics(data, axis=1):
    """mean, var, inv_std as bnfast gives them."""
    m = bnfast.moments(data.x, axis=axis)
    return m.mean, m.var(), 1 / np.sqrt(m.var() + 1e-5)


def check_all(data, axis=1):
    """Every function with every argument against the oracle."""
    x, dy, v, gamma, beta, vgamma, vbeta = data
    check_moments(bnfast.moments(x, axis=axis), x, axis=axis)
    check_batch_norm(F.batch_norm(x, gamma, beta, axis=axis), x, gamma, beta, axis=axis)
    mean, var, inv_std = statistics(data, axis)
    y = F.batch_norm_eval(x, mean, var, gamma, beta, axis=axis)
    check_batch_norm_eval(y, x, mean, var, gamma, beta, axis=axis)
    for training in (True, False):
        gradients = F.batch_norm_backward(dy, x, mean, inv_std, gamma, axis=axis, training=training)
        check_batch_norm_backward(gradients, dy, x, mean, inv_std, gamma, axis=axis, training=training)
    derivative = F.batch_norm_jvp(v, x, mean, inv_std, gamma, axis=axis, vgamma=vgamma, vbeta=vbeta)
    check_batch_norm_jvp(derivative, v, x, mean, inv_std, gamma, axis=axis, vgamma=vgamma, vbeta=vbeta)


# --- against the oracle ----------------------------------------------------------------------------------------


def test_moments_are_the_oracles(planar):
    check_moments(bnfast.moments(planar.x), planar.x)


def test_batch_norm_is_the_oracles(planar):
    x, gamma, beta = planar.x, planar.gamma, planar.beta
    check_batch_norm(F.batch_norm(x, gamma, beta), x, gamma, beta)


def test_batch_norm_eval_is_the_oracles(planar):
    x, gamma, beta, (mean, var, _) = planar.x, planar.gamma, planar.beta, statistics(planar)
    mean, var = mean + 0.3 * np.sqrt(var), 1.5 * var + 0.01  # running statistics are not the batch's
    check_batch_norm_eval(F.batch_norm_eval(x, mean, var, gamma, beta), x, mean, var, gamma, beta)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("channel", [0, 127, 128, 255, 256, 299])
def test_a_variance_that_cannot_be_divided_by_is_found_in_any_channel(channel, dtype):
    mean, var = np.zeros(300, dtype), np.ones(300, dtype)
    F.batch_norm_eval(np.ones((2, 300)), mean, var)
    var[channel] = np.nan
    with pytest.raises(ValueError, match=f"var: expected finite values .* nan in channel {channel} "):
        F.batch_norm_eval(np.ones((2, 300)), mean, var)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_batch_norm_backward_is_the_oracles(planar, training):
    x, dy, gamma, (mean, _, inv_std) = planar.x, planar.dy, planar.gamma, statistics(planar)
    result = F.batch_norm_backward(dy, x, mean, inv_std, gamma, training=training)
    check_batch_norm_backward(result, dy, x, mean, inv_std, gamma, training=training)


def test_batch_norm_jvp_is_the_oracles(planar):
    x, v, gamma, (mean, _, inv_std) = planar.x, planar.v, planar.gamma, statistics(planar)
    directions = {"vgamma": planar.vgamma, "vbeta": planar.vbeta}
    result = F.batch_norm_jvp(v, x, mean, inv_std, gamma, **directions)
    check_batch_norm_jvp(result, v, x, mean, inv_std, gamma, **directions)


def test_every_rank_and_layout_is_the_oracles(placed):
    check_all(*placed)


@pytest.mark.parametrize("shape", [(11, 5), (4, 3, 30)], ids=["interleaved", "planar"])
def test_parameters_left_out_are_ones_and_zeros(make_data, dtype, shape):
    data = make_data(shape, dtype)
    check_all(data._replace(gamma=None, beta=None, vgamma=None, vbeta=None))
    check_all(data._replace(gamma=None, vbeta=None))
    check_all(data._replace(beta=None, vgamma=None))


@pytest.mark.parametrize("shape", [(11, 5), (4, 3, 30)], ids=["interleaved", "planar"])
def test_parameters_may_have_either_dtype(make_data, dtype, shape):
    data = make_data(shape, dtype)
    other = np.float64 if dtype == np.float32 else np.float32
    check_all(data._replace(**{name: getattr(data, name).astype(other) for name in data._fields[3:]}))


@pytest.mark.parametrize("eps", [1e-12, 1e-3, 7.0])
def test_eps_is_inside_the_root(make_data, dtype, eps):
    x, gamma, beta = make_data((6, 4, 9), dtype).x, [1.0, -2, 3, 0], [0.0, 1, 2, 3]
    check_batch_norm(F.batch_norm(x, gamma, beta, eps=eps), x, gamma, beta, eps=eps)
    m = bnfast.moments(x)
    y = F.batch_norm_eval(x, m.mean, m.var(), gamma, beta, eps=eps)
    check_batch_norm_eval(y, x, m.mean, m.var(), gamma, beta, eps=eps)


def test_one_row_is_enough_for_eval(make_data, isa, dtype):
    for n in VECTOR:
        x, _, _, gamma, beta, mean, var = make_data((1, n), dtype)
        check_batch_norm_eval(F.batch_norm_eval(x, mean, var**2, gamma, beta), x, mean, var**2, gamma, beta)


@given(
    shape=st.tuples(st.integers(2, 300), st.integers(1, 40), st.integers(1, 40)),
    name=st.sampled_from([name for name, (_, supported) in _core.isas().items() if supported]),
    double=st.booleans(),
)
def test_any_shape_is_the_oracles(make_data, shape, name, double):
    before = _core.isa()
    _core.select_isa(name)
    try:
        check_all(make_data(shape, np.float64 if double else np.float32))
    finally:
        _core.select_isa(before)


def test_eval_backward_keeps_the_sign_of_zero(dtype):
    dy = np.array([[-0.0, 0.0, 1.0]], dtype)
    x, mean, inv_std = np.ones_like(dy), np.zeros(3), np.ones(3)
    assert_same_bits(F.batch_norm_backward(dy, x, mean, inv_std, training=False)[0], dy)


def test_jvp_is_the_adjoint_of_backward(make_data, isa, layout, dtype):
    """<dy, J v> = <J' dy, v>: rounding apart, for every layout and dtype, in training mode."""
    for shape in [(40, 3), (8, 3, 7), (6, 5, 40), (3, 2, 2, 3, 4)]:
        data, axis = make_data(shape, dtype).placed(layout), layout.axis
        x, dy, v, gamma, _, vgamma, vbeta = data
        mean, _, inv_std = statistics(data, axis)
        jv = F.batch_norm_jvp(v, x, mean, inv_std, gamma, axis=axis, vgamma=vgamma, vbeta=vbeta)
        dx, dgamma, dbeta = F.batch_norm_backward(dy, x, mean, inv_std, gamma, axis=axis)
        assert jv.dtype == dx.dtype == dtype
        pairs = [(dy, jv), (dx, v), (dgamma, vgamma), (dbeta, vbeta)]
        forward, *backward = (np.multiply(a, b, dtype=np.float64).sum() for a, b in pairs)
        size = sum(np.linalg.norm(a) * np.linalg.norm(b) for a, b in pairs)
        assert abs(forward - sum(backward)) <= TABLE[np.dtype(dtype).name].dx * size


# --- empty batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (5, 3, 0), (4, 0), (0, 0)])
def test_empty_batch_in_eval_gives_empty_results_and_zero_gradients(dtype, shape):
    x, zeros, ones = np.empty(shape, dtype), np.zeros(shape[1]), np.ones(shape[1])
    y = F.batch_norm_eval(x, zeros, ones, ones, zeros)
    assert_same_bits(y, x)
    assert F.batch_norm_eval(x, zeros, ones, out=y) is y
    leave_nan(shape[1], dtype)
    dx, dgamma, dbeta = F.batch_norm_backward(x, x, zeros, ones, training=False)
    assert_same_bits(dx, x)
    for gradient in (dgamma, dbeta):
        assert_same_bits(gradient, zeros.astype(dtype))


def test_what_is_not_finite_does_not_spread_where_statistics_are_given():
    """dx is gamma * inv_std * dy, whatever x is; in the oracle, too."""
    x = np.array([[np.inf, np.nan], [1.0, 2.0]])
    for functions in (F, bnfast.reference):
        dx, dgamma, _ = functions.batch_norm_backward(np.ones((2, 2)), x, [0.0, 0.0], [2.0, 3.0], training=False)
        np.testing.assert_array_equal(dx, [[2.0, 3.0], [2.0, 3.0]])
        assert not np.isfinite(dgamma).any()


def test_an_empty_byte_swapped_batch_gives_native_results(dtype):
    x = np.empty((0, 3), np.dtype(dtype).newbyteorder())
    assert F.batch_norm_eval(x, np.zeros(3), np.ones(3)).dtype.isnative
    for gradient in F.batch_norm_backward(x, x, np.zeros(3), np.ones(3), training=False):
        assert gradient.dtype.isnative


def test_moments_of_nothing_have_count_zero(dtype):
    m = bnfast.moments(np.empty((0, 3), dtype))
    assert m == bnfast.Moments(0, np.zeros(3), np.zeros(3))


def test_no_channels_give_empty_results(dtype):
    x = np.empty((4, 0), dtype)
    assert [result.shape for result in F.batch_norm(x)] == [(4, 0), (0,), (0,)]
    assert [result.shape for result in F.batch_norm_backward(x, x, [], [])] == [(4, 0), (0,), (0,)]


# --- views: what memory may look like --------------------------------------------------------------------------


class Subclass(np.ndarray):
    pass


def with_gaps(x, folder):
    wider = np.zeros(tuple(2 * n + 1 for n in x.shape), x.dtype)
    view = wider[tuple(slice(1, None, 2) for _ in x.shape)]
    view[...] = x
    return view


def negative_strides(x, folder):
    reverse = tuple(slice(None, None, -1) for _ in x.shape)
    return x[reverse].copy()[reverse]


def byte_swapped(x, folder):
    return x.astype(x.dtype.newbyteorder())


def misaligned(x, folder):
    view = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(x.shape)
    view[...] = x
    assert not view.flags.aligned
    return view


def read_only(x, folder):
    x.flags.writeable = False
    return x


def memory_map(x, folder):
    path = folder / str(len(list(folder.iterdir())))
    x.tofile(path)
    return np.memmap(path, x.dtype, "r", shape=x.shape)


def subclass(x, folder):
    return x.view(Subclass)


def memory_of(array):
    """The array that owns the memory a view looks at."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def digest(*arrays):
    return hashlib.sha256(b"".join(memory_of(array).tobytes() for array in arrays)).digest()


def native(x):
    """A contiguous native copy in K order: what every view is compared with."""
    return np.array(x, x.dtype.newbyteorder("="), order="K", copy=True, subok=False)


def assert_in_order_of(result, x):
    """Strides as numpy.empty_like(order="K") gives them, where an axis is longer than 1."""
    model = np.empty_like(x, order="K", subok=False)
    for length, stride, expected in zip(x.shape, result.strides, model.strides, strict=True):
        assert length == 1 or x.size == 0 or stride == expected, f"strides {result.strides}, not {model.strides}"


def all_results(x, dy, v, gamma, beta, vgamma, vbeta, axis=1):
    """name -> array, of every function; those like x are called y, y_eval, dx, dx_eval, jvp."""
    results = {}
    results["y"], mean, inv_std = F.batch_norm(x, gamma, beta, axis=axis)
    m = bnfast.moments(x, axis=axis)
    results |= {"mean": mean, "inv_std": inv_std, "moments.mean": m.mean, "moments.m2": m.m2}
    results["y_eval"] = F.batch_norm_eval(x, mean, m.var(), gamma, beta, axis=axis)
    for suffix, training in (("", True), ("_eval", False)):
        gradients = F.batch_norm_backward(dy, x, mean, inv_std, gamma, axis=axis, training=training)
        results |= {name + suffix: a for name, a in zip(("dx", "dgamma", "dbeta"), gradients, strict=True)}
    results["jvp"] = F.batch_norm_jvp(v, x, mean, inv_std, gamma, axis=axis, vgamma=vgamma, vbeta=vbeta)
    return results


def assert_as_contiguous(arguments, axis=1):
    """Bits as from contiguous copies; order as x's; plain, new, native arrays; arguments untouched."""
    x = arguments[0]
    before = digest(*arguments)
    results = all_results(*arguments, axis=axis)
    assert digest(*arguments) == before, "an argument was modified"
    for name, expected in all_results(*map(native, arguments), axis=axis).items():
        result = results[name]
        assert_same_bits(result, expected, name)
        assert type(result) is np.ndarray
        assert result.dtype.isnative
        if name in ("y", "y_eval", "dx", "dx_eval", "jvp"):
            assert_in_order_of(result, x)
            assert not any(np.may_share_memory(result, argument) for argument in arguments), name


PARAMETER_VIEWS = [with_gaps, negative_strides, byte_swapped, misaligned, read_only, memory_map, subclass]


@pytest.mark.parametrize("view", PARAMETER_VIEWS, ids=lambda view: view.__name__)
def test_parameters_may_be_any_view(make_data, dtype, tmp_path, view):
    x, dy, v, *parameters = make_data((7, 5, 3), dtype)
    assert_as_contiguous([x, dy, v, *(view(parameter, tmp_path) for parameter in parameters)])
    statistics = [abs(parameter) for parameter in parameters]
    expected = F.batch_norm_eval(x, *statistics)
    assert_same_bits(F.batch_norm_eval(x, *(view(s, tmp_path) for s in statistics)), expected)
    expected = F.batch_norm_backward(dy, x, *statistics[:2])
    for a, b in zip(F.batch_norm_backward(dy, x, *(view(s, tmp_path) for s in statistics[:2])), expected, strict=True):
        assert_same_bits(a, b)


def test_lists_are_float64_arrays():
    x, dy = [[1.0, 2.0], [3.0, 5.0]], [[1.0, 0.0], [0.0, 0.5]]
    arrays = all_results(*map(np.array, (x, dy, dy, [2.0, 3.0], [0.0, 1.0], [1.0, 1.0], [0.0, 2.0])))
    lists = all_results(x, dy, dy, [2.0, 3.0], [0.0, 1.0], [1.0, 1.0], [0.0, 2.0])
    for name, expected in arrays.items():
        assert_same_bits(lists[name], expected, name)


class HasArray:
    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return np.array(self.array, dtype, copy=copy)


def test_objects_with_array_method_are_accepted(make_data, dtype):
    data = make_data((6, 4, 3), dtype)
    objects = all_results(*map(HasArray, data))
    for name, expected in all_results(*data).items():
        assert_same_bits(objects[name], expected, name)


# --- out= ------------------------------------------------------------------------------------------------------


def call_batch_norm(x, u, p, **kwargs):
    return F.batch_norm(x, p["gamma"], p["beta"], **kwargs)


def call_batch_norm_eval(x, u, p, **kwargs):
    return (F.batch_norm_eval(x, p["mean"], p["var"], p["gamma"], p["beta"], **kwargs),)


def call_backward(x, u, p, **kwargs):
    return F.batch_norm_backward(u, x, p["mean"], p["inv_std"], p["gamma"], **kwargs)


def call_backward_eval(x, u, p, **kwargs):
    return F.batch_norm_backward(u, x, p["mean"], p["inv_std"], p["gamma"], training=False, **kwargs)


def call_jvp(x, u, p, **kwargs):
    directions = {"vgamma": p["vgamma"], "vbeta": p["vbeta"]}
    return (F.batch_norm_jvp(u, x, p["mean"], p["inv_std"], p["gamma"], **directions, **kwargs),)


# Each takes x, u (dy or v) and a dict of parameters; the first of what it returns is what `out` receives.
CALLS = {
    call_batch_norm: ["gamma", "beta"],
    call_batch_norm_eval: ["mean", "var", "gamma", "beta"],
    call_backward: ["mean", "inv_std", "gamma"],
    call_backward_eval: ["mean", "inv_std", "gamma"],
    call_jvp: ["mean", "inv_std", "gamma", "vgamma", "vbeta"],
}
CALLS_WITH_U = list(CALLS)[2:]


def call_name(call):
    return call.__name__.removeprefix("call_")


every_call = pytest.mark.parametrize("call", CALLS, ids=call_name)
every_call_with_u = pytest.mark.parametrize("call", CALLS_WITH_U, ids=call_name)


def parameters_of(data, axis=1):
    mean, var, inv_std = statistics(data, axis)
    named = {name: getattr(data, name) for name in ("gamma", "beta", "vgamma", "vbeta")}
    return {"mean": mean, "var": var, "inv_std": inv_std, **named}


def assert_out(call, x, u, parameters, out, **kwargs):
    """call(out=out) writes there what it would return, returns `out`, and gives the same other results."""
    copies = native(x), native(u), {name: parameter.copy() for name, parameter in parameters.items()}
    expected = call(*copies, **kwargs)
    results = call(x, u, parameters, out=out, **kwargs)
    assert results[0] is out
    for result, other in zip(results, expected, strict=True):
        assert_same_bits(np.asarray(result), other)


@every_call
def test_out_receives_the_same_bits(make_data, isa, dtype, layout, call):
    for shape in [(9, 5), (300, 3), (7, 3, 4), (4, 3, 5, 6)]:
        data = make_data(shape, dtype).placed(layout)
        out = np.full_like(data.x, np.nan)
        assert_out(call, data.x, data.dy, parameters_of(data, layout.axis), out, axis=layout.axis)


@every_call
def test_out_may_be_x(make_data, isa, dtype, layout, call):
    for shape in [(9, 5), (300, 3), (7, 3, 4), (4, 3, 5, 6)]:
        data = make_data(shape, dtype).placed(layout)
        x = data.x.copy(order="K")
        assert_out(call, x, data.dy, parameters_of(data, layout.axis), x, axis=layout.axis)


@every_call_with_u
def test_out_may_be_dy(make_data, isa, dtype, layout, call):
    for shape in [(9, 5), (300, 3), (7, 3, 4), (4, 3, 5, 6)]:
        data = make_data(shape, dtype).placed(layout)
        dy = data.dy.copy(order="K")
        assert_out(call, data.x, dy, parameters_of(data, layout.axis), dy, axis=layout.axis)


@every_call
@pytest.mark.parametrize("view", [with_gaps, negative_strides, misaligned, subclass], ids=lambda view: view.__name__)
def test_out_may_be_x_whatever_its_memory(make_data, dtype, tmp_path, call, view):
    data = make_data((4, 3, 5, 6), dtype)
    x, dy = view(data.x.copy(), tmp_path), view(data.dy.copy(), tmp_path)
    assert_out(call, x, data.dy, parameters_of(data), x)
    if call in CALLS_WITH_U:
        assert_out(call, data.x, dy, parameters_of(data), dy)


@every_call
@pytest.mark.parametrize("offset", [1, 17, 60, -1, -59])
def test_out_may_overlap_an_input_partly(make_data, isa, dtype, call, offset):
    data = make_data((6, 4, 10), dtype)
    for name in ("x", "dy"):
        memory = np.zeros(data.x.size + abs(offset), dtype)
        first, second = memory[: data.x.size].reshape(data.x.shape), memory[abs(offset) :].reshape(data.x.shape)
        given, out = (first, second) if offset > 0 else (second, first)
        given[...] = getattr(data, name)
        arrays = {"x": data.x, "dy": data.dy, name: given}
        assert_out(call, arrays["x"], arrays["dy"], parameters_of(data), out)


def between_guards(array, guard):
    """(copy of a C-contiguous array, the memory before and after it, filled with `guard`)."""
    memory = np.full(array.size + 128, guard, array.dtype)
    memory[64:-64] = array.reshape(-1)
    return memory[64:-64].reshape(array.shape), memory[:64], memory[-64:]


def test_nothing_beside_the_arrays_is_read_or_written(planar):
    x, u, parameters = planar.x, planar.dy, parameters_of(planar)
    for call in CALLS:
        guarded_x, *_ = between_guards(x, np.nan)
        guarded_u, *_ = between_guards(u, np.nan)
        out, before, after = between_guards(x, 77)
        assert_out(call, guarded_x, guarded_u, parameters, out)
        assert (before == 77).all()
        assert (after == 77).all()


@pytest.mark.parametrize(
    ("call", "name"),
    [pytest.param(call, name, id=f"{call_name(call)}-{name}") for call, names in CALLS.items() for name in names],
)
@pytest.mark.parametrize("shape", [(40, 5), (2, 6, 40_000), (400, 600)], ids=["small", "planar", "interleaved"])
def test_out_may_overlap_a_parameter(make_data, dtype, shape, call, name):
    """The larger ones are written block by block, while the parameters of later blocks are still to be read."""
    data = make_data(shape, dtype)
    n = shape[1]
    parameters = {key: parameter.astype(dtype) for key, parameter in parameters_of(data).items()}
    for place in (slice(n), slice(-n, None), slice(n // 2, n // 2 + n), slice(3, 3 + 2 * n, 2)):
        out = np.empty_like(data.x)
        inside = out.reshape(-1)[place]
        inside[...] = parameters[name]
        assert_out(call, data.x, data.dy, {**parameters, name: inside}, out)


@settings(max_examples=200)
@given(data=st.data(), call=st.sampled_from(list(CALLS)), seed=st.integers(0, 2**32 - 1))
def test_any_overlap_gives_the_bits_without(data, call, seed):
    shape = data.draw(st.lists(st.integers(2, 5), min_size=2, max_size=4))
    size = int(np.prod(shape))
    memory = np.random.default_rng(seed).normal(size=2 * size)
    arrays = []
    for _ in range(3):
        start, order = data.draw(st.integers(0, size)), data.draw(st.permutations(range(len(shape))))
        dense = memory[start : start + size].reshape([shape[i] for i in order]).transpose(np.argsort(order))
        arrays.append(dense[tuple(slice(None, None, data.draw(st.sampled_from([1, -1]))) for _ in shape)])
    x, u, out = arrays
    starts = data.draw(st.lists(st.integers(0, 2 * size - shape[1]), min_size=7, max_size=7))
    names = ("mean", "var", "inv_std", "gamma", "beta", "vgamma", "vbeta")
    parameters = {name: memory[i : i + shape[1]] for name, i in zip(names, starts, strict=True)}
    parameters["var"] = abs(parameters["var"])
    assert_out(call, x, u, parameters, out)


# --- the twin, and the documentation ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*F.__all__, "moments"])
def test_reference_has_the_same_signatures(name):
    def without_types(function):
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    public = bnfast.moments if name == "moments" else getattr(F, name)
    assert without_types(getattr(reference, name)) == without_types(public)


def test_reference_has_every_function():
    assert set(reference.__all__) == {*F.__all__, "moments"}


def test_reference_writes_into_out(make_data):
    data = make_data((5, 3), np.float64)
    for call in CALLS:
        x, u, parameters = data.x, data.dy, parameters_of(data)
        out = np.empty_like(x)
        with pytest.MonkeyPatch.context() as patch:
            for name in F.__all__:
                patch.setattr(F, name, getattr(reference, name))
            assert_out(call, x, u, parameters, out)


EXTRAS = {"bnfast.dask": "dask", "bnfast.torch": "torch"}  # modules for those who have a package of this name
PUBLIC = ["bnfast", *(f"bnfast.{m.name}" for m in pkgutil.iter_modules(bnfast.__path__) if not m.name.startswith("_"))]


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_in_docstrings_are_right(name):
    if name in EXTRAS:
        pytest.importorskip(EXTRAS[name], reason=f"{name} is for those who have {EXTRAS[name]}, which is not installed")
    module = importlib.import_module(name)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    report = []
    for example in doctest.DocTestFinder(exclude_empty=True).find(module, name):
        runner.run(example, out=report.append)
    assert not runner.failures, "".join(report)


def test_every_function_has_an_example():
    for function in [getattr(F, name) for name in F.__all__] + [bnfast.moments, bnfast.Moments, bnfast.BatchNorm]:
        assert ">>> " in inspect.getdoc(function), function
