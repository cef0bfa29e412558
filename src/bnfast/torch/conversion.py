"""A model's layers exchanged in place, and back.

A layer's class is exchanged, not the layer: its parameters and buffers, hooks, mode and whatever refers to it stay.
An activation is taken in where it can be seen that nothing else sees what stands between: behind the batch norm in an
`nn.Sequential`, or in the graph of a `torch.fx.GraphModule`, in which the addition of a residual is taken in, too.
"""

import copy
import itertools
import operator
from collections import Counter
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.nn import functional as theirs

from .._checks import flag
from .layers import OURS, _Layer

__all__ = ["convert", "revert"]

Model = TypeVar("Model", bound=nn.Module)

PLAIN = {ours: plain for plain, ours in OURS.items()}
RELU = {theirs.relu, torch.relu, torch.relu_, theirs.relu_}
ADD = {operator.add, operator.iadd, torch.add}
IN_PLACE = (operator.iadd, "add_")
WRITING = {
    operator.iadd, operator.iand, operator.iconcat, operator.ifloordiv, operator.ilshift, operator.imatmul,
    operator.imod, operator.imul, operator.ior, operator.ipow, operator.irshift, operator.isub, operator.itruediv,
    operator.ixor,
}  # fmt: skip
VIEWS = {  # functions and methods whose result may lie in the memory of their first argument
    "alias", "chunk", "contiguous", "detach", "diagonal", "dropout", "expand", "expand_as", "flatten", "getitem",
    "movedim", "narrow", "permute", "reshape", "reshape_as", "select", "split", "squeeze", "swapaxes", "t", "to",
    "transpose", "unbind", "unflatten", "unfold", "unsqueeze", "view", "view_as",
}  # fmt: skip
VIEWING = (nn.Identity, nn.Flatten, nn.Unflatten, nn.modules.dropout._DropoutNd)
KNOWN = {"torch", "bnfast", "_operator", "builtins", "math"}  # where what a graph calls is known to write if it says so


def convert(model: Model, *, fuse_relu: bool = True) -> Model:
    """Exchange all of a model's batch norms for bnfast's, in place.

    Parameters
    ----------
    model : torch.nn.Module
        Its `torch.nn.BatchNorm1d`, `2d`, `3d` and `SyncBatchNorm` are exchanged, itself too if it is one; subclasses of
        them (lazy ones, your own) are left as they are.
    fuse_relu : bool
        Whether a ReLU, ReLU6 or LeakyReLU that comes right after one becomes part of it: the next module of an
        `nn.Sequential`, which is replaced by an identity; and, if the model is a `torch.fx.GraphModule`, whatever its
        graph shows, also the addition of a residual before. Not where either has hooks or is used elsewhere. What takes
        a part of such a sequence, `model[:2]`, or holds its layer besides, gets the activation with the batch norm.

    Returns
    -------
    torch.nn.Module
        The model itself. Parameters, buffers, hooks, modes and state dictionaries are the same as before. (In a graph
        layers that take something in are new, with the same tensors: those of the model that was traced compute what
        they did.)

    Raises
    ------
    TypeError
        If `model` is no module, or `fuse_relu` no bool.

    Examples
    --------
    >>> import torch, bnfast.torch
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    >>> bnfast.torch.convert(model)[1]
    BatchNorm2d(8, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, activation='relu')
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    flag(fuse_relu, "fuse_relu")
    for module in model.modules():
        if type(module) in OURS:
            module.__class__ = OURS[type(module)]
    if fuse_relu:
        uses = Counter(map(id, _modules_by_place(model)))
        for module in list(model.modules()):
            if isinstance(module, fx.GraphModule):
                _fuse_graph(module, uses)
            elif isinstance(module, nn.Sequential) and _is_plain_sequence(module):
                _fuse_sequence(module, uses)
    return model


def revert(model: Model) -> Model:
    """Undo `convert`: PyTorch's layers, and the activations that were taken in, in their old places.

    Parameters
    ----------
    model : torch.nn.Module

    Returns
    -------
    torch.nn.Module
        The model itself, in place. (In a graph the additions and activations are functions then.) Layers with a process
        group become `torch.nn.SyncBatchNorm`.

    Raises
    ------
    TypeError
        If `model` is no module.
    ValueError
        If a layer was made with an activation: PyTorch's layers have none. Nothing has changed then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    modules = list(model.modules())
    sequences = [
        (parent, name, before, each)
        for parent in modules
        if isinstance(parent, nn.Sequential)
        for before, (name, each) in zip(parent, list(parent._modules.items())[1:], strict=False)
        if isinstance(each, _TakenIn) and isinstance(before, _Layer)
    ]
    graphs = [module for module in modules if isinstance(module, fx.GraphModule)]
    covered = {id(layer) for _, _, layer, _ in sequences}
    covered |= {id(graph.get_submodule(node.target)) for graph in graphs for node in _layer_nodes(graph)}
    for name, module in model.named_modules():
        if isinstance(module, _Layer) and module.activation is not None and id(module) not in covered:
            raise ValueError(f"model: {name or 'it'} has an activation of its own, {module.activation!r}, which "
                             f"PyTorch's layer has not")  # fmt: skip
    restored = {id(taken_in.original[0]) for _, _, _, taken_in in sequences}
    for parent, name, layer, taken_in in sequences:
        parent._modules[name] = taken_in.original[0].train(taken_in.training)
        taken_in.become_original()
        if type(layer) not in PLAIN:  # of a class that a parametrization has made, which stays
            layer.activation = None
    copies: dict[int, nn.Module] = {}
    for graph in graphs:
        _unfuse_graph(graph, restored, copies)
    for module in model.modules():
        if type(module) in PLAIN:
            _make_plain(module)
    return model


class _TakenIn(nn.Identity):
    """Stands where an activation was that a batch norm has taken in."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = (original,)  # in a tuple: no module of the model's

    def become_original(self) -> None:
        """For whatever else holds this: a model of which only a part was reverted."""
        own = copy.copy(self.original[0])
        self.__class__, self.__dict__ = type(own), own.__dict__

    def extra_repr(self) -> str:
        return f"{self.original[0]}, in the batch norm before it"


def _modules_by_place(model: nn.Module) -> list[nn.Module]:
    return [module for _, module in model.named_modules(remove_duplicate=False)]


def _make_plain(layer: Any) -> None:
    for name in ("activation", "negative_slope"):
        layer.__dict__.pop(name, None)
    plain = PLAIN[type(layer)]
    if layer.process_group is not None:
        plain = nn.SyncBatchNorm
    elif plain is not nn.SyncBatchNorm:
        layer.__dict__.pop("process_group", None)
    layer.__class__ = plain


def _is_wrapped(module: nn.Module) -> bool:
    """Whether a call does more than its class's forward: by hooks, or a forward of the module's own."""
    return "forward" in module.__dict__ or any(
        getattr(module, f"_{name}_hooks") for name in ("forward", "forward_pre", "backward", "backward_pre")
    )


def _is_plain_sequence(module: nn.Sequential) -> bool:
    return type(module).forward is nn.Sequential.forward and "forward" not in module.__dict__


def _activation_of(module: Any) -> tuple[str, float] | None:
    """(name, negative slope) of a module that a batch norm can take in."""
    if type(module) is nn.ReLU:
        return "relu", 0.01
    if type(module) is nn.ReLU6:
        return "relu6", 0.01
    if type(module) is nn.LeakyReLU and 0 < module.negative_slope < 1:
        return "leaky_relu", module.negative_slope
    return None


def _can_take(layer: Any, uses: Counter[int]) -> bool:
    return type(layer) in PLAIN and layer.activation is None and uses[id(layer)] == 1 and not _is_wrapped(layer)


def _fuse_sequence(parent: nn.Sequential, uses: Counter[int]) -> None:
    children = list(parent._modules.items())
    for (_, layer), (name, behind) in itertools.pairwise(children):
        found = _activation_of(behind)
        if found is not None and _can_take(layer, uses) and not _is_wrapped(behind):
            _set_activation(layer, found)
            parent._modules[name] = _TakenIn(behind)


def _set_activation(layer: Any, found: tuple[str, float]) -> None:
    layer.activation, layer.negative_slope = found


# --- graphs ---


def _layer_nodes(graph: fx.GraphModule) -> list[fx.Node]:
    return [
        node for node in graph.graph.nodes
        if node.op == "call_module" and type(graph.get_submodule(node.target)) in PLAIN
    ]  # fmt: skip


def _fuse_graph(graph: fx.GraphModule, uses: Counter[int]) -> None:
    nodes = _layer_nodes(graph)
    calls = Counter(id(graph.get_submodule(node.target)) for node in nodes)
    read = {node.target.rpartition(".")[0] for node in graph.graph.nodes if node.op == "get_attr"}
    for node in nodes:
        layer: Any = graph.get_submodule(node.target)
        if calls[id(layer)] > 1 or not _can_take(layer, uses) or len(node.args) != 1 or node.kwargs:
            continue
        within, _, _ = node.target.rpartition(".")
        if within and type(graph.get_submodule(within)) is not nn.Module:  # a module of the model's, which may call it
            continue
        if node.target in read:  # its statistics, perhaps, which it writes
            continue
        last, residual = node, None
        addition = _only_user(graph, last)
        if addition is not None and len(node.args[0].users) == 1:
            residual = _added_to(graph, addition, node)
            last = node if residual is None else addition
        behind = _only_user(graph, last)
        found = None if behind is None else _activation_in(graph, behind)
        if behind is not None and found is not None:
            last = behind
        if last is node:
            continue
        layer = _replaced(graph, node.target, layer)
        if found is not None:
            _set_activation(layer, found)
        layer.adds_in_place = residual is not None and addition is not None and addition.target in IN_PLACE
        with graph.graph.inserting_after(last):
            arguments = node.args if residual is None else (node.args[0], residual)
            fused = graph.graph.call_module(node.target, arguments)
        last.replace_all_uses_with(fused)
        for each in (behind if found is not None else None, addition if residual is not None else None, node):
            if each is not None:
                graph.graph.erase_node(each)
    graph.graph.lint()
    graph.recompile()


def _replaced(graph: fx.GraphModule, target: str, layer: Any) -> Any:
    """A layer of the graph's own, with the tensors and hooks of `layer`: that is the model's, too, which was traced."""
    own = copy.copy(layer)
    own.traced = (layer,)  # in a tuple: no module of the graph's
    graph.set_submodule(target, own)
    return own


def _only_user(graph: fx.GraphModule, node: fx.Node) -> fx.Node | None:
    """What alone uses a result, if nothing comes between that may write: the batch norm is to move behind it."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    between = node.next
    while between is not user:
        if _may_write(graph, between):
            return None
        between = between.next
    return user


def _may_write(graph: fx.GraphModule, node: fx.Node) -> bool:
    """Whether it may change a tensor that was there before; what is not PyTorch's may do anything."""
    if node.is_impure() or node.kwargs.get("inplace") or "out" in node.kwargs or any(it is True for it in node.args):
        return True
    if node.op == "call_module":
        modules = list(graph.get_submodule(node.target).modules())
        return any(_home(type(it)) not in KNOWN or getattr(it, "inplace", False) or _is_wrapped(it) for it in modules)
    if node.op == "call_function":
        name = getattr(node.target, "__name__", "").split(".")[0]  # without that of an overload
        return _home(node.target) not in KNOWN or node.target in WRITING or name.endswith("_")
    return node.op == "call_method" and str(node.target).endswith("_")


def _home(it: Any) -> str:
    """The package of a class or function."""
    return (getattr(it, "__module__", None) or "torch").split(".")[0]


def _added_to(graph: fx.GraphModule, addition: fx.Node, node: fx.Node) -> fx.Node | None:
    """What else is added, if it is an addition of two nodes that writes into none but the batch norm's result.

    Nothing else may write into its memory either: the layer keeps a residual for its backward, an addition does not.
    """
    is_function = addition.op == "call_function" and addition.target in ADD
    is_method = addition.op == "call_method" and addition.target in ("add", "add_")
    if not (is_function or is_method) or addition.kwargs or len(addition.args) != 2:
        return None
    first, second = addition.args
    in_place = addition.target in IN_PLACE
    other = second if first is node else first
    if not isinstance(other, fx.Node) or other is node or (in_place and first is not node):
        return None
    memory = _memory(graph, other)
    written = any(
        memory in (_memory(graph, each) for each in writer.all_input_nodes)
        for writer in graph.graph.nodes
        if writer is not addition and _may_write(graph, writer)
    )
    return None if written else other


def _memory(graph: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The node whose result's memory this one's may be."""
    while node.op in ("call_function", "call_method", "call_module") and node.all_input_nodes:
        if node.op == "call_module":
            is_view = isinstance(graph.get_submodule(node.target), VIEWING)
        else:
            name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
            is_view = name.split(".")[0] in VIEWS
        if not is_view:
            break
        node = node.all_input_nodes[0]
    return node


def _activation_in(graph: fx.GraphModule, node: fx.Node) -> tuple[str, float] | None:
    if node.op == "call_module":
        module = graph.get_submodule(node.target)
        return None if _is_wrapped(module) else _activation_of(module)
    if node.op == "call_function" and node.target in RELU:
        return "relu", 0.01
    if node.op == "call_method" and node.target in ("relu", "relu_"):
        return "relu", 0.01
    if node.op == "call_function" and node.target is theirs.relu6:
        return "relu6", 0.01
    if node.op == "call_function" and node.target is theirs.leaky_relu:
        slope = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", 0.01)
        return ("leaky_relu", slope) if isinstance(slope, float) and 0 < slope < 1 else None
    return None


def _calls(graph: fx.GraphModule, node: fx.Node, modules: set[int]) -> bool:
    return node.op == "call_module" and id(graph.get_submodule(node.target)) in modules


def _unfuse_graph(graph: fx.GraphModule, restored: set[int], copies: dict[int, nn.Module]) -> None:
    """restored: activations in their old places; copies: by the layers they are of, and are."""
    for node in _layer_nodes(graph):
        layer: Any = graph.get_submodule(node.target)
        last = node
        residual = node.args[1] if len(node.args) > 1 else None
        users = list(node.users)
        with graph.graph.inserting_after(node):
            if residual is not None:
                add = operator.iadd if layer.adds_in_place else operator.add
                last = graph.graph.call_function(add, (node, residual))
        if layer.activation is not None and not any(_calls(graph, user, restored) for user in users):
            function = {"relu": theirs.relu, "relu6": theirs.relu6}.get(layer.activation, theirs.leaky_relu)
            options = (layer.negative_slope,) if function is theirs.leaky_relu else ()
            with graph.graph.inserting_after(last):
                last = graph.graph.call_function(function, (last, *options))
        if last is not node:
            node.args = node.args[:1]
            for user in users:
                user.replace_input_with(node, last)
        if (traced := getattr(layer, "traced", None)) is not None:
            graph.set_submodule(node.target, traced[0].train(layer.training))
        elif last is not node:  # the layer is the traced model's, too, which keeps what it takes in
            if id(layer) not in copies:
                own = copies[id(layer)] = copy.copy(layer)
                copies[id(own)] = own
            graph.set_submodule(node.target, copies[id(layer)])
    graph.graph.lint()
    graph.recompile()
