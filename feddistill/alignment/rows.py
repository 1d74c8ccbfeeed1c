"""What has been said of the student's tokens, added up into rows."""

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
class Said:
    """Mass that has been said of ``P`` of the student's tokens."""

    token: Ints
    """``[P]``, which tokens."""
    kept: Floats
    """``[P]``, the mass that the client's row keeps."""
    tail: Floats
    """``[P]``, mass that may be anywhere."""
    parts: list[tuple[Ints, Ints, Floats]] = field(default_factory=list)
    """Places in ``token``, the student's ids or ``NOWHERE``, and their mass."""


@dataclass(frozen=True, slots=True)
class Projection:
    """Answers about ``n`` tokens of the student, ``R`` of which have one."""

    rows: TopK
    """``[R, k]``, float32, on the CPU; row ``r`` is what is said of the ``r``-th answered token."""
    answered: Mask
    """``[n]``, which of the student's tokens have a row."""
    coverage: Floats
    """``[n]``, mass that the student's row keeps over mass that the client's row kept; 0 where there is no
    client's row."""


def row_of_each(answers: TopK, client: Reading, predicted: NDArray[np.integer] | None) -> Ints:
    """``[n_client]``, the row about each token, or -1."""
    about = np.arange(len(client)) if predicted is None else np.asarray(predicted, np.int64)
    if len(about) != len(answers):
        raise ValueError(f"{len(answers)} rows about {len(about)} of the client's tokens")
    if about.size and not (about.min() >= 0 and about.max() < len(client)):
        raise ValueError(f"rows must be about tokens 0..{len(client) - 1}")
    found = np.full(len(client), -1, np.int64)
    found[about] = np.arange(len(about))
    if (found >= 0).sum() != len(about):
        raise ValueError("two rows are about one token")
    return found


def collect(said: Said, tokens: int, k: int, vocab_size: int, threshold: float) -> Projection:
    """Add up what has been said of each place, keep the likeliest ``k``, leave out what covers too little."""
    places, count = said.token, len(said.token)
    where, ids, mass, tail = _summed(said, vocab_size)
    order = np.lexsort((ids, -mass, where))
    where, ids, mass = where[order], ids[order], mass[order]
    rank = np.arange(len(where)) - np.searchsorted(where, np.arange(count))[where]
    over = rank >= k
    tail += np.bincount(where[over], mass[over], count)
    where, ids, mass, rank = where[~over], ids[~over], mass[~over], rank[~over]
    kept = np.bincount(where, mass, count)
    length = np.bincount(where, minlength=count)
    covered = np.clip(kept / np.maximum(said.kept, np.finfo(np.float64).tiny), 0, 1)
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


def _summed(said: Said, vocab_size: int) -> tuple[Ints, Ints, Floats, Floats]:
    """``[M]`` places, distinct ids of each and their mass, and ``[P]`` tails: what has no id joins them."""
    if not said.parts:
        return np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), said.tail
    where, ids, mass = (np.concatenate(parts) for parts in zip(*said.parts, strict=True))
    lost = ids == NOWHERE
    tail = said.tail + np.bincount(where[lost], mass[lost], len(said.tail))
    good = ~lost & (mass > 0)
    key = where[good] * vocab_size + ids[good]
    order = np.argsort(key)
    key, mass = key[order], mass[good][order]
    first = np.flatnonzero(np.diff(key, prepend=-1))
    total = np.add.reduceat(mass, first) if len(first) else mass
    return key[first] // vocab_size, key[first] % vocab_size, total, tail
