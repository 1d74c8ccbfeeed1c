"""Project a model's predictions over its own tokens to the tokens of another model."""

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
from feddistill.store.run_directory import Json
from feddistill.types import TextSet
from feddistill_kernels import TopK

Ints = NDArray[np.int64]

FEWEST = 64
"""The fewest entries that a row keeps before it is projected: mass in the tail cannot be projected."""


def kept_before(k: int, vocab_size: int) -> int:
    """Entries that a row keeps before it is projected to ``k``: several of them may map to one id.

    >>> kept_before(4, 300), kept_before(32, 300), kept_before(128, 300)
    (64, 128, 300)
    """
    return min(max(4 * k, FEWEST), vocab_size)


@dataclass
class Counts:
    """Statistics of projections."""

    rows: int = 0
    answered: int = 0
    coverage: float = 0.0
    """Sum over rows of the share of the mass that is kept."""
    seconds: float = 0.0

    def record(self) -> Json:
        """As JSON; ``answered`` is the share of rows with a prediction, ``coverage`` a mean over rows."""
        count = max(self.rows, 1)
        return {
            "rows": self.rows,
            "answered": round(self.answered / count, 6),
            "coverage": round(self.coverage / count, 6),
            "seconds": round(self.seconds, 3),
        }


class Side:
    """The texts as one of the two models reads them."""

    def __init__(self, reader: TextReader, texts: TextSet, blocks: PackedTexts, name: str):
        """Take ``texts`` packed into ``blocks`` of any length; ``name`` is the setting that errors name."""
        self.vocabulary = Vocabulary(reader.tokenizer, name)
        self.vocab_size, self.blocks = reader.vocab_size, blocks
        if len(self.vocabulary) > self.vocab_size:
            raise ModelError(
                f"{name}: its tokenizer has ids up to {len(self.vocabulary) - 1}, but only {self.vocab_size} "
                "tokens; one with gaps cannot be projected"
            )
        end = reader.bounds.end
        self.readings = [_ended(spans(self.vocabulary, t, special_tokens=False), end) for t in texts.texts]
        # Row r predicts token r + 1 of the stream. A start token before a text is not in its reading.
        lengths = np.array([len(reading) for reading in self.readings])
        stops = np.searchsorted(blocks.texts, np.arange(len(texts)), side="right")
        self.first: Ints = stops - lengths - 1
        """``[N]``, the row that predicts each text's first token; -1 if there is none."""
        self.predicts_first = reader.bounds.start is not None
        ids = np.concatenate([reading.ids for reading in self.readings])
        own = np.repeat(self.first + 1 - (np.cumsum(lengths) - lengths), lengths) + np.arange(len(ids))
        if self.first.min() < -1 or not np.array_equal(ids, blocks.stream[own]):
            raise ModelError(f"{name}: its tokenizer splits a text differently when byte spans are requested")

    def edges(self, text: int) -> tuple[Ints, Ints]:
        """``[n]`` first byte and end of each token of a text; the end token has one byte after the text."""
        ends = self.readings[text].ends.copy()
        ends[-1] += 1
        return np.concatenate([[0], ends[:-1]]), ends

    def texts(self, rows: Ints) -> list[int]:
        """The texts that ``rows`` predict tokens of."""
        numbers: list[int] = np.unique(self.blocks.texts[rows + 1]).tolist()
        return numbers

    def tokens(self, rows: Ints, text: int) -> Ints:
        """The tokens of a text that ``rows``, which ascend, predict."""
        first = int(self.first[text])
        start, stop = np.searchsorted(rows, [first, first + len(self.readings[text])])
        return np.asarray(rows[start:stop] - first)


class Projector(Protocol):
    """A projection from one vocabulary to another: ``project`` of a map, or ``mined_project``."""

    def __call__(
        self,
        answers: TopK,
        source: Reading,
        target: Reading,
        /,
        *,
        predicted: Ints,
        k: int,
        vocab_size: int,
    ) -> Projection:
        """Project predictions of the source's tokens to the target's."""


def by_spans(source: Vocabulary, target: Vocabulary, folder: Path) -> Projector:
    """Project by the bytes that tokens cover; ``folder`` keeps the vocabulary maps."""
    return partial(project, mapped=map_vocabulary(source, target, folder))


def by_edit_distance(source: Vocabulary, target: Vocabulary) -> Projector:
    """Project as FedMKT does: by edit distances between ids and between the tokens of a text."""
    return partial(mined_project, mapped=mined_map(source, target), vocabularies=(source, target))


def overlapping(rows: Ints, target: Side, source: Side) -> Ints:
    """The source's rows for tokens that share a byte with the tokens of the target's ``rows``."""
    parts: list[Ints] = []
    for text in target.texts(rows):
        (starts, ends), source_ends = target.edges(text), source.edges(text)[1]
        tokens = target.tokens(rows, text)
        first = np.searchsorted(source_ends, starts[tokens], side="right")
        last = np.searchsorted(source_ends, ends[tokens], side="left")
        nonempty = first <= last  # False for tokens without bytes
        change = np.zeros(len(source_ends) + 1, np.int64)
        np.add.at(change, first[nonempty], 1)
        np.add.at(change, last[nonempty] + 1, -1)
        needed = np.flatnonzero(np.cumsum(change)[:-1] > 0)
        unpredicted = 0 if source.predicts_first else 1
        parts.append(needed[needed >= unpredicted] + source.first[text])
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def translate(
    predictions: Iterable[TopK],
    source_rows: Ints,
    target_rows: Ints,
    source: Side,
    target: Side,
    projector: Projector,
    k: int,
    counts: Counts,
) -> Iterator[TopK]:
    """Project predictions of ``source_rows`` to predictions of ``target_rows``.

    Args:
        predictions: Of ``source_rows``, in order, in parts of any size; a row's likeliest id comes first.
        source_rows: Rows of the source's blocks, ascending.
        target_rows: Rows of the target's blocks, ascending.
        source: The texts as the predicting model reads them.
        target: The texts as the other model reads them.
        projector: From the source's vocabulary to the target's.
        k: Entries per projected row.
        counts: Updated with what is projected.

    Returns:
        One part for each text, together in the order of ``target_rows``; rows for which too little mass is
        known abstain.

    Memory: A text's rows, and the largest part of ``predictions``.
    """
    texts = target.texts(target_rows)
    per_text = [source.tokens(source_rows, text) for text in texts]
    parts = _split(predictions, list(map(len, per_text)))
    for text, predicted, part in zip(texts, per_text, parts, strict=True):
        begun = time.perf_counter()
        tokens = target.tokens(target_rows, text)
        rows = abstentions(len(tokens), k, target.vocab_size)
        counts.rows += len(tokens)
        if part is not None:
            projected = projector(
                part,
                source.readings[text],
                target.readings[text],
                predicted=predicted,
                # Not k: entries that k cuts off do not make a row one with little mass.
                k=max(k, min(part.ids.shape[1], target.vocab_size)),
                vocab_size=target.vocab_size,
            )
            short = _shortened(projected.rows, k)
            good = projected.answered[tokens]
            to = torch.from_numpy(np.flatnonzero(good))
            origin = torch.from_numpy((np.cumsum(projected.answered) - 1)[tokens[good]])
            rows.ids[to], rows.log_probs[to] = short.ids[origin], short.log_probs[origin]
            rows.log_tail[to] = short.log_tail[origin]
            counts.answered += int(good.sum())
            counts.coverage += float(projected.coverage[tokens].sum())
        counts.seconds += time.perf_counter() - begun
        yield rows


class Translation:
    """Projections of predictions of the proxy texts between a client's tokenizer and the student's."""

    def __init__(
        self, client: Side, student: Side, folder: Path, alignment: Literal["spans", "mined"] = "spans"
    ):
        """Keep vocabulary maps in ``folder``."""
        self.client, self.student, self._folder = client, student, folder
        self._alignment = alignment
        self.counts = Counts()

    @cached_property
    def _to_student(self) -> Projector:
        return self._projector(self.client.vocabulary, self.student.vocabulary)

    @cached_property
    def _to_client(self) -> Projector:
        return self._projector(self.student.vocabulary, self.client.vocabulary)

    def _projector(self, source: Vocabulary, target: Vocabulary) -> Projector:
        if self._alignment == "mined":
            return by_edit_distance(source, target)
        return by_spans(source, target, self._folder)

    def client_rows(self, rows: Ints) -> Ints:
        """The client's rows that are needed to predict ``rows`` of the student."""
        return overlapping(rows, self.student, self.client)

    def answers(self, predictions: Iterable[TopK], own: Ints, rows: Ints, k: int) -> Iterator[TopK]:
        """The client's predictions of its rows ``own`` as predictions of the student's ``rows``."""
        return translate(predictions, own, rows, self.client, self.student, self._to_student, k, self.counts)

    def student_rows(self, own: Ints) -> Ints:
        """The student's rows that are needed to teach the client's rows ``own``."""
        return overlapping(own, self.client, self.student)

    def teacher(self, predictions: TopK, rows: Ints, own: Ints, k: int) -> tuple[TopK, Ints]:
        """The teacher's predictions of the student's ``rows``, projected to the client's rows ``own``.

        Returns:
            Predictions of the client's rows with enough mass, and these rows.
        """
        parts = translate([predictions], rows, own, self.student, self.client, self._to_client, k, Counts())
        whole = TopK.cat(list(parts))
        good = answered(whole)
        return whole[good], own[good.numpy()]

    def counted(self) -> Json:
        """Statistics of ``answers`` since the last call."""
        counts, self.counts = self.counts, Counts()
        return counts.record()


def _split(predictions: Iterable[TopK], sizes: Sequence[int]) -> Iterator[TopK | None]:
    """Rows in parts of these sizes; ``None`` for an empty part."""
    source, held = iter(predictions), None
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
    """The first ``k`` entries; the mass of the others joins the tail."""
    rest = torch.cat([rows.log_probs[:, k:], rows.log_tail[:, None]], 1).logsumexp(1)
    return TopK(rows.ids[:, :k], rows.log_probs[:, :k], rest, rows.vocab_size)


def _ended(reading: Reading, end: int) -> Reading:
    """The reading with the end token after the text."""
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
