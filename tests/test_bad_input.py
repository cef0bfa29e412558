"""The table of bad input, row by row: what is refused and how, what is accepted and gives the usual answer.

A refusal has the right type, and a message that says which argument, what came and what was expected; it leaves the
layer and every argument as they were.
"""

import copy
import sys
import warnings
from functools import partial

import numpy as np
import pytest
from numpy.exceptions import AxisError
from numpy.lib.stride_tricks import as_strided
from scripts import run_script

import bnfast
from bnfast import BatchNorm
from bnfast import functional as F

C = 3
SHAPE = (4, C, 5)


def sample(seed=0, shape=SHAPE, dtype=np.float32):
    return np.random.default_rng(seed).normal(2.0, 3.0, shape).astype(dtype)


def usual_arguments(shape=SHAPE):
    """Right values for every argument of the functions, new ones each time."""
    x = sample(shape=shape)
    others = tuple(i for i in range(len(shape)) if i != 1)
    return {
        "x": x,
        "dy": sample(1, shape),
        "v": sample(2, shape),
        "residual": sample(5, shape),
        "vresidual": sample(6, shape),
        "mean": x.mean(others, dtype=np.float64),
        "var": x.var(others, dtype=np.float64),
        "inv_std": 1 / x.std(others, dtype=np.float64),
        "gamma": np.linspace(0.5, 2.0, shape[1], dtype=np.float32),
        "beta": np.linspace(-1.0, 1.0, shape[1], dtype=np.float32),
        "vgamma": np.linspace(0.1, 0.3, shape[1], dtype=np.float32),
        "vbeta": np.linspace(0.3, 0.1, shape[1], dtype=np.float32),
    }


def sums(**given):
    """As arrays of one's own."""
    found = F.batch_norm_backward_sums(activation="relu", **given)
    return found.dgamma.copy(), found.dbeta.copy()


def apply(**given):
    channels = (*np.shape(given["dy"]), C, C)[1]
    some = F.Sums(20, np.linspace(-3, 3, channels), np.linspace(4, 5, channels))
    return F.batch_norm_backward_apply(**{"activation": "relu", "sums": some, **given})


def masked(function):
    """With two of three rows."""

    def of_some_rows(**given):
        shape = np.shape(given["x"])
        mask = np.arange(*shape[:1]).reshape(-1, *[1] * (len(shape) - 2)) % 3 > 0 if len(shape) > 1 else True
        return function(**{"activation": "leaky_relu", "mask": mask, **given})

    return of_some_rows


FUNCTIONS = {
    "batch_norm": (F.batch_norm, ["x", "gamma", "beta"]),
    "batch_norm_eval": (F.batch_norm_eval, ["x", "mean", "var", "gamma", "beta"]),
    "batch_norm_backward": (F.batch_norm_backward, ["dy", "x", "mean", "inv_std", "gamma"]),
    "batch_norm_jvp": (F.batch_norm_jvp, ["v", "x", "mean", "inv_std", "gamma", "vgamma", "vbeta"]),
    "moments": (bnfast.moments, ["x"]),
    "fused": (partial(F.batch_norm, activation="relu"), ["x", "gamma", "beta", "residual"]),
    "fused_eval": (partial(F.batch_norm_eval, activation="relu"), ["x", "mean", "var", "gamma", "beta", "residual"]),
    "fused_backward": (
        partial(F.batch_norm_backward, activation="relu"),
        ["dy", "x", "mean", "inv_std", "gamma", "beta", "residual"],
    ),
    "jvp_of_a_sum": (partial(F.batch_norm_jvp), ["v", "x", "mean", "inv_std", "gamma", "residual"]),
    "fused_jvp": (
        partial(F.batch_norm_jvp, activation="relu"),
        ["v", "x", "mean", "inv_std", "gamma", "beta", "vgamma", "vbeta", "residual", "vresidual"],
    ),
    "sums": (sums, ["dy", "x", "mean", "inv_std", "gamma", "beta", "residual"]),
    "apply": (apply, ["dy", "x", "mean", "inv_std", "gamma", "beta", "residual"]),
    "masked": (masked(F.batch_norm), ["x", "gamma", "beta", "residual"]),
    "masked_backward": (
        masked(F.batch_norm_backward),
        ["dy", "x", "mean", "inv_std", "gamma", "beta", "residual"],
    ),
}
SAMPLES = {"x", "dy", "v", "residual", "vresidual"}  # arguments like x; the others hold one value a channel
OPTIONAL = {"gamma", "beta", "vgamma", "vbeta", "residual", "vresidual"}
OUT_FUNCTIONS = sorted(FUNCTIONS.keys() - {"moments", "sums"})


def usual_layer(training=True, **options):
    """A layer after a forward and a backward."""
    bn = BatchNorm(C, **options)
    bn(sample())
    bn.backward(sample(1))
    bn.train(training)(sample())
    return bn


LAYER_CALLS = {
    "forward": (True, "x", lambda bn, **given: bn(**given)),
    "forward_eval": (False, "x", lambda bn, **given: bn(**given)),
    "backward": (True, "dy", lambda bn, **given: bn.backward(**given)),
    "backward_eval": (False, "dy", lambda bn, **given: bn.backward(**given)),
}


def raw(value):
    """Bytes of an array; other things stand for themselves."""
    if isinstance(value, np.ndarray) and value.dtype != object:
        # through a plain array: bytes of a strange class, its mask or its overlaps do not matter here
        return value.dtype.str, value.shape, np.asarray(value).tobytes()
    return repr(value)


def layer_bytes(bn):
    arrays = (bn.gamma, bn.beta, bn.running_mean, bn.running_var, bn.grad_gamma, bn.grad_beta)
    return [
        *map(raw, arrays),
        bn.num_batches_tracked,
        bn.training,
        id(bn._contents.value.forward),
        id(bn.gamma),
        id(bn.beta),
    ]


def assert_refused(call, arguments, error, words, layer=None):
    """`call(**arguments)` raises exactly `error`, with all `words` in its message, and changes nothing."""
    before = {name: raw(value) for name, value in arguments.items()}
    layer_before = None if layer is None else layer_bytes(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error) as caught:
            call(**arguments)
    assert caught.type is error
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"
    assert {name: raw(value) for name, value in arguments.items()} == before
    assert layer is None or layer_bytes(layer) == layer_before


def function_case(function, change, error, words, row):
    """A case of assert_refused: the usual arguments of one function, some of them replaced."""
    call, names = FUNCTIONS[function]

    def prepare():
        usual = usual_arguments()
        return call, {**{name: usual[name] for name in names}, **change()}, error, words, None

    return pytest.param(prepare, id=f"{row}-{function}-{'_'.join(change())}")


def layer_case(name, change, error, words, row, **options):
    training, argument, call = LAYER_CALLS[name]

    def prepare():
        bn = usual_layer(training)
        for option, value in options.items():
            setattr(bn, option, value)
        return lambda **given: call(bn, **given), {argument: sample(3), **change()}, error, words, bn

    return pytest.param(prepare, id=f"{row}-layer_{name}-{'_'.join(change())}")


# --- data of a wrong kind ------------------------------------------------------------------------------------


def sparse(x):
    return pytest.importorskip("scipy.sparse", reason="SciPy is not installed").csr_matrix(x.reshape(len(x), -1))


def sparse_array(x):
    return pytest.importorskip("scipy.sparse", reason="SciPy is not installed").coo_array(x.reshape(len(x), -1))


SUPPORTED = ["float32", "float64"]
WRONG_DATA = {  # row of the table: what to make of a right array, words of the message
    "int": (lambda x: x.astype(np.int64), ["int64", *SUPPORTED, ".astype(numpy.float32)"]),
    "list_of_int": (lambda x: x.astype(int).tolist(), ["int64", *SUPPORTED, "numpy.asarray(", ", numpy.float32)"]),
    "uint8": (lambda x: x.astype(np.int64).astype(np.uint8), ["uint8", *SUPPORTED]),
    "bool": (lambda x: x > 2, ["bool", *SUPPORTED]),
    "complex": (lambda x: x.astype(np.complex64), ["complex64", *SUPPORTED]),
    "object": (lambda x: x.astype(object), ["object", *SUPPORTED]),
    "longdouble": (lambda x: x.astype(np.longdouble), [np.dtype(np.longdouble).name, *SUPPORTED]),
    "string": (lambda x: "abc", ["<U3", *SUPPORTED]),
    "datetime": (lambda x: x.astype("M8[s]"), ["datetime64[s]", *SUPPORTED]),
    "structured": (lambda x: np.zeros(x.shape, [("a", "f4")]), ["'a'", *SUPPORTED]),
    "masked": (lambda x: np.ma.masked_greater(x, 3), ["without a mask", "MaskedArray"]),
    "matrix": (lambda x: x.reshape(len(x), -1).view(np.matrix), ["numpy.matrix", "numpy.asarray"]),
    "sparse_matrix": (sparse, ["csr_matrix", "dense", "toarray"]),
    "sparse_array": (sparse_array, ["coo_array", "dense", "toarray"]),
}
if np.dtype(np.longdouble).itemsize == 8:  # MSVC, some ARM: it is float64 under another name
    del WRONG_DATA["longdouble"]


def wrong_data():
    for row, (make, words) in WRONG_DATA.items():
        for function, (_, names) in FUNCTIONS.items():
            for name in names:
                yield function_case(
                    function, lambda name=name, make=make: {name: make(usual_arguments()[name])}, TypeError,
                    [f"{name}: ", *words], row,
                )  # fmt: skip
        for call, (_, name, _) in LAYER_CALLS.items():
            yield layer_case(call, lambda name=name, make=make: {name: make(sample())}, TypeError, [name, *words], row)


def nothing():
    for function, (_, names) in FUNCTIONS.items():
        for name in sorted(set(names) - OPTIONAL):
            yield function_case(function, lambda name=name: {name: None}, TypeError, [f"{name}: ", "expected"], "none")
    for call, (_, name, _) in LAYER_CALLS.items():
        yield layer_case(call, lambda name=name: {name: None}, TypeError, [f"{name}: ", "expected"], "none")


# --- shapes --------------------------------------------------------------------------------------------------


def wrong_shapes():
    for shape in ((), (C,)):
        for function in FUNCTIONS:
            yield function_case(
                function, lambda shape=shape: {"x": sample(shape=shape)}, ValueError,
                ["x: ", "at least 2 dimensions", str(shape)], f"{len(shape)}d",
            )  # fmt: skip
        for call in ("forward", "forward_eval"):
            yield layer_case(
                call, lambda shape=shape: {"x": sample(shape=shape)}, ValueError,
                ["x: ", "at least 2 dimensions", str(shape)], f"{len(shape)}d",
            )  # fmt: skip
    for function, (_, names) in FUNCTIONS.items():
        for name in names:
            if name in SAMPLES - {"x"}:
                shapes, expected = [(4, C, 6), (4, C), (4, C, 5, 1), (C, 4, 5)], str(SHAPE)
            elif name not in SAMPLES:
                shapes, expected = [(C + 1,), (1,), (), (C, 1), (1, C), (0,)], f"({C},)"
            else:
                continue
            for shape in shapes:
                yield function_case(
                    function, lambda name=name, shape=shape: {name: np.ones(shape, np.float32)}, ValueError,
                    [f"{name}: ", expected, str(shape)], "wrong_shape",
                )  # fmt: skip
    for call in ("backward", "backward_eval"):
        yield layer_case(
            call, lambda: {"dy": sample(shape=(4, C, 6))}, ValueError, ["dy: ", str(SHAPE), "(4, 3, 6)"], "wrong_shape"
        )
    for shape in ((4, C + 1, 5), (4, C - 1), (4, 0), (0, C + 1)):
        for call in ("forward", "forward_eval"):
            yield layer_case(
                call, lambda shape=shape: {"x": np.ones(shape)}, ValueError,
                ["x: ", f"expected {C} channels", "axis 1", str(shape)], "wrong_channels",
            )  # fmt: skip


def other_dtypes():
    for function, name in (("batch_norm_backward", "dy"), ("batch_norm_jvp", "v")):
        yield function_case(
            function, lambda name=name: {name: sample(dtype=np.float64)}, TypeError,
            [f"{name}: ", "float32", "float64"], "other_dtype",
        )  # fmt: skip
        yield function_case(
            function, lambda: {"x": sample(dtype=np.float64)}, TypeError,
            [f"{name}: ", "float32", "float64"], "other_dtype",
        )  # fmt: skip
    for call in ("backward", "backward_eval"):
        yield layer_case(
            call, lambda: {"dy": sample(dtype=np.float64)}, TypeError, ["dy: ", "float32", "float64"], "other_dtype"
        )
    for function, (_, names) in FUNCTIONS.items():
        for name in sorted(set(names) & {"residual", "vresidual"}):
            yield function_case(
                function, lambda name=name: {name: sample(dtype=np.float64)}, TypeError,
                [f"{name}: ", "float32", "float64"], "other_dtype",
            )  # fmt: skip


def wrong_residuals_of_a_layer():
    for call in ("forward", "forward_eval"):
        for shape in ((4, C, 6), (4, C), (4, C, 1), (1, C, 5), (C,), ()):
            yield layer_case(
                call, lambda shape=shape: {"x": sample(), "residual": np.ones(shape, np.float32)}, ValueError,
                ["residual: ", str(SHAPE), str(shape)], "wrong_shape",
            )  # fmt: skip
        for row, (make, words) in WRONG_DATA.items():
            yield layer_case(
                call, lambda make=make: {"x": sample(), "residual": make(sample())}, TypeError,
                ["residual: ", *words], row,
            )  # fmt: skip
        yield layer_case(
            call, lambda: {"x": sample(), "residual": sample(dtype=np.float64)}, TypeError,
            ["residual: ", "float32", "float64"], "other_dtype",
        )  # fmt: skip


def wrong_activations():
    activated = sorted(FUNCTIONS.keys() - {"moments", "sums"})
    for function in activated:
        for name in ("gelu", "ReLU", "relu ", "", 1, True, b"relu", ["relu"]):
            yield function_case(
                function, lambda name=name: {"activation": name}, ValueError,
                ["activation: ", "None, 'relu', 'relu6' or 'leaky_relu'", repr(name)], "activation",
            )  # fmt: skip
        for slope in (0, 1, 0.0, 1.0, -0.01, 1.5, np.nan, np.inf, -np.inf):
            yield function_case(
                function, lambda slope=slope: {"activation": "leaky_relu", "negative_slope": slope}, ValueError,
                ["negative_slope: ", "above 0 and below 1", repr(slope)], "negative_slope",
            )  # fmt: skip
        yield function_case(
            function, lambda: {"activation": "leaky_relu", "negative_slope": 10**400}, ValueError,
            ["negative_slope: ", "above 0 and below 1"], "negative_slope_huge",
        )  # fmt: skip
        for slope in ("a", "0.1", None, True, 1j, [0.1, 0.2]):
            yield function_case(
                function, lambda slope=slope: {"activation": "leaky_relu", "negative_slope": slope}, TypeError,
                ["negative_slope: ", "number", repr(slope)], "negative_slope_not_a_number",
            )  # fmt: skip


WRONG_MASKS = {  # row: a mask of x, which is (4, C, 5); error, words
    "int": (lambda: np.ones((4, 5), np.int64), TypeError, ["bool", "int64"]),
    "zeros_and_ones": (lambda: [[0, 1, 1, 1, 1]] * 4, TypeError, ["bool", "int64"]),
    "float": (lambda: np.ones((4, 5)), TypeError, ["bool", "float64"]),
    "uint8": (lambda: np.ones((4, 5), np.uint8), TypeError, ["bool", "uint8"]),
    "object": (lambda: np.full((4, 5), True, object), TypeError, ["bool", "object"]),
    "string": (lambda: "all", TypeError, ["bool", "<U3"]),
    "masked": (lambda: np.ma.ones((4, 5), bool), TypeError, ["without a mask", "MaskedArray"]),
    "ragged": (lambda: [[True], [True, False]], ValueError, ["expected an array", "list"]),
    "of_every_element": (lambda: np.ones(SHAPE, bool), ValueError, ["without its channel axis", "(4, 5)", str(SHAPE)]),
    "with_a_channel_axis": (lambda: np.ones((4, 1, 5), bool), ValueError, ["channel axis", "(4, 5)", "(4, 1, 5)"]),
    "of_channels": (lambda: np.ones(C, bool), ValueError, ["broadcasts to (4, 5)", "(3,)"]),
    "transposed": (lambda: np.ones((5, 4), bool), ValueError, ["broadcasts to (4, 5)", "(5, 4)"]),
    "too_long": (lambda: np.ones((4, 6), bool), ValueError, ["broadcasts to (4, 5)", "(4, 6)"]),
    "empty": (lambda: np.ones((0, 5), bool), ValueError, ["broadcasts to (4, 5)", "(0, 5)"]),
}
FEW = {  # masks of fewer than two positions
    "no_position": (lambda: np.zeros((4, 5), bool), "0"),
    "false": (lambda: False, "0"),
    "one_position": (lambda: np.arange(20).reshape(4, 5) == 7, "1"),
}


def wrong_masks():
    for row, (make, error, words) in WRONG_MASKS.items():
        for function in FUNCTIONS.keys() - {"masked", "masked_backward"}:
            yield function_case(function, lambda make=make: {"mask": make()}, error, ["mask: ", *words], row)
        for call in ("forward", "forward_eval"):
            yield layer_case(call, lambda make=make: {"x": sample(), "mask": make()}, error, ["mask: ", *words], row)
    for row, (make, count) in FEW.items():
        words = ["mask: ", "at least 2 positions", f"got {count}"]
        for function in ("batch_norm", "fused", "batch_norm_backward", "fused_backward", "batch_norm_jvp", "fused_jvp"):
            yield function_case(function, lambda make=make: {"mask": make()}, ValueError, words, row)
        yield layer_case("forward", lambda make=make: {"x": sample(), "mask": make()}, ValueError, words, row)


def wrong_sums():
    for value, came in (((20, np.ones(C), np.ones(C)), "tuple"), (None, "NoneType"), (np.ones((2, C)), "ndarray")):
        yield function_case(
            "apply", lambda value=value: {"sums": value}, TypeError, ["sums: ", "bnfast.functional.Sums", came], "sums"
        )
    for count in (0, 1):
        yield function_case(
            "apply", lambda count=count: {"sums": F.Sums(count, np.ones(C), np.ones(C))}, ValueError,
            ["sums: ", "at least 2", f"count of {count}"], "count",
        )  # fmt: skip
    for n in (0, 1, C + 1):
        yield function_case(
            "apply", lambda n=n: {"sums": F.Sums(20, np.ones(n), np.ones(n))}, ValueError,
            ["sums", f"({C},)", f"({n},)"], "sums_of_other_channels",
        )  # fmt: skip


def wrong_axes():
    for function in FUNCTIONS:
        for axis in (3, -4, 99, 2**70):
            yield function_case(
                function, lambda axis=axis: {"axis": axis}, AxisError, ["axis", str(axis), "3"], "axis_out_of_range"
            )
        for axis, came in ((1.0, "float"), ("1", "str"), (None, "NoneType"), ((1,), "tuple")):
            yield function_case(
                function, lambda axis=axis: {"axis": axis}, TypeError, ["axis: ", "int", came], "axis_not_an_int"
            )


def wrong_eps():
    for function in ("batch_norm", "batch_norm_eval"):
        for eps in (-1, -1e-300, np.nan, np.inf, -np.inf):
            yield function_case(
                function, lambda eps=eps: {"eps": eps}, ValueError, ["eps: ", "finite number", repr(eps)], "eps"
            )
        yield function_case(function, lambda: {"eps": 10**400}, ValueError, ["eps: ", "finite number"], "eps_huge")
        for eps in ("a", "1e-5", True, None, 1j, [1e-5, 1e-5]):
            yield function_case(
                function, lambda eps=eps: {"eps": eps}, TypeError, ["eps: ", "number", repr(eps)], "eps_not_a_number"
            )


def zero_eps():
    """A channel may be constant in training; in eval mode its variance is known."""
    for eps in (0, 0.0):
        words = ["eps: ", "positive number when training", "got 0"]
        yield function_case("batch_norm", lambda eps=eps: {"eps": eps}, ValueError, words, "eps_zero")
        yield layer_case("forward", lambda: {"x": np.ones((2, C))}, ValueError, words, "eps_zero", eps=eps)


TOO_FEW = "Expected more than 1 value per channel when training"


def too_few_values():
    for shape in ((1, C), (1, C, 1), (1, C, 1, 1), (0, C), (4, C, 0), (0, C, 7)):
        row = "no_value" if 0 in shape else "one_value"
        for function in ("batch_norm", "batch_norm_backward", "batch_norm_jvp"):
            like_x = [name for name in FUNCTIONS[function][1] if name in SAMPLES]
            yield function_case(
                function, lambda shape=shape, like_x=like_x: dict.fromkeys(like_x, np.ones(shape)), ValueError,
                [TOO_FEW, str(shape)], row,
            )  # fmt: skip
        yield layer_case("forward", lambda shape=shape: {"x": np.ones(shape)}, ValueError, [TOO_FEW, str(shape)], row)


def wrong_variances():
    for value, eps in ((-1.0, 1e-5), (-1e-5, 1e-5), (0.0, 0), (np.inf, 1e-5), (-np.inf, 1e-5), (np.nan, 1e-5)):
        yield function_case(
            "batch_norm_eval", lambda value=value, eps=eps: {"var": np.array([1.0, value, 1.0]), "eps": eps},
            ValueError, ["var: ", "var + eps above 0", str(value), "channel 1"], "variance",
        )  # fmt: skip
    for value in (-1.0, np.inf, np.nan):
        yield function_case(
            "batch_norm_eval", lambda value=value: {"var": np.array([1.0, 1.0, value], np.float32)},
            ValueError, ["var: ", "var + eps above 0", str(value), "channel 2"], "variance",
        )  # fmt: skip


# --- out -----------------------------------------------------------------------------------------------------


def read_only(array):
    array.flags.writeable = False
    return array


WRONG_OUT = {
    "list": (lambda: sample().tolist(), TypeError, ["ndarray", "list"]),
    "masked": (lambda: np.ma.masked_array(sample()), TypeError, ["ndarray", "MaskedArray"]),
    "number": (lambda: 1.0, TypeError, ["ndarray", "float"]),
    "shape": (lambda: sample(shape=(4, C, 6)), ValueError, [str(SHAPE), "(4, 3, 6)"]),
    "more_dimensions": (lambda: sample(shape=(1, *SHAPE)), ValueError, [str(SHAPE), str((1, *SHAPE))]),
    "broadcastable_shape": (lambda: sample(shape=(4, C, 1)), ValueError, [str(SHAPE), "(4, 3, 1)"]),
    "dtype": (lambda: sample(dtype=np.float64), TypeError, ["float32", "float64"]),
    "dtype_int": (lambda: np.zeros(SHAPE, np.int32), TypeError, ["float32", "int32"]),
    "byte_order": (lambda: sample().astype(np.dtype(np.float32).newbyteorder()), TypeError, ["float32", ">f4"]),
    "read_only": (lambda: read_only(sample()), ValueError, ["writeable", "read-only"]),
    "stride_zero": (lambda: as_strided(sample(), SHAPE, (0, 20, 4)), ValueError, ["overlap", "itself"]),
    "sliding_window": (lambda: as_strided(sample(), SHAPE, (4, 20, 4)), ValueError, ["overlap", "itself"]),
    "part_of_an_element": (lambda: as_strided(sample(), SHAPE, (60, 20, 2)), ValueError, ["overlap", "itself"]),
}
if sys.byteorder == "big":
    WRONG_OUT["byte_order"][2][1] = "<f4"


WITH_OUT_RESIDUAL = ("fused_backward", "apply", "masked_backward")


def wrong_out_residual():
    for function in WITH_OUT_RESIDUAL:
        for row, (make, error, words) in WRONG_OUT.items():
            yield function_case(
                function, lambda make=make: {"out_residual": make()}, error, ["out_residual: ", *words], row
            )
        words = ["out_residual: ", "no residual"]
        yield function_case(function, lambda: {"out_residual": sample(), "residual": None}, ValueError, words, "alone")

        def one_place():
            out = sample()
            return {"out": out, "out_residual": out}

        def overlapping_places():
            memory = np.zeros(61, np.float32)
            return {"out": memory[:-1].reshape(SHAPE), "out_residual": memory[1:].reshape(SHAPE)}

        for make in (one_place, overlapping_places):
            words = ["out_residual: ", "memory of its own", "out's"]
            yield function_case(function, make, ValueError, words, make.__name__)
    for function in ("batch_norm_backward", "backward", "backward_eval"):
        case = function_case if function in FUNCTIONS else layer_case
        yield case(
            function, lambda: {"dy": sample(), "out_residual": sample()}, ValueError,
            ["out_residual: ", "no residual"], "alone",
        )  # fmt: skip


def wrong_out():
    for row, (make, error, words) in WRONG_OUT.items():
        for function in OUT_FUNCTIONS:
            yield function_case(function, lambda make=make: {"out": make()}, error, ["out: ", *words], row)
        for call in LAYER_CALLS:
            yield layer_case(call, lambda make=make: {"out": make()}, error, ["out: ", *words], row)


@pytest.mark.parametrize(
    "prepare",
    [
        *wrong_data(), *nothing(), *wrong_shapes(), *other_dtypes(), *wrong_axes(), *wrong_eps(), *zero_eps(),
        *too_few_values(), *wrong_variances(), *wrong_out(), *wrong_out_residual(), *wrong_activations(),
        *wrong_masks(), *wrong_sums(), *wrong_residuals_of_a_layer(),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(prepare):
    call, arguments, error, words, layer = prepare()
    assert_refused(call, arguments, error, words, layer)


# --- the layer's own rows ------------------------------------------------------------------------------------


def test_what_an_array_can_have_are_not_too_many_features():
    most = 2**60 - 1
    assert BatchNorm(most, affine=False, track_running_stats=False).num_features == most


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"num_features": 0}, ValueError, ["num_features", "at least 1", "0"]),
        ({"num_features": -1}, ValueError, ["num_features", "at least 1", "-1"]),
        ({"num_features": 2**60}, ValueError, ["num_features", "at most", str(2**60 - 1), str(2**60)]),
        ({"num_features": 10**30}, ValueError, ["num_features", "at most", str(10**30)]),
        ({"num_features": 1.5}, TypeError, ["num_features", "int", "float"]),
        ({"num_features": 3.0}, TypeError, ["num_features", "int", "float"]),
        ({"num_features": True}, TypeError, ["num_features", "int", "True"]),
        ({"num_features": "3"}, TypeError, ["num_features", "int", "str"]),
        ({"num_features": None}, TypeError, ["num_features", "int", "NoneType"]),
        ({"axis": 1.0}, TypeError, ["axis", "int", "float"]),
        ({"axis": None}, TypeError, ["axis", "int", "NoneType"]),
        ({"eps": -1}, ValueError, ["eps", "finite number", "-1"]),
        ({"eps": np.nan}, ValueError, ["eps", "finite number", "nan"]),
        ({"eps": np.inf}, ValueError, ["eps", "finite number", "inf"]),
        ({"eps": 10**400}, ValueError, ["eps", "finite number"]),
        ({"eps": "a"}, TypeError, ["eps", "number", "'a'"]),
        ({"eps": None}, TypeError, ["eps", "number", "None"]),
        ({"eps": "1e-5"}, TypeError, ["eps", "number", "'1e-5'"]),
        ({"momentum": True}, TypeError, ["momentum", "number", "True"]),
        ({"affine": "no"}, ValueError, ["affine", "True, False, 'gamma' or 'beta'", "'no'"]),
        ({"affine": np.ones(2)}, TypeError, ["affine", "True, False, 'gamma' or 'beta'", "array"]),
        ({"track_running_stats": None}, TypeError, ["track_running_stats", "a bool", "None"]),
        ({"unbiased_running_var": 1}, TypeError, ["unbiased_running_var", "a bool", "1"]),
        ({"momentum": -0.1}, ValueError, ["momentum", "[0, 1]", "-0.1"]),
        ({"momentum": 1.1}, ValueError, ["momentum", "[0, 1]", "1.1"]),
        ({"momentum": np.nan}, ValueError, ["momentum", "[0, 1]", "nan"]),
        ({"momentum": 10**400}, ValueError, ["momentum", "[0, 1]"]),
        ({"momentum": "a"}, TypeError, ["momentum", "number", "'a'"]),
        ({"activation": "gelu"}, ValueError, ["activation", "None, 'relu', 'relu6' or 'leaky_relu'", "'gelu'"]),
        ({"activation": "RELU"}, ValueError, ["activation", "None, 'relu', 'relu6' or 'leaky_relu'", "'RELU'"]),
        ({"activation": True}, TypeError, ["activation", "None, 'relu', 'relu6' or 'leaky_relu'", "True"]),
        ({"activation": np.ones(2)}, TypeError, ["activation", "None, 'relu', 'relu6' or 'leaky_relu'", "array"]),
        ({"negative_slope": 0}, ValueError, ["negative_slope", "above 0 and below 1", "0"]),
        ({"negative_slope": 1.0}, ValueError, ["negative_slope", "above 0 and below 1", "1.0"]),
        ({"negative_slope": -0.5}, ValueError, ["negative_slope", "above 0 and below 1", "-0.5"]),
        ({"negative_slope": np.nan}, ValueError, ["negative_slope", "above 0 and below 1", "nan"]),
        ({"negative_slope": 10**400}, ValueError, ["negative_slope", "above 0 and below 1"]),
        ({"negative_slope": "0.1"}, TypeError, ["negative_slope", "number", "'0.1'"]),
        ({"negative_slope": None}, TypeError, ["negative_slope", "number", "None"]),
        ({"dtype": int}, TypeError, ["dtype", "float32", "float64", "int64"]),
        ({"dtype": np.float16}, TypeError, ["dtype", "float32", "float64", "float16"]),
        ({"dtype": np.longdouble}, TypeError, ["dtype", "float32", "float64"]),
        ({"dtype": complex}, TypeError, ["dtype", "float32", "float64", "complex128"]),
        ({"dtype": "no such type"}, TypeError, ["no such type"]),
    ],
)
def test_a_layer_cannot_be_made_from_wrong_arguments(arguments, error, words):
    if arguments.get("dtype") is np.longdouble and np.dtype(np.longdouble) == np.float64:
        pytest.skip("long double is double on this platform")
    assert_refused(lambda **given: BatchNorm(**{"num_features": C, **given}), arguments, error, words)


def test_options_of_a_layer_are_keywords():
    with pytest.raises(TypeError):
        BatchNorm(C, 1)


@pytest.mark.parametrize("axis", [3, -4])
@pytest.mark.parametrize("training", [True, False])
def test_a_layer_whose_axis_x_does_not_have_refuses(axis, training):
    bn = BatchNorm(C, axis=axis).train(training)
    assert_refused(bn, {"x": sample()}, AxisError, ["axis", str(axis), "3"], bn)


@pytest.mark.parametrize("value", [-1.0, np.nan])
def test_a_layer_refuses_a_wrong_running_variance_in_eval_mode(value):
    """As what has met such data, or another eps, may have one."""
    bn = usual_layer()
    if np.isfinite(value):
        bn.eps = 2.0
        bn.running_var = [1.0, value, 1.0]
        bn.eps = 1e-5
    else:
        bn(np.full_like(sample(), value))
    words = ["running_var", "var + eps above 0", str(value), "channel 1"]
    bn.eval()
    assert_refused(bn, {"x": sample()}, ValueError, words if np.isfinite(value) else words[:2], bn)
    bn.train()(sample())  # training does not read it


def test_without_running_statistics_eval_needs_two_values_a_channel():
    bn = usual_layer(training=False, track_running_stats=False)
    for shape in ((1, C), (0, C)):
        assert_refused(bn, {"x": np.ones(shape)}, ValueError, [TOO_FEW, str(shape)], bn)


def test_no_memory_is_a_memory_error_and_changes_nothing():
    huge = {"x": np.broadcast_to(np.float32(1), (2**24, C, 2**22))}  # the result does not fit into any address space
    one = np.ones(C)
    for call in (F.batch_norm, lambda x: F.batch_norm_eval(x, one, one), bnfast.moments):
        with pytest.raises(MemoryError):
            call(**huge)
    for training in (True, False):
        bn = usual_layer(training)
        before = layer_bytes(bn)
        with pytest.raises(MemoryError):
            bn(**huge)
        assert layer_bytes(bn) == before


@pytest.mark.parametrize("function", [bnfast.set_num_threads, bnfast.num_threads])
@pytest.mark.parametrize(
    ("n", "error", "words"),
    [(0, ValueError, ["at least 1", "0"]), (-2, ValueError, ["at least 1", "-2"]), (2.0, TypeError, ["int", "float"])],
)
def test_thread_counts_below_one_or_no_int_are_refused(function, n, error, words):
    before = bnfast.get_num_threads()
    assert_refused(lambda n: function(n), {"n": n}, error, ["n: ", *words])
    assert bnfast.get_num_threads() == before


# --- accepted: strange arrays --------------------------------------------------------------------------------


class HasArray:
    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array if dtype is None else self.array.astype(dtype)


class Tensor:
    """As PyTorch's with a graph: it has detach, and refuses to become an array."""

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("call detach")

    def detach(self):
        return self


def test_what_does_not_become_an_array_is_named():
    with pytest.raises(TypeError, match=r"x: expected an array, got Tensor .*call detach.*through bnfast.torch"):
        F.batch_norm(Tensor())
    with pytest.raises(TypeError, match="dy: expected an array, got Tensor"):
        F.batch_norm_backward(Tensor(), np.ones((2, 3)), np.ones(3), np.ones(3))


class Subclass(np.ndarray):
    """With an __array_wrap__ and a __getitem__ that must not be called."""

    def __array_wrap__(self, *arguments, **keywords):
        raise AssertionError("called")

    def __getitem__(self, key):
        raise AssertionError("called")


def misaligned(array, tmp_path):
    memory = np.zeros(array.nbytes + 1, np.uint8)
    view = memory[1:].view(array.dtype).reshape(array.shape)
    view[...] = array
    assert not view.flags.aligned
    return view


def mapped(array, tmp_path):
    memory = np.memmap(tmp_path / f"{id(array)}.bin", array.dtype, "w+", shape=array.shape)
    memory[...] = array
    memory.flush()
    return np.memmap(memory.filename, array.dtype, "r", shape=array.shape)


def with_gaps(array, tmp_path):
    memory = np.full([2 * n for n in array.shape], np.nan, array.dtype)
    view = memory[tuple(slice(None, None, 2) for _ in array.shape)]
    view[...] = array
    return view


def swapped(array, tmp_path):
    return array.astype(array.dtype.newbyteorder())


STRANGE = {
    "list": lambda a, tmp_path: a.tolist(),
    "tuple": lambda a, tmp_path: tuple(a),
    "array_interface": lambda a, tmp_path: HasArray(a),
    "byte_swapped": swapped,
    "misaligned": misaligned,
    "read_only": lambda a, tmp_path: read_only(a.copy()),
    "negative_strides": lambda a, tmp_path: np.flip(np.flip(a).copy()),
    "gaps": with_gaps,
    "fortran": lambda a, tmp_path: np.asfortranarray(a),
    "channels_last": lambda a, tmp_path: np.moveaxis(np.moveaxis(a, 0, -1).copy(), -1, 0),
    "memmap": mapped,
    "subclass": lambda a, tmp_path: a.view(Subclass),
    "byte_swapped_misaligned": lambda a, tmp_path: misaligned(swapped(a, tmp_path), tmp_path),
}
OTHER_MEMORY_ORDER = {"fortran", "channels_last"}  # blocks follow the layout, so sums may round in another way


def assert_same(found, expected, exact, message=""):
    """float64: the same bits, or to some roundings of values below 10."""
    tolerance = {} if exact else {"rtol": 1e-13, "atol": 1e-13}
    assert_equal = np.testing.assert_array_equal if exact else np.testing.assert_allclose
    assert_equal(found, expected, err_msg=message, **tolerance)


def results_of(value):
    return list(value) if isinstance(value, tuple) else [value]


def assert_plain(array, dtype):
    assert type(array) is np.ndarray
    assert array.dtype == dtype
    assert array.dtype.isnative
    assert array.flags.aligned
    assert array.flags.writeable


@pytest.mark.parametrize("row", STRANGE)
@pytest.mark.parametrize("function", sorted(FUNCTIONS.keys() - {"moments"}))
def test_strange_arrays_give_the_usual_answer(function, row, tmp_path):
    """float64, so that lists keep the dtype; the same bits as from contiguous arrays."""
    strange, exact = STRANGE[row], row not in OTHER_MEMORY_ORDER
    call, names = FUNCTIONS[function]
    usual = {name: usual_arguments()[name].astype(np.float64) for name in names}
    expected = results_of(call(**usual))
    for changed in [*([name] for name in names), names]:
        given = {name: strange(value, tmp_path) if name in changed else value for name, value in usual.items()}
        before = {name: np.array(HasArray.__array__(v) if isinstance(v, HasArray) else v) for name, v in given.items()}
        found = results_of(call(**given))
        for result, right in zip(found, expected, strict=True):
            assert_same(result, right, exact, str(changed))
            assert_plain(result, np.float64)
            for value in given.values():
                assert not isinstance(value, np.ndarray) or not np.shares_memory(result, value)
        for name, value in given.items():
            np.testing.assert_array_equal(np.array(value), before[name])


@pytest.mark.parametrize("row", STRANGE)
@pytest.mark.parametrize("training", [True, False])
def test_strange_arrays_give_the_usual_answer_in_a_layer(training, row, tmp_path):
    strange, exact = STRANGE[row], row not in OTHER_MEMORY_ORDER
    bn, twin = usual_layer(training, dtype=np.float64), usual_layer(training, dtype=np.float64)
    x, dy = sample(3, dtype=np.float64), sample(4, dtype=np.float64)
    y, dx = bn(strange(x, tmp_path)), bn.backward(strange(dy, tmp_path))
    assert_same(y, twin(x), exact)
    assert_same(dx, twin.backward(dy), exact)
    assert_plain(y, np.float64)
    assert_plain(dx, np.float64)
    for name in ("running_mean", "running_var", "grad_gamma", "grad_beta"):
        assert_same(getattr(bn, name), getattr(twin, name), exact, name)


@pytest.mark.parametrize("row", STRANGE)
def test_strange_arrays_have_the_usual_moments(row, tmp_path):
    x = sample(dtype=np.float64)
    found, expected = bnfast.moments(STRANGE[row](x, tmp_path)), bnfast.moments(x)
    assert found.count == expected.count
    assert_same(found.mean, expected.mean, row not in OTHER_MEMORY_ORDER)
    assert_same(found.m2, expected.m2, row not in OTHER_MEMORY_ORDER)


@pytest.mark.parametrize("axis_of_stride_zero", [0, 2])
def test_zero_strides_are_values_repeated(axis_of_stride_zero):
    shape = tuple(1 if i == axis_of_stride_zero else n for i, n in enumerate(SHAPE))
    x, dy = (np.broadcast_to(sample(seed, shape, np.float64), SHAPE) for seed in (0, 1))
    assert 0 in x.strides
    found = F.batch_norm(x)
    expected = F.batch_norm(x.copy())
    found += F.batch_norm_backward(dy, x, *expected[1:])
    expected += F.batch_norm_backward(dy.copy(), x.copy(), *expected[1:])
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other, exact=False)
        assert_plain(one, np.float64)


def test_gamma_may_have_any_stride():
    x, wide = sample(), np.arange(8.0).astype(np.float32)
    for gamma in (wide[6::-3], wide[::3], np.broadcast_to(np.float32(2), C)):
        np.testing.assert_array_equal(F.batch_norm(x, gamma)[0], F.batch_norm(x, gamma.copy())[0])


# --- accepted: out -------------------------------------------------------------------------------------------


def overlapping(array):
    """The array inside a larger one, and the views that begin one row after it and one row before."""
    memory = np.zeros((len(array) + 2, *array.shape[1:]), array.dtype)
    memory[1:-1] = array
    return memory[1:-1], memory[2:], memory[:-2]


# small; and so large that something is written before all is read, in both layouts
OVERLAPPING_SHAPES = pytest.mark.parametrize("shape", [SHAPE, (64, 8, 49), (5, 8, 4000), (3000, 64)], ids=str)


@pytest.mark.parametrize("function", OUT_FUNCTIONS)
def test_out_is_written_and_returned(function, tmp_path):
    call, names = FUNCTIONS[function]
    arguments = {name: usual_arguments()[name] for name in names}
    expected = results_of(call(**arguments))
    for out in (
        np.empty_like(arguments["x"]),
        np.asfortranarray(np.empty_like(arguments["x"])),
        with_gaps(np.zeros_like(arguments["x"]), tmp_path),
        np.zeros_like(arguments["x"])[::-1, :, ::-1],
        misaligned(np.zeros_like(arguments["x"]), tmp_path),
        np.zeros_like(arguments["x"]).view(Subclass),
    ):
        found = results_of(call(**arguments, out=out))
        assert found[0] is out
        for result, right in zip(found, expected, strict=True):
            np.testing.assert_array_equal(np.asarray(result), right)


@OVERLAPPING_SHAPES
@pytest.mark.parametrize("case", ["same", "later", "earlier", "reversed"])
@pytest.mark.parametrize("function", OUT_FUNCTIONS)
def test_out_may_be_an_input_or_overlap_one(function, case, shape):
    call, names = FUNCTIONS[function]
    usual = {name: usual_arguments(shape)[name] for name in names}
    expected = results_of(call(**usual))
    for name in sorted(set(names) & SAMPLES):
        given = copy.deepcopy(usual)
        given[name], later, earlier = overlapping(given[name])
        out = {"same": given[name], "later": later, "earlier": earlier, "reversed": given[name][::-1]}[case]
        found = results_of(call(**given, out=out))
        assert found[0] is out
        for result, right in zip(found, expected, strict=True):
            np.testing.assert_array_equal(result, right, err_msg=name)


@OVERLAPPING_SHAPES
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("function", OUT_FUNCTIONS)
def test_out_may_hold_the_parameters_too(function, dtype, shape):
    """gamma and the like are read before out is written, wherever they lie."""
    call, names = FUNCTIONS[function]
    usual = {name: usual_arguments(shape)[name].astype(dtype) for name in names}
    expected = results_of(call(**usual))
    for name in sorted(set(names) - SAMPLES):
        for where in (0, 1, -shape[1] - 1):
            given, out = copy.deepcopy(usual), np.zeros(shape, dtype)
            given[name] = out.reshape(-1)[where:][: shape[1]]
            given[name][:] = usual[name]
            for result, right in zip(results_of(call(**given, out=out)), expected, strict=True):
                np.testing.assert_array_equal(result, right, err_msg=name)


# --- accepted: nothing, NaN and Inf --------------------------------------------------------------------------

EMPTY = [(0, C), (0, C, 5), (4, C, 0), (0, C, 0, 2)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", EMPTY)
def test_an_empty_batch_in_eval_mode_gives_an_empty_result_and_gradients_of_zero(shape, dtype):
    x, zero, one = np.empty(shape, dtype), np.zeros(C), np.ones(C)
    for y in (F.batch_norm_eval(x, zero, one), F.batch_norm_eval(x, zero, one, one, one, out=np.empty(shape, dtype))):
        assert (y.shape, y.dtype) == (shape, dtype)
    dx, dgamma, dbeta = F.batch_norm_backward(x, x, zero, one, training=False)
    assert (dx.shape, dx.dtype) == (shape, dtype)
    assert (dgamma.tolist(), dbeta.tolist()) == ([0.0] * C, [0.0] * C)
    bn = usual_layer(training=False)
    statistics = raw(bn.running_mean), raw(bn.running_var), bn.num_batches_tracked
    assert bn(x).shape == shape
    assert bn.backward(x).shape == shape
    assert (bn.grad_gamma.tolist(), bn.grad_beta.tolist()) == ([0.0] * C, [0.0] * C)
    assert (raw(bn.running_mean), raw(bn.running_var), bn.num_batches_tracked) == statistics


def test_an_empty_batch_with_many_channels_writes_nowhere():
    """In a process of its own: writing past an empty array's memory breaks the heap."""
    script = """
import numpy as np
from bnfast import functional as F
for channels in (100, 10_000, 1_000_000):
    for shape, axis in (((0, channels), 1), ((channels, 0), 0), ((0, channels, 7), 1)):
        for dtype in (np.float32, np.float64):
            x, zero, one = np.empty(shape, dtype), np.zeros(channels), np.ones(channels)
            assert F.batch_norm_eval(x, zero, one, axis=axis).shape == shape
            dx, dgamma, dbeta = F.batch_norm_backward(x, x, zero, one, axis=axis, training=False)
            assert not dgamma.any() and not dbeta.any()
print("fine")
"""
    assert run_script(script) == "fine"


@pytest.mark.parametrize("shape", [(4, 0), (4, 0, 5), (1, 0), (0, 0)])
def test_no_channels_give_an_empty_result(shape):
    x, none = np.empty(shape, np.float32), np.empty(0)
    y, mean, inv_std = F.batch_norm(x)
    assert (y.shape, mean.shape, inv_std.shape) == (shape, (0,), (0,))
    assert F.batch_norm_eval(x, none, none).shape == shape
    for training in (True, False):
        dx, dgamma, dbeta = F.batch_norm_backward(x, x, none, none, training=training)
        assert (dx.shape, dgamma.shape, dbeta.shape) == (shape, (0,), (0,))
    assert F.batch_norm_jvp(x, x, none, none).shape == shape
    assert bnfast.moments(x).mean.shape == (0,)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("layout", ["NCW", "NWC"])
@pytest.mark.parametrize("channel", range(C))
def test_nan_and_inf_stay_in_their_channel_without_a_warning(channel, value, layout):
    bn, twin = usual_layer(), usual_layer()
    x, dy = sample(3), sample(4)
    poisoned = x.copy()
    poisoned[1, channel, 2] = value
    if layout == "NWC":
        poisoned = np.moveaxis(np.moveaxis(poisoned, 1, -1).copy(), -1, 1)
    others = [i for i in range(C) if i != channel]
    for found, expected in ((bn(poisoned), twin(x)), (bn.backward(dy), twin.backward(dy))):
        # another memory order may add in another order; NaN may not leak
        np.testing.assert_allclose(found[:, others], expected[:, others], rtol=0, atol=2e-6)
        assert np.isnan(found[:, channel]).any()
    for name in ("running_mean", "running_var", "grad_gamma", "grad_beta"):
        found, expected = getattr(bn, name), getattr(twin, name)
        np.testing.assert_allclose(found[others], expected[others], rtol=1e-5, atol=1e-6)
    assert np.isnan(bn.running_var[channel])
    if layout == "NCW":
        np.testing.assert_array_equal(bn.running_var[others], twin.running_var[others])
    moments = bnfast.moments(poisoned)
    assert np.isnan(moments.m2[channel])
    assert np.isfinite(moments.m2[others]).all()


def test_parameters_may_be_none():
    x, ones, zeros = sample(), np.ones(C), np.zeros(C)
    y, mean, inv_std = F.batch_norm(x, None, None)
    np.testing.assert_array_equal(y, F.batch_norm(x, ones, zeros)[0])
    np.testing.assert_array_equal(
        F.batch_norm_eval(x, mean, ones, None, None), F.batch_norm_eval(x, mean, ones, ones, zeros)
    )
    for training in (True, False):
        np.testing.assert_array_equal(
            F.batch_norm_backward(x, x, mean, inv_std, None, training=training)[0],
            F.batch_norm_backward(x, x, mean, inv_std, ones, training=training)[0],
        )
    np.testing.assert_array_equal(
        F.batch_norm_jvp(x, x, mean, inv_std),
        F.batch_norm_jvp(x, x, mean, inv_std, ones, vgamma=zeros, vbeta=zeros),
    )
