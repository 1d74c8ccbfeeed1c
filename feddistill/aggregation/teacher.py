"""Make one teacher of the clients' answers, chunk by chunk of the proxy set; say how well they agree.

Answers are dense (log-probabilities ``[n, V]``, or their bytes) or compressed (``TopK``); so is the teacher.
A row on which a client has no opinion (``silent``) is aggregated as if that client were not there; where
fewer have one than the rule needs, the teacher has none.
Shapes: ``C`` clients, ``N`` proxy texts or positions, ``V`` classes or vocabulary, ``k`` entries kept.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feddistill.aggregation import client_weights as weighing
from feddistill.aggregation.answers import (
    STEPS_PER_NAT,
    AnswerReader,
    AnswerSet,
    RoundContext,
    answered,
    at_labels,
    entropy,
    first_choice,
    silent,
)
from feddistill.aggregation.client_weights import Weights
from feddistill.aggregation.rules import Memory, Rule, WeightKind
from feddistill.aggregation.rules.block import Block, dense, mixing_shares, squared_distances
from feddistill.errors import ConfigError
from feddistill_kernels import TopK, topk_compress

Sink = Callable[[int, Any], None]
"""Takes some rows of the teacher, with the number of the first: ``Tensor`` or ``TopK``, as the teacher is."""

SAMPLE = 512
"""Rows of compressed answers on which the mass before renormalising is taken."""


@dataclass(frozen=True, slots=True)
class Aggregated:
    """What the server makes of a round."""

    teacher: Tensor | TopK | None
    """``N`` rows of log-probabilities: ``[N, V]``, or compressed where the answers were; ``None`` where a
    sink took them."""
    mass: float
    """Mean of the rule's probabilities summed before renormalising; far below 1 is no consensus."""
    weights: tuple[float, ...]
    """Each client's mean share."""
    memory: Memory
    """For the rule's next round."""


def weigh(
    kind: WeightKind, clients: Sequence[AnswerReader], positions: int, known: RoundContext
) -> Weights | None:
    """The weights that a rule asks for; ``None`` for equal ones.

    Memory: one chunk of answers and, for ``confidence`` and ``verified``, a number for each client and row.
    """
    reader = AnswerSet(clients, positions)
    match kind:
        case "uniform":
            return None
        case "size":
            return weighing.by_size(known.descriptions)
        case "class_counts":
            return weighing.by_class_counts(known.descriptions, reader.shape()[2])
        case "confidence":
            unsure = torch.stack(
                [
                    torch.cat(
                        [entropy(reader.read(client, *part)) for part in reader.parts(reader.shape()[1])]
                    )
                    for client in clients
                ]
            )
            return weighing.by_confidence(unsure, math.log(reader.shape()[2]))
    assert known.labels is not None, "weights by labels need some"
    truth, right, rows = _held_back(reader, known.labels)
    if not len(rows):  # nothing that all have an opinion on
        return None
    if kind == "validation":
        return weighing.by_validation(right.mean(1), reader.shape()[2])
    if kind == "verified_counts":
        return weighing.by_verified_counts(truth, known.descriptions, reader.shape()[2])
    domains = torch.zeros(positions) if known.domains is None else known.domains
    return weighing.verified(truth, rows, domains.long().numpy())


def aggregate(
    clients: Sequence[AnswerReader],
    positions: int,
    rule: Rule,
    weights: Weights | None = None,
    *,
    sharpen: float = 1.0,
    mix: int | None = None,
    known: RoundContext | None = None,
    k: int | None = None,
    sink: Sink | None = None,
) -> Aggregated:
    """The teacher.

    Args:
        clients: For each client, how to get a chunk of its answers.
        positions: ``N``.
        rule: The formula.
        weights: Of ``weigh``.
        sharpen: ``q ~ q**sharpen`` afterwards (enhanced ERA).
        mix: Clients that may lie: nearest-neighbour mixing first.
        known: What the server knows besides; a rule's ``needs`` say what must be there.
        k: Entries a row of a compressed teacher, at most as the longest answer has; ``None`` for as many.
        sink: Takes the rows of the teacher, with the number of the first, in the place of memory.

    Memory: ``O(C * chunk * k)``, of dense answers ``O(C * chunk * V)``, and the teacher where nothing else
    takes it. Rules that look at whole payloads read them once more.
    """
    known = known or RoundContext()
    by_class = (weights is not None and weights.by == "class") or "class_counts" in rule.needs()
    reader = AnswerSet(clients, positions, known, expand=by_class)
    compressed, longest, _, width = reader.shape()
    names = known.names or tuple(map(str, range(len(clients))))
    looks_at_all = mix is not None or "whole" in rule.needs()
    if compressed and looks_at_all and next(reader.blocks(), None) is None:
        return _nothing(reader, known.memory, min(k or longest, longest), sink)
    if mix is not None:
        reader = replace(reader, mixing=mixing_shares(squared_distances(reader.blocks()), mix))
    rule = rule.fit(reader.blocks)
    memory = known.memory
    if "whole" in rule.needs():
        chosen, memory = rule.choose(reader.blocks, names, memory)
        weights = None if chosen is None else Weights(chosen)
    parts: list[Tensor | TopK] = []
    mass = 0.0
    if compressed:
        wanted = min(k or longest, longest)
        by_kernel = mix is None and not by_class and type(rule).merge is not Rule.merge
        make = _merged if by_kernel else _compressed
        for part in reader.parts(longest if by_kernel else width):
            found = _by_group(make, reader, rule, weights, *part, wanted, sharpen)
            if sink is None:
                parts.append(found)
            else:
                sink(part[0], found)
        mass = _sampled_mass(reader, rule, weights)
    else:
        for start, stop in reader.parts(width):
            rows, log_total = _combined(reader, rule, weights, start, stop, sharpen)
            mass += float(log_total.exp().numpy().sum(dtype=np.float64)) / positions
            if sink is None:
                parts.append(rows)
            else:
                sink(start, rows)
    return Aggregated(
        _joined(parts) if parts else None,
        mass,
        weights.mean_shares() if weights else tuple(round(1 / len(clients), 6) for _ in clients),
        memory,
    )


def _combined(
    reader: AnswerSet, rule: Rule, weights: Weights | None, start: int, stop: int, sharpen: float
) -> tuple[Tensor, Tensor]:
    """Dense rows ``[n, V]``, and the log of what they summed to before, ``[n, 1]``."""
    if rule.of_codes and reader.mixing is None:
        codes = [client(start, stop) for client in reader.clients]
        if all(isinstance(c, Tensor) and c.dtype == torch.uint8 for c in codes):
            # Whole numbers of less than 24 bits: exact, whatever machine adds them up.
            whole = rule.combine(dense([-c.float() for c in codes if isinstance(c, Tensor)]), None)
            combined = whole.double() / STEPS_PER_NAT
            total = combined.logsumexp(-1, keepdim=True)
            return (sharpen * (combined - total)).log_softmax(-1).float(), total.float()
    block = reader.block(start, stop)
    combined = _combine(block, rule, weights, start)
    total = combined.logsumexp(-1, keepdim=True)
    return (sharpen * (combined - total)).log_softmax(-1), total


def _combine(block: Block, rule: Rule, weights: Weights | None, start: int) -> Tensor:
    shares = None if weights is None else weights.shares(block.x, start, start + block.x.shape[1])
    return rule.combine(block, shares)


def _by_group(
    make: Callable[[AnswerSet, Rule, Weights | None, int, int, int, float], TopK],
    reader: AnswerSet,
    rule: Rule,
    weights: Weights | None,
    start: int,
    stop: int,
    k: int,
    sharpen: float,
) -> TopK:
    """Compressed rows, each by those clients that have an opinion on it."""
    made = silent(stop - start, k, reader.shape()[2])
    for who, rows, group in reader.groups(start, stop):
        own = _weights_of(weights, who, rows + start)
        if not _enough(rule, own, len(who), len(reader.clients)):
            continue
        merged = make(group, rule, own, 0, len(rows), k, sharpen)
        if len(rows) == stop - start and merged.ids.shape[1] == k:
            return merged
        if merged.ids.shape[1] < k:  # of fewer clients there may be fewer ids
            merged = topk_compress(merged.expand(), k)
        for whole, part in ((made.ids, merged.ids), (made.log_probs, merged.log_probs)):
            whole[rows] = part.to(whole)
        made.log_tail[rows] = merged.log_tail.to(made.log_tail)
    return made


def _enough(rule: Rule, weights: Weights | None, present: int, clients: int) -> bool:
    """Whether those that have an opinion are enough for the rule, and one of them counts."""
    if weights is not None and not bool(weights.values.sum() > 0):
        return False
    if present == clients:
        return True
    try:
        rule.check(present)
    except ConfigError:
        return False
    return True


def _nothing(reader: AnswerSet, memory: Memory, k: int, sink: Sink | None) -> Aggregated:
    """Where clients have no row in common, who compares whole answers has nothing to compare."""
    count, vocab_size = len(reader.clients), reader.shape()[2]
    parts: list[Tensor | TopK] = []
    for start, stop in reader.parts(k):
        rows = silent(stop - start, k, vocab_size)
        if sink is None:
            parts.append(rows)
        else:
            sink(start, rows)
    shares = tuple(round(1 / count, 6) for _ in range(count))
    return Aggregated(_joined(parts) if parts else None, math.nan, shares, memory)


def _weights_of(weights: Weights | None, who: list[int], rows: Tensor) -> Weights | None:
    if weights is None:
        return None
    values = weights.values[who]
    return Weights(values[:, rows] if weights.by == "row" else values, weights.by)


def _merged(
    reader: AnswerSet, rule: Rule, weights: Weights | None, start: int, stop: int, k: int, sharpen: float
) -> TopK:
    """Compressed rows by the rule's kernel."""
    answers = [reader.read(client, start, stop) for client in reader.clients]
    given = None if weights is None else weights.rows(start, stop)
    merged = rule.merge([a for a in answers if isinstance(a, TopK)], given, k)
    if sharpen == 1:
        return merged
    others = merged.vocab_size - merged.ids.shape[1]
    log_probs = sharpen * merged.log_probs
    log_tail = sharpen * merged.missing_log_prob() + (math.log(others) if others else -math.inf)
    norm = torch.cat([log_probs, log_tail[:, None]], -1).logsumexp(-1)
    return TopK(merged.ids, log_probs - norm[:, None], log_tail - norm, merged.vocab_size)


def _compressed(
    reader: AnswerSet, rule: Rule, weights: Weights | None, start: int, stop: int, k: int, sharpen: float
) -> TopK:
    """Compressed rows in the columns that clients have in common."""
    block = reader.block(start, stop)
    y = block.normalised(sharpen * block.normalised(_combine(block, rule, weights, start)))
    if block.ids is None:
        return topk_compress(y, k)
    mass = block.log_mass(y)
    order = mass[:, :-1].sort(dim=-1, descending=True, stable=True).indices  # of equal ones the lowest id
    kept = order[:, :k].sort(-1).values
    tail = mass.scatter(-1, kept, -math.inf).logsumexp(-1)
    return TopK(block.ids.gather(1, kept).int(), y.gather(1, kept), tail, reader.shape()[2])


def _sampled_mass(reader: AnswerSet, rule: Rule, weights: Weights | None) -> float:
    """On some rows, evenly spread: a kernel does not tell it."""
    total, rows = 0.0, 0
    for start, stop in reader.sample(SAMPLE):
        for who, at, group in reader.groups(start, stop):
            if len(who) == len(reader.clients):
                block, own = group.block(0, len(at)), _weights_of(weights, who, at + start)
                mass = block.log_mass(_combine(block, rule, own, 0)).logsumexp(-1).exp()
                total += float(mass.numpy().sum(dtype=np.float64))
                rows += len(mass)
    return total / rows if rows else math.nan


def _joined(parts: list[Tensor | TopK]) -> Tensor | TopK:
    whole = [part for part in parts if isinstance(part, Tensor)]
    if whole:
        return torch.cat(whole)
    some = [part for part in parts if isinstance(part, TopK)]
    return TopK(
        torch.cat([part.ids for part in some]),
        torch.cat([part.log_probs for part in some]),
        torch.cat([part.log_tail for part in some]),
        some[0].vocab_size,
    )


def _held_back(
    reader: AnswerSet, labels: Tensor
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.int64]]:
    """At the rows with a label: its log-probability, whether it is the first choice; which rows."""
    known = labels >= 0
    truth, right = [], []
    for start, stop in reader.parts(reader.shape()[1]):
        here = known[start:stop]
        if not here.any():
            continue
        answers = [reader.read(client, start, stop) for client in reader.clients]
        here = here & torch.stack([answered(answer) for answer in answers]).all(0)
        known[start:stop] = here
        wanted = labels[start:stop][here]
        answers = [answer[here] for answer in answers]
        truth.append(torch.stack([at_labels(answer, wanted) for answer in answers]))
        right.append(torch.stack([first_choice(answer) == wanted for answer in answers]))
    if not truth:
        return np.zeros((len(reader.clients), 0)), np.zeros((len(reader.clients), 0), bool), np.zeros(0, int)
    return (
        torch.cat(truth, 1).double().numpy(),
        torch.cat(right, 1).numpy(),
        known.nonzero()[:, 0].numpy(),
    )
