"""``feddistill::topk_compress``: schema, shapes for the compiler.  No arithmetic, no gradient."""

import torch
from torch import Tensor

from feddistill_kernels._backend import load, operator


@operator("feddistill::topk_compress")
def compress(
    logits: Tensor, k: int, temperature: float, id_order: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids ``[N, k]``, log-probabilities ``[N, k]``, log of the tail's mass ``[N]``."""
    result: tuple[Tensor, Tensor, Tensor] = load("topk", backend, logits, k=k).compress(
        logits, k, temperature, id_order
    )
    return result


@compress.register_fake
def _(
    logits: Tensor, k: int, temperature: float, id_order: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    n = logits.shape[0]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return (
        logits.new_empty((n, k), dtype=torch.int32),
        logits.new_empty((n, k), dtype=dtype),
        logits.new_empty(n, dtype=dtype),
    )
