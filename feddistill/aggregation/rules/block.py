"""Some rows of all clients' answers, dense or sparse, in columns that they have in common.

A missing id counts as that client's own tail value, so of sparse answers the union of the clients' ids is
enough: all other ids have one value for each client, and are one more column.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from feddistill_kernels import TopK


@dataclass(frozen=True, slots=True)
class Block:
    """``n`` rows of ``C`` clients in ``W`` columns."""

    x: Tensor
    """``[C, n, W]``, log-probability of one id of the column."""
    log_times: Tensor
    """``[n or 1, W]``, log of how many ids the column stands for; ``-inf`` for a column of none."""
    ids: Tensor | None = None
    """``[n, W - 1]``, ascending, of all columns but the last; ``None`` where column v is id v."""
    labels: Tensor | None = None
    """``[n]``, true ids; negative where not known."""
    student: Tensor | None = None
    """``[n, W]``, what the student said before."""
    priors: Tensor | None = None
    """``[C, V]``, each client's share of each class; only of dense blocks."""

    def log_mass(self, y: Tensor) -> Tensor:
        """Of ``y [..., n, W]``, log-probabilities of single ids: those of whole columns."""
        return torch.where(self.log_times == -math.inf, -math.inf, y + self.log_times)

    def normalised(self, y: Tensor) -> Tensor:
        """``y [..., n, W]`` with rows that sum to 1."""
        return y - self.log_mass(y).logsumexp(-1, keepdim=True)

    def column(self, ids: Tensor) -> Tensor:
        """``[n]``, the columns in which ``ids [n]`` are."""
        if self.ids is None:
            return ids
        at = torch.searchsorted(self.ids, ids[:, None].to(self.ids.dtype))[:, 0]
        inside = at.clamp_max(self.ids.shape[1] - 1)
        found = self.ids.gather(1, inside[:, None])[:, 0] == ids
        return torch.where(found, inside, self.ids.shape[1])

    def mixed(self, shares: Tensor) -> "Block":
        """Each client replaced by the mean of the log-probabilities of others, ``shares [C, C]``."""
        x = torch.stack([weighted_sum(self.x, row[:, None, None].to(self.x)) for row in shares])
        return replace(self, x=self.normalised(x))


def dense(answers: Sequence[Tensor]) -> Block:
    """Of log-probabilities ``[n, V]``."""
    x = torch.stack(list(answers))
    return Block(x, x.new_zeros(1, x.shape[-1]))


def sparse(answers: Sequence[TopK], student: TopK | None = None) -> Block:
    """Of compressed answers: the union of the ids of each row, and one column for all others."""
    everyone = [*answers, student] if student is not None else list(answers)
    vocab = everyone[0].vocab_size
    kept = torch.cat([answer.ids for answer in everyone], -1).long().sort(-1).values
    first = torch.ones_like(kept, dtype=torch.bool)
    first[:, 1:] = kept[:, 1:] != kept[:, :-1]
    rank = first.cumsum(-1) - 1
    counts = rank[:, -1:] + 1
    width = int(counts.max()) if len(counts) else 1
    ids = torch.full((len(kept), width), vocab)  # rows with fewer ids end with columns of none
    ids.scatter_(1, rank, kept)
    log_times = torch.where(ids == vocab, -math.inf, 0.0)
    log_times = torch.cat([log_times, (vocab - counts).float().log()], -1)
    rows = []
    for answer in everyone:
        row = answer.missing_log_prob()[:, None].repeat(1, width + 1)
        rows.append(row.scatter_(1, torch.searchsorted(ids, answer.ids.long()), answer.log_probs))
    own = rows.pop() if student is not None else None
    return Block(torch.stack(rows), log_times, ids, student=own)


def weighted_sum(x: Tensor, shares: Tensor) -> Tensor:
    """``sum_c shares_c x_c`` over the first dimension; a client without a share has no veto."""
    return torch.where(shares == 0, 0.0, shares * x).sum(0)  # without where, 0 * -inf is NaN


def squared_distances(blocks: Iterable[Block]) -> Tensor:
    """``[C, C]``, float64, between answers as in Krum: rows of log-probabilities, centred, all of them.

    Answers that rule different ids out (``-inf``), or have NaN, are infinitely far apart.
    """
    total: Tensor | None = None
    for block in blocks:
        times = block.log_times.double().exp()
        allowed = (block.x > -math.inf) & (times > 0)
        x = torch.where(allowed, block.x.double(), 0.0)
        mean = (x * times).sum(-1) / (allowed * times).sum(-1).clamp_min(1)
        centred = torch.where(allowed, (x - mean[..., None]) * times.sqrt(), 0.0).flatten(1)
        part = gram_distances(inner_products(centred))
        same = allowed.flatten(1)
        apart = torch.stack([(same != each).any(-1) for each in same])
        part = part.masked_fill(apart | part.isnan(), math.inf)
        total = part if total is None else total + part
    assert total is not None, "there are rows"
    return total.fill_diagonal_(0.0)


def inner_products(points: Tensor) -> Tensor:
    """``[C, C]`` of ``points [C, M]`` about their mean: close ones keep their digits."""
    about = points - points.mean(0)
    return about @ about.T


def gram_distances(gram: Tensor) -> Tensor:
    """Squared distances ``[C, C]`` of points by their inner products."""
    norms = gram.diagonal()
    return (norms[:, None] + norms[None, :] - 2 * gram).clamp_min(0)


def mixing_shares(distances: Tensor, byzantine: int) -> Tensor:
    """``[C, C]``: row c has equal shares for the ``C - byzantine`` clients nearest to c, itself the first.

    Allouah et al., "Fixing by Mixing", AISTATS 2023.
    """
    near = len(distances) - byzantine
    # In float32: sums in another order must not choose other neighbours.
    nearest = distances.float().fill_diagonal_(-1.0).sort(dim=-1, stable=True).indices[:, :near]
    return torch.zeros_like(distances).scatter_(-1, nearest, 1 / near)
