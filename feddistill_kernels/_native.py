"""The compiled module ``_C``: loading it, and passing tensors to it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

# csrc/dtype.h: DType
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@cache
def compiled() -> ModuleType | str:
    """The compiled module, or why there is none."""
    try:
        return import_module("feddistill_kernels._C")
    except ImportError as error:
        return f"the compiled module feddistill_kernels._C does not load: {error}"


def library() -> ModuleType:
    """The compiled module; the caller knows that it loads."""
    module = compiled()
    assert not isinstance(module, str), module
    return module


def missing(device_type: str) -> str | None:
    """Why compiled kernels cannot run on a device of this type; ``None`` when they can."""
    module = compiled()
    if isinstance(module, str):
        return module
    if device_type == "cpu":
        return None
    if device_type == "cuda":
        return None if module.build_info()["cuda"].startswith("yes") else module.build_info()["cuda"]
    return f"there is no compiled kernel for device {device_type!r}"


def cpu_only(device_type: str) -> str | None:
    """``missing`` of an operator that is compiled for the CPU alone."""
    if device_type != "cpu":
        return f"there is no compiled kernel for device {device_type!r}"
    return missing(device_type)


@contextmanager
def on_stream(x: Tensor) -> Iterator[int]:
    """The current stream of the GPU that holds ``x``, as a number; that GPU is the current one inside."""
    with torch.cuda.device(x.device):
        yield torch.cuda.current_stream().cuda_stream


_LARGE = 1 << 23  # bytes: below, the allocator keeps what it gave anyway


def empty_like(x: Tensor) -> Tensor:
    """A contiguous tensor like ``x``; a large one on the CPU reuses the memory of an earlier one.

    Freed memory stays mapped until the system needs it (``csrc/cpu/pages.h``).
    """
    module = compiled()
    if x.device.type != "cpu" or x.nbytes < _LARGE or isinstance(module, str) or not module.keeps_pages:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    memory = torch.frombuffer(module.Pages(x.nbytes), dtype=x.dtype).untyped_storage()
    strides = torch.empty(x.shape, device="meta").stride()
    return torch.empty(0, dtype=x.dtype, device="cpu").set_(memory, 0, x.shape, strides)


def drop_pages() -> None:
    """Return the memory that ``empty_like`` keeps to the system now."""
    module = compiled()
    if not isinstance(module, str):
        module.drop_pages()


def in_rows(x: Tensor) -> Tensor:
    """``x [N, V]`` with neighbours in a row neighbours in memory: a copy where they are not."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def matrix(x: Tensor) -> tuple[int, int, int]:
    """``x [N, V]`` as csrc/dtype.h: Matrix."""
    return x.data_ptr(), x.stride(0), DTYPES[x.dtype]


def build_info() -> dict[str, str]:
    """How the compiled kernels were built: compiler, OpenMP, instruction sets, CUDA and why not.

    Returns:
        One line of text a subject.  Without the compiled module, the one subject ``native`` says why.

    Example:
        >>> "native" in build_info()
        True
    """
    module = compiled()
    if isinstance(module, str):
        return {"native": f"no: {module}"}
    return {"native": "yes", **module.build_info()}
