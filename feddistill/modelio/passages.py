"""A question on a passage as a model reads it, and which characters of the passage its tokens stand for.

What is said about where an answer begins and ends is said of characters: so models need not have one
tokenizer to speak of the same. ``T`` tokens of a page.
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
"""In the place of a character or a token."""
FEWEST = 8
"""Tokens of the passage that have to fit behind the question."""


@dataclass(frozen=True, slots=True)
class QAWindow:
    """A question, and as much of its passage as the model reads at once."""

    ids: list[int]
    """``T``."""
    types: list[int]
    """``T``: 0 of the question, 1 of the passage."""
    starts: Ints
    """``[T]``, the first character of the passage that a token stands for; ``NOWHERE`` where it is none of
    it, or white space."""
    ends: Ints
    """``[T]``, the character behind the last."""
    none: int = NOWHERE
    """The token that is pointed at where there is no answer; ``NOWHERE`` if that cannot be."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def passage(self) -> NDArray[np.bool_]:
        """``[T]``, which tokens an answer may begin or end with."""
        return np.asarray(self.starts != NOWHERE)

    @property
    def choices(self) -> NDArray[np.bool_]:
        """``[T]``, the same and, where there is one, the token that says that there is no answer."""
        found = self.passage
        if self.none != NOWHERE:
            found[self.none] = True
        return found

    def first(self, characters: Ints) -> Ints:
        """The tokens that hold the first characters of answers; ``NOWHERE`` for what is not read."""
        return self._token(characters, np.searchsorted(self.ends[self.passage], characters, side="right"))

    def last(self, characters: Ints) -> Ints:
        """The tokens that hold the last characters of answers; ``NOWHERE`` for what is not read."""
        return self._token(
            characters, np.searchsorted(self.starts[self.passage], characters, side="right") - 1
        )

    def _token(self, characters: Ints, place: Ints) -> Ints:
        tokens = np.flatnonzero(self.passage)
        read = (place >= 0) & (place < len(tokens)) & (characters >= 0)
        read &= characters < self.ends[tokens[-1]]
        return np.where(read, tokens[np.clip(place, 0, len(tokens) - 1)], NOWHERE)


def pages(
    tokenizer: PreTrainedTokenizerBase,
    question: str,
    passage: str,
    length: int,
    name: str,
    *,
    overlap: int = 0,
    unanswerable: bool = False,
) -> list[QAWindow]:
    """A question and its passage, on as many pages of up to ``length`` tokens as the passage takes.

    Args:
        tokenizer: The model's.
        question: What is asked; it stands on each page.
        passage: What is read.
        length: Tokens of a page.
        name: What errors call the model.
        overlap: Tokens that two pages share, where half a page is more.
        unanswerable: Whether it can be said that there is no answer.

    Raises:
        ModelError: A tokenizer that does not say where its tokens are, or has no token for ``unanswerable``;
            a question that leaves no room for its passage, or a passage that is nothing.
    """
    if not tokenizer.is_fast:
        raise ModelError(f"{name}: its tokenizer does not say where tokens are, as a fast one does")
    asked: Any = tokenizer(question, add_special_tokens=False, verbose=False)["input_ids"]
    room = length - len(asked) - tokenizer.num_special_tokens_to_add(pair=True)
    if room < FEWEST:
        raise ModelError(
            f"{name} reads {length} tokens; a question of {len(asked)} leaves no room for its passage: "
            f"{question[:60]!r}"
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
    found = []
    for at, ids in enumerate(encoded["input_ids"]):
        types = [int(part == 1) for part in encoded.sequence_ids(at)]
        places = [
            _trimmed(passage, *edges) if of else (NOWHERE, NOWHERE)
            for of, edges in zip(types, encoded["offset_mapping"][at], strict=True)
        ]
        starts, ends = np.array(places, np.int64).T
        none = _none(tokenizer, ids, name) if unanswerable else NOWHERE
        found.append(QAWindow(list(ids), list(encoded["token_type_ids"][at]), starts, ends, none))
    if not found[0].passage.any():
        raise ModelError(f"{name}: its tokenizer reads nothing of the passage {passage[:60]!r}")
    return found


def likeliest(start: Tensor, end: Tensor, page: QAWindow, longest: int) -> tuple[float, int, int]:
    """The span of most ``start[i] + end[j]`` among ``i <= j < i + longest``, both tokens of the passage.

    Devlin et al., NAACL 2019, section 4.2.

    Args:
        start: ``[T]``, logits.
        end: ``[T]``, logits.
        page: Whose tokens they are about.
        longest: Tokens of an answer at most.

    Returns:
        The sum, and the first and the last token; the earliest of several.
    """
    of = torch.from_numpy(page.passage)
    total = start.double()[:, None] + end.double()[None, :]
    places = torch.arange(len(page))
    length = places[None, :] - places[:, None]
    allowed = (length >= 0) & (length < longest) & of[:, None] & of[None, :]
    total = total.masked_fill(~allowed, -torch.inf)
    first, last = divmod(int(total.argmax()), len(page))
    return float(total[first, last]), first, last


def _trimmed(passage: str, start: int, end: int) -> tuple[int, int]:
    """Without white space at either end, which some tokens have and others not."""
    text = passage[start:end]
    if not text.strip():
        return NOWHERE, NOWHERE
    return start + len(text) - len(text.lstrip()), end - (len(text) - len(text.rstrip()))


def _none(tokenizer: PreTrainedTokenizerBase, ids: list[int], name: str) -> int:
    if tokenizer.cls_token_id not in ids:
        raise ModelError(f"{name}: its tokenizer has no cls token, which says that there is no answer")
    return ids.index(tokenizer.cls_token_id)
