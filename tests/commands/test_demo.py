"""The demo: its layers are right, its comparison is fair, its command behaves."""

import errno
import json
import re
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

import bnfast
from bnfast import BatchNorm, check_gradient, check_layer
from bnfast.commands import demo, network

EXTRA_MODULES = sorted(demo.EXTRAS)


@pytest.fixture
def extra():
    """Skip the test where the packages of the extra `demo` are not installed."""
    for module in EXTRA_MODULES:
        pytest.importorskip(module)


@pytest.fixture
def one_blas_thread(extra):
    """As the demo trains. Where other processes want the CPUs too, two threads can take 20 times as long."""
    with sys.modules["threadpoolctl"].threadpool_limits(1, user_api="blas"):
        yield


@pytest.fixture
def no_training(monkeypatch):
    monkeypatch.setattr(demo, "fit", lambda *args, **kwargs: pytest.fail("training began"))


def rows(text):
    """Return the printed table as {(network, normalisation): (loss, shares: train, test, its lowest and highest)}."""
    found = {}
    for line in text.splitlines():
        for name in demo.NETWORKS:
            if re.match(rf"{name} +[\d.]", line):
                _rate, kind, loss, *shares, _seconds = line.removeprefix(name).split()
                found[name, kind] = float(loss), *(float(share.strip("%")) / 100 for share in shares)
    return found


# --- Layers ---


RNG = np.random.default_rng(7)
LAYERS = {
    "linear": (network.Linear(5, 4, RNG, np.float64), (3, 5)),
    "conv": (network.Conv2d(2, 3, RNG, np.float64), (2, 2, 4, 5)),
    "conv_one_pixel": (network.Conv2d(2, 3, RNG, np.float64), (2, 2, 1, 1)),
    "relu": (network.ReLU(), (3, 5)),
    "sigmoid": (network.Sigmoid(), (3, 5)),
    "mean_pool": (network.MeanPool(), (2, 3, 4, 6)),
    "flatten": (network.Flatten(), (2, 3, 2, 2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_gradients_agree_with_central_differences(name):
    layer, shape = LAYERS[name]
    rng = np.random.default_rng(11)
    for parameter in layer.parameters().values():
        parameter += rng.standard_normal(parameter.shape)
    check = check_layer(layer, rng.standard_normal(shape))
    check.raise_if_failed()
    assert {row.input.partition("[")[0] for row in check.rows} == {"x", *layer.parameters()}  # and parts of them


def test_conv_is_a_correlation_with_zeros_around_the_image():
    conv = network.Conv2d(2, 3, np.random.default_rng(0), np.float64)
    x = np.random.default_rng(1).standard_normal((2, 2, 4, 5))
    kernels = conv.weight.T.reshape(3, 2, 3, 3)
    padded = np.zeros((2, 2, 6, 7))
    padded[:, :, 1:-1, 1:-1] = x
    expected = np.empty((2, 3, 4, 5))
    for n, o, i, j in np.ndindex(expected.shape):
        expected[n, o, i, j] = (padded[n, :, i : i + 3, j : j + 3] * kernels[o]).sum()
    np.testing.assert_allclose(conv.forward(x), expected, rtol=1e-12)


def test_cross_entropy_gradient_agrees_with_central_differences():
    scores = np.random.default_rng(3).standard_normal((4, 10))
    labels = np.array([0, 9, 3, 3])
    loss, gradient = (lambda scores, i=i: network.cross_entropy(scores, labels)[i] for i in (0, 1))
    check_gradient(loss, gradient, scores).raise_if_failed()


def test_cross_entropy_of_huge_scores_is_finite():
    loss, dscores = network.cross_entropy(np.array([[1e30, -1e30]], np.float32), np.array([0]))
    assert loss == 0
    assert np.all(dscores == 0)
    assert dscores.dtype == np.float32


# --- The comparison ---


@pytest.mark.parametrize("name", demo.NETWORKS)
def test_networks_differ_in_batch_norm_alone(name):
    build, _ = demo.NETWORKS[name]
    rng_with, rng_without = np.random.default_rng(5), np.random.default_rng(5)
    with_bn, without = build(rng_with, True), build(rng_without, False)
    assert [layer.activation for layer in with_bn if isinstance(layer, BatchNorm)] == ["relu"] * sum(
        isinstance(layer, network.ReLU) for layer in without
    )
    others = [layer for layer in with_bn if not isinstance(layer, BatchNorm)]  # BatchNorm stands where a ReLU does
    theirs = [layer for layer in without if not isinstance(layer, network.ReLU)]
    assert [type(layer) for layer in others] == [type(layer) for layer in theirs]
    for one, other in zip(others, theirs, strict=True):
        for key, parameter in one.parameters().items():
            np.testing.assert_array_equal(parameter, other.parameters()[key])
    assert rng_with.bit_generator.state == rng_without.bit_generator.state  # so the batches are the same


@pytest.mark.parametrize("name", demo.NETWORKS)
def test_everything_is_float32(name):
    layers = demo.NETWORKS[name][0](np.random.default_rng(0), True)
    y = np.random.default_rng(1).random((4, 1, 8, 8), np.float32)
    for layer in layers:
        y = layer.forward(y)
        assert y.dtype == np.float32
    for layer in reversed(layers):
        y = layer.backward(y)
        assert y.dtype == np.float32
        assert all(gradient.dtype == np.float32 for gradient in layer.gradients().values())


def test_digits_are_split_by_class_without_overlap(extra):
    digits = demo.load_digits(0)
    (train_images, train_labels), (test_images, test_labels) = digits
    assert train_images.shape == (1437, 1, 8, 8)
    assert test_images.shape == (360, 1, 8, 8)
    assert train_images.dtype == np.float32
    assert train_images.min() == 0
    assert train_images.max() == 1
    assert np.abs(np.bincount(train_labels) - 4 * np.bincount(test_labels)).max() <= 4
    every = np.concatenate([train_images, test_images]).reshape(1797, -1)
    from sklearn import datasets

    expected = (datasets.load_digits().data / 16).astype(np.float32)
    np.testing.assert_array_equal(every[np.lexsort(every.T)], expected[np.lexsort(expected.T)])
    assert not np.array_equal(train_images, demo.load_digits(1).train[0])


# --- Saving and going on ---


def of_a_network(layers):
    """Its BatchNorm layers, and the parameters of the others, by name: to be saved, or to be filled."""
    found = {}
    for place, layer in enumerate(layers):
        if isinstance(layer, BatchNorm):
            found[f"{place}"] = layer
        else:
            found |= {f"{place}.{name}": parameter for name, parameter in layer.parameters().items()}
    return found


def bits(layers):
    """Of everything that training changes."""
    found = {}
    for name, value in of_a_network(layers).items():
        arrays = value.state_dict() if isinstance(value, BatchNorm) else {"": value}
        found |= {f"{name} {key}": array.tobytes() for key, array in arrays.items()}
    return found


@pytest.mark.parametrize("name", demo.NETWORKS)
def test_a_network_that_is_saved_and_loaded_goes_on_to_the_bit(name, one_blas_thread, tmp_path):
    """5 epochs, a file, another network filled from it, 5 more: as 10 in one go."""
    (images, labels), test = demo.load_digits(0)
    some = slice(None, None, 4)
    build, rate = demo.NETWORKS[name]

    def train(layers, rng, epochs):
        return [network.learn(layers, images[some], labels[some], rate, rng) for _ in range(epochs)]

    rng = np.random.default_rng(0)
    straight = build(rng, True)
    losses = train(straight, rng, 10)

    rng = np.random.default_rng(0)
    first = build(rng, True)
    assert train(first, rng, 5) == losses[:5]
    state = json.dumps(rng.bit_generator.state)
    bnfast.save(tmp_path / "network", {**of_a_network(first), "rng": state, "epoch": 5, "rate": rate})

    rng = np.random.default_rng(99)
    resumed = build(rng, True)
    assert bits(resumed) != bits(first)
    found = bnfast.load(tmp_path / "network", into=of_a_network(resumed))
    assert bits(resumed) == bits(first)
    assert (found["epoch"], found["rate"]) == (5, rate)
    rng.bit_generator.state = json.loads(found["rng"])
    assert train(resumed, rng, 5) == losses[5:]
    assert bits(resumed) == bits(straight)
    assert network.accuracy(resumed, *test) == network.accuracy(straight, *test)


# --- The command ---


def test_run_prints_the_table_and_writes_the_figure(extra, tmp_path, capsys):
    import matplotlib.image

    path = tmp_path / "figure.png"
    assert demo.main(["--epochs", "2", "--seeds", "2", "--output", str(path)]) == 0
    out = capsys.readouterr().out
    found = rows(out)
    assert found.keys() == {(name, kind) for name in demo.NETWORKS for kind in ("none", "BatchNorm")}
    for (name, kind), values in found.items():  # without it, other machines round a training to another end
        assert kind == "none" or np.isfinite(values).all(), name
    assert found["fully connected", "BatchNorm"][2] >= 0.7
    assert all(0 <= low <= test <= high <= 1 for _, _, test, low, high in found.values())
    assert "2 epochs" in out
    assert "seeds 0, 1" in out
    for name in demo.NETWORKS:  # the words say what the table says
        low, high = (f"{share:.0%}" for share in found[name, "BatchNorm"][3:])
        assert f"{name}: with BatchNorm {low if low == high else f'{low} to {high}'} of the test images" in out
    assert str(path) in out
    height, width, _ = matplotlib.image.imread(path).shape
    assert 600 <= height <= 3000
    assert 800 <= width <= 3000
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", demo.NETWORKS)
def test_batch_norm_decides_at_the_rates_of_the_demo(name, one_blas_thread):
    """Each machine rounds matrix products in its own way; the story has to be the same on all of them."""
    rate = demo.NETWORKS[name][1]
    results = [
        demo.fit(name, rate, normalise, demo.load_digits(seed), 10, seed, lambda: None)
        for normalise in (False, True)
        for seed in range(3)
    ]
    scores = {n: [r.test_accuracies[-1] for r in results if r.normalise == n] for n in (False, True)}
    assert min(scores[True]) > 0.9
    assert max(scores[False]) < 0.6
    assert "learns nothing" in demo.title(results)
    assert "learns nothing" not in demo.title([r._replace(normalise=not r.normalise) for r in results])


def test_same_seed_same_result(one_blas_thread):
    digits = demo.load_digits(0)
    first, second = (demo.fit("convolutional", 0.1, True, digits, 1, 0, lambda: None) for _ in range(2))
    np.testing.assert_array_equal(first.losses, second.losses)


def test_divergence_is_reported_without_warnings(extra, tmp_path, capsys):
    arguments = ["--epochs", "2", "--seeds", "1", "--learning-rate", "1e30", "--output", str(tmp_path / "f.png")]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert demo.main(arguments) == 0
    out = capsys.readouterr().out
    found = rows(out)
    assert len(found) == 4
    assert out.count("(1 of 1 diverged)") == 2
    for loss, *shares in found.values():
        assert np.isnan(loss)
        assert all(0.05 < share < 0.15 for share in shares)


@pytest.mark.parametrize("module", EXTRA_MODULES)
def test_missing_package_is_named_before_training(extra, no_training, module, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    assert demo.main(["--output", str(tmp_path / "f.png")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert demo.EXTRAS[module] in err
    assert f"python -m pip install {demo.EXTRAS[module]}" in err


def test_no_plot_needs_no_matplotlib(extra, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.chdir(tmp_path)
    assert demo.main(["--epochs", "1", "--seeds", "1", "--no-plot", "--output", "not used"]) == 0
    assert len(rows(capsys.readouterr().out)) == 4
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("where", ["missing/figure.png", "folder.png"])
def test_unwritable_output_is_refused_before_training(extra, no_training, where, tmp_path, capsys):
    (tmp_path / "folder.png").mkdir()
    path = tmp_path / where
    assert demo.main(["--output", str(path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert str(path) in err


def test_failed_write_is_reported(extra, tmp_path, monkeypatch, capsys):
    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert demo.main(["--epochs", "1", "--seeds", "1", "--output", str(tmp_path / "f.PNG")]) == 1
    out, err = capsys.readouterr()
    assert len(rows(out)) == 4
    assert "No space left" in err


def test_interrupt(extra, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "fit", interrupt)
    old = tmp_path / "old.png"
    old.write_bytes(b"kept")
    for path in old, tmp_path / "new.png":
        assert demo.main(["--output", str(path)]) == 130
        assert "interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [old]
    assert old.read_bytes() == b"kept"


@pytest.mark.parametrize(
    "arguments",
    [
        "--epochs 0",
        "--epochs x",
        "--seed -1",
        "--seeds 0",
        "--learning-rate 0",
        "--learning-rate nan",
        "--output f.jpg",
        "--output f",
        "--nonsense",
    ],
)
def test_bad_arguments(no_training, arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        demo.main(arguments.split())
    assert caught.value.code == 2
    assert arguments.split()[0] in capsys.readouterr().err
