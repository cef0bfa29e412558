"""PyTorch's layers on several processes (gloo): beside one process with the whole batch, faults, conversion, graphs.

All scenarios run in one start of two processes, half a minute, which is ended after minutes.
"""

import re
import sys

import numpy as np
import pytest
import world
from torch_layers import torch

import bnfast.torch

nn = torch.nn
SCENARIOS = [
    "same_as_whole", "gradients_of_part", "far_from_zero", "quiet", "few_values", "refused", "unlike", "not_finite",
    "other_kinds", "converted", "compiled", "checkpointed", "data_parallel",
]  # fmt: skip

needs_gloo = pytest.mark.skipif(
    sys.platform != "linux" or not torch.distributed.is_available(), reason="needs gloo and Linux"
)


@pytest.fixture(scope="module")
def told():
    """{scenario: what each process tells}"""
    found = world.on_gloo(2, *SCENARIOS, script=world.TORCH_SCENARIOS)
    return {name: [of_rank[place] for of_rank in found] for place, name in enumerate(SCENARIOS)}


@needs_gloo
def test_parts_give_what_the_whole_gives(told):
    """y, dx, dresidual of each part; running statistics; dgamma and dbeta, summed over the processes."""
    (first, digest), (second, other) = told["same_as_whole"]
    assert digest == other, "the running statistics have the same bits"
    assert len(first) == 14
    for name in first:
        limit = 3e-6 if name.startswith(("dgamma", "dbeta")) else 6e-7
        assert max(first[name], second[name]) < (limit if name.endswith("32") else 1e-12), name


@needs_gloo
def test_gradients_of_parameters_are_of_the_part(told):
    """As SyncBatchNorm leaves them, and as DistributedDataParallel expects them."""
    assert np.max(told["gradients_of_part"]) < 1e-11


@needs_gloo
def test_mean_far_from_zero(told):
    for of_y, of_var in told["far_from_zero"]:
        assert of_y < 1e-6
        assert of_var < 1e-6


@needs_gloo
def test_one_gather_a_forward_one_a_backward_none_in_eval(told):
    """The first forward has one more, to agree on the layer; where dx is not needed the backward has none."""
    assert told["quiet"] == [[[3, 2, 1, 0], [13, 6, 4, 3]]] * 2


@needs_gloo
def test_empty_parts_and_few_values(told):
    (empty, one, tracked, two), (other_empty, *others) = told["few_values"]
    assert empty == [[4, 3], [4, 3], None]
    assert other_empty == [[0, 3], [0, 3], [0, 0, 0]]
    assert one == "ValueError: Expected more than 1 value per channel when training, got 1 on all processes"
    assert tracked == 1
    assert [two, others[2]] == [[[-1, -1, -1]], [[1, 1, 1]]]
    assert others[:2] == [one, tracked]


@needs_gloo
def test_all_raise_where_one_refuses_its_input(told):
    others, last = told["refused"]
    expected = (
        "torch.int32", "expected 4D input", "(13, 2, 4, 3)", "of torch.float64, parameters of ['torch.float32']",
        "NoneType",
    )  # fmt: skip
    for said, own, words in zip(others[0], last[0], expected, strict=True):
        assert words in own
        assert (
            re.fullmatch(r"RuntimeError: process_group: process 1 raised in a forward \(layer \d+\): (.*)", said)[1]
            == own
        )
    assert others[1] == last[1] == 0
    assert "modified by an inplace operation" in last[2]
    assert re.search(r"process 1 raised in a backward \(layer \d+\): RuntimeError: one of the variables", others[2])
    for told_by_one in (others, last):
        assert "no double backward" in told_by_one[3]
        assert "no transforms of torch.func" in told_by_one[4]
        assert told_by_one[5] == [13, 6, 4, 3]
        assert "input: expected (N, 6, ...)" in told_by_one[6]


@needs_gloo
def test_layers_that_differ_are_named(told):
    for first, activation, affine, momentum, eps, tracked, slope, order in told["unlike"]:
        assert "got num_features 2 on process 0 and 3 on process 1" in first
        assert "got activation None on process 0 and relu on process 1" in activation
        assert "got affine True on process 0 and gamma on process 1" in affine
        assert "got momentum 0.1 on process 0 and None on process 1" in momentum
        assert "got eps 1e-05 on process 0 and 0.001 on process 1" in eps
        assert "got track_running_stats 1 on process 0 and 0 on process 1" in tracked
        assert "got negative_slope 0.1 on process 0 and 0.2 on process 1" in slope
        assert "the same layers in the same order" in order


@needs_gloo
def test_nan_stays_in_its_channel_on_all(told):
    assert told["not_finite"] == [[[True] * 3, [False] * 3]] * 2


@needs_gloo
def test_half_types_broadcast_residuals_and_options(told):
    for errors in told["other_kinds"]:
        of_half, others = errors[:4], errors[4:]
        assert max(of_half) < 1e-2
        assert max(others) < 1e-6


@needs_gloo
def test_conversion_there_and_back_copies_and_pickles(told):
    for rank, found in enumerate(told["converted"]):
        kinds = [name.rpartition(".")[2] for name in found["kinds"]]
        assert kinds == ["SyncBatchNorm", "_TakenIn", "Conv2d", "SyncBatchNorm"]
        assert all(name.startswith("bnfast.torch.") for name in (found["kinds"][0], found["kinds"][3]))
        assert found["kept"] == [True, True, "relu", True]
        assert found["error"] < 1e-6
        assert "had one when it was pickled" in found["said"]
        assert found["quiet"] == [13, 6, 4, 3]
        assert found["types"] == [True] * 7
        assert found["outside"] == (rank == 1)
        assert "SyncBatchNorm expected input tensor to be on GPU" in found["meta"], "PyTorch's own code"


@needs_gloo
def test_graphs_break_or_refuse_in_words(told):
    for errors, fullgraph, script, trace, export in told["compiled"]:
        assert errors[:5] == [0] * 5
        assert max(errors[5:]) < 1e-5
        assert "exchanges numbers with them" in fullgraph
        assert "TorchScript knows no process group" in script
        assert "in eval mode, or without a process group" in trace
        assert "in eval mode, or without a process group" in export


@needs_gloo
def test_data_parallel_training_is_that_of_one_process(told):
    (first, apart, statistics, digest), (*_, other) = told["data_parallel"]
    assert digest == other
    assert first < 1e-6
    assert statistics < 1e-5
    assert apart > 1e-3  # it is the statistics of the whole that make it so


@needs_gloo
def test_gradient_checkpointing(told):
    assert told["checkpointed"] == [[0] * 4] * 2


# --- one process -----------------------------------------------------------------------------------------------------


def test_without_a_world_it_is_a_batch_norm_as_any_other():
    x = torch.randn(8, 6, 5, 5)
    ours, theirs = bnfast.torch.SyncBatchNorm(6), nn.SyncBatchNorm(6)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert not isinstance(ours, nn.SyncBatchNorm), "which DistributedDataParallel refuses on the CPU"
    for size in ((8, 6), (8, 6, 5), (2, 6, 3, 3, 3), (2, 6, 1, 2, 3, 4)):
        assert ours(torch.randn(size)).shape == size
    with pytest.raises(ValueError, match="at least 2D"):
        ours(torch.randn(6))


def test_the_constructor_is_pytorchs():
    group = object()
    for arguments in ((4, 1e-3, 0.2, False), (4, 1e-3, None, True, False, group, None, torch.float64)):
        one, other = bnfast.torch.SyncBatchNorm(*arguments), nn.SyncBatchNorm(*arguments)
        assert str(one) == str(other)
        assert one.process_group is other.process_group
    assert bnfast.torch.SyncBatchNorm(4, bias=False, activation="relu").bias is None


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_torch_jit_without_a_group():
    layer, x = bnfast.torch.SyncBatchNorm(6, activation="relu"), torch.randn(8, 6, 5)
    torch.testing.assert_close(torch.jit.script(layer)(x), layer(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_without_a_world_the_graph_is_whole():
    layer, x = bnfast.torch.SyncBatchNorm(6), torch.randn(8, 6, 5)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))
    torch._dynamo.reset()
