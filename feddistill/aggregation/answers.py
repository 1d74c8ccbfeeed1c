"""The clients' answers, a few rows at a time: dense, as byte codes, or compressed."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from feddistill.aggregation.client_weights import class_counts
from feddistill.aggregation.rules.block import Block, dense, sparse
from feddistill.aggregation.rules.rule import Memory
from feddistill.types import ClientDescription
from feddistill_kernels import TopK

CHUNK = 1 << 20
"""Numbers processed at once: it bounds the memory, whatever ``N`` is."""

STEPS_PER_NAT = 12
"""A byte code means ``log p = -code / 12``."""

AnswerReader = Callable[[int, int], Tensor | TopK]
"""Reads a client's answers to the rows from ``start`` to ``stop``: log-probabilities ``[n, V]``, their byte
codes (uint8), or ``TopK``."""


@dataclass(frozen=True, slots=True)
class RoundContext:
    """The inputs of an aggregation besides the answers."""

    names: tuple[str, ...] = ()
    """Names of the clients, in the order of their answers."""
    descriptions: tuple[ClientDescription, ...] = ()
    """Their descriptions, in that order."""
    labels: Tensor | None = None
    """``[N]`` true ids (labels, next tokens); negative if unknown."""
    domains: Tensor | None = None
    """``[N]`` small integers: the domain of each row."""
    student: AnswerReader | None = None
    """The answers of the student before this round."""
    memory: Memory = field(default_factory=dict)
    """What the rule keeps from earlier rounds."""


@dataclass(frozen=True, slots=True)
class AnswerSet:
    """The answers of ``C`` clients to ``N`` rows."""

    clients: Sequence[AnswerReader]
    positions: int
    context: RoundContext = RoundContext()
    expand: bool = False
    """True if compressed answers are expanded, because weights or priors differ by class."""
    mixing: Tensor | None = None
    """``[C, C]`` shares of nearest-neighbour mixing, if any."""

    def shape(self) -> tuple[bool, int, int, int]:
        """Whether answers are compressed, entries of the longest, ``V``, and the most columns of a block."""
        first = [client(0, 1) for client in self.clients]
        compressed = [isinstance(answer, TopK) for answer in first]
        if any(compressed) and not all(compressed):
            raise ValueError("some clients answer compressed (TopK), some do not")
        kept = [a.ids.shape[1] if isinstance(a, TopK) else a.shape[1] for a in first]
        vocab = {a.vocab_size if isinstance(a, TopK) else a.shape[1] for a in first}
        if len(vocab) > 1:
            raise ValueError(f"clients answer over different vocabularies: {sorted(vocab)}")
        (size,) = vocab
        union = all(compressed) and not self.expand
        return all(compressed), max(kept), size, min(sum(kept), size) + 1 if union else size

    def parts(self, numbers: int) -> Iterator[tuple[int, int]]:
        """``(start, stop)`` of chunks, for rows that take ``numbers`` numbers per client."""
        step = max(1, CHUNK // (numbers * len(self.clients)))
        for start in range(0, self.positions, step):
            yield start, min(start + step, self.positions)

    def sample(self, rows: int) -> list[tuple[int, int]]:
        """``(start, stop)`` of up to eight evenly spread runs of rows, at most ``rows`` in all."""
        room = max(1, CHUNK // (self.shape()[3] * len(self.clients)))
        run = min(self.positions, max(1, rows // 8), room)
        starts = sorted({i * (self.positions - run) // 7 for i in range(8)})
        return [(start, start + run) for start in starts]

    def blocks(self) -> Iterator[Block]:
        """All rows that every client answered: rules that need whole payloads compare them on these."""
        for start, stop in self.parts(self.shape()[3]):
            yield from self.common(start, stop)

    def common(self, start: int, stop: int) -> Iterator[Block]:
        """The rows from ``start`` to ``stop`` that every client answered, if any."""
        for clients, _, group in self.groups(start, stop):
            if len(clients) == len(self.clients):
                yield group.block(0, group.positions)

    def groups(self, start: int, stop: int) -> Iterator[tuple[list[int], Tensor, "AnswerSet"]]:
        """Some rows, grouped by the clients that answered them.

        Yields:
            Indices of the clients, indices of the rows (counted from ``start``), and the answers of these
            clients to these rows. Rows without any answer are in no group.
        """
        answers = [self.read(client, start, stop) for client in self.clients]
        has_answer = torch.stack([answered(answer) for answer in answers])  # [C, n]
        patterns, which = has_answer.unique(dim=1, return_inverse=True)
        for number, pattern in enumerate(patterns.T.flip(0)):  # the most complete first
            clients = pattern.nonzero()[:, 0].tolist()
            rows = (which == patterns.shape[1] - 1 - number).nonzero()[:, 0]
            if clients:
                yield clients, rows, self._subset(clients, rows, answers, start, stop)

    def _subset(
        self, clients: list[int], rows: Tensor, answers: list[Tensor | TopK], start: int, stop: int
    ) -> "AnswerSet":
        chosen = [answers[client][rows] for client in clients]
        context, mixing = self.context, self.mixing
        labels = None if context.labels is None else context.labels[start:stop][rows]
        student = None
        if context.student is not None:
            student = _in_memory(self.read(context.student, start, stop)[rows])
        descriptions = tuple(context.descriptions[client] for client in clients if context.descriptions)
        if mixing is not None:
            mixing = mixing[clients][:, clients]
            mixing = mixing / mixing.sum(1, keepdim=True)
        context = replace(context, labels=labels, student=student, descriptions=descriptions)
        return AnswerSet([_in_memory(answer) for answer in chosen], len(rows), context, mixing=mixing)

    def block(self, start: int, stop: int) -> Block:
        """Some rows, with nearest-neighbour mixing if it is set."""
        answers = [self.read(client, start, stop) for client in self.clients]
        context = self.context
        student = self.read(context.student, start, stop) if context.student is not None else None
        if isinstance(answers[0], TopK):
            assert student is None or isinstance(student, TopK), "the student answers as clients do"
            block = sparse([a for a in answers if isinstance(a, TopK)], student)
        else:
            assert not isinstance(student, TopK), "the student answers as clients do"
            block = replace(dense([a for a in answers if isinstance(a, Tensor)]), student=student)
        if context.labels is not None:
            block = replace(block, labels=context.labels[start:stop])
        if block.ids is None and context.descriptions and context.descriptions[0].class_counts is not None:
            counts = class_counts(context.descriptions, block.x.shape[-1]) + 1.0
            block = replace(block, priors=counts / counts.sum(1, keepdim=True))
        return block if self.mixing is None else block.mixed(self.mixing)

    def read(self, client: AnswerReader, start: int, stop: int) -> Tensor | TopK:
        """One client's log-probabilities or compressed answers."""
        answer = client(start, stop)
        if isinstance(answer, TopK):
            return answer.expand() if self.expand else _without_pads(answer)
        return decoded(answer) if answer.dtype == torch.uint8 else answer


def _without_pads(answer: TopK) -> TopK:
    """The answer with a log-probability of ``-inf`` beside ids of -1, which are no entries."""
    none = answer.ids < 0
    if not none.any():
        return answer
    log_probs = answer.log_probs.masked_fill(none, -math.inf)
    return TopK(answer.ids, log_probs, answer.log_tail, answer.vocab_size)


def _in_memory(answer: Tensor | TopK) -> AnswerReader:
    return lambda start, stop: answer[start:stop]


def answered(answer: Tensor | TopK) -> Tensor:
    """``[n]``: True for rows that a client answered; see ``abstentions`` for the others."""
    if isinstance(answer, TopK):
        return (answer.log_probs > -math.inf).any(-1)
    return torch.ones(len(answer), dtype=torch.bool)


def abstentions(rows: int, kept: int, vocab_size: int) -> TopK:
    """Rows that mean "abstained": all mass is in the tail, which no model's top-k answer can have."""
    ids = torch.arange(kept, dtype=torch.int32).repeat(rows, 1)
    return TopK(ids, torch.full((rows, kept), -math.inf), torch.zeros(rows), vocab_size)


def decoded(codes: Tensor) -> Tensor:
    """Log-probabilities of byte codes, renormalised in float64."""
    return (codes.double() / -STEPS_PER_NAT).log_softmax(-1).float()


def first_choice(answer: Tensor | TopK) -> Tensor:
    """``[n]``, the likeliest id; the first of equally likely ones."""
    if isinstance(answer, TopK):
        likeliest = answer.log_probs.argmax(-1, keepdim=True)
        return answer.ids.gather(1, likeliest)[:, 0].long()
    choice: Tensor = answer.argmax(-1)
    return choice


def label_log_probs(answer: Tensor | TopK, labels: Tensor) -> Tensor:
    """``[n]`` log-probabilities of ``labels [n]``."""
    if not isinstance(answer, TopK):
        return answer.gather(1, labels[:, None])[:, 0]
    is_label = answer.ids == labels[:, None]
    kept = torch.where(is_label, answer.log_probs, -math.inf).amax(-1)
    return torch.where(is_label.any(-1), kept, answer.missing_log_prob())


def entropy(answer: Tensor | TopK) -> Tensor:
    """``[n]``, the entropy of each row in nats."""
    kept = answer.log_probs if isinstance(answer, TopK) else answer
    nats: Tensor = torch.special.entr(kept.exp()).sum(-1)
    if isinstance(answer, TopK):
        others = answer.log_tail.exp() * answer.missing_log_prob()
        nats = nats - torch.where(answer.log_tail > -math.inf, others, 0.0)
    return nats
