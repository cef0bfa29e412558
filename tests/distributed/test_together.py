"""A layer on several processes, here threads behind a callable: against the whole batch, faults, copies and pickles."""

import copy
import pickle

import numpy as np
import pytest
import scenarios
from tolerances import assert_same_bits
from world import World, on_threads, values

import bnfast
from bnfast import BatchNorm

SIZES = pytest.mark.parametrize("size", [2, 4])


def alone(vector):
    return vector[None]


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("shape", "axis"), [((37, 5), 1), ((11, 6, 5, 9), 1), ((9, 4, 4, 8), -1)])
def test_parts_give_what_the_whole_gives(rng, shape, axis, masked, with_residual, activation):
    x, dy, r = (rng.normal(2, 3, shape).astype(np.float32) for _ in range(3))
    mask = rng.random(np.delete(shape, axis)) < 0.7

    def both(rank, size, comm):
        bn = BatchNorm(shape[axis], axis=axis, activation=activation, comm=comm, momentum=0.3)
        of = [scenarios.part(array, rank, size) if size > 1 else array for array in (x, dy, r, mask)]
        y = bn(of[0], residual=of[2] if with_residual else None, mask=of[3] if masked else None)
        dx = bn.backward(of[1])
        return bn, y, *(dx if with_residual else (dx,))

    whole, *expected = both(0, 1, None)
    found = values(on_threads(4, lambda rank, comm: both(rank, 4, comm)))
    for place, right in enumerate(expected, 1):
        parts = np.concatenate([one[place] for one in found])
        np.testing.assert_allclose(parts, right, rtol=1e-5, atol=2e-6)
    layers = [one[0] for one in found]
    np.testing.assert_allclose(sum(bn.grad_gamma for bn in layers), whole.grad_gamma, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(sum(bn.grad_beta for bn in layers), whole.grad_beta, rtol=1e-5, atol=1e-4)
    for bn in layers:
        np.testing.assert_allclose(bn.running_var, whole.running_var, rtol=2e-7)
        for name in ("running_mean", "running_var", "batch_mean", "batch_var"):
            assert_same_bits(getattr(bn, name), getattr(layers[0], name), name)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_process_has_the_bits_of_none(rng, dtype):
    x = rng.normal(size=(20, 3, 7)).astype(dtype)
    with_comm, without = BatchNorm(3, comm=alone, dtype=dtype), BatchNorm(3, dtype=dtype)
    for bn in (with_comm, without):
        bn.y, bn.dx = bn(x), bn.backward(x)
    for name in ("y", "dx", "grad_gamma", "grad_beta", "running_mean", "running_var"):
        assert_same_bits(getattr(with_comm, name), getattr(without, name), name)


def test_one_gather_a_forward_one_a_backward_none_in_eval(rng):
    world = World(2)
    x = rng.normal(size=(4, 3)).astype(np.float32)

    def work(rank, comm):
        bn = BatchNorm(3, comm=comm)
        bn(x)  # one more, to agree on the layer
        before = world.calls
        bn(x)
        bn.backward(x)
        both = world.calls - before
        bn.eval()(x)
        bn.backward(x)
        with bn.calibrate():
            bn(x)
            bn(x)
        return both, world.calls - before

    assert values(world.run(work)) == [(2, 3), (2, 3)]


def test_rows_of_a_callable_are_checked():
    for given, error, words in (
        (lambda v: v, ValueError, r"expected rows of shape \(processes, 12\) from its gather, got \(12,\)"),
        (lambda v: v[None, :-1], ValueError, "processes, 12"),
        (lambda v: np.zeros((0, v.size)), ValueError, "processes, 12"),
        (lambda v: v[None].astype(np.float32), TypeError, "float64"),
        (lambda v: None, TypeError, "float64"),
    ):
        bn = BatchNorm(2, comm=given)
        with pytest.raises(error, match=words):
            bn(np.ones((3, 2), np.float32))
    bn = BatchNorm(2, comm=lambda v: np.asfortranarray(np.stack([v, v]))[:, :])
    assert bn(np.eye(2)).shape == (2, 2)  # any memory order


@pytest.mark.parametrize("comm", [3, "world", [], World, object()])
def test_what_is_no_communicator_is_refused(comm):
    with pytest.raises(TypeError, match="comm: expected an mpi4py communicator"):
        BatchNorm(2, comm=comm)
    bn = BatchNorm(2)
    with pytest.raises(TypeError, match="comm: "):
        bn.comm = comm
    assert bn.comm is None


# --- faults (with real processes in test_engines.py) ---


@SIZES
def test_an_empty_part_and_unequal_ones(size):
    for errors in values(on_threads(size, lambda rank, comm: scenarios.unequal(rank, size, comm))):
        assert errors[0] <= 2e-6
        assert errors[1] <= 2e-6
        assert errors[2] <= 2e-7


@SIZES
def test_one_value_on_one_process_and_none_on_the_others(size):
    for first, then in values(on_threads(size, lambda rank, comm: scenarios.one_value(rank, size, comm))):
        assert first.startswith(
            "ValueError: Expected more than 1 value per channel when training, got 1 on all processes"
        )
        assert then == (2, 2)


@SIZES
def test_all_raise_where_one_refuses_its_input(size):
    found = values(on_threads(size, lambda rank, comm: scenarios.refused(rank, size, comm)))
    *others, last = found
    assert last[0].startswith("TypeError: x: expected dtype float16")
    assert last[2].startswith("ValueError: dy: expected shape")
    for first, tracked, second, third in others:
        assert first.startswith(f"RuntimeError: comm: process {size - 1} raised in a forward")
        assert "TypeError: x: expected dtype float16" in first
        assert tracked == 0
        assert second.startswith(f"RuntimeError: comm: process {size - 1} raised in a backward")
        assert third == (4, 2)  # the forward still waited for its backward


@SIZES
def test_layers_that_differ_are_named(size):
    for first, second, third in values(on_threads(size, lambda rank, comm: scenarios.unlike(rank, size, comm))):
        assert "got num_features 2 on process 0 and 3 on process 1" in first
        assert "got dtype float32 on process 0 and float64 on process 1" in second
        assert "got momentum 0.1 on process 0 and None on process 1" in third


@SIZES
@pytest.mark.parametrize("scenario", [scenarios.left_out, scenarios.modes])
def test_all_raise_where_processes_call_different_layers(size, scenario):
    for said in values(on_threads(size, lambda rank, comm: scenario(rank, size, comm))):
        assert said.startswith("RuntimeError: comm: process ")
        assert "all processes have to call the same layers in the same order" in said


def test_a_long_error_and_one_in_another_script_are_told():
    class Odd(Exception):
        pass

    def work(rank, comm):
        bn = BatchNorm(1, comm=comm)
        with bn.calibrate():
            bn(np.ones((2, 1)))
            if rank:
                raise Odd("列" * 1000)

    first, second = on_threads(2, work)
    assert isinstance(second, Odd)
    assert "process 1 raised in the end of a calibration (layer" in str(first)
    assert "Odd: 列列" in str(first)


def test_nonfinite_raise_raises_everywhere():
    def work(rank, comm):
        bn = BatchNorm(1, comm=comm, nonfinite="raise")
        return scenarios.outcome(lambda: bn(np.full((2, 1), np.nan if rank else 1.0))), bn.num_batches_tracked

    for said, tracked in values(on_threads(3, work)):
        assert said.startswith("FloatingPointError")
        assert tracked == 0


# --- calibration ---


def test_calibrations_gather_once_at_their_end(rng):
    x = rng.normal(1e5, 1, (40, 3)).astype(np.float32)

    def work(rank, comm):
        layers = [BatchNorm(3, comm=comm), BatchNorm(3), BatchNorm(3, comm=comm)]
        with bnfast.calibrate(layers):
            for batch in np.array_split(scenarios.part(x, rank, 3), 2) if rank != 1 else []:
                for bn in layers:
                    bn(batch)
            layers[1](x)
        return layers

    found = values(on_threads(3, work))
    whole = bnfast.moments(x)
    for layers in found:
        for bn in (layers[0], layers[2]):
            assert bn.exact_statistics.count == 40
            np.testing.assert_allclose(bn.exact_statistics.var(), whole.var(), rtol=1e-13)
            assert_same_bits(bn.running_var, found[0][0].running_var)
            assert bn.num_batches_tracked == 4


def test_a_calibration_that_saw_too_little_commits_nothing_anywhere():
    def work(rank, comm):
        bn = BatchNorm(1, comm=comm)
        with bn.calibrate():
            if rank == 0:
                bn(np.ones((1, 1)))
        return bn

    for error in on_threads(2, work):
        assert isinstance(error, RuntimeError)
        assert "expected at least 2 values a channel" in str(error)


def test_update_false_gathers_nothing_and_takes_part_in_the_forward():
    def work(rank, comm):
        bn = BatchNorm(1, comm=comm)
        bn(np.full((2, 1), float(rank)), update=False)
        return bn.batch_mean[0], bn.num_batches_tracked

    assert values(on_threads(2, work)) == [(0.5, 0), (0.5, 0)]


# --- copies, pickles, files ---


def test_copies_keep_the_communicator_and_pickles_the_fact(tmp_path):
    bn = BatchNorm(2, comm=alone)
    assert copy.copy(bn).comm is alone
    assert copy.deepcopy({"a": bn})["a"].comm is alone
    bn.save(tmp_path / "layer.npz")
    bnfast.save(tmp_path / "model.npz", {"bn": bn})
    x = np.eye(2)
    for again in (
        pickle.loads(pickle.dumps(bn)),
        BatchNorm.load(tmp_path / "layer.npz"),
        bnfast.load(tmp_path / "model.npz")["bn"],
    ):
        assert again.comm is None
        assert "comm=<to be set>" in repr(again)
        assert again.eval()(x).shape == (2, 2)
        with pytest.raises(RuntimeError, match=r"set bn\.comm to one, or to None"):
            again.train()(x)
        with pytest.raises(RuntimeError, match=r"set bn\.comm"):
            copy.deepcopy(again)(x)
        again.comm = None
        assert again(x).shape == (2, 2)
    plain = pickle.loads(pickle.dumps(BatchNorm(2)))
    assert plain(x).shape == (2, 2)


def test_check_layer_looks_at_this_process_alone(rng):
    def never(vector):
        raise AssertionError("asked")

    bn = BatchNorm(3, comm=never, dtype=np.float64)
    bnfast.check_layer(bn, rng.normal(size=(6, 3)))
    assert bn.comm is never


def test_the_communicator_can_be_set_later(rng):
    def work(rank, comm):
        bn = BatchNorm(1)
        bn(np.full((2, 1), float(rank)))
        bn.comm = comm
        bn(np.array([[rank], [rank]], float))
        mean = bn.batch_mean[0]
        bn.comm = None
        bn(np.full((2, 1), float(rank)))
        return mean, bn.batch_mean[0]

    assert values(on_threads(2, work)) == [(0.5, 0.0), (0.5, 1.0)]


def test_rows_that_a_callable_gives_are_left_alone(rng):
    kept = []

    def gather(vector):
        kept.append((np.stack([vector, vector]), np.stack([vector, vector])))
        return kept[-1][0]

    bn = BatchNorm(3, comm=gather)
    bn(rng.normal(size=(20, 3)))
    bn.backward(rng.normal(size=(20, 3)))
    assert len(kept) == 3
    assert all(np.array_equal(given, copy) for given, copy in kept)
