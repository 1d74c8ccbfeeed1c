"""A model's answers as byte codes: a log-probability is one unsigned byte, ``log p = -code / 12``.

Codes preserve order, so that order statistics can be computed on them, and are never NaN or infinite. The
error is at most 1/24 nat; beyond 21.25 nats (``code = 255``) a probability counts as ``e**-21.25``.
Shapes: ``T`` texts or positions, ``V`` classes or vocabulary, ``k`` entries kept a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
from numpy.typing import NDArray

STEPS_PER_NAT = 12
CODES = 256
FLOOR = CODES - 1
"""The code of all smaller probabilities."""

Codes = NDArray[np.uint8]
Ids = NDArray[np.uint16] | NDArray[np.int32]
LogProbs = NDArray[np.float32]
_LOG_P: NDArray[np.float64] = -np.arange(CODES, dtype=np.float64) / STEPS_PER_NAT
_P: NDArray[np.float64] = np.exp(_LOG_P)


@dataclass(frozen=True, slots=True)
class Dense:
    """Codes of all classes."""

    codes: Codes
    """``[T, V]``."""

    codec = "dense"

    def __len__(self) -> int:
        return len(self.codes)

    @property
    def vocab_size(self) -> int:
        """``V``."""
        return int(self.codes.shape[1])

    @property
    def k(self) -> int:
        """``V``: all classes are kept."""
        return self.vocab_size

    def rows(self, start: int, stop: int) -> "Dense":
        """The rows from ``start`` to ``stop``."""
        return Dense(self.codes[start:stop])

    def mass(self) -> NDArray[np.float64]:
        """``[T]``, the sum of the encoded probabilities: 1 up to rounding."""
        total: NDArray[np.float64] = _P[self.codes].sum(1)
        return total

    def log_probs(self) -> LogProbs:
        """``[T, V]``, renormalised in float64."""
        return np.asarray(_LOG_P[self.codes] - np.log(self.mass())[:, None], np.float32)


@dataclass(frozen=True, slots=True)
class Ranked:
    """The likeliest ids in rank order, their codes, and the code of the mass of all other ids.

    A row keeps ``k`` ids, or the number in ``lengths``: then it is padded with the lowest ids that it does
    not keep. The ids of a row are therefore always distinct.
    """

    stored: Ids
    """``[T, k]`` ids, in two bytes each if the vocabulary is small enough."""
    codes: Codes
    """``[T, k]``, not decreasing along a row; ``FLOOR`` in the padding."""
    tail: Codes
    """``[T]``."""
    vocab_size: int
    lengths: NDArray[np.uint16] | None = None
    """``[T]``, the number of ids that a row keeps, from 1 to ``k``; ``None`` if all rows keep ``k``."""

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def codec(self) -> str:
        """The codec of these answers."""
        return "topk" if self.lengths is None else "threshold"

    @property
    def k(self) -> int:
        """The most ids that a row keeps."""
        return int(self.stored.shape[1])

    @property
    def ids(self) -> NDArray[np.int32]:
        """``[T, k]`` as int32: a copy, unless the ids are stored so."""
        return self.stored.astype(np.int32, copy=False)

    def rows(self, start: int, stop: int) -> "Ranked":
        """The rows from ``start`` to ``stop``."""
        part = slice(start, stop)
        lengths = None if self.lengths is None else self.lengths[part]
        return Ranked(self.stored[part], self.codes[part], self.tail[part], self.vocab_size, lengths)

    def kept(self) -> NDArray[np.bool_] | None:
        """``[T, k]``, True for entries that are not padding; ``None`` if none is."""
        return None if self.lengths is None else np.arange(self.k) < self.lengths[:, None]

    def whole(self) -> NDArray[np.bool_]:
        """``[T]``, True for rows that keep all ``V`` ids, and so have no tail."""
        if self.lengths is None:
            return np.full(len(self), self.k == self.vocab_size)
        return np.asarray(self.lengths == self.vocab_size)

    def mass(self) -> NDArray[np.float64]:
        """``[T]``, the sum of the encoded probabilities, tail included."""
        kept = self.kept()
        probs = _P[self.codes] if kept is None else np.where(kept, _P[self.codes], 0.0)
        return np.asarray(probs.sum(1) + np.where(self.whole(), 0.0, _P[self.tail]))

    def log_probs(self) -> tuple[LogProbs, LogProbs]:
        """``[T, k]`` of the ids and ``[T]`` of all others together, renormalised in float64.

        Ids in the padding get an equal share of the tail, and the tail the rest: with the tail spread
        uniformly this is the same distribution.
        """
        kept, whole, norm = self.kept(), self.whole(), np.log(self.mass())
        log_probs = _LOG_P[self.codes] - norm[:, None]
        tail = np.where(whole, -np.inf, _LOG_P[self.tail] - norm)
        if kept is not None and self.lengths is not None:
            others = self.vocab_size - self.lengths.astype(np.float64)
            log_probs = np.where(kept, log_probs, (tail - np.log(np.maximum(others, 1)))[:, None])
            with np.errstate(divide="ignore"):
                tail = tail + np.log((self.vocab_size - self.k) / np.maximum(others, 1))
        return np.asarray(log_probs, np.float32), np.asarray(tail, np.float32)


@dataclass(frozen=True, slots=True)
class Sampled:
    """Counts of sampled ids: ``q = count / draws`` is an unbiased estimate of ``p``.

    An id that was not drawn has ``q = 0``, so that only means of such answers are meaningful.
    """

    stored: Ids
    """``[T, k]``, ascending; padded with the lowest ids that were not drawn."""
    counts: NDArray[np.uint8]
    """``[T, k]``."""
    draws: int
    vocab_size: int

    codec = "sampled"

    def __len__(self) -> int:
        return len(self.stored)

    @property
    def k(self) -> int:
        """Ids per row, with the padding."""
        return int(self.stored.shape[1])

    @property
    def ids(self) -> NDArray[np.int32]:
        """``[T, k]`` as int32: a copy, unless the ids are stored so."""
        return self.stored.astype(np.int32, copy=False)

    def rows(self, start: int, stop: int) -> "Sampled":
        """The rows from ``start`` to ``stop``."""
        part = slice(start, stop)
        return Sampled(self.stored[part], self.counts[part], self.draws, self.vocab_size)

    def mass(self) -> NDArray[np.float64]:
        """``[T]``, all exactly 1."""
        return np.asarray(self.counts.sum(1, dtype=np.int64) / self.draws)

    def log_probs(self) -> tuple[LogProbs, LogProbs]:
        """``[T, k]`` of the ids and ``[T]`` of all others: ``-inf``."""
        with np.errstate(divide="ignore"):
            kept = np.log(self.counts / np.float64(self.draws))
        return np.asarray(kept, np.float32), np.full(len(self), -np.inf, np.float32)


Answers = Dense | Ranked | Sampled


def concatenate(parts: Sequence[Answers]) -> Answers:
    """The rows of all parts, which have one codec; a single part is not copied."""
    first = parts[0]
    if len(parts) == 1:
        return first
    arrays = {
        field.name: np.concatenate([getattr(part, field.name) for part in parts])
        for field in fields(first)
        if isinstance(getattr(first, field.name), np.ndarray)
    }
    return replace(first, **arrays)  # type: ignore[arg-type]  # all parts have the class of the first


def expand(answers: Answers, spread: NDArray[np.float64] | None = None) -> LogProbs:
    """Log-probabilities ``[T, V]``: a missing id gets a share of the row's tail.

    Args:
        answers: Answers of any codec.
        spread: ``[V]``, positive; the shares are in proportion to it (see ``unigram_spread``). ``None`` for
            equal shares.
    """
    if isinstance(answers, Dense):
        return answers.log_probs()
    kept, tail = answers.log_probs()
    ids = answers.ids.astype(np.int64)
    if spread is None or isinstance(answers, Sampled):
        others = answers.vocab_size - answers.k
        share = tail - np.float32(np.log(others)) if others else tail
        dense = np.repeat(share[:, None], answers.vocab_size, axis=1)
    else:
        entries = answers.kept()
        listed = spread[ids] if entries is None else np.where(entries, spread[ids], 0.0)
        rest = np.maximum(spread.sum() - listed.sum(1), np.finfo(np.float64).tiny)  # 0 if all are kept
        norm = np.log(answers.mass())
        log_tail = np.where(answers.whole(), -np.inf, _LOG_P[answers.tail] - norm)
        dense = np.asarray((log_tail - np.log(rest))[:, None] + np.log(spread), np.float32)
        if entries is not None:  # padding counts as missing
            kept = np.where(entries, kept, np.take_along_axis(dense, ids, 1))
    np.put_along_axis(dense, ids, kept, 1)
    return np.asarray(dense, np.float32)


def abstained(answers: "Ranked | Sampled") -> NDArray[np.bool_]:
    """``[T]``, True for rows that mean "abstained": even the likeliest id has the code ``FLOOR``.

    A model's likeliest id has a probability of at least ``1 / V``, so that no other row has this code.
    """
    if isinstance(answers, Sampled):
        return np.zeros(len(answers), np.bool_)
    return np.asarray(answers.codes[:, 0] == FLOOR)


def unigram_spread(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """``[V]`` weights for spreading a tail: square roots of the token counts in the public texts, plus 0.1.

    Server and clients have the public texts, so that nothing is sent. The root makes the weights flatter, as
    the tail is, which lacks the likeliest tokens.

    >>> unigram_spread(np.array([90, 0, 10])).round(2)
    array([9.49, 0.32, 3.18])
    """
    return np.asarray(np.sqrt(counts + 0.1), np.float64)


def quantise_dense(log_probs: LogProbs) -> Dense:
    """Encode log-probabilities ``[T, V]``; ``-inf`` gets the code ``FLOOR``.

    Raises:
        ValueError: A row does not sum to 1.

    >>> quantise_dense(np.log(np.array([[0.5, 0.25, 0.25]], np.float32))).codes
    array([[ 8, 17, 17]], dtype=uint8)
    """
    _check_mass(_probability(log_probs).sum(1))
    return Dense(_code(log_probs))


def quantise_topk(ids: NDArray[np.int32], log_probs: LogProbs, log_tail: LogProbs, vocab_size: int) -> Ranked:
    """Encode ids ``[T, k]``, in any order, their log-probabilities and the tail's ``[T]``.

    The result is in rank order, with ids of equal codes ascending, so that equal answers have equal bytes.

    Raises:
        ValueError: A row does not sum to 1, or an id is not below ``vocab_size`` or occurs twice in a row.
    """
    _check_ids(ids, vocab_size)
    _check_mass(_probability(log_probs).sum(1) + _probability(log_tail))
    codes = _code(log_probs)
    order = np.lexsort((ids, codes), axis=1)
    tail = _code(log_tail) if ids.shape[1] < vocab_size else np.full(len(ids), FLOOR, np.uint8)
    return Ranked(
        stored=_narrow(np.take_along_axis(ids, order, 1), vocab_size),
        codes=np.take_along_axis(codes, order, 1),
        tail=tail,
        vocab_size=vocab_size,
    )


def quantise_threshold(
    ids: NDArray[np.int32], log_probs: LogProbs, log_tail: LogProbs, vocab_size: int, max_code: int
) -> Ranked:
    """As ``quantise_topk``, but entries with codes above ``max_code``, except the first, join the tail.

    Raises:
        ValueError: As for ``quantise_topk``.

    >>> row = np.log(np.array([[0.6, 0.3, 0.06]], np.float32)), np.log(np.array([0.04], np.float32))
    >>> kept = quantise_threshold(np.array([[7, 8, 9]], np.int32), *row, 100, max_code_of(0.1))
    >>> kept.lengths, kept.ids, kept.codes, kept.tail
    (array([2], dtype=uint16), array([[7, 8, 0]], dtype=int32), array([[  6,  14, 255]], dtype=uint8),
     array([28], dtype=uint8))
    """
    full = quantise_topk(ids, log_probs, log_tail, vocab_size)
    lengths = np.maximum((full.codes <= max_code).sum(1), 1).astype(np.uint16)
    kept = np.arange(full.k) < lengths[:, None]
    # The tail is summed anew, over the entries that the order by codes puts behind the kept ones.
    order = np.lexsort((ids, _code(log_probs)), axis=1)
    dropped = np.where(kept, 0.0, np.take_along_axis(_probability(log_probs), order, 1)).sum(1)
    with np.errstate(divide="ignore"):
        log_rest = np.log(dropped + _probability(log_tail))
    return Ranked(
        stored=_narrow(np.where(kept, full.ids, fill_ids(full.stored, kept)), vocab_size),
        codes=np.where(kept, full.codes, FLOOR).astype(np.uint8),
        tail=np.where(lengths == vocab_size, FLOOR, _code(log_rest)).astype(np.uint8),
        vocab_size=vocab_size,
        lengths=lengths,
    )


def quantise_sampled(ids: NDArray[np.int32], log_probs: LogProbs, draws: int, vocab_size: int) -> Sampled:
    """Encode the result of ``topk_sample``: ids ``[T, k]`` in any order and ``log(count / draws)``.

    Raises:
        ValueError: The counts of a row are not integers with sum ``draws``, or the padding is not the lowest
            ids that were not drawn.
    """
    _check_ids(ids, vocab_size)
    exact = _probability(log_probs) * draws
    if draws >= CODES or (np.abs(exact - np.rint(exact)) > 1e-3).any() or (np.rint(exact) > draws).any():
        raise ValueError(f"counts must be integers of at most {draws} draws, and draws at most {CODES - 1}")
    order = np.argsort(ids, axis=1)
    counts = np.take_along_axis(np.rint(exact), order, 1)
    if wrong := np.flatnonzero(counts.sum(1) != draws).tolist():
        raise ValueError(f"row {wrong[0]} has {counts[wrong[0]].sum():.0f} draws, not {draws}")
    ordered = np.take_along_axis(ids, order, 1)
    if ((counts == 0) & (ordered != np.arange(ids.shape[1]))).any():
        raise ValueError("ids that were not drawn must be the lowest ones")
    return Sampled(_narrow(ordered, vocab_size), counts.astype(np.uint8), draws, vocab_size)


def max_code_of(epsilon: float) -> int:
    """The largest code of probabilities of at least ``epsilon``.

    >>> max_code_of(0.001)
    83
    """
    return int(np.clip(np.rint(-STEPS_PER_NAT * np.log(epsilon)), 0, FLOOR - 1))


def fill_ids(ids: Ids, kept: NDArray[np.bool_]) -> NDArray[np.int32]:
    """The padding ``[T, k]``: the lowest ids that are not kept, ascending; 0 in the place of kept ids.

    It needs ids below ``k`` only.
    """
    rows, k = ids.shape
    free = np.ones((rows, k), np.bool_)
    row, column = np.nonzero(kept & (ids < k))
    free[row, ids[row, column]] = False
    ordered = np.argsort(~free, axis=1, kind="stable").astype(np.int32)
    place = np.arange(k, dtype=np.int32) - kept.sum(1, dtype=np.int32)[:, None]
    return np.where(kept, 0, np.take_along_axis(ordered, np.maximum(place, 0), 1)).astype(np.int32)


def _narrow(ids: NDArray[np.int32], vocab_size: int) -> Ids:
    return ids.astype(np.uint16) if vocab_size <= 2**16 else ids.astype(np.int32)


def _code(log_probs: LogProbs | NDArray[np.float64]) -> Codes:
    return np.clip(np.rint(-STEPS_PER_NAT * log_probs.astype(np.float64)), 0, FLOOR).astype(np.uint8)


def _probability(log_probs: LogProbs) -> NDArray[np.float64]:
    with np.errstate(over="ignore"):  # infinite: its sum is not 1
        return np.asarray(np.exp(log_probs.astype(np.float64)), np.float64)


def _check_ids(ids: NDArray[np.int32], vocab_size: int) -> None:
    ordered = np.sort(ids, axis=1)
    if ids.min(initial=0) < 0 or ids.max(initial=0) >= vocab_size:
        raise ValueError(f"ids must be within 0..{vocab_size - 1}, got {ids.min()}..{ids.max()}")
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise ValueError("ids must be distinct in each row")


def _check_mass(mass: NDArray[np.float64]) -> None:
    wrong = np.flatnonzero(~(np.abs(mass - 1) < 1e-3))
    if len(wrong):
        raise ValueError(f"row {wrong[0]} is not a distribution: its probabilities sum to {mass[wrong[0]]}")
