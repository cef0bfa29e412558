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
    assert len(code) == 2
    names: dict[str, object] = {}
    for block in code:
        exec(compile(block, str(README), "exec"), names)
    loss = float(capsys.readouterr().out.split()[1])
    assert loss < 0.5  # targets are near +-1: a network that learned nothing has a loss of about 1


def test_training_example_is_short() -> None:
    lines = [line for line in blocks("python")[0].splitlines() if line.strip()]
    assert len(lines) <= 16


def test_opens_with_the_two_commands() -> None:
    commands = blocks("sh")
    assert len(commands) == 2
    assert "python -m bnfast demo" in commands[0]
    assert "python -m pytest" in commands[1]


def test_images_exist() -> None:
    images = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README.read_text(encoding="utf-8"))
    assert images
    for image in images:
        assert (README.parent / image).is_file()
