"""A question on a passage as model input, and the characters of the passage that each token covers.

Predictions about where an answer begins and ends are over characters, so that models with different
tokenizers can exchange them. ``T`` is the number of tokens of a window.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from feddistill.errors import ModelError

Ints = NDArray[np.int64]

NOWHERE = -1
"""Marks a character or a token that does not exist in the window."""
FEWEST = 8
"""Tokens of the passage that must fit behind the question."""


@dataclass(frozen=True, slots=True)
class QAWindow:
    """A question, and as much of its passage as the model reads at once."""

    ids: list[int]
    """``T`` token ids."""
    types: list[int]
    """``T`` token types: 0 for the question, 1 for the passage."""
    starts: Ints
    """``[T]``, the first character of the passage that a token covers; ``NOWHERE`` for tokens outside the
    passage and for white space."""
    ends: Ints
    """``[T]``, one past the last character that a token covers."""
    no_answer: int = NOWHERE
    """The token that stands for "no answer"; ``NOWHERE`` if every question must have an answer."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def passage(self) -> NDArray[np.bool_]:
        """``[T]``, True for tokens that an answer may begin or end with."""
        return np.asarray(self.starts != NOWHERE)

    @property
    def choices(self) -> NDArray[np.bool_]:
        """``[T]``, True for tokens of the passage and for the "no answer" token, if there is one."""
        chosen = self.passage
        if self.no_answer != NOWHERE:
            chosen[self.no_answer] = True
        return chosen

    def first(self, characters: Ints) -> Ints:
        """The tokens that hold the first characters of answers; ``NOWHERE`` for characters cut off."""
        return self._token(characters, np.searchsorted(self.ends[self.passage], characters, side="right"))

    def last(self, characters: Ints) -> Ints:
        """The tokens that hold the last characters of answers; ``NOWHERE`` for characters cut off."""
        return self._token(
            characters, np.searchsorted(self.starts[self.passage], characters, side="right") - 1
        )

    def _token(self, characters: Ints, index: Ints) -> Ints:
        tokens = np.flatnonzero(self.passage)
        inside = (index >= 0) & (index < len(tokens)) & (characters >= 0)
        inside &= characters < self.ends[tokens[-1]]
        return np.where(inside, tokens[np.clip(index, 0, len(tokens) - 1)], NOWHERE)


def windows(
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    passage: str,
    length: int,
    name: str,
    *,
    overlap: int = 0,
    unanswerable: bool = False,
) -> list[QAWindow]:
    """Encode a question and its passage as windows of up to ``length`` tokens that cover the passage.

    Args:
        tokenizer: The model's.
        question: Repeated in each window.
        passage: The text with the answer.
        length: Tokens of a window.
        name: The model's name in errors.
        overlap: Tokens of the passage that two windows share, at most half a window.
        unanswerable: True if the model may predict that there is no answer.

    Raises:
        ModelError: The tokenizer is not a fast one, or has no cls token for ``unanswerable``; the question
            leaves no room for its passage, or the passage has no tokens.
    """
    if not tokenizer.is_fast:
        raise ModelError(f"{name} needs a fast tokenizer (one with offset mapping)")
    question_ids: Any = tokenizer(question, add_special_tokens=False, verbose=False).input_ids
    room = length - len(question_ids) - tokenizer.num_special_tokens_to_add(pair=True)
    if room < FEWEST:
        raise ModelError(
            f"{name} reads {length} tokens; a question of {len(question_ids)} leaves no room for its "
            f"passage: {question[:60]!r}"
        )
    encoded: Any = tokenizer(
        question,
        passage,
        truncation="only_second",
        max_length=length,
        stride=min(overlap, room // 2),
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_token_type_ids=True,
        verbose=False,
    )
    made = []
    columns = (encoded.input_ids, encoded.token_type_ids, encoded.offset_mapping)
    for index, (ids, types, offsets) in enumerate(zip(*columns, strict=True)):
        spans = [
            _trimmed(passage, *edges) if part == 1 else (NOWHERE, NOWHERE)
            for part, edges in zip(encoded.sequence_ids(index), offsets, strict=True)
        ]
        starts, ends = np.array(spans, np.int64).T
        no_answer = _no_answer(tokenizer, ids, name) if unanswerable else NOWHERE
        made.append(QAWindow(list(ids), list(types), starts, ends, no_answer))
    if not made[0].passage.any():
        raise ModelError(f"{name}: its tokenizer makes no tokens of the passage {passage[:60]!r}")
    return made


def likeliest(start: Tensor, end: Tensor, window: QAWindow, longest: int) -> tuple[float, int, int]:
    """The span with the largest ``start[i] + end[j]`` over ``i <= j < i + longest`` within the passage.

    Devlin et al., NAACL 2019, section 4.2.

    Args:
        start: ``[T]``, logits.
        end: ``[T]``, logits.
        window: The input that the logits are about.
        longest: Tokens of an answer at most.

    Returns:
        The sum, the first and the last token; the earliest of equal spans.
    """
    passage = torch.from_numpy(window.passage)
    total = start.double()[:, None] + end.double()[None, :]
    positions = torch.arange(len(window))
    length = positions[None, :] - positions[:, None]
    allowed = (length >= 0) & (length < longest) & passage[:, None] & passage[None, :]
    total = total.masked_fill(~allowed, -torch.inf)
    first, last = divmod(int(total.argmax()), len(window))
    return float(total[first, last]), first, last


def _trimmed(passage: str, start: int, end: int) -> tuple[int, int]:
    """The span without white space at either end, which only some tokenizers include in a token."""
    text = passage[start:end]
    if not text.strip():
        return NOWHERE, NOWHERE
    return start + len(text) - len(text.lstrip()), end - (len(text) - len(text.rstrip()))


def _no_answer(tokenizer: PreTrainedTokenizerBase, ids: list[int], name: str) -> int:
    if tokenizer.cls_token_id not in ids:
        raise ModelError(f'{name}: its tokenizer has no cls token, which stands for "no answer"')
    return ids.index(tokenizer.cls_token_id)
