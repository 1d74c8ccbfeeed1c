"""What the Triton backends share: where they run, and how a kernel is launched."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LEAST_CAPABILITY = (8, 0)


@triton.jit
def _probe(x):
    tl.store(x, 0)


def interpreted() -> bool:
    """Whether Triton interprets kernels, because TRITON_INTERPRET=1 was set when it was imported."""
    return not isinstance(_probe, triton.JITFunction)


@cache
def missing(device_type: str) -> str | None:
    """Why Triton kernels cannot run on a device of this type; ``None`` when they can."""
    if device_type == "cpu":
        return None if interpreted() else "Triton kernels need a GPU, or TRITON_INTERPRET=1 for a test"
    if device_type != "cuda":
        return f"there is no Triton kernel for device {device_type!r}"
    if interpreted():
        return "TRITON_INTERPRET=1 runs Triton kernels on the CPU only"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        return f"the kernels need compute capability {LEAST_CAPABILITY}, the GPU has {capability}"
    return None


@dataclass(frozen=True)
class Launch:
    """A kernel as it would be launched: what it would be compiled for."""

    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int


_launches: list[Launch] | None = None


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Record the launches inside the block instead of running them.

    So what is compiled ahead of time is what the operators launch, not a second list of it.
    """
    global _launches
    _launches = []
    try:
        yield _launches
    finally:
        _launches = None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int, **constants: Any) -> None:
    """Run ``kernel`` on the device of its first argument, which is a tensor, on the current stream."""
    if _launches is not None:
        _launches.append(Launch(kernel, arguments, constants, warps))
        return
    if 0 in grid:
        return
    like: Tensor = arguments[0]
    with torch.cuda.device(like.device) if like.is_cuda else nullcontext():
        kernel[grid](*arguments, **constants, num_warps=warps, enable_fp_fusion=True)


def processors(like: Tensor) -> int:
    """Multiprocessors of the GPU; few in the interpreter, so that tests meet both long and short grids."""
    if not like.is_cuda:
        return 2
    return int(torch.cuda.get_device_properties(like.device).multi_processor_count)


def power_of_two(least: int) -> int:
    """The first power of two that is not less than ``least``."""
    return 1 << max(0, least - 1).bit_length()
