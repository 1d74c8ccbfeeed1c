"""Cost of a step: seconds, floating-point operations, peak memory."""

import copy
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from feddistill.types import Cost

_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


# torch's counter loads Triton, 75 MB, and is therefore imported only when a pass is counted.
# The counter calls these functions with the arguments of the operator, which have no common type.
def _attention(query, key, value, *args, out_shape=None, **kwargs):  # type: ignore[no-untyped-def]
    from torch.utils.flop_counter import sdpa_flop_count

    return sdpa_flop_count(query, key, value)


def _attention_backward(grad, query, key, value, *args, out_shape=None, **kwargs):  # type: ignore[no-untyped-def]
    from torch.utils.flop_counter import sdpa_backward_flop_count

    return sdpa_backward_flop_count(grad, query, key, value)


_ALSO_COUNTED = {
    _CPU_ATTENTION: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Operators that torch's counter does not count."""


@dataclass(slots=True)
class Work:
    """Operations of several models together."""

    flops: int = 0


class FlopMeter:
    """Counts a model's operations by input length, on a copy, so that weights and random state are unchanged.

    One text of each length is counted and multiplied by the batch size; elementwise operations are left out,
    as is usual.
    """

    def __init__(self, model: nn.Module, work: Work | None = None):
        """Copy ``model``; what is counted is added to ``work`` too."""
        self._copy = copy.deepcopy(model).cpu()
        self._work = work or Work()
        self._one_text: dict[tuple[int, bool, bool], int] = {}
        self._cached: list[nn.Module] = []
        self._skips = False
        self.flops = 0

    def cache(self, layers: Sequence[str]) -> None:
        """From now on ``add`` leaves out these layers, which are frozen: ``add_cached`` counts them."""
        self._cached = [self._copy.get_submodule(layer) for layer in layers]
        for layer in self._cached:
            layer.forward = self._skipped(layer.forward)
        self._one_text.clear()

    def add(self, batch: int, length: int, *, training: bool) -> None:
        """Add one pass over ``[batch, length]`` tokens; forward and backward when ``training``."""
        self._count_in(batch * self._once(length, training, skip=bool(self._cached)))

    def add_cached(self, batch: int, length: int) -> None:
        """Add one forward pass of ``[batch, length]`` tokens through the layers that ``add`` leaves out."""
        if self._cached:
            whole, rest = (self._once(length, False, skip=skip) for skip in (False, True))
            self._count_in(batch * (whole - rest))

    def _count_in(self, flops: int) -> None:
        self.flops += flops
        self._work.flops += flops

    def _once(self, length: int, training: bool, *, skip: bool) -> int:
        key = length, training, skip
        if key not in self._one_text:
            self._skips = skip
            self._one_text[key] = self._count(length, training)
        return self._one_text[key]

    def _skipped(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            return hidden if self._skips else original(hidden, *args, **kwargs)

        return forward

    def _count(self, length: int, training: bool) -> int:
        from torch.utils.flop_counter import FlopCounterMode

        tokens = torch.ones(1, length, dtype=torch.long)
        counter = FlopCounterMode(display=False, custom_mapping=_ALSO_COUNTED)
        with torch.random.fork_rng(devices=[]), counter, torch.set_grad_enabled(training):
            outputs = self._copy(input_ids=tokens)
            if training:  # logits, or in question answering the logits of start and end
                parts = [part.sum() for part in outputs.values() if isinstance(part, Tensor)]
                torch.stack(parts).sum().backward()
        return int(counter.get_total_flops())


@dataclass(slots=True)
class Measurement:
    """Result of ``measure``; ``cost`` is complete when the body has ended."""

    flops: int = 0
    cost: Cost = field(default_factory=Cost)


@contextmanager
def measure() -> Iterator[Measurement]:
    """Context manager that times its body, which sets ``flops`` itself."""
    measurement = Measurement()
    start = time.perf_counter()
    yield measurement
    measurement.cost = Cost(time.perf_counter() - start, measurement.flops, peak_memory_bytes())


def peak_memory_bytes() -> int:
    """Peak resident memory of this process."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
