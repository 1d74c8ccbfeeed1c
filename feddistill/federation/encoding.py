"""Log-probabilities to payload contents and back."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from feddistill import payload
from feddistill.types import RoundSpec
from feddistill_kernels import TopK, topk_compress, topk_sample

SERVER = "server"
"""The sender of the teacher."""


PART = 1 << 20
"""Log-probabilities compressed at a time; bounds the float64 copies."""


def compress(log_probs: Tensor, spec: RoundSpec, seed: int) -> payload.Answers:
    """Encode log-probabilities ``[N, V]`` with the codec of ``spec``; ``seed`` is for ``sampled``."""
    return compress_rows(lambda start, stop: log_probs[start:stop], 0, len(log_probs), spec, seed)


def compress_rows(
    read: Callable[[int, int], Tensor | TopK], start: int, stop: int, spec: RoundSpec, seed: int
) -> payload.Answers:
    """Encode the rows from ``start`` to ``stop`` that ``read`` returns, a few in memory at a time."""
    step = max(1, PART // spec.vocab_size)
    parts = ((first, min(first + step, stop)) for first in range(start, stop, step))
    return compress_parts((read(*part) for part in parts), spec, seed)


def compress_parts(parts: Iterable[Tensor | TopK], spec: RoundSpec, seed: int) -> payload.Answers:
    """Encode rows part by part, logits or compressed."""
    random = torch.Generator().manual_seed(seed)
    return payload.concatenate([_compress(part, spec, random) for part in parts])


def _compress(said: Tensor | TopK, spec: RoundSpec, random: torch.Generator) -> payload.Answers:
    if isinstance(said, TopK) and spec.codec in ("topk", "threshold"):
        return _ranked(said, spec)
    log_probs = said.expand() if isinstance(said, TopK) else said
    if spec.codec == "dense":
        return payload.quantise_dense(log_probs.numpy())
    if spec.codec == "sampled":
        drawn = topk_sample(log_probs, spec.draws, generator=random)
        return payload.quantise_sampled(
            drawn.ids.numpy(), drawn.log_probs.numpy(), spec.draws, spec.vocab_size
        )
    return _ranked(topk_compress(log_probs, spec.k), spec)


def _ranked(kept: TopK, spec: RoundSpec) -> payload.Answers:
    rows = kept.ids.numpy(), kept.log_probs.numpy(), kept.log_tail.numpy()
    if spec.codec == "threshold":
        return payload.quantise_threshold(*rows, spec.vocab_size, spec.max_code)
    return payload.quantise_topk(*rows, spec.vocab_size)


def expand(answers: payload.Answers) -> Tensor:
    """Admitted answers as log-probabilities ``[n, V]``; a missing id has its share of the tail."""
    return torch.from_numpy(payload.expand(answers))


def topk(answers: payload.Answers) -> TopK:
    """Admitted compressed answers as a ``TopK``; abstained rows as in ``aggregation.answers.abstentions``."""
    assert not isinstance(answers, payload.Dense), "dense answers are opened by expand"
    kept, tail = answers.log_probs()
    abstained = payload.abstained(answers)
    kept[abstained], tail[abstained] = -np.inf, 0.0
    ids = torch.from_numpy(np.array(answers.ids))  # admitted arrays are read-only
    return TopK(ids, torch.from_numpy(kept), torch.from_numpy(tail), answers.vocab_size)


def codes(answers: payload.Answers) -> Tensor:
    """The byte codes of admitted answers, for rules with ``of_codes``: ``uint8 [n, V]``."""
    if isinstance(answers, payload.Dense):
        return torch.from_numpy(answers.codes.copy())  # admitted arrays are read-only
    return expand(answers)


def feedback_spec(spec: RoundSpec) -> RoundSpec:
    """The request that the teacher answers; clients validate the teacher against it."""
    keys = tuple((name, key) for name, key in spec.keys if name == SERVER)
    return replace(spec, clients=(SERVER,), keys=keys)
