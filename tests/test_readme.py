"""The README's Python runs as it stands; its commands are those of the documentation."""

import re

import pytest
from places import ROOT

README = ROOT / "README.md"
pytestmark = pytest.mark.skipif(not README.exists(), reason="the README is not beside the installed tests")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def test_python_blocks_run_one_after_another(capsys: pytest.CaptureFixture[str]) -> None:
    code = blocks("python")
    assert len(code) == 3
    names: dict[str, object] = {}
    for block in code:
        exec(compile(block, str(README), "exec"), names)
    loss = float(capsys.readouterr().out.split()[1])
    assert loss < 0.5  # targets are near +-1: a network that learned nothing has a loss of about 1


def test_examples_are_short() -> None:
    first, _, training = ([line for line in block.splitlines() if line.strip()] for block in blocks("python"))
    assert len([line for line in first if not line.startswith("import")]) == 5
    assert len(training) <= 16


def test_the_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


def test_opens_with_the_two_commands() -> None:
    commands = blocks("sh")
    assert len(commands) == 2
    assert "python -m bnfast demo" in commands[0]
    assert "python -m pytest" in commands[1]


def test_links_and_images_exist() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", README.read_text(encoding="utf-8"))
    assert {"docs/images/speed.png", "docs/images/demo.png"} <= set(targets)
    for target in targets:
        assert (README.parent / target).is_file(), target
