"""Masks: the positions that take part are all that there is, and elsewhere results are 0."""

import itertools

import numpy as np
import pytest
from activations import LIKE_X, SLOPE, batch, fused, one_after_another
from digests import case_name
from layouts import channels_last_view
from memory import leave_nan
from tolerances import assert_same_bits, check_batch_norm, check_moments, wide

import bnfast
from bnfast import check_gradient, reference
from bnfast import functional as F

# How sequences, and images, may lie: (shape, channel axis, memory order)
CASES = [
    ((5, 4, 12), 1, "C"),  # (N, C, T)
    ((5, 12, 4), -1, "C"),  # (N, T, C)
    ((4, 3, 5, 6), 1, "C"),  # (N, C, H, W)
    ((4, 5, 6, 3), 3, "C"),
    ((40, 3), 1, "C"),
    ((5, 4, 12), 1, "F"),
    ((4, 30), 0, "C"),
]
COMBINATIONS = [(None, False), (None, True), ("relu", True), ("relu6", False), ("leaky_relu", True)]
LIKE_RESULTS = ("y", "y_eval", "dx", "dx_eval", "dresidual", "dresidual_eval", "dx_applied", "dresidual_applied", "jvp")


every_case = pytest.mark.parametrize("case", CASES, ids=case_name)


def positions(shape, axis):
    return tuple(np.delete(shape, axis).tolist())


def random_mask(shape, axis, density=0.6, seed=0):
    mask = np.random.default_rng((seed, *shape)).random(positions(shape, axis)) < density
    mask.ravel()[:2] = True
    return mask


def spread(mask, x, axis):
    """A mask for every element of x."""
    return np.broadcast_to(np.expand_dims(mask, axis % x.ndim), x.shape)


def alone(data, mask):
    """Those positions in arrays of their own that lie as the whole does: channels last, or channel by channel."""
    last = data.map(lambda array: np.moveaxis(array, data.axis, -1)[mask])._replace(axis=1)
    order = [i for i in np.argsort(data.x.strides)[::-1] if data.x.shape[i] > 1]
    if order[-1] == data.axis % data.x.ndim:
        return last
    # in the order of memory, in which the positions are taken
    order = [i if i < data.axis % data.x.ndim else i - 1 for i in order if i != data.axis % data.x.ndim]
    taken = np.transpose(mask, order)

    def channel_by_channel(array):
        return np.ascontiguousarray(np.transpose(np.moveaxis(array, data.axis, -1), (*order, -1))[taken].T)

    return data.map(channel_by_channel)._replace(axis=0)


def poisoned(data, mask):
    """NaN and infinities in all that is like x, where the mask is False."""
    rng = np.random.default_rng(3)

    def poison(array):
        array = array.copy(order="K")
        there = ~spread(mask, array, data.axis)
        array[there] = rng.choice([np.nan, np.inf, -np.inf, 1e30], int(there.sum()))
        return array

    return data.map(poison)


# --- the rest is all there is ----------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("density", [0.15, 0.6, 0.95])
def test_results_are_those_of_the_positions_alone(case, density, dtype):
    """To the bit, NaN and Inf under the mask; zeros elsewhere."""
    shape, axis, order = case
    data, mask = batch(shape, dtype, axis, order), random_mask(shape, axis, density)
    rest = alone(data, mask)
    order = np.argsort(np.argsort(data.x.strides))[::-1]
    for combination in COMBINATIONS:
        found, expected = fused(poisoned(data, mask), *combination, mask=mask), fused(rest, *combination)
        assert found.keys() == expected.keys()
        for name, array in found.items():
            if name not in LIKE_RESULTS:
                assert_same_bits(array, expected[name], name)
                continue
            there = alone(data._replace(**dict.fromkeys(LIKE_X, array)), mask).x
            assert_same_bits(there, expected[name], name)
            elsewhere = array[~spread(mask, array, axis)]
            assert_same_bits(elsewhere, np.zeros_like(elsewhere), f"{name} elsewhere")
            assert np.argsort(np.argsort(array.strides)).tolist() == order[::-1].tolist(), "lies otherwise than x"


@every_case
def test_a_mask_of_all_true_has_the_bits_of_none(case, dtype):
    shape, axis, order = case
    data = batch(shape, dtype, axis, order)
    for combination in COMBINATIONS:
        expected = fused(data, *combination)
        for mask in (np.ones(positions(shape, axis), bool), np.True_, True, [True]):
            for name, array in fused(data, *combination, mask=mask).items():
                assert_same_bits(array, expected[name], name)


@every_case
def test_moments_are_those_of_the_positions(case, isa, dtype):
    shape, axis, order = case
    data, mask = batch(shape, dtype, axis, order), random_mask(shape, axis)
    found = bnfast.moments(poisoned(data, mask).x, axis=axis, mask=mask)
    rest = alone(data, mask)
    assert found == bnfast.moments(rest.x, axis=rest.axis)
    check_moments(found, rest.x, axis=rest.axis)
    assert bnfast.moments(data.x, axis=axis, mask=True) == bnfast.moments(data.x, axis=axis)


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 65])
def test_runs_of_every_length_and_place(length, dtype):
    """One run of True in each row, wherever it begins; rows of nothing and of all."""
    starts = sorted({0, 1, length // 2, length - 1})
    mask = np.zeros((len(starts) + 2, length), bool)
    for row, start in enumerate(starts):
        mask[row, start : start + max(1, length // 3)] = True
    mask[-2] = True
    mask[-1] = False
    x = np.arange(1, 2 * mask.size + 1, dtype=dtype).reshape(len(mask), 2, length)
    for array, axis in ((x, 1), (np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1), (channels_last_view(x), 1)):
        y = F.batch_norm_eval(array, np.zeros(2), np.ones(2), eps=0, axis=axis, mask=mask)
        assert_same_bits(y, np.where(spread(mask, array, axis), array, np.zeros_like(array)))


@pytest.mark.parametrize(("shape", "axis"), [((16, 8, 900), 1), ((300, 40, 12), -1), ((20_000, 6), 1)], ids=str)
def test_bits_depend_on_no_number_of_threads_or_instruction_set(shape, axis, isa, dtype):
    data, mask = batch(shape, dtype, axis), random_mask(shape, axis)
    expected = None
    for n_threads in (1, 2):
        with bnfast.num_threads(n_threads):
            found = fused(data, "relu", True, mask=mask)
        expected = expected or one_after_another(alone(data, mask), "relu", True)
        for name, array in found.items():
            like_x = name in LIKE_RESULTS
            array = alone(data._replace(**dict.fromkeys(LIKE_X, array)), mask).x if like_x else array
            assert_same_bits(array, expected[name], f"{name}, {n_threads} threads")


# --- how a mask may be given -----------------------------------------------------------------------------------


def test_a_mask_is_broadcast_as_numpy_does(dtype):
    data = batch((5, 4, 12), dtype)
    steps, rows = np.arange(12) < 7, np.array([True, False, True, True, False])
    whole = {"steps": np.broadcast_to(steps, (5, 12)), "rows": np.broadcast_to(rows[:, None], (5, 12))}
    given = {"steps": [steps, steps[None], steps.tolist(), whole["steps"]], "rows": [rows[:, None], whole["rows"]]}
    for name, masks in given.items():
        expected = fused(data, "relu", True, mask=whole[name].copy())
        for mask in masks:
            for key, array in fused(data, "relu", True, mask=mask).items():
                assert_same_bits(array, expected[key], key)


def strided(mask):
    wider = np.zeros(tuple(2 * n for n in mask.shape), bool)
    wider[tuple(slice(None, None, 2) for _ in mask.shape)] = mask
    return wider[tuple(slice(None, None, 2) for _ in mask.shape)]


def reverse(mask):
    there = (slice(None, None, -1),) * mask.ndim
    return np.ascontiguousarray(mask[there])[there]


def as_list(mask):
    return mask.tolist()


def read_only(mask):
    mask = mask.copy()
    mask.flags.writeable = False
    return mask


@pytest.mark.parametrize("view", [np.asfortranarray, strided, reverse, as_list, read_only], ids=lambda v: v.__name__)
@every_case
def test_a_mask_may_lie_in_any_way(case, view, dtype):
    shape, axis, order = case
    data, mask = batch(shape, dtype, axis, order), random_mask(shape, axis)
    expected = fused(data, "relu", True, mask=mask)
    before = mask.copy()
    for key, array in fused(data, "relu", True, mask=view(mask)).items():
        assert_same_bits(array, expected[key], key)
    assert_same_bits(mask, before)


def test_any_byte_but_0_is_true(dtype):
    """As NumPy takes a view of bytes as bool."""
    data, mask = batch((5, 4, 40), dtype), random_mask((5, 4, 40), 1, 0.3)
    odd = np.where(mask, np.random.default_rng(1).integers(1, 256, mask.shape), 0).astype(np.uint8).view(bool)
    expected = fused(data, "relu", True, mask=mask)
    for key, array in fused(data, "relu", True, mask=odd).items():
        assert_same_bits(array, expected[key], key)


def gaps(array):
    wider = np.full(tuple(2 * n for n in array.shape), np.nan, array.dtype)
    wider[tuple(slice(None, None, 2) for _ in array.shape)] = array
    return wider[tuple(slice(None, None, 2) for _ in array.shape)]


@pytest.mark.parametrize(
    "view",
    [np.asfortranarray, gaps, reverse, lambda a: a.astype(a.dtype.newbyteorder()), read_only],
    ids=["fortran", "gaps", "reverse", "byte_swapped", "read_only"],
)
@pytest.mark.parametrize("name", ["residual", "dy", "v", "vresidual"])
def test_what_is_masked_may_lie_in_any_way(view, name, dtype):
    data, mask = batch((5, 4, 12), dtype), random_mask((5, 4, 12), 1)
    expected = fused(data, "leaky_relu", True, mask=mask)
    for key, array in fused(data._replace(**{name: view(getattr(data, name))}), "leaky_relu", True, mask=mask).items():
        assert_same_bits(array, expected[key], key)


@pytest.mark.parametrize(
    "view", [gaps, reverse, lambda a: a.astype(a.dtype.newbyteorder())], ids=["gaps", "reverse", "swapped"]
)
def test_x_may_lie_in_any_way(view, dtype):
    data, mask = batch((5, 4, 12), dtype), random_mask((5, 4, 12), 1)
    x = view(data.x)
    native = np.array(x, x.dtype.newbyteorder("="), order="K", copy=True)
    expected = fused(data._replace(x=native), "relu", True, mask=mask)
    for key, array in fused(data._replace(x=x), "relu", True, mask=mask).items():
        assert_same_bits(array, expected[key], key)


# --- where results are written ---------------------------------------------------------------------------------


@every_case
def test_out_may_be_any_of_the_arrays(case, dtype):
    shape, axis, order = case
    data, mask = batch(shape, dtype, axis, order), random_mask(shape, axis)
    options = {"axis": axis, "activation": "relu", "mask": mask}
    _, mean, inv_std, var = F.batch_norm(data.x, data.gamma, data.beta, return_var=True, **options)

    def forward(d, **more):
        return F.batch_norm(d.x, d.gamma, d.beta, residual=d.residual, **more, **options)

    def forward_eval(d, **more):
        return (F.batch_norm_eval(d.x, mean, var, d.gamma, d.beta, residual=d.residual, **more, **options),)

    def backward(d, **more):
        given = d.dy, d.x, mean, inv_std, d.gamma
        return F.batch_norm_backward(*given, beta=d.beta, residual=d.residual, **more, **options)

    def apply(d, **more):
        given = d.dy, d.x, mean, inv_std, d.gamma
        sums = F.Sums(3, np.ones(d.channels), np.ones(d.channels))
        return F.batch_norm_backward_apply(*given, sums, beta=d.beta, residual=d.residual, **more, **options)

    def jvp(d, **more):
        given = d.v, d.x, mean, inv_std, d.gamma
        return (F.batch_norm_jvp(*given, beta=d.beta, residual=d.residual, **more, **options),)

    for call in (forward, forward_eval, backward, apply, jvp):
        expected = call(data)
        for name in (*LIKE_X, "new"):
            for target in ("out", "out_residual") if call in (backward, apply) else ("out",):
                mine = data.map(lambda array: array.copy(order="K"))
                out = np.full(shape, np.nan, dtype) if name == "new" else getattr(mine, name)
                found = call(mine, **{target: out})
                assert found[0 if target == "out" else -1] is out
                for one, other in zip(found, expected, strict=True):
                    assert_same_bits(one, other, f"{call.__name__}, {target} is {name}")


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(("shape", "axis"), [((5, 7, 3), -1), ((40, 16), 1), ((4, 3, 9), 1)])
def test_a_layer_gives_the_same_bits_wherever_its_results_lie(shape, axis, dtype):
    """A part may lie at the beginning of the memory that it is scattered over, be it x's, dy's or a result's own."""
    rng = np.random.default_rng(1)
    x, dy, residual = (rng.normal(1, 2, shape).astype(dtype) for _ in range(3))

    def results(mask, with_residual, out=None, out_dx=None, out_dresidual=None):
        """out, ...: name of the array that a result goes to, "new", or None."""
        bn = bnfast.BatchNorm(shape[axis], axis=axis, activation="leaky_relu", dtype=max(x.dtype, np.float32))
        memory = np.concatenate([dy.ravel(), np.zeros(3, dtype)])
        at = {"x": x.copy(), "new": x.copy(), "dy": memory[:-3].reshape(shape), "shifted": memory[3:].reshape(shape)}
        beside = {"residual": residual} if with_residual else {}
        y = bn(at["x"], mask=mask, out=at.get(out), **beside).copy()
        more = {"out_residual": at.get(out_dresidual)} if with_residual else {}
        gradients = bn.backward(at["dy"], out=at.get(out_dx), **more)
        return [y, *(gradients if with_residual else [gradients]), bn.grad_gamma, bn.running_var]

    for density in (0.2, 0.9):
        mask = random_mask(shape, axis, density)
        for with_residual in (False, True):
            expected = results(mask, with_residual)
            for outs in itertools.product([None, "new"], [None, "x", "dy", "shifted"], [None, "dy"]):
                if outs[2] and (outs[1] in ("dy", "shifted") or not with_residual):
                    continue  # the two may not share memory
                for found, wanted in zip(results(mask, with_residual, *outs), expected, strict=True):
                    assert_same_bits(found, wanted)


def test_a_mask_that_leaves_out_all_gives_gradients_of_0(dtype):
    for activation in (None, "relu", "leaky_relu"):
        bn = bnfast.BatchNorm(3, axis=-1, activation=activation).eval()
        x = np.ones((2, 5, 3), np.float16 if dtype == np.float32 else dtype)
        assert not bn(x, mask=np.zeros((2, 5), bool), residual=x).any()
        assert not np.any(bn.backward(x))


def test_inputs_are_not_modified(dtype):
    shape = (5, 4, 12)
    data, mask = batch(shape, dtype), random_mask(shape, 1)
    before, mask_before = data.map(np.copy), mask.copy()
    fused(data, "relu", True, mask=mask)
    for name in LIKE_X:
        assert_same_bits(getattr(data, name), getattr(before, name), name)
    assert_same_bits(mask, mask_before)


# --- few positions ---------------------------------------------------------------------------------------------


def calls(data, mask):
    """name -> what needs two values a channel."""
    zeros, ones = np.zeros(data.channels), np.ones(data.channels)
    given = data.x, zeros, ones
    return {
        "batch_norm": lambda: F.batch_norm(data.x, axis=data.axis, mask=mask),
        "backward": lambda: F.batch_norm_backward(data.dy, *given, axis=data.axis, mask=mask),
        "jvp": lambda: F.batch_norm_jvp(data.v, *given, axis=data.axis, mask=mask),
    }


@every_case
@pytest.mark.parametrize("count", [0, 1])
def test_training_needs_two_positions_and_eval_none(case, count, dtype):
    shape, axis, order = case
    data, mask = batch(shape, dtype, axis, order), np.zeros(positions(shape, axis), bool)
    mask.ravel()[mask.size // 2 : mask.size // 2 + count] = True
    for call in calls(data, mask).values():
        with pytest.raises(ValueError, match=f"mask: expected at least 2 positions .* got {count}"):
            call()
    zeros, ones = np.zeros(data.channels), np.ones(data.channels)
    options = {"axis": axis, "mask": mask, "residual": data.residual}
    there = spread(mask, data.x, axis)
    y = F.batch_norm_eval(data.x, zeros, ones, eps=0, **options)
    assert_same_bits(y, np.where(there, data.x + data.residual, np.zeros_like(y)))
    dx, dgamma, dbeta, dresidual = F.batch_norm_backward(data.dy, data.x, zeros, ones, training=False, **options)
    for array in (dx, dresidual):
        assert_same_bits(array, np.where(there, data.dy, np.zeros_like(array)))
    others = tuple(i for i in range(data.x.ndim) if i != axis % data.x.ndim)
    np.testing.assert_array_equal(dbeta, np.where(there, data.dy, 0).sum(others))
    np.testing.assert_array_equal(dgamma, np.where(there, data.dy * data.x, 0).sum(others))
    sums = F.batch_norm_backward_sums(data.dy, data.x, zeros, ones, axis=axis, mask=mask)
    assert sums.count == bnfast.moments(data.x, axis=axis, mask=mask).count == count


@every_case
def test_one_position_may_be_left_out_and_two_are_enough(case, dtype):
    shape, axis, order = case
    data = batch(shape, dtype, axis, order)
    for n_true in (2, -1):
        mask = np.full(positions(shape, axis), n_true < 0)
        if n_true < 0:
            mask.ravel()[mask.size // 3] = False
        else:
            mask.ravel()[[1, mask.size - 1]] = True
        rest = alone(data, mask)
        for name, array in fused(data, "relu", True, mask=mask).items():
            if name not in LIKE_RESULTS:
                assert_same_bits(array, fused(rest, "relu", True)[name], name)
        check_batch_norm(F.batch_norm(rest.x, axis=rest.axis), rest.x, axis=rest.axis)


def test_sequences_of_every_length(dtype):
    """(N, C, T), lengths from 0 to T: what padding holds does not matter."""
    lengths = np.arange(13)
    mask = np.arange(12) < lengths[:, None]
    data = batch((13, 4, 12), dtype)
    y, mean, inv_std, var = F.batch_norm(poisoned(data, mask).x, mask=mask, return_var=True)
    steps = np.concatenate([data.x[n, :, :length] for n, length in enumerate(lengths)], axis=1)
    expected = F.batch_norm(np.ascontiguousarray(steps), axis=0, return_var=True)
    for found, other in zip((mean, inv_std, var), expected[1:], strict=True):
        assert_same_bits(found, other)
    joined = np.concatenate([y[n, :, :length] for n, length in enumerate(lengths)], axis=1)
    assert_same_bits(joined, expected[0])
    for n, length in enumerate(lengths):
        assert not y[n, :, length:].any()


def test_an_empty_batch_takes_a_mask(dtype):
    for shape, mask in (((0, 3, 4), np.ones((0, 4), bool)), ((5, 3, 0), np.ones((5, 0), bool)), ((4, 0), [True] * 4)):
        x = np.empty(shape, dtype)
        zeros, ones = np.zeros(shape[1]), np.ones(shape[1])
        assert_same_bits(F.batch_norm_eval(x, zeros, ones, mask=mask), x)
        dx, dgamma, _ = F.batch_norm_backward(x, x, zeros, ones, training=False, mask=mask)
        assert_same_bits(dx, x)
        assert_same_bits(dgamma, zeros.astype(dtype))
    assert_same_bits(F.batch_norm_eval(x, [], [], mask=[True, False, True, False]), x)


@pytest.mark.parametrize("parameter_dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("n", "mask"), [(5, np.zeros((5, 3), bool)), (0, None)])
def test_gradients_a_channel_are_zero_where_nothing_takes_part(dtype, parameter_dtype, n, mask):
    bn = bnfast.BatchNorm(7, dtype=parameter_dtype).eval()
    x = np.ones((n, 7, 3), dtype)
    bn(x, mask=mask)
    leave_nan(7, parameter_dtype)
    assert not bn.backward(x).any()
    assert not bn.grad_gamma.any()
    assert not bn.grad_beta.any()


# --- the oracle, and differences -------------------------------------------------------------------------------


@every_case
def test_the_reference_agrees(case):
    """It indexes by the mask; float64, so 1e-12 leaves room for hundreds of roundings of values up to 1e3."""
    shape, axis, order = case
    data, mask = batch(shape, np.float64, axis, order, at_kinks=False), random_mask(shape, axis)
    options = {"axis": axis, "residual": data.residual, "activation": "leaky_relu", "negative_slope": SLOPE}
    options["mask"] = mask
    given = data.gamma, data.beta
    forward = F.batch_norm(data.x, *given, return_var=True, **options)
    _, mean, inv_std, var = forward
    backward = data.dy, data.x, mean, inv_std, data.gamma
    pairs = [
        *zip(forward, reference.batch_norm(wide(data.x), *given, return_var=True, **options), strict=True),
        (F.batch_norm_eval(data.x, mean, var, *given, **options),
         reference.batch_norm_eval(data.x, mean, var, *given, **options)),
    ]  # fmt: skip
    for training in (True, False):
        more = {"beta": data.beta, "training": training, **options}
        pairs += zip(
            F.batch_norm_backward(*backward, **more), reference.batch_norm_backward(*backward, **more), strict=True
        )
    more = {"beta": data.beta, **options}
    sums, expected = (module.batch_norm_backward_sums(*backward, **more) for module in (F, reference))
    assert sums.count == expected.count == mask.sum()
    pairs += [(sums.dgamma, expected.dgamma), (sums.dbeta, expected.dbeta)]
    applied, expected = (module.batch_norm_backward_apply(*backward, sums, **more) for module in (F, reference))
    pairs += zip(applied, expected, strict=True)
    more |= {"vgamma": data.vgamma, "vbeta": data.vbeta, "vresidual": data.vresidual}
    pairs += [tuple(module.batch_norm_jvp(data.v, *backward[1:], **more) for module in (F, reference))]
    for found, expected in pairs:
        np.testing.assert_allclose(found, expected.astype(np.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("activation", [None, "leaky_relu"])
@pytest.mark.parametrize("case", [CASES[0], CASES[1], CASES[2], CASES[4]], ids=case_name)
def test_gradients_are_those_of_differences(case, activation):
    """Of x and residual everywhere, those under the mask too: there the derivative is 0."""
    shape, axis, order = case
    data, mask = batch(shape, np.float64, axis, order, at_kinks=False), random_mask(shape, axis)
    options = {"axis": axis, "activation": activation, "negative_slope": SLOPE, "mask": mask}

    def forward(x, gamma, beta, residual):
        return F.batch_norm(x, gamma, beta, residual=residual, **options)

    given = [data.x, data.gamma, data.beta, data.residual]
    _, mean, inv_std = forward(*given)
    found = F.batch_norm_backward(
        data.dy, data.x, mean, inv_std, data.gamma, beta=data.beta, residual=data.residual, **options
    )
    for i, gradient in enumerate(found):

        def loss(moved, i=i):
            return (data.dy * forward(*given[:i], moved, *given[i + 1 :])[0]).sum()

        check_gradient(loss, gradient, given[i]).raise_if_failed()


def test_a_masked_array_is_told_of_the_mask():
    """Filling it, which the message advised before, makes the padding a part of the batch."""
    x = np.ma.masked_greater(np.random.default_rng(0).normal(size=(6, 3)), 1.0)
    with pytest.raises(TypeError, match=r"use x.data, and mask=~numpy.ma.getmaskarray\(x\).any\(axis\)"):
        F.batch_norm(x)
    F.batch_norm(x.data, mask=~np.ma.getmaskarray(x).any(1))
    with pytest.raises(TypeError, match="fill it first"):
        F.batch_norm(x.data, np.ma.ones(3))
