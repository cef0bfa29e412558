"""float16 and bfloat16 data: computed in float32 and rounded once, so with the bits of float32 data, rounded.

That is one half of what is promised; how exact float32 is, the other, is in tests/kernels/test_accuracy.py, and what
both make together is held against longdouble, and against PyTorch, here. Conversions:
tests/kernels/test_half_conversions.py.
"""

import pickle
import subprocess
import sys

import numpy as np
import pytest
from activations import ACTIVATIONS, batch
from digests import case_name
from halves import DTYPES, half, single, ulp
from tolerances import TABLE, assert_same_bits, assert_within, wide

import bnfast
from bnfast import BatchNorm, _core, reference
from bnfast import functional as F

NAMES = pytest.mark.parametrize("name", DTYPES)

# (shape, axis, memory order): planar with long, short and very short rows; columns; interleaved narrow and wide
CASES = [
    ((3, 4, 130), 1, "C"),
    ((2, 3, 70, 71), 1, "C"),
    ((40, 5, 7, 7), 1, "C"),
    ((9, 4, 3), 1, "C"),
    ((5, 9, 8, 3), -1, "C"),
    ((3000, 3), 1, "C"),
    ((37, 130), 1, "C"),
    ((11, 260), 1, "C"),
    ((2, 1), 1, "C"),
    ((5, 70), 0, "C"),
    ((7, 3, 5, 6), 2, "F"),
    ((260, 256), 1, "C"),  # whole lines
    ((8, 40, 33, 16), 1, "C"),  # large enough for threads
    ((9000, 8, 3), 1, "C"),
    ((2000, 70), 1, "C"),
]


EVERY_CASE = pytest.mark.parametrize("case", CASES, ids=case_name)


def data(case, dtype, at_kinks=True):
    """x, dy, ... of halves, parameters of float32."""
    shape, axis, order = case
    return batch(shape, np.float32, axis, order, at_kinks).map(lambda array: half(array, dtype))


def all_of(b, activation=None, residual=False, mask=None):
    """{name: array} of every function; their y, dx, ... are like x."""
    options = {"axis": b.axis, "activation": activation, "negative_slope": 0.3, "mask": mask}
    if residual:
        options["residual"] = b.residual
    found = {}
    found["y"], found["mean"], found["inv_std"] = F.batch_norm(b.x, b.gamma, b.beta, **options)
    mean, inv_std = found["mean"], found["inv_std"]
    moments = bnfast.moments(b.x, axis=b.axis, mask=mask)
    found |= {"moments mean": moments.mean, "m2": moments.m2}
    found["y of eval"] = F.batch_norm_eval(b.x, mean, moments.var(), b.gamma, b.beta, **options)
    back = {"beta": b.beta, **options}
    for training in (True, False):
        gradients = F.batch_norm_backward(b.dy, b.x, mean, inv_std, b.gamma, training=training, **back)
        names = ("dx", "dgamma", "dbeta", "dresidual")
        found |= {f"{n}, training={training}": g for n, g in zip(names, gradients, strict=False)}
    sums = F.batch_norm_backward_sums(b.dy, b.x, mean, inv_std, b.gamma, **back)
    found |= {"sums.dgamma": sums.dgamma, "sums.dbeta": sums.dbeta}
    applied = F.batch_norm_backward_apply(b.dy, b.x, mean, inv_std, b.gamma, sums, **back)
    found |= dict(zip(("applied", "dresidual of apply"), applied if residual else (applied,), strict=False))
    more = {"vgamma": b.vgamma, "vbeta": b.vbeta, "vresidual": b.vresidual if residual else None}
    found["jvp"] = F.batch_norm_jvp(b.v, b.x, mean, inv_std, b.gamma, **back, **more)
    return found


def assert_rounded(found, expected, name):
    """What is like x has the bits of the same in float32, rounded; the rest has its bits."""
    assert found.keys() == expected.keys()
    for what, array in expected.items():
        rounded = half(array, DTYPES[name]) if array.ndim > 1 else array
        assert_same_bits(found[what], rounded, f"{what} of {name}")


# --- the bits of float32, rounded -----------------------------------------------------------------------------------


@NAMES
@EVERY_CASE
def test_every_function_is_that_of_float32_rounded(isa, case, name):
    b = data(case, DTYPES[name])
    assert_rounded(all_of(b), all_of(b.map(single)), name)


@NAMES
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", CASES[:11] + CASES[12:13], ids=case_name)
def test_activation_and_residual_are_rounded_once(isa, case, name, activation, residual):
    b = data(case, DTYPES[name], at_kinks=False)
    assert_rounded(all_of(b, activation, residual), all_of(b.map(single), activation, residual), name)


@NAMES
def test_masked(isa, name, rng):
    for case in (CASES[1], CASES[4], CASES[6]):
        b = data(case, DTYPES[name])
        mask = rng.random(np.moveaxis(b.x, b.axis, -1).shape[:-1]) < 0.7
        found, expected = (all_of(some, "relu", True, mask) for some in (b, b.map(single)))
        assert_rounded(found, expected, name)


@NAMES
def test_layouts_and_strides(layout, name):
    b = data(((6, 5, 9, 10), 1, "C"), DTYPES[name])
    placed = b.map(layout.place)._replace(axis=layout.axis)
    assert_rounded(all_of(placed), all_of(placed.map(single)), name)
    gaps = b.map(lambda array: np.repeat(array, 2, -1)[..., ::2])  # which the kernels cannot take
    assert not gaps.x.flags.contiguous
    assert_rounded(all_of(gaps), all_of(b.map(single)), name)


def test_other_byte_order():
    b = data(CASES[0], DTYPES["float16"])
    found = all_of(b.map(lambda array: array.astype(">f2")))
    assert_rounded(found, all_of(b.map(single)), "float16")


@NAMES
@pytest.mark.parametrize("case", CASES[:2] + CASES[6:7] + CASES[12:], ids=case_name)
def test_bits_do_not_depend_on_threads_or_alignment(case, name):
    """Nor on whether the result goes around the caches."""
    b = data(case, DTYPES[name])
    expected = all_of(b), all_of(b, "leaky_relu")

    def moved(array):
        memory = np.empty(array.size + 3, array.dtype)[3:]
        there = memory.reshape(array.shape[::-1]).T if array.flags.f_contiguous else memory.reshape(array.shape)
        there[...] = array
        return there

    try:
        for n_threads in (1, 2, 3):
            for plan in ({}, {"stream": True}, {"kind": "phases"}, {"kind": "blocks", "pack": True}):
                _core.force_plan(**plan)
                with bnfast.num_threads(n_threads):
                    for found, usual in zip((all_of(b.map(moved)), all_of(b, "leaky_relu")), expected, strict=True):
                        for what, array in found.items():
                            assert_same_bits(array, usual[what], f"{what} {plan} {n_threads}")
    finally:
        _core.force_plan()


@NAMES
@pytest.mark.parametrize("stream", [False, True])
def test_maps_round_every_value_as_one_by_one(isa, name, stream, force_plan):
    """Some vectors are taken two at once; infinities and NaN among them, and results that begin anywhere."""
    values = np.arange(2**16, dtype=np.uint16)
    several = np.stack([np.roll(values, c) for c in range(25)]).view(DTYPES[name])
    mean, var = np.linspace(-1, 1, 25), np.geomspace(0.1, 9, 25)
    gamma, beta = np.full(25, 0.7, np.float32), np.full(25, 0.1, np.float32)
    force_plan(stream=stream)
    for missing, before in ((0, 0), (1, 5), (9, 8), (23, 17)):  # channels that end in parts of vectors, or of two
        planar, interleaved = several[None, :, missing:].copy(), several.T[missing:].copy()
        y = F.batch_norm_eval(planar.astype(np.float32), mean, var, gamma, beta)
        with np.errstate(over="ignore"):
            expected = y.astype(DTYPES[name])
        for x, wanted in ((planar, expected), (interleaved, expected[0].T)):
            memory = np.full(x.size + 64, 7, x.dtype)
            out = memory[before : before + x.size].reshape(x.shape)
            F.batch_norm_eval(x, mean, var, gamma, beta, out=out)
            same = out.view(np.uint16) == wanted.view(np.uint16)
            assert np.all(same | (np.isnan(out) & np.isnan(wanted)))
            assert np.all(memory[:before] == 7)
            assert np.all(memory[before + x.size :] == 7)


@NAMES
@pytest.mark.parametrize("stream", [False, True])
def test_a_mean_that_is_any_nan_makes_its_channel_nan(isa, name, stream, force_plan):
    """Also one that rounding would carry beyond the NaNs, into zero."""
    planar = np.random.default_rng(0).standard_normal((2, 25, 37)).astype(DTYPES[name])
    bits = np.zeros(25, np.uint64)
    bits[1::3], bits[2::3] = 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF
    mean = bits.view(np.float64)
    force_plan(stream=stream)
    for x, axis in ((planar, 1), (np.moveaxis(planar, 1, -1).copy(), -1)):
        y = F.batch_norm_eval(x, mean, np.ones(25), axis=axis)
        dx = F.batch_norm_backward(x, x, mean, np.ones(25), axis=axis)[0]
        for result in (y, dx):
            channels = np.moveaxis(result, axis, 0)
            assert not np.isnan(channels[0::3]).any()
            assert np.isnan(channels[1::3]).all()
            assert np.isnan(channels[2::3]).all()


@NAMES
def test_results_go_where_they_are_wanted(name):
    for case in (CASES[0], CASES[6], CASES[12]):
        b = data(case, DTYPES[name])
        y, mean, inv_std = F.batch_norm(b.x, b.gamma, b.beta, axis=b.axis, residual=b.residual, activation="leaky_relu")
        x, out = b.x.copy("K"), np.empty_like(b.x)
        options = {"axis": b.axis, "residual": b.residual, "activation": "leaky_relu"}
        assert F.batch_norm(x, b.gamma, b.beta, **options, out=out)[0] is out
        assert_same_bits(out, y)
        assert F.batch_norm(x, b.gamma, b.beta, **options, out=x)[0] is x
        assert_same_bits(x, y)
        back = {"beta": b.beta, **options}
        dx, *_, dresidual = F.batch_norm_backward(b.dy, b.x, mean, inv_std, b.gamma, **back)
        outs = {"out": np.empty_like(b.x), "out_residual": np.empty_like(b.x)}
        found = F.batch_norm_backward(b.dy, b.x, mean, inv_std, b.gamma, **back, **outs)
        assert found[0] is outs["out"]
        assert found[3] is outs["out_residual"]
        assert_same_bits(found[0], dx)
        assert_same_bits(found[3], dresidual)
        with pytest.raises(TypeError, match=f"out: expected dtype {name}, got float32"):
            F.batch_norm(b.x, axis=b.axis, out=single(b.x))


@NAMES
def test_nan_and_infinities_stay_in_their_channel(isa, name):
    for case in (CASES[1], CASES[6]):
        b = data(case, DTYPES[name])
        clean = F.batch_norm(b.x, b.gamma, b.beta, axis=b.axis)
        channels = np.moveaxis(b.x, b.axis, 0)
        channels[1].flat[3], channels[2].flat[-1] = np.nan, -np.inf
        found = F.batch_norm(b.x, b.gamma, b.beta, axis=b.axis)
        expected = F.batch_norm(single(b.x), b.gamma, b.beta, axis=b.axis)
        assert_same_bits(found[1], expected[1])
        others = [0, *range(3, len(channels))]
        for i in (0, 1, 2):
            part, before = found[i], clean[i]
            if i == 0:
                part, before = np.moveaxis(part, b.axis, 0), np.moveaxis(before, b.axis, 0)
            assert_same_bits(part[others], before[others])
        assert (
            np.isnan(np.moveaxis(found[0], b.axis, 0)[[1, 2]].astype(np.float32))
            .any(axis=tuple(range(1, b.x.ndim)))
            .all()
        )


# --- how exact ------------------------------------------------------------------------------------------------------


@NAMES
@pytest.mark.parametrize("mean", [0.0, 300.0])
@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[6], CASES[14]], ids=case_name)
def test_within_half_an_ulp_and_the_error_of_float32(isa, case, name, mean, rng):
    """Of the exact results for the given data, by longdouble."""
    shape, axis, order = case
    x, dy = (half(np.asarray(rng.normal(m, 2, shape), np.float32, order=order), DTYPES[name]) for m in (mean, 0.5))
    gamma, beta = rng.normal(size=(2, shape[axis])).astype(np.float32)
    x32, dy32 = single(x), single(dy)
    tolerance = TABLE["float32"]
    y, found_mean, inv_std = F.batch_norm(x, gamma, beta, axis=axis)
    true_y, true_mean, true_inv_std = reference.batch_norm(wide(x32), wide(gamma), wide(beta), axis=axis)
    x_hat = reference.batch_norm(wide(x32), axis=axis)[0]

    def along(values):
        return abs(wide(values)).reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])

    error = tolerance.y * (along(gamma) * (1 + abs(x_hat)) + along(beta))
    error += along(gamma) * abs(x_hat) * tolerance.var_share / 2  # few values a channel
    assert_within(single(y), true_y, error + ulp(abs(true_y) + error, name) / 2, "y")
    assert_within(found_mean, true_mean, tolerance.mean / true_inv_std + 2e-16 * abs(true_mean), "mean")
    assert_within(inv_std, true_inv_std, (tolerance.var + tolerance.var_share) * true_inv_std, "inv_std")

    args = (wide(dy32), wide(x32), wide(found_mean), wide(inv_std), wide(gamma))
    dx, dgamma, dbeta = F.batch_norm_backward(dy, x, found_mean, inv_std, gamma, axis=axis)
    true_dx, true_dgamma, true_dbeta = reference.batch_norm_backward(*args, axis=axis)
    largest = abs(dy32).max() * (2 + x_hat.max() ** 2)
    error = tolerance.dx * along(gamma) * along(inv_std) * largest
    assert_within(single(dx), true_dx, error + ulp(abs(true_dx) + error, name) / 2, "dx")
    others = tuple(i for i in range(len(shape)) if i != axis % len(shape))
    assert dgamma.dtype == dbeta.dtype == np.float32
    assert_within(dgamma, true_dgamma, tolerance.sums * abs(wide(dy32) * x_hat).sum(others), "dgamma")
    assert_within(dbeta, true_dbeta, tolerance.sums * abs(wide(dy32)).sum(others), "dbeta")


@NAMES
@pytest.mark.parametrize("shape", [(64, 8, 40, 40), (65_536, 16)], ids=["planar", "columns"])
def test_statistics_do_not_overflow_where_the_data_do_not(isa, name, shape):
    """The sum of these is far beyond 65,504, the sum of their squares beyond float32 for bfloat16."""
    largest = {"float16": 60_000.0, "bfloat16": 3e38}[name]
    signs = np.where(np.arange(np.prod(shape)).reshape(shape) % 7 < 3, 1.0, 0.5)
    x = half((signs * largest).astype(np.float32), DTYPES[name])
    y, mean, inv_std = F.batch_norm(x)
    true_y, true_mean, true_inv_std = reference.batch_norm(wide(single(x)))
    np.testing.assert_allclose(mean, true_mean.astype(float), rtol=1e-7)
    np.testing.assert_allclose(inv_std, true_inv_std.astype(float), rtol=1e-6)
    assert_within(single(y), true_y, 1e-6 + ulp(true_y, name), "y")


@NAMES
def test_overflow_to_infinity_and_subnormals(isa, name):
    """The result is rounded as the dtype is, whatever gamma is."""
    x = half(np.array([[0.0], [1.0], [2.0], [3.0]], np.float32), DTYPES[name])
    for gamma in (3e4, 6e4, 1e-6, 3e-8, 3e38, 1e-38):
        y = F.batch_norm(x, np.array([gamma], np.float32))[0]
        y32 = F.batch_norm(single(x), np.array([gamma], np.float32))[0]
        assert_same_bits(y, half(y32, DTYPES[name]), str(gamma))


@NAMES
def test_beside_pytorch(name, capsys):
    """Never further from the exact values than PyTorch on the CPU, forward and backward."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: there is nothing to compare with")
    rng = np.random.default_rng(3)
    torch_dtype = getattr(torch, name)
    for shape, last in (((16, 8, 30, 30), False), ((16, 30, 30, 8), True)):
        x, dy = (half(rng.normal(m, 2, shape).astype(np.float32), DTYPES[name]) for m in (3, 0))
        axis = 3 if last else 1
        gamma, beta = rng.normal(size=(2, 8)).astype(np.float32)
        y, mean, inv_std = F.batch_norm(x, gamma, beta, axis=axis)
        dx = F.batch_norm_backward(dy, x, mean, inv_std, gamma, axis=axis)[0]
        true_y, true_mean, true_inv_std = reference.batch_norm(wide(single(x)), wide(gamma), wide(beta), axis=axis)
        true_dx = reference.batch_norm_backward(
            wide(single(dy)), wide(single(x)), true_mean, true_inv_std, wide(gamma), axis=axis
        )[0]

        def tensor(array, last=last, torch_dtype=torch_dtype):
            made = torch.from_numpy(np.ascontiguousarray(single(array))).to(torch_dtype)
            return made.permute(0, 3, 1, 2) if last else made

        leaf = tensor(x).requires_grad_()
        theirs = torch.nn.functional.batch_norm(
            leaf, None, None, torch.from_numpy(gamma), torch.from_numpy(beta), training=True
        )
        theirs.backward(tensor(dy))
        for what, ours, other, true in (("y", y, theirs.detach(), true_y), ("dx", dx, leaf.grad, true_dx)):
            other = (other.permute(0, 2, 3, 1) if last else other).float().numpy()
            errors = [float(np.sqrt(np.mean((wide(single(a)) - true) ** 2))) for a in (ours, other)]
            assert errors[0] <= errors[1] * (1 + 1e-3), (what, errors)


# --- the layer, the scaler, statistics, files -----------------------------------------------------------------------


@NAMES
@pytest.mark.parametrize("parameters", [np.float32, np.float64])
@pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
def test_layer(isa, name, parameters, activation):
    b = data(((6, 5, 9, 10), 1, "C"), DTYPES[name], at_kinks=False)
    ours, other = (BatchNorm(5, dtype=parameters, activation=activation, negative_slope=0.3) for _ in range(2))
    for bn in (ours, other):
        bn.gamma, bn.beta = b.gamma.astype(parameters), b.beta.astype(parameters)
    wide_b = b.map(single)
    for _ in range(2):
        assert_same_bits(ours(b.x, residual=b.residual), half(other(wide_b.x, residual=wide_b.residual), DTYPES[name]))
        pairs = zip(ours.backward(b.dy), other.backward(wide_b.dy), strict=True)
        for found, expected in pairs:
            assert_same_bits(found, half(expected, DTYPES[name]))
    for attribute in ("running_mean", "running_var", "grad_gamma", "grad_beta"):
        assert_same_bits(getattr(ours, attribute), getattr(other, attribute), attribute)
    assert ours.grad_gamma.dtype == parameters
    y, pullback = ours.vjp(b.x)
    other.vjp(wide_b.x)  # which takes part in the running statistics
    dx, *_ = pullback(b.dy)
    assert y.dtype == dx.dtype == DTYPES[name]
    ours.eval(), other.eval()
    for residual, wide_residual in ((None, None), (b.residual, wide_b.residual)):
        found, expected = ours(b.x, residual=residual), other(wide_b.x, residual=wide_residual)
        assert_same_bits(found, half(expected, DTYPES[name]))
        found, expected = ours.backward(b.dy), other.backward(wide_b.dy)
        pairs = zip(found, expected, strict=True) if residual is not None else [(found, expected)]
        for part, wide_part in pairs:
            assert_same_bits(part, half(wide_part, DTYPES[name]))
    for bn, x in ((ours, b.x), (other, wide_b.x)):
        with bn.calibrate():
            bn(x[:3])
            bn(x[3:])
    assert_same_bits(ours.running_var, other.running_var)
    again = pickle.loads(pickle.dumps(ours))
    assert_same_bits(again(b.x), ours(b.x))


@NAMES
def test_parameters_of_halves_are_refused_with_words(name):
    x = half(np.ones((4, 3), np.float32), DTYPES[name])
    with pytest.raises(TypeError, match=f"dtype: expected float32 or float64, got {name}; data may be halves"):
        BatchNorm(3, dtype=DTYPES[name])
    with pytest.raises(TypeError, match=rf"gamma: expected dtype float32 or float64, .*got {name}; use gamma.astype"):
        F.batch_norm(x, x[0])
    with pytest.raises(TypeError, match=f"dy: expected dtype {name}, that of x, got float32"):
        F.batch_norm_backward(single(x), x, np.zeros(3), np.ones(3))


@NAMES
def test_state_of_halves_is_widened_exactly(name):
    bn = BatchNorm(3)
    state = {key: half(np.array(value, np.float32), DTYPES[name]) for key, value in {
        "weight": [0.1, 2, 3], "bias": [1, 0.3, -1], "running_mean": [5, 0.7, 100], "running_var": [1e-3, 7, 60_000],
    }.items()}  # fmt: skip
    bn.load_state_dict(state)
    for attribute, key in (("gamma", "weight"), ("beta", "bias"), ("running_mean", "running_mean")):
        np.testing.assert_array_equal(getattr(bn, attribute), state[key].astype(np.float64))
    np.testing.assert_array_equal(bn.running_var, state["running_var"].astype(np.float64))
    before = bn.state_dict()
    with pytest.raises(bnfast.StateError, match=r"running_var: .*inf"):  # what float16 makes of 70,000
        bn.load_state_dict({**state, "running_var": half(np.array([1, np.inf, 2], np.float32), DTYPES[name])})
    for key, value in bn.state_dict().items():
        assert_same_bits(np.asarray(value), np.asarray(before[key]), key)
    moments = bnfast.Moments(5, state["running_mean"], state["running_var"])
    np.testing.assert_array_equal(moments.mean, bn.running_mean)


@NAMES
def test_scaler(name, rng):
    x = half(rng.normal([3, 100, -5], [1, 20, 0.01], (1000, 3)).astype(np.float32), DTYPES[name])
    scaler = bnfast.StandardScaler().fit(x)
    mean, std = wide(single(x)).mean(0), wide(single(x)).std(0)
    np.testing.assert_allclose(scaler.mean_, mean.astype(float), rtol=1e-6)
    np.testing.assert_allclose(scaler.scale_, std.astype(float), rtol=1e-6)
    y = scaler.transform(x)
    true = (wide(single(x)) - mean) / std
    assert y.dtype == x.dtype
    assert_within(single(y), true, 1e-6 * (1 + abs(true)) + ulp(true, name) / 2, "y")
    back = scaler.inverse_transform(y)
    assert back.dtype == x.dtype
    true_back = wide(single(y)) * std + mean
    assert_within(single(back), true_back, 1e-6 * (abs(true_back) + std) + ulp(true_back, name) / 2, "inverse")
    x[5, 1] = np.nan
    assert np.isfinite(scaler.fit(x).mean_).all()
    x[5, 1] = np.inf
    with pytest.raises(ValueError, match="Input X contains infinity"):
        scaler.transform(x)


def test_import_needs_no_ml_dtypes():
    """bfloat16 is found when an array of it comes."""
    script = (
        "import sys, numpy as np, bnfast\n"
        "assert 'ml_dtypes' not in sys.modules\n"
        "x = np.ones((4, 3), np.float16)\n"
        "assert bnfast.functional.batch_norm(x)[0].dtype == np.float16\n"
        "assert 'ml_dtypes' not in sys.modules\n"
        "import ml_dtypes\n"
        "x = x.astype(ml_dtypes.bfloat16)\n"
        "assert bnfast.functional.batch_norm(x)[0].dtype == ml_dtypes.bfloat16\n"
        "try:\n    bnfast.functional.batch_norm(x.astype(ml_dtypes.float8_e4m3))\n"
        "except TypeError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "expected dtype float16, bfloat16, float32 or float64, got float8_e4m3" in done.stdout
