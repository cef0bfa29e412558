"""Contenders in processes of their own, commanded by lines of JSON over pipes.

`Worker` is the handle on the side of the command; `serve` is what runs on the other. While one worker measures, the
others are stopped by signal (SIGSTOP): idle threads of an OpenMP runtime spin, and would take the cores from the one
that is being timed.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import IO, Any, Self

__all__ = ["Worker", "WorkerError", "serve"]

SAMPLE_SECONDS = 1e-3  # a sample is the mean of enough calls to take this long
SETTLE_SECONDS = 30e-3  # before a turn is timed: the system finds CPUs again for threads that were stopped
TURN_SECONDS = 0.5  # a turn ends early after this
COLD_SECONDS, COLD_CALLS = 300e-6, 20  # other work before each call, and calls of a sample at most

# The GNU OpenMP runtime reads its environment once, when it is loaded, and bnfast asks it to let idle threads sleep.
# In a process that measures another library, which may use the same runtime, it is loaded first, with its defaults.
START = """
import ctypes, sys
if sys.argv[2] == "as it comes":
    try:
        ctypes.CDLL("libgomp.so.1")
    except OSError:
        pass
from bnfast.commands.bench.worker import serve
serve(sys.argv[1])
"""


class WorkerError(Exception):
    """A worker cannot do what it was asked for, or is gone."""


# --- The side of the command ----------------------------------------------------------------------------------


class Worker:
    """A contender's process. It starts at once; `about` waits for it.

    Parameters
    ----------
    name : str
    create : str
        module:function that makes the contender, within this folder.
    arguments : dict
        Of the function; JSON.
    environment : mapping, optional
        Variables to set; those with value None are removed.
    openmp_as_it_comes : bool
        Load the system's OpenMP runtime with its own defaults, before bnfast.
    """

    def __init__(
        self,
        name: str,
        create: str,
        arguments: Mapping[str, Any],
        environment: Mapping[str, str | None] | None = None,
        *,
        openmp_as_it_comes: bool = True,
    ) -> None:
        self.name = name
        self._stopped = False
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `close`)
        variables = {**os.environ, **(environment or {})}
        settings = json.dumps({"create": create, "arguments": dict(arguments)})
        first = "as it comes" if openmp_as_it_comes else "bnfast's"
        self._process = subprocess.Popen(
            [sys.executable, "-c", START, settings, first],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={key: value for key, value in variables.items() if value is not None},
            text=True,
            process_group=0 if os.name == "posix" else None,  # Ctrl-C is for the command, which then ends its workers
        )

    def about(self) -> str:
        """Wait for the start; what the contender says of itself. Raises `WorkerError` if it is not available."""
        return str(self._answer()["about"])

    def send(self, do: str, **details: Any) -> None:
        """Give a command; `receive` its answer before the next."""
        self.resume()
        try:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({"do": do, **details}) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise WorkerError(self._last_words()) from None

    def receive(self) -> dict[str, Any]:
        """Wait for the answer."""
        return self._answer()

    def ask(self, do: str, **details: Any) -> dict[str, Any]:
        """Give a command, wait for its answer and stop the process."""
        self.send(do, **details)
        answer = self.receive()
        self.stop()
        return answer

    def stop(self) -> None:
        """Take the process and all its threads off the cores, until the next command."""
        self._signal("SIGSTOP")

    def resume(self) -> None:
        """Undo `stop`."""
        if self._stopped:
            self._signal("SIGCONT")

    @property
    def alive(self) -> bool:
        """Whether the process has not ended."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process, whatever it is doing."""
        if self._process.poll() is None:
            self._process.kill()  # ends a stopped process, too
        self._process.wait()
        for pipe in self._process.stdin, self._process.stdout, self._errors:
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _signal(self, name: str) -> None:
        if hasattr(signal, name) and self._process.poll() is None:
            self._process.send_signal(getattr(signal, name))
            self._stopped = name == "SIGSTOP"

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"its process ended with code {code}" + (f": {lines[-1]}" if lines else "")


# --- The side of the contender ----------------------------------------------------------------------------------


Timer = Callable[[Callable[[], object], int], float]


def calls_per_sample(call: Callable[[], object], seconds: float, timer: Timer) -> int:
    """How many calls take so long."""
    call()
    n = 1
    while True:
        took = timer(call, n)
        if took >= seconds / 4 or n >= 1 << 20:
            return max(1, round(n * seconds / max(took, 1e-9)))
        n *= 4


def timed(call: Callable[[], object], n: int) -> float:
    """Seconds of n calls, one after another."""
    clock = time.perf_counter
    repeat = range(n)
    start = clock()
    for _ in repeat:
        call()
    return clock() - start


def timed_cold(call: Callable[[], object], n: int) -> float:
    """Seconds of n calls, other work on this thread before each."""
    clock = time.perf_counter
    seconds = 0.0
    for _ in range(n):
        other_work(clock() + COLD_SECONDS)
        start = clock()
        call()
        seconds += clock() - start
    return seconds


def other_work(until: float) -> None:
    """What a loop does between two calls, on one thread: arithmetic on a few numbers."""
    total = 0.0
    while time.perf_counter() < until:
        for i in range(20):
            total += i * 0.5


def with_reader(call: Callable[[], object], out: Any) -> Callable[[], object]:
    """The call, then one reading of its result by NumPy on this thread. out: where it is if the call returns none."""

    def both() -> object:
        found = call()
        if isinstance(found, Mapping):
            found = next(iter(found.values()))
        elif isinstance(found, tuple | list):
            found = found[0]
        array: Any = out if found is None else found
        return (array.numpy() if hasattr(array, "numpy") else array).sum()

    return both


def measure(call: Callable[[], object], samples: int, n: int, budget: float, timer: Timer) -> list[float]:
    """Seconds a call, one figure for each sample of n calls; fewer samples if the budget is spent."""
    gc.collect()
    gc.disable()
    try:
        begun = time.perf_counter()
        call()  # fetches the data
        while time.perf_counter() < begun + SETTLE_SECONDS:
            timer(call, 1)
        seconds: list[float] = []
        end = time.perf_counter() + budget
        while len(seconds) < samples and (not seconds or time.perf_counter() < end):
            seconds.append(timer(call, n) / n)
        return seconds
    finally:
        gc.enable()


class Server:
    """Answers the commands: prepare, calibrate, measure."""

    def __init__(self, contender: Any) -> None:
        self._contender = contender
        self._operations: dict[str, Any] = {}
        self._timer: Timer = timed
        self._chosen: dict[str, tuple[Callable[[], object], int]] = {}

    def prepare(self, shape: str, dtype: str, fresh: bool, between: str = "", block: bool = False) -> dict[str, Any]:
        """Make the arrays of a shape, run each variant of each operation once and check its result.

        between: what happens around a call: nothing, "cold" (other work before it), "consumer" (its result is read).
        block: whether the contender is one of the block.
        """
        from .block import BlockCase
        from .contenders import Case, check
        from .shapes import named

        self._operations, self._chosen = {}, {}
        self._timer = timed_cold if between == "cold" else timed
        gc.collect()
        case = BlockCase(named(shape), dtype) if block else Case(named(shape), dtype, fresh)
        self._operations = self._contender.operations(case)
        for name, operation in self._operations.items():
            for variant in operation.variants:
                result = operation.result(variant)
                if result:
                    check(case, name, result)
            if between == "consumer":
                calls = {variant: with_reader(call, case.out) for variant, call in operation.variants.items()}
                self._operations[name] = operation._replace(variants=calls)
        return {"operations": list(self._operations)}

    def prepare_tasks(self) -> dict[str, Any]:
        """The same for a contender without shapes, which checks itself and has something to say."""
        self._operations = self._contender.tasks()
        return {"operations": list(self._operations), "notes": self._contender.notes()}

    def calibrate(self, operation: str, sample_seconds: float = SAMPLE_SECONDS) -> dict[str, Any]:
        """Choose the fastest variant, and how many calls make a sample."""
        variants = self._operations[operation].variants
        speeds = {}
        for name, call in variants.items():
            n = calls_per_sample(call, sample_seconds, self._timer)
            if self._timer is timed_cold:
                n = min(n, COLD_CALLS)
            speeds[name] = statistics.median(measure(call, 3, n, TURN_SECONDS, self._timer)), n
        best = min(speeds, key=speeds.__getitem__)
        self._chosen[operation] = variants[best], speeds[best][1]
        return {"variant": best, "calls": speeds[best][1]}

    def measure(self, operation: str, samples: int, budget: float = TURN_SECONDS) -> dict[str, Any]:
        """One turn."""
        call, n = self._chosen[operation]
        return {"seconds": measure(call, samples, n, budget, self._timer)}


def serve(settings: str) -> None:
    """Make the contender, then answer until standard input ends. Libraries that print do so to standard error."""
    die_with_parent()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(value: Mapping[str, Any]) -> None:
        answers.write(json.dumps(value) + "\n")
        answers.flush()

    given = json.loads(settings)
    module, _, function = given["create"].partition(":")
    try:
        contender = getattr(importlib.import_module(f".{module}", __package__), function)(**given["arguments"])
    except Exception as error:
        answer({"error": described(error)})
        return
    answer({"about": contender.about})
    server = Server(contender)
    for command in commands():
        do = command.pop("do")
        try:
            answer(getattr(server, do)(**command))
        except Exception as error:
            answer({"error": described(error)})


def commands() -> Iterator[dict[str, Any]]:
    """The commands, one a line."""
    for line in sys.stdin:
        yield json.loads(line)


def described(error: Exception) -> str:
    """One line for the other side."""
    from .contenders import Unavailable, first_line

    text = first_line(error)
    return text if isinstance(error, Unavailable | ArithmeticError) else f"{type(error).__name__}: {text}"


def die_with_parent() -> None:
    """Ask Linux to end this process if the command is killed, even while this process is stopped."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
