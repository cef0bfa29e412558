"""Largest errors of bnfast and of PyTorch against an oracle wider than the data, by distance of the mean from zero.

Run `python benchmarks/accuracy.py`; PyTorch's columns need PyTorch. Errors are in units of

    y               |gamma| * (1 + |x_hat|) + |beta|; float64: |gamma| * (1 + |x_hat| + |mean|/std) + |beta|
    dx              the norm of gamma * inv_std * dy, channel by channel
    dgamma, dbeta   the sum of the absolute terms
"""

import numpy as np

from bnfast import functional as F
from bnfast import reference

try:
    import torch
except ImportError:
    torch = None

LAYOUTS = {"planar": (16, 8, 30, 31), "interleaved": (3000, 40)}
OFFSETS = (0, 1e2, 1e4, 1e6)
EPS = 1e-5


def data(shape, offset, dtype):
    """x with std 1 and mean `offset`; gamma, beta, and a dy with a mean of its own."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(shape) + offset).astype(dtype)
    gamma, beta = (rng.standard_normal(shape[1]).astype(dtype) for _ in range(2))
    return x, gamma, beta, (rng.standard_normal(shape) + 0.5).astype(dtype)


def of_bnfast(x, gamma, beta, dy):
    y, mean, inv_std = F.batch_norm(x, gamma, beta, eps=EPS)
    return y, *F.batch_norm_backward(dy, x, mean, inv_std, gamma)


def of_torch(x, gamma, beta, dy):
    x, gamma, beta = (torch.from_numpy(a).requires_grad_() for a in (x, gamma, beta))
    y = torch.nn.functional.batch_norm(x, None, None, gamma, beta, training=True, eps=EPS)
    y.backward(torch.from_numpy(dy))
    return tuple(t.detach().numpy() for t in (y, x.grad, gamma.grad, beta.grad))


def errors(results, x, gamma, beta, dy):
    """Largest error of y, dx, dgamma, dbeta in the units above."""
    y, dx, dgamma, dbeta = results
    x, gamma, beta, dy = (a.astype(np.longdouble) for a in (x, gamma, beta, dy))
    others = (0, *range(2, x.ndim))
    shape = (1, -1) + (1,) * (x.ndim - 2)
    expected, mean, inv_std = reference.batch_norm(x, gamma, beta, eps=EPS)
    true_dx, true_dgamma, true_dbeta = reference.batch_norm_backward(dy, x, mean, inv_std, gamma)
    x_hat = (x - mean.reshape(shape)) * inv_std.reshape(shape)
    unit = np.abs(gamma).reshape(shape) * (1 + np.abs(x_hat)) + np.abs(beta).reshape(shape)
    if y.dtype == np.float64:
        unit = unit + np.abs(gamma * mean * inv_std).reshape(shape)
    norm = lambda a: np.sqrt((a**2).sum(others))  # noqa: E731
    return (
        (np.abs(y - expected) / unit).max(),
        (norm(dx - true_dx) / norm((gamma * inv_std).reshape(shape) * dy)).max(),
        (np.abs(dgamma - true_dgamma) / np.abs(dy * x_hat).sum(others)).max(),
        (np.abs(dbeta - true_dbeta) / np.abs(dy).sum(others)).max(),
    )


def main():
    contenders = {"bnfast": of_bnfast} | ({"PyTorch": of_torch} if torch else {})
    if not torch:
        print("left out: PyTorch, which is not installed")
    print(
        f"{'':<10}{'':<13}{'|mean|/std':>10}",
        *(f"{name + ' ' + q:>16}" for q in ("y", "dx", "dgamma", "dbeta") for name in contenders),
    )
    for dtype in (np.float32, np.float64):
        for layout, shape in LAYOUTS.items():
            for offset in OFFSETS:
                case = data(shape, offset, dtype)
                columns = zip(*(errors(run(*case), *case) for run in contenders.values()), strict=True)
                cells = [f"{float(value):16.1e}" for column in columns for value in column]
                print(f"{np.dtype(dtype).name:<10}{layout:<13}{offset:>10.0e}", *cells)


if __name__ == "__main__":
    main()
