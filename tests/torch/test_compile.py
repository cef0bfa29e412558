"""Under `torch.compile` a layer is one operator with the values of eager mode; exports are PyTorch's own code."""

import copy

import pytest
from torch_layers import close, data, pair, torch

import bnfast.torch
from bnfast.torch import layers

nn, F = torch.nn, torch.nn.functional

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # inside PyTorch's compiler
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(layers, "SMALL", 0)
    monkeypatch.setattr(layers, "pays", lambda *_: True)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def arguments(*, residual=False, running=False, activation=None, dtype=torch.float32, affine=True, grad=True):
    x, r = data(4, dtype), data(4, dtype, seed=1)
    weight, bias = torch.rand(6) + 0.5, torch.randn(6)
    mean, var = torch.randn(6), torch.rand(6) + 0.5
    tensors = [x, weight if affine else None, bias if affine else None, r if residual else None]
    tensors = [None if t is None else t.clone().requires_grad_(grad) for t in tensors]
    return *tensors, mean if running else None, var if running else None, 1e-5, activation, 0.2


@pytest.mark.parametrize("options", [
    {}, {"residual": True}, {"running": True}, {"activation": "relu"}, {"affine": False},
    {"dtype": torch.float64, "affine": False},
    {"residual": True, "running": True, "activation": "leaky_relu"}, {"residual": True, "activation": "relu6"},
    {"grad": False},
], ids=str)  # fmt: skip
def test_opcheck(options):
    """PyTorch's own tests of an operator: its schema, its autograd, its fake kernel, tracing with dynamic shapes."""
    result = torch.library.opcheck(torch.ops.bnfast.batch_norm, arguments(**options))
    assert result == dict.fromkeys(
        ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"), "SUCCESS"
    )


@pytest.mark.parametrize("residual", [True, False])
def test_opcheck_of_the_backward(residual):
    x, dy, weight = data(4), data(4, seed=1), torch.rand(6)
    r = data(4, seed=2) if residual else None
    given = dy, x, weight, torch.zeros(6), r, torch.zeros(6).double(), torch.ones(6).double(), True, "relu", 0.01
    result = torch.library.opcheck(torch.ops.bnfast.batch_norm_backward, given)
    assert set(result.values()) == {"SUCCESS"}


def step(function, layer, *inputs):
    inputs = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs]
    layer.zero_grad()
    y = function(*inputs)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    return y.detach(), *(t.grad for t in inputs), *(p.grad for p in layer.parameters()), *layer.buffers()


@pytest.mark.parametrize("options", [
    {}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}, {"bias": False},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager"])
def test_the_whole_graph(options, channels_last, backend):
    eager, _ = pair(4, activation="relu", **options)
    compiled_layer = copy.deepcopy(eager)
    compiled = torch.compile(compiled_layer, fullgraph=True, backend=backend)
    x, r = (data(4, channels_last=channels_last, seed=seed) for seed in range(2))
    for mode in (True, True, False):
        eager.train(mode), compiled_layer.train(mode)
        found, expected = step(compiled, compiled_layer, x, r), step(eager, eager, x, r)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6, check_stride=True)


def test_the_operator_is_what_runs():
    layer, _ = pair(4, activation="relu")
    seen = []

    def backend(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    torch.compile(layer, fullgraph=True, backend=backend)(data(4), data(4))
    assert "bnfast.batch_norm" in seen or "bnfast.batch_norm.default" in seen
    assert not any("torch.nn.functional.batch_norm" in name for name in seen)


def test_a_network_with_inductor():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 4))
    plain = copy.deepcopy(model)
    compiled = torch.compile(bnfast.torch.convert(model), fullgraph=True)
    x = torch.randn(5, 3, 8, 8)
    for one, other in zip(step(compiled, model, x), step(plain, plain, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("compiled", [True, False])
def test_statistics_that_bnfasts_own_layer_would_refuse(value, compiled):
    """In one channel; the gradients are PyTorch's, too."""
    layer, theirs = pair(4, activation="relu")
    for each in (layer, theirs):
        each.eval().running_var[1] = value
    function = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    x, r = data(4), data(4, seed=1)
    expected = step(lambda x, r: F.relu(theirs(x) + r), theirs, x, r)
    for one, other in zip(step(function, layer, x, r), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("residuals", [0, 1])
def test_a_shift_that_changes_before_the_backward(residuals, backend):
    """As in PyTorch's layers it may; the mask of the activation is that of the forward."""
    compiled_layer, _ = pair(4, activation="relu")
    eager = copy.deepcopy(compiled_layer)
    compiled = torch.compile(compiled_layer, fullgraph=True, backend=backend)
    inputs = [data(4, seed=seed).requires_grad_() for seed in range(1 + residuals)]
    found = []
    for function, layer in ((compiled, compiled_layer), (eager, eager)):
        y = function(*inputs)
        with torch.no_grad():
            layer.bias.add_(3)
        found.append(torch.autograd.grad(y.square().sum(), [*inputs, *layer.parameters()]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residuals", [0, 1])
def test_double_backward(residuals, training):
    """Of the backend that leaves autograd as it is; the others refuse it by themselves."""
    layer, _ = pair(4, activation="relu", dtype=torch.float64)
    layer.train(training)
    inputs = [data(4, torch.float64, seed=seed).requires_grad_() for seed in range(1 + residuals)]
    of = [*inputs, *layer.parameters()]
    found = []
    for function in (torch.compile(layer, fullgraph=True, backend="eager"), layer):
        gradients = torch.autograd.grad(function(*inputs).square().sum(), of, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in gradients), of))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_shapes_may_change():
    layer, theirs = pair(4)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (3, 5, 8):
        x = torch.randn(n, 6, 4 + n, 4)
        close(compiled(x), theirs(x))


def test_what_the_kernels_do_not_do_is_compiled_too():
    layer, theirs = pair(4, activation="relu")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = data(4)
    close(compiled(x, torch.ones(6, 1, 1)), F.relu(theirs(x) + 1))


def test_exports_have_pytorchs_operations_only():
    layer, theirs = pair(4, activation="relu")
    x = data(4)
    exported = torch.export.export(nn.Sequential(layer).eval(), (x,))
    assert not any("bnfast" in str(node.target) for node in exported.graph.nodes)
    close(exported.module()(x), F.relu(theirs.eval()(x)))


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_a_call_by_pytorchs_code_beside_one_by_the_operator(backend):
    """PyTorch's keeps the running statistics for its backward: what the other call makes of them is no change to it."""
    layer, theirs = pair(4)
    function = torch.compile(
        lambda x: layer(x, torch.ones(6, 1, 1)) * layer(x + 1), backend=backend, fullgraph=True
    )  # fmt: skip
    x = data(4).requires_grad_()
    function(x).sum().backward()
    z = data(4).requires_grad_()
    ((theirs(z) + 1) * theirs(z + 1)).sum().backward()
    close(x.grad, z.grad)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        close(getattr(layer, name), getattr(theirs, name))


def test_any_number_of_channels_where_there_are_no_tensors():
    """PyTorch's layer does not look at num_features then."""
    layer, theirs = pair(4, affine=False, track_running_stats=False)
    x = data(4)
    torch._dynamo.mark_dynamic(x, 1)
    close(torch.compile(layer, backend="eager", fullgraph=True)(x), theirs(x))
    layer.num_features = theirs.num_features = 4
    close(layer(data(4)), theirs(data(4)))
