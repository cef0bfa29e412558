"""Files of a model: exact round trips, living layers and arrays filled all or none, no damage that is accepted."""

import io
import json
import os
import pickle
import random
import re
import sys
import tracemalloc
import warnings
import zipfile

import numpy as np
import pytest
from campaign import short_and_long
from fuzz_state import archive, layers, members, models, npy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from interrupts import interrupted_at
from kept import raw
from layer_subclass import Named
from places import FIXTURES

import bnfast
from bnfast import BatchNorm, StateError
from bnfast.state import files, model

DESCRIPTION = "__bnfast__.npy"
FORMAT_1 = FIXTURES / "layer-format1.npz"
DTYPES = [
    "bool",
    *(f"{order}{kind}" for order in "<>" for kind in ("i2", "i4", "i8", "u2", "u4", "u8", "f2", "f4", "f8")),
]
DTYPES += ["i1", "u1"]


def native(entries):
    """What should come back: arrays in C order and in the machine's byte order."""
    return {
        name: value.astype(value.dtype.newbyteorder("=")) if isinstance(value, np.ndarray) else value
        for name, value in entries.items()
    }


def peak_of(function):
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# --- round trips ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entries", models(), ids=["every_kind", "layers", "arrays", "nothing"])
def test_a_file_keeps_everything(entries, tmp_path):
    bnfast.save(tmp_path / "model", entries)
    again = bnfast.load(tmp_path / "model")
    assert list(again) == list(entries)
    assert raw(again) == raw(native(entries))
    assert all(type(again[name]) is type(value) for name, value in entries.items())
    bnfast.save(str(tmp_path / "again"), again)
    assert (tmp_path / "again").read_bytes() == (tmp_path / "model").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["again", "model"]


LAYOUTS = [
    np.ascontiguousarray,
    np.asfortranarray,
    lambda a: np.repeat(a, 2, axis=-1)[..., ::2] if a.ndim else a,
    lambda a: a[::-1] if a.ndim else a,
    lambda a: np.broadcast_to(a, (2, *a.shape)),
    lambda a: np.frombuffer(b"\0" + a.tobytes(), a.dtype, offset=1).reshape(a.shape) if a.size else a,  # misaligned
    lambda a: a.view(np.memmap),
]


@st.composite
def any_array(draw):
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=3))
    array = draw(hnp.arrays(np.dtype(draw(st.sampled_from(DTYPES))), shape))
    return draw(st.sampled_from(LAYOUTS))(array)


ANY_NAME = st.text() | st.sampled_from(
    ["../x", "/", "", ".", "a.npy", "0.array", "__bnfast__", "a\0b", '"', "\\", "[{,"]
)
ANY_VALUE = (
    any_array()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.integers(0, len(layers()) - 1).map(lambda number: layers()[number])
)


@given(st.dictionaries(ANY_NAME, ANY_VALUE, max_size=8))
def test_any_model_comes_back_to_the_bit(entries):
    data = model._encoded(entries)
    again = model._decoded(data)
    assert list(again) == list(entries)
    assert raw(again) == raw(native(entries))
    assert model._encoded(again) == data


def test_what_is_loaded_is_new_and_writeable():
    for value in model._decoded(model._encoded(models()[2])).values():
        assert value.flags.carray
        assert value.base is None


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8"])
def test_every_bit_of_a_nan_is_kept(dtype):
    array = np.full(4, -1, f"<i{dtype[-1]}").view(dtype)
    array[1:] = [-0.0, np.inf, np.nan]
    assert raw(model._decoded(model._encoded({"a": array}))["a"]) == raw(array)


def test_every_bit_of_a_number_is_kept():
    payload = np.array(0xFFF8000000ABCDEF, np.uint64).view(np.float64).item()
    numbers = {"payload": payload, "-nan": -float("nan"), "-0": -0.0, "tiny": 5e-324, "inf": -float("inf")}
    numbers |= {"big": 3**20_000, "negative": -(10**400), "zero": 0, "true": True, "false": False}
    again = model._decoded(model._encoded(numbers))
    assert raw(again) == raw(numbers)
    assert {name: type(value) for name, value in again.items()} == {
        name: type(value) for name, value in numbers.items()
    }


def test_numpys_scalars_become_pythons_numbers():
    scalars = {"f4": np.float32(0.1), "f8": np.float64(0.1), "f2": np.float16(0.5), "i": np.int8(-3), "b": np.True_}
    scalars |= {"u": np.uint64(2**64 - 1), "s": np.str_("text")}
    again = model._decoded(model._encoded(scalars))
    assert raw(again) == raw({name: value.item() for name, value in scalars.items()})


def test_a_zero_dimensional_array_stays_one():
    again = model._decoded(model._encoded({"a": np.array(3, np.int16)}))["a"]
    assert raw(again) == raw(np.array(3, np.int16))


def test_bfloat16_goes_under_its_name(tmp_path, monkeypatch):
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed: there is no bfloat16")
    array = np.arange(-3, 3).astype(ml_dtypes.bfloat16).reshape(2, 3)
    arrays = {"c": array, "f": np.asfortranarray(array), "strided": array[:, ::2], "zero": array[:1, 0].reshape(())}
    bnfast.save(tmp_path / "model", {**arrays, "scalar": array[0, 0]})
    with np.load(tmp_path / "model") as file:
        assert b"bfloat16" in file["__bnfast__"].tobytes()
        np.testing.assert_array_equal(file["0.array"], array.view(np.uint16))
    again = bnfast.load(tmp_path / "model")
    assert again.pop("scalar") == -3.0
    assert raw(again) == raw({name: value.copy("C") for name, value in arrays.items()})
    filled = np.zeros_like(array)
    bnfast.load(tmp_path / "model", into={"c": filled})
    assert raw(filled) == raw(array)
    with pytest.raises(StateError, match=r"'c': expected uint16 \(2, 3\), got bfloat16 \(2, 3\)"):
        bnfast.load(tmp_path / "model", into={"c": np.zeros((2, 3), np.uint16)})
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ImportError, match="pip install ml_dtypes"):
        bnfast.load(tmp_path / "model")


def test_numpy_reads_it(tmp_path):
    bnfast.save(tmp_path / "model", {"../w": np.eye(2), "bn": layers()[0]})
    with np.load(tmp_path / "model") as file:
        description = json.loads(file["__bnfast__"].tobytes())
        assert (description["format"], description["kind"]) == (2, "model")
        assert [entry["name"] for entry in description["entries"]] == ["../w", "bn"]
        assert set(file.files) == {"__bnfast__", "0.array", *(f"1.{name}" for name in layers()[0].state_dict())}
        np.testing.assert_array_equal(file["0.array"], np.eye(2))
        np.testing.assert_array_equal(file["1.running_var"], layers()[0].running_var)


def test_names_are_data_and_never_paths(tmp_path):
    names = ["../x", "/etc/x", "a/../../b", "..\\x", "C:x", "x" * 5000, "\0"]
    bnfast.save(tmp_path / "model", dict.fromkeys(names, 1))
    with zipfile.ZipFile(tmp_path / "model") as file:
        assert file.namelist() == [DESCRIPTION, *(f"{number}.text.npy" for number in range(len(names)))]
    assert list(bnfast.load(tmp_path / "model")) == names


def test_halves_of_characters():
    """Python's strings may hold them: of file names that are no UTF-8, for example."""
    half, other = "\udcff", "\ud83d"
    values = {half: other + "\ude00", "b" + other: half}
    assert model._decoded(model._encoded(values)) == values
    with pytest.raises(ValueError, match="Unicode"):
        model._encoded({other + "\ude00": 1})


def test_an_array_may_hold_the_bytes_of_archives():
    data = model._encoded({str(number): number for number in range(100)})
    entries = {
        "archive": np.frombuffer(data, np.uint8),
        "directory": np.full(1000, 0x02014B50, np.int32),
        "text": "PK\5\6",
    }
    assert raw(model._decoded(model._encoded(entries))) == raw(entries)
    bn = BatchNorm(40)
    bn.gamma.view(np.int32)[:] = 0x02014B50
    assert raw(BatchNorm._decoded(bn._encoded())) == raw(bn)


def test_many_small_entries():
    """None of the limits on forged files is met by an honest one, however small its entries and long its names."""
    bare = {str(number): layers()[3] for number in range(500)}
    numbers = {f"encoder.layers.{number}.attention.self.query.normalisation": number for number in range(3000)}
    for entries in (bare, numbers, {str(n): True for n in range(2000)}, {"x" * 3000 + str(n): "" for n in range(50)}):
        assert raw(model._decoded(model._encoded(entries))) == raw(entries)


def test_more_members_than_a_small_archive_holds(monkeypatch):
    """From 65,535 on, or 4 GiB, the archive's directory is found in another way."""
    entries = {str(number): number for number in range(30)}
    small = model._encoded(entries)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 10)
    large = model._encoded(entries)
    assert large.count(files.END_64) > small.count(files.END_64)
    assert files._count_members(large) == files._count_members(small) == 31
    assert model._decoded(large) == entries


def test_entries_may_be_any_mapping_and_nothing_of_them_changes():
    class Entries(dict):
        pass

    array = np.arange(3.0)
    bn = layers()[0]
    entries, before = Entries(w=array, bn=bn), raw(bn)
    assert raw(model._decoded(model._encoded(entries))) == raw(dict(entries))
    assert raw(bn) == before
    assert array.tolist() == [0, 1, 2]


# --- what is not written -------------------------------------------------------------------------------------


def ruined():
    bn = BatchNorm(2)
    bn.beta[1] = np.inf
    return bn


NOT_WRITTEN = {
    "a_list": ([("a", 1)], TypeError, r"entries: expected a dict of names, got list"),
    "a_number_as_a_name": ({1: 2}, TypeError, r"entries: expected names that are strings, got 1"),
    "no_name": ({None: 2}, TypeError, r"names that are strings, got None"),
    "a_dict": ({"a": {"b": 1}}, TypeError, r"'a': .* got dict; give its values names of their own"),
    "list": ({"a": [1, 2]}, TypeError, r"got list; give its values names of their own"),
    "tuple": ({"a": (1, 2)}, TypeError, r"got tuple; give its values names of their own"),
    "none": ({"a": None}, TypeError, r"'a': expected a BatchNorm, .* got NoneType$"),
    "complex": ({"a": 1j}, TypeError, r"got complex$"),
    "bytes": ({"a": b"x"}, TypeError, r"got bytes$"),
    "moments": ({"a": bnfast.Moments(2, [1.0], [1.0])}, TypeError, r"got Moments$"),
    "a_class": ({"a": BatchNorm}, TypeError, r"got type$"),
    "objects": ({"a": np.array([None])}, TypeError, r"'a': expected an array of bool, .* got object"),
    "complex_array": ({"a": np.ones(2, complex)}, TypeError, r"got complex128"),
    "long_doubles": ({"a": np.ones(2, np.longdouble)}, TypeError, r"expected an array of bool"),
    "long_double": ({"a": np.longdouble(1)}, TypeError, r"'a': expected a BatchNorm"),
    "text_array": ({"a": np.array(["a"])}, TypeError, r"got <U1"),
    "dates": ({"a": np.array(["2020"], "M8[D]")}, TypeError, r"got datetime64\[D\]"),
    "a_date": ({"a": np.datetime64("2020", "ns")}, TypeError, r"got datetime64$"),  # whose item() is an int
    "structured": ({"a": np.zeros(2, "f4,f4")}, TypeError, r"expected an array of bool"),
    "masked": ({"a": np.ma.masked_array([1.0, 2.0], [0, 1])}, TypeError, r"'a': expected an array without a mask"),
    "no_bools": ({"a": np.array([2], np.uint8).view(bool)}, StateError, r"bools"),
    "a_ruined_layer": ({"good": layers()[0], "bad": ruined()}, StateError, r"'bad': bias: .* got inf in channel 1"),
}  # fmt: skip


@pytest.mark.parametrize(("entries", "error", "words"), NOT_WRITTEN.values(), ids=NOT_WRITTEN)
def test_what_could_not_be_loaded_is_not_written(entries, error, words, tmp_path):
    if isinstance(entries, dict) and np.dtype(np.longdouble).itemsize == 8 and "long" in words:
        pytest.skip("long double is double here")
    path = tmp_path / "model"
    bnfast.save(path, {"old": 1})
    with pytest.raises(error, match=words) as caught:
        bnfast.save(path, entries)
    assert type(caught.value) is error
    assert bnfast.load(path) == {"old": 1}


@pytest.mark.parametrize("path", [b"bytes", 3, None, io.BytesIO()])
def test_a_path_is_text(path):
    for call in (lambda: bnfast.save(path, {}), lambda: bnfast.load(path)):
        with pytest.raises(TypeError, match=r"path: expected str or os\.PathLike"):
            call()


# --- into ----------------------------------------------------------------------------------------------------


def trained(seed, cls=BatchNorm, **options):
    """A layer after a step, with exact statistics in use, in eval mode."""
    bn, rng = cls(3, **options), np.random.default_rng(seed)
    bn(rng.normal(5, 2, (8, 3)))
    bn.backward(np.ones((8, 3)))
    with bn.calibrate():
        bn(rng.normal(4, 2, (8, 3)))
    for parameter in bn.parameters().values():
        parameter[:] = rng.normal(size=3)
    return bn.eval()


@pytest.fixture
def path(tmp_path):
    """Of a file with two layers, two arrays and a number."""
    entries = {"a": trained(1), "b": trained(2, momentum=None, eps=1e-3, dtype=np.float64, affine="gamma")}
    entries |= {"w": np.arange(6.0).reshape(2, 3), "n": np.array([7, 8], np.int16), "epoch": 5}
    bnfast.save(tmp_path / "model", entries)
    return tmp_path / "model"


def living():
    """What the file of `path` may fill."""
    return {
        "a": BatchNorm(3, momentum=0.5, eps=1.0),
        "b": trained(3, dtype=np.float64, affine="gamma").train(),
        "w": np.zeros((2, 3)),
        "n": np.zeros(2, np.int16),
    }


def test_into_fills_the_very_objects(path):
    into, file = living(), bnfast.load(path)
    gamma, w = into["a"].gamma, into["w"]
    found = bnfast.load(path, into=into)
    assert list(found) == list(file)
    assert found["epoch"] == 5
    for name, target in into.items():
        assert found[name] is target
        assert raw(target) == raw(file[name])
    assert into["a"].gamma is gamma
    assert into["w"] is w
    assert into["a"].training is False
    assert (into["b"].eps, into["b"].momentum) == (1e-3, None)
    assert into["b"].statistics_in_use == "exact"
    assert into["b"].gradients() == {}
    x = np.random.default_rng(5).normal(size=(4, 3))
    for name in ("a", "b"):  # with the same numbers, in both modes
        assert raw(into[name](x)) == raw(file[name](x))
        assert raw(into[name].train()(x)) == raw(file[name].train()(x))
        assert raw(into[name]) == raw(file[name])


def test_into_may_name_some_of_the_entries(path):
    w = np.zeros((2, 3))
    found = bnfast.load(path, into={"w": w})
    assert found["w"] is w
    assert type(found["a"]) is BatchNorm
    assert raw({name: value for name, value in bnfast.load(path, into={}).items()}) == raw(found)


def test_a_subclass_comes_back_only_through_into(tmp_path):
    bn = trained(4, Named)
    bnfast.save(tmp_path / "model", {"bn": bn})
    assert type(bnfast.load(tmp_path / "model")["bn"]) is BatchNorm
    other = Named(3)
    other.note = "mine"
    assert bnfast.load(tmp_path / "model", into={"bn": other})["bn"] is other
    assert raw(other) == raw(bn)
    assert other.note == "mine"


def test_a_forward_of_before_still_has_its_backward(path):
    bn, twin, x = BatchNorm(3), BatchNorm(3), np.random.default_rng(0).normal(size=(4, 3))
    y, pullback = bn.vjp(x)
    twin(x)
    bnfast.load(path, into={"a": bn})
    np.testing.assert_array_equal(pullback(y), twin.backward(y))


def test_arrays_of_any_layout_are_filled(path):
    flat = np.zeros(20)
    targets = [
        np.zeros((2, 3), order="F"),
        flat[:12].reshape(2, 6)[:, ::2],
        flat[14:].reshape(2, 3)[::-1, ::-1],
        np.zeros((2, 3), ">f8"),
        np.zeros((2, 3)).view(np.recarray),
    ]
    for target in targets:
        assert bnfast.load(path, into={"w": target})["w"] is target
        np.testing.assert_array_equal(np.asarray(target), np.arange(6.0).reshape(2, 3))
    assert flat[[1, 3, 12, 13]].tolist() == [0] * 4


def test_parameters_may_be_views_of_one_array(path):
    flat, bn = np.zeros(8, np.float32), BatchNorm(3)
    bn.gamma, bn.beta = flat[1:4], flat[4:7]
    bnfast.load(path, into={"a": bn})
    expected = trained(1)
    np.testing.assert_array_equal(flat, [0, *expected.gamma, *expected.beta, 0])


READ_ONLY = np.zeros((2, 3))
READ_ONLY.flags.writeable = False
TWICE = BatchNorm(3)
BAD = {  # the last entry of into: what, error, words
    "missing": ("other", np.zeros(3), StateError, r"model: expected the entries of into, missing \['other'\]"),
    "missing_and_no_string": (3, np.zeros(3), StateError, r"missing \[3\]"),
    "layer_for_array": ("w", BatchNorm(3), StateError, r"'w': expected a layer in the file, got ndarray"),
    "layer_for_number": ("epoch", BatchNorm(3), StateError, r"'epoch': expected a layer in the file, got int"),
    "array_for_layer": ("a", np.zeros(3), StateError, r"'a': expected float64 \(3,\), got BatchNorm"),
    "array_for_number": ("epoch", np.zeros(()), StateError, r"'epoch': expected float64 \(\), got int"),
    "shape": ("w", np.zeros((3, 2)), StateError, r"'w': expected float64 \(3, 2\), got float64 \(2, 3\)"),
    "dimensions": ("w", np.zeros((1, 2, 3)), StateError, r"got float64 \(2, 3\)"),
    "dtype": ("w", np.zeros((2, 3), np.float32), StateError, r"'w': expected float32 \(2, 3\), got float64"),
    "read_only": ("w", READ_ONLY, TypeError, r"into: expected writeable arrays, got a read-only one for 'w'"),
    "masked": ("w", np.ma.zeros((2, 3)), TypeError, r"into: expected layers and arrays, got MaskedArray for 'w'"),
    "list": ("w", [[0.0] * 3] * 2, TypeError, r"into: expected layers and arrays, got list for 'w'"),
    "number": ("epoch", 3, TypeError, r"into: expected layers and arrays, got int for 'epoch'"),
    "features": ("a", BatchNorm(4), StateError, r"'a': expected num_features 4 as the layer of into has it, got 3"),
    "axis": ("a", BatchNorm(3, axis=-1), StateError, r"'a': expected axis -1"),
    "layers_dtype": ("a", BatchNorm(3, dtype=np.float64), StateError, r"'a': expected dtype"),
    "affine": ("a", BatchNorm(3, affine="gamma"), StateError, r"'a': expected affine 'gamma' .* got True"),
    "untracked": ("a", BatchNorm(3, track_running_stats=False), StateError, r"expected track_running_stats False"),
    "population": ("a", BatchNorm(3, unbiased_running_var=False), StateError, r"expected unbiased_running_var False"),
    "nonfinite": ("a", BatchNorm(3, nonfinite="skip"), StateError, r"expected nonfinite 'skip' .* got 'propagate'"),
    "activation": ("a", BatchNorm(3, activation="relu"), StateError, r"expected activation 'relu' .* got None"),
    "slope": ("a", BatchNorm(3, negative_slope=0.5), StateError, r"expected negative_slope 0.5 .* got 0.01"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "bad", "error", "words"), BAD.values(), ids=BAD)
def test_a_bad_entry_at_the_end_leaves_all_others_as_they_were(name, bad, error, words, path):
    into = {key: value for key, value in living().items() if key != name} | {name: bad}
    before = raw(into)
    with pytest.raises(error, match=words) as caught:
        bnfast.load(path, into=into)
    assert type(caught.value) is error
    assert raw(into) == before


def test_a_layer_or_array_twice_is_refused(path):
    bn, w = BatchNorm(3), np.zeros((2, 3))
    for into in ({"a": bn, "b": bn}, {"w": w, "n": w}):
        with pytest.raises(ValueError, match="into: expected each layer and array once"):
            bnfast.load(path, into=into)


@pytest.mark.parametrize("into", [[("a", 1)], "a", 3, [BatchNorm(3)]])
def test_into_is_a_dict(into, path):
    with pytest.raises(TypeError, match=r"into: expected a dict of names"):
        bnfast.load(path, into=into)


def test_a_parameter_that_can_no_longer_be_written_leaves_all_others_as_they_were(path):
    into = living()
    into["b"].gamma.flags.writeable = False
    before = raw(into)
    with pytest.raises(ValueError, match="gamma"):
        bnfast.load(path, into=into)
    assert raw(into) == before


def test_a_damaged_file_leaves_all_of_into_as_it_was(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    into = living()
    before = raw(into)
    with pytest.raises(StateError, match=r"model: damaged"):
        bnfast.load(path, into=into)
    assert raw(into) == before


CHANGING = ("layer", "state.layer_state", "state.model", "statistics.running")  # what may change living things


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the file, between open and with
@pytest.mark.skipif(sys.gettrace() is not None, reason="needs sys.settrace, which a debugger or coverage is using")
def test_an_interrupt_anywhere_leaves_all_before_or_all_after(path, monkeypatch):
    into = living()
    before = raw(into)
    bnfast.load(path, into=into)
    after = raw(into)
    assert all(before[name] != after[name] for name in into)
    found = model._decoded(path.read_bytes())
    monkeypatch.setattr(model, "_decoded", lambda data: found)  # which makes new things, and takes long
    ours = {sys.modules[f"bnfast.{name}"].__file__ for name in CHANGING}
    point, interrupted, faults, seen = 0, True, [], set()
    while interrupted:
        point += 1
        into = living()
        interrupted = interrupted_at(point, lambda into=into: bnfast.load(path, into=into), ours.__contains__)
        seen.add(raw(into) == after)
        if raw(into) not in (before, after):
            faults.append(point)
    assert point > 50
    assert not faults
    assert seen == {True, False}


# --- damage --------------------------------------------------------------------------------------------------


def refused(data, match=None, limit=10):
    """With StateError and never NumPy's advice to unpickle; and in no more memory than is said."""

    def attempt():
        with pytest.raises(StateError, match=match) as caught:
            model._decoded(bytes(data))
        assert "pickle" not in str(caught.value).lower()
        errors.append(caught.value)

    errors = []
    assert peak_of(attempt) < limit * len(data) + 1_000_000
    return errors[0]


@pytest.fixture(scope="module")
def good():
    rng = np.random.default_rng(0)
    return model._encoded({**models()[0], "w": rng.normal(size=(20, 30)), "bits": rng.integers(0, 255, 900, np.uint8)})


@pytest.mark.parametrize("flips", short_and_long(150, 2000))
def test_a_flipped_bit_is_refused(good, flips):
    bits = range(len(good) * 8)
    for bit in [*random.Random(1).sample(bits, flips), bits[0], bits[-1]]:
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(StateError):
            model._decoded(bytes(damaged))


@pytest.mark.parametrize("flips", short_and_long(300, 20_000))
def test_a_flipped_bit_under_a_right_checksum_is_refused_or_harmless(good, flips):
    """Many are in an array, and some in what zipfile does not look at."""
    refusals = 0
    for bit in random.Random(2).sample(range((len(good) - files.SEAL) * 8), flips):
        damaged = bytearray(good[: -files.SEAL])
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            found = model._decoded(files.sealed(bytes(damaged)))
        except StateError:
            refusals += 1
        else:
            assert model._decoded(model._encoded(found)).keys() == found.keys()
    assert refusals > flips // 10


def test_a_part_of_a_file_and_zeros_are_refused(good):
    for length in [*range(0, len(good), 512), len(good) - 1]:
        refused(good[:length])
        refused(good[length + 1 :])
        refused(good[:length] + bytes(min(512, len(good) - length)) + good[length + 512 :])
    refused(good + b"\0")


CANARY = []


class Canary:
    """Unpickled, it shows."""

    def __reduce__(self):
        return CANARY.append, (1,)


ENTRIES = {"bn": layers()[1], "w": np.ones((2, 3)), "on": True, "rate": 0.5, "epoch": 3, "text": "x"}
BN, W, ON, RATE, EPOCH, TEXT = range(6)  # where they are


def resealed(change):
    """A usual file with changed members, and a right checksum."""
    found = dict(members(model._encoded(ENTRIES)))
    changed = change(found)
    return archive(list((found if changed is None else changed).items()))


def described(change):
    """Changes the description, or gives another one."""

    def changed(found):
        description = json.loads(np.load(io.BytesIO(found[DESCRIPTION])).tobytes())
        other = change(description)
        text = json.dumps(description if other is None else other)
        found[DESCRIPTION] = npy(np.frombuffer(text.encode(), np.uint8))

    return changed


def entry(place, **changes):
    return described(lambda d: d["entries"][place].update(changes))


def held(name, value):
    return lambda found: found.update({f"{name}.npy": value if isinstance(value, bytes) else npy(value)})


def text(content):
    return np.frombuffer(content, np.uint8)


def raw_description(content):
    return lambda found: found.update({DESCRIPTION: npy(text(content))})


def not_ascii(member):
    """A description in UTF-8, in which one wide character of a long text makes four bytes of each of its others."""
    content = np.load(io.BytesIO(member)).tobytes().replace(b'"name": "text"', '"name": "\N{GRINNING FACE}"'.encode())
    assert not content.isascii()
    return npy(text(content))


def header(fields, content=b""):
    fields += b"\n"
    return b"\x93NUMPY\x01\x00" + len(fields).to_bytes(2, "little") + fields + content


def shaped(shape, content=b"", descr="<f8", order=False):
    return header(f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}}}".encode(), content)


FORGED = {
    "no_description": lambda f: f.pop(DESCRIPTION) and None,
    "description_no_json": raw_description(b"{"),
    "description_empty": raw_description(b""),
    "description_a_list": raw_description(b"[]"),
    "description_a_number": raw_description(b"1"),
    "description_deep": raw_description(b"[" * 200 + b"]" * 200),
    "description_deeper": raw_description(b'{"a":' * 200),
    "description_in_utf16": raw_description('{"format": 2, "kind": "model", "entries": []}'.encode("utf-16")),
    "description_not_ascii": lambda f: f.update({DESCRIPTION: not_ascii(f[DESCRIPTION])}),
    "description_of_two_dimensions": held("__bnfast__", np.full((2, 5), 32, np.uint8)),
    "description_of_floats": held("__bnfast__", np.ones(3)),
    "long_integer": raw_description(b'{"format": ' + b"1" * 5000 + b"}"),
    "format_newer": described(lambda d: d.update(format=3)),
    "format_true": described(lambda d: d.update(format=True)),
    "no_format": described(lambda d: d.pop("format") and None),
    "no_kind": described(lambda d: d.pop("kind") and None),
    "kind_layer": described(lambda d: d.update(kind="layer")),
    "kind_unknown": described(lambda d: d.update(kind="forest")),
    "kind_a_list": described(lambda d: d.update(kind=["model"])),
    "kind_null": described(lambda d: d.update(kind=None)),
    "no_entries": described(lambda d: d.pop("entries") and None),
    "entries_a_dict": described(lambda d: d.update(entries=dict(enumerate(d["entries"])))),
    "entries_text": described(lambda d: d.update(entries="abc")),
    "entries_null": described(lambda d: d.update(entries=None)),
    "other_key": described(lambda d: d.update(other=1)),
    "entry_a_list": described(lambda d: d["entries"].__setitem__(W, [])),
    "entry_null": described(lambda d: d["entries"].__setitem__(W, None)),
    "entry_too_many": described(lambda d: d["entries"].append({"name": "more", "kind": "array"})),
    "entry_too_few": described(lambda d: d["entries"].pop() and None),
    "entries_swapped": described(lambda d: d["entries"].reverse()),
    "entry_unknown_key": entry(W, other=1),
    "name_twice": entry(W, name="bn"),
    "name_a_number": entry(W, name=1),
    "name_null": entry(W, name=None),
    "name_a_list": entry(W, name=["w"]),
    "no_name": described(lambda d: d["entries"][W].pop("name") and None),
    "no_kind_of_entry": described(lambda d: d["entries"][W].pop("kind") and None),
    "entry_kind_unknown": entry(W, kind="tree"),
    "entry_kind_null": entry(W, kind=None),
    "entry_kind_a_list": entry(W, kind=["array"]),
    "entry_kind_another": entry(W, kind="int"),
    "array_as_layer": entry(W, kind="layer"),
    "layer_as_array": entry(BN, kind="array"),
    "number_as_text": entry(EPOCH, kind="array"),
    "text_as_bool": entry(TEXT, kind="bool"),
    "array_dtype_unknown": entry(W, dtype="float16"),
    "array_dtype_a_list": entry(W, dtype=["bfloat16"]),
    "bfloat16_of_float64": entry(W, dtype="bfloat16"),
    "layer_null": entry(BN, layer=None),
    "layer_a_list": entry(BN, layer=[]),
    "layer_text": entry(BN, layer="layer"),
    "layer_empty": entry(BN, layer={}),
    "layer_no_eps": described(lambda d: d["entries"][BN]["layer"].pop("eps") and None),
    "layer_other_key": described(lambda d: d["entries"][BN]["layer"].update(other=1)),
    "layer_features": described(lambda d: d["entries"][BN]["layer"].update(num_features=3)),
    "layer_features_huge": described(lambda d: d["entries"][BN]["layer"].update(num_features=2**40)),
    "layer_eps_infinite": described(lambda d: d["entries"][BN]["layer"].update(eps=float("inf"))),
    "layer_no_exact": described(lambda d: d["entries"][BN]["layer"].update(exact=None)),
    "layer_negative_variance": held(f"{BN}.running_var", -np.ones(2)),
    "layer_nan": held(f"{BN}.weight", np.array([1.0, np.nan])),
    "layer_table": held(f"{BN}.weight", np.ones((2, 1))),
    "layer_unknown_member": held(f"{BN}.other", np.ones(2)),
    "layer_no_weight": lambda f: f.pop(f"{BN}.weight.npy") and None,
    "no_array": lambda f: f.pop(f"{W}.array.npy") and None,
    "array_and_more": held(f"{W}.other", np.ones(2)),
    "member_of_no_entry": held("7.array", np.ones(2)),
    "member_of_a_negative_entry": held("-1.array", np.ones(2)),
    "member_of_no_number": held("other", np.ones(2)),
    "member_with_zeros": lambda f: f.update({f"0{W}.array.npy": f.pop(f"{W}.array.npy")}),
    "member_no_npy": lambda f: f.update({f"{W}.array": f.pop(f"{W}.array.npy")}),
    "a_pickle": held(f"{W}.array", pickle.dumps(Canary())),
    "objects": held(f"{W}.array", shaped((1,), pickle.dumps([Canary()]), "|O")),
    "text_array": held(f"{W}.array", np.array(["a"])),
    "complex": held(f"{W}.array", np.ones(2, complex)),
    "dates": held(f"{W}.array", np.zeros(2, "M8[s]")),
    "structured": held(f"{W}.array", np.zeros(2, "f4,f4")),
    "big_endian": held(f"{W}.array", np.ones(2, ">f8")),
    "fortran_order": held(f"{W}.array", np.ones((2, 3), order="F")),
    "shape_huge": held(f"{W}.array", shaped((2**62,))),
    "shape_overflows_to_fit": held(f"{W}.array", shaped((2**61 + 2,), bytes(16))),
    "shape_of_nothing_huge": held(f"{W}.array", shaped((0, 2**63))),
    "shape_negative": held(f"{W}.array", shaped((-1, -2), bytes(16))),
    "shape_of_bools": held(f"{W}.array", shaped((True, 2), bytes(16))),
    "shape_of_65_dimensions": held(f"{W}.array", shaped((1,) * 65, bytes(8))),
    "header_calls": held(f"{W}.array", header(b"{'descr': CANARY.append(1), 'fortran_order': False, 'shape': (2,)}")),
    "header_of_expressions": held(f"{W}.array", header(b"-" * 900 + b"1")),
    "bytes_behind": lambda f: f.update({f"{W}.array.npy": f[f"{W}.array.npy"] + b"\0"}),
    "bytes_missing": lambda f: f.update({f"{W}.array.npy": f[f"{W}.array.npy"][:-1]}),
    "bool_of_two": held(f"{ON}.value", shaped((), b"\2", "|b1")),
    "bools_of_two": lambda f: entry(W)(f) or held(f"{W}.array", shaped((2,), b"\1\2", "|b1"))(f),
    "bool_two_of_them": held(f"{ON}.value", np.ones(2, bool)),
    "bool_a_byte": held(f"{ON}.value", np.array(1, np.uint8)),
    "float_of_float32": held(f"{RATE}.value", np.array(1, np.float32)),
    "float_of_one_dimension": held(f"{RATE}.value", np.ones(1)),
    "int_of_letters": held(f"{EPOCH}.text", text(b"0xyz")),
    "int_empty": held(f"{EPOCH}.text", text(b"")),
    "int_of_ints": held(f"{EPOCH}.text", np.array([3])),
    "int_of_two_dimensions": held(f"{EPOCH}.text", text(b"0x1234").reshape(2, 3)),
    "text_no_utf8": held(f"{TEXT}.text", text(b"\xff")),
    "text_of_ints": held(f"{TEXT}.text", np.array([65, 66])),
}  # fmt: skip


@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED)
def test_a_forged_file_with_a_right_checksum_is_refused(change):
    refused(resealed(change))
    assert CANARY == []


PARSED = b"'descr': '<f8', 'fortran_order': False, 'shape': (2,)"
WARNED = {
    "python_2": b"{" + PARSED.replace(b"2", b"2L") + b"}",
    "indented": b" {" + PARSED + b"}",
    "escape": b"{" + PARSED.replace(b"<f8", b"<f8\\q") + b"}",
    "old_name": b"{" + PARSED.replace(b"<f8", b"|a8") + b"}",
    "call": b"{" + PARSED.replace(b"(2,)", b"1(2,)") + b"}",
}


@pytest.mark.parametrize("fields", WARNED.values(), ids=WARNED)
def test_a_header_at_which_numpy_or_python_would_warn_is_refused_without_a_warning(fields):
    data = resealed(held(f"{W}.array", header(fields, bytes(16))))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        refused(data, match=r"1\.array: expected the header of a plain array")
    assert caught == []


JSON_JUNK = [None, True, -1, 0, 3, 2**63, 10**400, 1.5, float("nan"), "", "text", "float32", [], [1], {}, {"a": 1}]


def json_places(value, path=()):
    """Where something may be replaced in a description."""
    yield path
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from json_places(part, (*path, key))


def test_anything_anywhere_in_a_description_gives_a_model_or_stateerror():
    found = members(model._encoded(ENTRIES))
    description, counts = json.loads(np.load(io.BytesIO(found[0][1])).tobytes()), {True: 0, False: 0}
    for path in json_places(description):
        for junk in JSON_JUNK:
            changed = json.loads(json.dumps({"top": description}))
            part, *keys = "top", *path
            holder = changed
            for key in keys:
                holder, part = holder[part], key
            holder[part] = junk
            data = archive([(DESCRIPTION, npy(text(json.dumps(changed["top"]).encode()))), *found[1:]])
            try:
                again = model._decoded(data)
            except StateError:
                counts[False] += 1
            else:
                assert raw(model._decoded(model._encoded(again))) == raw(again)
                counts[True] += 1
    assert counts[False] > 300
    assert counts[True] > 30


def test_an_unforged_file_is_accepted():
    for change in (lambda f: None, described(lambda d: None)):
        assert raw(model._decoded(resealed(change))) == raw(ENTRIES)


def test_an_error_names_the_entry_and_the_file(tmp_path):
    path = tmp_path / "some.model"
    path.write_bytes(resealed(held(f"{BN}.running_var", np.array([1.0, np.nan]))))
    with pytest.raises(
        StateError, match=r"some\.model: 'bn': running_var: expected finite values, got nan in channel 1"
    ):
        bnfast.load(path)
    path.write_bytes(files.sealed(b"PK no zip"))
    with pytest.raises(StateError, match=r"some\.model: .*BadZipFile") as caught:
        bnfast.load(path)
    assert isinstance(caught.value.__cause__, zipfile.BadZipFile)


def test_a_member_that_is_there_twice_is_refused():
    found = members(model._encoded(ENTRIES))
    refused(archive([*found, found[1]]), match="different names")


def test_a_bomb_is_refused_before_it_is_unpacked():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.comment = bytes(files.SEAL)
        file.writestr("0.array.npy", bytes(100_000_000), zipfile.ZIP_DEFLATED)
    refused(files.sealed(buffer.getvalue()[: -files.SEAL]), match="not compressed")


def test_a_crowd_of_members_is_refused_before_they_are_listed(monkeypatch):
    data = archive([(str(number), b"") for number in range(5000)])
    refused(data, match=r"at most \d+ members, got 5000", limit=1)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 10)  # as if they were more than 65,535
    large = archive([(str(number), b"") for number in range(5000)])
    assert files.END_64 in large
    refused(large, match=r"at most \d+ members, got 5000", limit=1)


PADDING = ("0.array.npy", npy(np.zeros(100_000)))
LONG = {  # JSON in which much comes out of few bytes, as much of it as is let through, and more
    name: (start, unit, end)
    for name, start, unit, end in (
        ("lists", '{"format":2,"kind":"model","entries":[', "[],", "0]}"),
        ("dicts", '{"format":2,"kind":"model","entries":[', "{},", "0]}"),
        ("full_dicts", '{"format":2,"kind":"model","entries":[', '{"":0},', "0]}"),
        ("full_lists", '{"format":2,"kind":"model","entries":[', "[0],", "0]}"),
        ("numbers", '{"format":2,"kind":"model","entries":[', "0,", "0]}"),
        ("floats", '{"format":2,"kind":"model","entries":[', "1e9,", "0]}"),
        ("texts", '{"format":2,"kind":"model","entries":[', '"ab",', "0]}"),
        ("characters", '{"format":2,"kind":"model","entries":[', '"\\u4e2d",', "0]}"),
        ("keys", '{"format":2,"kind":"model","entries":{"":0', ',"ab":0', "}}"),
        ("quotes", '{"format":2,"kind":"model","entries":["', '\\"', '"]}'),
        ("open_strings", '{"format":2,"kind":"model","entries":["a', '"b', "]}"),
        ("one_wide_name", '{"format":2,"kind":"model","entries":["\\ud83d\\ude00', "abc", '"]}'),
        ("deep", "", "[", ""),
        ("backslashes", '"', "\\", ""),
    )
}


@pytest.mark.parametrize(("start", "unit", "end"), LONG.values(), ids=LONG)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.8, 0.99, 1.5, 20])
def test_a_long_description_takes_no_more_memory_than_is_said(start, unit, end, share):
    """share: of the parts that a description may have in a file of this size, or so."""
    parts = max(1, sum(map(unit.count, "[{,")))
    most = (len(PADDING[1]) + 20_000) // files.BYTES_OF_A_PART
    content = start + unit * int(share * most / parts) + end
    data = archive([(DESCRIPTION, npy(text(content.encode()))), PADDING])
    refused(data)


def test_the_wrong_kind_of_file_is_one_sentence(tmp_path):
    path = tmp_path / "file"
    layers()[0].save(path)
    words = "expected a file written by bnfast.save, got one of BatchNorm.save: BatchNorm.load reads it"
    with pytest.raises(StateError) as caught:
        bnfast.load(path)
    assert str(caught.value) == f"{path}: {words}"
    bnfast_load = "expected a file written by BatchNorm.save, got one of bnfast.save: bnfast.load reads it"
    for entries in (*models(), {str(number): np.eye(3, dtype=np.int8) for number in range(300)}, {"x" * 9000: 1}):
        bnfast.save(path, entries)
        with pytest.raises(StateError) as caught:
            BatchNorm.load(path)
        assert str(caught.value) == f"{path}: {bnfast_load}"
    with pytest.raises(StateError, match=re.escape(words)):
        model._decoded(FORMAT_1.read_bytes())


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "model.npz"
    for data in (b"", pickle.dumps(Canary()), b"PK"):
        refused(data, match=r"written by bnfast\.save, got another one")
    refused(files.sealed(pickle.dumps(Canary())))
    refused(files.sealed(b""))
    np.savez(path, w=np.ones(3))
    with pytest.raises(StateError, match=r"model\.npz: expected a file written by bnfast\.save, got another one"):
        bnfast.load(path)
    assert CANARY == []


def test_a_file_of_a_newer_format_says_so_whatever_is_in_it():
    found = dict(members(model._encoded(ENTRIES)))
    described(lambda d: d.update(format=3, kind="forest", entries=None))(found)
    found[f"{W}.array.npy"] = npy(np.ones(2, complex))
    data = archive(list(found.items()))
    refused(data, match="format 3 is of a newer bnfast; this one reads formats up to 2")
    with pytest.raises(StateError, match="format 3 is of a newer bnfast"):
        BatchNorm._decoded(data)


def test_max_bytes_is_looked_at_before_anything_is_read(tmp_path):
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # takes no space

    def load():
        with pytest.raises(StateError, match=r"large: .*max_bytes"):
            bnfast.load(path)

    assert peak_of(load) < 1_000_000
    bnfast.save(path, {"a": 1})
    size = path.stat().st_size
    assert bnfast.load(path, max_bytes=size) == {"a": 1}
    with pytest.raises(StateError, match=f"at most {size - 1} bytes"):
        bnfast.load(path, max_bytes=size - 1)
    with pytest.raises(TypeError):
        bnfast.load(path, max_bytes=1.5)


def test_loading_takes_at_most_ten_times_the_file():
    for entries in (
        {"w": np.zeros(300_000)},
        {str(number): number for number in range(2000)},
        {str(number): layers()[3] for number in range(500)},
        {"x" * 300_000 + "\N{GRINNING FACE}": 1},
        {"x": "x" * 300_000 + "\N{GRINNING FACE}"},
    ):
        data = model._encoded(entries)
        assert peak_of(lambda data=data: model._decoded(data)) + len(data) < 10 * len(data)


def test_what_cannot_be_read_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError):
        bnfast.load(tmp_path / "none")
    with pytest.raises(OSError, match=re.escape(str(tmp_path))):
        bnfast.load(tmp_path)
