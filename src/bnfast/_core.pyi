# The extension module's Python face. Arguments are checked by the extension itself; `object` means "anything, a
# clear error if it does not fit".

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, final

import numpy as np
from numpy.typing import ArrayLike, NDArray
from typing_extensions import disjoint_base

from .functional import Array, Statistics

_T = TypeVar("_T")
_Entered = TypeVar("_Entered")

def shares_memory(a: object, x: Array) -> bool: ...
def elements_overlap(array: NDArray[Any]) -> bool: ...
def as_data(value: object, name: str) -> Array: ...
def widened(x: Array) -> NDArray[np.float32]: ...
def narrowed(wide: Array, model: Array, out: Array | None = None) -> Array: ...
def as_eps(eps: object) -> float: ...
def moments(x: object, axis: object) -> tuple[int, Statistics, Statistics, Statistics]: ...
def mask_of(mask: object, x: Array, axis: int) -> NDArray[np.bool_]: ...
def merge_moments_rows(rows: Statistics) -> Statistics: ...

@final
class Processes:
    comm: Any
    def __init__(
        self,
        comm: Any,
        send: Callable[[Statistics], Any] | None,
        names: tuple[str, ...],
        values_of: Callable[[], Sequence[float]],
        words: Callable[[str, float], str],
    ) -> None: ...
    def calibrated(
        self, row: Statistics, batches: int, error: BaseException | None
    ) -> tuple[Statistics, int] | None: ...

def batch_norm(
    x: object,
    gamma: object,
    beta: object,
    axis: object,
    eps: object,
    out: object,
    residual: object = ...,
    activation: object = ...,
    negative_slope: object = ...,
    return_var: bool = ...,
) -> tuple[Array, ...]: ...
def batch_norm_eval(
    x: object,
    mean: object,
    var: object,
    gamma: object,
    beta: object,
    axis: object,
    eps: object,
    out: object,
    residual: object = ...,
    activation: object = ...,
    negative_slope: object = ...,
) -> Array: ...
def before_activation(
    x: object, mean: object, inv_std: object, gamma: object, beta: object, axis: object, residual: object
) -> Array: ...
def passed_by(u: Array, y: Array, activation: object, negative_slope: object, out: object) -> Array: ...
def as_like(value: object, name: str, x: Array) -> Array: ...
def as_negative_slope(value: object) -> float: ...
def affine(
    x: object, center: object, scale: object, shift: object, out: object, search: bool
) -> tuple[Array, bool]: ...
def check_out(out: object, x: Array) -> None: ...
def check_outs(out: object, out_residual: object, residual: object, x: Array) -> None: ...
def batch_norm_backward(
    dy: object,
    x: object,
    mean: object,
    inv_std: object,
    gamma: object,
    axis: object,
    training: object,
    out: object,
    beta: object = ...,
    residual: object = ...,
    activation: object = ...,
    negative_slope: object = ...,
    out_residual: object = ...,
) -> tuple[Array, ...]: ...
def batch_norm_backward_sums(
    dy: object,
    x: object,
    mean: object,
    inv_std: object,
    gamma: object,
    axis: object,
    beta: object,
    residual: object,
    activation: object,
    negative_slope: object,
) -> tuple[int, Statistics, Statistics]: ...
def batch_norm_backward_apply(
    dy: object,
    x: object,
    mean: object,
    inv_std: object,
    gamma: object,
    count: float,
    dgamma: object,
    dbeta: object,
    axis: object,
    beta: object,
    residual: object,
    activation: object,
    negative_slope: object,
    out: object,
    out_residual: object,
) -> Any: ...
def update_average(average: Array, batch: Statistics, keep: float, weight: float) -> None: ...
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

@final
class Positions:
    model: Array
    count: int
    @property
    def all(self) -> bool: ...
    def home(self, out: object, array: Array) -> Array | None: ...
    def gather(self, array: object, name: str, home: Array | None = ...) -> Array: ...
    def scatter(self, part: Array, out: object, home: Array | None = ...) -> Array: ...

def positions_of(mask: object, x: object, axis: object) -> Positions: ...
def check_positions(count: int) -> None: ...
def memory_floor(x: Array, u: Array | None, out: Array) -> None: ...

# --- a layer's step ---

# What `update_all` takes: a reference, what makes new contents of those it refers to, and (target, source) arrays.
_Update = tuple[AtomicReference[Contents], Callable[[Contents], Contents], list[tuple[NDArray[Any], NDArray[Any]]]]

KEEP_NOTHING: int
KEEP_LAST: int
KEEP_PULLBACK: int

@final
class AtomicReference(Generic[_T]):
    def __new__(cls, value: _T) -> Self: ...
    @property
    def value(self) -> _T: ...
    def snapshot(self, arrays: tuple[NDArray[Any] | None, ...]) -> tuple[Any, ...]: ...
    def update(self, function: Callable[..., _T], *arguments: object) -> None: ...

@final
class Forward:
    x: Array
    count: int
    def exact_moments(self) -> tuple[int, Statistics, Statistics, Statistics]: ...

@final
class Running:
    batches: int
    averaged: NDArray[np.int64] | None
    skipped: NDArray[np.int64] | None
    @property
    def mean(self) -> Statistics: ...
    @property
    def var(self) -> Statistics: ...
    def __init__(
        self,
        mean: Statistics,
        var: Statistics,
        batches: int = 0,
        averaged: NDArray[np.int64] | None = None,
        skipped: NDArray[np.int64] | None = None,
    ) -> None: ...

@final
class Contents:
    in_use: Any  # Running, or None for a layer without running statistics
    averages: Running | None
    exact: tuple[Any, int] | None
    gathered: tuple[object, Any, int] | None
    forward: Forward | None
    why_no_forward: str | None
    replaced: bool
    gradients: tuple[Array | None, Array | None]
    accumulated: tuple[Array | None, Array | None]
    def __new__(cls, running: Running | None = None) -> Self: ...
    @property
    def batch_moments(self) -> tuple[int, Statistics, Statistics] | None: ...
    def replace(self, **changes: object) -> Contents: ...

@final
class Calibration(Generic[_Entered]):
    def __new__(
        cls,
        tokens: tuple[AtomicReference[object], ...],
        finish: Callable[[object, BaseException | None], None],
        entered: _Entered,
    ) -> Self: ...
    def __enter__(self) -> _Entered: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

@disjoint_base
class CountedContext:
    def __init__(self, variable: ContextVar[int]) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

def update_all(
    updates: list[_Update],
    arrays: list[tuple[NDArray[Any], NDArray[Any]]] = ...,
    attributes: list[tuple[dict[str, Any], dict[str, Any]]] = ...,
) -> None: ...

@final
class Options:
    def __new__(
        cls,
        axis: int,
        channels: int,
        tracks: bool,
        unbiased: bool,
        nonfinite: str,
        activation: str | None = ...,
        negative_slope: float = ...,
    ) -> Self: ...

def set_plain_forward(forward: Callable[..., Array], depth: ContextVar[int]) -> None: ...
def called(
    self: Any,
    x: ArrayLike,
    out: Array | None = None,
    *,
    residual: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    update: bool = True,
) -> Array: ...
def living_forwards(contents: AtomicReference[Contents], of_pullbacks: set[Any]) -> tuple[Forward, ...]: ...
def forward_of(
    contents: AtomicReference[Contents],
    options: Options,
    x: object,
    gamma: Array | None,
    beta: Array | None,
    eps: float,
    momentum: float | None,
    training: bool,
    keep: int,
    update: bool,
    out: object,
    living: tuple[Forward, ...],
    residual: object = ...,
    mask: object = ...,
    processes: Processes | None = ...,
) -> tuple[Array, Forward]: ...
def forward_in_calibration(
    contents: AtomicReference[Contents],
    options: Options,
    x: object,
    gamma: Array | None,
    beta: Array | None,
    eps: float,
    training: bool,
    keep: int,
    out: object,
    living: tuple[Forward, ...],
    gathers: Callable[[Contents, tuple[int, Statistics, Statistics]], Contents] | None,
    residual: object = ...,
    mask: object = ...,
) -> tuple[Array, Forward]: ...
def backward_of(
    forward: Forward,
    dy: object,
    out: object,
    living: tuple[Forward, ...],
    dtype: np.dtype[Any],
    out_residual: object = ...,
) -> tuple[Array, Array | None, Array, Array]: ...
def commit_backward(
    contents: AtomicReference[Contents],
    forward: Forward,
    last: bool,
    gradients: tuple[Array | None, Array | None],
    accumulate: bool,
) -> None: ...

# --- what was built, and what is running ---

def set_thread_sources(context: ContextVar[Any], cpus: Callable[[], int]) -> None: ...
def set_process_threads(n: int) -> None: ...
def set_environment_threads(n: int, omp_num_threads_is_set: bool) -> None: ...
def thread_budget() -> tuple[int, int, bool]: ...
def set_spin_count(turns: int) -> None: ...
def pretend_late(task: int, waited: int) -> None: ...
def set_patience(microseconds: int) -> None: ...
def pretend_last_call(seconds_ago: float, elements: int = 0) -> None: ...
def seconds_awake() -> float: ...
def age_cpus(seconds: float) -> None: ...
def decide_threads(**facts: int) -> tuple[int, int, bool]: ...
def team_for(elements: int, worth: int = ...) -> int: ...
def isa() -> str: ...
def isas() -> dict[str, tuple[bool, bool]]: ...
def select_isa(name: str | None = None) -> None: ...
def cache_bytes() -> tuple[int, int]: ...
def set_cache_bytes(l2: int, last_level: int) -> None: ...
def last_level_is_far() -> bool: ...
def explain(
    shape: Sequence[int], axis: int, dtype: object, operation: str, n_threads: int, residual: bool = False
) -> dict[str, Any]: ...
def force_plan(
    kind: str | None = None,
    stream: bool | None = None,
    near: bool | None = None,
    pack: bool | None = None,
    written_later: bool | None = None,
    row_by_row: bool | None = None,
    in_order: bool | None = None,
) -> None: ...
def openmp_version() -> int: ...
def openmp_library() -> str: ...
def openmp_max_threads() -> int: ...
def openmp_thread_limit() -> int: ...
def fork_handled() -> bool: ...
def handle_fork(on: bool) -> None: ...
def forked_serial() -> bool: ...
