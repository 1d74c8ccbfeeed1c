"""Time, peak memory and copy bandwidth, measured in turns."""

import ctypes
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from feddistill_kernels._native import drop_pages

SLICE = 0.02  # seconds of one contender before the next has its turn
ROUNDS = (3, 50)  # least, unless `PATIENCE` times the box is spent, and most
PATIENCE = 5


@dataclass(frozen=True)
class Contender:
    """One way to compute something."""

    name: str
    run: Callable[..., Any]
    prepare: Callable[[], tuple[Any, ...]] = tuple
    """Makes the arguments of ``run``, untimed, before each call."""
    value: Callable[[Any], Sequence[Tensor]] = lambda result: [result]
    """The part of a result that is compared with the other contenders'."""
    expected: Callable[[], Sequence[Tensor]] | None = None
    """The required value if it is not ours, because of another convention: see ``note``."""
    tolerance: float | None = None
    """Allowed relative error; ``None`` for that of the case's dtype."""
    note: str = ""


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    median: float
    quartiles: tuple[float, float]
    least: float
    runs: int


class CpuClock:
    """Wall-clock time."""

    def __call__(self, contender: Contender) -> float:
        arguments = contender.prepare()
        start = time.perf_counter()
        result = contender.run(*arguments)
        seconds = time.perf_counter() - start
        del result  # after the clock has stopped: freeing the result is not timed
        return seconds


class CudaClock:
    """Time between two CUDA events; the L2 cache is overwritten before each call."""

    def __init__(self) -> None:
        cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._flush = torch.empty(max(4 * cache, 1 << 28), dtype=torch.uint8, device="cuda")

    def __call__(self, contender: Contender) -> float:
        arguments = contender.prepare()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # While the device overwrites its cache the host queues the call: launches are hidden as in training.
        self._flush.zero_()
        start.record()
        result = contender.run(*arguments)
        end.record()
        torch.cuda.synchronize()
        del result
        return float(start.elapsed_time(end)) / 1e3


Clock = Callable[[Contender], float]


def clock(device: str) -> Clock:
    """The clock of a device."""
    return CudaClock() if device == "cuda" else CpuClock()


def in_turns(contenders: Sequence[Contender], tick: Clock, box: float) -> dict[str, Timing]:
    """Time contenders in turns until ``box`` seconds are spent, so that other load affects all of them alike.

    A fast contender makes several calls per turn.  The first finds cold caches, which the median ignores.
    """
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    start = time.perf_counter()
    with _no_garbage_collection():
        for turn in range(ROUNDS[1]):
            spent = time.perf_counter() - start
            if turn and spent > (box if turn >= ROUNDS[0] else PATIENCE * box):
                break
            for contender in contenders:
                until = time.perf_counter() + SLICE
                seconds[contender.name].append(tick(contender))
                while time.perf_counter() < until:
                    seconds[contender.name].append(tick(contender))
    return {name: _timing(values) for name, values in seconds.items()}


def _timing(seconds: list[float]) -> Timing:
    twice = seconds * 2 if len(seconds) == 1 else seconds  # one value has no quartiles
    low, _, high = statistics.quantiles(twice, n=4, method="inclusive")
    return Timing(statistics.median(seconds), (low, high), min(seconds), len(seconds))


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def copying(device: str, megabytes: int) -> tuple[Contender, int]:
    """A copy of a tensor far larger than any cache, and the bytes that the copy reads and writes."""
    source = torch.ones(megabytes << 18, device=device)
    target = torch.zeros_like(source)
    return Contender("copy", target.copy_, lambda: (source,)), 2 * source.nbytes


def peak_extra_bytes(contender: Contender, device: str) -> tuple[Any, int | None]:
    """One call's result, and the peak memory that the call adds, the result included.

    On the CPU it is resident memory, in whole pages; ``None`` if the system does not report it.
    """
    arguments = contender.prepare()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        result = contender.run(*arguments)
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - allocated
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # else the call reuses memory that an earlier one freed, and nothing grows
    drop_pages()
    before = _resident_bytes("VmRSS", reset_peak=True)
    result = contender.run(*arguments)
    peak = _resident_bytes("VmHWM")
    return result, None if before is None or peak is None else max(0, peak - before)


def _resident_bytes(key: str, reset_peak: bool = False) -> int | None:
    try:
        if reset_peak:
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM: proc(5)
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


class DisagreementError(Exception):
    """Two contenders compute different results."""


def check_agreement(name: str, given: Sequence[Tensor], wanted: Sequence[Tensor], tolerance: float) -> None:
    """Require equal tensors, up to a relative error in the 2-norm and rounding to the dtype.

    Raises:
        DisagreementError: They differ by more, or in number or shape.
    """
    if [x.shape for x in given] != [x.shape for x in wanted]:
        shapes = [list(x.shape) for x in given], [list(x.shape) for x in wanted]
        raise DisagreementError(f"{name} gives shapes {shapes[0]}, ours {shapes[1]}")
    for index, (x, y) in enumerate(zip(given, wanted, strict=True)):
        # float16 gradients are near its smallest numbers, whose spacing bounds the error.
        spacing = max(torch.finfo(z.dtype).smallest_normal * torch.finfo(z.dtype).eps for z in (x, y))
        error, norm = _distance(x, y), _distance(y, None)
        if not error <= tolerance * norm + spacing * math.sqrt(x.numel()):
            raise DisagreementError(
                f"{name} differs from ours: relative error {error / norm:.2g} in output {index}, "
                f"allowed {tolerance:.2g}"
            )


def _distance(x: Tensor, y: Tensor | None) -> float:
    """2-norm of ``x - y``, in blocks: no float64 copy of a large tensor."""
    total = 0.0
    for start in range(0, max(1, x.numel()), 1 << 22):
        block = x.flatten()[start : start + (1 << 22)].double()
        if y is not None:
            block = block - y.flatten()[start : start + (1 << 22)].double()
        total += float(block.square().sum())
    return math.sqrt(total)
