"""Between a model's answers and what travels: log-probabilities to payloads and back."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from feddistill import payload
from feddistill.types import RoundSpec
from feddistill_kernels import topk_compress, topk_sample

SERVER = "server"
"""Who sends the teacher back to the clients."""


PART = 1 << 20
"""Log-probabilities compressed at a time: what bounds the copies in float64."""


def compress(log_probs: Tensor, spec: RoundSpec, seed: int) -> payload.Answers:
    """``[N, V]`` as the codec of ``spec`` wants them; ``seed`` is that of the ``sampled`` codec's draws."""
    return compress_rows(lambda start, stop: log_probs[start:stop], 0, len(log_probs), spec, seed)


def compress_rows(
    read: Callable[[int, int], Tensor], start: int, stop: int, spec: RoundSpec, seed: int
) -> payload.Answers:
    """Rows from ``start`` to ``stop`` of what ``read`` reads, a few of them in memory at a time."""
    random = torch.Generator().manual_seed(seed)
    step = max(1, PART // spec.vocab_size)
    parts = ((first, min(first + step, stop)) for first in range(start, stop, step))
    return payload.joined([_compress(read(*part), spec, random) for part in parts])


def _compress(log_probs: Tensor, spec: RoundSpec, random: torch.Generator) -> payload.Answers:
    if spec.codec == "dense":
        return payload.quantise_dense(log_probs.numpy())
    if spec.codec == "sampled":
        drawn = topk_sample(log_probs, spec.draws, generator=random)
        return payload.quantise_sampled(
            drawn.ids.numpy(), drawn.log_probs.numpy(), spec.draws, spec.vocab_size
        )
    kept = topk_compress(log_probs, spec.k)
    rows = kept.ids.numpy(), kept.log_probs.numpy(), kept.log_tail.numpy()
    if spec.codec == "threshold":
        return payload.quantise_threshold(*rows, spec.vocab_size, spec.max_code)
    return payload.quantise_topk(*rows, spec.vocab_size)


def expand(answers: payload.Answers) -> Tensor:
    """Admitted answers as log-probabilities ``[n, V]``; a missing id has its share of the tail."""
    return torch.from_numpy(payload.expand(answers))


def codes(answers: payload.Answers) -> Tensor:
    """Admitted answers as rules read them that are taken on bytes: ``uint8 [n, V]``."""
    if isinstance(answers, payload.Dense):
        return torch.from_numpy(answers.codes.copy())  # what was admitted cannot be written to
    return expand(answers)


def feedback_spec(spec: RoundSpec) -> RoundSpec:
    """The same question, answered by the server: what clients check the teacher against."""
    keys = tuple((name, key) for name, key in spec.keys if name == SERVER)
    return replace(spec, clients=(SERVER,), keys=keys)
