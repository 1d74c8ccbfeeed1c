"""Diagnostics of a round that the server can compute without private data."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from feddistill.aggregation.answers import AnswerReader, AnswerSet, answered, first_choice, label_log_probs
from feddistill.types import UNLABELLED
from feddistill_kernels import TopK

COLLAPSED = 1.5
"""A client has collapsed if it uses fewer effective classes than this and than half of the teacher's."""

ABSTAINED = -2
"""Stands for the first choice in a row on which a client abstained."""

SKETCH = 256
"""Rows on which clients are compared in pairs."""

ALIKE = 0.05
"""Two clients sent the same answers if their distance is at most this share of the median distance."""


@dataclass(frozen=True, slots=True)
class Diagnostics:
    """Diagnostics of one round."""

    teacher_accuracy: float | None
    """On the labelled proxy texts; ``None`` if there are none. With a rule that ``needs`` labels it is the
    fit to these labels, not the accuracy on other texts."""
    teacher_cross_entropy: float | None
    """Mean over the same texts, in nats."""
    agreement: dict[str, float]
    """Share of texts on which a client's first choice is the teacher's."""
    weights: dict[str, float]
    """Each client's mean share of the teacher; equal if the rule has no weights."""
    effective_classes: dict[str, float]
    """``exp(entropy)`` of a client's mean answer: the number of classes that it uses."""
    collapsed: tuple[str, ...]
    """Clients that give nearly the same answer to every text."""
    duplicates: tuple[tuple[str, str], ...]
    """Pairs of clients with nearly equal answers: one of them may be a free rider."""
    mass: float | None
    """Mean sum of a row's probabilities before renormalising; far below 1: no consensus. ``None`` if no row
    was answered by all clients."""
    answered: dict[str, float]
    """Share of the rows on which a client did not abstain."""


def diagnose(
    names: Sequence[str],
    clients: Sequence[AnswerReader],
    teacher: AnswerReader,
    labels: Tensor,
    mass: float,
    weights: Sequence[float],
) -> Diagnostics:
    """Compare every client with the teacher, and the teacher with the known ones of ``labels [N]``."""
    positions = len(labels)
    reader, teacher_reader = AnswerSet(clients, positions), AnswerSet([teacher], positions)
    choice, truths = _choices(teacher_reader, labels)
    known = (labels != UNLABELLED) & (choice != ABSTAINED)
    teacher_classes = _effective(_marginal(teacher_reader, 0))
    agreement, effective, shares = {}, {}, {}
    for index, name in enumerate(names):
        same = rows = 0
        for part in reader.parts(reader.shape()[1]):
            answer = reader.read(clients[index], *part)
            has_answer = answered(answer)
            rows += int(has_answer.sum())
            same += int((first_choice(answer) == choice[slice(*part)])[has_answer].sum())
        agreement[name] = round(same / max(rows, 1), 6)
        shares[name] = round(rows / positions, 6)
        effective[name] = round(_effective(_marginal(reader, index)), 6)
    accuracy = cross_entropy = None
    if known.any():
        accuracy = float((choice[known] == labels[known]).float().mean())
        cross_entropy = round(-float(truths.double().numpy().mean()), 6)
    return Diagnostics(
        teacher_accuracy=accuracy,
        teacher_cross_entropy=cross_entropy,
        agreement=agreement,
        weights=dict(zip(names, weights, strict=True)),
        effective_classes=effective,
        collapsed=tuple(name for name, n in effective.items() if n < min(COLLAPSED, 0.5 * teacher_classes)),
        duplicates=tuple((names[i], names[j]) for i, j in _alike(reader)),
        mass=None if math.isnan(mass) else round(mass, 6),
        answered=shares,
    )


def _choices(reader: AnswerSet, labels: Tensor) -> tuple[Tensor, Tensor]:
    """First choices ``[N]``, ``ABSTAINED`` if there is no answer, and log-probabilities of known labels."""
    choices, truths = [], []
    for start, stop in reader.parts(reader.shape()[1]):
        rows = reader.read(reader.clients[0], start, stop)
        has_answer = answered(rows)
        known = (labels[start:stop] != UNLABELLED) & has_answer
        choices.append(torch.where(has_answer, first_choice(rows), ABSTAINED))
        truths.append(label_log_probs(rows[known], labels[start:stop][known]))
    return torch.cat(choices), torch.cat(truths)


def _marginal(reader: AnswerSet, client: int) -> Tensor:
    """``[V]``, float64: a client's mean answer."""
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
        # A kept id has its own probability in place of a share of the tail.
        more = (answer.log_probs.double().exp() - share[:, None]).masked_fill(answer.ids < 0, 0.0)
        total += share.sum()
        total += torch.bincount(answer.ids.clamp_min(0).flatten(), more.flatten(), minlength=vocab)
    return total / max(rows, 1)


def _effective(marginal: Tensor) -> float:
    return float(torch.special.entr(marginal.clamp_min(0)).sum().exp())


def _alike(reader: AnswerSet) -> list[tuple[int, int]]:
    """Pairs of clients with a small total variation on some evenly spread rows."""
    count = len(reader.clients)
    distances = torch.zeros(count, count, dtype=torch.float64)
    for part in reader.sample(SKETCH):
        for block in reader.common(*part):
            mass = block.log_mass(block.x).exp()
            for i, each in enumerate(mass):
                distances[i] += (mass - each).abs().sum(-1).double().sum(1)
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    if not pairs or not distances.any():
        return []
    limit = ALIKE * float(np.median([float(distances[pair]) for pair in pairs]))
    return [pair for pair in pairs if float(distances[pair]) <= limit]
