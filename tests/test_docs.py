"""Every Python block of the guide runs, page by page, in one namespace a page.

A block that imports a library which is not installed is left out, and the test says so by name: the others still run.
"""

import os
import re
import traceback
from pathlib import Path

import pytest
from places import ROOT

DOCS = ROOT / "docs"
PAGES = [path for path in sorted(DOCS.rglob("*.md")) if not {"_build", "_gallery"} & set(path.relative_to(DOCS).parts)]
OPTIONAL = {
    *("torch", "keras", "tensorflow", "flax", "jax", "dask", "sklearn", "joblib", "pandas", "safetensors"),
    *("onnx", "onnxruntime", "skl2onnx"),
}

pytestmark = pytest.mark.skipif(not PAGES, reason="the guide is not beside the installed tests")


def blocks(page: str) -> list[tuple[int, str]]:
    """(line, code) of a page's Python blocks."""
    found = re.finditer(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    return [(page.count("\n", 0, match.start(1)) + 1, match[1]) for match in found]


def run(page: str, name: str) -> set[str]:
    """Runs the blocks; returns the optional libraries that some of them miss."""
    missing, names = set(), {"__name__": "page"}
    for line, code in blocks(page):
        try:
            exec(compile("\n" * (line - 1) + code, name, "exec"), names)
        except ModuleNotFoundError as error:
            library = (error.name or "").partition(".")[0]
            if library not in OPTIONAL:
                raise
            missing.add(library)
        except Exception as error:
            if missing and isinstance(error, NameError):
                continue  # of a block that was left out; where all is installed, none is
            at = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == name]
            pytest.fail(f"{name}:{at[-1] if at else line}: {type(error).__name__}: {error}")
    return missing


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Keras's tensors
@pytest.mark.parametrize("path", [pytest.param(path, id=str(path.relative_to(DOCS))) for path in PAGES])
def test_the_python_of_a_page_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = path.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)  # for what it writes
    assert page.count("```python") == len(blocks(page)), "a block is not closed, or is indented"
    missing = run(page, str(path))
    if os.environ.get("BNFAST_REQUIRE_TORCH"):  # one CI job has to have it
        assert not {"torch", "safetensors"} & missing
    if os.environ.get("BNFAST_REQUIRE_FRAMEWORKS"):  # the same one
        assert not missing - {"tensorflow", "jax", "pandas", "dask"}
    if missing:
        pytest.skip(f"blocks left out, not installed: {', '.join(sorted(missing))}; all others ran")


def test_a_block_that_fails_is_seen_with_its_line() -> None:
    page = "# Page\n\n```python\nx = 1\n```\n\n```python\n\nassert x == 2\n```\n"
    with pytest.raises(pytest.fail.Exception, match=r"page\.md:9: AssertionError"):
        run(page, "page.md")


def test_a_block_that_needs_one_left_out_is_left_out() -> None:
    needs = "```python\nraise ModuleNotFoundError('x', name='torch')\ny = 1\n```\n\n```python\nprint(y)\n```\n"
    assert run(needs, "page.md") == {"torch"}
    with pytest.raises(pytest.fail.Exception, match="NameError"):
        run("```python\nprint(y)\n```\n", "page.md")


def test_only_named_libraries_may_be_missing() -> None:
    assert run("```python\nraise ModuleNotFoundError('x', name='torch')\n```\n", "page.md") == {"torch"}
    with pytest.raises(ModuleNotFoundError):
        run("```python\nimport bnfast.no_such_module\n```\n", "page.md")


def test_the_pages_that_were_asked_for_are_there() -> None:
    names = {path.relative_to(DOCS).as_posix() for path in PAGES}
    folders = {name.partition("/")[0] for name in names if "/" in name}
    assert folders == {"coming-from", "deploy", "guide", "large", "performance", "theory", "zh"}
    assert {f"{folder}/index.md" for folder in folders} <= names
    assert {"index.md", "install.md", "quickstart.md", "how-do-i.md", "api.md", "zh/notes.md"} <= names


def test_links_between_pages_lead_somewhere() -> None:
    for path in PAGES:
        for target in re.findall(r"\]\(([^)#:]+\.(?:md|png))(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).is_file(), f"{path.name}: {target}"
