"""Aggregate the clients' answers into one teacher, chunk by chunk of the proxy set.

Answers are dense (log-probabilities ``[n, V]``, or their byte codes) or compressed (``TopK``); so is the
teacher. A row on which a client abstained (``abstentions``) is aggregated without that client; if fewer
clients are left than the rule needs, the teacher abstains.
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
    abstentions,
    answered,
    entropy,
    first_choice,
    label_log_probs,
)
from feddistill.aggregation.client_weights import Weights
from feddistill.aggregation.rules import Memory, Rule, WeightKind
from feddistill.aggregation.rules.block import Block, dense, mixing_shares, squared_distances
from feddistill.errors import ConfigError
from feddistill_kernels import TopK, topk_compress

Sink = Callable[[int, Any], None]
"""Receives the index of a first row and some rows of the teacher, a ``Tensor`` or ``TopK``."""

SAMPLE = 512
"""Rows of compressed answers on which the mass before renormalising is computed."""


@dataclass(frozen=True, slots=True)
class Aggregated:
    """The result of an aggregation."""

    teacher: Tensor | TopK | None
    """``N`` rows of log-probabilities: ``[N, V]``, or compressed if the answers are; ``None`` if a sink
    received them."""
    mass: float
    """Mean sum of a row's probabilities before renormalising; far below 1: no consensus."""
    weights: tuple[float, ...]
    """Each client's mean share."""
    memory: Memory
    """For the next round."""


def weigh(
    kind: WeightKind, clients: Sequence[AnswerReader], positions: int, context: RoundContext
) -> Weights | None:
    """The clients' weights of a kind; ``None`` for equal weights.

    Memory: one chunk of answers and, for ``confidence`` and ``verified``, one number per client and row.
    """
    reader = AnswerSet(clients, positions)
    match kind:
        case "uniform":
            return None
        case "size":
            return weighing.by_size(context.descriptions)
        case "class_counts":
            return weighing.by_class_counts(context.descriptions, reader.shape()[2])
        case "confidence":
            entropies = torch.stack(
                [
                    torch.cat(
                        [entropy(reader.read(client, *part)) for part in reader.parts(reader.shape()[1])]
                    )
                    for client in clients
                ]
            )
            return weighing.by_confidence(entropies, math.log(reader.shape()[2]))
    assert context.labels is not None, f"{kind} needs labels"
    truth, correct, rows = _on_labels(reader, context.labels)
    if not len(rows):  # no labelled row that every client answered
        return None
    if kind == "validation":
        return weighing.by_validation(correct.mean(1), reader.shape()[2])
    if kind == "verified_counts":
        return weighing.by_verified_counts(truth, context.descriptions, reader.shape()[2])
    domains = torch.zeros(positions) if context.domains is None else context.domains
    return weighing.verified(truth, rows, domains.long().numpy())


def aggregate(
    clients: Sequence[AnswerReader],
    positions: int,
    rule: Rule,
    weights: Weights | None = None,
    *,
    sharpen: float = 1.0,
    mix: int | None = None,
    context: RoundContext | None = None,
    k: int | None = None,
    sink: Sink | None = None,
) -> Aggregated:
    """Aggregate the clients' answers by a rule.

    Args:
        clients: A reader of each client's answers.
        positions: ``N``.
        rule: The rule.
        weights: The result of ``weigh``.
        sharpen: The exponent of ``q ~ q**sharpen``, applied afterwards (enhanced ERA).
        mix: Byzantine clients for which nearest-neighbour mixing is applied first; ``None``: no mixing.
        context: Inputs besides the answers; the rule's ``needs`` lists those that it must have.
        k: Entries per row of a compressed teacher, at most those of the longest answer, which is the default.
        sink: Receives the teacher's rows, which are then not kept in memory.

    Memory: ``O(C * chunk * k)``, for dense answers ``O(C * chunk * V)``, and the teacher if there is no
    ``sink``. Rules that need whole payloads read them once more.
    """
    context = context or RoundContext()
    by_class = (weights is not None and weights.by == "class") or "class_counts" in rule.needs()
    reader = AnswerSet(clients, positions, context, expand=by_class)
    compressed, longest, _, width = reader.shape()
    names = context.names or tuple(map(str, range(len(clients))))
    needs_whole = mix is not None or "whole" in rule.needs()
    if compressed and needs_whole and next(reader.blocks(), None) is None:
        return _all_abstained(reader, context.memory, min(k or longest, longest), sink)
    if mix is not None:
        reader = replace(reader, mixing=mixing_shares(squared_distances(reader.blocks()), mix))
    rule = rule.fit(reader.blocks)
    memory = context.memory
    if "whole" in rule.needs():
        chosen, memory = rule.choose(reader.blocks, names, memory)
        weights = None if chosen is None else Weights(chosen)
    parts: list[Tensor | TopK] = []
    mass = 0.0
    if compressed:
        entries = min(k or longest, longest)
        by_kernel = mix is None and not by_class and type(rule).merge is not Rule.merge
        make = _merged if by_kernel else _compressed
        for part in reader.parts(longest if by_kernel else width):
            teacher = _by_group(make, reader, rule, weights, *part, entries, sharpen)
            if sink is None:
                parts.append(teacher)
            else:
                sink(part[0], teacher)
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
        _concatenated(parts) if parts else None,
        mass,
        weights.mean_shares() if weights else tuple(round(1 / len(clients), 6) for _ in clients),
        memory,
    )


def _combined(
    reader: AnswerSet, rule: Rule, weights: Weights | None, start: int, stop: int, sharpen: float
) -> tuple[Tensor, Tensor]:
    """Dense rows ``[n, V]``, and the log of their sums before renormalising, ``[n, 1]``."""
    if rule.of_codes and reader.mixing is None:
        codes = [client(start, stop) for client in reader.clients]
        if all(isinstance(c, Tensor) and c.dtype == torch.uint8 for c in codes):
            # Integers of less than 24 bits: their sums are exact on every machine.
            integers = rule.combine(dense([-c.float() for c in codes if isinstance(c, Tensor)]), None)
            combined = integers.double() / STEPS_PER_NAT
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
    """Compressed rows, each aggregated from the clients that answered it."""
    teacher = abstentions(stop - start, k, reader.shape()[2])
    for clients, rows, group in reader.groups(start, stop):
        own_weights = _weights_of(weights, clients, rows + start)
        if not _enough(rule, own_weights, len(clients), len(reader.clients)):
            continue
        merged = make(group, rule, own_weights, 0, len(rows), k, sharpen)
        if len(rows) == stop - start and merged.ids.shape[1] == k:
            return merged
        if merged.ids.shape[1] < k:  # fewer clients may have fewer ids
            merged = topk_compress(merged.expand(), k)
        for whole, part in ((teacher.ids, merged.ids), (teacher.log_probs, merged.log_probs)):
            whole[rows] = part.to(whole)
        teacher.log_tail[rows] = merged.log_tail.to(teacher.log_tail)
    return teacher


def _enough(rule: Rule, weights: Weights | None, present: int, clients: int) -> bool:
    """True if enough clients answered for the rule, and their weights are not all 0."""
    if weights is not None and not bool(weights.values.sum() > 0):
        return False
    if present == clients:
        return True
    try:
        rule.check(present)
    except ConfigError:
        return False
    return True


def _all_abstained(reader: AnswerSet, memory: Memory, k: int, sink: Sink | None) -> Aggregated:
    """A teacher that abstains on every row, if no row can be used to compare whole payloads."""
    count, vocab_size = len(reader.clients), reader.shape()[2]
    parts: list[Tensor | TopK] = []
    for start, stop in reader.parts(k):
        rows = abstentions(stop - start, k, vocab_size)
        if sink is None:
            parts.append(rows)
        else:
            sink(start, rows)
    shares = tuple(round(1 / count, 6) for _ in range(count))
    return Aggregated(_concatenated(parts) if parts else None, math.nan, shares, memory)


def _weights_of(weights: Weights | None, clients: list[int], rows: Tensor) -> Weights | None:
    if weights is None:
        return None
    values = weights.values[clients]
    return Weights(values[:, rows] if weights.by == "row" else values, weights.by)


def _merged(
    reader: AnswerSet, rule: Rule, weights: Weights | None, start: int, stop: int, k: int, sharpen: float
) -> TopK:
    """Compressed rows by the rule's kernel."""
    answers = [reader.read(client, start, stop) for client in reader.clients]
    own_weights = None if weights is None else weights.rows(start, stop)
    merged = rule.merge([a for a in answers if isinstance(a, TopK)], own_weights, k)
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
    """Compressed rows, aggregated in columns common to all clients."""
    block = reader.block(start, stop)
    y = block.normalised(sharpen * block.normalised(_combine(block, rule, weights, start)))
    if block.ids is None:
        return topk_compress(y, k)
    mass = block.log_mass(y)
    order = mass[:, :-1].sort(dim=-1, descending=True, stable=True).indices  # the lowest id first if equal
    kept = order[:, :k].sort(-1).values
    tail = mass.scatter(-1, kept, -math.inf).logsumexp(-1)
    return TopK(block.ids.gather(1, kept).int(), y.gather(1, kept), tail, reader.shape()[2])


def _sampled_mass(reader: AnswerSet, rule: Rule, weights: Weights | None) -> float:
    """The mass before renormalising on some evenly spread rows, because the kernels do not return it."""
    total, rows = 0.0, 0
    for start, stop in reader.sample(SAMPLE):
        for clients, group_rows, group in reader.groups(start, stop):
            if len(clients) == len(reader.clients):
                block = group.block(0, len(group_rows))
                own_weights = _weights_of(weights, clients, group_rows + start)
                mass = block.log_mass(_combine(block, rule, own_weights, 0)).logsumexp(-1).exp()
                total += float(mass.numpy().sum(dtype=np.float64))
                rows += len(mass)
    return total / rows if rows else math.nan


def _concatenated(parts: list[Tensor | TopK]) -> Tensor | TopK:
    tensors = [part for part in parts if isinstance(part, Tensor)]
    return torch.cat(tensors) if tensors else TopK.cat([part for part in parts if isinstance(part, TopK)])


def _on_labels(
    reader: AnswerSet, labels: Tensor
) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.int64]]:
    """Log-probabilities ``[C, M]`` of known labels, whether each is the first choice, their rows ``[M]``."""
    known = labels >= 0
    truth, correct = [], []
    for start, stop in reader.parts(reader.shape()[1]):
        usable = known[start:stop]
        if not usable.any():
            continue
        answers = [reader.read(client, start, stop) for client in reader.clients]
        usable = usable & torch.stack([answered(answer) for answer in answers]).all(0)
        known[start:stop] = usable
        part = labels[start:stop][usable]
        answers = [answer[usable] for answer in answers]
        truth.append(torch.stack([label_log_probs(answer, part) for answer in answers]))
        correct.append(torch.stack([first_choice(answer) == part for answer in answers]))
    if not truth:
        return np.zeros((len(reader.clients), 0)), np.zeros((len(reader.clients), 0), bool), np.zeros(0, int)
    return (
        torch.cat(truth, 1).double().numpy(),
        torch.cat(correct, 1).numpy(),
        known.nonzero()[:, 0].numpy(),
    )
