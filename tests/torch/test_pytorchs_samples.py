"""PyTorch's own samples of batch norm, from the tests of its operators and modules, run through our layers.

Each is compared with PyTorch's module of the same arguments. What is counted is printed with `-s`.
"""

import copy
import warnings
from collections import Counter

import pytest
import torch_layers
from torch_layers import close, torch

from bnfast.torch import calls, layers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    invocations = pytest.importorskip(
        "torch.testing._internal.common_methods_invocations", exc_type=ImportError,
        reason="PyTorch's tables of samples need expecttest",
    )  # fmt: skip
    from torch.testing._internal.common_modules import module_db

nn = torch.nn
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OPERATORS = [op for op in invocations.op_db if op.name == "nn.functional.batch_norm"]
MODULES = [info for info in module_db if info.module_cls in layers.OURS]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(autouse=True)
def small_data_too(monkeypatch):
    monkeypatch.setattr(layers, "SMALL", 0)
    monkeypatch.setattr(layers, "pays", lambda *_: True)


def gradients(module, x):
    """(y, gradients of all that needs some), or the error."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    module.zero_grad()
    try:
        y = module(leaf)
    except Exception as error:
        return type(error), str(error)
    y.backward(torch.linspace(-1, 1, max(1, y.numel()), dtype=torch.float64)[: y.numel()].view(y.shape).to(y.dtype))
    return y.detach(), leaf.grad, *(p.grad for p in module.parameters()), *(b.clone() for b in module.buffers())


def assert_same(ours, theirs, x):
    mine, its = gradients(ours, x), gradients(theirs, x)
    if isinstance(its[0], type):
        assert mine == its
        return "refused alike"
    for one, other in zip(mine, its, strict=True):
        close(one, other, of=max(1, x.numel() // max(1, x.shape[1])))
    return "same"


def layer_for(sample, kind):
    """A module of what the arguments of `torch.nn.functional.batch_norm` say."""
    mean, var = (t.detach().clone() if t is not None else None for t in sample.args[:2])
    options = dict(sample.kwargs)
    weight, bias = (options.get(name) for name in ("weight", "bias"))
    if len(sample.args) > 2:
        weight, bias = (*sample.args[2:4], None, None)[:2]
    channels = sample.input.shape[1]
    layer = kind(
        channels, eps=options.get("eps", 1e-5), momentum=options.get("momentum", 0.1), dtype=sample.input.dtype
    )
    layer.weight = None if weight is None else nn.Parameter(weight.detach().clone())
    layer.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    layer.running_mean, layer.running_var = mean, var
    return layer.train(options.get("training", False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", OPERATORS, ids=lambda op: op.variant_test_name or "batch_norm")
def test_samples_of_the_operator(op, dtype, monkeypatch):
    kernels, count = torch_layers.counted(monkeypatch), Counter()
    for sample in op.sample_inputs("cpu", dtype, requires_grad=True):
        ours_kind, theirs_kind = torch_layers.LAYERS.get(sample.input.ndim, (None, None))
        if ours_kind is None:
            count["no module for such a rank"] += 1
            continue
        ours, theirs = layer_for(sample, ours_kind), layer_for(sample, theirs_kind)
        count[assert_same(ours, theirs, sample.input)] += 1
        direct = torch.nn.functional.batch_norm(
            sample.input,
            *(None if t is None else t.clone() for t in sample.args[:2]),
            *sample.args[2:],
            **sample.kwargs,
        )
        close(layer_for(sample, ours_kind)(sample.input), direct)
    print(f"\nOpInfo {dtype}: {dict(count)}, by the kernels {kernels['forward']} forwards, {kernels['backward']} back")
    assert count["same"] >= 8
    if dtype in (*layers.WIDE, *calls.HALF):
        assert kernels["backward"] >= count["same"] // 2


def module_inputs(info, dtype, training):
    return info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("info", MODULES, ids=lambda info: info.name)
def test_samples_of_the_modules(info, dtype, monkeypatch):
    kernels, count = torch_layers.counted(monkeypatch), Counter()
    ours_kind = layers.OURS[info.module_cls]
    for training in (True, False):
        for sample in module_inputs(info, dtype, training):
            given = sample.constructor_input
            theirs = info.module_cls(*given.args, **given.kwargs).to(dtype).train(training)
            ours = ours_kind(*given.args, **given.kwargs).to(dtype).train(training)
            ours.load_state_dict(theirs.state_dict())
            assert repr(ours) == repr(theirs)
            (x,) = sample.forward_input.args
            count[assert_same(ours, theirs, x)] += 1
            # views that are not contiguous, and other orders of memory
            wide = x.detach().repeat_interleave(2, -1)[..., ::2]
            count[assert_same(ours, theirs, wide)] += 1
            if x.ndim in torch_layers.FORMATS:
                last = x.detach().contiguous(memory_format=torch_layers.FORMATS[x.ndim])
                count[assert_same(ours, theirs, last)] += 1
                with torch.no_grad():
                    y, _ = ours(last), theirs(last)
                assert y.is_contiguous(memory_format=torch_layers.FORMATS[x.ndim])
            count[assert_same(copy.deepcopy(ours), copy.deepcopy(theirs), x)] += 1
    print(f"\nModuleInfo {info.name} {dtype}: {dict(count)}, by the kernels {kernels['forward']} forwards")
    assert count["same"] >= 20


@pytest.mark.parametrize("info", MODULES, ids=lambda info: info.name)
def test_gradients_of_the_modules(info):
    """gradcheck and gradgradcheck, as PyTorch's tests of modules do them."""
    for training in (True, False):
        for sample in module_inputs(info, torch.float64, training):
            given = sample.constructor_input
            layer = layers.OURS[info.module_cls](*given.args, **given.kwargs).double().train(training)
            (x,) = sample.forward_input.args
            parameters = dict(layer.named_parameters())

            def function(x, *values, layer=layer, names=tuple(parameters)):
                return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

            layer.momentum = 0.0  # a check is no step
            inputs = x[:2].detach().requires_grad_(), *parameters.values()
            assert torch.autograd.gradcheck(function, inputs, check_batched_grad=True, fast_mode=x.ndim > 3)
            assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
