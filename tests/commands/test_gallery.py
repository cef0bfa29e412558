"""The gallery: what each example claims, in numbers, over several seeds; its figures, page and command."""

import re
import subprocess
import sys
from html import escape
from pathlib import Path

import numpy as np
import pytest

from bnfast.commands import common, gallery

SEEDS = 0, 1, 2
EXTRA_MODULES = sorted(common.EXTRAS)


@pytest.fixture(autouse=True)
def extra():
    """Skip where the packages of the extra `demo` are not installed; else one thread, which is faster here."""
    for module in EXTRA_MODULES:
        pytest.importorskip(module)
    with sys.modules["threadpoolctl"].threadpool_limits(1, user_api="blas"):
        yield


@pytest.fixture(scope="module")
def results():
    """(name) -> the results of an example, a list with one for each seed; computed once."""
    found = {}

    def of(name):
        if name not in found:
            found[name] = [gallery.example(name).compute(seed) for seed in SEEDS]
        return found[name]

    return of


# --- what they claim ---


def test_directional_derivative(results):
    """Differences agree with the gradient in all directions; the error of the increment is of order 2, not 1."""
    steps = gallery.example("directional_derivative").STEPS
    angles = gallery.example("directional_derivative").ANGLES
    for r in results("directional_derivative"):
        np.testing.assert_allclose(r.measured, r.predicted, rtol=0, atol=1e-9 * r.gradient_length)
        off = (angles[np.argmax(r.measured)] - r.gradient_angle + 180) % 360 - 180
        assert abs(off) <= 2.5  # half the distance of the angles
        assert r.measured.max() == pytest.approx(r.gradient_length, rel=1e-3)  # cos(2.5 degrees) is 1 - 0.95e-3
        right, wrong = (np.polyfit(np.log(steps[8:]), np.log(e[8:]), 1)[0] for e in (r.error, r.error_if_wrong))
        assert right == pytest.approx(2, abs=0.05)
        assert wrong == pytest.approx(1, abs=0.25)


def test_feature_scaling(results):
    """Scaled, descent takes less than a twentieth of the steps."""
    for r in results("feature_scaling"):
        assert r.raw.condition > 50 * r.scaled.condition
        assert r.scaled.steps <= 10
        assert r.raw.steps > 20 * r.scaled.steps
        for descent in r:
            assert descent.excess(descent.path[-1]) <= 0.01 * descent.excess(descent.path[0])


def test_learning_rate(results):
    """With batch normalisation a rate at least four times as large still trains; either has a limit."""
    rates = gallery.example("learning_rate").RATES
    for r in results("learning_rate"):
        assert 0 < r.largest_rate_without <= 0.8
        assert 3.2 <= r.largest_rate_with < rates[-1]
        assert r.largest_rate_with >= 4 * r.largest_rate_without
        assert r.losses_with.min() < r.losses_without.min() / 2


def test_vanishing_gradients(results):
    """Without: a factor of over 500 between last and first layer. With: under 2, before and after the activation."""
    for r in results("vanishing_gradients"):
        assert r.norms["without"][0] < 1 / 500
        assert r.accuracies["without"][-1] < 0.3
        for place in "before", "after":
            assert 1 / 2 < r.norms[place].min() <= r.norms[place].max() < 2
            assert r.accuracies[place][-1] > 0.85


def test_before_the_activation_keeps_out_of_saturation(results):
    for r in results("vanishing_gradients"):
        assert r.saturated["before"] < 0.2
        assert r.saturated["after"] > 0.5
        assert r.saturated["without"] > 0.5


def test_initialisation(results):
    """With: 70% and more from every scale, 90% from those below 10. Without: only near He's."""
    module = gallery.example("initialisation")
    for r in results("initialisation"):
        assert r.accuracies_with.min() > 0.7
        assert r.accuracies_with[module.SCALES < 9].min() > 0.9
        assert r.accuracies_without[np.abs(np.log10(module.SCALES)) < 0.1].min() > 0.85
        assert r.accuracies_without[np.abs(np.log10(module.SCALES)) > 0.9].max() < 0.3


def test_invariance_is_exact_but_for_eps(results):
    powers = gallery.example("initialisation").POWERS
    for r in results("initialisation"):
        assert np.all(r.difference_scaled_eps == 0)  # every bit
        assert r.difference[powers > 1].max() < 1e-3
        assert r.difference[powers == 1] == 0
        assert r.difference[0] > 0.1  # and it does not hold where eps counts


def test_test_time_statistics(results):
    """Exact ones arrive, cumulative ones come near, running ones wander or are still on their way."""
    module = gallery.example("test_time_statistics")
    for r in results("test_time_statistics"):
        for size in module.SMALL, module.LARGE:
            running, cumulative, exact = (r.distances[size, kind][-1] for kind in module.KINDS)
            assert exact < 1e-6  # the data are float32, and matrix products of batches round in their own ways
            assert 10 * exact < cumulative < 0.04
            assert running > max(0.05, 3 * cumulative)
        one_batch = {kind: r.accuracies[module.LARGE, kind][0] for kind in module.KINDS}
        assert one_batch["exact"] > one_batch["running"] + 0.05
        last = [r.accuracies[size, kind][-1] for size in (module.SMALL, module.LARGE) for kind in module.KINDS]
        assert min(last) > 0.9
        assert max(last) - min(last) < 0.04  # what is left of the differences costs little


def test_covariate_shift(results):
    """Statistics of training do not help against a shift, on the contrary; those of the shifted images undo it."""
    module = gallery.example("covariate_shift")
    for r in results("covariate_shift"):
        unshifted = r.brightness["calibrated"][module.BRIGHTNESS == 0][0]
        for shifts in r.brightness, r.contrast:
            assert shifts["calibrated"].min() > 0.93
            assert shifts["calibrated"].min() > unshifted - 0.02
            assert shifts["training statistics"].min() < 0.6
            assert shifts["training statistics"].min() < shifts["without"].min() - 0.03
        assert r.brightness["without"].min() < 0.65
        assert r.contrast["without"].min() > 0.6
        unshifted_without = r.brightness["without"][module.BRIGHTNESS == 0][0]
        assert r.contrast["without"][module.CONTRAST >= 1].min() > unshifted_without - 0.02


def test_data_parallel(results):
    """Statistics of the whole batch make the losses those of one process; those of parts do not, and cost something."""
    for r in results("data_parallel"):
        assert r.together[1][-10:].mean() < r.together[1][0] / 5
        for size in 2, 4:
            np.testing.assert_allclose(r.together[size], r.together[1], rtol=0, atol=1e-5)
            assert np.abs(r.apart[size] - r.together[1]).max() > 0.05
        assert r.apart[4][-20:].mean() > 1.1 * r.together[1][-20:].mean()


# --- figures, page, command ---


@pytest.mark.parametrize("name", gallery.EXAMPLES)
def test_a_figure_names_its_axes(results, name):
    module = gallery.example(name)
    figure = module.draw(results(name))
    assert figure.get_suptitle() == module.TITLE
    for axes in figure.axes:
        assert axes.get_title()
        assert axes.get_xlabel()
        assert axes.get_ylabel()


@pytest.mark.parametrize("name", gallery.EXAMPLES)
def test_an_example_says_what_it_shows_in_two_sentences(name):
    module = gallery.example(name)
    assert module.__doc__
    assert len(re.findall(r"[.](?: |$)", module.CAPTION)) == 2


@pytest.fixture
def instant(monkeypatch):
    """Examples that write a byte instead of computing."""
    for name in gallery.EXAMPLES:
        monkeypatch.setattr(
            gallery.example(name), "main", lambda folder, name=name: (Path(folder) / f"{name}.png").write_bytes(b"x")
        )


def test_the_command_writes_every_figure_and_a_page(instant, tmp_path, capsys):
    folder = tmp_path / "a" / "b"
    assert gallery.main([str(folder)]) == 0
    assert {path.name for path in folder.iterdir()} == {"index.html", *(f"{name}.png" for name in gallery.EXAMPLES)}
    html = (folder / "index.html").read_text(encoding="utf-8")
    assert re.findall(r'<img src="(\w+)\.png" alt="[^"]{40,}">', html) == list(gallery.EXAMPLES)
    assert not re.search(r"(src|href)=.https?:", html)
    assert "index.html" in capsys.readouterr().out


def test_the_page_is_escaped(monkeypatch):
    evil = '<script>"&'
    monkeypatch.setattr(gallery.example("learning_rate"), "CAPTION", evil)
    assert evil not in gallery.page()
    assert escape(evil) in gallery.page()


@pytest.mark.parametrize("module", EXTRA_MODULES)
def test_a_missing_package_is_named_before_anything_is_written(module, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, module, None)
    assert gallery.main([str(tmp_path / "new")]) == 1
    assert common.EXTRAS[module] in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_an_error(instant, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert gallery.main([str(tmp_path / "file")]) == 1
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_interrupt(monkeypatch, tmp_path, capsys):
    def interrupt(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr(gallery.example(gallery.EXAMPLES[0]), "main", interrupt)
    assert gallery.main([str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_example_runs_by_itself(tmp_path):
    script = gallery.example("feature_scaling").__file__
    subprocess.run([sys.executable, script, str(tmp_path)], check=True, timeout=300, stdout=subprocess.DEVNULL)
    assert (tmp_path / "feature_scaling.png").read_bytes().startswith(b"\x89PNG")
