"""Layers and models that say which one they are, and processes that save them until they are killed.

For test_state_saving.py. `python saving.py KIND WHAT FOLDER NUMBER` does in a process of one thread what forks many
children, and prints counts as JSON: no child may be forked where a test runner has threads.
"""

import atexit
import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

import bnfast
from bnfast import BatchNorm

HOOKS = ("fstat", "chmod", "fsync", "replace", "listdir")


def marked(number, channels=20_000):
    """A layer in which every value says which it is; of 640 KB."""
    bn = BatchNorm(channels, dtype=np.float64)
    values = np.full(channels, float(number))
    names = ("weight", "bias", "running_mean", "running_var")
    bn.load_state_dict({**dict.fromkeys(names, values), "num_batches_tracked": number})
    return bn


def mark_of(bn):
    """Its number; an assertion if there is a second one in it."""
    values = {float(value) for array in bn.state_dict().values() for value in np.unique(array)}
    assert len(values) == 1
    return int(values.pop())


class Layer(NamedTuple):
    """A file of a layer, all of whose values are its number."""

    number: int
    channels: int = 20_000

    def thing(self):
        return marked(self.number, self.channels)

    def save(self, path):
        self.thing().save(path)

    @staticmethod
    def load(path):
        """The number of the file, and how many channels there are."""
        bn = BatchNorm.load(path)
        return mark_of(bn), bn.num_features


class Model(NamedTuple):
    """A file of a model with a layer, arrays and numbers."""

    number: int
    channels: int = 20_000

    def thing(self):
        array = np.full((self.channels, 2), self.number, np.float32)
        bn = marked(self.number, self.channels)
        return {"bn": bn, "w": array, "epoch": self.number, "rate": float(self.number), "name": str(self.number)}

    def save(self, path):
        bnfast.save(path, self.thing())

    @staticmethod
    def load(path):
        model = bnfast.load(path)
        bn, numbers = model.pop("bn"), {float(value) for value in np.unique(model.pop("w"))}
        numbers |= {float(mark_of(bn)), *(float(value) for value in model.values())}
        assert len(model) == 3
        assert len(numbers) == 1
        return int(numbers.pop()), bn.num_features


KINDS = {"layer": Layer, "model": Model}


def temporaries(folder):
    return [name for name in os.listdir(folder) if name.startswith(".tmp-")]


def child(function, *arguments):
    """The process id of one that does this, and then ends."""
    pid = os.fork()
    if pid:
        return pid
    try:
        function(*arguments)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def save_for_ever(kind, path, begun):
    files = [kind(number) for number in range(1, 4)]
    files[0].save(path)
    os.write(begun, b".")
    while True:
        for file in files:
            file.save(path)


def kills(kind, folder, number):
    """Kills at random moments, up to 50 ms after the first save; a save of this process's after every other."""
    path, rng = folder / "bn", random.Random(number)
    found = {"loaded": 0, "left_a_temporary": 0, "cleaned": 0}
    kind(0).save(path)
    for n in range(number):
        reading, begun = os.pipe()
        pid = child(save_for_ever, kind, path, begun)
        os.close(begun)
        assert os.read(reading, 1) == b"."
        os.close(reading)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert kind.load(path)[0] in range(1, 4)
        found["loaded"] += 1
        left = temporaries(folder)
        assert len(left) <= 1, left
        found["left_a_temporary"] += len(left)
        if n % 2:
            kind(0).save(path)
            assert temporaries(folder) == []
            found["cleaned"] += len(left)
    return found


def save_and_die(kind, path, name, count):
    """Dies before the count-th call of os.name in a save; or, with a negative one, after it."""
    real, calls = getattr(os, name), 0

    def hooked(*arguments, **keywords):
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*arguments, **keywords)
        if calls == -count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(os, name, hooked)
    kind(1).save(path)


def stages(kind, folder, _):
    """[killed, number that is there, temporaries left, and after the next save] for death at every stage of a save."""
    path, found = folder / "bn", {}
    for name in HOOKS:
        for count in (1, -1, 2, -2):
            kind(0).save(path)
            pid = child(save_and_die, kind, path, name, count)
            _, status = os.waitpid(pid, 0)
            there, left = kind.load(path)[0], len(temporaries(folder))
            kind(2).save(path)
            found[f"{name}{count:+}"] = [os.WIFSIGNALED(status), there, left, len(temporaries(folder))]
    return found


def write_until(kind, path, number, end):
    file = kind(number, channels=1000 * number)
    file.save(path)
    while time.monotonic() < end:
        file.save(path)


def read_until(kind, path, counts, end):
    count = 0
    while count == 0 or time.monotonic() < end:
        number, channels = kind.load(path)
        assert channels == 1000 * number
        count += 1
    os.write(counts, f"{count}\n".encode())


def writers(kind, folder, seconds):
    """Eight writers and two readers of one path."""
    path, end = folder / "bn", time.monotonic() + seconds
    kind(1, channels=1000).save(path)
    reading, writing = os.pipe()
    pids = [child(write_until, kind, path, number, end) for number in range(1, 9)]
    pids += [child(read_until, kind, path, writing, end) for _ in range(2)]
    failed = sum(os.waitpid(pid, 0)[1] != 0 for pid in pids)
    os.close(writing)
    with open(reading) as file:
        reads = [int(line) for line in file]
    kind.load(path)[0]
    return {"failed": failed, "reads": sum(reads), "readers": len(reads), "temporaries": len(temporaries(folder))}


def terms(kind, folder, number):
    """SIGTERM in training, with a save at exit; in every third case SIGKILL soon after it."""
    path, rng, loaded = folder / "bn", random.Random(number), []
    kind(0).save(path)
    reading, writing = os.pipe()
    for n in range(number):
        pid = os.fork()
        if not pid:
            atexit.register(lambda: kind(1).save(path))
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
            bn, x = BatchNorm(50), np.ones((100, 50))
            os.write(writing, b"x")
            while True:
                bn(x)
        os.read(reading, 1)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(pid, signal.SIGTERM)
        if n % 3 == 2:
            time.sleep(rng.uniform(0, 0.02))
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        loaded.append(kind.load(path)[0])
        assert n % 3 == 2 or loaded[-1] == 1
        kind(0).save(path)
        assert temporaries(folder) == []
    return {"old": loaded.count(0), "new": loaded.count(1)}


if __name__ == "__main__":
    what = {function.__name__: function for function in (kills, stages, writers, terms)}[sys.argv[2]]
    print(json.dumps(what(KINDS[sys.argv[1]], Path(sys.argv[3]), int(sys.argv[4]))))
