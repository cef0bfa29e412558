"""Batch normalisation where it is used: in a loop, beside NumPy's matrix products.

Two libraries with threads of their own can cost more together than apart: idle threads of one spin on the cores that
the other needs. `python -m bnfast bench --loop` measures (a) a matrix product alternating with a forward pass, against
the sum of the two alone, (b) whole training steps of a perceptron, and (c) a residual block of a convolutional network
(`residual_block`). Each configuration has a process of its own.
"""

import contextlib
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

import bnfast

from ... import functional as F
from ..network import Linear, ReLU, cross_entropy
from .compare import record, summary
from .contenders import EPS, Operation, imported_torch
from .residual_block import DIMS
from .tables import busy, duration, grid
from .worker import Worker, WorkerError

__all__ = ["measure_loops", "table"]

Array = NDArray[Any]

SAMPLE_SECONDS = 0.1
QUIET_SECONDS = 0.25  # longer than the threads of any library spin after their last work
BATCH, WIDTHS, RATE = 512, (784, 1024, 1024, 1024, 10), 0.1
CHECKED_STEPS = 3


# --- (a) A product and a forward ------------------------------------------------------------------------------


class Pair:
    """`a @ b`, 256x512 by 512x512, a training forward of (32, 128, 28, 28), and the two by turns; float32."""

    about = "a @ b and batch_norm"

    def tasks(self) -> dict[str, Operation]:
        """What to time."""
        rng = np.random.default_rng(0)
        a, b, x = (rng.standard_normal(shape, np.float32) for shape in ((256, 512), (512, 512), (32, 128, 28, 28)))
        c, y = np.empty((256, 512), np.float32), np.empty_like(x)
        product, forward = partial(np.matmul, a, b, out=c), partial(F.batch_norm, x, out=y)

        def both() -> None:
            product()
            forward()

        calls: dict[str, Callable[[], object]] = {"product": product, "forward": forward, "both": both}
        return {name: Operation({"": call}, lambda _: {}) for name, call in calls.items()}

    def notes(self) -> dict[str, Any]:
        """Nothing to add."""
        return {}


# --- (b) Training steps -----------------------------------------------------------------------------------------


class Layer(Protocol):
    """As in the demonstration."""

    def forward(self, x: Array, /) -> Array: ...
    def backward(self, dy: Array, /) -> Array: ...
    def parameters(self) -> Mapping[str, Array]: ...
    def gradients(self) -> Mapping[str, Array]: ...


class NumpyBatchNorm:
    """The layer in plain NumPy, for (N, C)."""

    def __init__(self, num_features: int) -> None:
        self.gamma, self.beta = np.ones(num_features, np.float32), np.zeros(num_features, np.float32)
        self.running_mean, self.running_var = np.zeros(num_features), np.ones(num_features)
        self._gradients: dict[str, Array] = {}

    def forward(self, x: Array) -> Array:
        mean, var, n = x.mean(axis=0), x.var(axis=0), len(x)
        self.running_mean += 0.1 * (mean - self.running_mean)
        self.running_var += 0.1 * (var * (n / (n - 1)) - self.running_var)
        self._inv_std = 1 / np.sqrt(var + np.float32(EPS))
        self._x_hat = (x - mean) * self._inv_std
        return np.asarray(self.gamma * self._x_hat + self.beta)

    def backward(self, dy: Array) -> Array:
        x_hat, dbeta = self._x_hat, dy.sum(axis=0)
        dgamma = (dy * x_hat).sum(axis=0)
        self._gradients = {"gamma": dgamma, "beta": dbeta}
        n = np.float32(len(dy))
        return np.asarray(self.gamma * self._inv_std * (dy - dbeta / n - x_hat * (dgamma / n)))

    def parameters(self) -> dict[str, Array]:
        return {"gamma": self.gamma, "beta": self.beta}

    def gradients(self) -> dict[str, Array]:
        return self._gradients


def perceptron(batch_norm: Callable[[int], Layer]) -> list[Layer]:
    """784-1024-1024-1024-10 with batch normalisation and ReLU between; always the same weights."""
    rng = np.random.default_rng(1)
    layers: list[Layer] = []
    for n_in, n_out in itertools.pairwise(WIDTHS[:-1]):
        layers += [Linear(n_in, n_out, rng), batch_norm(n_out), ReLU()]
    return [*layers, Linear(*WIDTHS[-2:], rng)]


def batch() -> tuple[Array, Array]:
    """Images (512, 784) and labels (512,): noise, always the same."""
    rng = np.random.default_rng(2)
    return rng.standard_normal((BATCH, WIDTHS[0]), np.float32), rng.integers(0, WIDTHS[-1], BATCH)


class Training:
    """Steps of gradient descent: forward, backward, update."""

    def __init__(self, kind: str, threads: int | None = None) -> None:
        self.about = kind
        if kind == "torch":
            self._step = torch_step(threads)
        else:
            self._step = numpy_step(perceptron(bnfast.BatchNorm if kind == "bnfast" else NumpyBatchNorm))
        self._losses = [self._step() for _ in range(CHECKED_STEPS)]

    def tasks(self) -> dict[str, Operation]:
        """What to time."""
        return {"step": Operation({"": self._step}, lambda _: {})}

    def notes(self) -> dict[str, Any]:
        """The losses of the first steps, which should agree."""
        return {"losses": self._losses}


def numpy_step(layers: list[Layer]) -> Callable[[], float]:
    """A step in NumPy; it returns the loss."""
    x, labels = batch()

    def step() -> float:
        y = x
        for layer in layers:
            y = layer.forward(y)
        loss, dy = cross_entropy(y, labels)
        dy = dy.astype(np.float32, copy=False)
        for layer in reversed(layers):
            dy = layer.backward(dy)
        for layer in layers:
            gradients = layer.gradients()
            for name, parameter in layer.parameters().items():
                parameter -= RATE * gradients[name]
        return loss

    return step


def torch_step(threads: int | None) -> Callable[[], float]:
    """The same step of the same network in PyTorch, eager."""
    torch = imported_torch(threads)
    nn, modules = torch.nn, []
    for layer in perceptron(NumpyBatchNorm):
        if isinstance(layer, Linear):
            modules.append(nn.Linear(*layer.weight.shape))
            modules[-1].weight.data = torch.from_numpy(np.ascontiguousarray(layer.weight.T))
            modules[-1].bias.data = torch.from_numpy(layer.bias)
        else:
            modules.append(nn.ReLU() if isinstance(layer, ReLU) else nn.BatchNorm1d(WIDTHS[1], eps=EPS))
    model = nn.Sequential(*modules)
    x, labels = map(torch.from_numpy, batch())
    optimiser, criterion = torch.optim.SGD(model.parameters(), lr=RATE), nn.CrossEntropyLoss()

    def step() -> float:
        optimiser.zero_grad()
        loss = criterion(model(x), labels)
        loss.backward()
        optimiser.step()
        return float(loss)

    return step


# --- Measuring ------------------------------------------------------------------------------------------------


class Configuration(NamedTuple):
    """A worker of a loop."""

    name: str
    create: str
    arguments: dict[str, Any]
    environment: dict[str, str | None]
    openmp_as_it_comes: bool = False


def configurations(threads: int | None) -> tuple[list[Configuration], ...]:
    """Those of (a), of (b) and of (c). `threads` None: what the libraries do by themselves."""
    variables = ("BNFAST_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    given: dict[str, str | None] = dict.fromkeys(variables, str(threads)) if threads else {}
    several = f"bnfast, {threads} threads" if threads else "bnfast, default threads"
    pairs = [
        Configuration("bnfast, 1 thread", "loop:Pair", {}, {**given, "BNFAST_NUM_THREADS": "1"}),
        Configuration(several, "loop:Pair", {}, given),
    ]
    steps = [
        Configuration("NumPy with bnfast", "loop:Training", {"kind": "bnfast"}, given),
        Configuration("NumPy alone", "loop:Training", {"kind": "numpy"}, given),
        Configuration("PyTorch, eager", "loop:Training", {"kind": "torch", "threads": threads}, given, True),
    ]
    blocks = [
        Configuration(name, "residual_block:ResidualBlock", {"kind": kind, "threads": threads}, given, kind == "torch")
        for name, kind in (
            ("bnfast, fused", "fused"),
            ("bnfast, then NumPy", "steps"),
            ("NumPy alone", "numpy"),
            ("PyTorch, eager", "torch"),
        )
    ]
    return pairs, steps, blocks


def measure_loops(threads: int | None, quick: bool, argv: Sequence[str], tick: Callable[[], object]) -> dict[str, Any]:
    """Measure all configurations; `tick` is called after each turn.

    Returns
    -------
    dict
        "pairs": {configuration: {"product", "forward", "both": {median, q1, q3}, "sum", "ratio"}};
        "steps": {configuration: {"step": {...}, "losses"}}; "blocks": {configuration: {"forward", "backward": {...},
        "error"}}; "missing": {configuration: why}; and the record.
    """
    missing: dict[str, str] = {}
    begun = record(argv)
    pairs, steps, blocks = (take_turns(kind, quick, missing, tick) for kind in configurations(threads))
    for found in pairs.values():
        found["sum"] = found["product"]["median"] + found["forward"]["median"]
        found["ratio"] = found["both"]["median"] / found["sum"]
    parts = {"pairs": pairs, "steps": steps, "blocks": blocks}
    return {"format": 1, **begun, "threads": threads, **parts, "missing": missing}


def take_turns(
    kind: Sequence[Configuration], quick: bool, missing: dict[str, str], tick: Callable[[], object]
) -> dict[str, dict[str, Any]]:
    """{configuration: {operation: summary, and its notes}}."""
    rounds, samples = (3, 2) if quick else (7, 5)
    found: dict[str, dict[str, Any]] = {}
    seconds: dict[tuple[str, str], list[float]] = {}
    with contextlib.ExitStack() as stack:
        workers: dict[str, tuple[Worker, list[str]]] = {}
        for c in kind:
            worker = stack.enter_context(
                Worker(c.name, c.create, c.arguments, c.environment, openmp_as_it_comes=c.openmp_as_it_comes)
            )
            try:  # one after the other: their first steps should not disturb each other
                worker.about()
                ready = worker.ask("prepare_tasks")
                for operation in ready["operations"]:
                    worker.ask("calibrate", operation=operation, sample_seconds=SAMPLE_SECONDS)
            except WorkerError as error:
                missing[c.name] = str(error)
                worker.close()
                continue
            found[c.name] = dict(ready["notes"])
            workers[c.name] = worker, ready["operations"]
        order = list(workers)
        for turn in range(rounds):
            start = turn % max(1, len(order))
            for name in order[start:] + order[:start]:
                worker, operations = workers[name]
                for operation in operations:
                    time.sleep(QUIET_SECONDS)  # a part alone is not beside the threads of the part before
                    answer = worker.ask("measure", operation=operation, samples=samples, budget=1.0)
                    seconds.setdefault((name, operation), []).extend(answer["seconds"])
                tick()
    for (name, operation), values in seconds.items():
        found[name][operation] = summary(values)
    return found


def table(report: Mapping[str, Any]) -> str:
    """The report as plain text."""
    m = report["machine"]
    threads = f"{report['threads']} threads" if report["threads"] else "default threads"
    lines = [f"{report['date']}, {m['cpu']}, {m['cpus']} CPUs, {threads}, NumPy {m['numpy']}"]
    lines += busy(m)
    lines += [f"left out: {name}: {why}" for name, why in report["missing"].items()]
    rows = [["", "a @ b", "forward", "sum", "loop", "loop / sum"]]
    for name, found in report["pairs"].items():
        times = (found["product"]["median"], found["forward"]["median"], found["sum"], found["both"]["median"])
        rows.append([name, *map(duration, times), f"{found['ratio']:.2f}"])
    lines += ["", "(a) a @ b, 256x512 by 512x512, and a training forward of 32x128x28x28, alone and by turns"]
    lines += grid(rows)
    rows = [["", "a step", "quartiles", f"loss after {CHECKED_STEPS} steps"]]
    for name, found in report["steps"].items():
        step, loss = found["step"], found["losses"][-1]
        rows.append([name, *map(duration, (step["median"],)), f"{duration(step['q1'])} to {duration(step['q3'])}"])
        rows[-1].append(f"{loss:.4f}")
    lines += ["", f"(b) a training step of {'-'.join(map(str, WIDTHS))} with batch normalisation, batch {BATCH}"]
    lines += grid(rows)
    rows = [["", "forward", "backward", "together", "error"]]
    for name, found in report["blocks"].items():
        forward, backward = found["forward"]["median"], found["backward"]["median"]
        rows.append([name, *map(duration, (forward, backward, forward + backward)), f"{found['error']:.0e}"])
    what = "batch norm, ReLU -> 1x1 convolution -> batch norm, + x, ReLU"
    lines += ["", f"(c) {what}, channels-last {'x'.join(map(str, DIMS))}"]
    return "\n".join(lines + grid(rows))
