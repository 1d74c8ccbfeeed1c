"""The values that are passed between stages; frozen, without torch."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

UNLABELLED = -1

NO_LABEL = -100
"""torch's label for rows without one."""

Span = tuple[int, int]
"""First character and end of a part of a passage."""

ProgressCallback = Callable[[int, int], None]
"""Called with the number done and the total number of steps, texts or clients."""


@dataclass(frozen=True, slots=True)
class TextSet:
    """``N`` texts with ids and, if known, labels and sources."""

    name: str
    """Name in errors: ``data.test``, ``client-2``."""
    ids: tuple[str, ...]
    texts: tuple[str, ...]
    labels: NDArray[np.int64]
    """``[N]``, indices into ``label_names``; ``UNLABELLED`` if unknown."""
    label_names: tuple[str, ...]
    sources: tuple[str, ...] | None = None
    """Origin of each text (a domain, an era, a hospital), for partitions by source."""
    starts: tuple[int, ...] | None = None
    """First character of each text after its prompt or question, or of the second text of a pair, which
    follows a line break; ``None`` for plain texts."""
    answers: tuple[tuple[Span, ...] | None, ...] | None = None
    """The right answers to each question, as spans of its passage: empty if it has no answer, ``None`` if
    they are unknown."""
    turns: tuple[tuple[Span, ...], ...] | None = None
    """The assistant's parts of each text that was a conversation; ``None`` without conversations."""
    conversations: bool = False
    """True as long as texts are the messages of conversations as JSON."""

    @property
    def known(self) -> NDArray[np.bool_]:
        """``[N]``, True if the label or, for questions, the answers are known."""
        if self.answers is None:
            return np.asarray(self.labels != UNLABELLED)
        return np.array([right is not None for right in self.answers], np.bool_)

    def __len__(self) -> int:
        return len(self.texts)

    def question(self, row: int) -> tuple[str, str]:
        """The question and the passage of a row."""
        assert self.starts is not None, "texts are questions"
        text, start = self.texts[row], self.starts[row]
        return text[:start].strip(), text[start:]

    def select(self, rows: Sequence[int] | NDArray[np.int64], name: str | None = None) -> "TextSet":
        """The examples at ``rows``, in that order."""
        pick = [int(row) for row in rows]
        return TextSet(
            name=name or self.name,
            ids=tuple(self.ids[i] for i in pick),
            texts=tuple(self.texts[i] for i in pick),
            labels=self.labels[pick],
            label_names=self.label_names,
            sources=None if self.sources is None else tuple(self.sources[i] for i in pick),
            starts=None if self.starts is None else tuple(self.starts[i] for i in pick),
            answers=None if self.answers is None else tuple(self.answers[i] for i in pick),
            turns=None if self.turns is None else tuple(self.turns[i] for i in pick),
            conversations=self.conversations,
        )

    def label_counts(self) -> NDArray[np.int64]:
        """``[V]`` examples of each label."""
        known = self.labels[self.labels != UNLABELLED]
        return np.bincount(known, minlength=len(self.label_names)).astype(np.int64)

    def digest(self, *, labels: bool = False) -> str:
        """Hash of ids and texts in order, with ``labels`` also of labels and answers; equal everywhere."""
        h = hashlib.blake2b(digest_size=16)
        if labels:
            h.update(self.labels.astype("<i8").tobytes())
            if self.answers is not None:
                h.update(json.dumps(self.answers).encode())
        if self.starts is not None:
            h.update(np.array(self.starts, "<i8").tobytes())
        if self.turns is not None:
            h.update(json.dumps(self.turns).encode())
        for i, text in zip(self.ids, self.texts, strict=True):
            for part in (i, text):
                raw = part.encode()
                h.update(len(raw).to_bytes(8, "little") + raw)
        return h.hexdigest()


@dataclass(frozen=True, slots=True)
class Splits:
    """All data of a run."""

    private: tuple[TextSet, ...]
    """One set per client, with the client's name."""
    proxy: TextSet
    """The public texts that every client predicts; ``UNLABELLED`` if the server does not know the label."""
    validation: TextSet
    test: TextSet
    places: tuple[int, ...]
    """Each client's index in the partition; excluded clients keep theirs."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """The classes, in the order of predictions."""
        return self.proxy.label_names


@dataclass(frozen=True, slots=True)
class ClientDescription:
    """What a client reports when it enrols."""

    client: str
    examples: int | None = None
    """Number of private examples; ``None`` if the rule does not weight by size."""
    class_counts: tuple[float, ...] | None = None
    """Private examples of each class, with noise if configured; ``None`` if the rule does not need them."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Cost of a step."""

    seconds: float = 0.0
    flops: int = 0
    peak_memory_bytes: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.seconds + other.seconds,
            self.flops + other.flops,
            max(self.peak_memory_bytes, other.peak_memory_bytes),
        )


@dataclass(frozen=True, slots=True)
class RoundSpec:
    """The server's request in one round. Payloads contain its digest, which ties them to the round."""

    run_id: str
    round: int
    proxy_digest: str
    positions: int
    """Rows of a complete upload."""
    vocab_size: int
    vocab_fingerprint: str
    """Hash of the ordered classes, or of the tokenizer."""
    codec: str
    k: int
    """Most entries per row; ``vocab_size`` if all are sent."""
    nonce: str
    quorum: int
    clients: tuple[str, ...] = field(default=())
    """Clients of the round."""
    compression: str = "none"
    max_code: int = 255
    """For the codec ``threshold``: entries with larger codes are left out."""
    draws: int = 0
    """For the codec ``sampled``: the sum of a row's counts."""
    deadline: int | None = None
    """End of the round in seconds since 1970 (UTC); ``None``: payloads do not expire."""
    previous: str = ""
    """Head of the ledger after the last round, empty in the first; covered by signatures of payloads."""
    keys: tuple[tuple[str, str], ...] = field(default=())
    """``(client, public key)`` of enrolled clients; empty if envelopes are unsigned."""
    shard_rows: int = 0
    """Rows of each shard but the last, which has the rest; 0: an upload is one payload."""
