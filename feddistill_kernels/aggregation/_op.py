"""``feddistill::aggregate_topk``: schema, shapes for the compiler.  No arithmetic, no gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from feddistill_kernels._backend import load, operator
from feddistill_kernels.aggregation._rules import Settings


@operator(
    "feddistill::aggregate_topk",
    "(Tensor[] ids, Tensor[] log_probs, Tensor[] missing, int vocab, Tensor? weights, int k, str rule, "
    "int trim, int keep, int byzantine, float tolerance, int max_iterations, int? mix, str backend) "
    "-> (Tensor, Tensor, Tensor)",
)
def aggregate(
    ids: Sequence[Tensor],
    log_probs: Sequence[Tensor],
    missing: Sequence[Tensor],
    vocab: int,
    weights: Tensor | None,
    k: int,
    rule: str,
    trim: int,
    keep: int,
    byzantine: int,
    tolerance: float,
    max_iterations: int,
    mix: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids ``[N, k]``, log-probabilities ``[N, k]``, log of the tail's mass ``[N]``."""
    widest = next((x for x in log_probs if x.dtype == torch.float64), log_probs[0])
    settings = Settings(rule, trim, keep, byzantine, tolerance, max_iterations, mix)
    entries = sum(i.shape[1] for i in ids)
    result: tuple[Tensor, Tensor, Tensor] = load(
        "aggregation", backend, widest, clients=len(ids), entries=entries
    ).aggregate(ids, log_probs, missing, vocab, weights, k, settings)
    return result


@aggregate.register_fake
def _(
    ids: Sequence[Tensor],
    log_probs: Sequence[Tensor],
    missing: Sequence[Tensor],
    vocab: int,
    weights: Tensor | None,
    k: int,
    rule: str,
    trim: int,
    keep: int,
    byzantine: int,
    tolerance: float,
    max_iterations: int,
    mix: int | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    n = ids[0].shape[0]
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in log_probs) else torch.float32
    return (
        ids[0].new_empty((n, k), dtype=torch.int32),
        ids[0].new_empty((n, k), dtype=dtype),
        ids[0].new_empty(n, dtype=dtype),
    )
