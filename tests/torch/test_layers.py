"""bnfast's layers for PyTorch beside PyTorch's: values, gradients, statistics, all that a module can be put through.

Both compute in the data's precision, differently: tolerances are some roundings of PyTorch's (test_torch_parity.py says
of which), not of ours. Whether the kernels were used is asked, not assumed: `kernels` counts their calls.
"""

import copy
import functools
import io
import pickle

import numpy as np
import pytest
import torch_layers
from scripts import run_script
from torch.utils import checkpoint
from torch_layers import LAYERS, close, data, pair, torch

import bnfast.torch
from bnfast import _core
from bnfast.torch import calls, layers, memory

nn = torch.nn
F = torch.nn.functional

WIDE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
pays = layers.pays  # the tests put another in its place
ACTIVATIONS = {None: lambda w: w, "relu": F.relu, "relu6": F.relu6, "leaky_relu": lambda w: F.leaky_relu(w, 0.2)}


@pytest.fixture(autouse=True)
def small_data_too(monkeypatch):
    """The kernels take all sizes here, also those that are handed to PyTorch's code for speed."""
    monkeypatch.setattr(layers, "SMALL", 0)
    monkeypatch.setattr(layers, "pays", lambda *_: True)


@pytest.fixture
def kernels(monkeypatch):
    """The calls of the kernels, by name."""
    return torch_layers.counted(monkeypatch)


def stepped(layer, x, dy, *residual):
    """(y, dx, gradients of parameters, of the residual) of a forward and backward of copies of the inputs."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, *residual)]
    layer.zero_grad()
    y = layer(*leaves)
    y.backward(dy)
    return y.detach(), leaves[0].grad, [p.grad for p in layer.parameters()], *(leaf.grad for leaf in leaves[1:])


def assert_same_step(ours, theirs, x, dy):
    mine, its = stepped(ours, x, dy), stepped(theirs, x, dy)
    close(mine[0], its[0])
    close(mine[1], its[1])
    for one, other in zip(mine[2], its[2], strict=True):
        close(one, other, of=x.numel() // x.shape[1])
    for one, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        close(one, other)
    return mine, its


# --- values and gradients ----------------------------------------------------------------------------------------


@WIDE
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("ndim", [2, 3, 4, 5])
def test_training_and_eval(ndim, channels_last, dtype, kernels):
    ours, theirs = pair(ndim, dtype=dtype)
    for step in range(3):
        x, dy = data(ndim, dtype, channels_last, seed=step), data(ndim, dtype, channels_last, seed=9 + step)
        mine, its = assert_same_step(ours, theirs, x, dy)
        assert mine[0].stride() == its[0].stride()
        assert mine[0].dtype == dtype
    assert_same_step(ours.eval(), theirs.eval(), x, dy)
    assert kernels == {"forward": 4, "backward": 4}
    with torch.no_grad():
        close(ours(x), theirs(x))


@pytest.mark.parametrize("options", [
    {"momentum": None}, {"momentum": 0.0}, {"momentum": 1.0}, {"affine": False}, {"track_running_stats": False},
    {"affine": False, "track_running_stats": False}, {"eps": 0.1}, {"bias": False},
], ids=str)  # fmt: skip
def test_options(options, kernels):
    ours, theirs = pair(4, **options)
    assert str(ours) == str(theirs)
    for step in range(3):
        assert_same_step(ours, theirs, data(4, seed=step), data(4, seed=9 + step))
    assert_same_step(ours.eval(), theirs.eval(), data(4), data(4))
    assert kernels == {"forward": 4, "backward": 4}


@WIDE
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_and_residual(activation, with_residual, training, channels_last, dtype, kernels):
    ours, theirs = pair(4, dtype=dtype, activation=activation, negative_slope=0.2)
    ours.train(training), theirs.train(training)
    x, dy, r = (data(4, dtype, channels_last, seed=seed) for seed in range(3))

    def expected(x, *residual):
        return ACTIVATIONS[activation](sum(residual, theirs(x)))

    expected.zero_grad, expected.parameters = theirs.zero_grad, theirs.parameters
    residual = [r] if with_residual else []
    w = sum(residual, copy.deepcopy(theirs)(x)).detach()
    dy = dy * (torch.minimum(w.abs(), (w - 6).abs()) > 1e-3)  # rounding may choose the side of a kink
    mine, its = stepped(ours, x, dy, *residual), stepped(expected, x, dy, *residual)
    close(mine[0], its[0])
    close(mine[1], its[1])
    for one, other in zip(mine[2], its[2], strict=True):
        close(one, other, of=x.numel() // x.shape[1])
    if with_residual:
        torch.testing.assert_close(mine[3], its[3], rtol=0, atol=0)
    assert kernels == {"forward": 1, "backward": 1}


@HALF
@pytest.mark.parametrize("parameters", ["half", "float32"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("ndim", [2, 3, 4])
@pytest.mark.parametrize("training", [True, False])
def test_half_data(training, ndim, channels_last, parameters, dtype, kernels):
    """Rounded once: beside PyTorch in float64 on the same half numbers (its own half results are not)."""
    knows(dtype)
    ours, _ = pair(ndim, dtype=dtype if parameters == "half" else torch.float32, activation="relu")
    _, exact = pair(ndim, dtype=torch.float64)
    exact.load_state_dict(ours.state_dict())

    def expected(x, residual):
        return F.relu(exact(x) + residual)

    expected.zero_grad, expected.parameters = exact.zero_grad, exact.parameters
    ours.train(training), exact.train(training)
    x, dy, r = (data(ndim, dtype, channels_last, seed=seed) for seed in range(3))
    w = expected(x.double(), r.double()).detach()
    exact.load_state_dict(ours.state_dict())
    dy = torch.where((w > 0) & (w < 1e-2), torch.zeros_like(dy), dy)  # rounding may choose the side of a kink
    mine, its = stepped(ours, x, dy, r), stepped(expected, x.double(), dy.double(), r.double())
    assert mine[0].dtype == mine[1].dtype == mine[3].dtype == dtype
    half = torch.finfo(dtype).eps
    for one, other in ((mine[0], its[0]), (mine[1], its[1]), (mine[3], its[3])):
        torch.testing.assert_close(one.double(), other, rtol=0.51 * half, atol=2e-6)
    for one, parameter, other in zip(mine[2], ours.parameters(), its[2], strict=True):
        assert one.dtype == parameter.dtype
        eps = torch.finfo(parameter.dtype).eps
        torch.testing.assert_close(one.double(), other, rtol=max(eps, 1e-5), atol=1e-4)
    for one, other in zip(ours.buffers(), exact.buffers(), strict=True):
        eps = torch.finfo(one.dtype).eps if one.is_floating_point() else 0
        torch.testing.assert_close(one.double(), other.double(), rtol=max(0.51 * eps, 1e-6), atol=1e-6)
    assert kernels == {"forward": 1, "backward": 1}


def knows(dtype):
    if dtype not in calls.HALF:
        pytest.skip(f"these kernels do not know {dtype}, or ml_dtypes is not installed: PyTorch's code takes it")


@HALF
@pytest.mark.parametrize("channels_last", [False, True])
def test_half_data_under_autocast(dtype, channels_last, kernels):
    """Parameters stay float32; a convolution gives half data."""
    knows(dtype)
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
    ours = bnfast.torch.convert(copy.deepcopy(theirs))
    x = torch.randn(4, 3, 8, 8)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    for model in (ours, theirs):
        with torch.autocast("cpu", dtype):
            y = model(x)
        assert y.dtype == dtype
        y.float().square().sum().backward()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0.05, atol=0.05 * float(other.grad.abs().max()))
    for one, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=0.01, atol=0.01)
    assert kernels == {"forward": 1, "backward": 1}


def test_the_memory_of_tensors_is_used_as_it_is(monkeypatch):
    """No copies of x, the residual, y and the gradients, planar and channels_last."""
    seen = []

    def spying(original):
        def spy(*arrays, **options):
            seen.append(
                [a.ctypes.data for a in (*arrays, *options.values()) if isinstance(a, np.ndarray) and a.ndim > 1]
            )
            assert all(a.strides == strides for a in arrays if a is not None and a.ndim > 1)
            return original(*arrays, **options)

        return spy

    for name in ("batch_norm", "batch_norm_backward"):
        monkeypatch.setattr(calls.ours, name, spying(getattr(calls.ours, name)))
    for channels_last in (False, True):
        x, r, dy = (data(4, channels_last=channels_last, seed=seed) for seed in range(3))
        strides = tuple(4 * s for s in x.stride())
        gradients = []
        for leaf in (x.requires_grad_(), r.requires_grad_()):
            leaf.register_hook(gradients.append)  # before they are accumulated
        y = bnfast.torch.BatchNorm2d(6, activation="relu")(x, r)
        assert seen.pop() == [x.data_ptr(), r.data_ptr(), y.data_ptr()]
        y.backward(dy)
        dx, dresidual = sorted(gradients, key=lambda t: t.data_ptr())
        assert sorted(seen.pop()) == sorted(t.data_ptr() for t in (dy, x, r, dx, dresidual))


@pytest.mark.parametrize("change", [
    lambda x: x[:, :, ::2], lambda x: x.expand(4, *x.shape[1:]), lambda x: x.transpose(2, 3), lambda x: x[::2],
    lambda x: x[..., 1:], lambda x: torch.view_as_complex(torch.stack([x, x], -1)).conj().imag,
], ids=["gaps", "expanded", "transposed", "every other", "offset", "negative bit"])  # fmt: skip
def test_views(change, kernels):
    ours, theirs = pair(4)
    x = change(data(4)[:1] if "expand" in change.__code__.co_names else data(4))
    dy = torch.randn_like(x.contiguous())
    assert_same_step(ours, theirs, x, dy)
    # dy of a sum is one number, expanded
    for layer in (ours, theirs):
        layer.zero_grad()
        layer(x).sum().backward()
    close(ours.bias.grad, theirs.bias.grad)
    assert kernels["forward"] == 2


def test_far_from_zero_ours_keeps_its_digits():
    x = torch.randn(64, 6, 5, 5) + 1e5
    exact = F.batch_norm(x.double(), None, None, training=True)
    ours, _ = pair(4)
    nn.init.ones_(ours.weight), nn.init.zeros_(ours.bias)
    assert (ours(x) - exact).abs().max() < 2e-6
    assert (F.batch_norm(x, None, None, training=True) - exact).abs().max() > 1e-4


# --- which tensors need a gradient ---------------------------------------------------------------------------------


@pytest.mark.parametrize("needs", ["x", "weight", "bias", "residual", "x residual", "weight bias"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_gradients_of_some_alone(needs, activation, kernels):
    ours, _ = pair(4, activation=activation)
    reference, _ = pair(4, activation=activation)
    x, dy, r = (data(4, seed=seed) for seed in range(3))
    _, dx, (dweight, dbias), dresidual = stepped(reference, x, dy, r)
    expected = {"x": dx, "weight": dweight, "bias": dbias, "residual": dresidual}
    tensors = {"x": x, "weight": ours.weight, "bias": ours.bias, "residual": r}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in needs.split())
    ours(x, r).backward(dy)
    for name, tensor in tensors.items():
        if name in needs.split():
            torch.testing.assert_close(tensor.grad, expected[name], rtol=1e-6, atol=1e-6)
        else:
            assert tensor.grad is None
    assert kernels == {"forward": 2, "backward": 2}


def test_nothing_needs_a_gradient():
    ours, _ = pair(4)
    assert ours(data(4)).requires_grad
    with torch.no_grad():
        assert not ours(data(4)).requires_grad
    with torch.inference_mode():
        assert ours(data(4)).is_inference()
    assert not ours.requires_grad_(False)(data(4)).requires_grad


def test_frozen_layer():
    ours, theirs = pair(4)
    for layer in (ours, theirs):
        layer.eval().requires_grad_(False)
    x, dy = data(4), data(4, seed=1)
    mine, its = stepped(ours, x, dy), stepped(theirs, x, dy)
    close(mine[0], its[0])
    close(mine[1], its[1])
    assert mine[2] == its[2] == [None, None]


def test_gradient_of_the_forward_that_was():
    """Statistics that change between forward and backward change no gradient."""
    ours, _ = pair(4)
    x, dy = data(4).requires_grad_(), data(4, seed=1)
    expected = torch.autograd.grad(ours.eval()(x), x, dy)[0]
    y = ours(x)
    ours.running_var.mul_(4)
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], expected, rtol=0, atol=0)


@WIDE
def test_gradient_of_the_weight_that_was(dtype):
    ours, _ = pair(4, dtype=dtype, activation="relu")
    x, dy = data(4, dtype), data(4, dtype, seed=1)
    expected = torch.autograd.grad(ours.eval()(x), list(ours.parameters()), dy)
    y = ours(x)
    with torch.no_grad():
        ours.running_mean.add_(5)
        ours.bias.add_(1)  # (PyTorch's ReLU goes by its result)
    found = torch.autograd.grad(y, list(ours.parameters()), dy)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


ORDERS = {
    "planar": lambda x: x, "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3), "batch in the middle": lambda x: x.transpose(0, 1),
    "reversed": lambda x: x.permute(3, 2, 1, 0), "gaps": lambda x: x[:, :, ::2],
    "expanded": lambda x: x[:1].expand_as(x),
    "part of channels_last": lambda x: x.contiguous(memory_format=torch.channels_last)[:, :5],
    "the same of one image": lambda x: x.contiguous(memory_format=torch.channels_last)[:1, :5],
    "channels_last of one image, expanded": lambda x: x[:1].contiguous(memory_format=torch.channels_last).expand_as(x),
    "one pixel": lambda x: x[:, :, :1, :1].contiguous(memory_format=torch.channels_last),
}  # fmt: skip


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.parametrize("training", [True, False])
def test_y_has_the_strides_of_pytorchs(name, training, kernels):
    """So what takes a view of PyTorch's result takes one of ours."""
    x = ORDERS[name](data(4))
    ours, theirs = bnfast.torch.BatchNorm2d(x.shape[1]), nn.BatchNorm2d(x.shape[1])
    mine, its = ours.train(training)(x), theirs.train(training)(x)
    assert mine.stride() == its.stride()
    close(mine, its)
    assert kernels["forward"] == 1
    if name in ("planar", "channels_last", "transposed"):
        compiled = torch.compile(ours, backend="aot_eager")(x)
        assert compiled.stride() == its.stride()


def test_y_of_sequences_may_be_viewed():
    x = torch.randn(4, 7, 6).transpose(1, 2)
    assert bnfast.torch.BatchNorm1d(6)(x).view(4, -1).shape == (4, 42)


def test_zeros_without_memory():
    ours, theirs = pair(4)
    zero = torch._efficientzerotensor(data(4).shape)
    for layer in (ours, theirs):
        layer(data(4)).backward(zero)
    assert (ours.weight.grad == 0).all()
    close(ours(zero), theirs(zero))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # PyTorch's own, in forward-mode differentiation
def test_transforms_of_a_backward():
    """The forward was without them, so the kernels did it."""
    x, several = data(4).requires_grad_(), torch.stack([data(4, seed=1), data(4, seed=2)])
    found = []
    for layer, activation in zip(pair(4, activation="relu"), (lambda w: w, F.relu), strict=True):
        y = activation(layer(x))

        def backward(dy, y=y):
            return torch.autograd.grad(y, x, dy, retain_graph=True)[0]

        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(several[0], several[1])
            forward_over_reverse = torch.autograd.forward_ad.unpack_dual(backward(dual)).tangent
        found.append((
            torch.func.vmap(backward)(several), torch.func.jvp(backward, (several[0],), (several[1],))[1],
            forward_over_reverse,
        ))  # fmt: skip
        assert not torch._C._functorch.get_inplace_requires_grad_allowed()
    for mine, its in zip(*found, strict=True):
        close(mine, its)


UNDER_COMPILE = """
import contextlib, warnings
warnings.simplefilter("ignore")  # inside PyTorch's compiler
import torch, bnfast.torch
from torch.autograd import forward_ad

TRANSFORMED = {
    "jvp": lambda layer, x: torch.func.jvp(layer, (x,), (x,))[1],
    "grad": lambda layer, x: torch.func.grad(lambda v: layer(v).square().sum())(x),
    "vmap": lambda layer, x: torch.func.vmap(layer)(x[None]),
    "dual": lambda layer, x: layer(x),
}

def outcome(name, layer, compiled):
    torch._dynamo.reset()
    torch.manual_seed(0)
    x = torch.randn(4, 6, 5, 7)
    with forward_ad.dual_level() if name == "dual" else contextlib.nullcontext():
        x = forward_ad.make_dual(x, x) if name == "dual" else x
        found = (torch.compile(TRANSFORMED[name], backend="eager") if compiled else TRANSFORMED[name])(layer, x)
        return forward_ad.unpack_dual(found).tangent.detach() if name == "dual" else found.detach()

for name in TRANSFORMED:
    expected = outcome(name, torch.nn.BatchNorm2d(6).eval(), False)
    try:
        found = outcome(name, bnfast.torch.BatchNorm2d(6).eval(), True)
    except torch._dynamo.exc.TorchDynamoException as error:  # it does not take all transforms of PyTorch's own either
        assert "bnfast.batch_norm" not in str(error), error
        continue
    torch.testing.assert_close(found, expected)
print("the same")
"""


def test_transforms_under_compile():
    """They go to PyTorch's code, with its results or its refusal; alone, as it depends on what was compiled before."""
    assert run_script(UNDER_COMPILE) == "the same"


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch.jit.script, which is what is tested
def test_an_activation_that_was_set_to_another_is_refused_at_any_size(monkeypatch):
    layer = bnfast.torch.BatchNorm2d(6)
    layer.activation = "gelu"
    with pytest.raises(torch.jit.Error, match="activation: expected None, 'relu'"):
        torch.jit.script(layer)(data(4))
    for large in (True, False):
        monkeypatch.setattr(layers, "pays", lambda *_, large=large: large)
        with pytest.raises(ValueError, match="activation: expected None, 'relu'"):
            layer(data(4))


def test_x_changed_in_place_is_noticed():
    ours, _ = pair(4)
    x = data(4)
    y = ours(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_y_may_be_changed_in_place():
    ours, _ = pair(4, activation="relu")
    x = data(4).requires_grad_()
    expected = torch.autograd.grad((ours(x) * 2).sum(), x)[0]
    y = ours(x)
    y.mul_(2)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", ["leaky_relu", None])
@pytest.mark.parametrize("with_residual", [True, False])
def test_gradcheck_and_double_backward(training, activation, with_residual):
    layer = bnfast.torch.BatchNorm1d(3, dtype=torch.float64, activation=activation, track_running_stats=not training)
    torch.manual_seed(0)
    nn.init.normal_(layer.weight)
    layer.train(training)
    inputs = [torch.randn(4, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(1 + with_residual)]

    def function(weight, bias, *inputs):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, tuple(inputs))

    arguments = (layer.weight, layer.bias, *inputs)
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


@pytest.mark.parametrize("training", [True, False])
def test_double_backward_knows_the_shift(training, kernels):
    """Its gradient is 0, and that of the values that were."""
    found = []
    for layer, activation in zip(pair(4, activation="relu"), (lambda w: w, F.relu), strict=True):
        x, dy = data(4).requires_grad_(), data(4, seed=1).requires_grad_()
        y = activation(layer.train(training)(x))
        gradients = torch.autograd.grad(y, [x, *layer.parameters()], dy, create_graph=True)
        of = [x, dy, *layer.parameters()]
        found.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), of))
    for mine, its in zip(*found, strict=True):
        close(mine, its, of=4000)
    assert kernels["forward"] == 1


def test_double_backward_is_that_of_the_direct_path(kernels):
    """A weight that depends on x: its part is autograd's, not counted twice."""
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    layer, plain = bnfast.torch.BatchNorm1d(3, dtype=torch.float64), nn.BatchNorm1d(3, dtype=torch.float64)

    def second(module):
        y = torch.func.functional_call(module, {"weight": x[0] ** 2}, (x,))
        (dx,) = torch.autograd.grad((y**3).sum(), x, create_graph=True)
        return dx, *torch.autograd.grad((dx**2).sum(), x)

    for one, other in zip(second(layer), second(plain), strict=True):
        torch.testing.assert_close(one, other)
    assert kernels["forward"] == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("odd", [False, True])
def test_double_backward_of_one_image_in_channels_last(odd, training, kernels):
    """Strides of an axis of length 1 may be anything; with some of them PyTorch's backward misreads a planar dy."""
    ours, theirs = pair(4, dtype=torch.float64)
    ours.train(training), theirs.train(training)
    x, dy = (data(4, torch.float64, channels_last=seed == 0, seed=seed)[:1] for seed in range(2))

    def second(layer, x):
        x = x.detach().requires_grad_()
        (dx,) = torch.autograd.grad(layer(x), x, dy, create_graph=True)
        return dx, *torch.autograd.grad((dx**3).sum(), (x, layer.weight), materialize_grads=True)

    expected = second(theirs, x)
    if odd:
        x = x.as_strided(x.shape, (6, *x.stride()[1:]))
    for one, other in zip(second(ours, x), expected, strict=True):
        torch.testing.assert_close(one, other)
    assert kernels["forward"] == 1


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("needs", ["x", "weight", "bias", "residual", "x residual", "dy residual", "dy x"])
def test_what_of_a_backward_can_be_differentiated_again(needs, training, kernels):
    ours, theirs = pair(4, dtype=torch.float64)
    found = []
    for layer in (ours, theirs):
        layer.train(training)
        x, dy, r = (data(4, torch.float64, seed=seed) for seed in range(3))
        tensors = {"x": x, "weight": layer.weight, "bias": layer.bias, "residual": r, "dy": dy}
        for name, tensor in tensors.items():
            tensor.requires_grad_(name in needs.split())
        y = layer(x, r) if layer is ours else layer(x) + r
        wanted = [tensors[name] for name in needs.split() if name != "dy"]
        found.append(torch.autograd.grad(y, wanted, dy, create_graph=True, retain_graph=True))
        many = torch.stack([dy.detach(), 2 * dy.detach()])
        found[-1] += torch.autograd.grad(y, wanted, many, is_grads_batched=True)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
        assert one.requires_grad is other.requires_grad
    assert kernels["forward"] == 1


@HALF
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_backwards_that_may_be_differentiated_of_half_data(training, affine, dtype):
    """Computed with statistics of float32, as in PyTorch's layer."""
    knows(dtype)
    x, dy = data(4, dtype).requires_grad_(), data(4, dtype, seed=1)
    layers = [layer.train(training) for layer in pair(4, affine=affine)]
    found = [torch.autograd.grad(layer(x), x, dy, create_graph=True)[0] for layer in layers]
    torch.testing.assert_close(*found, rtol=2 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps / 8)


def test_many_backwards_at_once():
    x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    dys = torch.randn(4, 6, 3, dtype=torch.float64)
    for layer in (bnfast.torch.BatchNorm1d(3, dtype=torch.float64, activation="relu"),):
        y = layer(x)
        (found,) = torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)
        expected = torch.stack([torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in dys])
        torch.testing.assert_close(found, expected)


# --- what goes to PyTorch's own code ---------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # by torch.func
def test_transforms_and_forward_mode(kernels):
    ours, theirs = pair(2, dtype=torch.float64)
    ours.eval(), theirs.eval()
    x, v = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    for transform in (
        lambda f: torch.func.jvp(f, (x,), (v,))[1],
        lambda f: torch.func.vmap(f)(x[:, None]),
        lambda f: torch.func.grad(lambda x: f(x).square().sum())(x),
        lambda f: torch.func.hessian(lambda x: f(x).square().sum())(x[:2]),
    ):
        torch.testing.assert_close(transform(ours), transform(theirs))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, v)
        tangents = [torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent for layer in (ours, theirs)]
    torch.testing.assert_close(*tangents)
    assert kernels == {}


def test_tensors_that_are_not_plain(kernels):
    class Own(torch.Tensor):
        pass

    ours, theirs = pair(4)
    x = data(4)
    assert type(ours(x.as_subclass(Own))) is Own
    meta = bnfast.torch.BatchNorm2d(6, device="meta")
    assert meta(torch.empty(2, 6, 3, 3, device="meta")).shape == (2, 6, 3, 3)
    close(ours(x.to_mkldnn()).to_dense(), theirs(x.to_mkldnn()).to_dense())
    ours.weight = nn.Parameter(ours.weight.detach().as_subclass(Own))
    close(ours(x).as_subclass(torch.Tensor), theirs(x))
    assert kernels == {}


@pytest.mark.parametrize("residual", [
    torch.randn(6, 1, 1), torch.randn(4, 6, 5, 7).double(), torch.randn(1, 6, 5, 7), torch.tensor(1.0),
], ids=["broadcast", "float64", "one image", "number"])  # fmt: skip
def test_residuals_that_are_not_like_x(residual, kernels):
    ours, theirs = pair(4, activation="relu")
    x = data(4)
    y = ours(x, residual)
    expected = F.relu(theirs(x) + residual)
    assert y.dtype == expected.dtype
    close(y, expected)
    assert kernels == {}


def error_of(call):
    try:
        call()
    except Exception as error:
        return type(error), str(error)
    return None


@pytest.mark.parametrize("x", [
    torch.randn(1, 6, 1, 1), torch.randn(3, 6, 5), torch.randn(3, 7, 5, 5), torch.ones(3, 6, 5, 5, dtype=torch.int64),
    torch.randn(3, 6, 5, 5).double(), torch.randn(0, 6, 5, 5), torch.randn(3, 6, 0, 5), torch.randn(6),
    torch.randn(3, 6, 5, 5, dtype=torch.complex64), 1.0, None, torch.randn(3, 6, 5, 5).half(),
], ids=["one value", "rank", "channels", "ints", "float64", "empty", "no pixels", "1d", "complex", "float", "None",
        "half"])  # fmt: skip
@pytest.mark.parametrize("training", [True, False])
def test_what_pytorch_refuses_is_refused_in_its_words(x, training):
    ours, theirs = pair(4)
    ours.train(training), theirs.train(training)
    assert error_of(lambda: ours(x)) == error_of(lambda: theirs(x))
    for one, other in zip(ours.buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


@pytest.mark.parametrize("change", [
    lambda layer: layer.running_var.fill_(-1), lambda layer: layer.running_var.fill_(float("nan")),
    lambda layer: layer.running_var.fill_(float("inf")), lambda layer: setattr(layer, "eps", 0.0),
    lambda layer: layer.running_mean.fill_(float("nan")), lambda layer: setattr(layer, "momentum", 1.5),
    lambda layer: setattr(layer, "running_var", layer.running_var.double()),
    lambda layer: setattr(layer, "num_batches_tracked", None),
    lambda layer: setattr(layer, "track_running_stats", False),
], ids=["negative", "nan", "inf", "eps", "mean", "momentum", "float64", "count", "untracked"])  # fmt: skip
@pytest.mark.parametrize("training", [True, False])
def test_state_that_bnfasts_own_layer_would_refuse(change, training):
    ours, theirs = pair(4)
    for layer in (ours, theirs):
        change(layer)
        layer.train(training)
    x = data(4)
    found, expected = error_of(lambda: ours(x)), error_of(lambda: theirs(x))
    assert found == expected
    if expected is None:
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5, equal_nan=True)
        for one, other in zip(ours.buffers(), theirs.buffers(), strict=True):
            torch.testing.assert_close(one, other, equal_nan=True)


def test_nan_and_inf_stay_in_their_channel():
    ours, theirs = pair(4)
    x = data(4)
    x[0, 1, 0, 0], x[0, 2, 0, 0] = float("nan"), float("inf")
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(ours.running_var, theirs.running_var, equal_nan=True)


# --- what is done with modules ---------------------------------------------------------------------------------------


def test_state_dicts_both_ways():
    ours, theirs = pair(4)
    ours(data(4))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata
    assert theirs.load_state_dict(ours.state_dict()) == ours.load_state_dict(theirs.state_dict())
    ours(data(4))
    theirs.load_state_dict(ours.state_dict())
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[name], value, rtol=0, atol=0)
        assert theirs.state_dict()[name].dtype == value.dtype
    old = {name: value for name, value in theirs.state_dict().items() if name != "num_batches_tracked"}
    ours.load_state_dict(old)  # as files of version 1 are
    ours.load_state_dict(theirs.state_dict(), assign=True)
    close(ours.eval()(data(4)), theirs.eval()(data(4)))


def test_copies_pickles_and_files():
    ours, _ = pair(4, activation="relu", dtype=torch.float32)
    x = data(4)
    ours(x)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for same in (
        copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False),
    ):  # fmt: skip
        assert type(same) is bnfast.torch.BatchNorm2d
        assert same.activation == "relu"
        torch.testing.assert_close(same.eval()(x), copy.deepcopy(ours).eval()(x), rtol=0, atol=0)
        assert same.weight is not ours.weight
    assert pickle.dumps(ours).count(b"bnfast.torch") >= 1


def test_hooks():
    ours, _ = pair(4)
    seen = []
    ours.register_forward_pre_hook(lambda module, arguments: seen.append("pre"))
    ours.register_forward_hook(lambda module, arguments, result: seen.append("forward") or result * 2)
    ours.register_full_backward_hook(lambda module, dx, dy: seen.append("backward"))
    ours.weight.register_hook(lambda gradient: seen.append("weight"))
    x = data(4).requires_grad_()
    ours(x).sum().backward()
    assert sorted(seen) == ["backward", "forward", "pre", "weight"]


def test_a_module_used_twice_and_weights_shared():
    ours, theirs = pair(4)
    results = []
    for layer in (ours, theirs):
        other = copy.deepcopy(layer)
        other.weight = layer.weight
        x = data(4).requires_grad_()
        y = other(layer(layer(x) * 2 + 1))
        y.square().sum().backward()
        results.append((y.detach(), x.grad, layer.weight.grad, layer.running_mean, layer.num_batches_tracked))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-3)
    assert ours.num_batches_tracked == 2


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(use_reentrant):
    from torch.utils.checkpoint import checkpoint

    ours, _ = pair(4, activation="relu")
    x, dy, r = (data(4, seed=seed) for seed in range(3))
    expected = stepped(copy.deepcopy(ours), x, dy, r)

    def checkpointed(*inputs):
        return checkpoint(ours, *inputs, use_reentrant=use_reentrant)

    checkpointed.zero_grad, checkpointed.parameters = ours.zero_grad, ours.parameters
    found = stepped(checkpointed, x, dy, r)
    for one, other in zip((*found[:2], *found[2], found[3]), (*expected[:2], *expected[2], expected[3]), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert ours.num_batches_tracked == 2  # as PyTorch's: the forward ran twice


def test_saved_tensors_hooks_see_what_is_kept():
    ours, _ = pair(4, activation="relu")
    packed = []
    x = data(4).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
        y = ours(x)
    assert any(t.data_ptr() == x.data_ptr() for t in packed)
    y.sum().backward()
    large = [t for t in packed if t.numel() == x.numel()]
    assert len(large) == 1  # x: the activation keeps nothing more


@pytest.mark.parametrize("activation", [None, "relu"])
def test_only_what_the_backward_needs_is_kept(activation):
    """Without an activation neither the shift nor the residual matters."""
    ours, _ = pair(4, activation=activation)
    x, residual = data(4).requires_grad_(), data(4, seed=1)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        y = ours(x, residual)
    assert any(t.data_ptr() == residual.data_ptr() for t in packed) is (activation is not None)
    assert sum(t.shape == (6,) and t.dtype is torch.float32 for t in packed) == (1 if activation is None else 2)
    assert y.grad_fn is not None


def outcome(call):
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def assert_same_outcome(mine, its):
    if isinstance(its, str):
        assert mine == its
    else:
        close(mine, its)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("missing", ["running_mean", "running_var", "num_batches_tracked"])
def test_state_that_was_taken_away(missing, training):
    """Also without a momentum, whose place the count has: a weight of 0 where there is none."""
    layers_of = [layer.train(training) for layer in pair(4, momentum=None)]
    for layer in layers_of:
        setattr(layer, missing, None)
    assert_same_outcome(*(outcome(lambda layer=layer: layer(data(4))) for layer in layers_of))
    for name in ("running_mean", "running_var"):
        if name != missing:
            close(*(getattr(layer, name) for layer in layers_of))


@WIDE
def test_statistics_with_gaps_and_their_versions(dtype):
    ours, theirs = pair(4, dtype=dtype)
    for layer in (ours, theirs):
        layer.running_mean = torch.stack([layer.running_mean] * 2, 1)[:, 0]
    versions = [[t._version for t in (layer.running_mean, layer.running_var)] for layer in (ours, theirs)]
    close(ours(data(4, dtype)), theirs(data(4, dtype)))
    close(ours.running_mean, theirs.running_mean)
    after = [[t._version for t in (layer.running_mean, layer.running_var)] for layer in (ours, theirs)]
    assert after == versions  # PyTorch's own code raises none


@HALF
def test_half_data_with_parameters_of_different_dtypes(dtype, kernels):
    """What PyTorch makes of it; the kernels take float32, or halves as the data."""
    ours, theirs = pair(4)
    for layer in (ours, theirs):
        layer.bias = nn.Parameter(layer.bias.detach().to(dtype))
    assert_same_outcome(*(outcome(lambda layer=layer: layer(data(4, dtype))) for layer in (ours, theirs)))
    assert not kernels


def test_a_residual_elsewhere_goes_to_pytorchs_code(kernels):
    ours, theirs = pair(4)
    for residual in (data(4, seed=1).to_mkldnn(), data(4, seed=1).to("meta"), data(4, seed=1).to_sparse()):
        mine = outcome(lambda residual=residual: ours(data(4), residual))
        assert_same_outcome(mine, outcome(lambda residual=residual: theirs(data(4)) + residual))
    assert not kernels


def test_an_activation_keeps_less_memory_than_two_modules():
    x = data(4).requires_grad_()

    def kept(module):
        packed = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.setdefault(t.data_ptr(), t), lambda t: t):
            module(x)
        return sum(t.numel() * t.element_size() for t in packed.values())

    separate = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU())
    assert kept(bnfast.torch.BatchNorm2d(6, activation="relu")) < 0.6 * kept(separate)


class _Normalised(torch.utils.data.Dataset):
    def __init__(self, layer):
        self.layer = layer.eval()

    def __len__(self):
        return 4

    def __getitem__(self, i):
        with torch.no_grad():
            return self.layer(torch.full((1, 6, 410, 410), float(i)))[0]  # so large that a worker takes the kernels


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork in a process with threads
def test_workers_of_a_data_loader(method):
    ours, _ = pair(4)
    ours(data(4))
    dataset = _Normalised(ours)
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=1, multiprocessing_context=method)
    found = torch.cat(list(loader))
    torch.testing.assert_close(found, torch.stack([dataset[i] for i in range(4)]), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torch_jit():
    x = data(4)
    for activation, function in ACTIVATIONS.items():
        ours, theirs = pair(4, activation=activation, negative_slope=0.2)
        model = nn.Sequential(ours)
        expected = function(copy.deepcopy(theirs).eval()(x))
        for compiled in (torch.jit.script(model.eval()), torch.jit.trace(model, x)):
            buffer = io.BytesIO()
            torch.jit.save(compiled, buffer)
            buffer.seek(0)
            close(torch.jit.load(buffer)(x), expected)
        if activation is not None:  # taken in by the batch norm before it, where an identity stands now
            behind = {"relu": nn.ReLU(), "relu6": nn.ReLU6(), "leaky_relu": nn.LeakyReLU(0.2)}[activation]
            converted = bnfast.torch.convert(nn.Sequential(copy.deepcopy(theirs), behind)).eval()
            assert converted[0].activation == activation
            close(torch.jit.script(converted)(x), expected)
        close(torch.jit.script(ours)(x, x), function(copy.deepcopy(theirs).eval()(x) + x))
        scripted = torch.jit.script(copy.deepcopy(model).train())
        close(scripted(x), function(theirs(x)))
        close(scripted[0].running_var, theirs.running_var)
    assert type(model[0]) is bnfast.torch.BatchNorm2d


def test_symbolic_tracing_takes_a_layer_as_a_whole():
    ours, theirs = pair(4, activation="relu")

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = ours

        def forward(self, x):
            return self.bn(x, x) + 1

    traced = torch.fx.symbolic_trace(Block())
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "call_function", "output"]
    x = data(4)
    close(traced(x), F.relu(theirs(x) + x) + 1)
    with pytest.raises(torch.fx.proxy.TraceError):  # as of PyTorch's, which have control flow
        torch.fx.symbolic_trace(theirs)


def test_bad_arguments():
    with pytest.raises(ValueError, match="activation: expected None, 'relu'"):
        bnfast.torch.BatchNorm2d(3, activation="gelu")
    with pytest.raises(ValueError, match="negative_slope"):
        bnfast.torch.BatchNorm2d(3, activation="leaky_relu", negative_slope=2)
    with pytest.raises(TypeError):
        bnfast.torch.BatchNorm2d(3, activations="relu")


def test_the_constructor_is_pytorchs():
    for ours, theirs in LAYERS.values():
        for arguments in ((4, 1e-3, 0.2, False), (4, 1e-3, None, True, False, None, torch.float64)):
            one, other = ours(*arguments), theirs(*arguments)
            assert str(one) == str(other)
            assert list(one.state_dict()) == list(other.state_dict())
        assert issubclass(ours, theirs)


# --- threads ---------------------------------------------------------------------------------------------------------


def test_no_more_threads_than_pytorch_is_told_to_use(monkeypatch):
    seen = []

    def spy(*arguments, **options):
        seen.append(bnfast.get_num_threads())
        return original(*arguments, **options)

    original = calls.ours.batch_norm
    monkeypatch.setattr(calls.ours, "batch_norm", spy)
    before = torch.get_num_threads()
    try:
        for theirs, ours in ((1, 8), (2, 1), (2, 2), (3, 8)):
            torch.set_num_threads(theirs)
            with bnfast.num_threads(ours):
                bnfast.torch.BatchNorm2d(6)(data(4))
            assert seen.pop() == min(theirs, ours)
    finally:
        torch.set_num_threads(before)


def test_the_same_bits_for_any_number_of_threads():
    x, dy = torch.randn(8, 32, 40, 40), torch.randn(8, 32, 40, 40)
    results = []
    before = torch.get_num_threads()
    try:
        for n in (1, 2, 4):
            torch.set_num_threads(n)
            results.append(stepped(bnfast.torch.BatchNorm2d(32, activation="relu"), x, dy))
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        assert all(
            (a == b).all() for a, b in zip((*found[:2], *found[2]), (*results[0][:2], *results[0][2]), strict=True)
        )


def test_the_values_of_bnfasts_own_layer():
    """The same kernels, so the same bits."""
    x, dy = data(4), data(4, seed=1)
    own = bnfast.BatchNorm(6, activation="relu")
    y = own(x.numpy())
    dx = own.backward(dy.numpy())
    found = stepped(bnfast.torch.BatchNorm2d(6, activation="relu"), x, dy)
    np.testing.assert_array_equal(found[0].numpy(), y)
    np.testing.assert_array_equal(found[1].numpy(), dx)
    np.testing.assert_array_equal(found[2][0].numpy(), own.grad_gamma)


# --- little data, large memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("least", "sizes"),
    [
        (layers.LEAST_NEAR, (400_000, 300_000, 300_000, 3_000_000, 900_000)),
        (layers.LEAST_FROM_AFAR, (200_000, 200_000, 150_000, 1_000_000, 900_000)),
    ],
    ids=["near", "far"],
)
def test_little_data_goes_to_pytorchs_code(monkeypatch, kernels, least, sizes):
    monkeypatch.undo()
    kernels = torch_layers.counted(monkeypatch)
    monkeypatch.setattr(layers, "LEAST", least)
    monkeypatch.setattr(layers, "SMALL", 0)
    plain, relu, relu6 = (bnfast.torch.BatchNorm2d(6, activation=each) for each in (None, "relu", "relu6"))
    calls_of = ((plain, False), (relu, False), (relu6, False), (relu, True), (relu6, True))
    for size, (layer, channels_last) in zip(sizes, calls_of, strict=True):
        for elements, expected in ((size - 600, 0), (size + 600, 1)):
            x = torch.randn(1, 6, elements // 600, 100)
            x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
            kernels.clear()
            layer(x)
            assert kernels["forward"] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["planar", "channels last", "rows"])
@pytest.mark.parametrize("gradients", [True, False])
def test_each_threshold_counts(gradients, layout, dtype):
    """(alone, with a ReLU or a residual, with what PyTorch is slow with), for calls that need gradients and others."""
    for place, activation in enumerate((None, "relu", "relu6")):
        least = (layers.LEAST if dtype is torch.float32 else layers.LEAST_OF_HALF)[gradients, layout][place]
        for elements, expected in ((least - 50, False), (least, True)):
            x = torch.empty((elements // 50, 50) if layout == "rows" else (1, 50, elements // 50, 1), dtype=dtype)
            x = x.contiguous(memory_format=torch.channels_last) if layout == "channels last" else x
            with torch.set_grad_enabled(gradients):
                assert pays(x, activation, False) is expected
                if activation == "relu":
                    assert pays(x, None, True) is expected


def test_thresholds_are_those_of_this_machine():
    assert layers.LEAST is (layers.LEAST_FROM_AFAR if _core.last_level_is_far() else layers.LEAST_NEAR)


@pytest.mark.parametrize("activation", [None, "relu", "relu6", "leaky_relu"])
@pytest.mark.parametrize("kind", ["none", "like x", "x itself", "a number a channel", "float64"])
def test_what_goes_to_pytorchs_code_is_completed_as_it_would_be(monkeypatch, activation, kind):
    """In y's own memory where that may be, and never in that of an argument."""
    monkeypatch.setattr(layers, "pays", lambda *_: False)
    ours, theirs = bnfast.torch.BatchNorm2d(6, activation=activation), torch.nn.BatchNorm2d(6)
    x, other = data(4).requires_grad_(), data(4, seed=1)
    residual = {
        "none": None, "like x": other, "x itself": x, "a number a channel": other[:1, :, :1, :1],
        "float64": other.double(),
    }[kind]  # fmt: skip
    kept = [t.detach().clone() for t in (x, other)]
    y = ours(x, residual)
    w = theirs(x)
    w = w if residual is None else w + residual
    expected = calls.activated(w, calls.Options(1e-5, activation, 0.01))
    assert y.dtype is expected.dtype
    torch.testing.assert_close(y, expected, rtol=0, atol=0)
    dy = torch.randn_like(y)
    found, wanted = (torch.autograd.grad(each, x, dy) for each in (y, expected))
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    for tensor, before in zip((x.detach(), other), kept, strict=True):
        assert torch.equal(tensor, before)


def test_what_goes_to_pytorchs_code_takes_no_more_memory(monkeypatch):
    """Than PyTorch's batch norm itself: the residual and the activation go into its y."""
    monkeypatch.setattr(layers, "pays", lambda *_: False)
    x, residual, given = data(4).requires_grad_(), data(4, seed=1), []
    theirs = F.batch_norm
    monkeypatch.setattr(F, "batch_norm", lambda *arguments: given.append(theirs(*arguments)) or given[-1])
    for activation in (None, "relu", "relu6"):
        y = bnfast.torch.BatchNorm2d(6, activation=activation)(x, residual)
        assert y.data_ptr() == given.pop().data_ptr()


def test_of_what_others_see_or_keep_nothing_is_changed_in_place(monkeypatch):
    """A residual for each of many, what a checkpoint, a mode or a class between has kept, a graph that is exported."""
    monkeypatch.setattr(layers, "pays", lambda *_: False)
    layer = bnfast.torch.BatchNorm2d(6, activation="relu").eval()
    x, residuals = data(4), torch.stack([data(4, seed=1), data(4, seed=2)])
    many = torch.func.vmap(layer, in_dims=(None, 0))(x, residuals)
    torch.testing.assert_close(many, torch.stack([layer(x, residual) for residual in residuals]))

    def saves_batch_norms(_, function, *arguments, **options):
        kept = "batch_norm" in str(function)
        return checkpoint.CheckpointPolicy.MUST_SAVE if kept else checkpoint.CheckpointPolicy.PREFER_RECOMPUTE

    leaf = x.clone().requires_grad_()
    contexts = functools.partial(checkpoint.create_selective_checkpoint_contexts, saves_batch_norms)
    y = checkpoint.checkpoint(layer.train(), leaf, use_reentrant=False, context_fn=contexts)
    (found,) = torch.autograd.grad(y.sum(), leaf)
    (wanted,) = torch.autograd.grad(layer(leaf).sum(), leaf)
    torch.testing.assert_close(found, wanted)

    class Keep(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            if function is F.batch_norm:
                kept.append((result, result.detach().clone()))
            return result

    class Tap(nn.BatchNorm2d):
        def forward(self, input):
            y = super().forward(input)
            kept.append((y, y.detach().clone()))
            return y

    class Tapped(bnfast.torch.BatchNorm2d, Tap):
        pass

    kept = []
    with Keep():
        layer(x, residuals[0])
    Tapped(6, activation="relu")(x, residuals[0])
    assert len(kept) == 2
    for seen, as_it_was in kept:
        assert torch.equal(seen, as_it_was)

    exported = torch.export.export(layer.eval(), (x, residuals[0]), strict=True)
    torch.testing.assert_close(exported.module()(x, residuals[0]), layer(x, residuals[0]))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_the_size_is_not_asked_of_what_has_none(monkeypatch):
    """Of tensors without strides, and of sizes that are traced, which would warn."""
    monkeypatch.undo()
    ours, theirs = pair(4)
    x = data(4)
    close(torch.jit.trace(ours.eval(), x)(x), theirs.eval()(x))
    close(ours(x.to_mkldnn()).to_dense(), theirs(x.to_mkldnn()).to_dense())
    assert error_of(lambda: ours(x.to_sparse())) == error_of(lambda: theirs(x.to_sparse()))
    assert error_of(lambda: ours(x[0, 0, 0])) == error_of(lambda: theirs(x[0, 0, 0]))


def test_large_tensors_are_asked_to_lie_on_huge_pages(monkeypatch):
    asked = []
    monkeypatch.setattr(memory, "_madvise", lambda *arguments: asked.append(arguments))
    x = torch.empty(1 << 20)
    y = memory.empty_like(x)
    ((begin, size, _),) = asked
    assert begin % 4096 == size % 4096 == 0
    assert y.data_ptr() <= begin < begin + size <= y.data_ptr() + 4 * y.numel()
    memory.empty_like(torch.empty((1 << 20) - 1))
    assert len(asked) == 1
    monkeypatch.setattr(memory, "_madvise", None)  # of other systems
    assert memory.empty_like(x).shape == x.shape


class Counted(nn.Module):
    calls = 0

    def forward(self, weight):
        self.calls += 1
        return weight * 1


@pytest.mark.parametrize("how", ["kernels", "by PyTorch", "compiled"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # inside PyTorch's compiler
def test_a_parametrization_is_computed_once_a_forward(how, kernels):
    layer = bnfast.torch.BatchNorm2d(6)
    counted = Counted()
    nn.utils.parametrize.register_parametrization(layer, "weight", counted)
    before = counted.calls
    if how == "compiled":
        torch.compile(layer, backend="eager")(data(4))
    else:
        layer(data(4), *([torch.ones(6, 1, 1)] if how == "by PyTorch" else []))
    assert counted.calls == before + 1
    assert kernels["forward"] == (how != "by PyTorch")


@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_that_want_gradients_are_pytorchs(training):
    outcomes = []
    for layer in pair(4):
        layer.train(training).running_mean.requires_grad_()
        try:
            layer(data(4)).sum().backward()
            outcomes.append("done")
        except RuntimeError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0] != "done"


class NegativeBit(nn.Module):
    def forward(self, weight):
        return torch.complex(weight, -weight).conj().imag


def test_parameters_and_statistics_in_odd_memory(kernels):
    ours, theirs = pair(4)
    for layer in (ours, theirs):
        nn.utils.parametrize.register_parametrization(layer, "weight", NegativeBit())
        layer.running_mean = torch.frombuffer(bytearray(64), dtype=torch.float32, offset=2, count=6)
    close(ours(data(4)), theirs(data(4)))
    close(ours.running_mean, theirs.running_mean)
    assert kernels["forward"] == 1


def test_an_infinite_eps_and_no_channels_are_pytorchs(kernels):
    ours, theirs = pair(4)
    ours.eps = theirs.eps = float("inf")
    torch.testing.assert_close(ours(data(4)), theirs(data(4)))
    for layer in (bnfast.torch.BatchNorm2d(0), nn.BatchNorm2d(0)):
        with pytest.raises(IndexError):
            layer(torch.randn(3, 0, 4, 4))
    assert kernels["forward"] == 0
