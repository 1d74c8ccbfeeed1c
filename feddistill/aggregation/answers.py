"""What clients answered, a few rows at a time: dense, as bytes, or compressed."""

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
"""Numbers worked on at once: what bounds the memory, whatever ``N`` is."""

STEPS_PER_NAT = 12
"""Of an answer in bytes: ``log p = -code / 12``."""

AnswerReader = Callable[[int, int], Tensor | TopK]
"""``(start, stop)`` to that client's answers to these rows: log-probabilities ``[n, V]``, their bytes
(uint8), or ``TopK``."""


@dataclass(frozen=True, slots=True)
class RoundContext:
    """What the server knows besides the answers."""

    names: tuple[str, ...] = ()
    """Of the clients, in the order of their answers."""
    descriptions: tuple[ClientDescription, ...] = ()
    """What each says of itself, in that order."""
    labels: Tensor | None = None
    """``[N]`` true ids (labels, next tokens); negative where not known."""
    domains: Tensor | None = None
    """``[N]`` small integers: where each row is from."""
    student: AnswerReader | None = None
    """What the student said before this round."""
    memory: Memory = field(default_factory=dict)
    """What the rule remembers of former rounds."""


@dataclass(frozen=True, slots=True)
class AnswerSet:
    """``N`` rows of ``C`` clients."""

    clients: Sequence[AnswerReader]
    positions: int
    known: RoundContext = RoundContext()
    expand: bool = False
    """Whether compressed answers are opened: where weights or priors differ by class."""
    mixing: Tensor | None = None
    """``[C, C]`` shares of nearest-neighbour mixing."""

    def shape(self) -> tuple[bool, int, int, int]:
        """Whether answers are compressed, entries of the longest, ``V``, and columns of a block at most."""
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
        """``(start, stop)`` of chunks in which a client's row takes ``numbers`` numbers."""
        step = max(1, CHUNK // (numbers * len(self.clients)))
        for start in range(0, self.positions, step):
            yield start, min(start + step, self.positions)

    def sample(self, rows: int) -> list[tuple[int, int]]:
        """``(start, stop)`` of up to eight runs of rows, evenly spread, ``rows`` together at the most."""
        room = max(1, CHUNK // (self.shape()[3] * len(self.clients)))
        run = min(self.positions, max(1, rows // 8), room)
        starts = sorted({i * (self.positions - run) // 7 for i in range(8)})
        return [(start, start + run) for start in starts]

    def blocks(self) -> Iterator[Block]:
        """All rows that every client answers: who looks at whole payloads compares them on these."""
        for start, stop in self.parts(self.shape()[3]):
            yield from self.common(start, stop)

    def common(self, start: int, stop: int) -> Iterator[Block]:
        """Of some rows, those that every client answers, if there are any."""
        for who, _, group in self.groups(start, stop):
            if len(who) == len(self.clients):
                yield group.block(0, group.positions)

    def groups(self, start: int, stop: int) -> Iterator[tuple[list[int], Tensor, "AnswerSet"]]:
        """Some rows by who answers them: the clients' numbers, the rows' (from ``start`` on), and a reader of
        these rows of these clients. Rows that nobody answers are in none of them."""
        answers = [self.read(client, start, stop) for client in self.clients]
        said = torch.stack([answered(answer) for answer in answers])  # [C, n]
        kinds, which = said.unique(dim=1, return_inverse=True)
        for number, kind in enumerate(kinds.T.flip(0)):  # first those that most have answered
            who = kind.nonzero()[:, 0].tolist()
            rows = (which == kinds.shape[1] - 1 - number).nonzero()[:, 0]
            if who:
                yield who, rows, self._of(who, rows, answers, start, stop)

    def _of(
        self, who: list[int], rows: Tensor, answers: list[Tensor | TopK], start: int, stop: int
    ) -> "AnswerSet":
        chosen = [answers[client][rows] for client in who]
        known, mixing = self.known, self.mixing
        labels = None if known.labels is None else known.labels[start:stop][rows]
        student = None
        if known.student is not None:
            student = _held(self.read(known.student, start, stop)[rows])
        descriptions = tuple(known.descriptions[client] for client in who) if known.descriptions else ()
        if mixing is not None:
            mixing = mixing[who][:, who]
            mixing = mixing / mixing.sum(1, keepdim=True)
        changed = replace(known, labels=labels, student=student, descriptions=descriptions)
        return AnswerSet([_held(answer) for answer in chosen], len(rows), changed, mixing=mixing)

    def block(self, start: int, stop: int) -> Block:
        """Some rows, mixed if that is asked for."""
        answers = [self.read(client, start, stop) for client in self.clients]
        known = self.known
        student = self.read(known.student, start, stop) if known.student is not None else None
        if isinstance(answers[0], TopK):
            assert student is None or isinstance(student, TopK), "the student answers as clients do"
            block = sparse([a for a in answers if isinstance(a, TopK)], student)
        else:
            assert not isinstance(student, TopK), "the student answers as clients do"
            block = replace(dense([a for a in answers if isinstance(a, Tensor)]), student=student)
        if known.labels is not None:
            block = replace(block, labels=known.labels[start:stop])
        if block.ids is None and known.descriptions and known.descriptions[0].class_counts is not None:
            counts = class_counts(known.descriptions, block.x.shape[-1]) + 1.0
            block = replace(block, priors=counts / counts.sum(1, keepdim=True))
        return block if self.mixing is None else block.mixed(self.mixing)

    def read(self, client: AnswerReader, start: int, stop: int) -> Tensor | TopK:
        """One client's log-probabilities or compressed answers."""
        answer = client(start, stop)
        if isinstance(answer, TopK):
            return answer.expand() if self.expand else answer
        return decoded(answer) if answer.dtype == torch.uint8 else answer


def _held(answer: Tensor | TopK) -> AnswerReader:
    return lambda start, stop: answer[start:stop]


def answered(answer: Tensor | TopK) -> Tensor:
    """``[n]``, which rows a client has an opinion on; see ``silent``."""
    if isinstance(answer, TopK):
        return (answer.log_probs > -math.inf).any(-1)
    return torch.ones(len(answer), dtype=torch.bool)


def silent(rows: int, kept: int, vocab_size: int) -> TopK:
    """Rows without an opinion: all mass is the tail's. No model can say that, as something is likeliest."""
    ids = torch.arange(kept, dtype=torch.int32).repeat(rows, 1)
    return TopK(ids, torch.full((rows, kept), -math.inf), torch.zeros(rows), vocab_size)


def decoded(codes: Tensor) -> Tensor:
    """Bytes as log-probabilities, renormalised in float64."""
    return (codes.double() / -STEPS_PER_NAT).log_softmax(-1).float()


def first_choice(answer: Tensor | TopK) -> Tensor:
    """``[n]``, the likeliest id; of equally likely ones the first that stands there."""
    if isinstance(answer, TopK):
        at = answer.log_probs.argmax(-1, keepdim=True)
        return answer.ids.gather(1, at)[:, 0].long()
    choice: Tensor = answer.argmax(-1)
    return choice


def at_labels(answer: Tensor | TopK, labels: Tensor) -> Tensor:
    """``[n]`` log-probabilities of ``labels [n]``."""
    if not isinstance(answer, TopK):
        return answer.gather(1, labels[:, None])[:, 0]
    found = answer.ids == labels[:, None]
    kept = torch.where(found, answer.log_probs, -math.inf).amax(-1)
    return torch.where(found.any(-1), kept, answer.missing_log_prob())


def entropy(answer: Tensor | TopK) -> Tensor:
    """``[n]``, nats."""
    kept = answer.log_probs if isinstance(answer, TopK) else answer
    nats: Tensor = torch.special.entr(kept.exp()).sum(-1)
    if isinstance(answer, TopK):
        others = answer.log_tail.exp() * answer.missing_log_prob()
        nats = nats - torch.where(answer.log_tail > -math.inf, others, 0.0)
    return nats
