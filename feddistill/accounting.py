"""What a step costs: seconds, floating-point operations, peak memory."""

import copy
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from feddistill.types import Cost

_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


# torch's counter loads Triton, 75 MB: only who trains counts.
# The counter calls these with whatever the operator was called with: there is nothing to type.
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
"""Operators that torch's counter does not know."""


class FlopMeter:
    """Counts a model's operations by input length, on a copy: the run's weights and draws stay untouched.

    One text of each length is counted and multiplied by the batch; elementwise work is left out, as is
    usual.
    """

    def __init__(self, model: nn.Module):
        self._copy = copy.deepcopy(model).cpu()
        self._one_text: dict[tuple[int, bool], int] = {}
        self.flops = 0

    def add(self, batch: int, length: int, *, training: bool) -> None:
        """Add one pass over ``[batch, length]`` tokens; forward and backward when ``training``."""
        if (length, training) not in self._one_text:
            self._one_text[length, training] = self._count(length, training)
        self.flops += batch * self._one_text[length, training]

    def _count(self, length: int, training: bool) -> int:
        from torch.utils.flop_counter import FlopCounterMode

        tokens = torch.ones(1, length, dtype=torch.long)
        counter = FlopCounterMode(display=False, custom_mapping=_ALSO_COUNTED)
        with torch.random.fork_rng(devices=[]), counter, torch.set_grad_enabled(training):
            said = self._copy(input_ids=tokens)
            if training:  # of one tensor, the logits, or of two: where an answer starts, and where it ends
                parts = [part.sum() for part in said.values() if isinstance(part, Tensor)]
                torch.stack(parts).sum().backward()
        return int(counter.get_total_flops())


@dataclass(slots=True)
class Measurement:
    """Filled in while ``measure`` runs; ``cost`` is whole when it has ended."""

    flops: int = 0
    cost: Cost = field(default_factory=Cost)


@contextmanager
def measure() -> Iterator[Measurement]:
    """Time a step; what it counted goes to ``.flops`` before the end."""
    measurement = Measurement()
    start = time.perf_counter()
    yield measurement
    measurement.cost = Cost(time.perf_counter() - start, measurement.flops, peak_memory_bytes())


def peak_memory_bytes() -> int:
    """The most memory this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
