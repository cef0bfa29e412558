"""An activation and a residual in the pass of batch normalisation: the bits of one step after another.

What the steps alone are is in test_functional.py; layers are in test_layer_fused.py, masks in test_masks.py.
"""

import numpy as np
import pytest
from activations import ACTIVATIONS, LIKE_X, SLOPE, Batch, batch, fused, one_after_another, passed, rectified
from digests import case_name
from layouts import LAYOUTS
from tolerances import (
    TABLE,
    assert_same_bits,
    assert_within,
    check_batch_norm_backward,
    largest_share,
    variance_bound,
    wide,
)

import bnfast
from bnfast import functional as F
from bnfast import reference

# (shape, axis, memory order): planar with long, short and very short rows; columns; interleaved narrow and wide
SMALL = [
    ((3, 4, 130), 1, "C"),
    ((6, 5, 17), 1, "C"),
    ((2, 3, 4, 4), 1, "C"),
    ((9, 4, 3), 1, "C"),
    ((5, 9, 8, 3), -1, "C"),
    ((37, 3), 1, "C"),
    ((11, 70), 1, "C"),
    ((2, 1), 1, "C"),
    ((5, 70), 0, "C"),
    ((30, 4), 1, "F"),
    ((7, 3, 5, 6), 2, "F"),
]
# large enough for two threads, and for segments that are merged
LARGE = [
    ((4, 3, 5500), 1, "C"),
    ((8, 32, 17, 16), 1, "C"),
    ((2800, 8, 3), 1, "C"),
    ((22_000, 3), 1, "C"),
    ((1000, 70), 1, "C"),
    ((260, 256), 1, "C"),
]
COMBINATIONS = [(activation, residual) for activation in ACTIVATIONS for residual in (False, True)][1:]


def small(case, dtype):
    shape, axis, order = case
    return batch(shape, dtype, axis, order)


def assert_all_same_bits(found, expected, what=""):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert_same_bits(found[name], array, f"{name} {what}")


# --- the bits of the steps one after another -------------------------------------------------------------------


@pytest.mark.parametrize("case", SMALL, ids=case_name)
def test_fused_has_the_bits_of_the_steps(case, isa, dtype):
    data = small(case, dtype)
    for combination in COMBINATIONS:
        assert_all_same_bits(fused(data, *combination), one_after_another(data, *combination), combination)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65])
def test_every_tail_of_a_vector_has_the_bits_of_the_steps(isa, dtype, length):
    for shape in ((5, length), (3, 2, length)):
        data = batch(shape, dtype)
        for combination in (("relu", True), ("leaky_relu", False), ("relu6", True)):
            assert_all_same_bits(fused(data, *combination), one_after_another(data, *combination), combination)


PLANS = [
    {},
    {"kind": "phases", "near": True, "stream": True},
    {"kind": "phases", "near": False, "stream": False},
    {"kind": "blocks", "pack": True, "stream": True},
    {"kind": "blocks", "pack": False, "near": True, "written_later": True},
    {"kind": "blocks", "written_later": False, "stream": True},
]


@pytest.mark.parametrize("case", LARGE, ids=case_name)
def test_bits_depend_on_no_plan_and_no_number_of_threads(case, dtype, force_plan):
    data = small(case, dtype)
    for combination in ((None, True), ("relu", False), ("leaky_relu", True)):
        expected = one_after_another(data, *combination)
        for plan in PLANS:
            force_plan(**plan)
            for n_threads in (2,) if plan else (1, 2):
                with bnfast.num_threads(n_threads):
                    assert_all_same_bits(fused(data, *combination), expected, (combination, plan, n_threads))
        force_plan()


# --- where results are written ---------------------------------------------------------------------------------


def options_of(data, activation, with_residual, **more):
    residual = data.residual if with_residual else None
    return {
        "axis": data.axis, "residual": residual, "activation": activation, "negative_slope": SLOPE, **more
    }  # fmt: skip


def statistics(data):
    m = bnfast.moments(data.x, axis=data.axis)
    return m.mean, m.var(), 1 / np.sqrt(m.var() + 1e-5)


def forward(data, **options):
    return F.batch_norm(data.x, data.gamma, data.beta, **options)


def forward_eval(data, **options):
    mean, var, _ = statistics(data)
    return (F.batch_norm_eval(data.x, mean, var, data.gamma, data.beta, **options),)


def backward(data, training=True, **options):
    mean, _, inv_std = statistics(data)
    return F.batch_norm_backward(
        data.dy, data.x, mean, inv_std, data.gamma, beta=data.beta, training=training, **options
    )


def backward_eval(data, **options):
    return backward(data, training=False, **options)


def apply(data, **options):
    mean, _, inv_std = statistics(data)
    given = data.dy, data.x, mean, inv_std, data.gamma
    wholes = {name: option for name, option in options.items() if name not in ("out", "out_residual")}
    sums = F.batch_norm_backward_sums(*given, beta=data.beta, **wholes)
    found = F.batch_norm_backward_apply(*given, sums, beta=data.beta, **options)
    return found if isinstance(found, tuple) else (found,)


def jvp(data, **options):
    mean, _, inv_std = statistics(data)
    directions = {"vgamma": data.vgamma, "vbeta": data.vbeta}
    return (F.batch_norm_jvp(data.v, data.x, mean, inv_std, data.gamma, beta=data.beta, **directions, **options),)


FORWARDS, BACKWARDS = (forward, forward_eval), (backward, backward_eval, apply)
every_plan = pytest.mark.parametrize("plan", PLANS, ids=lambda plan: "-".join(map(str, plan.values())) or "usual")
IN_PLACE = [((8, 6, 300), 1, "C"), ((9, 4, 3), 1, "C"), ((520, 70), 1, "C"), ((40, 3), 1, "C")]


def copied(data):
    """The same in memory of its own."""
    return data.map(lambda array: array.copy(order="K"))


@every_plan
@pytest.mark.parametrize("case", IN_PLACE, ids=case_name)
@pytest.mark.parametrize("call", [*FORWARDS, *BACKWARDS, jvp], ids=lambda call: call.__name__)
def test_out_may_be_any_of_the_arrays(call, case, dtype, plan, force_plan):
    force_plan(**plan)
    data = small(case, dtype)
    for activation, with_residual in COMBINATIONS:
        expected = call(data, **options_of(data, activation, with_residual))
        for name in ("x", *(["residual"] if with_residual else []), *(["dy"] if call in BACKWARDS else [])):
            mine = copied(data)
            out = getattr(mine, name)
            found = call(mine, **options_of(mine, activation, with_residual, out=out))
            assert found[0] is out
            for i, array in enumerate(expected):
                assert_same_bits(found[i], array, f"{i} of {activation}, out is {name}")


@every_plan
@pytest.mark.parametrize("case", IN_PLACE, ids=case_name)
@pytest.mark.parametrize("call", BACKWARDS, ids=lambda call: call.__name__)
def test_out_residual_may_be_any_of_the_arrays(call, case, dtype, plan, force_plan):
    """And `out` another one."""
    force_plan(**plan)
    data = small(case, dtype)
    for activation in (None, "relu", "leaky_relu"):
        expected = call(data, **options_of(data, activation, True))
        for name, other in (
            ("dy", None),
            ("residual", None),
            ("x", None),
            ("dy", "x"),
            ("residual", "dy"),
            ("x", "dy"),
        ):
            mine = copied(data)
            outs = {"out_residual": getattr(mine, name), "out": None if other is None else getattr(mine, other)}
            found = call(mine, **options_of(mine, activation, True, **outs))
            assert found[-1] is outs["out_residual"]
            assert other is None or found[0] is outs["out"]
            for i, array in enumerate(expected):
                assert_same_bits(found[i], array, f"{i} of {activation}, out_residual is {name}, out {other}")


@pytest.mark.parametrize("call", [*FORWARDS, *BACKWARDS], ids=lambda call: call.__name__)
@pytest.mark.parametrize("shift", [1, 40])
def test_results_may_overlap_what_they_are_made_of(call, dtype, shift):
    data = batch((6, 5, 20), dtype)
    size = data.x.size
    for activation in (None, "relu"):
        expected = call(data, **options_of(data, activation, True))
        for name in ("x", "residual", "dy"):
            for target in ("out", "out_residual") if call in BACKWARDS else ("out",):
                memory = np.zeros(size + shift, dtype)
                memory[:size] = getattr(data, name).ravel()
                mine = data._replace(**{name: memory[:size].reshape(data.x.shape)})
                out = memory[shift:].reshape(data.x.shape)
                found = call(mine, **options_of(mine, activation, True, **{target: out}))
                assert found[0 if target == "out" else -1] is out
                for i, array in enumerate(expected):
                    assert_same_bits(found[i], array, f"{i} of {activation}, {target} over {name}")


@pytest.mark.parametrize("where", ["out", "out_residual"])
def test_results_may_lie_over_what_is_given_a_channel(where, dtype):
    data = batch((6, 5), dtype)
    mean, _, inv_std = statistics(data)
    names = ("mean", "inv_std", "gamma", "dgamma", "dbeta")
    wide = data.gamma.astype(np.float64)
    sums = F.batch_norm_backward_sums(data.dy, data.x, mean, inv_std, wide)
    given = dict(zip(names, (mean, inv_std, wide, sums.dgamma, sums.dbeta), strict=True))

    one = data.dy, data.x, mean, inv_std, wide
    whole = F.batch_norm_backward(*one, residual=data.residual)
    applied = F.batch_norm_backward_apply(*one, sums, residual=data.residual)
    for name in names:
        memory = np.zeros(6 * 5 * 8, np.uint8)
        over = memory[: 5 * 8].view(np.float64)
        over[:] = given[name]
        place = memory[: data.x.nbytes].view(dtype).reshape(data.x.shape)
        if name.startswith("d"):
            parts = F.Sums(sums.count, *(over if name == n else given[n] for n in ("dgamma", "dbeta")))
            found = F.batch_norm_backward_apply(*one, parts, residual=data.residual, **{where: place})
            wanted = applied
        else:
            mine = (over if n == name else a for n, a in zip(("", "", *names[:3]), one, strict=True))
            found, wanted = F.batch_norm_backward(*mine, residual=data.residual, **{where: place}), whole
        for a, b in zip(found, wanted, strict=True):
            assert_same_bits(a, b, f"{where} over {name}")


def test_results_in_one_array_do_not_disturb_each_other(dtype):
    """dx and dresidual side by side, element by element."""
    data = batch((6, 5, 20), dtype)
    expected = backward(data, **options_of(data, "relu", True))
    both = np.zeros((*data.x.shape, 2), dtype)
    found = backward(data, **options_of(data, "relu", True, out=both[..., 0], out_residual=both[..., 1]))
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(one, other)


def test_inputs_are_not_modified(dtype):
    for shape in ((6, 5, 40), (40, 5), (9, 4, 3)):
        data = batch(shape, dtype)
        before = copied(data)
        for combination in COMBINATIONS:
            fused(data, *combination)
            for name in Batch._fields[:-1]:
                assert_same_bits(getattr(data, name), getattr(before, name), name)


# --- how a residual and dy may lie -----------------------------------------------------------------------------


def with_gaps(array):
    wider = np.full(tuple(2 * n for n in array.shape), 7, array.dtype)
    wider[tuple(slice(None, None, 2) for _ in array.shape)] = array
    return wider[tuple(slice(None, None, 2) for _ in array.shape)]


def backwards(array):
    reverse = (slice(None, None, -1),) * array.ndim
    return np.ascontiguousarray(array[reverse])[reverse]


def byte_swapped(array):
    return array.astype(array.dtype.newbyteorder())


def misaligned(array):
    memory = np.zeros(array.nbytes + 1, np.uint8)[1:].view(array.dtype).reshape(array.shape)
    memory[...] = array
    return memory


def read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


VIEWS = [np.asfortranarray, with_gaps, backwards, byte_swapped, misaligned, read_only]
VIEWS += [layout.place for name, layout in LAYOUTS.items() if name == "channels_last_view"]


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.__name__)
@pytest.mark.parametrize("names", [("residual",), ("dy",), ("x",), LIKE_X], ids=lambda names: "-".join(names))
def test_arrays_may_lie_in_any_way(view, names, dtype):
    data = batch((6, 5, 4, 9), dtype)
    strange = data._replace(**{name: view(getattr(data, name)) for name in names})
    for combination in ((None, True), ("relu", True), ("leaky_relu", False)):
        assert_same = fused(strange, *combination)
        if "x" in names and view in (np.asfortranarray, VIEWS[-1]):  # another order of summation
            expected = fused(data.map(view), *combination)
        else:
            expected = fused(data, *combination)
        assert_all_same_bits(assert_same, expected, combination)


@pytest.mark.parametrize("along", [0, 1, 2, (0, 2), (0, 1, 2)], ids=str)
def test_a_residual_may_be_broadcast(along, dtype, isa):
    """Strides of 0, as of one row for all, or of one value a channel; dy likewise, as of a sum."""
    data = batch((6, 5, 40), dtype)
    index = tuple(slice(0, 1) if i in np.atleast_1d(along) else slice(None) for i in range(3))
    narrow = data.map(lambda array: np.broadcast_to(array[index], array.shape))._replace(x=data.x)
    dense = narrow.map(np.ascontiguousarray)
    for combination in ((None, True), ("relu", True), ("leaky_relu", True)):
        assert_all_same_bits(fused(narrow, *combination), fused(dense, *combination), combination)


def test_a_residual_may_be_a_list():
    x, residual = [[1.0, 2.0], [3.0, 5.0]], [[0.0, 1.0], [-9.0, 9.0]]
    y = F.batch_norm(x, residual=residual, activation="relu6")[0]
    assert_same_bits(y, rectified(F.batch_norm(x)[0] + np.array(residual), "relu6"))


def test_parameters_left_out_are_ones_and_zeros(dtype):
    data = batch((6, 5, 20), dtype)
    ones, zeros = np.ones(5, dtype), np.zeros(5, dtype)
    for combination in COMBINATIONS:
        expected = fused(data._replace(gamma=ones, beta=zeros), *combination)
        assert_all_same_bits(fused(data._replace(gamma=None, beta=None), *combination), expected, combination)


# --- kinks, NaN, infinities ------------------------------------------------------------------------------------

ZERO, ONE = np.zeros(1), np.ones(1)


def at_values(values, dtype, activation, dy=None, slope=SLOPE):
    """(y, dresidual), where x is 0 and the residual is what meets the activation."""
    residual = np.array(values, dtype).reshape(-1, 1)
    x = np.zeros_like(residual)
    dy = np.ones_like(x) if dy is None else np.full_like(x, dy)
    options = {"residual": residual, "activation": activation, "negative_slope": slope}
    y = F.batch_norm_eval(x, ZERO, ONE, eps=0, **options)
    *_, dresidual = F.batch_norm_backward(dy, x, ZERO, ONE, training=False, **options)
    return y.ravel(), dresidual.ravel()


TINY = np.finfo(np.float32).tiny


def test_relu_is_flat_at_zero(isa, dtype):
    y, slopes = at_values([-1, -TINY, -0.0, 0.0, TINY, 1], dtype, "relu")
    assert_same_bits(y, np.array([0, 0, 0, 0, TINY, 1], dtype))
    assert_same_bits(slopes, np.array([0, 0, 0, 0, 1, 1], dtype))


def test_relu6_is_flat_at_zero_and_at_six(isa, dtype):
    below, above = np.nextafter(dtype(6), dtype([0, 9]))
    y, slopes = at_values([-1, -0.0, 0.0, TINY, below, 6, above, np.inf], dtype, "relu6")
    assert_same_bits(y, np.array([0, 0, 0, TINY, below, 6, 6, 6], dtype))
    assert_same_bits(slopes, np.array([0, 0, 0, 1, 1, 0, 0, 0], dtype))


def test_leaky_relu_has_its_negative_slope_at_zero(isa, dtype):
    y, slopes = at_values([-1, -TINY, 0.0, TINY, 1], dtype, "leaky_relu", slope=0.25)
    assert_same_bits(y, np.array([-0.25, -TINY / 4, 0.0, TINY, 1], dtype))
    assert_same_bits(slopes, np.array([0.25, 0.25, 0.25, 1, 1], dtype))


def test_negative_zero_becomes_positive_zero_in_relu(isa, dtype):
    """As batch normalisation gives it, without a residual."""
    x, minus_zero = np.full((4, 2), -0.0, dtype), np.full(2, -0.0)
    plain = F.batch_norm_eval(x, [0.0, 0.0], [1.0, 1.0], None, minus_zero)
    assert np.signbit(plain).all()
    for activation in ("relu", "relu6"):
        assert_same_bits(F.batch_norm_eval(x, [0.0, 0.0], [1.0, 1.0], None, minus_zero, activation=activation), -plain)
    leaky = F.batch_norm_eval(x, [0.0, 0.0], [1.0, 1.0], None, minus_zero, activation="leaky_relu")
    assert_same_bits(leaky, plain)


@pytest.mark.parametrize("activation", ["relu", "relu6"])
@pytest.mark.parametrize("dy", [np.inf, np.nan, -1.0])
def test_what_is_not_passed_is_zero_whatever_it_was(isa, dtype, activation, dy):
    """No product: 0 * inf would be NaN."""
    assert_same_bits(at_values([-1, -np.inf, -0.0], dtype, activation, dy)[1], np.zeros(3, dtype))


@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
def test_infinities_go_through_activations(isa, dtype, activation):
    y, _ = at_values([-np.inf, np.inf], dtype, activation)
    assert_same_bits(y, rectified(np.array([-np.inf, np.inf], dtype), activation))


@pytest.mark.parametrize("shape", [(6, 4, 40), (40, 4), (7, 4, 3)], ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["x", "residual"])
def test_nan_stays_nan_in_its_channel_and_leaves_others_alone(isa, dtype, shape, bad, name):
    clean = batch(shape, dtype)
    dirty = clean._replace(**{name: getattr(clean, name).copy()})
    getattr(dirty, name)[1, 3] = bad
    channel = np.s_[:, 3]
    for combination in (("relu", True), ("relu6", True), ("leaky_relu", True)):
        found, expected = fused(dirty, *combination), fused(clean, *combination)
        del found["count"], expected["count"]
        for key, array in expected.items():
            others = np.s_[:3] if array.ndim == 1 else np.s_[:, :3]
            assert_same_bits(found[key][others], array[others], key)
        if name == "x":  # (inf - inf, too)
            assert np.isnan(found["y"][channel]).all()
            assert np.isnan(found["dx"][channel]).all()
        elif np.isnan(bad):
            assert np.isnan(found["y"][1, 3]).all()
            assert np.isfinite(np.delete(found["y"], 1, axis=0)).all()


def test_only_leaky_relu_reads_negative_slope():
    x = np.array([[1.0], [3.0]])
    for activation in (None, "relu", "relu6"):
        assert_same_bits(
            F.batch_norm(x, activation=activation, negative_slope=7.0)[0], rectified(F.batch_norm(x)[0], activation)
        )


# --- against the oracle ----------------------------------------------------------------------------------------


def away_from_kinks(shape, dtype, distance=1e-3):
    """A batch of whose values before the activation none lies at a kink, where rounding would choose the side."""
    rng, data = np.random.default_rng(11), batch(shape, dtype, at_kinks=False)
    for _ in range(20):
        y = reference.batch_norm(wide(data.x), wide(data.gamma), wide(data.beta))[0]
        near = [
            (abs(y + r - kink) < 2 * distance) for kink in (0, 6) for r in (0, wide(data.residual))
        ]  # fmt: skip
        near = np.any(near, axis=0)
        if not near.any():
            return data
        data.x[near] += rng.normal(0, 0.5, int(near.sum())).astype(dtype)
        data.residual[near] += rng.normal(0, 0.5, int(near.sum())).astype(dtype)
    raise AssertionError("no such batch")


@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
@pytest.mark.parametrize("shape", [(6, 5, 20), (30, 5)], ids=str)
def test_fused_is_the_oracles(combination, shape, dtype):
    activation, with_residual = combination
    data = away_from_kinks(shape, dtype)
    options = options_of(data, activation, with_residual)
    of_oracle = {**options, "residual": wide(options["residual"]), "negative_slope": wide(dtype(SLOPE))}
    y, mean, inv_std, var = F.batch_norm(data.x, data.gamma, data.beta, return_var=True, **options)
    before = reference.batch_norm(wide(data.x), wide(data.gamma), wide(data.beta))[0]
    x_hat = reference.batch_norm(wide(data.x))[0]
    parameters = wide(data.gamma), wide(data.beta)
    expected = reference.batch_norm(wide(data.x), *parameters, return_var=True, **of_oracle)
    # the table's bound of y, and two roundings: of the sum with the residual, of the product with the slope
    gamma, beta = (abs(p).reshape(1, -1, *[1] * (len(shape) - 2)) for p in parameters)
    bound = TABLE[np.dtype(dtype).name].y * (gamma * (1 + abs(x_hat)) + beta)
    bound = bound + TABLE[np.dtype(dtype).name].y_mean * gamma * 10  # |mean| is below 10 standard deviations
    bound = bound + np.finfo(dtype).eps * (abs(before) + abs(wide(data.residual)))
    assert_within(y, expected[0], bound, "y")
    assert_within(var, expected[3], 1e-6 * expected[3], "var")  # its bound is checked in test_return_var
    y_eval = F.batch_norm_eval(data.x, mean, var, data.gamma, data.beta, **options)
    eval_expected = reference.batch_norm_eval(wide(data.x), wide(mean), wide(var), *parameters, **of_oracle)
    assert_within(y_eval, eval_expected, bound, "y_eval")

    # exactly the gradient of batch normalisation for what is passed of dy
    met = before + wide(data.residual) if with_residual else before
    dy = passed(data.dy, met.astype(np.float64), activation)
    for training in (True, False):
        found = backward(data, training, **options)
        check_batch_norm_backward(found[:3], dy, data.x, mean, inv_std, data.gamma, training=training)
        given = wide(data.dy), wide(data.x), wide(mean), wide(inv_std), wide(data.gamma)
        of_reference = reference.batch_norm_backward(*given, beta=wide(data.beta), training=training, **of_oracle)
        assert len(of_reference) == len(found) == 3 + with_residual
        if with_residual:
            assert_same_bits(found[3], dy)
            np.testing.assert_allclose(of_reference[3].astype(dtype), dy, rtol=np.finfo(dtype).eps, atol=0)
        check_batch_norm_backward(
            [a.astype(dtype) for a in of_reference[:3]], dy, data.x, mean, inv_std, data.gamma, training=training
        )


@pytest.mark.parametrize("shape", [(6, 5, 20), (30, 5)], ids=str)
def test_return_var_is_the_populations_variance(shape, dtype):
    x = batch(shape, dtype).x
    y, mean, inv_std, var = F.batch_norm(x, return_var=True)
    for found, expected in zip((y, mean, inv_std), F.batch_norm(x), strict=True):
        assert_same_bits(found, expected)
    count, center, m2 = reference.moments(wide(x))  # (`moments` sums in float64; the forward in the data's dtype)
    bound = variance_bound(x, center, m2 / count, largest_share(x, center, m2, 1))
    assert_within(var, m2 / count, bound, "var")
    assert len(F.batch_norm(x, return_var=False)) == 3


def test_return_var_keeps_digits_that_eps_drowns():
    x = np.array([[0.0], [2e-13]])
    _, _, inv_std, var = F.batch_norm(x, return_var=True)
    np.testing.assert_allclose(var, 1e-26, rtol=1e-15)  # exact but for a rounding or two
    assert abs(1 / inv_std**2 - 1e-5 - 1e-26) > 0.5e-26


# --- forward mode ----------------------------------------------------------------------------------------------

STEP = 1e-5  # error of a central difference: STEP^2 from the cubic term, 2^-53 / STEP from rounding
RTOL, ATOL = 1e-6, 1e-7  # as test_gradients.py; values are ten times as large


@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
@pytest.mark.parametrize("shape", [(6, 5, 4), (9, 5)], ids=str)
def test_the_jvp_is_the_derivative_along_a_direction(combination, shape):
    activation, with_residual = combination
    data = away_from_kinks(shape, np.float64)
    vresidual = data.vresidual if with_residual else None

    def at(t):
        residual = data.residual + t * data.vresidual if with_residual else None
        options = options_of(data, activation, with_residual) | {"residual": residual}
        x, gamma, beta = data.x + t * data.v, data.gamma + t * data.vgamma, data.beta + t * data.vbeta
        return F.batch_norm(x, gamma, beta, **options)[0]

    found = jvp(data, **options_of(data, activation, with_residual), vresidual=vresidual)[0]
    np.testing.assert_allclose(found, (at(STEP) - at(-STEP)) / (2 * STEP), rtol=RTOL, atol=ATOL)


def test_the_jvp_is_the_adjoint_of_backward(dtype, layout):
    """<dy, J v> = <J' dy, v>, rounding apart, over x, gamma, beta and residual."""
    for shape in ((40, 3), (8, 3, 7), (6, 5, 40)):
        for activation, with_residual in COMBINATIONS:
            data = batch(shape, dtype).map(layout.place)._replace(axis=layout.axis)
            options = options_of(data, activation, with_residual)
            along = jvp(data, **options, vresidual=data.vresidual if with_residual else None)[0]
            gradients = backward(data, **options)
            order = (0, 1, 2, 3) if with_residual else (0, 1, 2)
            directions = [(data.v, data.vgamma, data.vbeta, data.vresidual)[i] for i in order]
            pairs = [(data.dy, along), *zip(gradients, directions, strict=True)]
            first, *rest = (np.multiply(a, b, dtype=np.float64).sum() for a, b in pairs)
            size = sum(np.linalg.norm(a) * np.linalg.norm(b) for a, b in pairs)
            assert abs(first - sum(rest)) <= TABLE[np.dtype(dtype).name].dx * size


def test_a_direction_of_the_residual_needs_no_residual(dtype):
    """As its derivative does not depend on it."""
    data = batch((6, 5), dtype)
    mean, _, inv_std = statistics(data)
    given = data.v, data.x, mean, inv_std, data.gamma
    plain = F.batch_norm_jvp(*given)
    assert_same_bits(F.batch_norm_jvp(*given, vresidual=data.vresidual), plain + data.vresidual)


# --- nothing to do ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (5, 3, 0)], ids=str)
def test_an_empty_batch_gives_empty_results(dtype, shape):
    x, zeros, ones = np.empty(shape, dtype), np.zeros(3), np.ones(3)
    for activation, with_residual in COMBINATIONS:
        options = {"activation": activation, "residual": x if with_residual else None}
        assert_same_bits(F.batch_norm_eval(x, zeros, ones, **options), x)
        found = F.batch_norm_backward(x, x, zeros, ones, training=False, **options)
        assert [array.shape for array in found] == [shape, (3,), (3,), *[shape] * with_residual]
        assert not found[1].any()
        assert not found[2].any()


def test_no_channels_give_empty_results(dtype):
    x = np.empty((4, 0), dtype)
    for activation, with_residual in COMBINATIONS:
        options = {"activation": activation, "residual": x if with_residual else None}
        assert [a.shape for a in F.batch_norm(x, return_var=True, **options)] == [(4, 0), (0,), (0,), (0,)]
        found = F.batch_norm_backward(x, x, [], [], **options)
        assert [a.shape for a in found] == [(4, 0), (0,), (0,), *[(4, 0)] * with_residual]
