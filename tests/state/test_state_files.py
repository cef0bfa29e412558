"""Files of a layer: exact round trips, what a file keeps, no damage that is accepted.

Files of a model are in test_state_model.py, dictionaries and pickles in test_state_dictionaries.py.
"""

import copy
import hashlib
import io
import json
import os
import pickle
import random
import re
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path

import fuzz_state
import numpy as np
import pytest
from campaign import short_and_long
from fuzz_state import KINDS_OF_LAYERS, archive, check, layers, members, npy, seeds
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from kept import raw
from scripts import NO_RSS_LIMIT

from bnfast import BatchNorm, Moments, StateError
from bnfast.state import files

FIXTURES = Path(__file__).parents[1] / "fixtures"
DESCRIPTION = "__bnfast__.npy"


# --- round trips ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bn", layers(), ids=KINDS_OF_LAYERS)
def test_a_file_keeps_everything(bn, tmp_path):
    path = tmp_path / "bn"
    bn.save(path)
    again = BatchNorm.load(path)
    assert type(again) is BatchNorm
    assert raw(again) == raw(bn)
    again.save(str(tmp_path / "again"))
    assert (tmp_path / "again").read_bytes() == path.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["again", "bn"]
    if bn.exact_statistics is not None:
        assert again.statistics_in_use == "exact"
        assert raw(again.use_statistics("running")) == raw(bn.use_statistics("running"))


finite = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def any_layer(draw):
    channels = draw(st.integers(1, 5))
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    bn = BatchNorm(
        channels,
        axis=draw(st.integers(-4, 4)),
        eps=draw(st.floats(5e-324, 1e300)),
        momentum=draw(st.none() | st.floats(0, 1)),
        affine=draw(st.sampled_from([True, False, "gamma", "beta"])),
        track_running_stats=draw(st.booleans()),
        unbiased_running_var=draw(st.booleans()),
        activation=draw(st.sampled_from([None, "relu", "relu6", "leaky_relu"])),
        negative_slope=draw(st.floats(0, 1, exclude_min=True, exclude_max=True)),
        nonfinite=draw(st.sampled_from(["propagate", "skip", "raise"])),
        dtype=dtype,
    )
    array = hnp.arrays(np.float64, channels, elements=finite)
    positive = hnp.arrays(np.float64, channels, elements=st.floats(0, 1e300))
    narrow = hnp.arrays(dtype, channels, elements=st.floats(-(2.0**127), 2.0**127, width=np.dtype(dtype).itemsize * 8))
    for parameter in bn.parameters().values():
        parameter[:] = draw(narrow)
    if bn.track_running_stats:
        batches = np.int64(draw(st.integers(0, 2**63 - 1)))
        bn.load_state_dict(
            {
                **bn.state_dict(),
                "running_mean": draw(array),
                "running_var": draw(positive),
                "num_batches_tracked": batches,
            }
        )
        if draw(st.booleans()):  # and with counts of its own for each channel
            kept, counts = bn._kept(), hnp.arrays(np.int64, channels, elements=st.integers(0, 2**63 - 1))
            bn = BatchNorm._made_of(
                kept._replace(counts=(draw(st.none() | counts), draw(st.none() | counts))), strict=True
            )
        if draw(st.booleans()):
            bn.use_statistics(Moments(draw(st.integers(2, 2**63 - 1)), draw(array), draw(positive)))
            bn.use_statistics(draw(st.sampled_from(["running", "exact"])))
    return bn.train(draw(st.booleans()))


@given(any_layer())
def test_any_layer_comes_back_to_the_bit(bn):
    again = BatchNorm._decoded(bn._encoded())
    assert raw(again) == raw(bn)
    assert again._encoded() == bn._encoded()
    assert raw(pickle.loads(pickle.dumps(bn))) == raw(bn)


def test_numpy_reads_it_under_the_names_of_pytorch(tmp_path):
    bn = layers()[0]
    bn.save(tmp_path / "bn.npz")
    with np.load(tmp_path / "bn.npz") as file:
        found = {name: file[name] for name in bn.state_dict()}
        description = json.loads(file["__bnfast__"].tobytes())
    for name, value in bn.state_dict().items():
        assert found[name].dtype == value.dtype
        np.testing.assert_array_equal(found[name], value)
    assert description["eps"] == bn.eps
    other = BatchNorm(2)
    other.load_state_dict(found)
    np.testing.assert_array_equal(other.running_var, bn.running_var)


class Labelled(BatchNorm):
    def __init__(self, label):
        super().__init__(2)
        self.label = label


def test_a_subclass_loads_its_own_without_its_constructor(tmp_path):
    Labelled("a").save(tmp_path / "bn")
    again = Labelled.load(tmp_path / "bn")
    assert type(again) is Labelled
    assert not hasattr(again, "label")
    assert type(BatchNorm.load(tmp_path / "bn")) is BatchNorm


def test_the_fixture_of_the_first_version_loads_for_ever():
    """Written by 0.1.0, by `write_fixture` below. Never write it again."""
    bn = BatchNorm.load(FIXTURES / "layer-format1.npz")
    expected = json.loads((FIXTURES / "layer-format1.json").read_text())
    assert repr(bn) == expected["repr"]
    assert bn.training is expected["training"]
    assert bn.statistics_in_use == expected["statistics_in_use"]
    assert bn.num_batches_tracked == expected["num_batches_tracked"]
    assert digests(bn) == expected["sha256"]
    assert (bn.nonfinite, bn.activation, bn.negative_slope) == ("propagate", None, 0.01)
    assert bn.num_batches_skipped.tolist() == [0] * 5
    again = BatchNorm._decoded(bn._encoded())  # of format 2
    assert raw(again) == raw(bn)


def digests(bn):
    exact, running = bn.exact_statistics, copy.copy(bn).use_statistics("running")
    found = {**bn.state_dict(), "exact_mean": exact.mean, "exact_m2": exact.m2}
    found |= {"averaged_mean": running.running_mean, "averaged_var": running.running_var}
    return {name: hashlib.sha256(value.tobytes()).hexdigest() for name, value in found.items()}


def write_fixture():
    rng = np.random.default_rng(1)
    bn = BatchNorm(5, axis=-1, eps=1e-3, momentum=None, unbiased_running_var=False)
    for _ in range(3):
        bn.gamma += bn(rng.normal(3.0, 2.0, (7, 5)).astype(np.float32))[0]
    bn.beta += rng.normal(size=5)
    with bn.calibrate():
        bn(rng.normal(3.0, 2.0, (9, 5)))
    bn.eval().save(FIXTURES / "layer-format1.npz")
    kept = {name: getattr(bn, name) for name in ("training", "statistics_in_use", "num_batches_tracked")}
    text = json.dumps({"repr": repr(bn), **kept, "sha256": digests(bn)}, indent=1)
    (FIXTURES / "layer-format1.json").write_text(text + "\n")


# --- what is not written -------------------------------------------------------------------------------------


def infinite_statistics(bn):
    with np.errstate(invalid="ignore"):
        bn(np.array([[1.0, np.inf], [2.0, 3.0]]))


def negative_variance(bn):
    """As a pickle may hold it."""
    bn.__setstate__({**bn.__getstate__(), "values": {**bn.state_dict(), "running_var": np.array([1.0, -1.0])}})


def variance_no_longer_above_minus_eps(bn):
    bn.running_var = [1.0, -9e-6]
    bn.eps = 1e-6


UNFIT = {
    "nan_in_gamma": lambda bn: bn.gamma.__setitem__(1, np.nan),
    "infinite_statistics": infinite_statistics,
    "negative_variance": negative_variance,
    "variance_no_longer_above_minus_eps": variance_no_longer_above_minus_eps,
    "variance_zero_and_eps": lambda bn: (setattr(bn, "running_var", np.zeros(2)), setattr(bn, "eps", 0.0)),
}


@pytest.mark.parametrize("change", UNFIT.values(), ids=UNFIT)
def test_a_layer_that_could_not_be_loaded_is_not_written(change, tmp_path):
    BatchNorm(1).save(tmp_path / "bn")
    bn = BatchNorm(2)
    change(bn)
    with pytest.raises(StateError, match=r"channel [01]"):
        bn.save(tmp_path / "bn")
    assert BatchNorm.load(tmp_path / "bn").num_features == 1


@pytest.mark.parametrize("path", [b"bytes", 3, None, io.BytesIO()])
def test_a_path_is_text(path):
    with pytest.raises(TypeError, match=r"path: expected str or os\.PathLike"):
        BatchNorm(2).save(path)
    with pytest.raises(TypeError, match=r"path: expected str or os\.PathLike"):
        BatchNorm.load(path)


# --- damage --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good():
    bn = BatchNorm(300, dtype=np.float64)
    bn(np.random.default_rng(0).normal(5, 2, (4, 300)))
    bn.gamma[:], bn.beta[:] = bn.running_mean, bn.running_var
    return bn._encoded()


def refused(data, match=None):
    """A cause for everything, and never NumPy's advice to unpickle."""
    with pytest.raises(StateError, match=match) as caught:
        BatchNorm._decoded(bytes(data))
    assert "pickle" not in str(caught.value).lower()
    return caught.value


@pytest.mark.parametrize("flips", short_and_long(150, 2000))
def test_a_flipped_bit_is_refused(good, flips):
    bits = range(len(good) * 8)
    for bit in [*random.Random(1).sample(bits, flips), bits[0], bits[-1]]:
        damaged = bytearray(good)
        damaged[bit // 8] ^= 1 << bit % 8
        refused(damaged)


def test_a_part_of_a_file_is_refused(good):
    for length in [*range(0, len(good), 512), len(good) - 1]:
        refused(good[:length])
        refused(good[length + 1 :])


def test_zeros_are_refused(good):
    refused(bytes(len(good)))
    for start in range(0, len(good), 512):
        refused(good[:start] + bytes(min(512, len(good) - start)) + good[start + 512 :])
    refused(good + b"\0")


def test_swapped_members_are_refused(good):
    found = members(good)
    (mean,) = (index for index, (name, _) in enumerate(found) if name == "running_mean.npy")
    found[mean], found[mean + 1] = (found[mean][0], found[mean + 1][1]), (found[mean + 1][0], found[mean][1])
    data = archive(found)
    BatchNorm._decoded(data)  # nothing is wrong with it but the numbers, and so the checksum
    refused(data[: -files.SEAL] + good[-files.SEAL :], match="checksum")


def resealed(change):
    """A usual file with changed members, and a right checksum."""
    found = dict(members(layers()[1]._encoded()))
    changed = change(found)
    return archive(list((found if changed is None else changed).items()))


def described(**changes):
    def change(found):
        text = json.loads(np.load(io.BytesIO(found["__bnfast__.npy"])).tobytes()) | changes
        text = {name: value for name, value in text.items() if value is not ...}
        found["__bnfast__.npy"] = npy(np.frombuffer(json.dumps(text).encode(), np.uint8))

    return change


def held(name, value):
    return lambda found: found.update({f"{name}.npy": value if isinstance(value, bytes) else npy(value)})


def header(text, content=bytes(16), version=1):
    size = len(text).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + size + text + content


GOOD_HEADER = b"{'descr': '<f8', 'fortran_order': False, 'shape': (2,)}"


def shaped(*shape):
    return header(f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}}}\n".encode())


CANARY = []


class Canary:
    """Unpickled, it shows."""

    def __reduce__(self):
        return CANARY.append, (1,)


def swapped(found):
    found["running_mean.npy"], found["running_var.npy"] = (
        found["running_var.npy"],
        found["running_mean.npy"][:-1] + b"\xbf",
    )


def averages_alone(found):
    described(exact=None)(found)
    del found["exact_mean.npy"], found["exact_m2.npy"]


FORGED = {
    "no_description": lambda f: f.pop("__bnfast__.npy") and None,
    "description_no_json": held("__bnfast__", np.frombuffer(b"{", np.uint8)),
    "description_a_list": held("__bnfast__", np.frombuffer(b"[]", np.uint8)),
    "description_deep": held("__bnfast__", np.frombuffer(b"[" * 4000, np.uint8)),
    "no_format": described(format=...),
    "format_newer": described(format=3),
    "format_true": described(format=True),
    "format_zero": described(format=0),
    "unknown_in_description": described(other=1),
    "missing_in_description": described(eps=...),
    "features_another": described(num_features=3),
    "features_huge": described(num_features=2**62),
    "features_beyond_int64": described(num_features=10**400),
    "features_negative": described(num_features=-2),
    "features_true": described(num_features=True),
    "eps_text": described(eps="1e-5"),
    "eps_nan": described(eps=float("nan")),
    "eps_negative": described(eps=-1.0),
    "momentum_two": described(momentum=2),
    "dtype_object": described(dtype="object"),
    "dtype_another": described(dtype="float32"),
    "affine_number": described(affine=1),
    "affine_false": described(affine=False),
    "affine_gamma": described(affine="gamma"),
    "affine_unknown": described(affine="delta"),
    "activation_unknown": described(activation="gelu"),
    "activation_number": described(activation=1),
    "activation_list": described(activation=["relu"]),
    "slope_zero": described(negative_slope=0.0),
    "slope_one": described(negative_slope=1.0),
    "slope_nan": described(negative_slope=float("nan")),
    "slope_text": described(negative_slope="0.1"),
    "slope_null": described(negative_slope=None),
    "nonfinite_unknown": described(nonfinite="other"),
    "nonfinite_null": described(nonfinite=None),
    "kind_unknown": described(kind="tree"),
    "kind_a_list": described(kind=["layer"]),
    "statistics_not_tracked": described(track_running_stats=False),
    "training_null": described(training=None),
    "exact_missing": described(exact=None),
    "exact_empty": described(exact={}),
    "exact_of_one_value": described(exact={"count": 1, "batches": 1}),
    "exact_count_huge": described(exact={"count": 10**400, "batches": 1}),
    "averages_missing": described(averages=None),
    "averages_negative": described(averages={"batches": -1}),
    "averages_twice": described(averaged={"batches": 1}),
    "averages_without_exact": averages_alone,
    "features_huge_without_arrays": lambda f: described(num_features=2**40)(f) or {DESCRIPTION: f[DESCRIPTION]},
    "skipped_negative": held("num_batches_skipped", np.array([0, -1])),
    "skipped_short": held("num_batches_skipped", np.array([0])),
    "skipped_float": held("num_batches_skipped", np.array([0.0, 1.0])),
    "averaged_long": held("num_batches_averaged", np.array([0, 1, 2])),
    "averages_skipped_negative": held("averages_num_batches_skipped", np.array([0, -1])),
    "averages_of_a_name_of_format_1": held("averaged_mean", np.ones(2)),
    "no_weight": lambda f: f.pop("weight.npy") and None,
    "no_exact_mean": lambda f: f.pop("exact_mean.npy") and None,
    "unknown_member": held("other", np.ones(2)),
    "member_no_npy": lambda f: f.update({"weight": f.pop("weight.npy")}),
    "swapped": swapped,
    "objects": held(
        "weight", header(b"{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n", pickle.dumps([Canary()]))
    ),
    "a_pickle": held("weight", pickle.dumps(Canary())),
    "empty_member": held("weight", b""),
    "two_dimensions_of_the_description": held("__bnfast__", np.full((2, 5), 32, np.uint8)),
    "longer": held("weight", np.ones(3)),
    "two_dimensions": held("weight", np.ones((2, 1))),
    "another_dtype": held("weight", np.ones(2, np.float32)),
    "integers": held("weight", np.ones(2, np.int64)),
    "big_endian": held("weight", np.ones(2, ">f8")),
    "complex": held("weight", np.ones(2, complex)),
    "structured": held("weight", np.ones(2, "f4,f4")),
    "text": held("weight", np.array(["a", "b"])),
    "nan": held("running_mean", np.array([1.0, np.nan])),
    "nan_variance": held("running_var", np.array([1.0, np.nan])),
    "infinite": held("bias", np.array([1.0, -np.inf])),
    "negative_variance": held("running_var", np.array([1.0, -1e-4])),
    "variance_of_minus_eps": held("running_var", np.array([1.0, -1e-5])),
    "negative_m2": held("exact_m2", np.array([1.0, -1.0])),
    "negative_averages": held("averages_var", np.array([1.0, -1.0])),
    "batches_negative": held("num_batches_tracked", np.int64(-1)),
    "header_10_mb": held("weight", header(b"{" + b" " * 10_000_000, version=2)),
    "header_60_kb": held("weight", header(GOOD_HEADER + b" " * 60_000)),
    "header_of_expressions": held("weight", header(b"(" * 900)),
    "header_calls": held("weight", header(b"{'descr': CANARY.append(1), 'fortran_order': False, 'shape': (2,)}\n")),
    "shape_huge": held("weight", shaped(2**62)),
    "shape_overflows_to_fit": held("weight", shaped(2**61 + 2)),
    "shape_negative": held("weight", shaped(-1)),
    "bytes_behind": lambda f: f.update({"weight.npy": f["weight.npy"] + b"\0"}),
    "bytes_missing": lambda f: f.update({"weight.npy": f["weight.npy"][:-1]}),
}  # fmt: skip


@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED)
def test_a_forged_file_with_a_right_checksum_is_refused(change):
    data = resealed(change)
    peak = tracemalloc_peak(lambda: refused(data))
    assert peak < 5 * len(data) + 1_000_000
    assert CANARY == []


def tracemalloc_peak(function):
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_arrays_have_one_dimension_whatever_they_are_for():
    for shape in ((2, 1), (2, 2), (1, 1, 1), (0, 2**62)):
        with pytest.raises(StateError, match="at most one dimension"):
            files._array("x.npy", npy(np.ones(shape)) if 2**62 not in shape else shaped(*shape), model=False)


def test_an_unforged_file_is_accepted():
    assert raw(BatchNorm._decoded(resealed(lambda f: None))) == raw(layers()[1])
    assert raw(BatchNorm._decoded(resealed(described()))) == raw(layers()[1])


def zipped(write):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.comment = bytes(files.SEAL)
        write(file)
    return bytearray(buffer.getvalue()[: -files.SEAL])


def test_a_member_that_is_there_twice_is_refused():
    found = members(layers()[0]._encoded())
    data = archive([*found, found[1]])
    refused(data, match="different names")


def test_a_bomb_is_refused_before_it_is_unpacked():
    body = zipped(lambda file: file.writestr("weight.npy", bytes(100_000_000), zipfile.ZIP_DEFLATED))
    assert len(body) < 200_000
    peak = tracemalloc_peak(lambda: refused(files.sealed(bytes(body)), match="not compressed"))
    assert peak < 5_000_000


def test_a_crowd_of_members_is_refused_before_they_are_listed():
    data = archive([(str(n), b"") for n in range(5000)])
    peak = tracemalloc_peak(lambda: refused(data, match=r"at most \d+ members, got 5000"))
    assert peak < len(data) + 100_000


def test_a_long_description_is_refused_before_it_is_parsed():
    data = resealed(held("__bnfast__", np.frombuffer(b"[" + b"[]," * 100_000 + b"0]", np.uint8)))
    peak = tracemalloc_peak(lambda: refused(data, match=r"at most \d+ parts"))
    assert peak < 5 * len(data)


def test_declared_sizes_beyond_the_file_are_refused():
    """Sizes in the central directory that agree with each other and with nothing else."""
    body = zipped(lambda file: file.writestr("weight.npy", bytes(100)))
    start = body.rindex(b"PK\x01\x02")
    body[start + 20 : start + 28] = (0x70000000).to_bytes(4, "little") * 2
    peak = tracemalloc_peak(lambda: refused(files.sealed(bytes(body)), match="larger than the file"))
    assert peak < 2_000_000


def test_a_wrong_size_or_crc_in_the_directory_is_refused():
    for offset in (16, 20, 24, 42):  # crc, compressed size, size, place
        body = zipped(lambda file: file.writestr("weight.npy", bytes(100)))
        body[body.rindex(b"PK\x01\x02") + offset] ^= 4
        refused(files.sealed(bytes(body)))


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "bn.npz"
    refused(b"")
    refused(pickle.dumps(Canary()), match="written by BatchNorm.save")
    refused(files.sealed(pickle.dumps(Canary())))
    refused(files.sealed(b""))
    np.savez(path, **BatchNorm(2).state_dict())
    with pytest.raises(StateError, match=r"bn\.npz: expected a file written by BatchNorm\.save") as caught:
        BatchNorm.load(path)
    assert caught.value.__cause__ is not None
    assert CANARY == []


def test_an_error_names_the_file_and_keeps_its_cause(tmp_path):
    path = tmp_path / "some.npz"
    path.write_bytes(files.sealed(b"PK no zip"))
    with pytest.raises(StateError, match=r"some\.npz: .*BadZipFile") as caught:
        BatchNorm.load(path)
    assert isinstance(caught.value.__cause__, zipfile.BadZipFile)


def test_max_bytes_is_looked_at_before_anything_is_read(tmp_path):
    path = tmp_path / "large"
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # takes no space

    def load():
        with pytest.raises(StateError, match="max_bytes"):
            BatchNorm.load(path)

    assert tracemalloc_peak(load) < 1_000_000
    BatchNorm(2).save(path)
    size = path.stat().st_size
    BatchNorm.load(path, max_bytes=size)
    with pytest.raises(StateError, match=f"at most {size - 1} bytes"):
        BatchNorm.load(path, max_bytes=size - 1)
    with pytest.raises(TypeError):
        BatchNorm.load(path, max_bytes=1.5)


def test_loading_takes_at_most_five_times_the_file(tmp_path):
    bn = BatchNorm(200_000, dtype=np.float64)
    bn.save(tmp_path / "bn")
    size = (tmp_path / "bn").stat().st_size
    assert tracemalloc_peak(lambda: BatchNorm.load(tmp_path / "bn")) < 5 * size


def test_what_cannot_be_read_is_an_oserror(tmp_path):
    with pytest.raises(FileNotFoundError):
        BatchNorm.load(tmp_path / "none")
    with pytest.raises(OSError, match=re.escape(str(tmp_path))):  # a folder: of what kind depends on the system
        BatchNorm.load(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes with names")
def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(StateError, match="regular file"):
            BatchNorm.load(path)


@pytest.mark.parametrize("rounds", short_and_long(2000, 100_000))
def test_changed_inputs_of_the_fuzzer_give_a_layer_or_stateerror(rounds):
    """The corpus without a fuzzer: seeds, and seeds with a few bytes changed, cut or repeated."""
    assert all(check(seed) for seed in seeds())
    inputs, rng = list(seeds()), random.Random(5)
    for _ in range(rounds):
        data = bytearray(rng.choice(inputs))
        for _ in range(rng.randint(1, 4)):
            place, other = rng.randrange(len(data)), rng.randrange(len(data))
            data[place : place + rng.choice((0, 1, 1, 1, 8))] = rng.choice(
                (bytes([rng.randrange(256)]), data[other : other + rng.randrange(9)], b"\xff" * 8, b"-1", b"null")
            )
        check(bytes(data))


@pytest.mark.campaign
def test_the_fuzzer_finds_nothing(tmp_path):
    pytest.importorskip("atheris", reason="atheris is not installed")
    options = ["-max_total_time=600", "-max_len=4096", *NO_RSS_LIMIT]
    command = [sys.executable, fuzz_state.__file__, str(tmp_path / "corpus"), *options]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=900, check=False)
    assert run.returncode == 0, run.stderr[-5000:]
