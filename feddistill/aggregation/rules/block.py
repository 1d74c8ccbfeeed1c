"""Some rows of all clients' answers, dense or sparse, in columns common to all clients.

A missing id counts with that client's own tail value. The columns of sparse answers are therefore the union
of the clients' ids and one more for all other ids, which have a single value per client.
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
    """``[C, n, W]``, log-probability of each single id of a column."""
    log_times: Tensor
    """``[n or 1, W]``, log of the number of ids in the column; ``-inf`` for an empty column."""
    ids: Tensor | None = None
    """``[n, W - 1]``, ascending: the ids of all columns but the last; ``None`` if column v is id v."""
    labels: Tensor | None = None
    """``[n]``, true ids; negative if unknown."""
    student: Tensor | None = None
    """``[n, W]``, the previous student's log-probabilities."""
    priors: Tensor | None = None
    """``[C, V]``, class shares of each client's private data; only in dense blocks."""

    def log_mass(self, y: Tensor) -> Tensor:
        """Log-probabilities of whole columns, from those of single ids, ``y [..., n, W]``."""
        return torch.where(self.log_times == -math.inf, -math.inf, y + self.log_times)

    def normalised(self, y: Tensor) -> Tensor:
        """``y [..., n, W]``, renormalised so that each row sums to 1."""
        return y - self.log_mass(y).logsumexp(-1, keepdim=True)

    def column(self, ids: Tensor) -> Tensor:
        """``[n]``: the column of each of ``ids [n]``."""
        if self.ids is None:
            return ids
        at = torch.searchsorted(self.ids, ids[:, None].to(self.ids.dtype))[:, 0]
        inside = at.clamp_max(self.ids.shape[1] - 1)
        found = self.ids.gather(1, inside[:, None])[:, 0] == ids
        return torch.where(found, inside, self.ids.shape[1])

    def mixed(self, shares: Tensor) -> "Block":
        """Replace each client by a mean of clients' log-probabilities with weights ``shares [C, C]``."""
        x = torch.stack([weighted_sum(self.x, row[:, None, None].to(self.x)) for row in shares])
        return replace(self, x=self.normalised(x))


def dense(answers: Sequence[Tensor]) -> Block:
    """The block of dense answers, log-probabilities ``[n, V]``."""
    x = torch.stack(list(answers))
    return Block(x, x.new_zeros(1, x.shape[-1]))


def sparse(answers: Sequence[TopK], student: TopK | None = None) -> Block:
    """The block of compressed answers: the union of each row's ids, and one column for all others."""
    everyone = [*answers, student] if student is not None else list(answers)
    vocab = everyone[0].vocab_size
    # An id of -1, no entry, goes where a row has an empty column, or else to the last.
    given = [torch.where(answer.ids < 0, vocab, answer.ids.long()) for answer in everyone]
    kept = torch.cat(given, -1).sort(-1).values
    first = torch.ones_like(kept, dtype=torch.bool)
    first[:, 1:] = kept[:, 1:] != kept[:, :-1]
    rank = first.cumsum(-1) - 1
    counts = (first & (kept < vocab)).sum(-1, keepdim=True)
    width = int(counts.max()) if len(counts) else 1
    ids = torch.full((len(kept), width + 1), vocab)  # rows with fewer ids end with empty columns
    ids = ids.scatter_(1, rank, kept)[:, :width].contiguous()
    log_times = torch.where(ids == vocab, -math.inf, 0.0)
    log_times = torch.cat([log_times, (vocab - counts).float().log()], -1)
    rows = []
    for answer, own_ids in zip(everyone, given, strict=True):
        missing = answer.missing_log_prob()[:, None]
        log_probs = torch.where(own_ids < vocab, answer.log_probs, missing)
        rows.append(missing.repeat(1, width + 1).scatter_(1, torch.searchsorted(ids, own_ids), log_probs))
    own = rows.pop() if student is not None else None
    return Block(torch.stack(rows), log_times, ids, student=own)


def weighted_sum(x: Tensor, shares: Tensor) -> Tensor:
    """``sum_c shares_c x_c`` over the first dimension; a client with share 0 has no veto."""
    return torch.where(shares == 0, 0.0, shares * x).sum(0)  # without where, 0 * -inf is NaN


def squared_distances(blocks: Iterable[Block]) -> Tensor:
    """``[C, C]``, float64: Krum's distances between clients, over all rows of centred log-probabilities.

    Clients that exclude different ids (``-inf``), or have NaN, are infinitely far apart.
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
    """``[C, C]``: the Gram matrix of ``points [C, M]``, centred so that close points do not cancel."""
    centred = points - points.mean(0)
    return centred @ centred.T


def gram_distances(gram: Tensor) -> Tensor:
    """Squared distances ``[C, C]`` of points, from their Gram matrix."""
    norms = gram.diagonal()
    return (norms[:, None] + norms[None, :] - 2 * gram).clamp_min(0)


def mixing_shares(distances: Tensor, byzantine: int) -> Tensor:
    """``[C, C]``: row c has equal shares for the ``C - byzantine`` clients nearest to c, which include c.

    Allouah et al., "Fixing by Mixing", AISTATS 2023.
    """
    near = len(distances) - byzantine
    # In float32: sums in another order must not choose other neighbours.
    nearest = distances.float().fill_diagonal_(-1.0).sort(dim=-1, stable=True).indices[:, :near]
    return torch.zeros_like(distances).scatter_(-1, nearest, 1 / near)
