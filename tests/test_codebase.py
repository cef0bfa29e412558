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
import sources
from places import KERNELS, ROOT, SOURCES, TESTS, needs_sources
from scripts import run_script

import bnfast
import bnfast.reference

PACKAGE = Path(bnfast.__file__).parent
MODULES = sources.modules(PACKAGE)
PYTHON = [name for name, path in MODULES.items() if path.suffix == ".py"]


# --- who may import whom -------------------------------------------------------------------------------------

# From the top down; what is not here stands beside them (`runtime`) or below (`_checks`).
LEVELS = [
    {"__main__"},
    {"commands", "torch", "dask"},
    {"__init__"},
    {"state.model", "state.fold", "state.trees"},
    {"layer", "scaling", "gradients"},
    {"functional", "statistics", "state", "distributed"},
    {"_core"},
]

# What a module may import of bnfast, and nothing else. A folder's entry is that of all in it that have none.
MAY_IMPORT = {
    "_core": set(),
    "_checks": set(),
    "_table": set(),
    "reference": set(),
    "runtime": {"_checks", "_core", "runtime"},
    "functional": {"_checks", "_core", "statistics"},
    "statistics": {"_checks", "_core", "_table", "functional", "statistics"},
    "grad_mode": {"_core"},
    "state.files": set(),
    "state.names_of_0_1": set(),
    "state.conventions": {"_checks"},
    "distributed": {"_core", "distributed"},
    "state.layer_state": {"_checks", "_core", "distributed", "state.conventions", "state.files", "statistics"},
    "state.fold": {"_checks", "layer", "state.conventions"},
    "state.trees": {"layer", "state.conventions", "state.files"},
    "state.model": {"_checks", "_core", "layer", "state"},  # makes layers of what is in a file
    "state": set(),
    "layer": {"_checks", "_core", "distributed", "functional", "grad_mode", "state.layer_state", "statistics"},
    "scaling": {"_checks", "_core", "scaling", "state.files"},
    "gradients": {"_checks", "_table", "gradients"},  # and not the layer: it checks anybody's
    "__init__": {"functional", "grad_mode", "gradients", "layer", "runtime", "scaling", "state", "statistics"},
    "dask": {"_checks", "dask", "scaling", "statistics"},
    "torch.memory": set(),
    "torch.calls": {"_checks", "_core", "functional", "runtime.threads", "torch.memory"},
    "torch.operator": {"torch.calls"},
    "torch.processes": {
        "_core",
        "distributed.gather",
        "functional",
        "statistics.moments",
        "torch.calls",
        "torch.memory",
    },
    "torch.layers": {"_checks", "_core", "distributed.gather", "torch.calls", "torch.operator", "torch.processes"},
    "torch.conversion": {"_checks", "torch.layers"},
    "torch": {"torch.conversion", "torch.layers"},
    "commands.figures": set(),
    "commands.common": set(),
    "commands.network": {"layer"},
    "commands.demo": {"commands.figures", "commands.network", "commands.common"},
    "commands.gallery": {"commands.common"},  # and the examples, by name
    "commands.bench": {
        *(
            "__init__",
            "_core",
            "commands.bench",
            "commands.network",
            "commands.common",
            "functional",
            "layer",
            "reference",
        ),
        "runtime.config",
    },
    "commands": set(),
    "__main__": {"commands.bench", "commands.demo", "commands.gallery", "runtime.config"},
}
OTHER_PACKAGES = {  # the rest: NumPy
    "torch": {"numpy", "torch", "ml_dtypes"},
    "dask": {"numpy", "dask"},
    "distributed.gather": {"numpy", "torch"},  # where a process group is given
    "commands.network": {"numpy", "sklearn"},
    "commands.demo": {"numpy", "matplotlib", "threadpoolctl", "tqdm"},
    "commands.figures": {"numpy", "matplotlib"},
    "commands.gallery": {"numpy", "threadpoolctl", "tqdm"},
    "commands.bench": {"numpy", "matplotlib", "tqdm"},
    "scaling.estimator": {"numpy", "sklearn"},
    "scaling.peer": {"numpy", "sklearn"},
    "scaling.exchange": {"numpy", "sklearn"},
    "state.model": {"numpy", "ml_dtypes"},  # for bfloat16 arrays, where they are met
}


NEEDED_BY_A_FOLDER = {
    "torch": {"torch"},
    "dask": {"dask"},
}  # what may be imported at once: nobody imports these folders but who wants it


def import_faults(found, name):
    """What a module imports and may not, in words."""
    own, others, at_once = sources.imports(found, name)
    permitted = sources.rule_of(name, MAY_IMPORT)
    if permitted is None:
        return [f"{name} is new: say in MAY_IMPORT what it may import"]
    faults = {other for other in own if not sources.lies_in(other, permitted)}
    faults |= others - set(sys.stdlib_module_names) - (sources.rule_of(name, OTHER_PACKAGES) or {"numpy"})
    needed = sources.rule_of(name, NEEDED_BY_A_FOLDER) or set()
    faults |= {f"{other} at once" for other in at_once - set(sys.stdlib_module_names) - {"numpy"} - needed}
    return [f"{name} imports {fault}" for fault in sorted(faults)]


ALWAYS_IMPORTABLE = {name for name in MODULES if sources.rule_of(name, NEEDED_BY_A_FOLDER) is None}


@pytest.mark.parametrize("name", PYTHON)
def test_a_module_imports_what_it_may(name):
    assert import_faults(MODULES, name) == []


def test_no_two_modules_need_each_other():
    assert sources.circle({name: sources.imports(MODULES, name)[0] for name in PYTHON}) is None


def test_what_a_module_may_import_lies_below_it():
    def level(name):
        return next((number for number, places in enumerate(LEVELS) if sources.lies_in(name, places)), None)

    for name, permitted in MAY_IMPORT.items():
        for other in permitted:
            if None not in (level(name), level(other)):
                assert level(name) <= level(other), (name, other)
        for top in ("commands", *NEEDED_BY_A_FOLDER):
            assert sources.lies_in(name, [top, "__main__"]) or not any(sources.lies_in(p, [top]) for p in permitted)


def test_no_module_has_the_name_of_what_is_public_beside_it():
    """`import bnfast.moments` would put a module in the place of a function."""
    for name in ALWAYS_IMPORTABLE - {"__init__", "__main__", "_core"}:
        parent, _, stem = f"bnfast.{name}".rpartition(".")
        module = importlib.import_module(f"bnfast.{name}")
        assert getattr(importlib.import_module(parent), stem) is module


def test_the_package_imports_in_a_process_that_has_numpy_only():
    """The extras are hidden; what runs in the commands and examples may need them, their import may not."""
    script = f"""
import importlib, sys
for name in ("scipy", "sklearn", "torch", "matplotlib", "tqdm", "threadpoolctl", "pytest", "hypothesis"):
    sys.modules[name] = None
import bnfast
from bnfast.commands import gallery
bnfast.BatchNorm(2)([[1.0, 2.0], [3.0, 4.0]])
for name in {[name for name in PYTHON if name in ALWAYS_IMPORTABLE - {"__init__"}]}:
    importlib.import_module("bnfast." + name)
for name in gallery.EXAMPLES:
    gallery.example(name)
"""
    run_script(script)


@needs_sources
def test_contributing_says_where_each_thing_lives():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Where each thing lives")[2]
    named = set()
    for places, things in re.findall(r"^\| (`.+?) \| (.+) \|$", text.partition("\n## ")[0], re.MULTILINE):
        folders = [ROOT / place for place in re.findall(r"`(.+?)`", places)]
        inside = [folders[0] / thing for thing in re.findall(r"`([\w/]+(?:\.(?:py|pyi|c|h)|/))`", things)]
        assert [path for path in folders + inside if not path.exists()] == []
        named |= {*folders, *inside}
    assert {path.parent for path in sources.files(SOURCES, ".py", ".c", ".pyx")} <= named


# --- kernels -------------------------------------------------------------------------------------------------


def kernel_files():
    found = sources.files(KERNELS, ".c", ".h")
    return [pytest.param(path, id=path.name) for path in found] or [pytest.param(None, id="none")]


FORBIDDEN_IN_KERNELS = (
    re.compile(r'#\s*include\s*[<"]([\w./]*\b(numpy|runtime)/|(Python|omp|stdlib|malloc)\.h)'),
    re.compile(
        r"\b(malloc|calloc|realloc|free|aligned_alloc|posix_memalign|alloca|_mm_malloc|omp_\w+|Py[A-Z]\w*|pthread_\w+)\s*\("
    ),
    re.compile(r"#\s*pragma\s+omp\s+(?!simd)"),
)
OPENMP_PRAGMA = FORBIDDEN_IN_KERNELS[-1]


def kernel_faults(path):
    """What is in a C file and may not be in a kernel."""
    code = sources.c_code(path)
    return [match[0] for rule in FORBIDDEN_IN_KERNELS for match in rule.finditer(code)]


@needs_sources
@pytest.mark.parametrize("path", kernel_files())
def test_a_kernel_knows_no_python_numpy_openmp_or_malloc(path):
    assert kernel_faults(path) == []


@needs_sources
def test_no_two_files_of_kernels_include_each_other():
    assert sources.circle(sources.includes(KERNELS)) is None


@needs_sources
def test_no_two_files_of_kernels_call_each_other():
    assert sources.circle(sources.calls(KERNELS)) is None


@needs_sources
def test_only_the_door_to_openmp_includes_its_header():
    users = [
        path
        for path in sources.files(SOURCES, ".c", ".h")
        if re.search(r"#\s*include\s*<omp\.h>", sources.c_code(path))
    ]
    assert users == [SOURCES / "runtime" / "openmp.c"]


@needs_sources
def test_the_extension_imports_nothing_of_bnfast():
    for path in sources.files(SOURCES, ".pyx", ".pxi"):
        assert not re.search(
            r"^\s*(from|import)\s+(\.|bnfast)[^\n]*\bimport\b|^\s*import\s+bnfast",
            sources.cython_code(path),
            re.MULTILINE,
        ), path


# --- the rules themselves ------------------------------------------------------------------------------------

PLANTED = {  # a file: what it holds, what the rules say
    "functional.py": ("from .layer import BatchNorm", "functional imports layer"),
    "new.py": ("", "new is new: say in MAY_IMPORT what it may import"),
    "statistics/inner/sums.py": ("from ...layer import BatchNorm", "statistics.inner.sums imports layer"),
    "statistics/report.py": ("def f():\n    import torch.nn", "statistics.report imports torch"),
    "state/layer_state.py": (  # moments is statistics.moments
        "from .. import moments, layer",
        "state.layer_state imports layer",
    ),
    "scaling/scaler.py": ("from ..state import files, model", "scaling.scaler imports state"),
    "gradients/check.py": ("import bnfast.layer as l", "gradients.check imports layer"),
    "runtime/threads.py": ("from bnfast.commands import demo", "runtime.threads imports commands.demo"),
    "commands/demo.py": ("import tqdm", "commands.demo imports tqdm at once"),
    "commands/bench/loop.py": (
        "from ..network import Linear\nfrom ... import moments",
        "commands.bench.loop imports statistics.moments",
    ),
    "kernels/leaves/leaf.c": ("/* free() */ void *f(void) { return malloc(1); }", "malloc("),
    "kernels/leaves/leaf.h": ("#include <Python.h>", "#include <Python.h"),
    "kernels/block.h": ('#include "../runtime/openmp.h"', '#include "../runtime/'),
}


@pytest.fixture
def planted(tmp_path):
    """A package with a fault in each file, and what it takes to find them."""
    for name, (text, _) in PLANTED.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        for folder in Path(name).parents:
            if not name.startswith("kernels"):
                (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "__init__.py").write_text("from .statistics import moments as moments")
    (tmp_path / "statistics" / "__init__.py").write_text("from .moments import moments as moments")
    for name in ("_core.pyi", "layer.py", "commands/network.py", "statistics/moments.py"):
        (tmp_path / name).touch()
    return tmp_path


def test_the_rules_look_into_subfolders(planted):
    found = sources.modules(planted)
    faults = [fault for name in found for fault in import_faults(found, name)]
    for path in sources.files(planted / "kernels", ".c", ".h"):
        faults += kernel_faults(path)
    assert sorted(faults) == sorted(fault for _, fault in PLANTED.values())


def test_the_reader_of_imports_sees_when_they_run(tmp_path):
    (tmp_path / "__init__.py").write_text("""
import os
from numpy.typing import ArrayLike
if TYPE_CHECKING:
    import matplotlib.axes
try:
    import fcntl
except ImportError:
    fcntl = lambda: __import__("os")
def f():
    import torch.nn
""")
    own, others, at_once = sources.imports(sources.modules(tmp_path), "__init__")
    assert own == set()
    assert others == {"os", "numpy", "matplotlib", "fcntl", "torch"}
    assert at_once == {"os", "numpy", "fcntl"}


def test_circles_are_found(tmp_path):
    assert sources.circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ("b", "c", "b")
    assert sources.circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None
    (tmp_path / "inner").mkdir()
    (tmp_path / "a.c").write_text('#include "a.h"\nint bnfast_a(\n    int n)\n{\n    return bnfast_b(n);\n}\n')
    (tmp_path / "inner" / "b.c").write_text("int bnfast_b(int n) { /* bnfast_c */ return bnfast_a(n); }\n")
    assert sources.calls(tmp_path) == {"a.c": {"b.c"}, "b.c": {"a.c"}}
    assert sources.includes(tmp_path) == {"a.c": {"a.h"}, "b.c": set()}


# --- compilers -----------------------------------------------------------------------------------------------


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
    header = KERNELS / "kernels.h"
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
    for path in sources.files(SOURCES, ".c", ".h", ".pyx", ".pxi"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"optimize\s*\(?\s*\"|fast-math\"\s*\)|target_clones", text), path.name
        assert not re.search(r"pragma\s+(STDC\s+FP_CONTRACT\s+ON|GCC\s+optimize|float_control)", text), path.name


@needs_sources
def test_the_compiler_may_not_contract():
    assert '"-ffp-contract=off"' in (ROOT / "setup.py").read_text(encoding="utf-8")


@needs_sources
def test_there_is_one_parallel_loop():
    loops = []
    for path in sources.files(SOURCES, ".pyx", ".pxd", ".pxi"):
        loops += [path.parent.name] * len(re.findall(r"\bprange\s*\(|\bparallel\s*\(", sources.cython_code(path)))
    for path in sources.files(SOURCES, ".c", ".h"):
        loops += [path.name] * len(OPENMP_PRAGMA.findall(sources.c_code(path)))
    assert loops == ["core"]


@needs_sources
def test_omp_set_num_threads_is_never_called():
    for path in sources.files(SOURCES, ".c", ".h", ".py", ".pyi", ".pyx", ".pxd", ".pxi"):
        assert not re.search(r"omp_set_num_threads\s*\(", path.read_text(encoding="utf-8")), path.name


def test_no_folder_of_tests_is_on_the_path():
    """But for the helpers: a folder of tests may have the name of a package, which it would hide."""
    assert {path for path in map(Path, sys.path) if path.is_relative_to(TESTS)} <= {TESTS / "helpers"}


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
        "unbiased_running_var=True, activation=None, negative_slope=0.01, nonfinite='propagate', comm=None, "
        "dtype=float32)"
    ),
    "BatchNorm.__call__": "(self, x, out=None, *, residual=None, mask=None, update=True)",
    "BatchNorm.forward": "(self, x, out=None, *, residual=None, mask=None, update=True)",
    "BatchNorm.vjp": "(self, x, out=None, *, residual=None, mask=None, update=True)",
    "BatchNorm.backward": "(self, dy, out=None, *, accumulate=False, out_residual=None)",
    "BatchNorm.train": "(self, mode=True)",
    "BatchNorm.eval": "(self)",
    "BatchNorm.parameters": "(self)",
    "BatchNorm.gradients": "(self)",
    "BatchNorm.state_dict": "(self)",
    "BatchNorm.load_state_dict": "(self, state, *, prefix='')",
    "BatchNorm.save": "(self, path)",
    "BatchNorm.load": "(path, *, max_bytes=1073741824)",
    "BatchNorm.from_arrays": "(convention, *, gamma=None, beta=None, mean=None, var=None, **extras)",
    "BatchNorm.to_arrays": "(self, convention)",
    "BatchNorm.reset_parameters": "(self)",
    "BatchNorm.reset_running_stats": "(self)",
    "BatchNorm.calibrate": "(self)",
    "BatchNorm.use_statistics": "(self, which)",
    "BatchNorm.statistics_report": "(self, exact=None)",
    "save": "(path, entries)",
    "load": "(path, *, into=None, max_bytes=1073741824)",
    "from_state": "(state, prefixes=None, *, eps=1e-05, axis=1, **options)",
    "fold": ("(bn, weight, bias=None, *, position='after', axis=0, groups=1, transposed=False, padding=None)"),
    "calibrate": "(layers)",
    "no_grad": "()",
    "functional.batch_norm": (
        "(x, gamma=None, beta=None, *, axis=1, eps=1e-05, residual=None, activation=None, negative_slope=0.01, "
        "mask=None, return_var=False, out=None)"
    ),
    "functional.batch_norm_eval": (
        "(x, mean, var, gamma=None, beta=None, *, axis=1, eps=1e-05, residual=None, activation=None, "
        "negative_slope=0.01, mask=None, out=None)"
    ),
    "functional.batch_norm_backward": (
        "(dy, x, mean, inv_std, gamma=None, *, beta=None, axis=1, training=True, residual=None, activation=None, "
        "negative_slope=0.01, mask=None, out=None, out_residual=None)"
    ),
    "functional.batch_norm_backward_sums": (
        "(dy, x, mean, inv_std, gamma=None, *, beta=None, axis=1, residual=None, activation=None, "
        "negative_slope=0.01, mask=None)"
    ),
    "functional.batch_norm_backward_apply": (
        "(dy, x, mean, inv_std, gamma, sums, *, beta=None, axis=1, residual=None, activation=None, "
        "negative_slope=0.01, mask=None, out=None, out_residual=None)"
    ),
    "functional.batch_norm_jvp": (
        "(v, x, mean, inv_std, gamma=None, *, beta=None, axis=1, vgamma=None, vbeta=None, residual=None, "
        "vresidual=None, activation=None, negative_slope=0.01, mask=None, out=None)"
    ),
    "functional.Sums": "(count, dgamma, dbeta)",
    "moments": "(x, *, axis=1, mask=None, weights=None)",
    "Moments": "(count, mean, m2)",
    "Moments.var": "(self, ddof=0)",
    "Moments.std": "(self, ddof=0)",
    "directional_derivative": "(f, x, u, *, step=None)",
    "check_gradient": "(f, grad, x, *, directions=8, rtol=1e-06, rng=None)",
    "check_layer": "(layer, x, *, rng=None, residual=None, mask=None)",
    "GradientCheck": "(name, rows)",
    "GradientCheck.raise_if_failed": "(self)",
    "StandardScaler": "(*, copy=True, with_mean=True, with_std=True)",
    "StandardScaler.fit": "(self, X, y=None, sample_weight=None, *, batch_size=None, progress=False)",
    "StandardScaler.partial_fit": "(self, X, y=None, sample_weight=None, *, batch_size=None, progress=False)",
    "StandardScaler.transform": "(self, X, copy=None, *, out=None, batch_size=None, progress=False)",
    "StandardScaler.fit_transform": "(self, X, y=None, *, sample_weight=None, out=None, **fit_params)",
    "StandardScaler.inverse_transform": "(self, X, copy=None, *, out=None, batch_size=None, progress=False)",
    "StandardScaler.merge": "(self, other)",
    "StandardScaler.var": "(self, ddof=0)",
    "StandardScaler.to_sklearn": "(self)",
    "StandardScaler.from_sklearn": "(theirs)",
    "StandardScaler.get_feature_names_out": "(self, input_features=None)",
    "StandardScaler.get_params": "(self, deep=True)",
    "StandardScaler.set_params": "(self, **params)",
    "StandardScaler.set_output": "(self, *, transform=None, inverse_transform=None)",
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


def imported(name):
    for library in sources.rule_of(name, NEEDED_BY_A_FOLDER) or ():
        pytest.importorskip(library, reason=f"bnfast.{name} is for those who have {library}")
    return importlib.import_module("bnfast" if name == "__init__" else f"bnfast.{name}")


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


@pytest.mark.parametrize("name", PYTHON)
def test_a_module_says_what_it_is_and_what_is_public(name):
    loaded = imported(name)
    assert loaded.__doc__
    only_a_docstring = len(ast.parse(inspect.getsource(loaded)).body) == 1
    for public in [] if name == "__main__" or only_a_docstring else loaded.__all__:
        assert hasattr(loaded, public), public


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
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = inspect.signature(thing).parameters.values()
    return [stars.get(parameter.kind, "") + parameter.name for parameter in parameters if parameter.name != "self"]


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


def examples_of(name):
    """The examples in the docstrings of a module and of what it defines, whatever its `__module__` says."""
    loaded, finder = imported(name), doctest.DocTestFinder(exclude_empty=True)
    defined = [
        node.name
        for node in ast.parse(inspect.getsource(loaded)).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef))
    ]
    own = finder.find(types.SimpleNamespace(__doc__=loaded.__doc__), name, module=False, globs=vars(loaded))
    return own + [
        test for thing in defined for test in finder.find(vars(loaded)[thing], thing, module=False, globs=vars(loaded))
    ]


@pytest.mark.parametrize("name", PYTHON)
def test_the_examples_in_docstrings_run(name):
    runner, tests = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE), examples_of(name)
    with np.printoptions(precision=8, suppress=False):
        for test in tests:
            runner.run(test)
    assert runner.summarize().failed == 0
    assert sum(len(test.examples) for test in tests) == MODULES[name].read_text(encoding="utf-8").count(">>> ")


@pytest.mark.parametrize(
    "name", ["BatchNorm", "Moments", "StandardScaler", "moments", "num_threads", "check_gradient", "check_layer"]
)
def test_the_main_names_have_an_example(name):
    assert ">>>" in inspect.getdoc(getattr(bnfast, name))
