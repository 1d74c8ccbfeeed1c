"""The bytes of a text that each token covers."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from feddistill.alignment.strings import Ints, Strings
from feddistill.alignment.vocabulary import WORDPIECE, Vocabulary

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Reading:
    """A text as a tokenizer reads it, ``n`` tokens."""

    text: bytes
    ids: NDArray[np.int32]
    """``[n]``."""
    starts: Ints
    """``[n]``, the first byte of each token. Tokens without text are empty."""
    ends: Ints
    """``[n]``, one past the last byte; never decreases. White space between an end and the next start belongs
    to no token."""
    bare: Mask
    """``[n]``, True if the token's own bytes begin with a space that is not in the text."""
    faithful: Mask
    """``[n]``, True if the token's bytes are the text's: False if letters lost case or accents, or are
    unknown. An extra space and skipped white space do not matter."""
    added: Mask
    """``[n]``, True for tokens that the tokenizer adds around the text."""

    def __len__(self) -> int:
        return len(self.ids)

    def cut(self, tokens: int) -> "Reading":
        """The reading with only the first ``tokens`` tokens."""
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
    """Tokenize a text, and find the bytes ``[start, end)`` of its UTF-8 that each token covers.

    If the tokens' own bytes are the text, as with a lossless tokenizer, spans follow from their lengths, so
    that several tokens can share a character.  If not (letters are changed or unknown, or white space is
    dropped), they follow from the tokenizer's offsets in characters.

    Args:
        vocabulary: Of the tokenizer.
        text: Any text.
        special_tokens: True to let the tokenizer add its tokens around the text.

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
    """Convert offsets in characters to bytes; inside a character, the tokens' lengths decide."""
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    bytes_before = np.concatenate([[0], np.cumsum(sizes)])
    pairs = np.array(offsets, np.int64).reshape(-1, 2)
    starts, ends = bytes_before[pairs[:, 0]], bytes_before[pairs[:, 1]]
    # An added token is empty and lies where the token before it ends.
    ends = np.maximum.accumulate(np.where(added, 0, ends))
    starts = np.where(added, ends, starts)
    # Tokens that share a character form a chain.
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
    """``bare`` and ``faithful`` of a reading."""
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
    own, covered = vocabulary.strings.hash(which, skip, lengths), text.hash(zero, starts, ends)
    return bare, (lengths > 0) & (own == covered) & (lengths - skip == ends - starts)
