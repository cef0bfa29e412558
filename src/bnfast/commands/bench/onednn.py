"""oneDNN's batch normalisation, and ReLU of a sum, through its C API: just enough of it, by ctypes.

Constants are those of `dnnl_types.h` and `dnnl_common_types.h`, version 3. The library is that of the package
onednn-cpu-gomp, whose threads are GNU OpenMP's.
"""

import ctypes
import importlib.metadata
from collections.abc import Mapping
from ctypes import POINTER, Structure, byref, c_char_p, c_float, c_int, c_int64, c_uint, c_void_p
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

__all__ = ["Engine", "Primitive", "Status", "library_path"]

Array = NDArray[Any]

PACKAGE = "onednn-cpu-gomp"
F32 = 3
DTYPES = {"float16": 1, "bfloat16": 2, "float32": F32}
ENGINE_CPU = 1
STREAM_IN_ORDER = 1
FORWARD_TRAINING, FORWARD_INFERENCE, BACKWARD = 64, 96, 128
USE_GLOBAL_STATS, USE_SCALE, USE_SHIFT, FUSE_ADD_RELU = 1, 2, 4, 16
BINARY_ADD, RELU, RELU_USE_DST = 0x1FFF0, 0x20, 0x100
QUERY_IMPL_INFO = 8
ARGUMENTS = {
    "src": 1,
    "src_1": 2,
    "dst": 17,
    "mean": 49,
    "variance": 50,
    "scale": 51,
    "shift": 52,
    "diff_src": 129,
    "diff_dst": 145,
    "diff_scale": 255,
    "diff_shift": 256,
}


class Status(RuntimeError):
    """A call of oneDNN did not succeed."""


class _Argument(Structure):
    _fields_ = (("arg", c_int), ("memory", c_void_p))


class _Version(Structure):
    _fields_ = (("major", c_int), ("minor", c_int), ("patch", c_int))


def library_path() -> Path | None:
    """Where the package put the library; None if it is not installed."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (Path(str(file.locate())) for file in files if file.name in ("libdnnl.so.3", "libdnnl.so"))
    return next((path.resolve() for path in found if path.exists()), None)


class Engine:
    """The library, an engine for the CPU and a stream.

    Raises
    ------
    ImportError
        If the library is not installed, cannot be loaded or is not version 3.
    """

    def __init__(self) -> None:
        path = library_path()
        if path is None:
            raise ImportError(f"{PACKAGE} is not installed")
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise ImportError(str(error)) from error
        self._library.dnnl_version.restype = POINTER(_Version)
        version = self._library.dnnl_version().contents
        self.version = f"{version.major}.{version.minor}.{version.patch}"
        if version.major != 3:
            raise ImportError(f"oneDNN 3 is expected, this is {self.version}")
        self._handle, self._stream = c_void_p(), c_void_p()
        self.call("dnnl_engine_create", byref(self._handle), c_int(ENGINE_CPU), ctypes.c_size_t(0))
        self.call("dnnl_stream_create", byref(self._stream), self._handle, c_uint(STREAM_IN_ORDER))

    def call(self, name: str, *arguments: Any) -> None:
        """Call a function that returns a status."""
        status = getattr(self._library, name)(*arguments)
        if status != 0:
            raise Status(f"{name}: status {status}")

    def descriptor(self, dims: tuple[int, ...], strides: tuple[int, ...], dtype: str = "float32") -> c_void_p:
        """A memory descriptor; strides count elements."""
        handle, n = c_void_p(), len(dims)
        numbers = c_int64 * 12
        self.call(
            "dnnl_memory_desc_create_with_strides",
            byref(handle),
            c_int(n),
            numbers(*dims),
            c_int(DTYPES[dtype]),
            numbers(*strides),
        )
        return handle

    def memory(self, descriptor: c_void_p, array: Array) -> c_void_p:
        """A memory object over an array's own memory."""
        handle = c_void_p()
        self.call("dnnl_memory_create", byref(handle), descriptor, self._handle, c_void_p(array.ctypes.data))
        return handle

    def forward(self, data: c_void_p, eps: float, training: bool, flags: int = 0) -> c_void_p:
        """Descriptor of a forward primitive: statistics of the batch in training, given ones otherwise."""
        handle = c_void_p()
        flags |= USE_SCALE | USE_SHIFT | (0 if training else USE_GLOBAL_STATS)
        kind = FORWARD_TRAINING if training else FORWARD_INFERENCE
        self.call(
            "dnnl_batch_normalization_forward_primitive_desc_create",
            *(byref(handle), self._handle, c_int(kind), data, data, c_float(eps), c_uint(flags), None),
        )
        return handle

    def backward(self, data: c_void_p, eps: float, forward: c_void_p) -> c_void_p:
        """Descriptor of a backward primitive, through the statistics of the batch."""
        handle = c_void_p()
        self.call(
            "dnnl_batch_normalization_backward_primitive_desc_create",
            *(byref(handle), self._handle, c_int(BACKWARD), data, data, data),
            *(c_float(eps), c_uint(USE_SCALE | USE_SHIFT), forward, None),
        )
        return handle

    def add_relu(self, data: c_void_p) -> c_void_p:
        """Descriptor of dst = relu(src + src_1)."""
        handle, post_ops, attributes = c_void_p(), c_void_p(), c_void_p()
        self.call("dnnl_post_ops_create", byref(post_ops))
        self.call("dnnl_post_ops_append_eltwise", post_ops, c_int(RELU), c_float(0), c_float(0))
        self.call("dnnl_primitive_attr_create", byref(attributes))
        self.call("dnnl_primitive_attr_set_post_ops", attributes, post_ops)
        self.call(
            "dnnl_binary_primitive_desc_create",
            *(byref(handle), self._handle, c_int(BINARY_ADD), data, data, data, attributes),
        )
        return handle

    def relu_backward(self, data: c_void_p) -> c_void_p:
        """Descriptor of diff_src = diff_dst where dst > 0, else 0."""
        forward, handle = c_void_p(), c_void_p()
        slope = (c_float(0), c_float(0))
        self.call(
            "dnnl_eltwise_forward_primitive_desc_create",
            *(byref(forward), self._handle, c_int(FORWARD_TRAINING), c_int(RELU_USE_DST), data, data, *slope, None),
        )
        self.call(
            "dnnl_eltwise_backward_primitive_desc_create",
            *(byref(handle), self._handle, c_int(RELU_USE_DST), data, data, data, *slope, forward, None),
        )
        return handle

    def implementation(self, primitive: c_void_p) -> str:
        """oneDNN's name of the implementation that a primitive descriptor has chosen."""
        text = c_char_p()
        self.call("dnnl_primitive_desc_query", primitive, c_int(QUERY_IMPL_INFO), c_int(0), byref(text))
        return (text.value or b"").decode()


class Primitive:
    """Something to execute; it keeps what it uses.

    Parameters
    ----------
    engine : Engine
    descriptor : c_void_p
        From `Engine.forward` or `Engine.backward`.
    memories : mapping of argument names to (memory descriptor, array)
    """

    def __init__(self, engine: Engine, descriptor: c_void_p, memories: Mapping[str, tuple[c_void_p, Array]]) -> None:
        self._engine, self._arrays = engine, {name: array for name, (_, array) in memories.items()}
        self._memories = {name: engine.memory(place, array) for name, (place, array) in memories.items()}
        self._handle = c_void_p()
        engine.call("dnnl_primitive_create", byref(self._handle), descriptor)
        self._arguments = (_Argument * len(memories))(
            *(_Argument(ARGUMENTS[name], memory) for name, memory in self._memories.items())
        )
        self._execute, self._wait = engine._library.dnnl_primitive_execute, engine._library.dnnl_stream_wait
        self._count = c_int(len(memories))
        self.implementation = engine.implementation(descriptor)

    def place(self, name: str, array: Array) -> None:
        """Let an argument lie in another array of the same shape."""
        self._arrays[name] = array
        self._engine.call("dnnl_memory_set_data_handle", self._memories[name], c_void_p(array.ctypes.data))

    def __call__(self) -> None:
        stream = self._engine._stream
        if self._execute(self._handle, stream, self._count, self._arguments) or self._wait(stream):
            raise Status("dnnl_primitive_execute failed")

    def __del__(self) -> None:
        if not hasattr(self, "_engine"):
            return
        for memory in self._memories.values():
            self._engine.call("dnnl_memory_destroy", memory)
        if self._handle:
            self._engine.call("dnnl_primitive_destroy", self._handle)
