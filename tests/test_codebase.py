"""Rules of the code base: who may import whom, what a kernel may contain, flags, public names, docstrings."""

import ast
import doctest
import functools
import importlib
import inspect
import re
import shutil
import subprocess
import sys
import sysconfig
import types
from pathlib import Path

import numpy as np
import pytest

import bnfast
import bnfast.reference

PACKAGE = Path(bnfast.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))
ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "src" / "bnfast"
needs_sources = pytest.mark.skipif(
    not (SOURCES / "_core.pyx").is_file() or not (ROOT / "setup.py").is_file(),
    reason="the sources do not lie beside the tests: an installed package is being tested",
)


# --- who may import whom -------------------------------------------------------------------------------------

# From the top down: __init__ -> layer, scaler, gradient -> functional, moments -> _core -> kernels; and beside them
# what reports and what counts threads. A module may import those named here and nothing else of bnfast.
MAY_IMPORT = {
    "_core": set(),
    "_checks": set(),
    "_table": set(),
    "_runtime": {"_core"},
    "state": set(),
    "reference": set(),
    "threads": {"_checks", "_core"},
    "functional": {"_core"},
    "moments": {"_checks", "_core"},
    "_config": {"_core", "_runtime", "threads"},
    "report": {"_table"},
    "layer": {"_checks", "_core", "functional", "moments", "report", "state"},
    "_estimator": set(),
    "scaler": {"_checks", "_core", "_estimator", "state"},
    "gradient": {"_checks", "_table"},  # and not the layer: it checks anybody's
    "network": {"layer"},
    "demo": {"network"},
    "figures": set(),
    "gallery": {"figures", "network"},  # and the examples, by name
    "__init__": {
        *("_config", "_runtime", "functional", "gradient", "layer", "moments", "scaler", "state", "threads"),
    },
    "__main__": {"__init__", "demo", "gallery"},
}
OTHER_PACKAGES = {  # the rest: NumPy
    "demo": {"numpy", "matplotlib", "tqdm", "threadpoolctl"},
    "network": {"numpy", "sklearn"},
    "figures": {"numpy", "matplotlib"},
    "gallery": {"numpy", "tqdm", "threadpoolctl"},
    "_estimator": {"numpy", "sklearn"},
}


def imports(source):
    """({modules of bnfast}, {other top-level packages}, {those of them imported when the module is}) of a source."""
    own, others, at_once = set(), set(), set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        elif isinstance(node, ast.ImportFrom):
            own |= {node.module.split(".")[0]} if node.module else {alias.name for alias in node.names}
            continue
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top == "bnfast":
                own.add(rest.split(".")[0] or "__init__")
            else:
                others.add(top)
                if node in tree.body:
                    at_once.add(top)
    return own, others, at_once


def imports_of(module):
    own, others, at_once = imports((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    # `from . import x`: x is a module, or a name of __init__
    own = {name if (PACKAGE / f"{name}.py").exists() or name == "_core" else "__init__" for name in own}
    return own, others, at_once


def test_the_reader_of_imports_sees_every_kind():
    source = """
import os, bnfast.layer
from numpy.typing import ArrayLike
from . import _core as c, moments
from .functional import Array
from bnfast.threads import set_num_threads
def f():
    import bnfast
    import torch.nn
"""
    own, others, at_once = imports(source)
    assert own == {"layer", "_core", "moments", "functional", "threads", "__init__"}
    assert others == {"os", "numpy", "torch"}
    assert at_once == {"os", "numpy"}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_the_layers_below(module):
    assert module in MAY_IMPORT, f"{module}.py is new: say in MAY_IMPORT what it may import"
    own, _, _ = imports_of(module)
    assert own <= MAY_IMPORT[module]


def test_the_layers_have_no_cycle():
    ranks = {}

    def rank(module, above=()):
        assert module not in above, f"{' -> '.join((*above, module))}"
        if module not in ranks:
            below = MAY_IMPORT[module] - {module}
            ranks[module] = 1 + max((rank(other, (*above, module)) for other in below), default=0)
        return ranks[module]

    for module in MAY_IMPORT:
        rank(module)
    assert ranks["_core"] < ranks["functional"] < ranks["layer"] < ranks["__init__"]


@pytest.mark.parametrize("module", MODULES)
def test_the_base_install_needs_numpy_only(module):
    _, others, at_once = imports_of(module)
    assert others - set(sys.stdlib_module_names) <= OTHER_PACKAGES.get(module, {"numpy"})
    assert at_once - set(sys.stdlib_module_names) <= {"numpy"}


def test_the_package_imports_in_a_process_that_has_numpy_only():
    """The extras are hidden; the demo may need them, the rest may not."""
    script = """
import sys
for name in ("scipy", "sklearn", "torch", "matplotlib", "tqdm", "threadpoolctl", "pytest", "hypothesis"):
    sys.modules[name] = None
import bnfast, bnfast.reference, bnfast.__main__
bnfast.BatchNorm(2)([[1.0, 2.0], [3.0, 4.0]])
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300)


# --- kernels -------------------------------------------------------------------------------------------------


def c_code(path):
    """A C source without its comments and, except after #include, its strings."""
    text = re.sub(r"/\*.*?\*/|//[^\n]*", " ", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = text.splitlines()
    return "\n".join(line if "include" in line else re.sub(r'"[^"]*"', '""', line) for line in lines)


def kernel_files():
    found = sorted([*SOURCES.glob("kernels/*.c"), *SOURCES.glob("kernels/*.h")])
    return [pytest.param(path, id=path.name) for path in found] or [pytest.param(None, id="none")]


FORBIDDEN_HEADERS = re.compile(r'#\s*include\s*[<"](Python\.h|numpy/|omp\.h|stdlib\.h|malloc\.h|openmp\.h)')
FORBIDDEN_CALLS = re.compile(
    r"\b(malloc|calloc|realloc|free|aligned_alloc|posix_memalign|alloca|_mm_malloc|omp_\w+|Py[A-Z]\w*|pthread_\w+)\s*\("
)
OPENMP_PRAGMA = re.compile(r"#\s*pragma\s+omp\s+(?!simd)")


@needs_sources
@pytest.mark.parametrize("path", kernel_files())
def test_a_kernel_knows_no_python_numpy_openmp_or_malloc(path):
    code = c_code(path)
    for rule in (FORBIDDEN_HEADERS, FORBIDDEN_CALLS, OPENMP_PRAGMA):
        assert not rule.search(code), rule.search(code)


@needs_sources
def test_only_the_door_to_openmp_includes_its_header():
    users = [path.name for path in SOURCES.rglob("*.[ch]") if re.search(r"#\s*include\s*<omp\.h>", c_code(path))]
    assert users == ["openmp.c"]


def compiler():
    """The C compiler Python was built with, or gcc; None without one."""
    command = (sysconfig.get_config_var("CC") or "cc").split()[0]
    return shutil.which(command) or shutil.which("gcc")


def reports_its_mathematics():
    """Whether the compiler has a macro for each kind of fast mathematics (GCC does, Clang does not)."""
    run = subprocess.run(
        [compiler(), "-funsafe-math-optimizations", "-dM", "-E", "-x", "c", "-"],
        input="", capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    return "__ASSOCIATIVE_MATH__" in run.stdout


@needs_sources
@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        (["-ffast-math"], True),
        (["-Ofast"], True),
        (["-O2", "-ffinite-math-only"], True),
        # these two do not define __FAST_MATH__, and link the code that flushes subnormals all the same
        (["-funsafe-math-optimizations"], True),
        (["-Ofast", "-fno-finite-math-only"], True),
        (["-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math"], True),
        (["-freciprocal-math"], True),
        (["-O2"], False),
        (["-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"], False),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_fast_math_stops_the_build_with_a_message(flags, refused):
    if compiler() is None:
        pytest.skip("there is no C compiler here")
    if refused and not reports_its_mathematics() and not {"-ffast-math", "-ffinite-math-only"} & set(flags):
        pytest.skip("this compiler has no macro that says so")
    header = SOURCES / "kernels" / "kernels.h"
    run = subprocess.run(
        [compiler(), *flags, "-std=c11", "-fsyntax-only", "-x", "c", str(header)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (run.returncode != 0) == refused, run.stderr
    assert ("bnfast must not be built with fast-math" in run.stderr) == refused


@needs_sources
@pytest.mark.parametrize("path", [case for case in kernel_files() if not case.id.endswith(".h")])
def test_every_kernel_is_under_the_guard_against_fast_math(path):
    if compiler() is None:
        pytest.skip("there is no C compiler here")
    run = subprocess.run(
        [compiler(), "-ffast-math", "-std=c11", "-fsyntax-only", str(path)],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert "bnfast must not be built with fast-math" in run.stderr


# --- build ---------------------------------------------------------------------------------------------------

FORBIDDEN_FLAGS = [
    "-ffast-math", "-Ofast", "-march=native", "-mtune=native", "-mcpu=native", "-funsafe-math-optimizations",
    "-fassociative-math", "-freciprocal-math", "-ffinite-math-only", "/fp:fast",
]  # fmt: skip


@needs_sources
@pytest.mark.parametrize("name", ["setup.py", "pyproject.toml"])
def test_no_flag_that_changes_results_or_ties_a_wheel_to_a_machine(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert [flag for flag in FORBIDDEN_FLAGS if flag in text] == []


@needs_sources
def test_no_pragma_or_attribute_brings_such_a_flag_in():
    for path in [*SOURCES.rglob("*.[ch]"), *SOURCES.rglob("*.pyx")]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"optimize\s*\(?\s*\"|fast-math\"\s*\)|target_clones", text), path.name
        assert not re.search(r"pragma\s+(STDC\s+FP_CONTRACT\s+ON|GCC\s+optimize|float_control)", text), path.name


@needs_sources
def test_the_compiler_may_not_contract():
    assert '"-ffp-contract=off"' in (ROOT / "setup.py").read_text(encoding="utf-8")


@needs_sources
def test_there_is_one_parallel_loop():
    loops = []
    for path in [*SOURCES.rglob("*.pyx"), *SOURCES.rglob("*.pxd"), *SOURCES.rglob("*.pxi")]:
        code = re.sub(r'""".*?"""|#[^\n]*', "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
        loops += [path.name] * len(re.findall(r"\bprange\s*\(|\bparallel\s*\(", code))
    for path in SOURCES.rglob("*.[ch]"):
        loops += [path.name] * len(OPENMP_PRAGMA.findall(c_code(path)))
    assert loops == ["_core.pyx"]


@needs_sources
def test_omp_set_num_threads_is_never_called():
    for path in [*SOURCES.rglob("*.[ch]"), *SOURCES.rglob("*.py*")]:
        if path.suffix in {".c", ".h", ".py", ".pyx", ".pyi"}:
            assert not re.search(r"omp_set_num_threads\s*\(", path.read_text(encoding="utf-8")), path.name


@needs_sources
def test_the_version_is_the_same_everywhere():
    tomllib = pytest.importorskip("tomllib", reason="tomllib comes with Python 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == bnfast.__version__
    assert project["dependencies"] == ["numpy>=2.0"]


@needs_sources
def test_what_the_package_needs_at_run_time_is_installed_with_it():
    for name in ("py.typed", "_core.pyi"):
        assert (PACKAGE / name).is_file()


# --- public names --------------------------------------------------------------------------------------------

# DESIGN.md, section 8: name, and how it is called (None: not a function). Names that are not there yet are left out.
PUBLIC = {
    "BatchNorm": (
        "(num_features, *, axis=1, eps=1e-05, momentum=0.1, affine=True, track_running_stats=True, "
        "unbiased_running_var=True, dtype=float32)"
    ),
    "BatchNorm.__call__": "(self, x, out=None)",
    "BatchNorm.forward": "(self, x, out=None)",
    "BatchNorm.backward": "(self, dy, out=None)",
    "BatchNorm.train": "(self, mode=True)",
    "BatchNorm.eval": "(self)",
    "BatchNorm.parameters": "(self)",
    "BatchNorm.gradients": "(self)",
    "BatchNorm.state_dict": "(self)",
    "BatchNorm.load_state_dict": "(self, state)",
    "BatchNorm.save": "(self, path)",
    "BatchNorm.load": "(path, *, max_bytes=1073741824)",
    "BatchNorm.reset_parameters": "(self)",
    "BatchNorm.reset_running_stats": "(self)",
    "BatchNorm.calibrate": "(self)",
    "BatchNorm.use_statistics": "(self, which)",
    "BatchNorm.statistics_report": "(self, exact=None)",
    "functional.batch_norm": "(x, gamma=None, beta=None, *, axis=1, eps=1e-05, out=None)",
    "functional.batch_norm_eval": "(x, mean, var, gamma=None, beta=None, *, axis=1, eps=1e-05, out=None)",
    "functional.batch_norm_backward": "(dy, x, mean, inv_std, gamma=None, *, axis=1, training=True, out=None)",
    "functional.batch_norm_jvp": "(v, x, mean, inv_std, gamma=None, *, axis=1, vgamma=None, vbeta=None, out=None)",
    "moments": "(x, *, axis=1)",
    "Moments": "(count, mean, m2)",
    "Moments.var": "(self, ddof=0)",
    "Moments.std": "(self, ddof=0)",
    "directional_derivative": "(f, x, u, *, step=None)",
    "check_gradient": "(f, grad, x, *, directions=8, rtol=1e-06, rng=None)",
    "check_layer": "(layer, x, *, rng=None)",
    "GradientCheck": "(name, rows)",
    "GradientCheck.raise_if_failed": "(self)",
    "StandardScaler": "(*, copy=True, with_mean=True, with_std=True)",
    "StandardScaler.fit": "(self, X, y=None, sample_weight=None, *, batch_size=None, progress=False)",
    "StandardScaler.partial_fit": "(self, X, y=None, sample_weight=None, *, batch_size=None, progress=False)",
    "StandardScaler.transform": "(self, X, copy=None, *, out=None)",
    "StandardScaler.fit_transform": "(self, X, y=None, *, sample_weight=None, out=None)",
    "StandardScaler.inverse_transform": "(self, X, copy=None, *, out=None)",
    "StandardScaler.merge": "(self, other)",
    "StandardScaler.get_feature_names_out": "(self, input_features=None)",
    "StandardScaler.get_params": "(self, deep=True)",
    "StandardScaler.set_params": "(self, **params)",
    "StandardScaler.set_output": "(self, *, transform=None)",
    "set_num_threads": "(n)",
    "get_num_threads": "()",
    "num_threads": "(n)",
    "show_config": "()",
    "config": "()",
    "__version__": None,
}
ALWAYS_THERE = {
    "BatchNorm", "functional", "moments", "Moments", "set_num_threads", "get_num_threads", "num_threads",
    "show_config", "config", "__version__", "StateError", "directional_derivative",
    "check_gradient", "check_layer", "GradientCheck", "StandardScaler",
}  # fmt: skip


def looked_up(name):
    """The object of a dotted public name, None if it is not there yet."""
    return functools.reduce(lambda thing, part: getattr(thing, part, None), name.split("."), bnfast)


def signature(function):
    """Without annotations; dtypes by name."""
    found = inspect.signature(function)
    plain = [
        parameter.replace(
            annotation=inspect.Parameter.empty,
            default=np.dtype(np.float32) if parameter.default is np.float32 else parameter.default,
        )
        for parameter in found.parameters.values()
    ]
    text = str(found.replace(parameters=plain, return_annotation=inspect.Signature.empty))
    return re.sub(r"dtype\('(\w+)'\)", r"\1", text)


@pytest.mark.parametrize(("name", "expected"), PUBLIC.items(), ids=PUBLIC)
def test_a_public_name_is_exported_and_called_as_designed(name, expected):
    found = looked_up(name)
    top = name.split(".")[0]
    assert found is not None
    assert top in bnfast.__all__
    if expected is not None:
        assert signature(found) == expected


def test_all_names_what_there_is():
    assert len(set(bnfast.__all__)) == len(bnfast.__all__)
    assert set(bnfast.__all__) >= ALWAYS_THERE
    for name in bnfast.__all__:
        assert hasattr(bnfast, name), name


def test_what_is_public_by_its_name_is_exported():
    visible = {
        name
        for name, value in vars(bnfast).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert visible <= set(bnfast.__all__)


@pytest.mark.parametrize("module", [name for name in MODULES if name not in {"__init__", "__main__", "demo"}])
def test_a_module_says_what_is_public(module):
    loaded = importlib.import_module(f"bnfast.{module}")
    assert loaded.__doc__
    for name in loaded.__all__:
        assert hasattr(loaded, name), name


@pytest.mark.parametrize("name", bnfast.functional.__all__)
def test_the_reference_has_the_signatures_of_the_functions(name):
    assert signature(getattr(bnfast.reference, name)) == signature(getattr(bnfast.functional, name))


# --- docstrings ----------------------------------------------------------------------------------------------


def public_callables():
    """(name, function) of everything callable that is public: functions, classes, their public methods."""
    for module, prefix in ((bnfast, ""), (bnfast.functional, "functional.")):
        for name in module.__all__:
            thing = getattr(module, name)
            if callable(thing):
                yield prefix + name, thing
            if inspect.isclass(thing):
                for method, value in vars(thing).items():
                    if not method.startswith("_") and (callable(value) or isinstance(value, property)):
                        yield f"{prefix}{name}.{method}", value


CALLABLES = [pytest.param(thing, id=name) for name, thing in public_callables()]
FUNCTIONS_AND_CLASSES = [case for case in CALLABLES if "." not in case.id.removeprefix("functional.")]


def section(doc, title):
    """The lines of a section of a NumPy-style docstring, None if there is none."""
    match = re.search(rf"^{title}\n-+\n(.*?)(?=^\w[^\n]*\n-+\n|\Z)", inspect.cleandoc(doc), re.DOTALL | re.MULTILINE)
    return None if match is None else match[1]


def documented_parameters(doc):
    lines = (section(doc, "Parameters") or "").splitlines()
    headings = [line.partition(" : ")[0] for line in lines if " : " in line and not line.startswith(" ")]
    return [name.strip() for heading in headings for name in heading.split(",")]


def parameters_of(thing):
    if isinstance(thing, property) or (inspect.isclass(thing) and issubclass(thing, Exception)):
        return []
    return [name for name in inspect.signature(thing).parameters if name != "self"]


@pytest.mark.parametrize("thing", CALLABLES)
def test_a_public_name_has_a_docstring(thing):
    assert inspect.getdoc(thing)


@pytest.mark.parametrize("thing", CALLABLES)
def test_parameters_are_documented_under_their_names_and_in_their_order(thing):
    documented = documented_parameters(inspect.getdoc(thing))
    if documented:
        assert documented == parameters_of(thing)


@pytest.mark.parametrize("thing", FUNCTIONS_AND_CLASSES)
def test_a_function_documents_its_parameters_and_what_it_returns(thing):
    doc = inspect.getdoc(thing)
    assert documented_parameters(doc) == parameters_of(thing)
    if not inspect.isclass(thing):
        returns = inspect.signature(thing).return_annotation
        assert (section(doc, "Returns") is not None) == (returns not in (None, "None"))


def test_the_reader_of_docstrings_sees_what_is_missing():
    def example(a, b, c):
        """Text.

        Parameters
        ----------
        a, b : int
            With a colon : inside.
        """

    assert documented_parameters(example.__doc__) == ["a", "b"] != parameters_of(example)
    assert section(example.__doc__, "Returns") is None


@pytest.mark.parametrize("module", [name for name in MODULES if name != "__main__"])
def test_the_examples_in_docstrings_run(module):
    loaded = importlib.import_module("bnfast" if module == "__init__" else f"bnfast.{module}")
    with np.printoptions(precision=8, suppress=False):
        failed, _ = doctest.testmod(loaded, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


@pytest.mark.parametrize(
    "name", ["BatchNorm", "Moments", "StandardScaler", "moments", "num_threads", "check_gradient", "check_layer"]
)
def test_the_main_names_have_an_example(name):
    assert ">>>" in inspect.getdoc(getattr(bnfast, name))
