"""Answers between tokenizers: what a model says of its tokens of a text, said of those of another model."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from feddistill.aggregation.answers import abstentions, answered
from feddistill.alignment import (
    Projection,
    Reading,
    Vocabulary,
    map_vocabulary,
    mined_map,
    mined_project,
    project,
    spans,
)
from feddistill.errors import ModelError
from feddistill.modelio.packing import PackedTexts
from feddistill.models.causal import TextReader
from feddistill.models.tokenizers import end_id
from feddistill.store.run_directory import Json
from feddistill.types import TextSet
from feddistill_kernels import TopK

Ints = NDArray[np.int64]

FEWEST = 64
"""Entries that a row keeps before it is projected, at the least: mass that it leaves out is told nowhere."""


def kept_before(k: int, vocab_size: int) -> int:
    """Entries that a row keeps before it is projected to ``k``: several of them may come to one id.

    >>> kept_before(4, 300), kept_before(32, 300), kept_before(128, 300)
    (64, 128, 300)
    """
    return min(max(4 * k, FEWEST), vocab_size)


@dataclass
class Counts:
    """What has been projected."""

    rows: int = 0
    answered: int = 0
    coverage: float = 0.0
    """Added up over rows."""
    seconds: float = 0.0

    def record(self) -> Json:
        """Of ``rows`` rows: the shares that have an answer and, on average, of the mass that is kept."""
        count = max(self.rows, 1)
        return {
            "rows": self.rows,
            "answered": round(self.answered / count, 6),
            "coverage": round(self.coverage / count, 6),
            "seconds": round(self.seconds, 3),
        }


class Side:
    """The texts as one of the two reads them."""

    def __init__(self, reader: TextReader, texts: TextSet, blocks: PackedTexts, name: str):
        """``blocks`` are those of ``texts``, of any length; ``name`` is the setting that errors name."""
        self.vocabulary = Vocabulary(reader.tokenizer, name)
        self.vocab_size, self.blocks = reader.vocab_size, blocks
        if len(self.vocabulary) > self.vocab_size:
            raise ModelError(
                f"{name}: its tokenizer has ids up to {len(self.vocabulary) - 1}, but only {self.vocab_size} "
                "tokens; one with gaps cannot be projected"
            )
        end = end_id(reader.tokenizer)
        self.readings = [_ended(spans(self.vocabulary, t, special_tokens=False), end) for t in texts.texts]
        # Row r is about token r + 1 of the stream; the rows of a text are its tokens and its end.
        self.first: Ints = np.searchsorted(blocks.texts[1:], np.arange(len(texts) + 1))
        whole = np.concatenate([reading.ids for reading in self.readings])
        if not np.array_equal(whole, blocks.targets):
            raise ModelError(f"{name}: its tokenizer cuts a text otherwise where byte spans are asked for")

    def edges(self, text: int) -> tuple[Ints, Ints]:
        """``[n]``, where each token of a text begins and ends; the end of it is one byte behind it."""
        ends = self.readings[text].ends.copy()
        ends[-1] += 1
        return np.concatenate([[0], ends[:-1]]), ends

    def texts(self, rows: Ints) -> list[int]:
        """Those that ``rows`` are about."""
        found: list[int] = np.unique(self.blocks.texts[rows + 1]).tolist()
        return found

    def tokens(self, rows: Ints, text: int) -> Ints:
        """Which tokens of a text those of ``rows`` are about that are about it; ``rows`` ascend."""
        start, stop = np.searchsorted(rows, self.first[text : text + 2])
        return np.asarray(rows[start:stop] - self.first[text])


class Projector(Protocol):
    """A projection from one vocabulary to another: ``project`` of a map, or ``mined_project``."""

    def __call__(
        self,
        answers: TopK,
        sender: Reading,
        receiver: Reading,
        /,
        *,
        predicted: Ints,
        k: int,
        vocab_size: int,
    ) -> Projection:
        """What is said of the sender's tokens, about the receiver's."""


def by_spans(sender: Vocabulary, receiver: Vocabulary, folder: Path) -> Projector:
    """By the bytes that tokens stand for; ``folder``: where maps are kept."""
    return partial(project, mapped=map_vocabulary(sender, receiver, folder))


def by_edit_distance(sender: Vocabulary, receiver: Vocabulary) -> Projector:
    """As FedMKT does: by edit distances, of ids and of the tokens of a text."""
    return partial(mined_project, mapped=mined_map(sender, receiver), vocabularies=(sender, receiver))


def needed(asked: Ints, receiver: Side, sender: Side) -> Ints:
    """Rows of the sender about tokens that share a byte with those of the receiver's rows ``asked``."""
    found: list[Ints] = []
    for text in receiver.texts(asked):
        (starts, ends), theirs = receiver.edges(text), sender.edges(text)[1]
        tokens = receiver.tokens(asked, text)
        first = np.searchsorted(theirs, starts[tokens], side="right")
        last = np.searchsorted(theirs, ends[tokens], side="left")
        there = first <= last  # not of tokens that stand for nothing
        change = np.zeros(len(theirs) + 1, np.int64)
        np.add.at(change, first[there], 1)
        np.add.at(change, last[there] + 1, -1)
        found.append(np.flatnonzero(np.cumsum(change)[:-1] > 0) + sender.first[text])
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def translate(
    said: Iterable[TopK],
    rows: Ints,
    asked: Ints,
    sender: Side,
    receiver: Side,
    way: Projector,
    k: int,
    tally: Counts,
) -> Iterator[TopK]:
    """What is said about ``rows`` of the sender's, as answers to ``asked`` rows of the receiver's.

    Args:
        said: The sender's answers to ``rows``, in order, in pieces of any size; a row's likeliest id first.
        rows: Of the sender's blocks, ascending.
        asked: Of the receiver's blocks, ascending.
        sender: Who speaks.
        receiver: Who listens.
        way: From the sender's vocabulary to the receiver's.
        k: Entries that an answer keeps.
        tally: Counts what is projected.

    Returns:
        One piece for each text, all together in the order of ``asked``; rows of which too little is known
        are without an opinion (``abstentions``).

    Memory: A text's rows, and the largest piece of ``said``.
    """
    texts = receiver.texts(asked)
    about = [sender.tokens(rows, text) for text in texts]
    for text, predicted, piece in zip(texts, about, _cut(said, list(map(len, about))), strict=True):
        begun = time.perf_counter()
        tokens = receiver.tokens(asked, text)
        made = abstentions(len(tokens), k, receiver.vocab_size)
        tally.rows += len(tokens)
        if piece is not None:
            found = way(
                piece,
                sender.readings[text],
                receiver.readings[text],
                predicted=predicted,
                # Not k: a row that k cuts short is no row that says little.
                k=max(k, min(piece.ids.shape[1], receiver.vocab_size)),
                vocab_size=receiver.vocab_size,
            )
            short = _shortened(found.rows, k)
            good = found.answered[tokens]
            at = torch.from_numpy(np.flatnonzero(good))
            of = torch.from_numpy((np.cumsum(found.answered) - 1)[tokens[good]])
            made.ids[at], made.log_probs[at] = short.ids[of], short.log_probs[of]
            made.log_tail[at] = short.log_tail[of]
            tally.answered += int(good.sum())
            tally.coverage += float(found.coverage[tokens].sum())
        tally.seconds += time.perf_counter() - begun
        yield made


class Translation:
    """Between a client's tokenizer and the student's, about the proxy texts."""

    def __init__(
        self, client: Side, student: Side, folder: Path, alignment: Literal["spans", "mined"] = "spans"
    ):
        """``folder``: where maps are kept."""
        self.client, self.student, self._folder = client, student, folder
        self._alignment = alignment
        self.tally = Counts()

    @cached_property
    def _there(self) -> Projector:
        return self._way(self.client.vocabulary, self.student.vocabulary)

    @cached_property
    def _back(self) -> Projector:
        return self._way(self.student.vocabulary, self.client.vocabulary)

    def _way(self, sender: Vocabulary, receiver: Vocabulary) -> Projector:
        if self._alignment == "mined":
            return by_edit_distance(sender, receiver)
        return by_spans(sender, receiver, self._folder)

    def rows(self, asked: Ints) -> Ints:
        """Which of the client's rows it takes to answer ``asked`` rows of the student's."""
        return needed(asked, self.student, self.client)

    def answers(self, said: Iterable[TopK], rows: Ints, asked: Ints, k: int) -> Iterator[TopK]:
        """The client's answers to ``rows`` as answers to ``asked`` rows of the student's."""
        return translate(said, rows, asked, self.client, self.student, self._there, k, self.tally)

    def taught_by(self, asked: Ints) -> Ints:
        """Which of the student's rows it takes to teach the client's ``asked`` rows."""
        return needed(asked, self.client, self.student)

    def teacher(self, said: TopK, rows: Ints, asked: Ints, k: int) -> tuple[TopK, Ints]:
        """The teacher's answers to ``rows`` of the student's, to those of the client's ``asked`` rows that
        they say enough about; and which these are."""
        parts = translate([said], rows, asked, self.student, self.client, self._back, k, Counts())
        whole = TopK.cat(list(parts))
        good = answered(whole)
        return whole[good], asked[good.numpy()]

    def counted(self) -> Json:
        """What has been answered since this was asked last."""
        tally, self.tally = self.tally, Counts()
        return tally.record()


def _cut(said: Iterable[TopK], sizes: Sequence[int]) -> Iterator[TopK | None]:
    """Rows in pieces of these sizes; ``None`` for one of nothing."""
    source, held = iter(said), None
    for size in sizes:
        if size == 0:
            yield None
            continue
        parts: list[TopK] = [] if held is None else [held]
        while sum(len(part) for part in parts) < size:
            parts.append(next(source))
        whole = TopK.cat(parts)
        held = whole[size:]
        yield whole[:size]


def _shortened(rows: TopK, k: int) -> TopK:
    """The first ``k`` entries; the others join the tail."""
    rest = torch.cat([rows.log_probs[:, k:], rows.log_tail[:, None]], 1).logsumexp(1)
    return TopK(rows.ids[:, :k], rows.log_probs[:, :k], rest, rows.vocab_size)


def _ended(reading: Reading, end: int) -> Reading:
    """With the end token that stands behind each text."""
    size = len(reading.text)
    return replace(
        reading,
        ids=np.append(reading.ids, np.int32(end)),
        starts=np.append(reading.starts, size),
        ends=np.append(reading.ends, size),
        bare=np.append(reading.bare, False),
        faithful=np.append(reading.faithful, False),
        added=np.append(reading.added, True),
    )
