"""Arrays of other frameworks: a golden case for each row of the table, made with the framework itself where it is
installed, by hand with the framework's own formula where it cannot be (checked with pencil: see the numbers).
"""

import os
import re
from pathlib import Path

import numpy as np
import places
import pytest

import bnfast
from bnfast import BatchNorm
from bnfast.state.conventions import CONVENTIONS

C = 4
RTOL = 2e-6  # of y: frameworks in float32 compute x * scale + shift, some roundings of values below 10
MODES = pytest.mark.parametrize("affine", [True, "gamma", "beta", False])


@pytest.fixture
def arrays(rng):
    """gamma, beta, mean, var of float32."""
    made = rng.uniform(0.5, 2, C), rng.normal(size=C), rng.normal(size=C), rng.uniform(0.5, 4, C)
    return dict(zip(("gamma", "beta", "mean", "var"), (a.astype(np.float32) for a in made), strict=True))


@pytest.fixture
def x(rng):
    return rng.normal(1, 2, (8, C, 3, 3)).astype(np.float32)


def channels_last(x):
    return np.ascontiguousarray(np.moveaxis(x, 1, -1))


def close(ours, theirs):
    np.testing.assert_allclose(ours, np.asarray(theirs), rtol=RTOL, atol=2e-6)


def library(name):
    """Imported, or the test is left out with its reason. CI has to have it."""
    if os.environ.get("BNFAST_REQUIRE_FRAMEWORKS"):
        return __import__(name)
    return pytest.importorskip(name, reason=f"{name} is not installed: its own arrays cannot be made")


# --- made with the frameworks --------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, "gamma", False])
def test_pytorch(arrays, x, affine):
    torch = library("torch")
    theirs = torch.nn.BatchNorm2d(C, affine=bool(affine), bias=affine is True, momentum=0.3)
    with torch.no_grad():
        for name, parameter in (("gamma", theirs.weight), ("beta", theirs.bias)):
            if parameter is not None:
                parameter.copy_(torch.from_numpy(arrays[name]))
    for part in (x, 2 * x):
        theirs(torch.from_numpy(part))
    state = theirs.state_dict()
    ours = BatchNorm.from_arrays(
        "pytorch", gamma=state.get("weight"), beta=state.get("bias"), mean=state["running_mean"],
        var=state["running_var"], num_batches_tracked=state["num_batches_tracked"], momentum=0.3,
    )  # fmt: skip
    assert ours.training
    assert (ours.num_batches_tracked, ours.momentum, ours.affine) == (2, 0.3, affine)
    close(ours.eval()(x), theirs.eval()(torch.from_numpy(x)).detach())
    # on from there: the same statistics after one more batch
    ours.train()(x), theirs.train()(torch.from_numpy(x))
    close(ours.running_var, theirs.running_var)
    back = ours.to_arrays("pytorch")
    assert list(back) == list(theirs.state_dict())
    theirs.load_state_dict({name: torch.from_numpy(value) for name, value in back.items()})
    close(ours.eval()(x), theirs.eval()(torch.from_numpy(x)).detach())


def test_pytorch_has_no_bias_without_a_weight(arrays):
    layer = BatchNorm.from_arrays("pytorch", beta=arrays["beta"], mean=arrays["mean"], var=arrays["var"])
    assert layer.affine == "beta"
    assert (layer.to_arrays("pytorch")["weight"] == 1).all()


@MODES
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's variables
def test_keras(arrays, x, affine):
    os.environ.setdefault("KERAS_BACKEND", "torch")
    keras = library("keras")
    has = {"gamma": affine in (True, "gamma"), "beta": affine in (True, "beta")}
    theirs = keras.layers.BatchNormalization(scale=has["gamma"], center=has["beta"])
    data = channels_last(x)
    theirs(data, training=True)
    given = {name: arrays[name] for name in ("gamma", "beta") if has[name]}
    theirs.set_weights([*given.values(), arrays["mean"], arrays["var"]])
    ours = BatchNorm.from_arrays("keras", **given, mean=theirs.moving_mean, var=theirs.moving_variance)
    assert (ours.axis, ours.eps, ours.momentum, ours.affine) == (-1, 1e-3, 0.01, affine)
    close(ours.eval()(data), keras.ops.convert_to_numpy(theirs(data)))
    theirs(data, training=True), ours.train()(data)
    close(ours.running_mean, keras.ops.convert_to_numpy(theirs.moving_mean))
    close(ours.running_var, keras.ops.convert_to_numpy(theirs.moving_variance))
    theirs.set_weights(list(ours.to_arrays("keras").values()))
    close(ours.eval()(data), keras.ops.convert_to_numpy(theirs(data)))


@MODES
def test_flax(arrays, x, affine):
    library("flax")
    from flax import linen

    has = {"gamma": affine in (True, "gamma"), "beta": affine in (True, "beta")}
    theirs = linen.BatchNorm(use_scale=has["gamma"], use_bias=has["beta"], use_running_average=True)
    data = channels_last(x)
    names = {"gamma": "scale", "beta": "bias"}
    given = {name: arrays[name] for name in ("gamma", "beta") if has[name]}
    variables = {
        "params": {names[name]: value for name, value in given.items()},
        "batch_stats": {"mean": arrays["mean"], "var": arrays["var"]},
    }
    ours = BatchNorm.from_arrays("flax", **given, **variables["batch_stats"])
    assert (ours.axis, ours.eps, ours.momentum, ours.affine) == (-1, 1e-5, 0.01, affine)
    close(ours.eval()(data), theirs.apply(variables, data))
    training = linen.BatchNorm(use_scale=has["gamma"], use_bias=has["beta"], use_running_average=False)
    _, changed = training.apply(variables, data, mutable=["batch_stats"])
    ours.train()(data)
    close(ours.running_mean, changed["batch_stats"]["mean"])
    close(ours.running_var, changed["batch_stats"]["var"])
    back = ours.to_arrays("flax")
    variables = {
        "params": {name: back[name] for name in ("scale", "bias") if name in back},
        "batch_stats": {name: back[name] for name in ("mean", "var")},
    }
    close(ours.eval()(data), theirs.apply(variables, data))


def onnx_node(arrays, training):
    """Runs one BatchNormalization node with ONNX's own reference; arrays: its four inputs by name."""
    onnx = library("onnx")
    from onnx import numpy_helper
    from onnx.reference import ReferenceEvaluator

    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    outputs = ["y", "mean", "var"] if training else ["y"]
    node = helper.make_node("BatchNormalization", ["x", *arrays], outputs, training_mode=int(training))
    graph = helper.make_graph(
        [node], "one", [helper.make_tensor_value_info("x", kind, None)],
        [helper.make_tensor_value_info(name, kind, None) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in arrays.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)])
    return lambda x: ReferenceEvaluator(model).run(None, {"x": x})


def test_onnx(arrays, x):
    library("onnx")
    ours = BatchNorm.from_arrays("onnx", **arrays)
    assert (ours.axis, ours.eps, ours.momentum) == (1, 1e-5, 0.1)
    named = ours.to_arrays("onnx")
    assert list(named) == ["scale", "B", "input_mean", "input_var"]
    close(ours.eval()(x), onnx_node(named, training=False)(x)[0])
    y, mean, var = onnx_node(named, training=True)(x)
    close(ours.train()(x), y)
    close(ours.running_mean, mean)
    close(ours.running_var, var)


def test_onnx_of_a_layer_without_parameters_has_all_four(arrays, x):
    ours = BatchNorm.from_arrays("onnx", mean=arrays["mean"], var=arrays["var"]).eval()
    assert ours.affine is False
    named = ours.to_arrays("onnx")
    assert (named["scale"] == 1).all()
    assert (named["B"] == 0).all()


# --- by hand ---------------------------------------------------------------------------------------------------


ONE = np.float32([[10.0]])  # what a channel is given, in eval


def eval_of(layer):
    return layer.eval()(ONE.reshape(1, 1, 1, 1)).item()


def test_torchvision_frozen():
    # (10 - 2) / sqrt(4 - 1e-5 + 1e-5) * 3 + 1 = 13
    arrays = {"gamma": [3.0], "beta": [1.0], "mean": [2.0], "var": [4.0 - 1e-5]}
    layer = BatchNorm.from_arrays("torchvision", **arrays)
    assert not layer.training
    assert eval_of(layer) == pytest.approx(13, rel=1e-6)
    assert list(layer.to_arrays("torchvision")) == ["weight", "bias", "running_mean", "running_var"]


def test_slim():
    # without scale, its default: (10 - 2) / sqrt(3.999 + 0.001) + 1 = 5
    layer = BatchNorm.from_arrays("slim", beta=[1.0], mean=[2.0], var=[3.999])
    assert (layer.affine, layer.axis, layer.momentum, layer.unbiased_running_var) == ("beta", -1, 0.001, True)
    assert eval_of(layer) == pytest.approx(5, rel=1e-6)
    assert "gamma" not in layer.to_arrays("slim")


def test_haiku():
    # two batches of mean 2 and variance 4, decay 0.5: hidden 0.5 * (0.5 * 2) + 0.5 * 2 = 1.5, average 1.5 / (1 - 0.25)
    shape = (1, 1, 1, 1)
    average = {"mean": np.full(shape, 2.0, np.float32), "var": np.full(shape, 4.0, np.float32)}
    hidden = {name: 0.75 * value for name, value in average.items()}
    options = {"gamma": np.full(shape, 3.0), "beta": np.full(shape, 1.0), "decay_rate": 0.5, "eps": 0.0, "counter": 2}
    layers = [
        BatchNorm.from_arrays("haiku", **average, **options),
        BatchNorm.from_arrays("haiku", **hidden, average=False, **options),
    ]
    for layer in layers:
        assert (layer.num_batches_tracked, layer.momentum) == (2, 0.5)
        assert eval_of(layer) == pytest.approx(13, rel=1e-6)
    with pytest.raises(TypeError, match="decay_rate: 'haiku' needs it"):
        BatchNorm.from_arrays("haiku", **average)
    with pytest.raises(ValueError, match="counter: expected at least 1"):
        BatchNorm.from_arrays("haiku", **hidden, average=False, decay_rate=0.5)


def test_caffe():
    # sums of two batches, the first weighted by 0.999: scale_factor 1.999, sums 1.999 * (2, 4)
    sums = {"mean": np.float32([1.999 * 2]), "var": np.float32([1.999 * 4])}
    layer = BatchNorm.from_arrays("caffe", gamma=[3.0], beta=[1.0], **sums, scale_factor=np.float32([1.999]), eps=0.0)
    assert layer.unbiased_running_var
    assert layer.momentum == 0.001
    assert eval_of(layer) == pytest.approx(13, rel=1e-6)
    back = layer.to_arrays("caffe")
    assert back["scale_factor"] == 1
    assert eval_of(BatchNorm.from_arrays("caffe", **sums, scale_factor=1.999, eps=0.0)) == pytest.approx(4, rel=1e-6)
    # before the first batch all is 0, as is what Caffe divides by
    empty = BatchNorm.from_arrays("caffe", mean=[0.0], var=[0.0], scale_factor=0)
    assert empty.running_var == 0
    with pytest.raises(TypeError, match="scale_factor: 'caffe' needs it"):
        BatchNorm.from_arrays("caffe", **sums)
    for bad in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="scale_factor: expected a finite number"):
            BatchNorm.from_arrays("caffe", **sums, scale_factor=bad)
    with pytest.raises(ValueError, match="scale_factor: expected one number"):
        BatchNorm.from_arrays("caffe", **sums, scale_factor=[1.0, 2.0])


def test_darknet():
    # a variance so small that it matters where eps stands: (10 - 2) / (sqrt(1e-12) + 1e-6) * 1 + 0 = 4e6
    arrays = {"gamma": [1.0], "beta": [0.0], "mean": [2.0], "var": [1e-12]}
    layer = BatchNorm.from_arrays("darknet", **arrays)
    assert not layer.training
    assert layer.eps == 0
    assert eval_of(layer) == pytest.approx(4e6, rel=1e-6)
    back = layer.to_arrays("darknet")
    assert list(back) == ["scales", "biases", "rolling_mean", "rolling_variance"]
    assert back["rolling_variance"] == pytest.approx(1e-12, rel=1e-6)
    # of a layer that came from elsewhere, too: 1e-5 is inside its root
    other = BatchNorm.from_arrays("pytorch", mean=[2.0], var=[4.0])
    variance = other.to_arrays("darknet")["rolling_variance"].astype(np.float64)
    assert (np.sqrt(variance) + 1e-6) ** 2 == pytest.approx(4.00001, rel=1e-7)
    with pytest.raises(ValueError, match="var: expected values of at least 0"):
        BatchNorm.from_arrays("darknet", mean=[0.0], var=[-1.0])
    tiny = BatchNorm.from_arrays("ncnn", mean=[0.0], var=[1e-14])
    with pytest.raises(ValueError, match=r"var: expected sqrt\(var \+ eps\) of at least 1e-6"):
        tiny.to_arrays("darknet")


def test_mxnet():
    # fix_gamma: 8 / sqrt(3.999 + 0.001) * 1 + 1 = 5; without it times 3: 13
    arrays = {"gamma": [3.0], "beta": [1.0], "mean": [2.0], "var": [3.999]}
    assert eval_of(BatchNorm.from_arrays("mxnet", **arrays, fix_gamma=True)) == pytest.approx(5, rel=1e-6)
    assert eval_of(BatchNorm.from_arrays("mxnet", **arrays, fix_gamma=False)) == pytest.approx(13, rel=1e-6)
    with pytest.raises(TypeError, match="fix_gamma: 'mxnet' needs it"):
        BatchNorm.from_arrays("mxnet", **arrays)


def test_ncnn():
    # eps 0, its default: 8 / sqrt(4) * 3 + 1 = 13
    layer = BatchNorm.from_arrays("ncnn", gamma=[3.0], beta=[1.0], mean=[2.0], var=[4.0])
    assert not layer.training
    assert eval_of(layer) == pytest.approx(13, rel=1e-6)


# --- all of them -----------------------------------------------------------------------------------------------

NEEDED = {"caffe": {"scale_factor": 1.0}, "mxnet": {"fix_gamma": False}, "haiku": {"decay_rate": 0.9}}
# by each framework's documents: where its channels are, and the divisor of its moving variance
AXIS_AND_UNBIASED = {
    "pytorch": (1, True), "torchvision": (1, True), "keras": (-1, False), "slim": (-1, True), "flax": (-1, False),
    "haiku": (-1, False), "onnx": (1, False), "caffe": (1, True), "darknet": (1, True), "mxnet": (1, False),
    "ncnn": (1, True),
}  # fmt: skip


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_axis_and_divisor(convention, arrays):
    layer = BatchNorm.from_arrays(convention, **arrays, **NEEDED.get(convention, {}))
    assert (layer.axis, layer.unbiased_running_var) == AXIS_AND_UNBIASED[convention]


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_there_and_back(convention, dtype, arrays):
    given = {name: value.astype(dtype) for name, value in arrays.items()}
    layer = BatchNorm.from_arrays(convention, **given, **NEEDED.get(convention, {}))
    assert layer.dtype == dtype
    back = layer.to_arrays(convention)
    for name, value in zip(CONVENTIONS[convention].names, given.values(), strict=True):
        rtol = 2 * np.finfo(dtype).eps if convention == "darknet" and value is given["var"] else 0
        np.testing.assert_allclose(back[name], value, rtol=rtol)
        assert back[name].dtype == dtype
    extras = {name: value for name, value in NEEDED.get(convention, {}).items() if name not in back}
    again = BatchNorm.from_arrays(convention, **back, **extras, dtype=np.float64)  # under the framework's own names
    np.testing.assert_allclose(again.running_mean, given["mean"])
    np.testing.assert_allclose(again.running_var, layer.running_var, rtol=1e-6)
    np.testing.assert_array_equal(again.gamma, layer.gamma)
    np.testing.assert_array_equal(again.beta, layer.beta)


def test_options_of_a_layer_are_taken_and_others_named(arrays):
    layer = BatchNorm.from_arrays("pytorch", **arrays, axis=-1, activation="relu", dtype=np.float64)
    assert (layer.axis, layer.activation, layer.dtype) == (-1, "relu", np.float64)
    with pytest.raises(TypeError, match="epsilon: not known to 'pytorch', which takes weight, bias, running_mean, "):
        BatchNorm.from_arrays("pytorch", **arrays, epsilon=1e-3)
    with pytest.raises(TypeError, match="moving_mean: not known to 'flax', which takes scale, bias, mean, var, eps"):
        BatchNorm.from_arrays("flax", moving_mean=arrays["mean"], var=arrays["var"])
    with pytest.raises(TypeError, match="moving_mean: here this is mean, expected one of them, got both"):
        BatchNorm.from_arrays("keras", **arrays, moving_mean=arrays["mean"])
    with pytest.raises(TypeError, match="var: expected an array, got None"):
        BatchNorm.from_arrays("keras", moving_mean=arrays["mean"])
    with pytest.raises(ValueError, match="convention: expected 'pytorch', "):
        BatchNorm.from_arrays("theano", **arrays)
    with pytest.raises(ValueError, match="convention"):
        layer.to_arrays("theano")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"gamma": np.ones(3)}, ValueError, r"gamma: expected shape \(4,\), got \(3,\)"),
        ({"mean": np.ones((2, 2))}, ValueError, "mean: expected one value a channel"),
        ({"mean": []}, ValueError, "mean: expected one value a channel"),
        ({"mean": [1, 2, 3, np.nan]}, bnfast.StateError, "running_mean"),
        ({"var": [1, 2, 3, -1]}, bnfast.StateError, "running_var"),
        ({"var": "abcd"}, TypeError, "var: expected real numbers"),
        ({"mean": np.ma.masked_equal([0.0, 1, 2, 3], 0)}, TypeError, "mean: expected an array without a mask"),
        ({"gamma": np.ma.ones(4)}, TypeError, "gamma: expected an array without a mask"),
        ({"beta": ["a"] * 4}, TypeError, "beta: expected real numbers"),
        ({"momentum": 2.0}, ValueError, "momentum"),
        ({"momentum": "x"}, TypeError, "momentum"),
    ],
)
def test_what_does_not_fit_is_refused(arrays, change, error, words):
    with pytest.raises(error, match=words):
        BatchNorm.from_arrays("pytorch", **{**arrays, **change})


def test_without_running_statistics_there_is_nothing_to_write():
    with pytest.raises(ValueError, match="track_running_stats=False"):
        BatchNorm(3, track_running_stats=False).to_arrays("keras")


def test_a_subclass_gives_its_own(arrays):
    class Mine(BatchNorm):
        pass

    assert type(Mine.from_arrays("flax", **arrays)) is Mine


def test_half_types_become_float32(arrays):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 arrays need ml_dtypes")
    for dtype in (np.float16, ml_dtypes.bfloat16):
        given = {name: value.astype(dtype) for name, value in arrays.items()}
        layer = BatchNorm.from_arrays("pytorch", **given)
        assert layer.dtype == np.float32
        np.testing.assert_array_equal(layer.gamma, given["gamma"].astype(np.float32))


# --- the weights of a whole model ------------------------------------------------------------------------------


def model_state(rng, prefixes):
    state = {"conv.weight": rng.normal(size=(C, 3, 3, 3)), "fc.bias": np.zeros(10)}
    for number, prefix in enumerate(prefixes):
        dot = prefix + "." if prefix else ""
        for name in ("weight", "bias", "running_mean", "running_var"):
            state[dot + name] = rng.uniform(0.5, 2, C + number).astype(np.float32)
        state[dot + "num_batches_tracked"] = np.array(number)
    return state


def test_all_batch_norms_of_a_state_are_found(rng, x):
    state = model_state(rng, ["bn1", "layer1.0.bn1", "layer1.0.downsample.1"])
    layers = bnfast.from_state(state, eps=1e-3, activation="relu")
    assert list(layers) == ["bn1", "layer1.0.bn1", "layer1.0.downsample.1"]
    for number, (prefix, layer) in enumerate(layers.items()):
        assert (layer.num_features, layer.eps, layer.activation) == (C + number, 1e-3, "relu")
        assert layer.num_batches_tracked == number
        np.testing.assert_array_equal(layer.gamma, state[prefix + ".weight"])
        np.testing.assert_array_equal(layer.running_var, state[prefix + ".running_var"])


def test_some_of_them_or_a_single_layer(rng):
    state = model_state(rng, ["bn1", "bn2"])
    assert list(bnfast.from_state(state, ["bn2."])) == ["bn2"]
    assert list(bnfast.from_state(state, iter(["bn2", "bn1"]))) == ["bn2", "bn1"]
    assert list(bnfast.from_state(model_state(rng, [""]))) == [""]
    with pytest.raises(bnfast.StateError, match="no batch norm 'bn3'; there are 'bn1', 'bn2'"):
        bnfast.from_state(state, ["bn1", "bn3"])
    with pytest.raises(TypeError, match="write \\['bn1'\\]"):
        bnfast.from_state(state, "bn1")


def test_options_of_some_layers_by_their_prefix(rng):
    state = model_state(rng, ["bn1", "bn2"])
    layers = bnfast.from_state(state, eps={"bn2": 1e-3}, momentum={"bn1": None}, activation="relu")
    assert [layer.eps for layer in layers.values()] == [1e-5, 1e-3]
    assert [layer.momentum for layer in layers.values()] == [None, 0.1]
    assert [layer.activation for layer in layers.values()] == ["relu", "relu"]
    (layer,) = bnfast.from_state(state, ["bn1"], eps={"bn1": 0.0, "bn2": 1e-3}).values()  # of the whole model
    assert layer.eps == 0
    assert bnfast.from_state(state, eps={"bn1.": 1e-3})["bn1"].eps == 1e-3
    for name in ("eps", "momentum"):
        with pytest.raises(bnfast.StateError, match=f"{name}: no batch norm 'bn3'; there are 'bn1', 'bn2'"):
            bnfast.from_state(state, **{name: {"bn1": 0.1, "bn3": 0.1}})
    with pytest.raises(TypeError, match="eps: expected a number, got 'x'"):
        bnfast.from_state(state, eps={"bn1": "x"})


def test_layers_without_parameters_or_counts(rng):
    state = {"a.running_mean": np.ones(2), "a.running_var": np.ones(2), "b.running_mean": np.ones(2)}
    (layer,) = bnfast.from_state(state).values()
    assert layer.affine is False
    state = model_state(rng, ["bn"])
    del state["bn.bias"]
    assert bnfast.from_state(state)["bn"].affine == "gamma"
    assert bnfast.from_state(state, dtype=np.float64)["bn"].dtype == np.float64
    state["bn.bias"] = state.pop("bn.weight")
    assert bnfast.from_state(state)["bn"].affine == "beta"


def test_axis_and_dtype_of_layers_of_a_state(rng):
    state = model_state(rng, ["a", "b"])
    state["b.weight"] = state["b.weight"].astype(np.float64)
    layers = bnfast.from_state(state, axis=-1)
    assert [layer.axis for layer in layers.values()] == [-1, -1]
    assert [layer.dtype for layer in layers.values()] == [np.float32, np.float64]
    assert bnfast.from_state(state)["a"].axis == 1


def test_a_state_that_does_not_fit_is_refused_with_the_layer(rng):
    state = model_state(rng, ["a", "b"])
    state["b.running_var"] = np.float32([1, 1, np.nan, 1, 1])
    with pytest.raises(bnfast.StateError, match=r"b: .*running_var"):
        bnfast.from_state(state)
    with pytest.raises(bnfast.StateError, match="expected the keys of a batch norm"):
        bnfast.from_state({"w": np.eye(3)})
    with pytest.raises(TypeError, match=r"state: expected a mapping, got list$"):
        bnfast.from_state([1])
    with pytest.raises(TypeError, match=r"state: expected a mapping, got BatchNorm; give its state_dict\(\)"):
        bnfast.from_state(BatchNorm(2))
    for path in ("model.pt", Path("model.pt")):
        with pytest.raises(TypeError, match=r"state: expected a mapping, got .*; load the file first"):
            bnfast.from_state(path)
    with pytest.raises(bnfast.StateError, match=r"state\['model'\] is a mapping that has some: give that"):
        bnfast.from_state({"optimizer": {"state": {}}, "model": state})
    with pytest.raises(TypeError, match="prefixes: expected several str, got int among them"):
        bnfast.from_state(state, [1])
    with pytest.raises(bnfast.StateError, match="b: running_mean: expected one value a channel, got none"):
        bnfast.from_state({"b.running_mean": [], "b.running_var": []})
    masked = np.ma.masked_equal(np.ones(5), 1)
    with pytest.raises(bnfast.StateError, match="b: running_var: expected an array without a mask"):
        bnfast.from_state({**state, "b.running_var": masked})
    state["b.running_var"] = object()
    with pytest.raises(bnfast.StateError, match="b: "):
        bnfast.from_state(state)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "parameters", "safetensors"])
def test_the_weights_of_a_model_of_pytorchs(kind, tmp_path, x):
    torch = library("torch")
    bn = torch.nn.BatchNorm2d(C)
    model = torch.nn.Sequential(torch.nn.Conv2d(C, C, 1), bn, torch.nn.ReLU())
    torch.manual_seed(0)
    torch.nn.init.normal_(bn.weight)
    model(torch.from_numpy(x))
    if kind in ("bfloat16", "float16"):
        model.to(getattr(torch, kind))
    state = model.state_dict()
    if kind == "parameters":  # tensors that require gradients
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if kind == "safetensors":
        library("safetensors")
        from safetensors.numpy import load_file
        from safetensors.torch import save_file

        save_file(state, tmp_path / "model.safetensors")
        state = load_file(tmp_path / "model.safetensors")
    (layer,) = bnfast.from_state(state).values()
    assert layer.num_batches_tracked == 1
    loaded = bnfast.BatchNorm(C)
    loaded.load_state_dict(state, prefix="1")
    for name, value in layer.state_dict().items():
        np.testing.assert_array_equal(loaded.state_dict()[name], value)
    theirs = bn.float().eval()(torch.from_numpy(x)).detach()
    close(layer.eval()(x), theirs)


def test_the_guide_has_a_row_for_each_convention():
    page = places.ROOT / "docs" / "deploy" / "conventions.md"
    if not page.is_file():
        pytest.skip("the guide is not beside the installed tests")
    rows = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith('| `"')]
    for row, (name, convention) in zip(rows, CONVENTIONS.items(), strict=True):
        assert row.startswith(f'| `"{name}"`')
        for option in (convention.eps, convention.momentum):
            if option is not None and option[0] not in convention.needed:
                assert float(re.search(rf"`{option[0]}=([\d.e-]+)`", row)[1]) == option[1], name
        assert all(f"`{extra}=...`" in row for extra in convention.needed)
