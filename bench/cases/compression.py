"""Compression of logits."""

from collections.abc import Iterator
from functools import partial

from torch import Tensor

import feddistill_kernels as fk

from .. import baselines
from ..timing import Contender
from .case import (
    FULL,
    HALF,
    SMALL,
    Case,
    Setup,
    always,
    as_it_is,
    headline_shapes,
    itemsize,
    large_shapes,
    logits,
    written_by_hand,
)


def topk_compress(device: str) -> Iterator[Case]:
    """Counted bytes: the logits are read; the output is negligible."""
    headlines = headline_shapes(device)
    if device == "cuda":
        grid = [(HALF, shape, 64) for shape in (*headlines, *SMALL[2:])]
        grid += [(HALF, headlines[1], 16), (HALF, headlines[1], 128), (FULL, headlines[1], 64)]
        grid += [(HALF, shape, 16) for shape in SMALL[:3]]
    else:
        shapes = (*headlines, large_shapes(device)[1], *SMALL[2:])
        grid = [(dtype, shape, 64) for dtype in (FULL, HALF) for shape in shapes]
        grid += [(dtype, headlines[1], 16) for dtype in (FULL, HALF)]
        grid += [(FULL, shape, 16) for shape in SMALL[:3]]
    for dtype, (rows, vocab), k in grid:
        headline = k == 64 and (rows, vocab) in headlines and (device != "cuda" or dtype == HALF)
        make = partial(compress, dtype, rows, vocab, k, headline)
        shape, counted = {"N": rows, "V": vocab, "K": k}, rows * vocab * itemsize(dtype)
        yield Case("topk_compress", "", dtype, shape, counted, make, headline)


def compress(dtype: str, rows: int, vocab: int, k: int, compiler: bool, setup: Setup) -> list[Contender]:
    z, _ = logits(setup, dtype, rows, vocab)
    ours = Contender("ours", partial(fk.topk_compress, z, k), value=_by_likelihood)
    found = [ours]
    eager = partial(baselines.topk_compress, k=k)
    found += written_by_hand(setup, dtype, eager, (z,), as_it_is, lambda result: result[1:], compiler)
    if peer := setup.peer("distillkit", lambda: baselines.distillkit(vocab, k)):
        run, back = peer
        log_probs = _by_likelihood(ours.run())[:1]
        found.append(
            Contender(
                "distillkit",
                run,
                always(z),
                lambda packed: back(packed)[1:],
                lambda: log_probs,
                note="k exact float32 log-probabilities and packed ids; no tail",
            )
        )
    return found


def _by_likelihood(result: fk.TopK) -> list[Tensor]:
    return [result.log_probs.sort(-1, descending=True).values, result.log_tail]
