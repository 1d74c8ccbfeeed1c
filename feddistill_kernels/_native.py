"""The compiled module ``_C``, and what is known of it."""

from functools import cache
from importlib import import_module
from types import ModuleType

import torch

# csrc/columns.h: enum DType
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


@cache
def compiled() -> ModuleType | str:
    """The compiled module, or why there is none."""
    try:
        return import_module("feddistill_kernels._C")
    except ImportError as error:
        return f"the compiled module feddistill_kernels._C does not load: {error}"


def library() -> ModuleType:
    """The compiled module, where the caller knows that it is there."""
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


def missing_beside_cpu(device_type: str) -> str | None:
    """As ``missing``, for kernels that are not written in CUDA C++."""
    return "there is no CUDA C++ kernel for it" if device_type == "cuda" else missing(device_type)


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
