"""First pieces, in the student's vocabulary, of strings that begin in a text and end in a token."""

import numpy as np
from numpy.typing import NDArray

from feddistill.alignment.strings import SPACE, Hashes, Ints, Strings, power
from feddistill.alignment.vocabulary import Vocabulary
from feddistill.alignment.vocabulary_map import NOWHERE


class Joiner:
    """Finds the student's ids of strings ``(space) + text[begin:end] + token[skip:]``."""

    def __init__(self, text: Strings, client: Vocabulary, student: Vocabulary):
        self._text, self._tokens, self._student = text, client.strings, student

    def agree(self, begin: Ints, end: Ints, token: Ints, skip: Ints) -> NDArray[np.bool_]:
        """``[E]``: True if the token from ``skip`` on and the text from ``begin`` on have the same bytes
        up to ``end`` or the token's end."""
        length = np.clip(np.minimum(end - begin, self._tokens.lengths[token] - skip), 0, None)
        zero = np.zeros_like(begin)
        hashes = self._tokens.hash(token, skip, skip + length)
        return np.asarray(hashes == self._text.hash(zero, begin, begin + length))

    def first_pieces(
        self, begin: Ints, end: Ints, lead: NDArray[np.bool_], token: Ints, skip: Ints
    ) -> NDArray[np.int64]:
        """``[E]``: the id of the whole string, else the longest that it begins with, else ``NOWHERE``."""
        stop = self._tokens.lengths[token]
        ids = self._ids(begin, end, lead, token, skip, stop)
        longest = self._student.longest
        for length in range(min(int((stop - skip).max(initial=0)) - 1, longest), 0, -1):
            rest = np.flatnonzero((ids == NOWHERE) & (stop - skip > length))
            if len(rest):
                leave = skip[rest]
                ids[rest] = self._ids(begin[rest], end[rest], lead[rest], token[rest], leave, leave + length)
        for length in range(min(int((end - begin).max(initial=0)), longest), 0, -1):
            rest = np.flatnonzero((ids == NOWHERE) & (end - begin >= length))
            if len(rest):
                first, space, which, none = begin[rest], lead[rest], token[rest], skip[rest]
                ids[rest] = self._ids(first, first + length, space, which, none, none)
        return ids

    def _ids(
        self, begin: Ints, end: Ints, lead: NDArray[np.bool_], token: Ints, skip: Ints, stop: Ints
    ) -> NDArray[np.int64]:
        text = self._text.hash(np.zeros_like(begin), begin, end)
        hashes: Hashes = text + power(end - begin) * self._tokens.hash(token, skip, stop)
        if lead.any():
            hashes = np.where(lead, SPACE + power(np.ones(1, np.int64)) * hashes, hashes)
        return self._student.lookup(hashes)
