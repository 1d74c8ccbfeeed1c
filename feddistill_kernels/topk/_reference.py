"""Top-k of a softmax as it reads on paper."""

import math

import torch
from torch import Tensor

from feddistill_kernels._check import rows_with_a_choice

CHUNK = 1 << 22
"""Entries worked on at once."""


def compress(logits: Tensor, k: int, temperature: float, id_order: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Ids ``[N, k]``, their log-probabilities, and the log of the others' mass ``[N]``."""
    n, vocab = logits.shape
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    ids = torch.empty((n, k), dtype=torch.int32, device=logits.device)
    log_probs = torch.empty((n, k), dtype=dtype, device=logits.device)
    log_tail = torch.empty(n, dtype=dtype, device=logits.device)
    step = max(1, CHUNK // max(1, vocab))
    for start in range(0, n, step):
        part = slice(start, start + step)
        z = logits[part].to(dtype) / temperature
        rows_with_a_choice("logits", z, start=start)
        a = z.log_softmax(-1)
        # By the logits: two that differ may round to one log-probability.
        kept = largest(logits[part], k)
        if not id_order:
            order = logits[part].gather(-1, kept).sort(dim=-1, descending=True, stable=True).indices
            kept = kept.gather(-1, order)
        ids[part] = kept.to(torch.int32)
        log_probs[part] = a.gather(-1, kept)
        log_tail[part] = a.scatter_(-1, kept, -math.inf).logsumexp(-1)
    return ids, log_probs, log_tail


def largest(x: Tensor, k: int) -> Tensor:
    """Ascending positions ``[N, k]`` of the ``k`` largest of each row; of equal ones the first.

    ``torch.topk`` alone leaves open which of equal ones it takes.
    """
    width = x.shape[1]
    least = x.topk(k, dim=-1).values[:, -1:]
    first_better = torch.arange(width, 0, -1, dtype=torch.int32, device=x.device)  # [V], all > 0
    rank = torch.where(x > least, first_better + width, torch.where(x == least, first_better, 0))
    return rank.topk(k, dim=-1).indices.sort(-1).values
