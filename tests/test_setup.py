"""What the build says when something is missing, and what a package index will show."""

import importlib.util
import io
import re
import subprocess
import sys

import pytest
from places import ROOT, needs_sources

from bnfast.commands.common import EXTRAS

pytestmark = needs_sources


@pytest.fixture
def setup(monkeypatch):
    """setup.py as a module: nothing is built."""
    pytest.importorskip("setuptools")
    pytest.importorskip("Cython")
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("setup_of_bnfast", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def build(setup):
    """A function: setup.py's `build_ext` with a compiler whose `compile` is the argument."""

    class Compiler:
        compiler_type, compiler_so = "unix", ["cc", "-O2"]

        def __init__(self, compile):
            self.compile = compile

    def made(compile):
        command = setup.BuildExt(importlib.import_module("setuptools").Distribution())
        command.extensions, command.compiler = [], Compiler(compile)
        return command

    return made


def fails(*args, **kwargs):
    raise FileNotFoundError("No such file or directory: 'cc'")


def fails_with_openmp(sources, output_dir, extra_postargs=()):
    if extra_postargs:
        raise subprocess.CalledProcessError(1, "cc")
    return []


def test_a_missing_compiler_is_not_called_missing_openmp(build, capsys):
    with pytest.raises(SystemExit) as ended:
        build(fails).build_extensions()
    message = str(ended.value)
    assert "no working C compiler (cc)" in message
    assert "No such file or directory: 'cc'" in message
    assert "apt install gcc" in message
    assert "OpenMP" not in message + capsys.readouterr().err


def test_missing_openmp_is_named_and_the_build_goes_on(build, monkeypatch, capsys):
    monkeypatch.delenv("BNFAST_OPENMP", raising=False)
    command = build(fails_with_openmp)
    command.check_compiler()
    assert command.openmp_flags(msvc=False) == ([], [])
    message = capsys.readouterr().err
    assert "this compiler works, and has no working OpenMP" in message
    assert "libomp-dev" in message


def test_openmp_that_was_asked_for_must_be_there(build, monkeypatch):
    monkeypatch.setenv("BNFAST_OPENMP", "1")
    with pytest.raises(SystemExit, match="BNFAST_OPENMP=1"):
        build(fails_with_openmp).openmp_flags(msvc=False)


def test_the_real_build_ends_with_the_message(tmp_path):
    """As pip calls it, but for Cython, which takes a while and comes first."""
    code = f"""
import sys, runpy
sys.argv = ["setup.py", "-q", "build_ext", "--build-temp", {str(tmp_path)!r}, "--build-lib", {str(tmp_path)!r}]
import Cython.Build
from setuptools import Extension
Cython.Build.cythonize = lambda extension, **options: [Extension("bnfast._core", ["_core.c"])]
runpy.run_path("setup.py", run_name="__main__")
"""
    pytest.importorskip("setuptools")
    pytest.importorskip("Cython")
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={"CC": "/no/such/compiler", "PATH": ""},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode != 0
    assert "no working C compiler (/no/such/compiler)" in run.stderr


# --- the long description ---

README = """[![badge](https://a.b/c.svg)](https://a.b)
![Bars](docs/images/speed.png)
[guide](docs/index.md#there), [site](https://a.b/x), [below](#links)
"""


def test_links_and_figures_lead_to_the_release(setup):
    found = setup.long_description(README, "https://git.example/bnfast", "1.2.3")
    assert "![Bars](https://git.example/bnfast/raw/v1.2.3/docs/images/speed.png)" in found
    assert "[guide](https://git.example/bnfast/blob/v1.2.3/docs/index.md#there)" in found
    assert "[site](https://a.b/x), [below](#links)" in found
    assert "(https://a.b/c.svg)" in found


def test_without_an_address_nothing_leads_nowhere(setup):
    found = setup.long_description(README, None, "1.2.3")
    assert "Bars" not in found
    assert "\nguide, [site](https://a.b/x), [below](#links)" in found


@pytest.mark.parametrize("repository", [None, "https://git.example/bnfast"])
def test_a_package_index_renders_the_readme(setup, repository):
    renderer = pytest.importorskip("readme_renderer.markdown")
    warnings = io.StringIO()
    text = setup.long_description((ROOT / "README.md").read_text(encoding="utf-8"), repository, "1.2.3")
    html = renderer.render(text, stream=warnings)
    assert html
    assert warnings.getvalue() == ""
    targets = [t for t in re.findall(r'(?:href|src)="([^"]*)"', html) if not t.startswith("#")]
    assert all(target.startswith("https:") for target in targets)
    assert len(targets) > 20 if repository else not targets
    tables = len(re.findall(r"(?m)^\| ---", text))  # each has one such line, under its heading
    assert html.count("<table>") == tables > 0
    assert "[" not in re.sub(r"<pre.*?</pre>|<code>.*?</code>", "", html, flags=re.DOTALL)


def test_the_demo_asks_for_what_its_extra_installs():
    tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    installed = {re.match("[\\w-]+", each).group() for each in project["optional-dependencies"]["demo"]}
    assert set(EXTRAS.values()) == installed
