"""The benchmark command: its arithmetic is right, its contenders give right results, its workers end."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from places import ROOT

from bnfast.commands import bench
from bnfast.commands.bench import block, compare, contenders, loop, means, residual_block, tables, worker
from bnfast.commands.bench import shapes as table_of_shapes
from bnfast.commands.bench.shapes import BLOCK, OPERATIONS, QUICK, SHAPES, SIZES, Shape, family, group, named

TINY = "8x16,32x64"


@pytest.fixture
def tqdm():
    """Skip the test where the progress bar is not installed."""
    pytest.importorskip("tqdm")


# --- Arithmetic -----------------------------------------------------------------------------------------------


def result(shape, operation, contender, median):
    return {
        "shape": shape,
        "operation": operation,
        "group": group(SHAPES[shape], operation),
        "contender": contender,
        "median": median,
        "q1": 0.9 * median,
        "q3": 1.2 * median,
    }


RESULTS = [
    result("32x64x56x56", "forward", "bnfast", 2.0),
    result("32x64x56x56", "forward", "torch", 4.0),
    result("32x128x28x28", "forward", "torch", 8.0),
    result("32x128x28x28", "forward", "bnfast", 1.0),
    result("8192x512", "forward", "bnfast", 3.0),
    result("8192x512", "forward", "torch", 1.5),
    result("8192x512", "eval", "torch", 1.0),  # no bnfast beside it
]


def test_ratios_are_to_bnfast_of_the_same_shape_and_operation():
    assert [r["ratio"] for r in compare.with_ratios(RESULTS)] == [1, 2, 8, 1, 1, 0.5, None]


def test_geometric_means_are_taken_group_by_group():
    means = compare.geometric_means(compare.with_ratios(RESULTS))
    assert means.keys() == {"planar forward", "channels-last and (N, C) forward"}
    assert means["planar forward"] == {"bnfast": pytest.approx(1), "torch": pytest.approx(4)}
    assert means["channels-last and (N, C) forward"]["torch"] == pytest.approx(0.5)


def test_summary_is_median_and_quartiles():
    assert compare.summary([5.0, 1.0, 2.0, 4.0, 3.0]) == {"median": 3, "q1": 2, "q3": 4, "min": 1}


def test_spread_is_half_the_interquartile_range():
    assert tables.spread(RESULTS[0]) == pytest.approx(0.15)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.0, "2.00 s"), (0.0123, "12.3 ms"), (0.9999e-3, "1.00 ms"), (1.234e-5, "12.3 µs"), (4.56e-7, "456 ns")],
)
def test_durations_have_three_digits(seconds, text):
    assert tables.duration(seconds) == text


def test_bytes_moved():
    shape = Shape((2, 3, 5))
    assert [shape.bytes_moved(operation, 4) for operation in OPERATIONS] == [240, 360, 240]
    assert [shape.bytes_moved(operation, 4) for operation in BLOCK] == [360, 600]


def test_shapes_have_names_of_their_own_and_places_in_memory():
    assert set(QUICK) <= set(SHAPES)
    shape = SHAPES["32x64x56x56-cl"]
    assert (shape.memory_dims, shape.axis, shape.channels) == ((32, 56, 56, 64), 3, 64)
    assert (SHAPES["32x64x56x56"].memory_dims, SHAPES["32x64x56x56"].axis) == ((32, 64, 56, 56), 1)
    assert len({(s.dims, s.channels_last) for s in SHAPES.values()}) == len(SHAPES)


def test_the_sweep_has_every_kind_at_every_size():
    assert len(SIZES) == 5
    for kind, shapes in SIZES.items():
        assert len(shapes) == 8
        for power, shape in enumerate(shapes):
            assert 0.7 < shape.size * 4 / (16_384 * 4**power) < 1.4, (kind, shape)
            assert named(shape.name) == shape
            assert family(shape) == kind


@pytest.mark.parametrize("name", ["8x16", "5x7x2", "5x7x2-cl", "2x3x4x5x6", *SHAPES])
def test_a_shape_is_known_by_its_name(name):
    assert named(name).name == name


@pytest.mark.parametrize("name", ["8", "8x", "8x0", "8x-1", "08x16", "8x16-cl", "8x16x2-nhwc", "what", "1x5"])
def test_what_is_no_shape_is_refused(name):
    with pytest.raises(ValueError, match=name):
        named(name)


# --- Means and releases ---------------------------------------------------------------------------------------

HISTORY = ROOT / "benchmarks" / "history"


def test_means_keep_small_and_large_arrays_apart():
    report = {
        "results": RESULTS + [result("32x256x14x14", "forward", name, t) for name, t in (("bnfast", 1), ("torch", 9))]
    }
    kind = "training forward, (N, C, H, W)"
    assert means.means(report, small=True)[kind] == {"bnfast": 1, "torch": pytest.approx(9)}
    assert means.means(report, small=False)[kind] == {"bnfast": pytest.approx(1), "torch": pytest.approx(4)}
    assert means.means(report, base="torch")[kind]["bnfast"] == pytest.approx((2 * 8 * 9) ** (-1 / 3))


@pytest.mark.skipif(not HISTORY.is_dir(), reason="the benchmarks are not beside the installed tests")
def test_every_release_is_kept_as_it_was_measured():
    reports = means.releases(HISTORY)
    assert {"0.1.0-amd", "0.1.0-intel"} <= reports.keys()
    for name, report in reports.items():
        version, _, cpu = name.partition("-")
        assert report["format"] == 1
        assert report["machine"]["bnfast"] == version
        assert cpu in report["machine"]["cpu"].lower()
        for group_name, row in compare.geometric_means(report["results"]).items():
            assert row == pytest.approx(report["geometric_means"][group_name])
        for r in report["results"]:
            assert 0 < r.get("q1", r["median"]) <= r["median"] <= r.get("q3", r["median"])
            shape = named(r["shape"])
            assert r["bytes"] == shape.bytes_moved(r["operation"], 4)
            assert r["group"] == group(shape, r["operation"])


@pytest.mark.skipif(not HISTORY.is_dir(), reason="the benchmarks are not beside the installed tests")
def test_releases_are_drawn():
    pytest.importorskip("matplotlib")
    reports = means.releases(HISTORY)
    head, *rows = means.history(reports)
    assert head[1:] == list(reports)
    assert [row[0] for row in rows] == list(means.KINDS)
    assert all("nan" not in cell for row in rows for cell in row)
    for picture in means.draw_history(reports), means.draw_means(reports["0.1.0-amd"]):
        assert picture.startswith(b"\x89PNG")


# --- Contenders -----------------------------------------------------------------------------------------------

CASES = [
    Shape((3, 5, 4, 2)),
    Shape((3, 16, 4, 2), channels_last=True),
    Shape((40, 16)),
    Shape((4, 6, 50)),
    Shape((2, 3, 4, 2, 5)),
]


@pytest.fixture
def own_torch_settings():
    """Put PyTorch's settings, which the contender changes for its process, back."""
    try:
        import torch
    except ImportError:
        yield
        return
    grad, threads = torch.is_grad_enabled(), torch.get_num_threads()
    yield
    torch.set_grad_enabled(grad)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("fresh", [False, True], ids=["out", "fresh"])
@pytest.mark.parametrize("shape", CASES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("name", ["bnfast", "numpy", "onednn", "torch"])
@pytest.mark.filterwarnings("default")  # other people's packages warn
def test_contender_gives_right_results(name, shape, fresh, own_torch_settings):
    try:
        contender = contenders.create(name, 2)
    except contenders.Unavailable as error:
        pytest.skip(str(error))
    case, base = (contenders.Case(shape, "float32", fresh) for _ in range(2))
    x, dy = case.x.copy(), case.dy.copy()
    operations = contender.operations(case)
    assert tuple(operations) == OPERATIONS
    for operation, (variants, run) in operations.items():
        expected = contenders.create("bnfast", 2).operations(base)[operation].result("")
        assert variants
        for variant in variants:
            found = run(variant)
            assert found.keys() == expected.keys()
            contenders.check(case, operation, found)
            for key, value in expected.items():
                np.testing.assert_allclose(found[key], value, rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(case.x, x)
    np.testing.assert_array_equal(case.dy, dy)


@pytest.mark.parametrize("shape", CASES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("name", ["bnfast", "bnfast+numpy", "numpy", "onednn", "torch"])
@pytest.mark.filterwarnings("default")  # other people's packages warn
def test_contender_does_the_block_right(name, shape, own_torch_settings):
    try:
        contender = block.create(name, 2)
    except contenders.Unavailable as error:
        pytest.skip(str(error))
    case, base = (block.BlockCase(shape, "float32") for _ in range(2))
    operations = contender.operations(case)
    assert tuple(operations) == BLOCK
    for operation, (variants, run) in operations.items():
        expected = base.expected(operation, np.arange(shape.channels))
        assert variants
        for variant in variants:
            found = run(variant)
            assert found.keys() == expected.keys()
            contenders.check(case, operation, found)
            for key, value in expected.items():
                np.testing.assert_allclose(found[key], value, rtol=1e-3, atol=1e-4)
    for array in ("x", "dy", "residual"):
        np.testing.assert_array_equal(getattr(case, array), getattr(base, array))


def test_check_finds_a_wrong_block():
    case = block.BlockCase(SHAPES["8x16"], "float32")
    good = block.create("bnfast", 1).operations(case)
    for operation, key in (
        ("block", "y"),
        *(("block backward", key) for key in ("dx", "dgamma", "dbeta", "dresidual")),
    ):
        found = {name: value.copy() for name, value in good[operation].result("").items()}
        found[key][..., -1] += 0.01 * np.abs(found[key]).max() + 0.01
        with pytest.raises(ArithmeticError, match=f"{operation} of 8x16: {key}"):
            contenders.check(case, operation, found)


def test_relu_in_a_block_is_taken_of_nothing_that_rounding_may_turn():
    case = block.BlockCase(SHAPES["128x256"], "float32")
    y = contenders.F.batch_norm(case.x, case.gamma, case.beta, eps=contenders.EPS, residual=case.residual)[0]
    assert 0.9 * block.MARGIN < np.abs(y).min() < 2 * block.MARGIN


def test_onednn_does_not_fuse_the_block():
    """Once it does on a CPU, `block.BlockOneDnn` should use that."""
    from bnfast.commands.bench import onednn

    try:
        engine = onednn.Engine()
    except ImportError as error:
        pytest.skip(str(error))
    data = engine.descriptor((4, 32), (32, 1))
    assert engine.forward(data, 1e-5, training=True)
    with pytest.raises(onednn.Status, match="status 3"):
        engine.forward(data, 1e-5, training=True, flags=onednn.FUSE_ADD_RELU)


def test_check_finds_a_wrong_result():
    case = contenders.Case(SHAPES["8x16"], "float32")
    good = contenders.create("bnfast", 1).operations(case)
    for operation, key in (("forward", "y"), ("backward", "dx"), ("backward", "dgamma"), ("eval", "y")):
        found = {name: value.copy() for name, value in good[operation].result("").items()}
        contenders.check(case, operation, found)
        found[key][..., -1] += 0.01 * np.abs(found[key]).max() + 0.01
        with pytest.raises(ArithmeticError, match=key):
            contenders.check(case, operation, found)
        found[key][..., -1] = np.nan
        with pytest.raises(ArithmeticError, match=key):
            contenders.check(case, operation, found)


def test_the_floor_copies_or_adds():
    try:
        floor = contenders.create("floor", 2)
    except contenders.Unavailable as error:
        pytest.skip(str(error))
    case = contenders.Case(SHAPES["128x256"], "float32")
    operations = floor.operations(case)
    for operation, expected in (("forward", case.x), ("backward", case.x + case.dy), ("eval", case.x)):
        operations[operation].variants[""]()
        np.testing.assert_array_equal(case.out, expected)
    case = block.BlockCase(SHAPES["128x256"], "float32")
    forward, backward = (op.variants[""] for op in block.create("floor", 2).operations(case).values())
    forward()
    backward()
    for found, expected in ((case.out, case.x + case.residual), (case.dx, case.out), (case.dresidual, case.dy)):
        np.testing.assert_array_equal(found, expected)


def test_a_build_without_the_floor_says_so(monkeypatch):
    monkeypatch.delattr(contenders._core, "memory_floor", raising=False)
    with pytest.raises(contenders.Unavailable, match="floor not available"):
        contenders.create("floor", 2)


def test_missing_onednn_is_unavailable(monkeypatch):
    from bnfast.commands.bench import onednn

    monkeypatch.setattr(onednn, "library_path", lambda: None)
    with pytest.raises(contenders.Unavailable, match="onednn-cpu-gomp"):
        contenders.create("onednn", 2)


def test_missing_torch_is_unavailable(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in ("torch", "torch.compile"):
        with pytest.raises(contenders.Unavailable, match="torch is not installed"):
            contenders.create(name, 2)


def test_training_in_numpy_and_with_bnfast_is_the_same(monkeypatch):
    monkeypatch.setattr(loop, "BATCH", 16)
    monkeypatch.setattr(loop, "WIDTHS", (784, 32, 32, 32, 10))
    ours, plain = (loop.Training(kind).notes()["losses"] for kind in ("bnfast", "numpy"))
    np.testing.assert_allclose(ours, plain, rtol=1e-3)
    assert ours[-1] < ours[0]


@pytest.mark.parametrize("kind", residual_block.KINDS)
@pytest.mark.filterwarnings("default")  # other people's packages warn
def test_a_residual_block_is_the_same_however_it_is_computed(kind, monkeypatch, own_torch_settings):
    monkeypatch.setattr(residual_block, "DIMS", (4, 5, 5, 16))
    try:
        found = residual_block.ResidualBlock(kind)
    except contenders.Unavailable as error:
        pytest.skip(str(error))
    assert found.notes()["error"] < 1e-5
    for operation in found.tasks().values():  # may be called again and again
        operation.variants[""]()


def test_a_wrong_residual_block_is_refused(monkeypatch):
    monkeypatch.setattr(residual_block, "DIMS", (4, 5, 5, 16))
    right = residual_block.expected()
    monkeypatch.setattr(residual_block, "expected", lambda: {**right, "dweight": right["dweight"] * 1.02})
    with pytest.raises(ArithmeticError, match="dweight of the residual block is wrong"):
        residual_block.ResidualBlock("fused")


# --- Workers --------------------------------------------------------------------------------------------------


def state(pid):
    """The process's state in Linux's words: S sleeps, T is stopped, None has ended."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return None


def eventually(condition):
    end = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_a_worker_stops_between_its_turns_and_ends():
    with worker.Worker("bnfast", "contenders:create", {"name": "bnfast", "threads": 1}) as bnfast:
        assert "bnfast" in bnfast.about()
        pid = bnfast._process.pid
        assert bnfast.ask("prepare", shape="8x16", dtype="float32", fresh=False)["operations"] == list(OPERATIONS)
        eventually(lambda: state(pid) == "T")
        bnfast.ask("calibrate", operation="eval")
        assert len(bnfast.ask("measure", operation="eval", samples=2)["seconds"]) == 2
        eventually(lambda: state(pid) == "T")
    assert state(pid) is None


def test_other_work_before_a_call_is_not_timed(monkeypatch):
    calls = []
    monkeypatch.setattr(worker, "COLD_SECONDS", 0.1)
    begun = time.perf_counter()
    seconds = worker.timed_cold(lambda: calls.append(1), 3)
    assert time.perf_counter() - begun >= 0.3
    assert seconds < 0.1
    assert len(calls) == 3


@pytest.mark.parametrize("wrap", [lambda a: a, lambda a: (a, None), lambda a: [a], lambda a: {"y": a}])
def test_the_result_of_a_call_is_read(wrap):
    array = np.arange(5.0)
    assert worker.with_reader(lambda: wrap(array), None)() == 10
    assert worker.with_reader(lambda: None, array)() == 10


@linux
def test_a_worker_measures_with_something_between_its_calls():
    with worker.Worker("bnfast", "contenders:create", {"name": "bnfast", "threads": 1}) as bnfast:
        bnfast.about()
        for between in ("cold", "consumer"):
            bnfast.ask("prepare", shape="8x16", dtype="float32", fresh=False, between=between)
            calls = bnfast.ask("calibrate", operation="forward")["calls"]
            assert calls == worker.COLD_CALLS if between == "cold" else calls > worker.COLD_CALLS
            assert len(bnfast.ask("measure", operation="forward", samples=2)["seconds"]) == 2


@linux
def test_workers_end_on_an_error():
    numpy = worker.Worker("numpy", "contenders:create", {"name": "numpy", "threads": 1})

    def fail():
        with numpy:
            numpy.about()
            numpy.stop()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not numpy.alive
    assert state(numpy._process.pid) is None


def test_a_worker_that_fails_says_why():
    unknown = worker.Worker("x", "contenders:create", {"name": "x", "threads": 1})
    with unknown, pytest.raises(worker.WorkerError, match="KeyError"):
        unknown.about()
    with worker.Worker("bnfast", "contenders:create", {"name": "bnfast", "threads": 1}) as killed:
        killed.about()
        killed._process.kill()
        with pytest.raises(worker.WorkerError, match="ended"):
            killed.ask("measure", operation="eval", samples=1)


def children(pid):
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/stat") as file:
                if int(file.read().rpartition(")")[2].split()[1]) == pid:
                    found.append(int(entry))
        except OSError:
            pass
    return found


@linux
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL], ids=["interrupt", "kill"])
def test_workers_do_not_outlive_the_command(tqdm, how):
    ctrl_c = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a background shell ignores it
    code = (
        f"import sys; from bnfast.commands.bench import main; sys.exit(main(['--only', 'numpy', '--shapes', '{TINY}']))"
    )
    code = f"{ctrl_c}; {code}"
    command = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    workers = []
    try:
        eventually(lambda: workers.extend(children(command.pid)) or len(set(workers)) >= 2)
        eventually(lambda: any(state(pid) == "T" for pid in workers))
        command.send_signal(how)
        _, err = command.communicate(timeout=100)
    finally:
        command.kill()
        command.wait()
    if how == signal.SIGINT:
        assert command.returncode == 130
        assert "interrupted" in err
    eventually(lambda: all(state(pid) in (None, "Z") for pid in workers))


# --- The command ----------------------------------------------------------------------------------------------

KEYS = ["format", "date", "command", "machine", "threads", "dtype", "fresh", "between", "sizes", "block"]
KEYS += ["rounds", "samples_per_turn"]
KEYS += ["contenders", "missing", "results", "geometric_means"]
RESULT_KEYS = ["shape", "operation", "group", "contender", "median", "q1", "q3", "min", "samples"]
RESULT_KEYS += ["calls_per_sample", "variant", "bytes", "ratio"]


def test_the_command_compares_writes_and_draws(tqdm, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    import matplotlib.image

    file, figure = tmp_path / "bench.json", tmp_path / "bench.png"
    arguments = ["--quick", "--shapes", TINY, "--only", "bnfast,numpy", "--json", str(file), "--figure", str(figure)]
    assert bench.main(arguments) == 0
    out = capsys.readouterr().out
    found = json.loads(file.read_text(encoding="utf-8"))
    assert list(found) == KEYS
    assert (found["threads"], found["dtype"], found["missing"]) == (2, "float32", {})
    assert all(list(r) == RESULT_KEYS for r in found["results"])
    seen = {(r["shape"], r["operation"], r["contender"]) for r in found["results"]}
    assert seen == {(s, o, c) for s in TINY.split(",") for o in OPERATIONS for c in ("bnfast", "numpy")}
    for r in found["results"]:
        assert 0 < r["min"] <= r["q1"] <= r["median"] <= r["q3"]
        assert r["samples"] == 9
    numpy = [r["ratio"] for r in found["results"] if r["contender"] == "numpy"]
    assert found["geometric_means"]["tiny"]["numpy"] == pytest.approx(np.exp(np.log(numpy).mean()))
    for text in ("8x16", "32x64", "times as long as bnfast", "geometric means", "tiny", str(figure)):
        assert text in out
    assert out.index("geometric means") < out.index("median time")  # the summary comes first
    assert figure.read_bytes().startswith(b"\x89PNG")
    height, width, _ = matplotlib.image.imread(figure).shape
    assert 400 <= height <= 3000
    assert 1200 <= width <= 3000


def run_bench(tmp_path, *arguments):
    """What `bench` writes."""
    file = tmp_path / "bench.json"
    assert bench.main([*arguments, "--quick", "--json", str(file)]) == 0
    return json.loads(file.read_text(encoding="utf-8"))


def test_the_sweep_is_measured_and_drawn(tqdm, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(table_of_shapes, "LARGEST_WHEN_QUICK", 4096)
    figure = tmp_path / "bench.png"
    found = run_bench(tmp_path, "--sizes", "--only", "numpy", "--figure", str(figure))
    assert found["sizes"]
    assert found["geometric_means"].keys() == {f"{kind} {operation}" for kind in SIZES for operation in OPERATIONS}
    assert {r["shape"] for r in found["results"]} == {shapes[0].name for shapes in SIZES.values()}
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_the_block_is_measured_and_drawn(tqdm, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    figure = tmp_path / "bench.png"
    found = run_bench(tmp_path, "--block", "--only", "bnfast+numpy", "--shapes", "8x16,5x7x2", "--figure", str(figure))
    assert found["block"]
    seen = {(r["shape"], r["operation"], r["contender"]) for r in found["results"]}
    assert seen == {(s, o, c) for s in ("8x16", "5x7x2") for o in BLOCK for c in ("bnfast", "bnfast+numpy")}
    out = capsys.readouterr().out
    for text in (*(tables.OP_TITLES[operation] for operation in BLOCK), "batch norm of bnfast, the rest NumPy"):
        assert text in out
    assert tables.OP_TITLES["eval"] not in out
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_cold_calls_are_measured_beside_one_thread(tqdm, tmp_path, capsys):
    found = run_bench(tmp_path, "--cold", "--only", "bnfast-1", "--shapes", "8x16,5x7x2")
    assert found["between"] == "cold"
    assert {r["contender"] for r in found["results"]} == {"bnfast", "bnfast-1"}
    assert {r["shape"] for r in found["results"]} == {"8x16", "5x7x2"}
    assert "other work" in capsys.readouterr().out


def test_calls_whose_result_is_read_take_longer(tqdm, tmp_path, capsys):
    """NumPy needs a microsecond for it, and more than that for the rest."""
    found = run_bench(tmp_path, "--consumer", "--only", "numpy", "--shapes", "8x16")
    assert found["between"] == "consumer"
    assert min(r["min"] for r in found["results"]) > 1e-6
    assert "its result is read" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", {"bnfast", "floor", "onednn", "torch", "torch.compile", "numpy"}),
        ("--quick", {"bnfast", "floor", "onednn", "torch", "numpy"}),
        ("--cold", {"bnfast", "bnfast-1", "onednn", "torch"}),
        ("--sizes --quick", {"bnfast", "onednn", "torch"}),
        ("--block", {"bnfast", "batch-norm", "bnfast+numpy", "floor", "onednn", "torch", "torch.compile", "numpy"}),
        ("--cold --only numpy", {"bnfast", "numpy"}),
    ],
)
def test_who_runs_by_default(tqdm, monkeypatch, arguments, expected):
    plans = []
    monkeypatch.setattr(compare, "compare", lambda plan, *_: plans.append(plan) or sys.exit(7))
    with pytest.raises(SystemExit, match="7"):
        bench.main(arguments.split())
    assert set(plans[0].contenders) == expected


def test_a_plan_is_explained(capsys):
    assert bench.main(["--explain", "8x16x5-cl", "--dtype", "float64", "--threads", "3"]) == 0
    out = capsys.readouterr().out
    for operation in OPERATIONS:
        words = contenders._core.explain((8, 5, 16), 2, "float64", operation, 3)["words"]
        indented = "".join(f"    {line}\n" for line in words.splitlines())
        assert f"8x16x5-cl float64, {operation}, 3 threads\n{indented}" in out


def test_a_build_that_explains_nothing_says_so(monkeypatch, capsys):
    monkeypatch.delattr(contenders._core, "explain", raising=False)
    assert bench.main(["--explain", "8x16"]) == 1
    assert "does not explain" in capsys.readouterr().err


def test_a_missing_contender_is_named(tqdm, tmp_path, monkeypatch, capsys):
    stub = tmp_path / "torch.py"
    stub.write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")])))
    file = tmp_path / "bench.json"
    assert bench.main(["--quick", "--shapes", "8x16", "--only", "torch", "--json", str(file)]) == 0
    assert "left out: torch: torch is not installed (python -m pip install torch)" in capsys.readouterr().out
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["missing"] == {"torch": "torch is not installed"}
    assert {r["contender"] for r in found["results"]} == {"bnfast"}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--only nonsense", "nonsense"),
        ("--shapes 1x2", "1x2"),
        ("--threads 0", "--threads"),
        ("--dtype int8", "--dtype"),
        ("--loop --fresh", "--loop"),
        ("--loop --cold", "--loop"),
        ("--loop --block", "--loop"),
        ("--block --fresh", "--block"),
        ("--block --sizes", "--block"),
        ("--only bnfast+numpy", "bnfast+numpy"),
        ("--only batch-norm", "batch-norm"),
        ("--cold --consumer", "--consumer"),
        ("--sizes --shapes 8x16", "--sizes"),
        ("--means f.png --quick", "--means"),
        ("--explain 8", "--explain"),
        ("--explain 8x16 --cold", "--explain"),
    ],
)
def test_bad_arguments(arguments, named, capsys):
    with pytest.raises(SystemExit) as caught:
        bench.main(arguments.split())
    assert caught.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(("module", "arguments"), [("tqdm", []), ("matplotlib", ["--figure", "f.png"])])
def test_a_missing_package_is_named_before_measuring(module, arguments, monkeypatch, capsys):
    pytest.importorskip("tqdm")
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(compare, "compare", lambda *_: pytest.fail("measuring began"))
    assert bench.main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert module in err


def test_an_unwritable_file_is_refused_before_measuring(tqdm, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "compare", lambda *_: pytest.fail("measuring began"))
    assert bench.main(["--json", str(tmp_path / "missing" / "f.json")]) == 1
    assert "missing" in capsys.readouterr().err
