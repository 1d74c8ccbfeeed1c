"""The cases that are measured, by operator."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from ..names import FAMILY
from .aggregation import aggregate_topk, coordinate_median, distance_rule, trimmed_mean
from .case import Case, Setup
from .compression import topk_compress
from .linear import linear_distillation_loss
from .losses import distillation_loss, softmax_divergence, topk_teacher

__all__ = ["FAMILY", "OPERATORS", "Case", "Setup", "chosen"]

OPERATORS: dict[str, tuple[Callable[[str], Iterator[Case]], ...]] = {
    "distillation_loss": (distillation_loss, topk_teacher),
    "softmax_divergence": (softmax_divergence,),
    "topk_compress": (topk_compress,),
    "coordinate_median": (coordinate_median,),
    "trimmed_mean": (trimmed_mean,),
    "geometric_median": (partial(distance_rule, "geometric_median"),),
    "krum": (partial(distance_rule, "krum"),),
    "nearest_neighbour_mixing": (partial(distance_rule, "nearest_neighbour_mixing"),),
    "aggregate_topk": (aggregate_topk,),
    "linear_distillation_loss": (linear_distillation_loss,),
}


def chosen(ops: Sequence[str], device: str, only: str = "", quick: bool = False) -> list[Case]:
    """Cases on a device whose names contain ``only``; with ``quick``, an operator's first and smallest."""
    found = []
    for op in ops:
        cases = [case for make in OPERATORS[op] for case in make(device) if only in case.name]
        if quick and len(cases) > 1:
            cases = [cases[0], min(cases[1:], key=lambda case: case.counted_bytes)]
        found += cases
    return found
