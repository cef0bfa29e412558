"""State dictionaries, copies and pickles of a layer."""

import copy
import pickle

import numpy as np
import pytest
from layers import CHANNELS, assert_close, batch, everything, normalised, statistics, trained

from bnfast import BatchNorm, StateError

# --- state_dict ----------------------------------------------------------------------------------------------


def test_state_dict_has_pytorchs_names_and_copies():
    bn = trained()
    state = bn.state_dict()
    assert {name: (value.dtype, value.shape) for name, value in state.items()} == {
        "weight": (np.float32, (CHANNELS,)),
        "bias": (np.float32, (CHANNELS,)),
        "running_mean": (np.float64, (CHANNELS,)),
        "running_var": (np.float64, (CHANNELS,)),
        "num_batches_tracked": (np.int64, ()),
    }
    before = everything(bn)
    for value in state.values():
        value[...] = 77
    assert everything(bn) == before


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": np.float64}, {"affine": False}, {"track_running_stats": False}],
    ids=["usual", "float64", "no_parameters", "no_statistics"],
)
def test_state_dict_round_trip_is_exact(options):
    bn, other = trained(**options), BatchNorm(CHANNELS, **options)
    other.load_state_dict(bn.state_dict())
    assert statistics(other) == statistics(bn)
    x = batch(seed=4, dtype=np.float32)
    np.testing.assert_array_equal(other.eval()(x), bn.eval()(x))


def test_loading_copies_and_takes_lists():
    bn = BatchNorm(2)
    source = {"weight": np.array([2.0, 3.0]), "bias": [0.5, 1.5], "running_mean": [7.0, 8.0], "running_var": [1.0, 0.0]}
    bn.load_state_dict({**source, "num_batches_tracked": 5})
    source["weight"][:] = 99
    assert (bn.gamma.tolist(), bn.beta.tolist()) == ([2.0, 3.0], [0.5, 1.5])
    assert bn.gamma.dtype == np.float32
    assert (bn.running_mean.tolist(), bn.running_var.tolist()) == ([7.0, 8.0], [1.0, 0.0])
    assert bn.num_batches_tracked == 5


def test_loading_keeps_the_arrays_an_optimiser_holds():
    bn, other = BatchNorm(CHANNELS, dtype=np.float64), trained(dtype=np.float64)
    gamma, beta = bn.gamma, bn.beta
    bn.load_state_dict(other.state_dict())
    assert bn.gamma is gamma
    assert bn.beta is beta
    gamma += 1.0
    x = batch()
    assert_close(bn(x), normalised(x, x.mean(0), x.var(0), other.gamma + 1.0, other.beta))


class _RefusesToBeAnArray:
    def __array__(self, dtype=None, copy=None):
        raise LookupError("no array today")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight": None}, ["weight", "real numbers", "object"]),
        ({"weight": [True, False, True]}, ["weight", "real numbers", "bool"]),
        ({"weight": [1j, 2j, 3j]}, ["weight", "real numbers", "complex128"]),
        ({"weight": [1.0, 2.0]}, ["weight", "(3,)", "(2,)"]),
        ({"weight": [[1.0, 2.0, 3.0]]}, ["weight", "(3,)", "(1, 3)"]),
        ({"weight": [1.0, -1e300, 3.0]}, ["weight", "float32 can hold", "-1e+300", "channel 1"]),
        ({"bias": 1.0}, ["bias", "(3,)", "()"]),
        ({"bias": _RefusesToBeAnArray()}, ["bias", "no array today"]),
        ({"bias": [[1.0], [2.0, 3.0]]}, ["bias"]),
        ({"running_mean": ["a", "b", "c"]}, ["running_mean", "real numbers"]),
        ({"running_mean": [1.0] * 4}, ["running_mean", "(3,)", "(4,)"]),
        ({"running_var": [1.0, -1.0, 1.0]}, ["running_var", "var + eps above 0", "channel 1"]),
        ({"running_var": [1.0, np.nan, 1.0]}, ["running_var", "var + eps above 0", "channel 1"]),
        ({"num_batches_tracked": -1}, ["num_batches_tracked", "-1"]),
        ({"num_batches_tracked": 1.0}, ["num_batches_tracked", "1.0"]),
        ({"num_batches_tracked": [1, 2]}, ["num_batches_tracked", "[1, 2]"]),
        ({"num_batches_tracked": None}, ["num_batches_tracked", "None"]),
        ({"num_batches_tracked": True}, ["num_batches_tracked", "True"]),
        ({"num_batches_tracked": [[1], [2, 3]]}, ["num_batches_tracked"]),
        ({"num_batches_tracked": _RefusesToBeAnArray()}, ["num_batches_tracked"]),
        ({"num_batches_tracked": 2**63}, ["num_batches_tracked"]),  # would not fit into state_dict's int64
        ({"extra": 1.0}, ["unknown", "extra"]),
        ({7: 1.0}, ["unknown", "7"]),
    ],
)
def test_a_wrong_state_is_refused_and_the_layer_stays(change, words):
    bn = trained()
    gamma, before = bn.gamma, everything(bn)
    with pytest.raises(StateError) as caught:
        bn.load_state_dict({**BatchNorm(CHANNELS).state_dict(), **change})
    for word in words:
        assert word in str(caught.value)
    assert everything(bn) == before
    assert bn.gamma is gamma
    bn.state_dict()


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_a_missing_key_is_refused_and_the_layer_stays(name):
    bn, state = trained(), BatchNorm(CHANNELS).state_dict()
    before = everything(bn)
    del state[name]
    with pytest.raises(StateError, match=f"missing.*{name}"):
        bn.load_state_dict(state)
    assert everything(bn) == before


@pytest.mark.parametrize("state", [None, [], "weight", 1])
def test_a_state_that_is_no_mapping_is_refused(state):
    with pytest.raises(StateError, match="mapping"):
        BatchNorm(CHANNELS).load_state_dict(state)


def test_the_keys_follow_the_layers_options():
    with pytest.raises(StateError, match=r"unknown.*bias"):
        BatchNorm(CHANNELS, affine=False).load_state_dict(trained().state_dict())
    with pytest.raises(StateError, match=r"unknown.*running_mean"):
        BatchNorm(CHANNELS, track_running_stats=False).load_state_dict(trained().state_dict())


def test_state_error_is_a_value_error():
    assert issubclass(StateError, ValueError)


def test_a_gamma_that_cannot_be_written_leaves_the_layer_as_it_was():
    bn = trained()
    bn.beta.flags.writeable = False
    before = everything(bn)
    for call in (lambda: bn.load_state_dict(BatchNorm(CHANNELS).state_dict()), bn.reset_parameters):
        with pytest.raises(ValueError, match="beta"):
            call()
        assert everything(bn) == before


def test_state_goes_to_pytorch_and_back():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: nothing to exchange states with")
    rng = np.random.default_rng(0)
    x = rng.normal(3.0, 2.0, (4, CHANNELS, 5, 6)).astype(np.float32)
    theirs = torch.nn.BatchNorm2d(CHANNELS)
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
        theirs.bias.copy_(torch.tensor([-1.0, 0.0, 1.0]))
    for _ in range(3):
        theirs(torch.from_numpy(rng.normal(3.0, 2.0, x.shape).astype(np.float32)))

    ours = BatchNorm(CHANNELS)
    ours.load_state_dict(theirs.state_dict())
    assert ours.num_batches_tracked == 3
    back = torch.nn.BatchNorm2d(CHANNELS)
    back.load_state_dict({name: torch.as_tensor(value) for name, value in ours.state_dict().items()})
    for name, value in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[name], value), name

    with torch.no_grad():
        expected = theirs.eval()(torch.from_numpy(x)).numpy()
        assert torch.equal(back.eval()(torch.from_numpy(x)), torch.from_numpy(expected))
    # PyTorch computes x * scale + shift in float32: a few roundings of values below 10
    np.testing.assert_allclose(ours.eval()(x), expected, rtol=0, atol=3e-6)


# --- pickle and copies ---------------------------------------------------------------------------------------


class Before:
    pass


class Mixed(Before, BatchNorm):
    pass


def test_a_subclass_may_have_another_base_before():
    bn = Mixed(CHANNELS)
    bn(batch())
    for again in (copy.copy(bn), copy.deepcopy(bn), pickle.loads(pickle.dumps(bn)), Mixed._decoded(bn._encoded())):
        assert type(again) is Mixed
        assert statistics(again) == statistics(bn)


class Named(BatchNorm):
    """At module level, so that pickle finds it."""

    def __init__(self, label):
        super().__init__(CHANNELS, momentum=None, axis=-1, dtype=np.float64)
        self.label = label
        self.history = [1, 2]


def unpickled(protocol):
    return lambda bn: pickle.loads(pickle.dumps(bn, protocol))


WAYS = {f"pickle_{n}": unpickled(n) for n in range(2, 6)} | {"copy": copy.copy, "deepcopy": copy.deepcopy}
OPTIONS = {
    "usual": {},
    "none_usual": {
        "axis": -1, "eps": 1e-3, "momentum": None, "unbiased_running_var": False, "dtype": np.float64,
    },
    "no_parameters": {"affine": False},
    "no_statistics": {"track_running_stats": False},
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("training", [True, False])
def test_a_copy_is_the_same_layer_bit_for_bit(way, options, training):
    bn = trained(**options).train(training)
    other = way(bn)
    assert type(other) is BatchNorm
    assert statistics(other) == statistics(bn)
    assert repr(other) == repr(bn)
    assert other.training is training
    x = batch(seed=5)
    np.testing.assert_array_equal(other(x), bn(x))
    assert statistics(other) == statistics(bn)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_copy_shares_nothing_that_changes(way):
    bn = trained()
    other = way(bn)
    before = everything(bn)
    for name in ("gamma", "beta", "running_mean", "running_var"):
        assert not np.shares_memory(getattr(bn, name), getattr(other, name))
        if name in ("gamma", "beta"):
            getattr(other, name)[:] = 9.0
    other(batch(seed=6, dtype=np.float32))
    assert everything(bn) == before


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_copy_has_no_forward_behind_it(way):
    other = way(trained())
    assert other.gradients() == {}
    with pytest.raises(RuntimeError, match="expected a forward"):
        other.backward(batch(dtype=np.float32))


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_subclass_and_extra_attributes_survive(way):
    bn = Named("first")
    bn.added_later = {"a": 1}
    bn(batch())
    other = way(bn)
    assert type(other) is Named
    assert (other.label, other.history, other.added_later) == ("first", [1, 2], {"a": 1})
    assert statistics(other) == statistics(bn)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_a_layer_that_has_met_nan_can_still_be_copied(way):
    bn, x = trained(), batch(dtype=np.float32)
    x[0, 1] = np.nan
    bn(x)
    assert np.isnan(bn.running_var[1])
    assert statistics(way(bn)) == statistics(bn)
