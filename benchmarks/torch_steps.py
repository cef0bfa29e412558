"""A whole training step of a PyTorch network: what its batch norms cost, and what bnfast saves of it.

`python benchmarks/torch_steps.py [--network resnet18] [--layout planar] [--dtype float32] [--threads 2] [--compiled]
[--side 224]`

Each contender has a process, and they take turns. Times in milliseconds, medians over the turns: of the whole step, and
of batch norms, activations and additions in it, forward and backward (from when the gradient of their result is there
until that of their input is). `saved` is of the latter, the median over the turns and its quartiles; in brackets
torch's step over this one. Contenders:

- torch: PyTorch's batch norms, ReLU and additions in place, as torchvision writes them
- bnfast: `bnfast.torch`'s layers in the place of PyTorch's, nothing else changed
- fused: with the activation and the residual in the layer
- bare: without batch norms, activations and additions (a residual's gradient flows all the same): what a step cannot be
  faster than
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

CONTENDERS = ("torch", "bnfast", "fused", "bare")
TURNS = 15
BATCH = 16
SIDES = {"resnet18": 224, "mobilenet": 224, "densenet": 224, "small maps": 32}  # of the images, in pixels


class Clock:
    """Adds up what passes between `begin` and `end`."""

    def __init__(self) -> None:
        self.seconds = self.begun = 0.0

    def begin(self, *_: Any) -> None:
        self.begun = time.perf_counter()

    def end(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self.begun


def network(name: str, contender: str, clock: Clock | None) -> Any:
    """One of the networks, with one of the contenders' batch norms; clock: of what they take, None if compiled."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    if contender in ("bnfast", "fused"):
        import bnfast.torch

    class Ignored(torch.autograd.Function):
        """x + residual without the sum: forward x, backward dy for both."""

        @staticmethod
        def forward(ctx: Any, x: Any, residual: Any) -> Any:
            return x.view_as(x)

        @staticmethod
        def backward(ctx: Any, dy: Any) -> tuple[Any, Any]:
            return dy, dy

    class Norm(nn.Module):
        """Batch norm, + residual, activation."""

        def __init__(self, channels: int, activation: str | None = "relu") -> None:
            super().__init__()
            self.activation = activation
            self.norm: Any = None
            if contender == "torch":
                self.norm = nn.BatchNorm2d(channels)
            elif contender == "bnfast":
                self.norm = bnfast.torch.BatchNorm2d(channels)
            elif contender == "fused":
                self.norm = bnfast.torch.BatchNorm2d(channels, activation=activation)

        def forward(self, x: Any, residual: Any = None) -> Any:
            if clock is None:
                return self.compute(x, residual)
            x = x.view_as(x)  # so that its gradient is that of this layer alone
            clock.begin()
            y = self.compute(x, residual)
            clock.end()
            x.register_hook(clock.end)
            y.register_hook(clock.begin)
            return y

        def compute(self, x: Any, residual: Any = None) -> Any:
            if contender == "bare":
                return x if residual is None else Ignored.apply(x, residual)
            if contender == "fused":
                return self.norm(x, residual)
            x = self.norm(x)
            if residual is not None:
                x = x.add_(residual)
            if self.activation == "relu":
                x = F.relu(x, inplace=True)
            elif self.activation == "relu6":
                x = F.relu6(x, inplace=True)
            return x

    def convolution(n_in: int, n_out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
        return nn.Conv2d(n_in, n_out, kernel, stride, kernel // 2, groups=groups, bias=False)

    class Basic(nn.Module):
        """ResNet's."""

        def __init__(self, n_in: int, n_out: int, stride: int) -> None:
            super().__init__()
            self.conv1, self.norm1 = convolution(n_in, n_out, 3, stride), Norm(n_out)
            self.conv2, self.norm2 = convolution(n_out, n_out, 3), Norm(n_out)
            self.shortcut = None
            if stride != 1 or n_in != n_out:
                self.shortcut = nn.Sequential(convolution(n_in, n_out, 1, stride), Norm(n_out, None))

        def forward(self, x: Any) -> Any:
            shortcut = x if self.shortcut is None else self.shortcut(x)
            return self.norm2(self.conv2(self.norm1(self.conv1(x))), shortcut)

    class Inverted(nn.Module):
        """MobileNetV2's."""

        def __init__(self, n_in: int, n_out: int, stride: int, expand: int) -> None:
            super().__init__()
            width = n_in * expand
            layers = [] if expand == 1 else [convolution(n_in, width, 1), Norm(width, "relu6")]
            layers += [convolution(width, width, 3, stride, width), Norm(width, "relu6")]
            self.layers = nn.Sequential(*layers, convolution(width, n_out, 1))
            self.norm = Norm(n_out, None)
            self.residual = stride == 1 and n_in == n_out

        def forward(self, x: Any) -> Any:
            return self.norm(self.layers(x), x if self.residual else None)

    class Dense(nn.Module):
        """DenseNet's, with its bottleneck: batch norms stand before the convolutions."""

        def __init__(self, n_in: int, growth: int) -> None:
            super().__init__()
            self.norm1, self.conv1 = Norm(n_in), convolution(n_in, 4 * growth, 1)
            self.norm2, self.conv2 = Norm(4 * growth), convolution(4 * growth, growth, 3)

        def forward(self, x: Any) -> Any:
            return torch.cat([x, self.conv2(self.norm2(self.conv1(self.norm1(x))))], 1)

    layers: list[nn.Module]
    if name == "resnet18":
        layers = [convolution(3, 64, 7, 2), Norm(64), nn.MaxPool2d(3, 2, 1)]
        width = 64
        for wider, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            layers += [Basic(width, wider, stride), Basic(wider, wider, 1)]
            width = wider
    elif name == "mobilenet":
        layers, width = [convolution(3, 32, 3, 2), Norm(32, "relu6")], 32
        for expand, wider, n, stride in (
            (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
        ):  # fmt: skip
            for i in range(n):
                layers.append(Inverted(width, wider, stride if i == 0 else 1, expand))
                width = wider
        layers += [convolution(width, 1280, 1), Norm(1280, "relu6")]
        width = 1280
    elif name == "densenet":
        layers, width = [convolution(3, 64, 7, 2), Norm(64), nn.MaxPool2d(3, 2, 1)], 64
        for block in range(3):
            for _ in range(6):
                layers.append(Dense(width, 32))
                width += 32
            if block < 2:
                layers += [Norm(width), convolution(width, width // 2, 1), nn.AvgPool2d(2)]
                width //= 2
    else:  # 32 x 32 pixels, maps of 8 x 8 and 4 x 4
        layers, width = [convolution(3, 32, 3, 4), Norm(32)], 32
        for wider, stride in ((64, 1), (128, 2)):
            layers += [Basic(width, wider, stride), Basic(wider, wider, 1)]
            width = wider
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def step_of(contender: str, options: Any) -> Callable[[], tuple[float, float]]:
    """One step of training; gives its milliseconds, and those of the batch norms and what is behind them."""
    import torch
    from torch import nn

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    side = options.side
    order = torch.channels_last if options.layout == "channels_last" else torch.contiguous_format
    dtype = getattr(torch, options.dtype)
    clock = Clock()
    model = network(options.network, contender, None if options.compiled else clock).to(memory_format=order)
    x = torch.randn(BATCH, 3, side, side).to(memory_format=order)
    labels = torch.randint(0, 10, (BATCH,))
    criterion = nn.CrossEntropyLoss()
    with_autocast = torch.autocast("cpu", dtype, enabled=dtype is not torch.float32)
    model = torch.compile(model) if options.compiled else model

    def step() -> tuple[float, float]:
        for parameter in model.parameters():
            parameter.grad = None
        clock.seconds, begun = 0.0, time.perf_counter()
        with with_autocast:
            loss = criterion(model(x).float(), labels)
        loss.backward()
        return (time.perf_counter() - begun) * 1e3, clock.seconds * 1e3

    return step


def serve(contender: str, options: Any) -> None:
    """Measure one step for each line of standard input."""
    step = step_of(contender, options)
    for _ in range(3):
        step()
    print("ready", flush=True)
    for _ in sys.stdin:
        print(json.dumps(step()), flush=True)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=SIDES, default="resnet18")
    parser.add_argument("--layout", choices=("planar", "channels_last"), default="planar")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--side", type=int, help=f"of the images, in pixels; {SIDES}")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--serve", choices=CONTENDERS, help=argparse.SUPPRESS)
    return parser


def main(options: Any) -> None:
    """Measure, and print a row for each contender."""
    with contextlib.ExitStack() as stack:
        workers = {}
        for contender in CONTENDERS:
            command = [sys.executable, __file__, *sys.argv[1:], "--serve", contender]
            workers[contender] = stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            assert workers[contender].stdout.readline(), "this needs PyTorch"
        times: dict[str, list[list[float]]] = {contender: [] for contender in CONTENDERS}
        for turn in range(options.turns):
            for contender in CONTENDERS[turn % 4 :] + CONTENDERS[: turn % 4]:
                worker = workers[contender]
                for _ in range(2):  # the first finds its caches cold
                    worker.stdin.write("step\n")
                    worker.stdin.flush()
                    took = json.loads(worker.stdout.readline())
                times[contender].append(took)
    mode = "compiled" if options.compiled else "eager"
    side = options.side
    print(f"{options.network} of {side} x {side}, {options.layout}, {options.dtype}, {options.threads} threads, {mode}")
    medians = {name: [statistics.median(part) for part in zip(*found, strict=True)] for name, found in times.items()}
    whole, share = medians["torch"]
    for name, (median, norms) in medians.items():
        line = f"    {name:<8} step {median:8.1f} ms ({whole / median:.2f})"
        if share and name != "bare":
            line += f", of which batch norms ... {norms:6.1f} ms ({norms / median:.0%})"
        if share and name in ("bnfast", "fused"):
            saved = [1 - ours / theirs for (_, ours), (_, theirs) in zip(times[name], times["torch"], strict=True)]
            low, middle, high = statistics.quantiles(saved)
            line += f", saved {middle:.0%} ({low:.0%} to {high:.0%})"
        print(line)


if __name__ == "__main__":
    given = arguments().parse_args()
    given.side = given.side or SIDES[given.network]
    serve(given.serve, given) if given.serve else main(given)
