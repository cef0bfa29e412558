"""Builds the one extension module. Switches, all environment variables:

BNFAST_DEBUG=1      no optimisation, C asserts, bounds checks in Cython
BNFAST_SANITIZE=1   AddressSanitizer and UndefinedBehaviorSanitizer (GCC, Clang)
BNFAST_COVERAGE=1   counts what is run, for gcov (tools/coverage)
BNFAST_OPENMP=0     leave OpenMP out without probing; =1: fail instead of falling back
BNFAST_WERROR=1     warnings from our own C are errors
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

KERNELS = (
    *("baseline", "avx2", "avx512", "dispatch"),
    *("plan", "planar", "interleaved", "block", "merge", "floor", "infinite", "positions"),
)

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


def switch(name: str) -> bool:
    return os.environ.get(name, "") not in ("", "0")


class BuildExt(build_ext):
    """Adds the flags that depend on the compiler, after whatever CFLAGS says."""

    def build_extensions(self) -> None:
        msvc = self.compiler.compiler_type == "msvc"
        compile_args, link_args = self.msvc_flags() if msvc else self.gcc_flags()
        openmp = self.openmp_flags(msvc)
        for extension in self.extensions:
            extension.extra_compile_args += compile_args + openmp[0]
            extension.extra_link_args += link_args + openmp[1]
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
        print(
            f"""
{"*" * 78}
bnfast: this compiler has no working OpenMP. Building WITHOUT threads: every call
will run on one core. On Debian and Ubuntu OpenMP comes with gcc; with clang
install libomp-dev.
{"*" * 78}
""",
            file=sys.stderr,
            flush=True,
        )
        return [], []

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


extension = Extension(
    "bnfast._core",
    sources=[
        "src/bnfast/core/_core.pyx",
        *(f"src/bnfast/runtime/{name}.c" for name in ("openmp", "budget", "rivals", "waking", "late")),
        *(f"src/bnfast/kernels/{name}.c" for name in KERNELS),
    ],
    depends=[str(path) for pattern in ("*.h", "*.pxi") for path in sorted(Path("src/bnfast").rglob(pattern))],
    include_dirs=["src/bnfast", numpy.get_include()],
    define_macros=[("NPY_NO_DEPRECATED_API", "NPY_2_0_API_VERSION"), ("NPY_TARGET_VERSION", "NPY_2_0_API_VERSION")],
)

setup(
    packages=[*find_packages("src"), "bnfast.examples"],
    package_dir={"": "src", "bnfast.examples": "examples"},  # so that `python -m bnfast gallery` finds them
    ext_modules=cythonize(
        extension,
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
