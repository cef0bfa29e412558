"""What one of several processes does with PyTorch's layers, for tests/torch/test_processes.py.

`torch_scenarios.py gloo NAME ...`, started once for each process; each prints lines as scenarios.py does.
"""

import copy
import io
import itertools
import pickle
import sys

import numpy as np
import scenarios
import torch
from scenarios import digest, outcome, part
from torch import distributed, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import bnfast.torch

SHAPES = {2: (30, 6), 3: (13, 6, 9), 4: (13, 6, 4, 3), 5: (13, 6, 2, 3, 3)}
PLAIN = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}
ACTIVATIONS = {None: lambda w: w, "relu": torch.relu, "leaky_relu": lambda w: F.leaky_relu(w, 0.2)}
CASES = list(itertools.product((2, 3, 4, 5), (torch.float32, torch.float64), (False, True), (False, True), ACTIVATIONS))


def data(ndim, dtype, seed, offset=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(SHAPES[ndim], generator=generator, dtype=torch.float64) * 2 + offset).to(dtype)


def with_parameters(layer):
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return layer


def layer_of(ndim, group, dtype=torch.float32, **options):
    """Of both kinds: with a group of its own, or of the world."""
    kind = getattr(bnfast.torch, PLAIN[ndim].__name__)
    if ndim % 2:
        return with_parameters(bnfast.torch.SyncBatchNorm(6, dtype=dtype, **options))
    return with_parameters(kind(6, dtype=dtype, process_group=group, **options))


def summed(tensor):
    tensor = tensor.detach().clone()
    distributed.all_reduce(tensor)
    return tensor


class Counting:
    """How often the processes meet inside."""

    def __enter__(self):
        self.calls, self.original = 0, distributed.all_gather

        def counted(*arguments, **options):
            self.calls += 1
            return self.original(*arguments, **options)

        distributed.all_gather = counted
        return self

    def __exit__(self, *error):
        distributed.all_gather = self.original


def same_as_whole(rank, size, comm):
    """Largest differences, by name, from PyTorch's layer with the whole batch in float64; a digest of what all have."""
    errors, shared = {}, []
    for ndim, dtype, last, with_residual, activation in CASES:
        x, dy, r = (data(ndim, dtype, seed) for seed in range(3))
        whole = with_parameters(PLAIN[ndim](6, dtype=torch.float64, momentum=0.3))
        xw, rw = (t.to(torch.float64, copy=True).requires_grad_() for t in (x, r))
        w = whole(xw) + rw if with_residual else whole(xw)
        dy = dy * (w.abs() > 1e-3)  # rounding may choose the side of a kink
        y = ACTIVATIONS[activation](w)
        y.backward(dy.double())

        ours = layer_of(ndim, comm, dtype, momentum=0.3, activation=activation, negative_slope=0.2)
        memory = {"memory_format": FORMATS[ndim]} if last and ndim in FORMATS else {}
        mine, residual = (part(t, rank, size).contiguous(**memory).requires_grad_() for t in (x, r))
        found = ours(mine, residual) if with_residual else ours(mine)
        found.backward(part(dy, rank, size))
        pairs = {
            "y": (found, part(y, rank, size)),
            "dx": (mine.grad, part(xw.grad, rank, size)),
            "dgamma": (summed(ours.weight.grad), whole.weight.grad),
            "dbeta": (summed(ours.bias.grad), whole.bias.grad),
            "running_mean": (ours.running_mean, whole.running_mean),
            "running_var": (ours.running_var, whole.running_var),
        }
        if with_residual:
            pairs["dresidual"] = residual.grad, part(rw.grad, rank, size)
        for name, (one, other) in pairs.items():
            error = ((one.double() - other).abs() / other.abs().clamp(min=1)).detach()
            key = f"{name} {str(dtype)[6:]}"
            errors[key] = max(errors.get(key, 0.0), float(error.max()) if error.numel() else 0.0)
        shared += [ours.running_mean, ours.running_var, ours.num_batches_tracked]
        assert found.dtype is dtype
        assert found.stride() == mine.stride()
    return errors, digest(*(tensor.numpy() for tensor in shared))


def gradients_of_part(rank, size, comm):
    """dgamma and dbeta beside sums over this process's part, by hand."""
    x, dy = data(4, torch.float64, 0), data(4, torch.float64, 1)
    ours = layer_of(4, comm, torch.float64)
    ours(part(x, rank, size)).backward(part(dy, rank, size))
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
    x_hat, mine = part((x - mean) / (var + 1e-5).sqrt(), rank, size), part(dy, rank, size)
    expected = (mine * x_hat).sum((0, 2, 3)), mine.sum((0, 2, 3))
    return [float((p.grad - e).abs().max()) for p, e in zip(ours.parameters(), expected, strict=True)]


def far_from_zero(rank, size, comm):
    """float32 with a mean of 1e5: the largest error of y, and of the running variance."""
    x = data(4, torch.float32, 0, offset=1e5)
    whole = nn.BatchNorm2d(6, dtype=torch.float64, momentum=1.0)
    y = whole(x.double())
    ours = bnfast.torch.BatchNorm2d(6, process_group=comm, momentum=1.0)
    found = ours(part(x, rank, size))
    of_var = (ours.running_var / whole.running_var - 1).abs().max()
    error = (found.double() - part(y, rank, size)).abs()
    return float(error.detach().max()) if error.numel() else 0.0, float(of_var)


def quiet(rank, size, comm):
    """Meetings: of a first step, of the next, in eval (of one process alone), with x frozen, in a world of one."""
    counts = []
    layer, x = layer_of(4, comm), data(4, torch.float32, rank)
    alone = distributed.new_group([0]), distributed.new_group([1])
    with Counting() as meetings:
        for needs in (True, True, False):
            before = meetings.calls
            layer(x.clone().requires_grad_(needs)).sum().backward()
            counts.append(meetings.calls - before)
        before = meetings.calls
        layer.eval()
        for _ in range(rank + 1):  # nobody waits for the others
            layer(x.requires_grad_()).sum().backward()
            bnfast.torch.BatchNorm2d(6, track_running_stats=False, process_group=comm).eval()(x)
        if rank < 2:
            bnfast.torch.BatchNorm2d(6, process_group=alone[rank])(x)
        bnfast.torch.BatchNorm2d(6)(x)
        counts.append(meetings.calls - before)
    layer.train()
    return counts, list(layer(x).shape)


def few_values(rank, size, comm):
    """An empty part, with its gradient; one value on all; two on two."""
    layer = bnfast.torch.BatchNorm1d(3, process_group=comm)
    x = torch.arange(12.0).view(4, 3)[: 4 if rank == 0 else 0].requires_grad_()
    y = layer(x)
    y.sum().backward()
    empty = [list(y.shape), list(x.grad.shape), layer.weight.grad.tolist() if rank else None]
    one = outcome(lambda: layer(torch.ones(1 if rank == 0 else 0, 3)))
    tracked = int(layer.num_batches_tracked)
    two = layer(torch.full((1 if rank < 2 else 0, 3), float(rank))).detach().numpy().round(3).tolist()
    return empty, one, tracked, two


def refused(rank, size, comm):
    """The last process is given what it refuses, in forwards and in a backward; then all go on."""
    last = rank == size - 1
    layer, x = layer_of(4, comm), data(4, torch.float32, rank)
    wrong = (x.int(), x[0], x[:, :2], x.double(), None)
    first = [outcome(lambda each=each: list(layer(each if last else x).shape)) for each in wrong]
    tracked = int(layer.num_batches_tracked)
    leaf = x.clone().requires_grad_()
    inner = leaf * 1
    y = layer(inner)
    if last:
        inner.add_(1)  # what the backward needs has changed
    second = outcome(lambda: y.sum().backward())
    doubled = outcome(lambda: torch.autograd.grad(layer(leaf).sum(), leaf, create_graph=True))
    forward_mode = outcome(lambda: torch.func.jvp(layer, (x,), (x,)))
    bare = bnfast.torch.BatchNorm2d(6, affine=False, track_running_stats=False, process_group=comm)
    without_tensors = outcome(lambda: list(bare(x[:, :2] if last else x).shape))
    return first, tracked, second, doubled, forward_mode, list(layer(x).shape), without_tensors


def unlike(rank, size, comm):
    found = []
    for options in (
        {"num_features": 2 + rank}, {"activation": "relu" if rank else None}, {"bias": not rank},
        {"momentum": None if rank else 0.1}, {"eps": 1e-3 if rank else 1e-5}, {"track_running_stats": not rank},
        {"activation": "leaky_relu", "negative_slope": 0.2 if rank else 0.1},
    ):  # fmt: skip
        layer = bnfast.torch.BatchNorm1d(**{"num_features": 2, **options}, process_group=comm)
        found.append(outcome(lambda layer=layer: list(layer(torch.ones(4, layer.num_features)).shape)))
    layers = [layer_of(2, comm) for _ in range(2)]
    x = data(2, torch.float32, rank)
    for layer in layers:
        layer(x)
    found.append(outcome(lambda: list(layers[rank == size - 1](x).shape)))
    return found


def not_finite(rank, size, comm):
    """A NaN of the last process: (NaN in y, running_mean and dx of the first channel, elsewhere)."""
    layer, x = layer_of(4, comm, activation="relu"), data(4, torch.float32, rank)
    if rank == size - 1:
        x[0, 0, 0, 0] = float("nan")
    x.requires_grad_()
    y = layer(x)
    y.sum().backward()
    tensors = y.transpose(0, 1), layer.running_mean, x.grad.transpose(0, 1)
    return [[bool(t[0].isnan().all()) for t in tensors], [bool(t[1:].isnan().any()) for t in tensors]]


def other_kinds(rank, size, comm):
    """Half types; a residual that is broadcast; statistics that are not tracked; momentum None: errors."""
    x, dy = data(4, torch.float32, 0), data(4, torch.float32, 1)
    mine = part(x, rank, size)
    errors = []
    for dtype in (torch.float16, torch.bfloat16):
        layer = bnfast.torch.BatchNorm2d(6, process_group=comm)
        half = part(x.to(dtype), rank, size).requires_grad_()
        whole_x = x.to(dtype).double().requires_grad_()
        y = layer(half)
        y.backward(part(dy.to(dtype), rank, size))
        expected = nn.BatchNorm2d(6, dtype=torch.float64)(whole_x)
        expected.backward(dy.to(dtype).double())
        assert y.dtype is half.grad.dtype is dtype
        errors += [
            part((one.double() - other).abs(), 0, 1).max().item() if one.numel() else 0.0
            for one, other in ((y, part(expected, rank, size)), (half.grad, part(whole_x.grad, rank, size)))
        ]
    theirs = nn.BatchNorm2d(6, momentum=None, track_running_stats=True)
    ours = bnfast.torch.BatchNorm2d(6, momentum=None, activation="relu", process_group=comm)
    for factor in (1, 2):
        shift = torch.ones(6, 1, 1)
        found, expected = ours(mine * factor, shift).detach(), F.relu(theirs(x * factor) + shift)
        errors.append(float((found - part(expected, rank, size)).abs().sum() / 1e3))
        errors.append(float((ours.running_var / theirs.running_var - 1).abs().max()))
    untracked = bnfast.torch.SyncBatchNorm(6, track_running_stats=False, affine=False)
    errors.append(float((untracked(mine) - part(nn.BatchNorm2d(6, affine=False)(x), rank, size)).abs().sum() / 1e3))
    return errors


def converted(rank, size, comm):
    """Kinds of layers there and back, their process groups, copies, pickles; what each says."""
    group = distributed.new_group(list(range(size)))
    model = nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 1), nn.SyncBatchNorm(6, process_group=group))
    state = list(model.state_dict())
    ours = bnfast.torch.convert(nn.SyncBatchNorm.convert_sync_batchnorm(model[:3], group))
    ours.append(bnfast.torch.convert(model[3]))
    kinds = [type(module).__module__ + "." + type(module).__name__ for module in ours]
    kept = [ours[0].process_group is group, ours[3].process_group is group, ours[0].activation]
    x = data(4, torch.float32, 0)
    y = ours[0](part(x, rank, size))
    error = float((y - part(F.relu(nn.BatchNorm2d(6)(x)), rank, size)).abs().sum() / 1e3)
    copied = copy.deepcopy(ours[0])
    kept.append(copied.process_group is group and copied(part(x, rank, size)).shape == y.shape)
    loaded = pickle.loads(pickle.dumps(ours[0]))
    said = outcome(lambda: loaded(x))
    quiet = list(loaded.eval()(x).shape)
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    back = bnfast.torch.revert(ours)
    named = bnfast.torch.revert(bnfast.torch.BatchNorm2d(6, process_group=group))
    plain = bnfast.torch.revert(bnfast.torch.BatchNorm2d(6))
    types = [type(each) is nn.SyncBatchNorm for each in (back[0], back[3], named)]
    types += [named.process_group is back[3].process_group is group, type(plain) is nn.BatchNorm2d]
    types += ["process_group" not in plain.__dict__, list(back.state_dict()) == state]
    outside = outcome(lambda: bnfast.torch.BatchNorm2d(6, process_group=distributed.new_group([0]))(x).shape)
    on_meta = outcome(lambda: bnfast.torch.BatchNorm2d(6, process_group=group, device="meta")(x.to("meta")))
    return {"kinds": kinds, "kept": kept, "error": error, "said": said, "quiet": quiet, "types": types,
            "outside": "expected one that" in str(outside), "meta": on_meta}  # fmt: skip


def compiled(rank, size, comm):
    """Under `torch.compile`, TorchScript, tracing and export: the values of eager mode, or words."""
    layer, x = layer_of(4, comm, activation="relu"), part(data(4, torch.float32, 0), rank, size)
    eager = copy.deepcopy(layer)
    model = nn.Sequential(nn.Identity(), layer)
    graphs = torch.compile(model, backend="aot_eager")
    errors = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        ys = graphs(leaves[0] * 1), eager(leaves[1])
        for y in ys:
            y.square().sum().backward()
        errors += [float((a - b).detach().abs().sum()) for a, b in (ys, [leaf.grad for leaf in leaves])]
    errors.append(float((layer.running_var - eager.running_var).abs().max()))
    whole = outcome(lambda: torch.compile(layer, backend="aot_eager", fullgraph=True)(x))
    script = outcome(lambda: torch.jit.script(copy.deepcopy(layer))(x))
    trace = outcome(lambda: torch.jit.trace(copy.deepcopy(layer), x, check_trace=False))
    export = outcome(lambda: torch.export.export(nn.Sequential(copy.deepcopy(layer)), (x,)))
    layer.eval()
    quiet = [torch.compile(layer, backend="aot_eager", fullgraph=True), torch.jit.script(copy.deepcopy(layer))]
    errors += [float((each(x) - layer(x)).detach().abs().max()) for each in quiet]
    return errors, whole, script, trace, export


def checkpointed(rank, size, comm):
    """Gradients with a forward that is repeated in the backward, less those without."""
    layer, x = layer_of(4, comm, activation="relu"), part(data(4, torch.float32, 0), rank, size)
    found = []
    for function in (
        layer,
        lambda x: checkpoint(layer, x, use_reentrant=False),
        lambda x: checkpoint(layer, x, use_reentrant=True),
    ):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        function(leaf).square().sum().backward()
        found.append((leaf.grad, layer.weight.grad.clone()))
    return [float((a - b).abs().max()) for each in found[1:] for a, b in zip(each, found[0], strict=True)]


def data_parallel(rank, size, comm):
    """Three steps of DistributedDataParallel on equal parts: largest difference of parameters from one process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3))
    whole = copy.deepcopy(model)
    ours = bnfast.torch.convert(nn.SyncBatchNorm.convert_sync_batchnorm(model))
    apart = copy.deepcopy(whole)
    models = nn.parallel.DistributedDataParallel(ours), nn.parallel.DistributedDataParallel(apart), whole
    for step in range(3):
        x = torch.randn(4 * size, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        mine = x[4 * rank : 4 * rank + 4]
        for each, batch in zip(models, (mine, mine, x), strict=True):
            each.zero_grad()
            each(batch).square().mean().backward()
            with torch.no_grad():
                for parameter in each.parameters():
                    parameter -= 0.1 * parameter.grad
    arrays = [np.concatenate([p.detach().numpy().ravel() for p in each.parameters()]) for each in (ours, apart, whole)]
    statistics = float((ours[1].running_var - whole[1].running_var).abs().max())
    return (
        float(abs(arrays[0] - arrays[2]).max()),
        float(abs(arrays[1] - arrays[2]).max()),
        statistics,
        digest(arrays[0]),
    )


if __name__ == "__main__":
    scenarios.main(globals(), *sys.argv[1:])
