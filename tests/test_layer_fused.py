"""Layers with an activation, a residual and a mask: what the functions give, and what a layer keeps of them.

The numbers are judged in test_fused.py and test_masks.py.
"""

import copy
import gc
import itertools
import pickle
import weakref

import numpy as np
import pytest
from activations import ACTIVATIONS, SLOPE, batch, passed, rectified
from kept import raw
from layers import everything, statistics
from tolerances import assert_same_bits

import bnfast
from bnfast import BatchNorm, _core, check_layer
from bnfast import functional as F

CHANNELS = 4
LAYOUTS = {"rows": ((12, CHANNELS), 1), "planar": ((6, CHANNELS, 20), 1), "channels_last": ((6, 5, CHANNELS), -1)}
every_layout = pytest.mark.parametrize(("shape", "axis"), LAYOUTS.values(), ids=LAYOUTS)
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


def layer(activation=None, **options):
    """One whose parameters and running statistics are not those of a new one."""
    bn = BatchNorm(CHANNELS, activation=activation, negative_slope=SLOPE, **options)
    if bn.gamma is not None:
        bn.gamma[:], bn.beta[:] = [0.5, -1.0, 2.0, 4.0], [0.0, 6.0, -1.0, 0.25]
    if bn.track_running_stats:
        bn.running_mean, bn.running_var = [0.5, 1.0, -1.0, 2.0], [1.0, 4.0, 0.5, 2.0]
    return bn


def mask_of(shape, axis):
    mask = np.random.default_rng(4).random(np.delete(shape, axis)) < 0.7
    mask.ravel()[:3] = True, True, False
    return mask


def data_of(shape, axis=1, dtype=np.float32):
    return batch(shape, dtype, axis)


# --- what the functions give -----------------------------------------------------------------------------------


@every_layout
@every_activation
@both_modes
@pytest.mark.parametrize("with_mask", [False, True])
def test_a_layer_has_the_bits_of_the_functions(shape, axis, activation, training, with_mask, dtype):
    data = data_of(shape, axis, dtype)
    for residual in (None, data.residual):
        bn = layer(activation, axis=axis, dtype=dtype).train(training)
        options = {
            "axis": axis, "residual": residual, "activation": activation, "negative_slope": SLOPE,
            "mask": mask_of(shape, axis) if with_mask else None,
        }  # fmt: skip
        given = {name: options[name] for name in ("residual", "mask")}
        mean, var = bn.running_mean, bn.running_var
        y = bn(data.x, **given)
        if training:
            expected, mean, inv_std = F.batch_norm(data.x, bn.gamma, bn.beta, **options)
            assert_same_bits(bn.batch_mean, mean)
        else:
            expected = F.batch_norm_eval(data.x, mean, var, bn.gamma, bn.beta, **options)
            inv_std = 1 / np.sqrt(var + bn.eps)
        assert_same_bits(y, expected)
        found = bn.backward(data.dy)
        dx, dgamma, dbeta, *dresidual = F.batch_norm_backward(
            data.dy, data.x, mean, inv_std, bn.gamma, beta=bn.beta, training=training, **options
        )
        of_layer = [*(found if dresidual else (found,)), bn.grad_gamma, bn.grad_beta]
        for one, other in zip(of_layer, [dx, *dresidual, dgamma, dbeta], strict=True):
            if training and dtype is np.float64:  # it remembers what its mean was rounded by, they are handed that
                np.testing.assert_allclose(one, other, rtol=1e-13, atol=1e-14)
            else:
                assert_same_bits(one, other)


@every_activation
def test_forward_and_call_are_the_same(activation):
    data = data_of((6, CHANNELS, 20))
    given = {"residual": data.residual, "mask": mask_of((6, CHANNELS, 20), 1)}
    one, other, out = layer(activation), layer(activation), np.empty_like(data.x)
    assert_same_bits(one(data.x, **given), other.forward(data.x, **given))
    assert one(data.x, out, **given) is out
    assert_same_bits(out, other.forward(data.x, **given))
    assert statistics(one) == statistics(other)
    for first, second in zip(one.backward(data.dy), other.backward(data.dy), strict=True):
        assert_same_bits(first, second)


@pytest.mark.parametrize(("of_layer", "of_data"), [(np.float32, np.float64), (np.float64, np.float32)])
@both_modes
def test_the_backward_takes_the_side_of_a_kink_that_the_forward_took(of_layer, of_data, training):
    """Whatever the dtypes: parameters that round when they meet the data."""
    data, bn, plain = data_of((40, CHANNELS), 1, of_data), layer("relu", dtype=of_layer), layer(dtype=of_layer)
    for each in (bn, plain):
        each.train(training)
        each.gamma[:] = [1 / 3, -0.1, 0.7, 1e-3]
    y = plain(data.x) + data.residual
    assert_same_bits(bn(data.x, residual=data.residual), rectified(y, "relu"))
    bn.gamma[:], bn.beta[:] = 9, 9  # does not matter any more
    assert_same_bits(bn.backward(data.dy)[1], passed(data.dy, y, "relu"))


@pytest.mark.parametrize("affine", [False, "gamma", "beta"])
@every_activation
def test_parameters_may_be_left_out(affine, activation, dtype):
    data, bn = data_of((12, CHANNELS), 1, dtype), layer(activation, affine=False, dtype=dtype)
    if affine:
        bn = BatchNorm(CHANNELS, affine=affine, activation=activation, negative_slope=SLOPE, dtype=dtype)
    options = {"residual": data.residual, "activation": activation, "negative_slope": SLOPE}
    y, mean, inv_std = F.batch_norm(data.x, bn.gamma, bn.beta, **options)
    assert_same_bits(bn(data.x, residual=data.residual), y)
    found = bn.backward(data.dy)
    dx, *_, dresidual = F.batch_norm_backward(
        data.dy, data.x, mean, inv_std, bn.gamma, beta=bn.beta, **options
    )  # fmt: skip
    assert_same_bits(found[0], dx)
    assert_same_bits(found[1], dresidual)


class OfItsOwn(BatchNorm):
    def forward(self, x):
        return x


def test_a_forward_of_ones_own_need_not_know_of_them():
    x = np.ones((3, CHANNELS))
    bn = OfItsOwn(CHANNELS)
    assert bn(x) is x
    with pytest.raises(TypeError, match="residual"):
        bn(x, residual=x)


class WithResidual(BatchNorm):
    def forward(self, x, *, residual=None):
        return super().forward(x, residual=residual)


def test_a_forward_of_ones_own_is_given_what_was_given():
    data = data_of((12, CHANNELS))
    assert_same_bits(
        WithResidual(CHANNELS)(data.x, residual=data.residual), BatchNorm(CHANNELS)(data.x, residual=data.residual)
    )
    with pytest.raises(TypeError, match="mask"):
        WithResidual(CHANNELS)(data.x, residual=data.residual, mask=True)


# --- masks, and statistics -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"momentum": None}, {"unbiased_running_var": False}], ids=str)
def test_running_statistics_count_the_positions_that_take_part(options, dtype):
    """As those of a layer that sees no others."""
    masked, alone = layer(**options), layer(**options)
    for seed in range(3):
        data = data_of((10 + seed, CHANNELS), 1, dtype)
        mask = mask_of((10 + seed, CHANNELS), 1)
        data.x[~mask] = np.nan
        y = masked(data.x, mask=mask)
        assert_same_bits(y[mask], alone(np.ascontiguousarray(data.x[mask])))
        assert statistics(masked) == statistics(alone)
        assert_same_bits(masked.batch_var, alone.batch_var)
    assert masked.num_batches_tracked == 3
    m = bnfast.moments(data.x, mask=mask)
    assert m.count == mask.sum()
    if not options:
        bn = layer()
        expected = 0.9 * bn.running_var + 0.1 * m.var(ddof=1)
        bn(data.x, mask=mask)
        np.testing.assert_allclose(bn.running_var, expected, rtol=1e-15)  # a rounding or two


@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_what_is_masked_or_added_makes_no_statistics_infinite(nonfinite):
    data, bn = data_of((12, CHANNELS)), layer(nonfinite=nonfinite)
    mask = mask_of((12, CHANNELS), 1)
    data.x[~mask] = np.inf
    data.residual[0] = np.nan
    bn(data.x, residual=data.residual, mask=mask)
    assert bn.num_batches_tracked == 1
    assert not bn.num_batches_skipped.any()
    data.x[mask.argmax(), 2] = np.nan
    before = statistics(bn)
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match="channel 2"):
            bn(data.x, mask=mask)
        assert statistics(bn) == before
    else:
        bn(data.x, mask=mask)
        assert bn.num_batches_skipped.tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("count", [0, 1])
def test_eval_takes_any_number_of_positions(count, dtype):
    data, bn = data_of((6, CHANNELS, 5), 1, dtype), layer("relu", dtype=dtype).eval()
    mask = np.zeros((6, 5), bool)
    mask.ravel()[7 : 7 + count] = True
    whole = layer("relu", dtype=dtype).eval()(data.x, residual=data.residual)
    y = bn(data.x, residual=data.residual, mask=mask)
    assert_same_bits(y, np.where(mask[:, None], whole, np.zeros_like(whole)))
    dx, dresidual = bn.backward(data.dy)
    for array in (dx, dresidual):
        assert not np.moveaxis(array, 1, -1)[~mask].any()
    before = everything(bn)
    with pytest.raises(ValueError, match=f"at least 2 positions .* got {count}"):
        bn.train()(data.x, mask=mask)
    bn.eval()
    assert everything(bn) == before


def test_without_running_statistics_eval_needs_two_positions():
    data, bn = data_of((6, CHANNELS)), layer(track_running_stats=False).eval()
    with pytest.raises(ValueError, match="at least 2 positions"):
        bn(data.x, mask=[True] + 5 * [False])
    y = bn(data.x, mask=[True, True] + 4 * [False])
    assert_same_bits(y[:2], layer(track_running_stats=False)(data.x[:2]))


def test_a_mask_may_be_changed_once_the_forward_has_it():
    data, mask = data_of((6, CHANNELS, 20)), mask_of((6, CHANNELS, 20), 1)
    given = {"residual": data.residual, "mask": mask}
    bn = layer("relu")
    _, pullback = bn.vjp(data.x, **given)
    expected = pullback(data.dy)
    bn(data.x, **given)
    mask[...] = ~mask
    for found in (bn.backward(data.dy), pullback(data.dy)):
        for one, other in zip(found, expected, strict=True):
            assert_same_bits(one, other)


def test_update_false_changes_no_statistics():
    data, bn, twin = data_of((12, CHANNELS)), layer("relu"), layer("relu")
    given = {"residual": data.residual, "mask": mask_of((12, CHANNELS), 1)}
    before = statistics(bn)
    y = bn(data.x, update=False, **given)
    assert statistics(bn) == before
    assert_same_bits(y, twin(data.x, **given))
    for one, other in zip(bn.backward(data.dy), twin.backward(data.dy), strict=True):
        assert_same_bits(one, other)


def test_a_calibration_gathers_the_positions_that_take_part():
    """A batch of one position too, and of none, which is normalised with the statistics in use."""
    bn, parts = layer("relu").eval(), []
    masks = [[True, False, True, True], [False] * 4, [False, False, True, False], True]
    with bn.calibrate():
        for seed, mask in enumerate(masks):
            data = data_of((4, CHANNELS, 1 + seed), 1, np.float64)
            mask = np.broadcast_to(np.array(mask).reshape(-1, 1), (4, 1 + seed))
            mask = mask & (np.arange(1 + seed) == 0)
            before = bn._contents.value.in_use
            y = bn(data.x, residual=data.residual, mask=mask)
            parts.append(bnfast.moments(data.x, mask=mask))
            if mask.sum() < 2:
                options = {"residual": data.residual, "activation": "relu", "mask": mask}
                expected = F.batch_norm_eval(data.x, before.mean, before.var, bn.gamma, bn.beta, **options)
            else:
                options = {"residual": data.residual, "activation": "relu", "mask": mask}
                expected = F.batch_norm(data.x, bn.gamma, bn.beta, **options)[0]
            assert_same_bits(y, expected)
    assert [part.count for part in parts] == [3, 0, 1, 4]
    assert bn.exact_statistics.count == 8
    assert bn.exact_statistics == sum(parts)


# --- the residual between forward and backward -----------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "relu", "relu6", "leaky_relu"])
@both_modes
def test_the_residual_may_be_overwritten_once_y_is_there(activation, training):
    data = data_of((6, CHANNELS, 20))
    bn, twin = (layer(activation).train(training) for _ in range(2))
    twin(data.x, residual=data.residual.copy())
    mine = data.residual.copy()
    bn(data.x, residual=mine)
    mine[...] = -1
    found, expected = bn.backward(data.dy), twin.backward(data.dy)
    for one, other in zip(found, expected, strict=True):
        assert_same_bits(one, other)
    assert found[1] is not data.dy
    if activation is None:
        assert_same_bits(found[1], data.dy)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_out_may_be_the_residual(activation):
    data = data_of((6, CHANNELS, 20))
    twin = layer(activation)
    expected = twin(data.x, residual=data.residual)
    gradients = twin.backward(data.dy)
    for context in (bnfast.no_grad(), bnfast.num_threads(1)):
        bn, mine = layer(activation), data.residual.copy()
        with context:
            assert bn(data.x, out=mine, residual=mine) is mine
        assert_same_bits(mine, expected)
    for one, other in zip(bn.backward(data.dy, mine), gradients, strict=True):
        assert_same_bits(one, other)
    mine = data.residual.copy()
    _, pullback = bn.vjp(data.x, mine, residual=mine)
    for one, other in zip(pullback(data.dy), gradients, strict=True):
        assert_same_bits(one, other)


# (shape, axis): rows of whole and of broken vectors, few and many, in blocks and in phases; planar and interleaved
MARKED = [
    ((4, 6, 20), 1), ((3, 5, 17), 1), ((2, 3, 64), 1), ((9, 40, 49), 1), ((2, 3, 40_000), 1), ((6, 200, 196), 1),
    ((20, 6, 20), 1), ((70, 64), 1), ((33, 3), 1), ((500, 5), 1), ((20, 1000), 1), ((8, 4096), 1), ((300, 515), 1),
    ((5, 7, 6), -1), ((4, 5, 3, 130), -1),
]  # fmt: skip


PLANS = [
    {},
    {"kind": "phases", "near": True, "stream": True},
    {"kind": "phases", "near": False, "stream": False},
    {"kind": "blocks", "pack": True, "stream": True},
    {"kind": "blocks", "pack": True, "stream": False},
    {"kind": "blocks", "pack": False, "near": True, "written_later": True},
    {"kind": "blocks", "written_later": True, "stream": True},
    {"kind": "blocks", "written_later": False, "stream": True},
]


def elements_further(array, n):
    """A new array like this one, n elements behind a line of memory; and what lies before and behind it, all 7."""
    itemsize = array.itemsize
    memory = np.full(array.size + n + 2 * 64 // itemsize, 7, array.dtype)
    first = -memory.ctypes.data % 64 // itemsize + n
    before, mine, behind = np.split(memory, [first, first + array.size])
    return mine.reshape(array.shape), (before, behind)


@pytest.mark.parametrize("activation", ["leaky_relu", "relu"])
@pytest.mark.parametrize(("shape", "axis"), MARKED)
def test_a_layer_goes_by_marks_to_the_bits_of_the_residual(isa, shape, axis, dtype, activation, force_plan):
    """Whatever the plan, the threads, and where y and the gradients begin in memory."""
    data = data_of(shape, axis, dtype)
    bn = BatchNorm(shape[axis], axis=axis, dtype=dtype, activation=activation, negative_slope=SLOPE)
    bn.gamma, bn.beta = data.gamma, data.beta
    alone = BatchNorm(shape[axis], axis=axis, dtype=dtype)
    alone.gamma, alone.beta = data.gamma, data.beta
    dresidual = passed(data.dy, alone(data.x) + data.residual, activation)
    dx = alone.backward(dresidual)
    for number, plan in enumerate(PLANS):
        # two gradients that begin alike go around the caches, each in whole lines
        second = number if number == 3 else 2 * number
        (y, by_y), (out, by_out), (out_residual, by_residual) = (
            elements_further(data.x, n) for n in (number, 2 * number, second)
        )
        force_plan(**plan)
        with bnfast.num_threads(1 + number % 2):
            bn(data.x, out=y, residual=data.residual)
            bn.backward(data.dy, out, out_residual=out_residual)
        assert_same_bits(out, dx, plan)
        assert_same_bits(out_residual, dresidual, plan)
        assert_same_bits(bn.grad_gamma, alone.grad_gamma, plan)
        assert all((beside == 7).all() for beside in (*by_y, *by_out, *by_residual)), plan


def test_marks_of_one_instruction_set_serve_a_backward_under_another(isa):
    data, bn = data_of((9, 40, 49)), BatchNorm(40, activation="relu")
    bn(data.x, residual=data.residual)
    expected = bn.backward(data.dy)
    for other_isa, (compiled, supported) in _core.isas().items():
        if not (compiled and supported):
            continue
        bn(data.x, residual=data.residual)
        _core.select_isa(other_isa)
        found = bn.backward(data.dy)
        _core.select_isa(isa)
        for one, other in zip(found, expected, strict=True):
            assert_same_bits(one, other)


def test_a_strided_batch_finds_its_marks_again():
    whole = data_of((6, 10, 40))
    x, residual, dy = (array[::2, ::2, 1::3] for array in (whole.x, whole.residual, whole.dy))
    bn, twin = BatchNorm(5, activation="relu6"), BatchNorm(5, activation="relu6")
    bn(x, residual=residual)
    twin(x.copy(), residual=residual.copy())
    for one, other in zip(bn.backward(dy), twin.backward(dy.copy()), strict=True):
        assert_same_bits(one, other)


def test_x_may_be_its_own_residual():
    data, bn, twin = data_of((6, CHANNELS, 20)), layer("relu"), layer("relu")
    assert_same_bits(bn(data.x, residual=data.x), twin(data.x, residual=data.x.copy()))
    for one, other in zip(bn.backward(data.dy), twin.backward(data.dy), strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("with_mask", [False, True])
def test_no_residual_is_kept_for_a_backward(activation, with_mask):
    data, bn = data_of((6, CHANNELS, 20)), layer(activation)
    residual = data.residual.copy()
    reference = weakref.ref(residual)
    bn(data.x, residual=residual, mask=mask_of((6, CHANNELS, 20), 1) if with_mask else None)
    del residual
    gc.collect()
    assert reference() is None
    bn.backward(data.dy)


def test_no_grad_keeps_nothing_for_backward():
    data, bn = data_of((12, CHANNELS)), layer("relu")
    mask = mask_of((12, CHANNELS), 1)
    with bnfast.no_grad():
        y = bn(data.x, residual=data.residual, mask=mask)
    assert_same_bits(y, layer("relu")(data.x, residual=data.residual, mask=mask))
    with pytest.raises(RuntimeError, match="under no_grad"):
        bn.backward(data.dy)


# --- where gradients are written, and added up -----------------------------------------------------------------


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("with_mask", [False, True])
@both_modes
def test_gradients_may_be_written_into_dy_x_and_the_residual(activation, with_mask, training, dtype):
    for shape, axis in LAYOUTS.values():
        mask = mask_of(shape, axis) if with_mask else None
        places = [None, "dy", "x", "residual", "new"]
        for out, out_residual in itertools.product(places, places):
            data = data_of(shape, axis, dtype)
            arrays = {"dy": data.dy, "x": data.x, "residual": data.residual, None: None}
            bn = layer(activation, axis=axis, dtype=dtype).train(training)
            y, pullback = bn.vjp(data.x, residual=data.residual, mask=mask)
            expected = pullback(data.dy)
            gradients = bn.grad_gamma, bn.grad_beta
            if out == out_residual not in (None, "new"):
                with pytest.raises(ValueError, match="out_residual: expected memory of its own"):
                    pullback(data.dy, arrays[out], out_residual=arrays[out])
                continue
            given = [np.empty_like(y) if place == "new" else arrays[place] for place in (out, out_residual)]
            found = pullback(data.dy, given[0], out_residual=given[1])
            for one, other, place in zip(found, expected, given, strict=True):
                assert_same_bits(one, other, f"{out}, {out_residual}")
                assert place is None or one is place
            assert_same_bits(bn.grad_gamma, gradients[0])
            assert_same_bits(bn.grad_beta, gradients[1])


def test_gradients_accumulate():
    data, bn = data_of((12, CHANNELS)), layer("relu")
    given = {"residual": data.residual, "mask": mask_of((12, CHANNELS), 1)}
    bn(data.x, **given)
    bn.backward(data.dy)
    first = bn.grad_gamma, bn.grad_beta
    bn(data.v, **given)
    bn.backward(data.dy)
    second = bn.grad_gamma, bn.grad_beta
    assert (second[0] != first[0]).any()
    bn(data.x, **given)
    bn.backward(data.dy, accumulate=True)
    for found, one, other in zip((bn.grad_gamma, bn.grad_beta), first, second, strict=True):
        assert_same_bits(found, other + one)


def test_a_pullback_may_be_called_whenever_and_as_often_as_one_likes():
    data, bn = data_of((6, CHANNELS, 20)), layer("relu6")
    given = {"residual": data.residual, "mask": mask_of((6, CHANNELS, 20), 1)}
    y, pullback = bn.vjp(data.x, **given)
    other_y, other = bn.vjp(data.v)
    bn(data.x, **given)
    expected = bn.backward(data.dy)
    gradients = bn.grad_gamma, bn.grad_beta
    bn.gamma[:], bn.beta[:] = 7, 8
    bn.eval()(data.v)
    assert isinstance(other(data.dy), np.ndarray)  # there was no residual
    assert other_y.shape == y.shape
    for _ in range(2):
        for one, another in zip(pullback(data.dy), expected, strict=True):
            assert_same_bits(one, another)
        assert_same_bits(bn.grad_gamma, gradients[0])
        assert_same_bits(bn.grad_beta, gradients[1])
    pullback(data.dy, accumulate=True)
    assert_same_bits(bn.grad_gamma, gradients[0] + gradients[0])


def test_a_wrong_dy_leaves_the_forward_waiting():
    data, bn = data_of((12, CHANNELS)), layer("relu")
    bn(data.x, residual=data.residual)
    for wrong in (data.dy[:-1], data.dy.astype(np.float64)):
        with pytest.raises((TypeError, ValueError), match="dy: expected"):
            bn.backward(wrong)
    assert len(bn.backward(data.dy)) == 2


# --- options, copies, files ------------------------------------------------------------------------------------


def test_a_new_layer_has_no_activation():
    bn = BatchNorm(3)
    assert bn.activation is None
    assert bn.negative_slope == 0.01
    for name in ("activation", "negative_slope"):
        with pytest.raises(AttributeError, match=f"{name}: fixed when the layer was made"):
            setattr(bn, name, getattr(bn, name))
        with pytest.raises(AttributeError, match=f"{name}: fixed"):
            delattr(bn, name)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"activation": "relu"}, ", activation='relu'"),
        ({"activation": "relu6"}, ", activation='relu6'"),
        ({"activation": "leaky_relu"}, ", activation='leaky_relu'"),
        ({"activation": "leaky_relu", "negative_slope": 0.25}, ", activation='leaky_relu', negative_slope=0.25"),
        ({"negative_slope": 0.25}, ""),  # nothing that matters
        ({"activation": "relu", "negative_slope": 0.25}, ", activation='relu'"),
    ],
)
def test_repr_has_the_activation(options, words):
    assert repr(BatchNorm(3, **options)) == f"BatchNorm(3, axis=1, eps=1e-05, momentum=0.1{words})"


def saved(bn, folder):
    bn.save(folder / "bn")
    return BatchNorm.load(folder / "bn")


def saved_in_a_model(bn, folder):
    bnfast.save(folder / "model", {"bn": bn})
    return bnfast.load(folder / "model")["bn"]


WAYS = {
    "copy": lambda bn, folder: copy.copy(bn),
    "deepcopy": lambda bn, folder: copy.deepcopy(bn),
    **{f"pickle{p}": lambda bn, folder, p=p: pickle.loads(pickle.dumps(bn, p)) for p in range(2, 6)},
    "file": saved,
    "model": saved_in_a_model,
}


@pytest.mark.parametrize("way", WAYS)
@every_activation
def test_an_activation_is_kept_by_copies_pickles_and_files(way, activation, tmp_path):
    data, bn = data_of((12, CHANNELS)), layer(activation)
    bn(data.x)
    again = WAYS[way](bn, tmp_path)
    assert again.activation == activation
    assert again.negative_slope == SLOPE
    assert raw(again) == raw(bn)
    assert_same_bits(again(data.x, residual=data.residual), bn(data.x, residual=data.residual))


def test_states_without_an_activation_are_of_layers_without_one():
    """As bnfast wrote them before there were any."""
    bn = layer()
    state = bn.__getstate__()
    for name in ("activation", "negative_slope"):
        del state["options"][name]
    again = BatchNorm.__new__(BatchNorm)
    again.__setstate__(state)
    assert again.activation is None
    assert again.negative_slope == 0.01
    data = data_of((12, CHANNELS))
    assert_same_bits(again(data.x), bn(data.x))


def test_a_state_dict_has_nothing_of_it():
    assert layer("relu").state_dict().keys() == layer().state_dict().keys()
    bn = layer("relu")
    bn.load_state_dict(layer().state_dict())
    assert bn.activation == "relu"


# --- gradients against differences -----------------------------------------------------------------------------


@pytest.mark.parametrize("with_mask", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@every_activation
@both_modes
def test_every_combination_passes_check_layer(activation, with_residual, with_mask, training):
    for shape, axis in LAYOUTS.values():
        data = batch(shape, np.float64, axis, at_kinks=False)
        mask = mask_of(shape, axis) if with_mask else None
        bn = layer(activation, axis=axis, dtype=np.float64).train(training)
        before = everything(bn)
        check = check_layer(bn, data.x, residual=data.residual if with_residual else None, mask=mask)
        check.raise_if_failed()
        assert everything(bn) == before
        names = {"x", "gamma", "beta", *(["residual"] if with_residual else [])}
        assert {row.input.split("[")[0] for row in check.rows} == names  # parts of x have rows of their own
        for name in names:  # kinks and the like leave enough
            assert sum(row.verdict == "ok" for row in check.rows if row.input == name) >= 4, check


def test_float32_passes_check_layer():
    data = batch((12, CHANNELS), np.float32, at_kinks=False)
    check_layer(layer("relu"), data.x, residual=data.residual, mask=mask_of((12, CHANNELS), 1)).raise_if_failed()


class Twice(BatchNorm):
    def backward(self, dy):
        dx, dresidual = super().backward(dy)
        return dx, 2 * dresidual


class Alone(BatchNorm):
    def backward(self, dy):
        return super().backward(dy)[0]


class Unmasked(BatchNorm):
    """Its backward is that of all positions."""

    def forward(self, x, *, residual=None, mask=None):
        super().forward(x, residual=residual)
        self.kept = x, residual
        with bnfast.no_grad():
            return super().forward(x, residual=residual, mask=mask)

    def backward(self, dy):
        super().forward(self.kept[0], residual=self.kept[1])
        return super().backward(dy)


def test_check_layer_sees_a_wrong_gradient_of_a_residual():
    data = batch((12, CHANNELS), np.float64, at_kinks=False)
    check = check_layer(Twice(CHANNELS, dtype=np.float64), data.x, residual=data.residual)
    verdicts = {(row.input, row.verdict) for row in check.rows}
    assert verdicts == {("x", "ok"), ("gamma", "ok"), ("beta", "ok"), ("residual", "wrong")}


def test_check_layer_sees_a_mask_that_backward_forgot():
    data = batch((12, CHANNELS), np.float64, at_kinks=False)
    check = check_layer(Unmasked(CHANNELS, dtype=np.float64), data.x, mask=mask_of((12, CHANNELS), 1))
    assert "wrong" in {row.verdict for row in check.rows if row.input == "x"}


def test_check_layer_asks_for_the_gradient_of_a_residual():
    data = batch((12, CHANNELS), np.float64)
    with pytest.raises(TypeError, match=r"expected \(dx, dresidual\) of backward"):
        check_layer(Alone(CHANNELS, dtype=np.float64), data.x, residual=data.residual)
