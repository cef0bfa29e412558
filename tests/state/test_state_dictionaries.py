"""State dictionaries: what is in one, whose keys have a prefix, what others saved, what cannot be used.

Wrong shapes, kinds and keys are in test_layer_state.py.
"""

import numpy as np
import pytest
from fuzz_state import KINDS_OF_LAYERS, layers
from kept import raw

from bnfast import BatchNorm, StateError

NAMES = {
    "usual": ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"],
    "exact": ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"],
    "no_parameters": ["running_mean", "running_var", "num_batches_tracked"],
    "nothing": [],
    "skipping": ["weight", "running_mean", "running_var", "num_batches_tracked"],
    "beta": ["bias", "running_mean", "running_var", "num_batches_tracked"],
}
MOST = 2**63 - 1


def like(bn):
    """A fresh layer made as this one was."""
    return BatchNorm(**bn._given_options())


def refused(bn, state, match, **how):
    before = raw(bn)
    with pytest.raises(StateError, match=match) as caught:
        bn.load_state_dict(state, **how)
    assert raw(bn) == before
    return str(caught.value)


# --- what is in one ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "bn"), list(zip(KINDS_OF_LAYERS, layers(), strict=True)), ids=KINDS_OF_LAYERS)
def test_a_dictionary_has_what_the_layer_has_in_use_and_comes_back_to_the_bit(kind, bn):
    state, other = bn.state_dict(), like(bn)
    assert list(state) == NAMES[kind]
    other.load_state_dict(state)
    assert raw(other.state_dict()) == raw(state)
    assert other.statistics_in_use == "running"
    assert other.exact_statistics is None
    other.load_state_dict({name: value.tolist() for name, value in state.items()})
    assert raw(other.state_dict()) == raw(state)


def test_the_keys_of_a_parameter_that_the_layer_has_not_are_unknown():
    state = BatchNorm(2).state_dict()
    refused(BatchNorm(2, affine="gamma"), state, r"unknown \['bias'\]")
    refused(BatchNorm(2, affine="beta"), state, r"unknown \['weight'\]")
    del state["bias"]
    refused(BatchNorm(2), state, r"missing \['bias'\]")
    BatchNorm(2, affine="gamma").load_state_dict(state)


def test_counts_of_what_was_skipped_are_not_in_it_and_start_again_after_a_load():
    """All batches of the dictionary count as averaged: it does not know better."""
    bn = BatchNorm(2, momentum=None, nonfinite="skip")
    with np.errstate(invalid="ignore"):
        for batch in ([[0.0, 0.0], [2.0, np.inf]], [[1.0, 1.0], [3.0, 3.0]]):
            bn(np.array(batch))
    assert bn.num_batches_skipped.tolist() == [0, 1]
    other = like(bn)
    other.load_state_dict(bn.state_dict())
    assert other.num_batches_skipped.tolist() == [0, 0]
    assert other.num_batches_tracked == bn.num_batches_tracked == 2
    for layer in (bn, other):
        layer(np.array([[5.0, 5.0], [7.0, 7.0]]))
    assert bn.running_mean.tolist() == [3.0, 4.0]  # of 1, 2, 6 and of 2, 6
    np.testing.assert_array_max_ulp(other.running_mean, np.array([3.0, (2 * 2 + 6) / 3]), 2)


def test_a_load_clears_the_counts_of_before():
    bn = layers()[4]
    assert bn.num_batches_skipped.any()
    bn.load_state_dict(bn.state_dict())
    assert not bn.num_batches_skipped.any()


# --- prefixes ------------------------------------------------------------------------------------------------


def of_a_model():
    """(dictionary of a model, its two layers)."""
    first, second = BatchNorm(2), BatchNorm(2, affine=False)
    first(np.array([[1.0, 2.0], [3.0, 5.0]]))
    state = {f"layer1.0.bn1.{name}": value for name, value in first.state_dict().items()}
    state |= {f"layer1.0.bn10.{name}": value for name, value in second.state_dict().items()}
    return {**state, "fc.weight": np.ones((2, 3)), "epoch": 3, 7: None}, first, second


@pytest.mark.parametrize("dot", ["", "."])
def test_a_prefix_takes_one_layer_out_of_a_model(dot):
    state, first, second = of_a_model()
    for prefix, expected in (("layer1.0.bn1", first), ("layer1.0.bn10", second)):
        bn = like(expected)
        bn.load_state_dict(state, prefix=prefix + dot)
        assert raw(bn.state_dict()) == raw(expected.state_dict())


def test_an_absent_prefix_names_the_layers_that_are_there():
    state, first, _ = of_a_model()
    for prefix in ("layer1.0", "bn1", "layer1.0.bn", ".", "layer1.0.bn1.."):
        message = refused(first, state, "begin with", prefix=prefix)
        assert message.endswith("; there are 'layer1.0.bn1', 'layer1.0.bn10'")
    many = {f"bn{n:02}.running_mean": [0.0] for n in range(20)}
    assert refused(first, many, "begin with", prefix="bn").endswith("'bn07', ...")
    assert refused(first, {"fc.weight": 1}, "begin with", prefix="bn").endswith("got none")


def test_a_whole_models_dictionary_without_a_prefix_is_recognised():
    state = {f"layer1.bn.{name}": value for name, value in BatchNorm(2).state_dict().items()}
    refused(BatchNorm(2), state, r"whole model\?.* prefix='layer1.bn'")


def test_a_prefix_leaves_no_key_of_the_layer_out():
    state, first, second = of_a_model()
    state["layer1.0.bn1.extra"] = 1
    refused(first, state, r"unknown \['extra'\]", prefix="layer1.0.bn1")
    refused(second, state, r"unknown \['bias', 'extra', 'weight'\]", prefix="layer1.0.bn1")
    del state["layer1.0.bn1.extra"], state["layer1.0.bn1.running_var"]
    refused(first, state, r"missing \['running_var'\]", prefix="layer1.0.bn1")


@pytest.mark.parametrize("prefix", [None, b"bn", 3, ["bn"]])
def test_a_prefix_is_text(prefix):
    with pytest.raises(TypeError, match="prefix: expected a str"):
        BatchNorm(2).load_state_dict({}, prefix=prefix)


# --- what others saved ---------------------------------------------------------------------------------------


def test_without_num_batches_tracked_it_is_0():
    bn, state = layers()[0], BatchNorm(2).state_dict()
    del state["num_batches_tracked"]
    assert bn.num_batches_tracked == 1
    bn.load_state_dict(state)
    assert bn.num_batches_tracked == 0
    bn.load_state_dict({f"a.{name}": value for name, value in state.items()}, prefix="a")
    assert bn.num_batches_tracked == 0
    untracked = BatchNorm(2, track_running_stats=False)
    untracked.load_state_dict({"weight": [1, 2], "bias": [0, 0]})
    refused(untracked, {"weight": [1, 2], "bias": [0, 0], "num_batches_tracked": 0}, "unknown")


def test_lists_of_integers_are_numbers():
    bn = BatchNorm(2)
    bn.load_state_dict(
        {"weight": [1, 2], "bias": (3, -4), "running_mean": [5, 6], "running_var": [7, 8], "num_batches_tracked": 9}
    )
    assert bn.gamma.tolist() == [1, 2]
    assert bn.beta.tolist() == [3, -4]
    assert (bn.running_mean.tolist(), bn.running_var.tolist(), bn.num_batches_tracked) == ([5, 6], [7, 8], 9)
    assert {array.dtype.name for array in bn.state_dict().values()} == {"float32", "float64", "int64"}
    bn.load_state_dict({**bn.state_dict(), "num_batches_tracked": [4]})  # some save it with one dimension
    assert bn.num_batches_tracked == 4


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_statistics_that_are_not_finite_are_refused_with_their_channel(name, value):
    state = {**BatchNorm(3).state_dict(), name: [1.0, 1.0, value]}
    message = refused(BatchNorm(3), state, f"{name}: expected finite values")
    assert f"got {value} in channel 2" in message


def test_a_variance_of_minus_eps_or_less_is_refused_with_its_channel():
    bn = BatchNorm(2, eps=1e-5)
    for value in (-1e-5, -1e-4, -1.0):
        message = refused(bn, {**bn.state_dict(), "running_var": [1.0, value]}, "running_var")
        assert f"got {value} in channel 1 (eps 1e-05)" in message
    bn = BatchNorm(2, eps=0.0)
    assert "got 0.0 in channel 1 (eps 0)" in refused(bn, {**bn.state_dict(), "running_var": [1.0, 0.0]}, "above 0")


def test_a_variance_slightly_below_0_is_taken_where_eps_makes_up_for_it():
    bn = BatchNorm(1, eps=1.5e-5, dtype=np.float64)
    bn.load_state_dict({**bn.state_dict(), "running_var": [-9.9998e-6]})
    y = bn.eval()(np.array([[1.0], [-2.0]]))
    np.testing.assert_allclose(y, np.array([[1.0], [-2.0]]) / np.sqrt(5.0002e-6), rtol=1e-9)
    assert raw(BatchNorm._decoded(bn._encoded())) == raw(bn)


def test_eps_0_is_enough_for_a_variance_above_0():
    bn = BatchNorm(2, eps=0.0, dtype=np.float64)
    bn.load_state_dict({**bn.state_dict(), "running_var": [4.0, 5e-324]})
    np.testing.assert_array_equal(bn.eval()(np.array([[3.0, 0.0]])), [[1.5, 0.0]])


def test_a_running_var_that_cannot_be_used_is_refused_when_it_is_set():
    bn = BatchNorm(2)
    before = raw(bn)
    for value in (np.inf, np.nan, -1.0, -1e-5):
        with pytest.raises(ValueError, match=r"running_var.*channel 1"):
            bn.running_var = [1.0, value]
    assert raw(bn) == before


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("nonfinite", ["propagate", "skip"])
def test_a_count_of_batches_stays_at_the_largest(momentum, nonfinite):
    bn = BatchNorm(1, momentum=momentum, nonfinite=nonfinite, dtype=np.float64)
    bn.load_state_dict({**bn.state_dict(), "num_batches_tracked": MOST - 1, "running_mean": [7.0]})
    for _ in range(3):
        bn(np.array([[1.0], [3.0]]))
        assert bn.num_batches_tracked == MOST
        assert bn.state_dict()["num_batches_tracked"].tolist() == MOST
    if momentum is None:
        np.testing.assert_array_equal(bn.running_mean, [7.0])
    again = BatchNorm._decoded(bn._encoded())
    assert raw(again) == raw(bn)
    assert raw(BatchNorm._made_of(bn._kept(), strict=True)) == raw(bn)


def test_a_count_that_int64_does_not_hold_is_refused():
    bn = BatchNorm(1)
    for value in (2**63, 2**64 - 1, np.uint64(2**63), 10**30, -1):
        refused(bn, {**bn.state_dict(), "num_batches_tracked": value}, "num_batches_tracked: expected one integer")
    bn.load_state_dict({**bn.state_dict(), "num_batches_tracked": np.uint64(MOST)})
    assert bn.num_batches_tracked == MOST
