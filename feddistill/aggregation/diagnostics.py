"""What the server can tell of a round without anybody's private data."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from feddistill.aggregation.answers import AnswerReader, AnswerSet, answered, at_labels, first_choice
from feddistill.types import UNLABELLED
from feddistill_kernels import TopK

COLLAPSED = 1.5
"""A client that uses fewer effective classes than this, and than half of the teacher's, has collapsed."""

NONE = -2
"""The first choice of who has no opinion."""

SKETCH = 256
"""Rows on which clients are compared with each other."""

ALIKE = 0.05
"""Two clients nearer to each other than this share of the median pair sent the same answers."""


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """What a round looked like from the server."""

    teacher_accuracy: float | None
    """On the labelled proxy texts; ``None`` where there are none. A rule that ``needs`` labels has read them:
    of such a rule it says how well these are matched, not how good the teacher is elsewhere."""
    teacher_cross_entropy: float | None
    """Mean nats of the true label on those."""
    agreement: dict[str, float]
    """Share of texts on which a client's first choice is the teacher's."""
    weights: dict[str, float]
    """Each client's mean share in the teacher; equal where the rule has no weights."""
    effective_classes: dict[str, float]
    """``exp(entropy)`` of a client's mean answer: how many classes it uses."""
    collapsed: tuple[str, ...]
    """Clients that answer nearly the same to everything."""
    duplicates: tuple[tuple[str, str], ...]
    """Pairs whose answers are nearly those of each other: one may be a free rider."""
    mass: float | None
    """Mean of the rule's probabilities summed before renormalising; far below 1 is no consensus. ``None``
    where no row was answered by everybody."""
    answered: dict[str, float]
    """Share of the rows on which a client has an opinion."""


def diagnose(
    names: Sequence[str],
    clients: Sequence[AnswerReader],
    teacher: AnswerReader,
    labels: Tensor,
    mass: float,
    weights: Sequence[float],
) -> Diagnostics:
    """Compare every client with the teacher, and the teacher with ``labels [N]`` where they are known."""
    positions = len(labels)
    reader, itself = AnswerSet(clients, positions), AnswerSet([teacher], positions)
    choice, truths = _choices(itself, labels)
    known = (labels != UNLABELLED) & (choice != NONE)
    whole = _effective(_marginal(itself, 0))
    agreement, effective, said = {}, {}, {}
    for index, name in enumerate(names):
        same = rows = 0
        for part in reader.parts(reader.shape()[1]):
            answer = reader.read(clients[index], *part)
            there = answered(answer)
            rows += int(there.sum())
            same += int((first_choice(answer) == choice[slice(*part)])[there].sum())
        agreement[name] = round(same / max(rows, 1), 6)
        said[name] = round(rows / positions, 6)
        effective[name] = round(_effective(_marginal(reader, index)), 6)
    right = truth = None
    if known.any():
        right = float((choice[known] == labels[known]).float().mean())
        truth = round(-float(truths.double().numpy().mean()), 6)
    return Diagnostics(
        teacher_accuracy=right,
        teacher_cross_entropy=truth,
        agreement=agreement,
        weights=dict(zip(names, weights, strict=True)),
        effective_classes=effective,
        collapsed=tuple(name for name, n in effective.items() if n < min(COLLAPSED, 0.5 * whole)),
        duplicates=tuple((names[i], names[j]) for i, j in _alike(reader)),
        mass=None if math.isnan(mass) else round(mass, 6),
        answered=said,
    )


def _choices(reader: AnswerSet, labels: Tensor) -> tuple[Tensor, Tensor]:
    """``[N]`` first choices, ``NONE`` without an opinion, and log-probabilities of the known labels."""
    choices, truths = [], []
    for start, stop in reader.parts(reader.shape()[1]):
        rows = reader.read(reader.clients[0], start, stop)
        there = answered(rows)
        known = (labels[start:stop] != UNLABELLED) & there
        choices.append(torch.where(there, first_choice(rows), NONE))
        truths.append(at_labels(rows[known], labels[start:stop][known]))
    return torch.cat(choices), torch.cat(truths)


def _marginal(reader: AnswerSet, client: int) -> Tensor:
    """``[V]``, float64: the mean answer."""
    _, kept, vocab, _ = reader.shape()
    total, rows = torch.zeros(vocab, dtype=torch.float64), 0
    for start, stop in reader.parts(kept):
        answer = reader.read(reader.clients[client], start, stop)
        rows += int(answered(answer).sum())
        if isinstance(answer, TopK):
            answer = answer[answered(answer)]
        else:
            total += answer.double().exp().sum(0)
            continue
        share = answer.missing_log_prob().double().exp()
        # What is kept replaces its share of the tail.
        more = answer.log_probs.double().exp() - share[:, None]
        total += share.sum()
        total += torch.bincount(answer.ids.flatten(), more.flatten(), minlength=vocab)
    return total / max(rows, 1)


def _effective(marginal: Tensor) -> float:
    return float(torch.special.entr(marginal.clamp_min(0)).sum().exp())


def _alike(reader: AnswerSet) -> list[tuple[int, int]]:
    """Pairs of clients by their total variation on some rows, evenly spread."""
    count = len(reader.clients)
    apart = torch.zeros(count, count, dtype=torch.float64)
    for part in reader.sample(SKETCH):
        for block in reader.common(*part):
            mass = block.log_mass(block.x).exp()
            for i, each in enumerate(mass):
                apart[i] += (mass - each).abs().sum(-1).double().sum(1)
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    if not pairs or not apart.any():
        return []
    limit = ALIKE * float(np.median([float(apart[pair]) for pair in pairs]))
    return [pair for pair in pairs if float(apart[pair]) <= limit]
