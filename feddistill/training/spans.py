"""What a model that points at answers learns: where they begin and end, a teacher's answers, or both.

``N`` pages, ``T`` tokens of one. What a teacher says of characters is said here of tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from feddistill.modelio.passages import NOWHERE, QAWindow
from feddistill.store.logit_files import Chained, TopKFile
from feddistill.training.blocks import NOT_TAUGHT
from feddistill.types import NO_LABEL, Span
from feddistill_kernels import TopK

NEVER = -1e4
"""The logarithm of no probability, which is finite so that its gradient is 0 and not nothing."""

NO_ANSWER = 0
"""The id that says that there is no answer; that of a character is one more than its place in the passage."""


@dataclass(frozen=True, slots=True)
class SpanExamples:
    """What is to be learned."""

    pages: Sequence[QAWindow]
    labels: Tensor
    """``[N, 2]``, the first and the last token of the answer; ``NO_LABEL`` where it is not known, or not
    read."""
    teacher: TopK | TopKFile | Chained | None = None
    """Two rows a question, over characters: where its answer begins, and where it ends."""
    taught: Tensor | None = None
    """``[N]``, which pair of rows of ``teacher`` answers; ``NOT_TAUGHT`` where none does."""

    @property
    def tokens(self) -> list[list[int]]:
        """Of each page."""
        return [page.ids for page in self.pages]


def ids_of(right: Sequence[Span] | None) -> tuple[int, int]:
    """What answers say where the first of the ``right`` ones begins and ends; negative where none is known.

    >>> ids_of(((3, 8), (3, 6))), ids_of(()), ids_of(None)
    ((4, 8), (0, 0), (-1, -1))
    """
    if right is None:
        return -1, -1
    return (right[0][0] + 1, right[0][1]) if right else (NO_ANSWER, NO_ANSWER)


def places_of(pages: Sequence[QAWindow], right: Sequence[Sequence[Span] | None]) -> Tensor:
    """``[N, 2]`` labels of pages whose answers are known, or ``None``."""
    found = torch.full((len(pages), 2), NO_LABEL)
    for row, (page, spans) in enumerate(zip(pages, right, strict=True)):
        tokens = _tokens(page, np.array([ids_of(spans)]).T)[:, 0]
        if (tokens != NOWHERE).all():
            found[row] = torch.from_numpy(tokens)
    return found


def said_of_tokens(rows: TopK, page: QAWindow) -> Tensor:
    """Log-probabilities ``[2, T]``, float32, of two rows over characters; ``NEVER`` where there is none.

    What is said of characters that are not read, and the tail, may be any of the tokens.
    """
    ids, mass = rows.ids.numpy().astype(np.int64), rows.log_probs.double().exp().numpy()
    tokens = _tokens(page, ids)
    lost = tokens == NOWHERE
    rest = rows.log_tail.double().exp().numpy() + (mass * lost).sum(1)
    choices = page.choices
    found = np.where(choices, rest[:, None] / choices.sum(), 0.0)
    for row in range(2):
        np.add.at(found[row], tokens[row][~lost[row]], mass[row][~lost[row]])
    found /= found.sum(1, keepdims=True)
    logs = np.log(np.where(found > 0, found, 1.0))
    return torch.from_numpy(np.where(found > 0, logs, NEVER).astype(np.float32))


def hardened(lessons: SpanExamples) -> SpanExamples:
    """The tokens that the teacher finds likeliest in the place of the labels of those it answers."""
    assert isinstance(lessons.teacher, TopK), "in memory"
    assert lessons.taught is not None, "which questions it answers"
    labels = lessons.labels.clone()
    for row in (lessons.taught != NOT_TAUGHT).nonzero()[:, 0].tolist():
        pair = 2 * int(lessons.taught[row])
        labels[row] = said_of_tokens(lessons.teacher[pair : pair + 2], lessons.pages[row]).argmax(1)
    return SpanExamples(lessons.pages, labels)


def together(own: SpanExamples, more: SpanExamples) -> SpanExamples:
    """Questions that only have labels, and then those of ``more``."""
    assert own.teacher is None, "one teacher"
    taught = None
    if more.taught is not None:
        taught = torch.cat([torch.full((len(own.pages),), NOT_TAUGHT), more.taught])
    return SpanExamples([*own.pages, *more.pages], torch.cat([own.labels, more.labels]), more.teacher, taught)


def _tokens(
    page: QAWindow, ids: np.ndarray[tuple[int, ...], np.dtype[np.int64]]
) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """``[2, n]`` ids of characters, of first ones and of last ones, as tokens."""
    found = np.stack([page.first(ids[0] - 1), page.last(ids[1] - 1)])
    return np.where(ids == NO_ANSWER, page.none, found)
