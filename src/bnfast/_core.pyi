# The extension module's Python face. Arguments are checked by the extension itself; `object` means "anything, a
# clear error if it does not fit".

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Generic, TypeVar

from numpy.typing import NDArray

from .functional import Array, Statistics

_Layer = TypeVar("_Layer")

def shares_memory(a: object, x: Array) -> bool: ...
def as_data(value: object, name: str) -> Array: ...
def moments(x: object, axis: object) -> tuple[int, Statistics, Statistics]: ...
def batch_norm(
    x: object, gamma: object, beta: object, axis: object, eps: object, out: object
) -> tuple[Array, Statistics, Statistics, Statistics]: ...
def batch_norm_eval(
    x: object,
    mean: object,
    var: object,
    gamma: object,
    beta: object,
    axis: object,
    eps: object,
    out: object,
    prefix: str = ...,
) -> Array: ...
def batch_norm_backward(
    dy: object,
    x: object,
    mean: object,
    inv_std: object,
    gamma: object,
    axis: object,
    training: object,
    out: object,
) -> tuple[Array, Array, Array]: ...
def batch_norm_jvp(
    v: object,
    x: object,
    mean: object,
    inv_std: object,
    gamma: object,
    axis: object,
    vgamma: object,
    vbeta: object,
    out: object,
) -> Array: ...
def memory_floor(x: Array, u: Array | None, out: Array) -> None: ...
def updated_running(
    mean: Statistics | None,
    var: Statistics | None,
    batch_mean: Statistics,
    batch_m2: Statistics,
    count: int,
    factor: float,
    unbiased: bool,
) -> tuple[Statistics, Statistics]: ...
def exchange(
    owner: object,
    attribute: str,
    expected: object,
    value: object,
    copies: Sequence[tuple[NDArray[Any], NDArray[Any]]] = ...,
) -> bool: ...

class Calibration(Generic[_Layer]):
    def __init__(self, layer: _Layer) -> None: ...
    def __enter__(self) -> _Layer: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

def set_thread_budget(function: Callable[[], int]) -> None: ...
def isa() -> str: ...
def isas() -> dict[str, tuple[bool, bool]]: ...
def select_isa(name: str | None = None) -> None: ...
def cache_bytes() -> tuple[int, int]: ...
def openmp_version() -> int: ...
def openmp_library() -> str: ...
def openmp_max_threads() -> int: ...
def openmp_thread_limit() -> int: ...
def fork_handled() -> bool: ...
def handle_fork(on: bool) -> None: ...
def forked_serial() -> bool: ...
