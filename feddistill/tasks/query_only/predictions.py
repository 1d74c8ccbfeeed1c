"""Check the predictions of a query-only language model: a few ids per token, with log-probabilities."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from feddistill.errors import ModelError
from feddistill.models.sources import first_line
from feddistill.payload.answers import fill_ids
from feddistill_kernels import TopK

Block = Sequence[int]

SLACK = 1e-3
"""Probabilities may exceed a sum of 1 by this much."""


class QueryOnlyModel(Protocol):
    """A language model that can be queried but not trained."""

    def query(self, blocks: Sequence[Block], width: int) -> list[TopK]:
        """Predict the tokens of each block but its first: ``[L - 1]`` rows of ``width`` entries.

        Raises:
            ModelError: It cannot be reached, or its reply is malformed.
        """
        ...


def ranked(
    ids: ArrayLike, log_probs: ArrayLike, vocab_size: int, name: str, width: int | None = None
) -> TopK:
    """Check rows of predictions, sort them by probability, and cut or fill them to ``width`` entries.

    Args:
        ids: ``[n, k]``.
        log_probs: ``[n, k]``; ``-inf`` marks an empty entry. A row without entries abstains.
        vocab_size: ``V``.
        name: The model's name in errors.
        width: Entries per row; ``None`` for ``k``. Entries that are added share the remaining mass evenly
            with all ids that the row does not name.

    Raises:
        ModelError: A row is not a distribution over some of ``V`` ids.
    """
    try:
        chosen, given = np.asarray(ids, np.int64), np.asarray(log_probs, np.float64)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{name}: an answer is no array: {first_line(error)}") from None
    if chosen.ndim != 2 or chosen.shape != given.shape:
        raise ModelError(
            f"{name}: ids and log-probabilities must both be [n, k], got {list(chosen.shape)} and "
            f"{list(given.shape)}"
        )
    filled = given > -np.inf
    if np.isnan(given).any() or (given > SLACK).any():
        raise ModelError(f"{name}: answers are not log-probabilities: {given[~(given <= SLACK)].flat[0]:.4g}")
    foreign = ((chosen < 0) | (chosen >= vocab_size)) & filled
    if foreign.any():
        raise ModelError(f"{name}: id {chosen[foreign].flat[0]} is not one of its tokenizer's {vocab_size}")
    ordered = np.sort(np.where(filled, chosen, -1 - np.arange(chosen.shape[1])), axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise ModelError(f"{name}: a row names an id twice")
    mass = np.exp(given).sum(1)
    if (mass > 1 + SLACK).any():
        raise ModelError(f"{name}: the probabilities of a row add up to {mass.max():.4g}")
    complete = filled.sum(1) == vocab_size
    given = given - np.log(np.where(complete | (mass > 1), mass, 1.0))[:, None]
    return _fitted(chosen, given, vocab_size, width or chosen.shape[1])


def fitted(rows: TopK, width: int) -> TopK:
    """Cut or fill rows, which are sorted by probability, to ``width`` entries."""
    ids, log_probs = rows.ids.numpy().astype(np.int64), rows.log_probs.double().numpy()
    return _fitted(ids, log_probs, rows.vocab_size, width)


def _fitted(ids: NDArray[np.int64], log_probs: NDArray[np.float64], vocab_size: int, width: int) -> TopK:
    width = min(width, vocab_size)
    short = max(0, width - ids.shape[1])
    ids = np.pad(ids, ((0, 0), (0, short)))
    log_probs = np.pad(log_probs, ((0, 0), (0, short)), constant_values=-np.inf)
    order = np.argsort(-log_probs, axis=1, kind="stable")[:, :width]
    ids, log_probs = np.take_along_axis(ids, order, 1), np.take_along_axis(log_probs, order, 1)
    named = log_probs > -np.inf
    count = named.sum(1)
    rest = np.where(count == vocab_size, 0.0, np.clip(1 - np.exp(log_probs).sum(1), 1e-9, 1.0))
    share = rest / np.maximum(vocab_size - count, 1)
    abstained = count == 0
    with np.errstate(divide="ignore"):
        filler = np.where(abstained, -np.inf, np.log(share))[:, None]
        tail = np.where(abstained, 0.0, np.log(share * (vocab_size - width)))
    log_probs = np.where(named, log_probs, filler)
    ids = np.where(named, ids, fill_ids(np.where(named, ids, 0).astype(np.int32), named))
    order = np.argsort(-log_probs, axis=1, kind="stable")  # a named id can be less likely than the filler
    ids, log_probs = np.take_along_axis(ids, order, 1), np.take_along_axis(log_probs, order, 1)
    return TopK(
        torch.from_numpy(ids.astype(np.int32)),
        torch.from_numpy(log_probs.astype(np.float32)),
        torch.from_numpy(tail.astype(np.float32)),
        vocab_size,
    )
