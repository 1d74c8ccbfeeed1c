"""``feddistill::aggregate_topk``: schema, shapes for the compiler.  No arithmetic, no gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from feddistill_kernels._backend import load, operator


@operator(
    "feddistill::aggregate_topk",
    "(Tensor[] ids, Tensor[] log_probs, Tensor[] missing, int vocab, str rule, Tensor? weights, "
    "int trim, int k, str backend) -> (Tensor, Tensor, Tensor)",
)
def aggregate(
    ids: Sequence[Tensor],
    log_probs: Sequence[Tensor],
    missing: Sequence[Tensor],
    vocab: int,
    rule: str,
    weights: Tensor | None,
    trim: int,
    k: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids ``[N, k]``, log-probabilities ``[N, k]``, log of the tail's mass ``[N]``."""
    module = load("aggregation", backend, log_probs[0])
    result: tuple[Tensor, Tensor, Tensor] = module.aggregate(
        ids, log_probs, missing, vocab, rule, weights, trim, k
    )
    return result


@aggregate.register_fake
def _(
    ids: Sequence[Tensor],
    log_probs: Sequence[Tensor],
    missing: Sequence[Tensor],
    vocab: int,
    rule: str,
    weights: Tensor | None,
    trim: int,
    k: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    n = ids[0].shape[0]
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in log_probs) else torch.float32
    return (
        ids[0].new_empty((n, k), dtype=torch.int32),
        ids[0].new_empty((n, k), dtype=dtype),
        ids[0].new_empty(n, dtype=dtype),
    )
