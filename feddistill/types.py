"""The values that travel between stages. Frozen; numpy only."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

UNLABELLED = -1

NO_LABEL = -100
"""torch's own mark of a row without label."""

Span = tuple[int, int]
"""Of a passage: the first character, and the one behind the last."""

ProgressCallback = Callable[[int, int], None]
"""Called with how much is done and how much there is: steps, texts, clients."""


@dataclass(frozen=True, slots=True)
class TextSet:
    """Texts with ids and, where known, labels and sources. ``N`` examples."""

    name: str
    """What errors call it: ``data.test``, ``client-2``."""
    ids: tuple[str, ...]
    texts: tuple[str, ...]
    labels: NDArray[np.int64]
    """``[N]``, indices into ``label_names``; ``UNLABELLED`` where not known."""
    label_names: tuple[str, ...]
    sources: tuple[str, ...] | None = None
    """Where each text is from (a domain, an era, a hospital), for partitions by source."""
    starts: tuple[int, ...] | None = None
    """Of each text, the character behind its prompt, or where the passage begins that stands behind a
    question; ``None`` where there are neither."""
    answers: tuple[tuple[Span, ...] | None, ...] | None = None
    """Of each question the right answers, spans of its passage: none where it has no answer, ``None`` where
    they are not known."""

    @property
    def known(self) -> NDArray[np.bool_]:
        """``[N]``, of which the label is known or, of questions, the answers."""
        if self.answers is None:
            return np.asarray(self.labels != UNLABELLED)
        return np.array([right is not None for right in self.answers], np.bool_)

    def __len__(self) -> int:
        return len(self.texts)

    def question(self, row: int) -> tuple[str, str]:
        """A question, and the passage that it is about."""
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
        )

    def label_counts(self) -> NDArray[np.int64]:
        """``[V]`` examples of each label."""
        known = self.labels[self.labels != UNLABELLED]
        return np.bincount(known, minlength=len(self.label_names)).astype(np.int64)

    def digest(self, *, labels: bool = False) -> str:
        """A hash of ids and texts in order, the same on every machine; with ``labels``, of these as well, and
        of answers."""
        h = hashlib.blake2b(digest_size=16)
        if labels:
            h.update(self.labels.astype("<i8").tobytes())
            if self.answers is not None:
                h.update(json.dumps(self.answers).encode())
        if self.starts is not None:
            h.update(np.array(self.starts, "<i8").tobytes())
        for i, text in zip(self.ids, self.texts, strict=True):
            for part in (i, text):
                raw = part.encode()
                h.update(len(raw).to_bytes(8, "little") + raw)
        return h.hexdigest()


@dataclass(frozen=True, slots=True)
class Splits:
    """Everybody's data in one run."""

    private: tuple[TextSet, ...]
    """One set a client, named after it."""
    proxy: TextSet
    """The public texts that everyone answers. Labels: those that the server knows, else ``UNLABELLED``."""
    validation: TextSet
    test: TextSet
    places: tuple[int, ...]
    """Where each client stands in the partition, those counted that are absent."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """The classes, in the order of every answer."""
        return self.proxy.label_names


@dataclass(frozen=True, slots=True)
class ClientDescription:
    """What a client says of itself when it enrols; all of it reaches the server."""

    client: str
    examples: int | None = None
    """Private examples; ``None`` where the rule does not weight by size."""
    class_counts: tuple[float, ...] | None = None
    """Private examples of each class, noised if the client asks for it; ``None`` where no rule needs it."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a step took."""

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
    """What the server asks in one round. A payload names its digest, so it cannot answer another question."""

    run_id: str
    round: int
    proxy_digest: str
    positions: int
    """Rows that a whole answer has."""
    vocab_size: int
    vocab_fingerprint: str
    """Hash of the ordered classes, or of the tokenizer."""
    codec: str
    k: int
    """Entries a row has at most; ``vocab_size`` where all are sent."""
    nonce: str
    quorum: int
    clients: tuple[str, ...] = field(default=())
    """Who may answer."""
    compression: str = "none"
    max_code: int = 255
    """Codec ``threshold``: entries of larger codes are left out."""
    draws: int = 0
    """Codec ``sampled``: what a row's counts add up to."""
    deadline: int | None = None
    """When the round closes, in seconds since 1970 (UTC); ``None``: never, and nothing expires."""
    previous: str = ""
    """Head of the ledger after the last round; nothing in the first. Who signs an answer signs it too."""
    keys: tuple[tuple[str, str], ...] = field(default=())
    """``(client, public key)``, enrolled; empty: envelopes are unsigned, and the transport is trusted."""
    shard_rows: int = 0
    """Rows of each shard but the last, which has the rest; 0: an answer is one payload."""
