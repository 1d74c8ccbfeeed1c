"""Training examples of question answering: where answers begin and end, a teacher's predictions, or both.

``N`` windows of ``T`` tokens. A teacher's predictions over characters are projected to tokens here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from feddistill.modelio.passages import NOWHERE, QAWindow
from feddistill.store.logit_files import Chained, TopKFile
from feddistill.training.blocks import NO_TEACHER
from feddistill.types import NO_LABEL, Span
from feddistill_kernels import TopK

NEVER = -1e4
"""The logarithm of probability zero; finite, so that its gradient is 0 and not NaN."""

NO_ANSWER = 0
"""The id of "no answer"; the id of a character is its index in the passage plus one."""


@dataclass(frozen=True, slots=True)
class SpanExamples:
    """``N`` questions, each with an answer, a teacher's prediction, or both."""

    windows: Sequence[QAWindow]
    labels: Tensor
    """``[N, 2]``, first and last token of the answer; ``NO_LABEL`` if it is unknown or cut off."""
    teacher: TopK | TopKFile | Chained | None = None
    """Two rows a question, over characters: the answer's start and its end."""
    teacher_rows: Tensor | None = None
    """``[N]``, index of the question's pair of rows in ``teacher``; ``NO_TEACHER`` without one."""

    @property
    def tokens(self) -> list[list[int]]:
        """Token ids of each window."""
        return [window.ids for window in self.windows]


def ids_of(right: Sequence[Span] | None) -> tuple[int, int]:
    """The ids of the start and the end of the first right answer; negative if it is unknown.

    >>> ids_of(((3, 8), (3, 6))), ids_of(()), ids_of(None)
    ((4, 8), (0, 0), (-1, -1))
    """
    if right is None:
        return -1, -1
    return (right[0][0] + 1, right[0][1]) if right else (NO_ANSWER, NO_ANSWER)


def token_labels(windows: Sequence[QAWindow], right: Sequence[Sequence[Span] | None]) -> Tensor:
    """``[N, 2]`` first and last tokens of the right answers; ``None`` is an unknown answer."""
    labels = torch.full((len(windows), 2), NO_LABEL)
    for row, (window, spans) in enumerate(zip(windows, right, strict=True)):
        tokens = _tokens(window, np.array([ids_of(spans)]).T)[:, 0]
        if (tokens != NOWHERE).all():
            labels[row] = torch.from_numpy(tokens)
    return labels


def token_log_probs(rows: TopK, window: QAWindow) -> Tensor:
    """Log-probabilities ``[2, T]``, float32, of two rows over characters; ``NEVER`` for probability zero.

    The mass of the tail and of characters outside the window is spread evenly over the window's tokens.
    """
    ids, mass = rows.ids.numpy().astype(np.int64), rows.log_probs.double().exp().numpy()
    tokens = _tokens(window, ids)
    lost = tokens == NOWHERE
    rest = rows.log_tail.double().exp().numpy() + (mass * lost).sum(1)
    choices = window.choices
    probs = np.where(choices, rest[:, None] / choices.sum(), 0.0)
    for row in range(2):
        np.add.at(probs[row], tokens[row][~lost[row]], mass[row][~lost[row]])
    probs /= probs.sum(1, keepdims=True)
    logs = np.log(np.where(probs > 0, probs, 1.0))
    return torch.from_numpy(np.where(probs > 0, logs, NEVER).astype(np.float32))


def with_hard_targets(examples: SpanExamples) -> SpanExamples:
    """Replace the labels of questions that have a teacher by the teacher's likeliest tokens."""
    assert isinstance(examples.teacher, TopK), "in memory"
    assert examples.teacher_rows is not None, "which questions have a teacher"
    labels = examples.labels.clone()
    for row in (examples.teacher_rows != NO_TEACHER).nonzero()[:, 0].tolist():
        first = 2 * int(examples.teacher_rows[row])
        labels[row] = token_log_probs(examples.teacher[first : first + 2], examples.windows[row]).argmax(1)
    return SpanExamples(examples.windows, labels)


def concatenate(own: SpanExamples, more: SpanExamples) -> SpanExamples:
    """Questions with labels alone, then those of ``more``."""
    assert own.teacher is None, "only the second has a teacher"
    teacher_rows = None
    if more.teacher_rows is not None:
        teacher_rows = torch.cat([torch.full((len(own.windows),), NO_TEACHER), more.teacher_rows])
    windows, labels = [*own.windows, *more.windows], torch.cat([own.labels, more.labels])
    return SpanExamples(windows, labels, more.teacher, teacher_rows)


def _tokens(
    window: QAWindow, ids: np.ndarray[tuple[int, ...], np.dtype[np.int64]]
) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """``[2, n]`` ids of first and of last characters, as tokens."""
    tokens = np.stack([window.first(ids[0] - 1), window.last(ids[1] - 1)])
    return np.where(ids == NO_ANSWER, window.no_answer, tokens)
