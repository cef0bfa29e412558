"""Whether forwards keep what a backward needs: `with no_grad():`."""

import inspect
from collections.abc import Callable
from contextlib import ContextDecorator
from contextvars import ContextVar
from typing import Any, TypeVar

from . import _core

__all__ = ["depth", "is_off", "no_grad"]

_Function = TypeVar("_Function", bound=Callable[..., Any])

# How many `with no_grad()` the calling context is inside of. Nothing is kept in the context manager itself, which may
# be entered in several threads at once.
depth: ContextVar[int] = ContextVar("bnfast_no_grad", default=0)

is_off = depth.get


class no_grad(_core.CountedContext, ContextDecorator):
    """Context manager, and decorator of functions: forwards inside it keep nothing, so there is no backward for them.

    For inference: a layer lets go of x at once. It belongs to the calling context, as Python's context variables do: a
    task started inside it is inside, a thread started inside it is not (but on Pythons without a GIL from 3.14 on).
    Training forwards inside it update the running statistics as always. `vjp` keeps its own forward all the same.

    Raises
    ------
    TypeError
        If it decorates a generator or a coroutine, which go on in other contexts: use `with` inside them.

    Examples
    --------
    >>> import numpy as np, bnfast
    >>> bn = bnfast.BatchNorm(2).eval()
    >>> with bnfast.no_grad():
    ...     y = bn(np.zeros((1, 2)))
    >>> try:
    ...     bn.backward(y)
    ... except RuntimeError as error:
    ...     print(str(error).partition(";")[0])
    backward: expected a forward that waits for its backward, got a forward under no_grad
    """

    def __init__(self) -> None:
        super().__init__(depth)

    def __call__(self, function: _Function) -> _Function:
        """The function, run inside."""
        kinds = inspect.isgeneratorfunction, inspect.iscoroutinefunction, inspect.isasyncgenfunction
        if any(kind(function) for kind in kinds):
            raise TypeError(
                "no_grad: expected a function, got a generator or a coroutine; use `with no_grad():` inside it"
            )
        return super().__call__(function)
