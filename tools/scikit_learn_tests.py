"""Runs scikit-learn's own tests of StandardScaler with bnfast's class in its place.

    python tools/scikit_learn_tests.py [--short] [--theirs] [pytest arguments, as -k pattern]

They come with scikit-learn's wheel and are run from where they are installed: every test module that names
StandardScaler (--short: those of SHORT, half a minute). Before they are imported `sklearn.preprocessing.StandardScaler`
is exchanged, so that they, and nothing else of scikit-learn, get ours. Counted are the tests that reach it, that is,
call one of its methods. What fails has to stand in FAILURES with its reason; a failure that does not, and a listed
test that passes or is gone, are errors.

--theirs runs the same tests with scikit-learn's own class, and says which of FAILURES fail with it, too.
"""

import argparse
import collections
import functools
import importlib.metadata
import inspect
import os
import re
import sys
from pathlib import Path

import pytest
import sklearn.preprocessing
from sklearn.utils.discovery import all_estimators

import bnfast

RELEASE = "1.9.1"  # that FAILURES is about
SHORT = ["preprocessing/tests/test_data.py", "tests/test_base.py", "utils/tests/test_set_output.py"]

# {tests, as a regular expression of their whole name: why they fail}
FAILURES = {
    r"tests/test_pipeline\.py::test_feature_union_array_api_support_tag": (
        "It asks that the scaler's tags promise arrays of other libraries (array API). Ours takes NumPy's, and "
        "promises no others."
    ),
}


def test_modules(folder: Path) -> list[str]:
    """Those that name the scaler, as paths relative to scikit-learn's folder."""
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("test_*.py")
        if re.search(r"\bStandardScaler\b", path.read_text(encoding="utf-8"))
    )


def may_reach(item) -> bool:
    """Whether a test, what it is given, or what it calls of its own module names the scaler; others are left out."""
    module, pending, done = item.module, [item.function], set()
    pending += [d.func for name in item.fixturenames for d in item._fixtureinfo.name2fixturedefs.get(name, ())]
    given = getattr(item, "callspec", None)
    if given is not None and "StandardScaler" in repr(given.params):
        return True
    while pending:
        thing = pending.pop()
        if not inspect.isfunction(thing) and not inspect.isclass(thing):
            if "StandardScaler" in repr(thing):
                return True
            continue
        if thing in done or thing.__module__ != module.__name__:
            continue
        done.add(thing)
        source = inspect.getsource(thing)
        if "StandardScaler" in source:
            return True
        pending += [vars(module)[name] for name in set(re.findall(r"\w+", source)) & vars(module).keys()]
    return False


class Exchange:
    """pytest's plugin: puts a class in scikit-learn's place, and records what becomes of the tests that reach it."""

    def __init__(self, scaler: type) -> None:
        all_estimators()  # imports all of scikit-learn: what it takes from itself stays its own
        sklearn.preprocessing.StandardScaler = scaler
        self.reached = False
        self.outcomes: dict[str, str] = {}
        self.reasons: dict[str, str] = {}  # of tests that are not run, or expected to fail
        for base in scaler.__mro__[:-1]:
            for name, value in list(vars(base).items()):
                if inspect.isfunction(value):
                    setattr(base, name, self.seen(value))

    def seen(self, method):
        @functools.wraps(method)
        def call(instance, *args, **kwargs):
            self.reached = True
            return method(instance, *args, **kwargs)

        return call

    def pytest_collection_modifyitems(self, config, items):
        kept = [item for item in items if not hasattr(item, "function") or may_reach(item)]
        config.hook.pytest_deselected(items=list(set(items) - set(kept)))
        items[:] = kept

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item, nextitem):
        self.reached = False
        found = yield
        if not self.reached:
            self.outcomes.pop(item.nodeid, None)
        return found

    def pytest_runtest_logreport(self, report):
        outcome = "expected to fail" if report.skipped and hasattr(report, "wasxfail") else report.outcome
        if report.when == "call" or outcome != "passed":
            self.outcomes[report.nodeid] = outcome
            if outcome in ("skipped", "expected to fail"):
                self.reasons[report.nodeid] = getattr(report, "wasxfail", None) or report.longrepr[2]


def faults(outcomes: dict[str, str], complete: bool) -> list[str]:
    """What FAILURES says and is not so, either way."""
    failed = {name for name, outcome in outcomes.items() if outcome == "failed"}
    explained = {name: [p for p in FAILURES if re.fullmatch(p, name)] for name in outcomes}
    found = [f"failed, and is not in FAILURES: {name}" for name in sorted(failed) if not explained[name]]
    found += [f"{outcomes[n]}, but is in FAILURES: {n}" for n in sorted(explained) if explained[n] and n not in failed]
    if complete:
        seen = {pattern for patterns in explained.values() for pattern in patterns}
        found += [f"no test that reaches the scaler has the name {pattern}" for pattern in FAILURES.keys() - seen]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--theirs", action="store_true")
    options, given = parser.parse_known_args()
    version = importlib.metadata.version("scikit-learn")
    if version != RELEASE:
        print(f"expected scikit-learn {RELEASE}, which FAILURES is about, got {version}", file=sys.stderr)
        return 2
    folder = Path(sklearn.__file__).parent
    exchange = Exchange(sklearn.preprocessing.StandardScaler if options.theirs else bnfast.StandardScaler)
    os.chdir(folder)
    settings = [
        "-c",
        os.devnull,
        "--rootdir=.",
        "--confcutdir=.",
        "-p",
        "no:cacheprovider",
        "--disable-warnings",
        "-q",
        "--tb=line",
        "--durations=25",
    ]
    pytest.main([*settings, *given, *(SHORT if options.short else test_modules(folder))], plugins=[exchange])

    counts = collections.Counter(exchange.outcomes.values())
    print(f"\n{len(exchange.outcomes)} tests reach the scaler: {dict(counts.most_common())}")
    reasons = collections.Counter(
        (outcome, exchange.reasons[name]) for name, outcome in exchange.outcomes.items() if name in exchange.reasons
    )
    for (outcome, reason), n in reasons.most_common():
        print(f"{n} {outcome}: {reason.strip()}")
    if options.theirs:
        failed = [name for name, outcome in exchange.outcomes.items() if outcome == "failed"]
        print(*failed, sep="\n")
        return 0
    for pattern, reason in FAILURES.items():
        names = [n for n, outcome in exchange.outcomes.items() if outcome == "failed" and re.fullmatch(pattern, n)]
        print(f"{len(names)} failed: {pattern}\n    {reason}")
    wrong = faults(exchange.outcomes, complete=not options.short and not given)
    print(*wrong, sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
