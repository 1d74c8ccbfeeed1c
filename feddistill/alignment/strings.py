"""Hashes of byte strings and of their parts and concatenations, to compare many strings at once.

``H(s) = sum_i R[s_i] B**i`` modulo ``2**64``, with ``R`` random and ``B`` odd: then ``H(xy) = H(x) +
B**|x| H(y)``, and a part of a string is a difference of running sums times a power of ``1 / B``.  Two
different strings of ordinary length collide with probability about ``2**-64``; an attacker gains nothing.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
Ints = NDArray[np.int64]

_BYTE: Hashes = np.random.default_rng(0x9E37).integers(1, 2**64, 256, np.uint64, endpoint=False)
_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 2**64)


@lru_cache(maxsize=64)
def _powers(base: int, size: int) -> Hashes:
    factors = np.full(size, base, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


def power(exponents: Ints) -> Hashes:
    """``B**n`` for each exponent ``n``."""
    return _table(_BASE, exponents)[exponents]


def _table(base: int, exponents: Ints) -> Hashes:
    # Sizes are rounded to powers of two, so that few tables are cached.
    return _powers(base, 1 << int(exponents.max(initial=0) + 1).bit_length())


class Strings:
    """``V`` byte strings, and the hashes of any part of any of them."""

    def __init__(self, strings: Sequence[bytes]):
        self.flat = np.frombuffer(b"".join(strings), np.uint8)
        self.lengths: Ints = np.fromiter(map(len, strings), np.int64, len(strings))
        self.starts: Ints = np.cumsum(self.lengths) - self.lengths
        place = np.arange(len(self.flat)) - np.repeat(self.starts, self.lengths)
        self._sums: Hashes = np.zeros(len(self.flat) + 1, np.uint64)
        np.cumsum(_BYTE[self.flat] * power(place), out=self._sums[1:])

    def hash(self, which: Ints, start: Ints, stop: Ints) -> Hashes:
        """Hashes of bytes ``start`` to ``stop`` of the strings ``which``."""
        first = self.starts[which]
        difference = self._sums[first + stop] - self._sums[first + start]
        return np.asarray(difference * _table(_INVERSE, start)[start])

    def whole(self) -> Hashes:
        """``[V]``, the hash of each string."""
        which = np.arange(len(self.lengths))
        return self.hash(which, np.zeros_like(self.lengths), self.lengths)

    def first(self, default: int) -> NDArray[np.uint8]:
        """``[V]``, the first byte of each string; ``default`` for an empty one."""
        letters = np.full(len(self.lengths), default, np.uint8)
        filled = self.lengths > 0
        letters[filled] = self.flat[self.starts[filled]]
        return letters


SPACE: np.uint64 = _BYTE[ord(" ")]
"""The hash of a space."""


class Lookup:
    """Maps a string's hash to its number, or to -1 if there is no such string."""

    def __init__(self, hashes: Hashes, numbers: Ints):
        order = np.argsort(hashes)
        self._hashes, self._numbers = hashes[order], numbers[order]

    def __call__(self, hashes: Hashes) -> Ints:
        """``[N]`` to ``[N]``."""
        if not len(self._hashes):
            return np.full(len(hashes), -1, np.int64)
        place = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        return np.where(self._hashes[place] == hashes, self._numbers[place], -1)
