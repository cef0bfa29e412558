"""Pickles: those of 0.1.0 for ever, new ones by their public names, damaged ones refused.

What copies share and keep is in test_layer_state.py.
"""

import json
import pickle
import pickletools

import numpy as np
import pytest
from fuzz_state import KINDS_OF_LAYERS, layers
from kept import raw
from places import FIXTURES
from scripts import run_script

import bnfast
from bnfast import BatchNorm, Moments, StandardScaler, StateError

OLD = FIXTURES / "pickles-0.1.0"
EXPECTED = json.loads((OLD / "expected.json").read_text(encoding="utf-8"))
PROTOCOLS = range(2, 6)


# --- of 0.1.0 ------------------------------------------------------------------------------------------------


def found(thing, names):
    """What an object has under these names of expected.json, written as there."""
    values = {name: getattr(thing, name) for name in names if hasattr(thing, name)}
    if isinstance(thing, BatchNorm):
        exact = thing.exact_statistics
        values |= {**thing.state_dict(), "exact": exact and [exact.count, exact.mean, exact.m2]}
    return json.loads(json.dumps(values, default=lambda array: [str(array.dtype), array.tobytes().hex()]))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", EXPECTED)
def test_a_pickle_of_0_1_0_comes_back_to_the_bit(name, protocol):
    thing = pickle.loads((OLD / f"{name}-{protocol}.pkl").read_bytes())
    assert found(thing, EXPECTED[name]) == EXPECTED[name]
    again = pickle.loads(pickle.dumps(thing, protocol))
    assert type(again) is type(thing)
    assert found(again, EXPECTED[name]) == EXPECTED[name]
    if isinstance(thing, BatchNorm):
        assert raw(again) == raw(thing)
        assert (thing.nonfinite, thing.activation, thing.negative_slope) == ("propagate", None, 0.01)
        assert vars(thing).keys() == vars(BatchNorm(3)).keys() | ({"note"} if name == "attribute" else set())
        assert thing.num_batches_skipped.tolist() == [0, 0, 0]


@pytest.mark.parametrize("protocol", [0, 1])
def test_the_oldest_protocols_of_pickle_hold_a_layer_to_the_bit(protocol):
    bn = pickle.loads((OLD / "trained-2.pkl").read_bytes())
    assert raw(pickle.loads(pickle.dumps(bn, protocol))) == raw(bn)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_the_old_pickles_hold_besides(protocol):
    things = {name: pickle.loads((OLD / f"{name}-{protocol}.pkl").read_bytes()) for name in EXPECTED}
    assert things["attribute"].note == {"role": "first"}
    assert type(things["subclass"]).__name__ == "Named"
    assert things["subclass"].label == "subclass"
    np.testing.assert_array_equal(things["nan"].running_mean, [*things["nan"].running_mean[:2], np.nan])
    aside, calibrated, averages = things["set-aside"], things["calibrated"], things["attribute"].state_dict()
    assert raw(aside.state_dict()) == raw(averages)
    assert raw(aside.use_statistics("exact")) == raw(calibrated)
    assert raw(calibrated.use_statistics("running").state_dict()) == raw(averages)


FRESH = """
import json, pickle, sys
if "before" in sys.argv:
    import bnfast.moments, bnfast.scaler, bnfast.layer  # as a program of 0.1.0 may
things = [pickle.load(open(path, "rb")) for path in sys.argv[1:] if path != "before"]
import types
import bnfast, bnfast.moments
assert isinstance(bnfast.moments, types.FunctionType), bnfast.moments
assert bnfast.moments([[1.0], [3.0]]).mean == 2
from bnfast import moments
assert moments is bnfast.moments
from bnfast.moments import Moments
from bnfast.scaler import StandardScaler
from bnfast.layer import BatchNorm, _Averaged
assert (Moments, StandardScaler, BatchNorm) == (bnfast.Moments, bnfast.StandardScaler, bnfast.BatchNorm)
assert not hasattr(bnfast, "scaler")
print(json.dumps([type(thing).__qualname__ for thing in things]))
"""


@pytest.mark.parametrize("before", [[], ["before"]], ids=["pickle_first", "import_first"])
def test_the_old_names_lead_to_the_classes_in_a_fresh_process(before):
    paths = [OLD / f"{name}-{protocol}.pkl" for protocol in PROTOCOLS for name in ("moments", "scaler", "calibrated")]
    names = json.loads(run_script(FRESH, *before, *paths))
    assert names == ["Moments", "StandardScaler", "BatchNorm"] * 4


def test_the_old_names_lead_to_the_classes():
    for module, name in (("moments", "Moments"), ("scaler", "StandardScaler"), ("layer", "BatchNorm")):
        old = pickle.loads(f"cbnfast.{module}\n{name}\n.".encode())
        assert old is getattr(bnfast, name)
    make = pickle.loads(b"cbnfast.layer\n_Averaged\n.")
    assert make(1, 2, 3) == (1, 2, 3)
    assert callable(bnfast.moments)


# --- new ones ------------------------------------------------------------------------------------------------


def globals_of(pickled):
    """The names of bnfast's that a pickle of protocol 2 or 3 looks up."""
    looked_up = [argument for opcode, argument, _ in pickletools.genops(pickled) if opcode.name == "GLOBAL"]
    return {name for name in looked_up if name.startswith("bnfast")}


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("bn", layers(), ids=KINDS_OF_LAYERS)
def test_a_layer_comes_back_to_the_bit(bn, protocol):
    again = pickle.loads(pickle.dumps(bn, protocol))
    assert raw(again) == raw(bn)
    assert again.num_batches_skipped.tolist() == bn.num_batches_skipped.tolist()
    x = np.array([[1.0, 5.0], [2.0, 3.0]])[:, : bn.num_features]
    assert raw(again(x)) == raw(bn(x))
    assert raw(again) == raw(bn)


def test_new_pickles_name_the_public_classes():
    scaler = StandardScaler().fit([[1.0], [2.0]])
    for thing in (layers()[1], Moments(2, [1.0], [2.0]), scaler, StateError("x")):
        name = f"bnfast {type(thing).__name__}"
        assert name in globals_of(pickle.dumps(thing, 2))
        assert globals_of(pickle.dumps(thing, 2)) <= {name, "bnfast Moments"}


def test_a_pickle_says_its_format_and_what_it_holds():
    kept = layers()[1].__getstate__()
    names = ["format", "attributes", "options", "training", "values", "counts", "exact", "averages"]
    assert list(kept) == names
    assert kept["format"] == 2


def old_state(name):
    """What a pickle of 0.1.0 hands to __setstate__."""

    class Caught:
        def __setstate__(self, state):
            self.state = state

    class Catching(pickle.Unpickler):
        def find_class(self, module, name):
            return Caught if name == "BatchNorm" else super().find_class(module, name)

    with open(OLD / f"{name}-4.pkl", "rb") as file:
        return Catching(file).load().state


def states():
    """Of both formats, with all parts."""
    return {"format_1": old_state("calibrated"), "format_2": layers()[4].__getstate__()}


def test_a_pickle_of_a_newer_format_is_refused():
    for kept in states().values():
        for value in (3, 0, "1", True, None, 2.0, 10**400):
            bn = layers()[0]
            before = raw(bn)
            with pytest.raises(StateError, match="format"):
                bn.__setstate__({**kept, "format": value})
            assert raw(bn) == before
    bn, kept = layers()[0], old_state("calibrated")
    bn.__setstate__({name: value for name, value in kept.items() if name != "format"})  # of before there were formats
    assert raw(bn) == raw(pickle.loads((OLD / "calibrated-4.pkl").read_bytes()))


# --- damaged ones --------------------------------------------------------------------------------------------


def options(s):
    return s["options"] if "options" in s else s["attributes"]


def values(s):
    return s["values" if "values" in s else "state"]


def without_values(s):
    s["values" if "values" in s else "state"] = {}


def averages(s, *new):
    new_format = "averages" in s
    s["averages" if new_format else "averaged"] = (*new, None, None) if new_format else new


def training(s, value):
    (s if "training" in s else s["attributes"])["training"] = value


C = {"format_1": 3, "format_2": 2}
BOTH = {
    "extra_part": lambda s: s.update(other=1),
    "attributes_not_named": lambda s: s["attributes"].update({1: 2}),
    "attributes_none": lambda s: s.update(attributes=None),
    "values_none": lambda s: s.update({"values" if "values" in s else "state": None}),
    "training_a_list": lambda s: training(s, []),
    "affine_a_number": lambda s: options(s).update(affine=1),
    "features_huge": lambda s: (options(s).update(num_features=2**50, affine=False), without_values(s)),
    "features_large": lambda s: (options(s).update(num_features=2**33), without_values(s)),
    "features_huge_with_arrays": lambda s: options(s).update(num_features=2**50),
    "features_true": lambda s: options(s).update(num_features=True),
    "no_eps": lambda s: options(s).pop("eps"),
    "statistics_not_tracked": lambda s: (
        options(s).update(track_running_stats=False),
        [values(s).pop(name) for name in ("running_mean", "running_var", "num_batches_tracked")],
    ),
    "weight_a_table": lambda s: values(s).update(weight=np.ones((2, 2))),
    "mean_of_text": lambda s: values(s).update(running_mean=np.array(["a"] * len(values(s)["running_mean"]))),
    "var_missing": lambda s: values(s).pop("running_var"),
    "batches_negative": lambda s: values(s).update(num_batches_tracked=-1),
    "batches_huge": lambda s: values(s).update(num_batches_tracked=2**63),
    "exact_short": lambda s: s.update(exact=(Moments(3, [0.0], [0.0]), 1)),
    "exact_no_moments": lambda s: s.update(exact=(1, 2)),
    "exact_one_part": lambda s: s.update(exact=(1,)),
    "exact_batches_negative": lambda s: s.update(exact=(s["exact"][0], -1)),
    "averages_alone": lambda s: s.update(exact=None),
    "averages_short": lambda s: averages(s, np.ones(1), np.ones(1), 1),
    "averages_of_two": lambda s: averages(s, np.ones(2), np.ones(2)),
}
NEW = {
    "training_missing_and_no_default": lambda s: s.pop("values"),
    "options_a_list": lambda s: s.update(options=[1]),
    "option_unknown": lambda s: options(s).update(other=1),
    "nonfinite_unknown": lambda s: options(s).update(nonfinite="no"),
    "activation_unknown": lambda s: options(s).update(activation="gelu"),
    "activation_array": lambda s: options(s).update(activation=np.ones(2)),
    "slope_two": lambda s: options(s).update(negative_slope=2.0),
    "slope_text": lambda s: options(s).update(negative_slope="0.1"),
    "counts_one": lambda s: s.update(counts=(None,)),
    "counts_none": lambda s: s.update(counts=None),
    "counts_negative": lambda s: s.update(counts=(np.array([-1, 1]), None)),
    "counts_of_floats": lambda s: s.update(counts=(None, np.ones(2))),
    "counts_short": lambda s: s.update(counts=(None, np.ones(1, np.int64))),
    "counts_without_statistics": lambda s: (
        BOTH["statistics_not_tracked"](s),
        s.update(exact=None, averages=None),
    ),
    "averages_counts_short": lambda s: s.update(averages=(*s["averages"][:4], np.ones(1, np.int64))),
}
TAMPERED = [
    *(pytest.param(kind, change, id=f"{kind}-{name}") for kind in C for name, change in BOTH.items()),
    *(pytest.param("format_2", change, id=name) for name, change in NEW.items()),
]


@pytest.mark.parametrize(("kind", "change"), TAMPERED)
def test_a_tampered_pickle_leaves_the_layer_as_it_was(kind, change):
    kept, bn = states()[kind], layers()[0]
    bn.note = "mine"
    before, attributes = raw(bn), dict(vars(bn))
    change(kept)
    with pytest.raises(StateError):
        bn.__setstate__(kept)
    assert raw(bn) == before
    assert vars(bn) == attributes


@pytest.mark.parametrize("kind", C)
def test_an_untampered_pickle_is_taken(kind):
    bn = layers()[0]
    bn.__setstate__(states()[kind])
    assert bn.num_features == C[kind]
    assert bn.statistics_in_use == "exact"


@pytest.mark.parametrize("kind", C)
def test_statistics_that_eval_mode_could_not_use_come_back_in_pickles(kind):
    """They had to come from somewhere; files and dictionaries refuse them, and eval mode."""
    kept, bn = states()[kind], layers()[0]
    values(kept)["running_var"] = -np.ones(C[kind])
    bn.__setstate__(kept)
    with pytest.raises(ValueError, match=r"running_var.*-1"):
        bn.eval()(np.ones((2, C[kind]), np.float32))


SCALERS = {
    "missing": lambda s: s.pop("mean_") is None or None,
    "features": lambda s: s.update(n_features_in_=3),
    "features_text": lambda s: s.update(n_features_in_="2"),
    "mean_short": lambda s: s.update(mean_=np.ones(1)),
    "mean_text": lambda s: s.update(mean_=np.array(["a", "b"])),
    "mean_objects": lambda s: s.update(mean_=np.array([None, 1.0])),
    "var_negative": lambda s: s.update(var_=-np.ones(2)),
    "scale_a_table": lambda s: s.update(scale_=np.ones((2, 2))),
    "samples_negative": lambda s: s.update(n_samples_seen_=-1),
    "samples_none": lambda s: s.update(n_samples_seen_=None),
    "names_short": lambda s: s.update(feature_names_in_=np.array(["a"], object)),
}


@pytest.mark.parametrize("change", SCALERS.values(), ids=SCALERS)
def test_a_tampered_pickle_of_a_scaler_is_refused(change):
    scaler = StandardScaler().fit([[1.0, 2.0], [3.0, 5.0]])
    kept, other = dict(vars(scaler)), StandardScaler(copy=False)
    change(kept)
    with pytest.raises(StateError):
        other.__setstate__(kept)
    assert vars(other) == vars(StandardScaler(copy=False))


def test_a_tampered_pickle_of_moments_is_refused():
    make, (count, mean, m2) = Moments(3, [1.0], [2.0]).__reduce__()
    for arguments in ((-1, mean, m2), (count, mean, -m2), (count, mean, [1.0, 2.0]), (np.nan, mean, m2)):
        with pytest.raises((TypeError, ValueError)):
            make(*arguments)


class Awkward:
    """Fits nowhere."""

    def __array__(self, dtype=None, copy=None):
        raise LookupError("no array today")

    def __iter__(self):
        raise OSError("no items either")


JUNK = [
    None, True, -1, 2**70, 1.5, float("nan"), "text", b"bytes", (), (1, 2), [1], [[1], [2, 3]], {}, {"a": 1}, {1: 2},
    np.ones(2), np.ones((2, 2)), np.ones(3), np.array("x"), np.array([None, None]), np.float32(1), np.ones(2, np.int64),
    Moments(3, [1.0, 2.0], [1.0, 2.0]), Moments(1, [1.0], [0.0]), 1j, Awkward(), Awkward, object(), len,
]  # fmt: skip


def places(value, path=()):
    """Where something may be replaced in nested dicts and tuples."""
    yield path
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, tuple) else ()
    for key, part in parts:
        yield from places(part, (*path, key))


def replaced(value, path, junk):
    if not path:
        return junk
    if isinstance(value, dict):
        return {**value, path[0]: replaced(value[path[0]], path[1:], junk)}
    return (*value[: path[0]], replaced(value[path[0]], path[1:], junk), *value[path[0] + 1 :])


@pytest.mark.parametrize("kind", C)
def test_anything_anywhere_in_a_pickle_gives_a_layer_or_stateerror(kind):
    kept, refusals = states()[kind], 0
    for path in places(kept):
        for junk in JUNK:
            bn = layers()[0]
            before = raw(bn)
            try:
                bn.__setstate__(replaced(kept, path, junk))
            except StateError:
                refusals += 1
                assert raw(bn) == before
            else:
                bn.state_dict()
                pickle.dumps(bn._kept())
    assert refusals > 300


@pytest.mark.parametrize("kind", range(len(KINDS_OF_LAYERS)), ids=KINDS_OF_LAYERS)
def test_anything_anywhere_in_a_dictionary_is_taken_whole_or_refused_whole(kind):
    state = layers()[kind].state_dict()
    for path in places(state):
        for junk in JUNK:
            bn = layers()[kind]
            before = raw(bn)
            try:
                bn.load_state_dict(replaced(state, path, junk))
            except StateError:
                assert raw(bn) == before
            else:
                bn._encoded()
