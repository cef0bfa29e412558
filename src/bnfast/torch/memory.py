"""New tensors. Large ones are asked to lie on huge pages, as NumPy's arrays do: their first write is 5 times as fast.

A page of 4 KiB that a process has not touched yet costs its first write about 1 us, which is more than batch norm takes
for the thousand floats on it. The system keeps the memory of small tensors for the next; that of large ones, which a
step of training makes anew in each layer, it takes back. (PyTorch can do the same, with THP_MEM_ALLOC_ENABLE=1.)
"""

import ctypes
import mmap
import sys
from typing import Any

import torch
from torch import Tensor

__all__ = ["empty_like"]

LARGE = 1 << 22  # bytes; NumPy's limit
HUGE = getattr(mmap, "MADV_HUGEPAGE", None)


def _find_madvise() -> Any:
    if not sys.platform.startswith("linux") or HUGE is None:
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


_madvise = _find_madvise()


def empty_like(x: Tensor, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
    """`torch.empty_like`."""
    y = torch.empty_like(x, memory_format=memory_format)
    size = y.numel() * y.element_size()
    if size >= LARGE and _madvise is not None:
        address = y.data_ptr()
        begin = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE  # of the first whole page
        _madvise(begin, (address + size - begin) // mmap.PAGESIZE * mmap.PAGESIZE, HUGE)  # advice: it may fail
    return y
