"""The guide's recipes for Spark and Ray, run as they stand, each with its engine in a process of its own.

Skipped where the engine is not installed: its blocks (marked py) are left out by test_docs.py, which runs all others.
"""

import importlib.util
import re
import shutil
import sys

import pytest
from places import ROOT
from world import ended, started

PAGE = ROOT / "docs" / "large" / "recipes.md"
LIMIT = 500  # seconds: Spark starts a Java for a minute
CHECK = """
assert whole.count == len(data), whole.count
assert np.allclose(whole.mean, exact.mean(0), rtol=1e-13, atol=0)
assert np.allclose(whole.var(), exact.var(0), rtol=1e-11, atol=0)
print("CHECKED")
"""


@pytest.mark.skipif(not PAGE.exists(), reason="the guide is not beside the installed tests")
@pytest.mark.parametrize("engine", ["pyspark", "ray"])
def test_a_recipe_runs_as_it_stands(engine, tmp_path):
    if importlib.util.find_spec(engine) is None or importlib.util.find_spec("pandas") is None:
        pytest.skip(f"needs {engine} and pandas: pip install {engine} pandas")
    if engine == "pyspark" and shutil.which("java") is None:
        pytest.skip("Spark needs Java")
    found = re.findall(r"^```(python|py)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    (recipe,) = (code for kind, code in found if kind == "py" and re.search(rf"^(from|import) {engine}\b", code, re.M))
    before = [code for kind, code in found if kind == "python" and "joblib" not in code]
    script = tmp_path / "recipe.py"
    script.write_text("\n".join([*before, "del whole", recipe, CHECK]), encoding="utf-8")
    options = {"HOME": str(tmp_path), "PYSPARK_PYTHON": sys.executable, "RAY_USAGE_STATS_ENABLED": "0"}  # nothing stays
    status, output = ended(started([sys.executable, str(script)], **options), LIMIT)
    assert status == 0, output
    assert "CHECKED" in output
