"""What the commands share: packages that have to be there, files that can be written, how a command ends."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

__all__ = ["ERRORS", "EXTRAS", "check_writable", "ended", "require"]

EXTRAS = {  # module: package, of what `.[demo]` installs
    "sklearn": "scikit-learn",
    "threadpoolctl": "threadpoolctl",
    "tqdm": "tqdm",
    "matplotlib": "matplotlib",
}
ERRORS = (ImportError, OSError)  # that say what they are about


def require(modules: list[str]) -> None:
    """Raise ImportError, with advice, if one of the modules is missing."""
    missing = []
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError:
            missing.append(EXTRAS.get(module, module))
    if missing:
        raise ImportError(f"missing: {', '.join(missing)}; to install: python -m pip install {' '.join(missing)}")


def check_writable(path: Path) -> None:
    """Raise OSError if the file cannot be written; leave everything as it was."""
    existed = path.exists() or path.is_symlink()
    path.open("ab").close()
    if not existed:
        path.unlink()


def ended(command: str, work: Callable[[], None], errors: tuple[type[Exception], ...] = ERRORS) -> int:
    """Do the work; return the exit code: 0, 1 after one of the errors, which is printed, 130 after Ctrl-C."""
    try:
        work()
    except errors as error:
        print(f"bnfast {command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"bnfast {command}: interrupted", file=sys.stderr)
        return 130
    return 0
