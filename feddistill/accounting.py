"""Cost of a step: seconds, floating-point operations, peak memory."""

import copy
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from feddistill.types import Cost

Part = Literal["all", "above", "cached"]
"""Which part of a model is counted: all layers, those above the cached ones, or the cached ones."""

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
    """Operations that several models have run."""

    flops: int = 0


class _Reached(Exception):  # control flow: skips the layers after the last cached one
    pass


class FlopMeter:
    """Counts a model's operations by input length, on a copy, so that weights and random state are unchanged.

    One text of each length is counted and multiplied by the batch size; elementwise operations are left out,
    as is usual.
    """

    def __init__(self, model: nn.Module, work: Work | None = None):
        """Copy ``model``; what it runs is added to ``work`` too."""
        self._copy = copy.deepcopy(model).cpu()
        self._work = work or Work()
        self._one_text: dict[tuple[int, bool, Part], int] = {}
        self._part: Part = "all"
        self.flops = 0

    def cache(self, layers: Sequence[str]) -> None:
        """From now on ``add`` leaves out these layers, which come first: ``add_cached`` counts them."""
        for index, name in enumerate(layers):
            layer = self._copy.get_submodule(name)
            layer.forward = self._partly(layer.forward, last=index == len(layers) - 1)
        self._part = "above" if layers else "all"
        self._one_text.clear()

    def add(self, batch: int, length: int, *, training: bool) -> None:
        """Add one pass over ``[batch, length]`` tokens; forward and backward when ``training``."""
        flops = batch * self._once(length, training, self._part)
        self.flops += flops
        self._work.flops += flops

    def add_cached(self, batch: int, length: int, *, counted: bool = True, ran: bool = True) -> None:
        """Add one forward pass of ``[batch, length]`` tokens through the layers that ``add`` leaves out.

        Args:
            batch: Number of texts.
            length: Their tokens.
            counted: True to add it to ``flops``.
            ran: True if the model runs it now.
        """
        if self._part == "all":
            return
        flops = batch * self._once(length, False, "cached")
        self.flops += flops if counted else 0
        self._work.flops += flops if ran else 0

    def _once(self, length: int, training: bool, part: Part) -> int:
        key = length, training, part
        if key not in self._one_text:
            before, self._part = self._part, part
            self._one_text[key] = self._count(length, training)
            self._part = before
        return self._one_text[key]

    def _partly(self, original: Callable[..., Any], *, last: bool) -> Callable[..., Any]:
        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._part == "above":
                return hidden
            output = original(hidden, *args, **kwargs)
            if last and self._part == "cached":
                raise _Reached
            return output

        return forward

    def _count(self, length: int, training: bool) -> int:
        from torch.utils.flop_counter import FlopCounterMode

        tokens = torch.ones(1, length, dtype=torch.long)
        counter = FlopCounterMode(display=False, custom_mapping=_ALSO_COUNTED)
        with (
            torch.random.fork_rng(devices=[]),
            counter,
            torch.set_grad_enabled(training),
            suppress(_Reached),
        ):
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
