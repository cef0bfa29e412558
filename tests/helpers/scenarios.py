"""What one of several processes does, for test_engines.py: `scenarios.py mpi|gloo NAME ...`.

Each prints lines `TOLD [rank, what]`. The same functions run on threads.
"""

import datetime
import hashlib
import json
import os
import sys

import numpy as np

import bnfast

SHAPE = (13, 6, 4, 3)


def digest(*arrays):
    sha = hashlib.sha256()
    for array in arrays:
        sha.update(np.ascontiguousarray(array).tobytes())
    return sha.hexdigest()[:16]


def data(name):
    rng = np.random.default_rng(len(name))
    return [rng.normal(3, 2, SHAPE).astype(np.float32) for _ in range(3)]


def part(array, rank, size):
    """Unequal ones; the last but one is empty where there are more than two."""
    cuts = [0, *np.linspace(2, len(array), size).astype(int)]
    if size > 2:
        cuts[-2] = cuts[-3]
    return array[cuts[rank] : cuts[rank + 1]]


def outcome(function):
    """What a call gives, or the error in words."""
    try:
        return function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def steps(rank, size, comm):
    """Two steps of two layers, and a calibration -> digests of what all have, and of what is this process's."""
    x, residual, dy = (part(array, rank, size) for array in data("steps"))
    layers = [
        bnfast.BatchNorm(6, comm=comm, momentum=0.3, activation="relu"),
        bnfast.BatchNorm(6, comm=comm, nonfinite="skip"),
    ]
    mask = np.random.default_rng(5).random((SHAPE[0], *SHAPE[2:])) < 0.8
    own = []
    for _ in range(2):
        y = layers[0](x, residual=residual)
        z, pullback = layers[1].vjp(y, mask=part(mask, rank, size))
        dx, dr = layers[0].backward(pullback(dy))
        own += [y, z, dx, dr, layers[0].grad_gamma, layers[1].grad_beta]
    shared = [a for bn in layers for a in (bn.running_mean, bn.running_var, bn.batch_mean, bn.batch_var)]
    with bnfast.calibrate(layers):
        layers[1](layers[0](x)) if len(x) else None
    shared += [a for bn in layers for a in (bn.exact_statistics.to_row(), bn.running_var)]
    quiet = layers[0].eval()(x)
    return {"shared": digest(*shared), "own": digest(*own, quiet)}


def unequal(rank, size, comm):
    """How far from the whole batch on one process."""
    x, _, dy = data("unequal")
    whole, bn = bnfast.BatchNorm(6), bnfast.BatchNorm(6, comm=comm)
    y, dx = whole(x), whole.backward(dy)
    mine, dmine = bn(part(x, rank, size)), bn.backward(part(dy, rank, size))
    errors = [abs(a - part(b, rank, size)).max(initial=0) for a, b in ((mine, y), (dmine, dx))]
    errors.append(abs(bn.running_var / whole.running_var - 1).max())
    return [float(error) for error in errors]


def one_value(rank, size, comm):
    bn = bnfast.BatchNorm(2, comm=comm)
    first = outcome(lambda: bn(np.ones((1 if rank == 0 else 0, 2), np.float32)).shape)
    return first, bn(np.ones((2, 2), np.float32) * rank).shape  # and the next batch is fine


def refused(rank, size, comm):
    """The last process is given what it refuses, in a forward and in a backward."""
    bn = bnfast.BatchNorm(2, comm=comm)
    x = np.random.default_rng(rank).normal(size=(4, 2)).astype(np.float32)
    last = rank == size - 1
    first = outcome(lambda: bn(x.astype(int) if last else x).shape)
    tracked = bn.num_batches_tracked
    bn(x)
    second = outcome(lambda: bn.backward(x[:1] if last else x).shape)
    return first, tracked, second, outcome(lambda: bn.backward(x).shape)


def unlike(rank, size, comm):
    found = []
    for options in ({"num_features": 2 + rank}, {"num_features": 2, "dtype": np.float64 if rank else np.float32},
                    {"num_features": 2, "momentum": None if rank else 0.1}):  # fmt: skip
        bn = bnfast.BatchNorm(**options, comm=comm)
        found.append(outcome(lambda bn=bn: bn(np.ones((4, bn.num_features), np.float32)).shape))
    return found


def left_out(rank, size, comm):
    """The last process leaves out the second of three layers, in the second step."""
    layers = [bnfast.BatchNorm(2, comm=comm) for _ in range(3)]
    x = np.random.default_rng(rank).normal(size=(4, 2)).astype(np.float32)
    for bn in layers:
        bn(x)
    return [outcome(lambda bn=bn: bn(x).shape) for bn in (layers[:1] + layers[2:] if rank == size - 1 else layers)[:2]][
        1
    ]


def modes(rank, size, comm):
    """One layer in eval mode on the last process: it does not take part, and the next one meets another's row."""
    layers = [bnfast.BatchNorm(2, comm=comm) for _ in range(2)]
    x = np.random.default_rng(rank).normal(size=(4, 2)).astype(np.float32)
    for bn in layers:
        bn(x)
    if rank == size - 1:
        layers[0].eval()
    first = outcome(lambda: layers[0](x).shape)
    return first if rank < size - 1 else outcome(lambda: layers[1](x).shape)


def forked(rank, size, comm):
    """A forked child may not use the communicator; the parent still can."""
    bn = bnfast.BatchNorm(2, comm=comm)
    x = np.random.default_rng(rank).normal(size=(4, 2)).astype(np.float32)
    bn(x)
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.write(write, outcome(lambda: str(bn(x).shape)).encode())
        os._exit(0)
    os.waitpid(child, 0)
    said = os.read(read, 1000).decode()
    return said, bn(x).shape


def raised(rank, size, comm):
    """One process raises between forward and backward, and ends."""
    bn = bnfast.BatchNorm(2, comm=comm)
    x = np.random.default_rng(rank).normal(size=(4, 2)).astype(np.float32)
    bn(x)
    tell(rank, "forward")
    if rank == size - 1:
        raise RuntimeError("between forward and backward")
    return outcome(lambda: bn.backward(x).shape)


def interrupted(rank, size, comm):
    """Steps without end, until somebody ends them."""
    bn = bnfast.BatchNorm(2, comm=comm)
    x = np.random.default_rng(rank).normal(size=(4, 2)).astype(np.float32)
    bn(x)
    tell(rank, "running")
    while True:
        bn(x)
        bn.backward(x)


def tell(rank, what):
    print("TOLD " + json.dumps([rank, what]), flush=True)


def main(functions, engine, *names):
    if engine == "mpi":
        from mpi4py import MPI

        comm, rank, size = MPI.COMM_WORLD, MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()
    else:
        from torch import distributed

        distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
        comm, rank, size = distributed.group.WORLD, distributed.get_rank(), distributed.get_world_size()
    for name in names:
        tell(rank, functions[name](rank, size, comm))
    if engine == "gloo":
        distributed.barrier()
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(globals(), *sys.argv[1:])
