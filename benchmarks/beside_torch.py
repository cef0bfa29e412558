"""bnfast and PyTorch in one process: `python benchmarks/beside_torch.py`.

Is PyTorch as fast where bnfast is imported, before it or after it, and bnfast as fast beside PyTorch's own work? Each
configuration has a process, and they take turns. Times in milliseconds, medians over the turns (of the medians within a
turn), and the median ratio to the first configuration. Without PyTorch there is nothing to measure.
"""

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

CONFIGURATIONS = {
    "torch alone": ["torch"],
    "bnfast, then torch": ["bnfast", "torch"],
    "torch, then bnfast": ["torch", "bnfast"],
}
TURNS, TURN_SECONDS, LEAST = 15, 0.1, 3


def tasks(with_bnfast: bool) -> dict[str, Callable[[], object]]:
    """What is timed. PyTorch first, its pool used before bnfast's first call."""
    import numpy as np
    import torch
    from torch import nn

    torch.manual_seed(0)

    def training(network: nn.Module, *shape: int) -> Callable[[], object]:
        x, labels = torch.randn(*shape), torch.randint(0, 10, shape[:1])
        optimiser, criterion = torch.optim.SGD(network.parameters(), lr=0.01), nn.CrossEntropyLoss()

        def step() -> None:
            optimiser.zero_grad()
            criterion(network(x), labels).backward()
            optimiser.step()

        return step

    dense = [nn.Linear(784, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU()]
    images = [nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2), nn.BatchNorm2d(32)]
    found = {
        "step of a perceptron": training(nn.Sequential(*dense, nn.Linear(512, 10)), 256, 784),
        "step of a small convolutional network": training(
            nn.Sequential(*images, nn.ReLU(), nn.Flatten(), nn.Linear(32 * 14 * 14, 10)), 32, 3, 32, 32
        ),
    }
    if with_bnfast:
        from bnfast import functional as F

        x = torch.randn(32, 32, 28, 28)
        of_numpy = np.random.default_rng(0).standard_normal((32, 32, 28, 28), dtype=np.float32)
        out = np.empty_like(of_numpy)

        def both() -> None:
            torch.relu(x)
            F.batch_norm(of_numpy, out=out)

        found["torch.relu and F.batch_norm by turns"] = both
    return found


def serve(imports: list[str]) -> None:
    """Import, then measure what each line of standard input names."""
    for name in imports:
        __import__(name)
    found = tasks("bnfast" in imports)
    for task in found.values():
        for _ in range(5):
            task()
    print("ready", flush=True)
    clock = time.perf_counter
    for line in sys.stdin:
        task, times = found[line.strip()], []
        task()
        end = clock() + TURN_SECONDS
        while clock() < end or len(times) < LEAST:
            begun = clock()
            task()
            times.append(clock() - begun)
        print(json.dumps(statistics.median(times) * 1e3), flush=True)


def main() -> None:
    """Measure, and print a table."""
    with contextlib.ExitStack() as stack:
        workers = {}
        for name, imports in CONFIGURATIONS.items():
            command = [sys.executable, __file__, "serve", *imports]
            workers[name] = stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            assert workers[name].stdout.readline(), "this needs PyTorch"

        def measured(name: str, task: str) -> float:
            workers[name].stdin.write(task + "\n")
            workers[name].stdin.flush()
            return float(json.loads(workers[name].stdout.readline()))

        for task in tasks(True):
            names = [name for name in workers if "bnfast" in name or "step" in task]
            times: dict[str, list[float]] = {name: [] for name in names}
            for turn in range(TURNS):
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    times[name].append(measured(name, task))
            print(task)
            for name in names:
                ratio = statistics.median(a / b for a, b in zip(times[name], times[names[0]], strict=True))
                print(f"    {name:<22} {statistics.median(times[name]):8.3f}   {ratio:.2f}")


if __name__ == "__main__":
    serve(sys.argv[2:]) if sys.argv[1:2] == ["serve"] else main()
