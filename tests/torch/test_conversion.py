"""Whole models converted in place and back: what they compute, keep and share; what is taken in and what is not."""

import copy
import operator
import pickle

import pytest
from torch_layers import close, data, torch

import bnfast.torch
from bnfast.torch import conversion, layers

nn, F, fx = torch.nn, torch.nn.functional, torch.fx


@pytest.fixture(autouse=True)
def small_data_too(monkeypatch):
    monkeypatch.setattr(layers, "SMALL", 0)
    monkeypatch.setattr(layers, "pays", lambda *_: True)


class Basic(nn.Module):
    """ResNet's block, as torchvision writes it."""

    def __init__(self, n_in=6, n_out=6, relu=None):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(n_in, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out)
        self.conv2, self.bn2 = nn.Conv2d(n_out, n_out, 3, padding=1, bias=False), nn.BatchNorm2d(n_out)
        self.relu = relu if relu is not None else nn.ReLU(inplace=True)
        self.downsample = None
        if n_in != n_out:
            self.downsample = nn.Sequential(nn.Conv2d(n_in, n_out, 1, bias=False), nn.BatchNorm2d(n_out))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def sequential():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6),
        nn.ReLU6(), nn.Conv2d(6, 4, 1), nn.BatchNorm2d(4), nn.LeakyReLU(0.2), nn.BatchNorm2d(4), nn.Flatten(),
        nn.Linear(64, 5), nn.BatchNorm1d(5), nn.ReLU(),
    )  # fmt: skip


def resnet():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), Basic(), Basic(6, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def stepped(model, x, dy):
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.backward(dy)
    return y.detach(), x.grad, *(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers())


def assert_same_model(one, other, side=8):
    """The same step of training, the same eval, the same state; in float64, as roundings choose sides of kinks."""
    assert list(one.state_dict()) == list(other.state_dict())
    one.double(), other.double()
    x = torch.randn(5, 3, side, side, dtype=torch.float64)
    dy = torch.randn_like(copy.deepcopy(other)(x))
    for found, expected in zip(stepped(one, x, dy), stepped(other, x, dy), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    modes = [(model.training, model.eval())[0] for model in (one, other)]
    close(one(x), other(x))
    for model, mode in zip((one, other), modes, strict=True):
        model.train(mode)


@pytest.mark.parametrize("fuse_relu", [True, False])
@pytest.mark.parametrize("make", [sequential, resnet])
def test_there_and_back(make, fuse_relu):
    torch.manual_seed(0)
    theirs = make()
    ours = copy.deepcopy(theirs)
    modules, state = list(ours.modules()), dict(ours.named_parameters()) | dict(ours.named_buffers())
    assert bnfast.torch.convert(ours, fuse_relu=fuse_relu) is ours
    converted = [module for module in ours.modules() if isinstance(module, layers._Layer)]
    assert len(converted) == sum(type(module) in layers.OURS for module in theirs.modules())
    assert not any(type(module) in layers.OURS for module in ours.modules())
    assert_same_model(ours, theirs)
    assert bnfast.torch.convert(ours, fuse_relu=fuse_relu) is ours  # twice makes no difference
    assert_same_model(ours, theirs)

    assert bnfast.torch.revert(ours) is ours
    assert all(a is b for a, b in zip(ours.modules(), modules, strict=True))
    again = dict(ours.named_parameters()) | dict(ours.named_buffers())
    assert again.keys() == state.keys()
    assert all(again[name] is state[name] for name in dict(ours.named_parameters()))
    assert str(ours) == str(theirs)
    assert_same_model(ours, theirs)
    for module in ours.modules():
        assert not isinstance(module, nn.modules.batchnorm._BatchNorm) or "activation" not in vars(module)


def test_what_a_sequence_shows_is_taken_in():
    ours = bnfast.torch.convert(sequential())
    assert [getattr(module, "activation", None) for module in ours] == [
        *(None, "relu", None, None, "relu6", None, None, "leaky_relu", None, None, None, None, "relu", None)
    ]  # fmt: skip
    assert ours[7].negative_slope == 0.2
    assert "activation='relu6'" in str(ours)
    assert "ReLU6(), in the batch norm before it" in str(ours)
    assert all(type(ours[i]) is conversion._TakenIn for i in (2, 5, 8, 13))


def hooked(model, place):
    model[place].register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("make", [
    lambda: hooked(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), 0),
    lambda: hooked(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), 1),
    lambda: nn.Sequential(*[nn.BatchNorm2d(3)] * 2, nn.ReLU()),
    lambda: nn.Sequential(nn.BatchNorm2d(3), nn.GELU()),
    lambda: nn.Sequential(nn.BatchNorm2d(3), nn.LeakyReLU(-0.5)),
    lambda: nn.Sequential(nn.Sequential(nn.BatchNorm2d(3)), nn.ReLU()),
    lambda: nn.ModuleList([nn.BatchNorm2d(3), nn.ReLU()]),
    lambda: type("Own", (nn.Sequential,), {"forward": lambda self, x: x})(nn.BatchNorm2d(3), nn.ReLU()),
], ids=["hook", "hook of the activation", "used twice", "gelu", "slope", "nested", "list", "own forward"])  # fmt: skip
def test_what_cannot_be_seen_is_left(make):
    ours = bnfast.torch.convert(make())
    norms = [module for module in ours.modules() if isinstance(module, layers._Layer)]
    assert norms
    assert all(module.activation is None for module in norms)
    assert not any(isinstance(module, conversion._TakenIn) for module in ours.modules())


def test_an_activation_module_in_several_places_stays_in_the_others():
    relu = nn.ReLU()
    model = nn.Sequential(nn.BatchNorm2d(3), relu, nn.Conv2d(3, 3, 1), relu)
    theirs = copy.deepcopy(model)
    ours = bnfast.torch.convert(model)
    assert ours[3] is relu
    assert_same_model(ours, theirs)
    assert bnfast.torch.revert(ours)[1] is relu


def test_what_comes_back_is_in_the_mode_of_the_model():
    model = bnfast.torch.convert(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())).eval()
    assert not any(module.training for module in bnfast.torch.revert(model).modules())
    bnfast.torch.convert(model).train()
    assert all(module.training for module in bnfast.torch.revert(model).modules())


def test_a_layer_alone_subclasses_and_others():
    class Own(nn.BatchNorm2d):
        pass

    layer = nn.BatchNorm2d(3)
    assert bnfast.torch.convert(layer) is layer
    assert type(layer) is bnfast.torch.BatchNorm2d
    assert type(bnfast.torch.revert(layer)) is nn.BatchNorm2d
    others = nn.ModuleList([Own(3), nn.LazyBatchNorm2d(), nn.InstanceNorm2d(3)])
    kinds = [type(module) for module in others]
    assert [type(module) for module in bnfast.torch.convert(others)] == kinds
    lazy = nn.Sequential(nn.LazyBatchNorm2d())
    lazy(torch.randn(2, 3, 4, 4))  # is a BatchNorm2d from here on
    assert type(bnfast.torch.convert(lazy)[0]) is bnfast.torch.BatchNorm2d
    for function in (bnfast.torch.convert, bnfast.torch.revert):
        with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got int"):
            function(1)
    with pytest.raises(TypeError, match="fuse_relu: expected a bool, got 'no'"):
        bnfast.torch.convert(plain := nn.Sequential(nn.BatchNorm2d(3)), fuse_relu="no")
    assert type(plain[0]) is nn.BatchNorm2d


def test_modes_hooks_and_sharing_are_kept():
    model = sequential()
    model[1].eval()
    model[4].weight.requires_grad_(False)
    model[9].weight = model[7].weight
    seen = []
    model[9].register_forward_hook(lambda *_: seen.append(1))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    bnfast.torch.convert(model)
    assert [module.training for module in model[:5]] == [True, False, True, True, True]
    assert not model[4].weight.requires_grad
    assert model[9].weight is model[7].weight
    before = model[1].weight.clone()
    model(torch.randn(5, 3, 8, 8)).square().sum().backward()
    optimiser.step()
    assert (model[1].weight != before).any()
    assert seen == [1]


def test_an_activation_of_ones_own_cannot_be_reverted():
    model = nn.Sequential(nn.BatchNorm2d(3), bnfast.torch.BatchNorm2d(3, activation="relu"), nn.Conv2d(3, 3, 1))
    bnfast.torch.convert(model)
    with pytest.raises(ValueError, match="model: 1 has an activation of its own, 'relu'"):
        bnfast.torch.revert(model)
    assert type(model[0]) is bnfast.torch.BatchNorm2d, "nothing changes then"
    with pytest.raises(ValueError, match="model: it has"):
        bnfast.torch.revert(model[1])


# --- graphs ----------------------------------------------------------------------------------------------------------


def graph_of(model):
    return bnfast.torch.convert(fx.symbolic_trace(model))


def targets(graph):
    return [str(node.target) for node in graph.graph.nodes if node.op not in ("placeholder", "output")]


@pytest.mark.parametrize("make", [sequential, resnet])
def test_graphs_there_and_back(make):
    torch.manual_seed(0)
    theirs = make()
    ours = graph_of(copy.deepcopy(theirs))
    assert_same_model(ours, theirs)
    assert_same_model(copy.deepcopy(ours), copy.deepcopy(theirs))
    bnfast.torch.convert(ours)
    bnfast.torch.revert(ours)
    assert not any(isinstance(module, layers._Layer) for module in ours.modules())
    assert_same_model(ours, theirs)


HOOKS = (
    "register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
    "register_full_backward_pre_hook",
)  # fmt: skip


@pytest.mark.parametrize("place", [0, 1], ids=["batch norm", "activation"])
@pytest.mark.parametrize("hook", HOOKS)
def test_nothing_is_taken_in_where_hooks_see_it(hook, place):
    for of in (nn.Sequential, lambda *parts: fx.symbolic_trace(nn.Sequential(*parts))):
        model = of(nn.BatchNorm2d(3), nn.ReLU())
        getattr(list(model.children())[place], hook)(lambda *arguments: None)
        layer = next(bnfast.torch.convert(model).children())
        assert type(layer) is bnfast.torch.BatchNorm2d
        assert layer.activation is None


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch.jit.trace, which is what is tested
def test_a_part_that_is_reverted_alone():
    """The other models that hold its layers compute what they did; so does all of it, reverted later."""
    torch.manual_seed(0)
    theirs = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.Conv2d(6, 2, 1)).eval()
    ours = bnfast.torch.convert(copy.deepcopy(theirs))
    bnfast.torch.revert(ours[1:])
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        for model in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.jit.trace(ours, x)):
            close(model(x), theirs(x))
        assert [type(each) for each in bnfast.torch.revert(ours)] == [type(each) for each in theirs]
        close(ours(x), theirs(x))


def test_a_block_is_taken_in_whole():
    graph = graph_of(Basic(6, 8))
    assert targets(graph) == ["conv1", "bn1", "conv2", "downsample.0", "downsample.1", "bn2"]
    calls = {node.target: len(node.args) for node in graph.graph.nodes if node.op == "call_module"}
    assert (calls["bn1"], calls["bn2"], calls["downsample.1"]) == (1, 2, 1)
    assert (graph.bn1.activation, graph.bn2.activation) == ("relu", "relu")


class Written(nn.Module):
    """A batch norm, and what a test writes behind it."""

    def __init__(self, behind):
        super().__init__()
        self.bn, self.behind = nn.BatchNorm2d(3), behind

    def forward(self, x):
        return self.behind(self.bn, x)


TAKEN_IN = {
    "F.relu": lambda bn, x: F.relu(bn(x)),
    "F.relu in place": lambda bn, x: F.relu(bn(x), inplace=True),
    "torch.relu": lambda bn, x: torch.relu(bn(x)),
    "method": lambda bn, x: bn(x).relu(),
    "method in place": lambda bn, x: bn(x).relu_(),
    "relu6": lambda bn, x: F.relu6(bn(x)),
    "leaky_relu": lambda bn, x: F.leaky_relu(bn(x), 0.2),
    "leaky_relu by name": lambda bn, x: F.leaky_relu(bn(x), negative_slope=0.3),
}
WITH_RESIDUAL = {
    "add": lambda bn, x: bn(x * 2) + x,
    "add from the left": lambda bn, x: x + bn(x * 2),
    "torch.add": lambda bn, x: torch.add(bn(x * 2), x).relu(),
    "iadd": lambda bn, x: F.relu(operator.iadd(bn(x * 2), x)),
    "method add_": lambda bn, x: bn(x * 2).add_(x),
}
LEFT = {
    "used twice": lambda bn, x: F.relu(bn(x)) + x,  # (x is used elsewhere, too: only the activation is taken in)
    "result used elsewhere": lambda bn, x: (lambda y: F.relu(y) * y)(bn(x)),
    "called twice": lambda bn, x: F.relu(bn(F.relu(bn(x)))),
    "with alpha": lambda bn, x: torch.add(bn(x * 2), x, alpha=2),
    "a number": lambda bn, x: bn(x * 2) + 1,
    "written into the other": lambda bn, x: (lambda h: h.add_(bn(x * 2)).relu() + h)(x * 1),
    "other written later": lambda bn, x: (lambda h: F.relu(bn(x * 2) + h) + F.relu(h, inplace=True))(x * 1),
    "other written by a view": lambda bn, x: (
        lambda h: (lambda v, y: y + v.mul_(3).view(y.shape))(h.view(-1), F.relu(bn(x * 2) + h))
    )(x * 1),
    "other written by what it is a view of": lambda bn, x: (
        lambda k: (lambda y: y + k.mul_(3).view(y.shape))(F.relu(bn(x * 2) + k.view(x.shape)))
    )(x.flatten() * 1),
    "to itself": lambda bn, x: (lambda y: y + y)(bn(x * 2)),
    "slope": lambda bn, x: F.leaky_relu(bn(x), 2.0),
    "broadcast": lambda bn, x: F.relu(bn(x * 2) + x.mean((2, 3), keepdim=True)),
}


@pytest.mark.parametrize("name", [*TAKEN_IN, *WITH_RESIDUAL, *LEFT])
def test_what_a_graph_shows(name):
    torch.manual_seed(0)
    theirs = Written({**TAKEN_IN, **WITH_RESIDUAL, **LEFT}[name])
    ours = graph_of(copy.deepcopy(theirs))
    if name in TAKEN_IN:
        assert targets(ours) == ["bn"]
    elif name in WITH_RESIDUAL:
        assert targets(ours)[-1] == "bn"
    elif name not in ("used twice", "broadcast"):
        assert ours.bn.activation is None
        assert all(len(node.args) == 1 for node in ours.graph.nodes if node.target == "bn")
    assert_same_model(ours, theirs)
    assert_same_model(bnfast.torch.revert(ours), theirs)


def test_a_batch_norm_is_not_moved_behind_a_change_of_its_input():
    def behind(bn, x):
        z = x * 2
        y = bn(z)
        return y + z.mul_(3)

    theirs = Written(behind).eval()
    ours = graph_of(copy.deepcopy(theirs))
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():  # (in training autograd refuses the change)
        close(ours(x), theirs(x))


def foreign(h):
    """Nothing that a graph shows, nor its name, says that it writes."""
    h.mul_(h)
    return h


fx.wrap("foreign")


class Foreign(nn.Module):
    def forward(self, h):
        return foreign(h)


class Tracer(fx.Tracer):
    def is_leaf_module(self, module, name):
        return isinstance(module, Foreign) or super().is_leaf_module(module, name)


INPLACE, FOREIGN = nn.ReLU(inplace=True), Foreign()
BETWEEN = {
    "method": lambda h: h.mul_(h),
    "function": lambda h: torch.relu_(h),
    "operator": lambda h: operator.imul(h, 2),
    "inplace": lambda h: F.relu(h, inplace=True),
    "inplace by place": lambda h: F.relu(h, True),
    "out": lambda h: torch.neg(h, out=h),
    "overload": lambda h: torch.ops.aten.neg_.default(h),
    "module": lambda h: INPLACE(h),
    "foreign function": lambda h: foreign(h),
    "foreign module": lambda h: FOREIGN(h),
}


@pytest.mark.parametrize("written", ["the input", "the residual"])
@pytest.mark.parametrize("name", BETWEEN)
def test_a_batch_norm_is_not_moved_behind_what_writes(name, written):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.inplace, self.foreign = nn.BatchNorm2d(3), INPLACE, FOREIGN

        def forward(self, x):
            h = x * 1
            out = self.bn(h) if written == "the input" else self.bn(x * 3) + h
            BETWEEN[name](h)
            return torch.relu(out)

    theirs = Block().eval()
    traced = fx.GraphModule(theirs, Tracer().trace(theirs))
    if name == "operator":  # the tracer takes it as a product; other graphs have it
        (product,) = (node for node in traced.graph.nodes if node.target is operator.mul and node.args[1] == 2)
        product.target = operator.imul
        traced.recompile()
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        close(bnfast.torch.convert(traced)(x), theirs(x))
    assert traced.bn.activation is None


def test_what_writes_nothing_is_passed():
    """As the branch beside it, that a block of a network computes before the addition."""

    def behind(bn, x):
        y = bn(x * 2)
        h = F.dropout(F.max_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 1), 0.0).mul(2.0)
        return F.relu(y + torch.flatten(h, 1).view(h.shape))

    ours = graph_of(Written(behind).eval())
    assert ours.bn.activation == "relu"
    assert targets(ours)[-1] == "bn"


def test_a_batch_norm_is_not_moved_behind_a_reader_of_its_statistics():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.bn(x)
            s = x.mean() * 0 + self.bn.running_mean
            return torch.relu(y), s

    theirs = Reader()
    ours = graph_of(copy.deepcopy(theirs))
    x = torch.randn(2, 3, 4, 4) + 5
    close(ours(x)[1], theirs(x)[1])


def test_a_layer_within_a_module_that_the_graph_calls_is_left():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(x)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Inner()

        def forward(self, x):
            return self.inner(x) + torch.relu(self.inner.bn(x))

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, Inner) or super().is_leaf_module(module, name)

    theirs = Outer()
    traced = fx.GraphModule(theirs, Tracer().trace(theirs))
    expected = copy.deepcopy(theirs)
    x = torch.randn(2, 3, 4, 4)
    close(bnfast.torch.convert(traced)(x), expected(x))
    close(theirs.inner(x), expected.inner(x))


def test_a_hook_between_may_write():
    class Hooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.pool = nn.BatchNorm2d(3), nn.AvgPool2d(1)

        def forward(self, x):
            y = self.bn(x)
            return self.pool(x) + torch.relu(y)

    traced = fx.symbolic_trace(Hooked())
    traced.pool.register_forward_hook(lambda module, arguments, result: arguments[0].zero_() and None)
    assert bnfast.torch.convert(traced).bn.activation is None


@pytest.mark.parametrize("fuse_relu", [True, False])
def test_the_model_that_was_traced_computes_what_it_did(fuse_relu):
    torch.manual_seed(0)
    model = Basic(6, 8)
    theirs = copy.deepcopy(model)
    traced = fx.symbolic_trace(model)
    ours = bnfast.torch.convert(traced, fuse_relu=fuse_relu)
    x = torch.randn(5, 6, 8, 8)
    close(model(x), theirs(x))
    assert model.bn1.activation is model.bn2.activation is None
    # the tensors are the model's, in whatever way they change
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.double()
    ours(x.double())
    for one, other in zip(ours.state_dict().values(), model.state_dict().values(), strict=True):
        assert one.data_ptr() == other.data_ptr()
    bnfast.torch.revert(ours.eval())
    assert ours.bn2 is model.bn2
    assert type(model.bn2) is nn.BatchNorm2d
    assert not any(module.training for module in ours.modules() if module is not ours)
    close(ours(x.double()), model.eval()(x.double()))


@pytest.mark.parametrize("residual", [
    torch.randn(2, 3, 4, 4).double(), torch.randn(3, 1, 1), torch.randn(5, 1, 3, 4, 4),
], ids=["float64", "broadcast", "larger"])  # fmt: skip
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("add", [operator.iadd, "add_", operator.add])
def test_an_addition_in_place_keeps_dtype_and_shape(add, residual):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x, residual):
            return torch.relu(self.bn(x * 2).add_(residual))

    traced = fx.symbolic_trace(Block())
    (addition,) = (node for node in traced.graph.nodes if node.target == "add_")
    if not isinstance(add, str):
        addition.op, addition.target = "call_function", add
        traced.recompile()
    ours = bnfast.torch.convert(copy.deepcopy(traced))
    x = torch.randn(2, 3, 4, 4)
    for graph in (ours, bnfast.torch.revert(copy.deepcopy(ours))):
        assert len(targets(graph)) == (2 if graph is ours else 4)
        found, expected = outcome(graph, x, residual), outcome(traced, x, residual)
        assert (found == expected) if isinstance(expected, str) else found.dtype is expected.dtype
        if not isinstance(expected, str):
            torch.testing.assert_close(found, expected)
    if add is not operator.add and residual.ndim == 4:
        assert torch.jit.script(ours.bn)(x, residual).dtype == torch.float32


def outcome(function, *inputs):
    try:
        return function(*inputs)
    except RuntimeError as error:
        return str(error)


def test_a_graph_with_hooks_is_left():
    traced = fx.symbolic_trace(Written(TAKEN_IN["F.relu"]))
    traced.bn.register_forward_hook(lambda *_: None)
    assert bnfast.torch.convert(traced).bn.activation is None


def test_a_forward_of_the_modules_own_is_left_alone():
    """What tools put in its place knows of no activation, and may do more than the class does."""

    def wrapped(which):
        model = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU())
        module = model if which is None else model[which]
        forward = module.forward
        module.forward = lambda *arguments: 2 * forward(*arguments)
        return model

    for which in (0, 1, None):
        expected, found = wrapped(which)(data(4)), bnfast.torch.convert(wrapped(which))
        close(found(data(4)), expected)
        assert found[0].activation is None
    graph = fx.symbolic_trace(wrapped(0))
    close(bnfast.torch.convert(graph)(data(4)), wrapped(0)(data(4)))


def test_hooks_of_a_layer_run_once_where_it_is_traced():
    layer = bnfast.torch.BatchNorm2d(6).eval()
    layer.register_forward_hook(lambda _layer, _inputs, y: 2 * y)
    layer.register_forward_pre_hook(lambda _layer, inputs: (inputs[0] + 1,))
    model = nn.Sequential(layer)
    torch.testing.assert_close(fx.symbolic_trace(model)(data(4)), model(data(4)))


def test_what_is_reverted_after_a_parametrization_has_its_activation_once():
    model = bnfast.torch.convert(nn.Sequential(nn.BatchNorm2d(6), nn.LeakyReLU(0.2)))
    expected = model(data(4))
    nn.utils.parametrize.register_parametrization(model[0], "weight", nn.Identity())
    torch.testing.assert_close(bnfast.torch.revert(model)(data(4)), expected)


@pytest.mark.parametrize("activation", ["relu", None])
def test_reverting_a_trace_leaves_the_model_that_was_traced(activation):
    class Adds(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = bnfast.torch.BatchNorm2d(6, activation=activation)
            self.other = self.bn

        def forward(self, x):
            return self.bn(self.other(x, x))

    model = Adds()
    expected = model(data(4))
    graph = fx.symbolic_trace(model)
    assert type(bnfast.torch.revert(graph).bn) is nn.BatchNorm2d
    torch.testing.assert_close(graph(data(4)), expected)
    torch.testing.assert_close(model(data(4)), expected)
    assert graph.bn is not model.bn
    assert graph.bn.weight is model.bn.weight


@pytest.mark.parametrize("call", [
    lambda bn, x: bn(x, None), lambda bn, x: bn(input=x), lambda bn, x: bn(x, residual=None),
    lambda bn, x: bn(x, residual=x), lambda bn, x: bn(input=x, residual=x),
])  # fmt: skip
def test_any_way_to_write_a_call_is_traced_converted_and_reverted(call):
    class Calls(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = bnfast.torch.BatchNorm2d(6)

        def forward(self, x):
            return F.relu(call(self.bn, x))

    model = Calls()
    expected = model(data(4))
    graph = bnfast.torch.convert(fx.symbolic_trace(model))
    (node,) = (node for node in graph.graph.nodes if node.op == "call_module")
    assert (graph.bn.activation == "relu") is (len(node.args) == 1)
    close(graph(data(4)), expected)
    close(bnfast.torch.revert(graph)(data(4)), expected)


def test_a_sequence_and_its_trace_in_one_model_are_both_reverted():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.sequence = bnfast.torch.convert(nn.Sequential(nn.BatchNorm2d(6), nn.LeakyReLU(0.2)))
            self.graph = fx.symbolic_trace(self.sequence)

        def forward(self, x):
            return self.sequence(x) + 10 * self.graph(x + 1)

    model = Both()
    expected = model(data(4))
    torch.testing.assert_close(bnfast.torch.revert(model)(data(4)), expected)


def test_a_sequence_whose_parts_a_graph_calls_has_its_activation_once():
    graph = fx.Graph()
    x = graph.placeholder("x")
    for target in ("sequence.0", "sequence.1"):
        x = graph.call_module(target, (x,))
    graph.output(x)
    model = fx.GraphModule({"sequence.0": nn.BatchNorm2d(6), "sequence.1": nn.LeakyReLU(0.2)}, graph)
    model.sequence = nn.Sequential(model.sequence.get_submodule("0"), model.sequence.get_submodule("1"))
    expected = model(data(4))
    torch.testing.assert_close(bnfast.torch.convert(model)(data(4)), expected)
    assert model.sequence[0].activation == "leaky_relu"
    torch.testing.assert_close(bnfast.torch.revert(model)(data(4)), expected)
