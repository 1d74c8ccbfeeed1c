"""Between a model's answers and what travels: log-probabilities to payloads and back."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from feddistill import payload
from feddistill.types import RoundSpec
from feddistill_kernels import TopK, topk_compress, topk_sample

SERVER = "server"
"""Who sends the teacher back to the clients."""


PART = 1 << 20
"""Log-probabilities compressed at a time: what bounds the copies in float64."""


def compress(log_probs: Tensor, spec: RoundSpec, seed: int) -> payload.Answers:
    """``[N, V]`` as the codec of ``spec`` wants them; ``seed`` is that of the ``sampled`` codec's draws."""
    return compress_rows(lambda start, stop: log_probs[start:stop], 0, len(log_probs), spec, seed)


def compress_rows(
    read: Callable[[int, int], Tensor | TopK], start: int, stop: int, spec: RoundSpec, seed: int
) -> payload.Answers:
    """Rows from ``start`` to ``stop`` of what ``read`` reads, a few of them in memory at a time."""
    step = max(1, PART // spec.vocab_size)
    parts = ((first, min(first + step, stop)) for first in range(start, stop, step))
    return compress_parts((read(*part) for part in parts), spec, seed)


def compress_parts(parts: Iterable[Tensor | TopK], spec: RoundSpec, seed: int) -> payload.Answers:
    """Rows as they come, logits or compressed."""
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
    ids = torch.from_numpy(np.array(answers.ids))  # what was admitted cannot be written to
    return TopK(ids, torch.from_numpy(kept), torch.from_numpy(tail), answers.vocab_size)


def codes(answers: payload.Answers) -> Tensor:
    """Admitted answers as rules read them that are taken on bytes: ``uint8 [n, V]``."""
    if isinstance(answers, payload.Dense):
        return torch.from_numpy(answers.codes.copy())  # what was admitted cannot be written to
    return expand(answers)


def feedback_spec(spec: RoundSpec) -> RoundSpec:
    """The same question, answered by the server: what clients check the teacher against."""
    keys = tuple((name, key) for name, key in spec.keys if name == SERVER)
    return replace(spec, clients=(SERVER,), keys=keys)
