"""Make one teacher of the clients' answers, chunk by chunk of the proxy set; say how well they agree.

Shapes: ``C`` clients, ``N`` proxy texts, ``V`` classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from feddistill.rules import Rule, WeightKind
from feddistill.types import UNLABELLED, ClientDescription

CHUNK = 65_536
"""Rows aggregated at once: memory is ``C * CHUNK * V`` floats, whatever ``N`` is."""

COLLAPSED = 1.5
"""A client that uses fewer effective classes than this, and than half of the teacher's, has collapsed."""

Answerer = Callable[[int, int], Tensor]
"""``(start, stop)`` to that client's log-probabilities ``[stop - start, V]``."""


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """What the server can tell of a round without anybody's private data."""

    teacher_accuracy: float | None
    """On the labelled proxy texts; ``None`` where there are none."""
    agreement: dict[str, float]
    """Share of texts on which a client's first choice is the teacher's."""
    effective_classes: dict[str, float]
    """``exp(entropy)`` of a client's mean answer: how many classes it uses."""
    collapsed: tuple[str, ...]
    """Clients that answer nearly the same to everything."""
    mass: float
    """Mean of the rule's probabilities summed before renormalising; far from 1 is no consensus."""


def client_weights(
    kind: WeightKind, descriptions: Sequence[ClientDescription], classes: int
) -> Tensor | None:
    """``None`` for equal weights, ``[C]`` by size, ``[C, V]`` by class counts.

    With class counts, client ``k`` speaks for class ``c`` in proportion to ``n_kc / sum_j n_jc``; for a
    class that nobody reports, all speak alike.
    """
    if kind == "uniform":
        return None
    if kind == "size":
        return torch.tensor([float(d.examples or 0) for d in descriptions])
    counts = torch.tensor([d.class_counts for d in descriptions], dtype=torch.float64)
    assert counts.shape == (len(descriptions), classes), "a count for each client and class"
    return torch.where(counts.sum(0) > 0, counts, 1.0).float()


def aggregate(
    clients: Sequence[Answerer],
    positions: int,
    rule: Rule,
    weights: Tensor | None,
    sharpen: float = 1.0,
) -> tuple[Tensor, float]:
    """The teacher, ``[N, V]`` log-probabilities, and the mean mass before renormalising.

    Args:
        clients: For each client, how to get a chunk of its answers.
        positions: ``N``.
        rule: The formula.
        weights: Of ``client_weights``.
        sharpen: ``q ~ q**sharpen`` afterwards (enhanced ERA).
    """
    parts, mass = [], 0.0
    for start in range(0, positions, CHUNK):
        stop = min(start + CHUNK, positions)
        combined = rule([client(start, stop) for client in clients], weights)
        total = combined.logsumexp(-1, keepdim=True)
        mass += float(total.exp().sum())
        parts.append((sharpen * (combined - total)).log_softmax(-1))
    return torch.cat(parts), mass / positions


def diagnose(
    names: Sequence[str], clients: Sequence[Answerer], teacher: Tensor, labels: Tensor, mass: float
) -> Diagnostics:
    """Compare every client with the teacher, and the teacher with ``labels [N]`` where they are known."""
    choice = teacher.argmax(-1)
    known = labels != UNLABELLED
    whole = float(torch.special.entr(teacher.exp().mean(0)).sum().exp())
    agreement, effective = {}, {}
    for name, client in zip(names, clients, strict=True):
        answers = client(0, len(teacher))
        agreement[name] = round(float((answers.argmax(-1) == choice).float().mean()), 6)
        marginal = answers.exp().mean(0)
        effective[name] = round(float(torch.special.entr(marginal).sum().exp()), 6)
    return Diagnostics(
        teacher_accuracy=float((choice[known] == labels[known]).float().mean()) if known.any() else None,
        agreement=agreement,
        effective_classes=effective,
        collapsed=tuple(name for name, n in effective.items() if n < min(COLLAPSED, 0.5 * whole)),
        mass=round(mass, 6),
    )
