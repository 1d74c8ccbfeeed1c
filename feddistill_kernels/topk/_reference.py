"""Top-k of a softmax as it reads on paper."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from feddistill_kernels._check import NO_ID, rows_with_a_choice

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


def union(ids: Sequence[Tensor], width: int) -> Tensor:
    """Ascending ids ``[n, W]``: all of ``ids``, tensors ``[n, any]``, and the lowest of the others.

    ``NO_ID`` is none of them.  At most W ids are distinct, so enough of 0..W-1 are others.
    """
    n, device = ids[0].shape[0], ids[0].device
    kept = torch.cat([i.long() for i in ids], dim=-1)
    fill = torch.arange(width, device=device).expand(n, width)
    candidates, order = torch.cat([kept, fill], dim=-1).sort(dim=-1, stable=True)
    is_first = torch.ones_like(candidates, dtype=torch.bool)
    is_first[:, 1:] = candidates[:, 1:] != candidates[:, :-1]
    is_first &= candidates != NO_ID
    is_fill = order >= kept.shape[1]
    # A stable sort puts a kept id before the same id as a filler, and keeps ids ascending below.
    urgency = torch.where(is_first, is_fill.to(torch.uint8), 2)
    chosen = urgency.sort(dim=-1, stable=True).indices[:, :width]
    return candidates.gather(-1, chosen).sort(-1).values
