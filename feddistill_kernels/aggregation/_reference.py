"""Aggregation of compressed answers as it reads on paper.

``W = min(sum of K, V)`` ids a row are enough: the ids that somebody kept, filled up with others.  All others
have one value, the rule's on the clients' tail values, so they are one more column: ``W + 1`` in all.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from feddistill_kernels._check import rows_with_a_choice
from feddistill_kernels.order_statistics._reference import trimmed
from feddistill_kernels.topk._reference import largest

CHUNK = 1 << 22
"""Numbers worked on at once."""


def aggregate(
    ids: Sequence[Tensor],
    log_probs: Sequence[Tensor],
    missing: Sequence[Tensor],
    vocab: int,
    rule: str,
    weights: Tensor | None,
    trim: int,
    k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, log-probabilities and log tail mass; ``missing[c] [N]`` stands for ids not in ``ids[c]``."""
    n, device = ids[0].shape[0], ids[0].device
    width = min(sum(i.shape[1] for i in ids), vocab)
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in log_probs) else torch.float32
    out_ids = torch.empty((n, k), dtype=torch.int32, device=device)
    out_log_probs = torch.empty((n, k), dtype=dtype, device=device)
    out_log_tail = torch.empty(n, dtype=dtype, device=device)
    step = max(1, CHUNK // (width * len(ids)))
    for start in range(0, n, step):
        part = slice(start, start + step)
        union = _union([i[part] for i in ids], width)  # [n, W] int64
        xs = [
            _look_up(union, i[part].long(), x[part].to(dtype), m[part, None].to(dtype))
            for i, x, m in zip(ids, log_probs, missing, strict=True)
        ]
        w = None if weights is None else weights if weights.dim() == 1 else weights[:, part]
        y = _combine(xs, rule, w, trim)  # [n, W + 1]
        y[:, -1] += math.log(vocab - width) if vocab > width else -math.inf
        rows_with_a_choice("the aggregate's", y, start=start)
        y = y.log_softmax(-1)
        kept = largest(y[:, :-1], k)
        out_ids[part] = union.gather(-1, kept).to(torch.int32)
        out_log_probs[part] = y.gather(-1, kept)
        out_log_tail[part] = y.scatter_(-1, kept, -math.inf).logsumexp(-1)
    return out_ids, out_log_probs, out_log_tail


def _union(ids: Sequence[Tensor], width: int) -> Tensor:
    """Ascending ids ``[n, W]``: all that are kept, and the lowest of the others.

    At most W ids are kept, so enough of 0..W-1 are not.
    """
    n, device = ids[0].shape[0], ids[0].device
    kept = torch.cat([i.long() for i in ids], dim=-1)
    fill = torch.arange(width, device=device).expand(n, width)
    candidates, order = torch.cat([kept, fill], dim=-1).sort(dim=-1, stable=True)
    is_first = torch.ones_like(candidates, dtype=torch.bool)
    is_first[:, 1:] = candidates[:, 1:] != candidates[:, :-1]
    is_fill = order >= kept.shape[1]
    # A stable sort puts a kept id before the same id as a filler, and keeps ids ascending below.
    urgency = torch.where(is_first, is_fill.to(torch.uint8), 2)
    chosen = urgency.sort(dim=-1, stable=True).indices[:, :width]
    return candidates.gather(-1, chosen).sort(-1).values


def _look_up(wanted: Tensor, ids: Tensor, log_probs: Tensor, missing: Tensor) -> Tensor:
    """One client's log-probabilities at ``wanted [n, W]``, and in column W that of an id nobody kept."""
    ids, order = ids.sort(-1)
    log_probs = log_probs.gather(-1, order)
    at = torch.searchsorted(ids, wanted).clamp_(max=ids.shape[1] - 1)
    values = torch.where(ids.gather(-1, at) == wanted, log_probs.gather(-1, at), missing)
    return torch.cat([values, missing], dim=-1)


def _combine(xs: list[Tensor], rule: str, weights: Tensor | None, trim: int) -> Tensor:
    """The rule on dense log-probabilities, ``C`` tensors ``[n, W]``; not renormalised."""
    if rule in ("median", "trimmed_mean"):
        return trimmed(xs, trim)
    stacked = torch.stack(xs)  # [C, n, W]
    if weights is None:
        weights = stacked.new_ones(len(xs))
    shares = (weights / weights.sum(0)).to(stacked.dtype)
    shares = shares[:, None, None] if shares.dim() == 1 else shares[:, :, None]
    if rule == "mean_probs":
        return (stacked + shares.log()).logsumexp(0)
    assert rule == "mean_logits", rule
    # A client of weight 0 has no veto, though 0 * -inf is NaN.
    return torch.where(shares == 0, 0.0, shares * stacked).sum(0)
