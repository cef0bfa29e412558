"""Batch norm layers for PyTorch on the CPU, computed by bnfast's kernels; `convert(model)` exchanges a model's.

`BatchNorm1d`, `BatchNorm2d` and `BatchNorm3d` are subclasses of PyTorch's, with its constructors, state dictionaries
and semantics; they can take in the activation and the residual behind them. What the kernels do not do goes to
PyTorch's own code. `SyncBatchNorm` stands for PyTorch's, which has no CPU; the others take a process group, too.
"""

from .conversion import convert, revert
from .layers import BatchNorm1d, BatchNorm2d, BatchNorm3d, SyncBatchNorm

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm", "convert", "revert"]
