"""A model's answers as bytes: a log-probability is one unsigned byte, ``log p = -code / 12``.

Codes preserve order, so order statistics can be taken on them, and integers are neither NaN nor Inf.
The error is at most 1/24 nat; beyond 21.25 nats (``code = 255``) a probability counts as ``e**-21.25``.
Shapes: ``T`` texts or positions, ``V`` classes or vocabulary, ``k`` entries kept a row.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

STEPS_PER_NAT = 12
CODES = 256

Codes = NDArray[np.uint8]
LogProbs = NDArray[np.float32]
_LOG_P: NDArray[np.float64] = -np.arange(CODES, dtype=np.float64) / STEPS_PER_NAT
_P: NDArray[np.float64] = np.exp(_LOG_P)


@dataclass(frozen=True, slots=True)
class Dense:
    """A byte for each class."""

    codes: Codes
    """``[T, V]``."""

    codec = "dense"

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def vocab_size(self) -> int:
        """``V``."""
        return int(self.codes.shape[1])

    def rows(self, start: int, stop: int) -> "Dense":
        """Some of the answers."""
        return Dense(self.codes[start:stop])

    def mass(self) -> NDArray[np.float64]:
        """``[T]`` sum of the probabilities as they are written: near 1, but for rounding."""
        total: NDArray[np.float64] = _P[self.codes].sum(1)
        return total

    def log_probs(self) -> LogProbs:
        """``[T, V]``, renormalised in float64."""
        return np.asarray(_LOG_P[self.codes] - np.log(self.mass())[:, None], np.float32)


@dataclass(frozen=True, slots=True)
class Ranked:
    """The ``k`` likeliest ids, likeliest first, their bytes, and a byte for the mass of all others."""

    ids: NDArray[np.int32]
    """``[T, k]``."""
    codes: Codes
    """``[T, k]``, not decreasing along a row."""
    tail: Codes
    """``[T]``."""
    vocab_size: int

    codec = "topk"

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, start: int, stop: int) -> "Ranked":
        """Some of the answers."""
        part = slice(start, stop)
        return Ranked(self.ids[part], self.codes[part], self.tail[part], self.vocab_size)

    def mass(self) -> NDArray[np.float64]:
        """``[T]`` sum of the probabilities as they are written, tail included."""
        total: NDArray[np.float64] = _P[self.codes].sum(1)
        if not self._whole:
            total += _P[self.tail]
        return total

    def log_probs(self) -> tuple[LogProbs, LogProbs]:
        """``[T, k]`` of the ids and ``[T]`` of all others together, renormalised in float64."""
        norm = np.log(self.mass())
        tail = np.full(len(self), -np.inf) if self._whole else _LOG_P[self.tail] - norm
        return np.asarray(_LOG_P[self.codes] - norm[:, None], np.float32), np.asarray(tail, np.float32)

    @property
    def _whole(self) -> bool:
        """Whether every id is kept: then there are no others, whatever the tail's byte says."""
        return int(self.ids.shape[1]) == self.vocab_size


Answers = Dense | Ranked


def quantise_dense(log_probs: LogProbs) -> Dense:
    """``[T, V]`` log-probabilities to bytes; ``-inf`` is as unlikely as a byte can say.

    Raises:
        ValueError: A row is no distribution.

    >>> quantise_dense(np.log(np.array([[0.5, 0.25, 0.25]], np.float32))).codes
    array([[ 8, 17, 17]], dtype=uint8)
    """
    _check_mass(_probability(log_probs).sum(1))
    return Dense(_code(log_probs))


def quantise_topk(ids: NDArray[np.int32], log_probs: LogProbs, log_tail: LogProbs, vocab_size: int) -> Ranked:
    """Ids ``[T, k]`` in any order, their log-probabilities and the tail's ``[T]`` to bytes in rank order.

    Where bytes are equal the lower id comes first, so the same answer has the same bytes everywhere.

    Raises:
        ValueError: A row is no distribution, or an id is not below ``vocab_size`` or stands twice in it.
    """
    ordered = np.sort(ids, axis=1)
    if ids.min(initial=0) < 0 or ids.max(initial=0) >= vocab_size:
        raise ValueError(f"ids must be within 0..{vocab_size - 1}, got {ids.min()}..{ids.max()}")
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise ValueError("ids must be distinct in each row")
    _check_mass(_probability(log_probs).sum(1) + _probability(log_tail))
    codes = _code(log_probs)
    order = np.lexsort((ids, codes), axis=1)
    return Ranked(
        ids=np.take_along_axis(ids, order, 1).astype(np.int32),
        codes=np.take_along_axis(codes, order, 1),
        tail=_code(log_tail),
        vocab_size=vocab_size,
    )


def _code(log_probs: LogProbs) -> Codes:
    return np.clip(np.rint(-STEPS_PER_NAT * log_probs.astype(np.float64)), 0, CODES - 1).astype(np.uint8)


def _probability(log_probs: LogProbs) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):  # infinite, and so no distribution
        return np.asarray(np.exp(log_probs.astype(np.float64)), np.float64)


def _check_mass(mass: NDArray[np.float64]) -> None:
    wrong = np.flatnonzero(~(np.abs(mass - 1) < 1e-3))
    if len(wrong):
        raise ValueError(f"row {wrong[0]} is no distribution: its probabilities add up to {mass[wrong[0]]}")
