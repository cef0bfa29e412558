"""Where files lie that tests read: fixtures, and the checkout, which an installed package is tested without."""

from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
FIXTURES = TESTS / "fixtures"
ROOT = TESTS.parent
SOURCES = ROOT / "src" / "bnfast"
KERNELS = SOURCES / "kernels"

needs_sources = pytest.mark.skipif(
    not KERNELS.is_dir() or not (ROOT / "setup.py").is_file(),
    reason="the sources do not lie beside the tests: an installed package is being tested",
)
