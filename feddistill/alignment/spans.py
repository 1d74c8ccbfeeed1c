"""Which bytes of a text each token stands for."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from feddistill.alignment.strings import Ints, Strings
from feddistill.alignment.vocabulary import WORDPIECE, Vocabulary

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Reading:
    """A text as a tokenizer reads it: ``n`` tokens."""

    text: bytes
    ids: NDArray[np.int32]
    """``[n]``."""
    starts: Ints
    """``[n]``, the first byte that a token reads. Tokens that stand for no text are empty."""
    ends: Ints
    """``[n]``, behind the last one; never falls. White space between an end and the next start is read by
    no token."""
    bare: Mask
    """``[n]``, whether the token's own bytes begin with a space that the text does not have there."""
    faithful: Mask
    """``[n]``, whether its bytes are what the text says: not where letters lost case or accents, or are
    unknown. A space too many or white space that is not read does not count."""
    added: Mask
    """``[n]``, what the tokenizer put around the text: beginning, end."""

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, tokens: int) -> "Reading":
        """The first so many tokens, of the same text."""
        part = slice(tokens)
        return Reading(
            self.text,
            self.ids[part],
            self.starts[part],
            self.ends[part],
            self.bare[part],
            self.faithful[part],
            self.added[part],
        )


def spans(vocabulary: Vocabulary, text: str, *, special_tokens: bool = True) -> Reading:
    """Read a text, and say which bytes ``[start, end)`` of its UTF-8 each token stands for.

    Where the tokens' own bytes are the text, as with a tokenizer that loses nothing, the spans are their
    lengths added up, so several tokens can share a character.  Where they are not (letters are changed,
    unknown, or white space is dropped), the tokenizer's own offsets in characters say it.

    Args:
        vocabulary: Of the tokenizer.
        text: Any.
        special_tokens: Whether the tokenizer puts its beginning and end around the text.

    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> letters = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    >>> t = Tokenizer(models.BPE(letters, []))
    >>> t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    >>> read = spans(Vocabulary(PreTrainedTokenizerFast(tokenizer_object=t)), "aé")
    >>> read.starts.tolist(), read.ends.tolist()
    ([0, 1, 2], [1, 2, 3])
    """
    encoding = vocabulary.backend.encode(text, add_special_tokens=special_tokens)
    ids = np.array(encoding.ids, np.int32)
    added = np.array(encoding.special_tokens_mask, np.bool_)
    raw = text.encode()
    lengths = np.where(added, 0, vocabulary.strings.lengths[ids])
    tokens = vocabulary.tokens
    inner = ids if not added.any() else ids[~added]
    joined = b"".join(tokens[i] or b"" for i in inner.tolist())
    extra = 1 if joined != raw and joined[:1] == b" " and joined[1:] == raw else 0
    if len(joined) == len(raw) + extra and joined[extra:] == raw and vocabulary.kind != WORDPIECE:
        ends = np.maximum(np.cumsum(lengths) - extra, 0)
        starts = np.concatenate([[0], ends])[: len(ends)].astype(np.int64)
        bare = np.zeros(len(ids), np.bool_)
        bare[np.flatnonzero(~added)[:extra]] = True
        return Reading(raw, ids, starts, ends, bare, ~added, added)
    starts, ends = _offsets(encoding.offsets, text, lengths, added)
    bare, faithful = _compare(vocabulary, raw, ids, starts, ends)
    return Reading(raw, ids, starts, ends, bare & ~added, faithful & ~added, added)


def _offsets(offsets: list[tuple[int, int]], text: str, lengths: Ints, added: Mask) -> tuple[Ints, Ints]:
    """Offsets in characters to bytes; within a character by the tokens' lengths."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    bytes_before = np.concatenate([[0], np.cumsum(sizes)])
    pairs = np.array(offsets, np.int64).reshape(-1, 2)
    starts, ends = bytes_before[pairs[:, 0]], bytes_before[pairs[:, 1]]
    # What stands around the text is where its neighbour ends or the text begins.
    ends = np.maximum.accumulate(np.where(added, 0, ends))
    starts = np.where(added, ends, starts)
    # Tokens that share a character overlap: a chain of them.
    shared = np.concatenate([[False], (starts[1:] < ends[:-1]) & ~added[1:]])
    if shared.any():
        chain = np.cumsum(~shared) - 1
        first = np.flatnonzero(~shared)
        last = np.concatenate([first[1:], [len(shared)]]) - 1
        within = np.cumsum(lengths)
        within = within - (within[first] - lengths[first])[chain]
        exact = (starts[first] + within[last] == ends[last])[chain]
        inner = np.isin(np.arange(len(shared)), last, invert=True) & (first != last)[chain]
        ends = np.where(inner, np.where(exact, starts[first][chain] + within, ends[last][chain]), ends)
        starts = np.where(shared, np.concatenate([[0], ends])[: len(ends)], starts)
    return np.minimum(starts, ends), ends


def _compare(
    vocabulary: Vocabulary, raw: bytes, ids: NDArray[np.int32], starts: Ints, ends: Ints
) -> tuple[Mask, Mask]:
    """Which tokens have a space too many, and which are what the text says."""
    text, zero = Strings([raw]), np.zeros(len(ids), np.int64)
    which = ids.astype(np.int64)
    lengths = vocabulary.strings.lengths[which]
    spaced = vocabulary.spaced[which] & (lengths > 0)
    before = np.concatenate([[0], ends])[: len(ends)].astype(np.int64)
    if vocabulary.kind == WORDPIECE:
        bare = spaced & (before == starts)
        skip = spaced.astype(np.int64)
    else:
        starts = before
        byte = np.frombuffer(raw + b"\0", np.uint8)[np.minimum(starts, len(raw))]
        bare = spaced & ((byte != ord(" ")) | (starts == ends))
        skip = bare.astype(np.int64)
    said = vocabulary.strings.hash(which, skip, lengths)
    read = text.hash(zero, starts, ends)
    return bare, (lengths > 0) & (said == read) & (lengths - skip == ends - starts)
