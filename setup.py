"""Builds the one extension module. Switches, all environment variables:

BNFAST_DEBUG=1      no optimisation, C asserts, bounds checks in Cython
BNFAST_SANITIZE=1   AddressSanitizer and UndefinedBehaviorSanitizer (GCC, Clang)
BNFAST_COVERAGE=1   counts what is run, for gcov (tools/coverage)
BNFAST_OPENMP=0     leave OpenMP out without probing; =1: fail instead of falling back
BNFAST_WERROR=1     warnings from our own C are errors
"""

import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

INSTRUCTION_SETS = ("baseline", "avx2", "avx512")
KERNELS = (
    *("dispatch", "plan", "planar", "interleaved", "block", "merge", "positions", "rows"),
    *("careful", "infinite", "subnormal", "lift", "floor"),
)

PROBE = "int main(void) { return 0; }\n"

NO_COMPILER = """
bnfast: no working C compiler ({command}): {why}

bnfast is compiled when it is installed from source. To get a compiler:
  Debian, Ubuntu   sudo apt install gcc python3-dev
  Fedora, Alma     sudo dnf install gcc python3-devel
  Alpine           apk add gcc musl-dev python3-dev
  macOS            xcode-select --install
  Windows          Visual Studio's build tools, with C++
  conda            conda install -c conda-forge c-compiler
"""

NO_OPENMP = """
bnfast: this compiler works, and has no working OpenMP. Building WITHOUT threads: every call
will run on one core, with the same results. On Debian and Ubuntu OpenMP comes with gcc; with
clang install libomp-dev.
"""

OPENMP_PROBE = """
#include <omp.h>
int main(void)
{
    int n = 0;
    #pragma omp parallel reduction(+ : n)
    n += omp_get_num_threads() > 0;
    return n < 1;
}
"""


def long_description(readme: str, repository: str | None, version: str) -> str:
    """The README as a package index shows it, where paths lead nowhere.

    With the repository's address, links and figures are those of the release there. Without one figures are left out,
    and links to files are their text.
    """

    def resolved(match: re.Match[str]) -> str:
        figure, text, target = match[1], match[2], match[3]
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        if repository:
            return f"{figure}[{text}]({repository}/{'raw' if figure else 'blob'}/v{version}/{target})"
        return "" if figure else text

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", resolved, readme)


def described() -> str:
    """README.md, resolved with what pyproject.toml says."""
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    repository = project.get("urls", {}).get("Repository")
    return long_description(Path("README.md").read_text(encoding="utf-8"), repository, project["version"])


def switch(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


def side_by_side(compile_all: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """A compiler's `compile` that takes as many sources at a time as there are cores: four take nearly all the time."""

    def compiled(sources: list[str], **options: object) -> list[str]:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        with ThreadPoolExecutor(cores) as pool:
            return list(chain.from_iterable(pool.map(lambda source: compile_all([source], **options), sources)))

    return compiled


class BuildExt(build_ext):
    """Adds the flags that depend on the compiler, after whatever CFLAGS says."""

    def build_extensions(self) -> None:
        msvc = self.compiler.compiler_type == "msvc"
        self.check_compiler()
        compile_args, link_args = self.msvc_flags() if msvc else self.gcc_flags()
        openmp = self.openmp_flags(msvc)
        for extension in self.extensions:
            extension.extra_compile_args += compile_args + openmp[0]
            extension.extra_link_args += link_args + openmp[1]
        self.compiler.compile = side_by_side(self.compiler.compile)
        super().build_extensions()

    def msvc_flags(self) -> tuple[list[str], list[str]]:
        return ["/std:c11", "/fp:precise", "/Od" if switch("BNFAST_DEBUG") else "/O2"], []

    def gcc_flags(self) -> tuple[list[str], list[str]]:
        # The same bits everywhere need every operation rounded by itself: no contraction into fma.
        flags = ["-std=c11", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
        flags += ["-Wall", "-Wextra", "-Werror=implicit-function-declaration", "-fvisibility=hidden"]
        # Without debug information the module does not name the folder it was built in: the same bytes everywhere.
        flags += ["-O0", "-g", "-UNDEBUG"] if switch("BNFAST_DEBUG") else ["-O3", "-g0"]
        link = []
        if switch("BNFAST_WERROR"):
            flags.append("-Werror")
        if switch("BNFAST_SANITIZE"):
            sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
            flags += [*sanitize, "-O1", "-g", "-fno-omit-frame-pointer"]
            link += sanitize
        if switch("BNFAST_COVERAGE"):
            flags += ["--coverage", "-fprofile-update=atomic", "-O1"]
            link.append("--coverage")
        return flags, link

    def openmp_flags(self, msvc: bool) -> tuple[list[str], list[str]]:
        wanted = os.environ.get("BNFAST_OPENMP", "")
        if wanted == "0":
            return [], []
        flags = (["/openmp"], []) if msvc else (["-fopenmp"], ["-fopenmp"])
        if self.openmp_works(*flags):
            return flags
        if wanted == "1":
            sys.exit("bnfast: BNFAST_OPENMP=1, but a program with OpenMP does not compile and link here")
        stars = "*" * 92
        print(f"\n{stars}{NO_OPENMP}{stars}\n", file=sys.stderr, flush=True)
        return [], []

    def check_compiler(self) -> None:
        """Ends the build with advice if not even an empty program compiles: that is no question of OpenMP."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.c")
            source.write_text(PROBE)
            try:
                self.compiler.compile([str(source)], output_dir=folder)
            except Exception as error:  # whatever the build tools raise
                command = getattr(self.compiler, "compiler_so", None) or [self.compiler.compiler_type]
                sys.exit(NO_COMPILER.format(command=command[0], why=error))

    def openmp_works(self, compile_args: list[str], link_args: list[str]) -> bool:
        """Compiles, links and runs a small program: a header without a library is not OpenMP."""
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.c")
            source.write_text(OPENMP_PROBE)
            try:
                objects = self.compiler.compile([str(source)], output_dir=folder, extra_postargs=compile_args)
                self.compiler.link_executable(objects, "probe", output_dir=folder, extra_postargs=link_args)
                return subprocess.run([str(Path(folder, "probe"))], check=False).returncode == 0
            except Exception:  # any failure of the probe means the same thing
                return False


EXTENSION = Extension(
    "bnfast._core",
    sources=[  # the longest to compile first
        *(f"src/bnfast/kernels/{name}.c" for name in INSTRUCTION_SETS),
        "src/bnfast/core/_core.pyx",
        *(f"src/bnfast/kernels/{name}.c" for name in KERNELS),
        *(f"src/bnfast/runtime/{name}.c" for name in ("openmp", "budget", "rivals", "waking", "late")),
    ],
    depends=[str(path) for pattern in ("*.h", "*.pxi") for path in sorted(Path("src/bnfast").rglob(pattern))],
    include_dirs=["src/bnfast", numpy.get_include()],
    define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"), ("NPY_TARGET_VERSION", "NPY_2_0_API_VERSION")],
)

if __name__ == "__main__":  # tests import the messages
    setup(
        packages=[*find_packages("src"), "bnfast.examples"],
        long_description=described(),
        long_description_content_type="text/markdown",
        package_dir={"": "src", "bnfast.examples": "examples"},  # so that `python -m bnfast gallery` finds them
        ext_modules=cythonize(
            EXTENSION,
            compiler_directives={
                "language_level": 3,
                "boundscheck": switch("BNFAST_DEBUG"),
                "wraparound": False,
                "cdivision": True,
                "initializedcheck": switch("BNFAST_DEBUG"),
                "embedsignature": True,
                "freethreading_compatible": True,
            },
            build_dir="build/cython",
        ),
        cmdclass={"build_ext": BuildExt},
    )
