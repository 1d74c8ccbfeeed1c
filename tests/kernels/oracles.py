"""Textbook formulas in float64, differentiated by autograd.  Imports nothing from the package."""

import math

import torch
from torch import Tensor


def divergence(student: Tensor, teacher: Tensor, kind: str, beta: float, temperature: float) -> Tensor:
    """Between the softmaxes of two tensors of logits."""
    vocab = teacher.shape[1]
    a = (student.double()[:, :vocab] / temperature).log_softmax(-1)
    return between(a, (teacher.double() / temperature).log_softmax(-1), kind, beta)


def truncated(
    student: Tensor,
    ids: Tensor,
    log_probs: Tensor,
    log_tail: Tensor,
    vocab: int,
    kind: str,
    beta: float,
    temperature: float,
) -> Tensor:
    """Over the kept ids and one event that is all others; rounded log-probabilities made to add to 1."""
    a = (student.double()[:, :vocab] / temperature).log_softmax(-1)
    kept = torch.zeros_like(a, dtype=torch.bool).scatter_(-1, ids.long(), True)
    tail = a.masked_fill(kept, -math.inf)
    log_rest = torch.stack([row[row > -math.inf].logsumexp(-1) for row in tail])
    events = torch.cat([a.gather(-1, ids.long()), log_rest[:, None]], dim=-1)
    given = torch.cat([log_probs, log_tail[:, None]], dim=-1).double()
    return between(events, given.log_softmax(-1), kind, beta)


def between(a: Tensor, b: Tensor, kind: str, beta: float) -> Tensor:
    match kind:
        case "forward_kl":
            return _kl(b, a)
        case "reverse_kl":
            return _kl(a, b)
        case "jsd":
            if beta in (0, 1):
                return _kl(a, b) if beta else _kl(b, a)
            m = _mixture(b, a, beta)
            return beta * _kl(b, m) + (1 - beta) * _kl(a, m)
        case "tvd":
            return (a.exp() - b.exp()).abs().sum(-1) / 2
        case "skew_forward_kl":
            return _kl(b, _mixture(b, a, 0.1))
        case "skew_reverse_kl":
            return _kl(a, _mixture(a, b, 0.1))
    raise NotImplementedError(f"write the textbook formula of {kind!r} here")


def distillation(
    student: Tensor,
    divergence: Tensor,
    labels: Tensor | None,
    weight: Tensor,
    kd_weight: float,
    temperature: float,
    reduction: str,
) -> Tensor:
    """The loss made of a divergence of each row; ``weight`` is 0 for a masked row."""
    rows = kd_weight * temperature**2 * divergence if kd_weight else torch.zeros_like(divergence)
    if labels is not None:
        ce = torch.nn.functional.cross_entropy(student.double(), labels.clamp_min(0), reduction="none")
        rows = rows + (1 - kd_weight) * ce
    rows = torch.where(weight != 0, weight * rows, 0.0)
    return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / weight.sum()}[reduction]


def trimmed_mean(stacked: Tensor, trim: int) -> Tensor:
    """By sorting ``[C, ...]``."""
    ordered = stacked.double().sort(0).values
    return ordered[trim : len(stacked) - trim].mean(0)


def mean_around_median(stacked: Tensor, keep: int) -> Tensor:
    columns = stacked.double().flatten(1).T.tolist()
    means = []
    for column in columns:
        ordered = sorted(column)
        middle = (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2
        nearest = sorted(ordered, key=lambda x: abs(x - middle))[:keep]
        means.append(sum(nearest) / keep)
    return torch.tensor(means, dtype=torch.float64).reshape(stacked.shape[1:])


def geometric_median(stacked: Tensor, steps: int = 2000) -> Tensor:
    """Of the centred rows of ``[C, N, V]``, by Weiszfeld's iteration on vectors."""
    points = stacked.double().cpu()  # a GPU would wait for the host at each of many small steps
    points = points - points.mean(-1, keepdim=True)
    z = points.median(0).values
    for _ in range(steps):
        before, weights = z, 1 / (points - z).norm(dim=-1, keepdim=True).clamp_min(1e-12)
        z = (weights * points).sum(0) / weights.sum(0)
        if (z - before).abs().amax() <= 1e-13 * points.abs().amax():
            break
    return z.to(stacked.device)


def squared_distance(x: Tensor, y: Tensor) -> float:
    """Of two tensors' centred rows."""
    x, y = (t.double() - t.double().mean(-1, keepdim=True) for t in (x, y))
    return float(((x - y) ** 2).sum())


def krum(xs: list[Tensor], byzantine: int, keep: int) -> Tensor:
    scores = []
    for i, x in enumerate(xs):
        others = sorted(squared_distance(x, y) for j, y in enumerate(xs) if j != i)
        scores.append(sum(others[: len(xs) - byzantine - 2]))
    best = sorted(range(len(xs)), key=lambda i: (scores[i], i))[:keep]
    return torch.stack([xs[i].double() for i in best]).mean(0)


def nearest_neighbour_mixing(xs: list[Tensor], byzantine: int) -> list[Tensor]:
    mixed = []
    for x in xs:
        nearest = sorted(xs, key=lambda y: squared_distance(x, y))[: len(xs) - byzantine]
        mixed.append(torch.stack([y.double() for y in nearest]).mean(0))
    return mixed


def aggregate(
    stacked: Tensor,
    rule: str,
    *,
    weights: Tensor | None = None,
    trim: int = 0,
    keep: int = 1,
    byzantine: int = 0,
    mix: int | None = None,
) -> Tensor:
    """The rule on dense log-probabilities ``[C, N, V]``, renormalised."""
    x, count = stacked.double(), len(stacked)
    if mix is not None:
        x = mixed_answers(x, mix).log_softmax(-1)
    weights = torch.ones(count) if weights is None else weights
    shares = (weights.double() / weights.double().sum(0)).reshape(count, -1, 1)
    match rule:
        case "mean_probs":
            combined = (shares * x.exp()).sum(0).log()
        case "mean_logits":
            combined = (shares * x).sum(0)
        case "median":
            combined = trimmed_mean(x, (count - 1) // 2)
        case "trimmed_mean":
            combined = trimmed_mean(x, trim)
        case "mean_around_median":
            combined = mean_around_median(x, keep)
        case "geometric_median":
            combined = torch.empty_like(x[0])
            for n in range(x.shape[1]):
                combined[n] = 2 * hellinger_median(x[:, n].exp().sqrt()).log()
        case "krum":
            combined = x[krum_order(x, byzantine)[:keep]].mean(0)
        case _:
            raise NotImplementedError(f"write the textbook formula of {rule!r} here")
    return combined.log_softmax(-1)


def hellinger_median(
    points: Tensor, smoothing: float = 1e-4, steps: int = 64, tolerance: float = 1e-6
) -> Tensor:
    """Weiszfeld's steps on ``[C, V]``."""
    weights = torch.full((len(points),), 1 / len(points), dtype=torch.float64)
    for _ in range(steps):
        before, middle = weights, weights @ points
        pull = 1 / (points - middle).norm(dim=-1).clamp_min(smoothing)
        weights = pull / pull.sum()
        if (weights - before).abs().max() <= tolerance:
            break
    return weights @ points


def distances(stacked: Tensor) -> Tensor:
    """Squared ones ``[C, C]`` between rows centred over V; ``inf`` where another id is ruled out."""
    apart = torch.zeros(len(stacked), len(stacked), dtype=torch.float64)
    for i, x in enumerate(stacked.double()):
        for j, y in enumerate(stacked.double()):
            for one, other in zip(x, y, strict=True):
                allowed = one > -math.inf
                if torch.equal(allowed, other > -math.inf):
                    gap = (one - other)[allowed]
                    apart[i, j] += (gap - gap.mean()).square().sum()
                else:
                    apart[i, j] = math.inf
    return apart


def krum_order(stacked: Tensor, byzantine: int) -> list[int]:
    """Clients, the best first."""
    scores = []
    for client, row in enumerate(distances(stacked).tolist()):
        others = sorted(d for other, d in enumerate(row) if other != client)
        scores.append((sum(others[: len(stacked) - byzantine - 2]), client))
    return [client for _, client in sorted(scores)]


def mixed_answers(stacked: Tensor, byzantine: int) -> Tensor:
    """Each client the mean of its nearest, itself one of them."""
    mixed = []
    for row in distances(stacked).tolist():
        nearest = sorted(range(len(row)), key=lambda other: (row[other], other))
        mixed.append(stacked[nearest[: len(row) - byzantine]].double().mean(0))
    return torch.stack(mixed)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) of log-probabilities; 0 log 0 is 0."""
    possible = p > -math.inf
    return torch.where(possible, p.exp() * (torch.where(possible, p, 0.0) - q), 0.0).sum(-1)


def _mixture(a: Tensor, b: Tensor, share: float) -> Tensor:
    return (share * a.exp() + (1 - share) * b.exp()).log()
