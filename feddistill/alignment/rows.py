"""Collect probability mass on the student's tokens into rows of predictions."""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from feddistill.alignment.spans import Mask, Reading
from feddistill.alignment.strings import Ints
from feddistill.alignment.vocabulary_map import NOWHERE
from feddistill.payload.answers import fill_ids
from feddistill_kernels import TopK

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ProjectedMass:
    """Probability mass projected to the predictions of ``P`` of the student's tokens."""

    token: Ints
    """``[P]``, indices of these tokens in the text."""
    kept: Floats
    """``[P]``, the mass of the client's row outside its tail."""
    tail: Floats
    """``[P]``, mass whose id is unknown."""
    parts: list[tuple[Ints, Ints, Floats]] = field(default_factory=list)
    """Index in ``token``, the student's id or ``NOWHERE``, and the mass."""


@dataclass(frozen=True, slots=True)
class Projection:
    """Predictions of ``R`` of the student's ``n`` tokens; the others have too little mass."""

    rows: TopK
    """``[R, k]``, float32, on the CPU; row ``r`` predicts the ``r``-th answered token."""
    answered: Mask
    """``[n]``, True for tokens with a row."""
    coverage: Floats
    """``[n]``, mass outside the tail of the student's row over that of the client's row; 0 without a client's
    row."""


def row_of_each(answers: TopK, client: Reading, predicted: NDArray[np.integer] | None) -> Ints:
    """``[n_client]``, the row that predicts each token, or -1."""
    tokens = np.arange(len(client)) if predicted is None else np.asarray(predicted, np.int64)
    if len(tokens) != len(answers):
        raise ValueError(f"{len(answers)} rows about {len(tokens)} of the client's tokens")
    if tokens.size and not (tokens.min() >= 0 and tokens.max() < len(client)):
        raise ValueError(f"rows must be about tokens 0..{len(client) - 1}")
    rows = np.full(len(client), -1, np.int64)
    rows[tokens] = np.arange(len(tokens))
    if (rows >= 0).sum() != len(tokens):
        raise ValueError("two rows are about one token")
    return rows


def collect(projected: ProjectedMass, tokens: int, k: int, vocab_size: int, threshold: float) -> Projection:
    """Sum the mass of each id, keep ``k`` ids per row, drop rows whose coverage is below ``threshold``."""
    places, count = projected.token, len(projected.token)
    where, ids, mass, tail = _summed(projected, vocab_size)
    order = np.lexsort((ids, -mass, where))
    where, ids, mass = where[order], ids[order], mass[order]
    rank = np.arange(len(where)) - np.searchsorted(where, np.arange(count))[where]
    over = rank >= k
    tail += np.bincount(where[over], mass[over], count)
    where, ids, mass, rank = where[~over], ids[~over], mass[~over], rank[~over]
    kept = np.bincount(where, mass, count)
    length = np.bincount(where, minlength=count)
    covered = np.clip(kept / np.maximum(projected.kept, np.finfo(np.float64).tiny), 0, 1)
    coverage = np.zeros(tokens)
    coverage[places] = covered
    good = (covered >= threshold) & (length > 0)
    answered = np.zeros(tokens, np.bool_)
    answered[places[good]] = True
    all_ids = np.full((count, k), -1, np.int32)
    all_mass = np.zeros((count, k))
    all_ids[where, rank], all_mass[where, rank] = ids, mass
    all_ids, all_mass, length, tail = all_ids[good], all_mass[good], length[good], tail[good]
    others = np.maximum(vocab_size - length, 1)
    full = np.arange(k) < length[:, None]
    all_ids = np.where(full, all_ids, fill_ids(all_ids, full))
    all_mass = np.where(full, all_mass, (tail / others)[:, None])
    rest = np.where(length == vocab_size, 0.0, tail * (vocab_size - k) / others)
    with np.errstate(divide="ignore"):
        rows = TopK(
            torch.from_numpy(all_ids),
            torch.from_numpy(np.log(all_mass).astype(np.float32)),
            torch.from_numpy(np.log(rest).astype(np.float32)),
            vocab_size,
        )
    return Projection(rows, answered, coverage)


def _summed(projected: ProjectedMass, vocab_size: int) -> tuple[Ints, Ints, Floats, Floats]:
    """``[M]`` indices, distinct ids of each and their mass; and ``[P]`` tails with all mass without an id."""
    if not projected.parts:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), projected.tail
    where, ids, mass = (np.concatenate(parts) for parts in zip(*projected.parts, strict=True))
    lost = ids == NOWHERE
    tail = projected.tail + np.bincount(where[lost], mass[lost], len(projected.tail))
    good = ~lost & (mass > 0)
    key = where[good] * vocab_size + ids[good]
    order = np.argsort(key)
    key, mass = key[order], mass[good][order]
    first = np.flatnonzero(np.diff(key, prepend=-1))
    total = np.add.reduceat(mass, first) if len(first) else mass
    return key[first] // vocab_size, key[first] % vocab_size, total, tail
