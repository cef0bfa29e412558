"""tools/scikit_learn_tests.py: what it calls a fault. (What it finds, a CI step says.)"""

import importlib.util

import pytest
from places import ROOT, needs_sources

pytestmark = needs_sources


@pytest.fixture
def tool(monkeypatch):
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    spec = importlib.util.spec_from_file_location("scikit_learn_tests", ROOT / "tools" / "scikit_learn_tests.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "FAILURES", {r"test_a\[.*\]": "it is so"})
    return module


def test_a_listed_failure_is_none(tool):
    assert tool.faults({"test_a[1]": "failed", "test_b": "passed", "test_c": "skipped"}, complete=True) == []


@pytest.mark.parametrize(
    ("outcomes", "complete", "fault"),
    [
        ({"test_a[1]": "failed", "test_b": "failed"}, True, "failed, and is not in FAILURES: test_b"),
        ({"test_a[1]": "failed", "test_a[2]": "passed"}, True, "passed, but is in FAILURES: test_a[2]"),
        ({"test_a[1]": "skipped"}, False, "skipped, but is in FAILURES: test_a[1]"),
        ({"test_b": "passed"}, True, r"no test that reaches the scaler has the name test_a\[.*\]"),
    ],
)
def test_faults(tool, outcomes, complete, fault):
    assert tool.faults(outcomes, complete) == [fault]


def test_a_part_of_the_tests_need_not_have_all_failures(tool):
    assert tool.faults({"test_b": "passed"}, complete=False) == []


def test_every_failure_has_a_reason(tool):
    spec = importlib.util.spec_from_file_location("again", ROOT / "tools" / "scikit_learn_tests.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert all(len(reason) > 20 for reason in module.FAILURES.values())
