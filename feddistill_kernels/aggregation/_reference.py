"""Aggregation of compressed answers as it reads on paper.

``W = min(sum of K, V)`` ids a row are enough: the ids that a client kept, filled up with others.  All others
have one value, the rule's on the clients' tail values, so they are one more column, which stands for
``V - W`` ids: ``W + 1`` in all.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from feddistill_kernels._check import distinct_ids, rows_with_a_choice
from feddistill_kernels.aggregation._rules import Settings
from feddistill_kernels.order_statistics._reference import around_median, trimmed
from feddistill_kernels.topk._reference import largest, union

CHUNK = 1 << 22
"""Numbers worked on at once."""

SMOOTHING = 1e-4
"""Distance below which Weiszfeld's steps see no difference; what keeps 1 / distance finite."""


def aggregate(
    ids: Sequence[Tensor],
    log_probs: Sequence[Tensor],
    missing: Sequence[Tensor],
    vocab: int,
    weights: Tensor | None,
    k: int,
    settings: Settings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, log-probabilities and log tail mass; ``missing[c] [N]`` stands for ids not in ``ids[c]``."""
    n, device = ids[0].shape[0], ids[0].device
    width = min(sum(i.shape[1] for i in ids), vocab)
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in log_probs) else torch.float32
    answers = partial(_answers, ids, log_probs, missing, vocab, width, dtype)
    mixing = None
    if settings.mix is not None:
        mixing = mixing_weights(_distances(answers(), vocab - width, len(ids)), settings.mix)
    if settings.rule == "krum":
        distances = _distances(answers(mixing), vocab - width, len(ids))
        weights = krum_weights(distances, settings.byzantine, settings.keep)
    out_ids = torch.empty((n, k), dtype=torch.int32, device=device)
    out_log_probs = torch.empty((n, k), dtype=dtype, device=device)
    out_log_tail = torch.empty(n, dtype=dtype, device=device)
    for part, union_ids, x in answers(mixing):
        w = None if weights is None else weights if weights.dim() == 1 else weights[:, part]
        y = _with_mass(_combine(x, vocab - width, settings, w), vocab - width)  # [n, W + 1]
        rows_with_a_choice("the aggregate's", y, start=part.start)
        y = y.log_softmax(-1)
        kept = largest(y[:, :-1], k)
        out_ids[part] = union_ids.gather(-1, kept).to(torch.int32)
        out_log_probs[part] = y.gather(-1, kept)
        out_log_tail[part] = y.scatter_(-1, kept, -math.inf).logsumexp(-1)
    return out_ids, out_log_probs, out_log_tail


def krum_weights(distances: Tensor, byzantine: int, keep: int) -> Tensor:
    """Equal weights ``[C]`` for the ``keep`` clients of least score, 0 for the others; ties to the first.

    A score is the sum of the ``C - byzantine - 2`` least squared distances ``[C, C]`` to others.
    """
    count = len(distances)
    others = distances.clone().fill_diagonal_(math.inf).sort(-1).values
    scores = others[:, : count - byzantine - 2].sum(-1)
    chosen = scores.sort(stable=True).indices[:keep]
    return torch.zeros_like(scores).index_fill_(0, chosen, 1 / keep)


def mixing_weights(distances: Tensor, byzantine: int) -> Tensor:
    """``[C, C]``: row c has equal weights for the ``C - byzantine`` clients nearest to c, itself one."""
    near = len(distances) - byzantine
    nearest = distances.sort(dim=-1, stable=True).indices[:, :near]
    return torch.zeros_like(distances).scatter_(-1, nearest, 1 / near)


def weiszfeld(gram: Tensor, tolerance: float, max_iterations: int) -> Tensor:
    """Weights ``[..., C]``, of sum 1, that make the geometric median of C points.

    ``gram [..., C, C]``, float64, only gives distances: with weights of sum 1, ``-1/2`` times the points'
    squared distances do as well.
    """
    a = torch.full_like(gram[..., 0], 1 / gram.shape[-1])
    moving = torch.ones_like(a[..., :1], dtype=torch.bool)
    for _ in range(max_iterations):
        inner = (gram @ a[..., None])[..., 0]
        squared = gram.diagonal(dim1=-2, dim2=-1) - 2 * inner + (a * inner).sum(-1, keepdim=True)
        pull = 1 / squared.clamp_min(SMOOTHING**2).sqrt()
        step = torch.where(moving, pull / pull.sum(-1, keepdim=True), a)
        moving = (step - a).abs().amax(-1, keepdim=True) > tolerance
        a = step
        if a.device.type == "cpu" and not moving.any():  # elsewhere looking would be a host sync
            break
    return a


def _answers(
    ids: Sequence[Tensor],
    log_probs: Sequence[Tensor],
    missing: Sequence[Tensor],
    vocab: int,
    width: int,
    dtype: torch.dtype,
    mixing: Tensor | None = None,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Rows, their ids ``[n, W]`` and the clients' log-probabilities ``[C, n, W + 1]``, chunk by chunk."""
    step = max(1, CHUNK // (width * len(ids)))
    for start in range(0, ids[0].shape[0], step):
        part = slice(start, start + step)
        for client, kept in enumerate(ids):
            distinct_ids(f"clients[{client}]", kept[part], vocab, start=start)
        wanted = union([i[part] for i in ids], width)
        x = torch.stack(
            [
                _look_up(wanted, i[part].long(), x[part].to(dtype), m[part, None].to(dtype))
                for i, x, m in zip(ids, log_probs, missing, strict=True)
            ]
        )
        if mixing is not None:
            x = torch.stack([_mean(x, shares) for shares in mixing.to(dtype)])
            masses = _with_mass(x, vocab - width)
            for each in masses:
                rows_with_a_choice("the aggregate's", each, start=start)
            x = x - masses.logsumexp(-1, keepdim=True)
        yield part, wanted, x


def _look_up(wanted: Tensor, ids: Tensor, log_probs: Tensor, missing: Tensor) -> Tensor:
    """One client's log-probabilities at ``wanted [n, W]``, and in column W that of an id not kept."""
    ids, order = ids.sort(-1)
    log_probs = log_probs.gather(-1, order)
    at = torch.searchsorted(ids, wanted).clamp_(max=ids.shape[1] - 1)
    values = torch.where(ids.gather(-1, at) == wanted, log_probs.gather(-1, at), missing)
    return torch.cat([values, missing], dim=-1)


def _with_mass(x: Tensor, others: int) -> Tensor:
    """``x [..., W + 1]`` where the last column is the log of what ``others`` ids have together."""
    mass = x[..., -1:] + (math.log(others) if others else -math.inf)
    return torch.cat([x[..., :-1], mass], dim=-1)


def _distances(answers: Iterator[tuple[slice, Tensor, Tensor]], others: int, count: int) -> Tensor:
    """Squared distances ``[C, C]``, float64, between centred answers, over all rows."""
    total: Tensor | None = None
    for _, _, x in answers:
        part = _squared_distances(x.double(), others)
        total = part if total is None else total + part
    return torch.zeros(count, count, dtype=torch.float64, device="cpu") if total is None else total


def _squared_distances(x: Tensor, others: int) -> Tensor:
    """The same for ``x [C, n, W + 1]``: ``inf`` between answers that rule different ids out, or have NaN."""
    times = torch.ones_like(x[0, 0])
    times[-1] = others
    allowed = (x != -math.inf) & (times > 0)
    mean = torch.where(allowed, x * times, 0.0).sum(-1) / (allowed * times).sum(-1).clamp_min(1)
    # Once for each id: the last column stands for several.
    centred = torch.where(allowed, (x - mean[..., None]) * times.sqrt(), 0.0).flatten(1)
    distances = torch.stack([(centred - each).square().sum(-1) for each in centred])
    apart = torch.stack([(allowed != each).flatten(1).any(-1) for each in allowed])
    return torch.where(apart | distances.isnan(), math.inf, distances).fill_diagonal_(0.0)


def _combine(x: Tensor, others: int, settings: Settings, weights: Tensor | None) -> Tensor:
    """The rule on ``x [C, n, W + 1]``; not renormalised, and the last column is that of one id."""
    match settings.rule:
        case "median" | "trimmed_mean":
            return trimmed(x.unbind(), settings.trim)
        case "mean_around_median":
            return around_median(x.unbind(), settings.keep)
        case "geometric_median":
            roots = (_with_mass(x.double(), others) / 2).exp().transpose(0, 1)  # [n, C, W + 1]
            shares = weiszfeld(roots @ roots.mT, settings.tolerance, settings.max_iterations)
            return 2 * (x / 2 + shares.T.to(x.dtype).log()[..., None]).logsumexp(0)
    if weights is None:
        weights = x.new_ones(len(x))
    shares = (weights / weights.sum(0)).to(x.dtype)
    if settings.rule == "mean_probs":
        return (x + shares.log().reshape(len(x), -1, 1)).logsumexp(0)
    assert settings.rule in ("mean_logits", "krum"), settings.rule
    return _mean(x, shares)


def _mean(x: Tensor, shares: Tensor) -> Tensor:
    """Mean of ``x [C, n, W]`` with ``shares [C]`` or ``[C, n]``; a client of weight 0 has no veto."""
    shares = shares.reshape(len(x), -1, 1)
    return torch.where(shares == 0, 0.0, shares * x).sum(0)  # without where, 0 * -inf is NaN
