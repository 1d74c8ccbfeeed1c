"""Between a model's answers and what travels: log-probabilities to payloads and back."""

from dataclasses import replace

import torch
from torch import Tensor

from feddistill import payload
from feddistill.types import RoundSpec
from feddistill_kernels import TopK, topk_compress

SERVER = "server"
"""Who sends the teacher back to the clients."""


def compress(log_probs: Tensor, spec: RoundSpec) -> payload.Answers:
    """``[N, V]`` as the codec of ``spec`` wants them."""
    if spec.codec == "dense":
        return payload.quantise_dense(log_probs.numpy())
    kept = topk_compress(log_probs, spec.k)
    return payload.quantise_topk(
        kept.ids.numpy(), kept.log_probs.numpy(), kept.log_tail.numpy(), spec.vocab_size
    )


def expand(answers: payload.Answers, start: int, stop: int) -> Tensor:
    """Rows of an admitted answer as log-probabilities ``[n, V]``; a missing id has its share of the tail."""
    chunk = answers.rows(start, stop)
    if isinstance(chunk, payload.Dense):
        return torch.from_numpy(chunk.log_probs())
    kept, tail = chunk.log_probs()
    ids = torch.from_numpy(chunk.ids)
    return TopK(ids, torch.from_numpy(kept), torch.from_numpy(tail), chunk.vocab_size).expand(tail="uniform")


def codes(answers: payload.Answers, start: int, stop: int) -> Tensor:
    """Rows of an admitted answer as rules read them that are taken on bytes: ``uint8 [n, V]``."""
    chunk = answers.rows(start, stop)
    if isinstance(chunk, payload.Dense):
        return torch.from_numpy(chunk.codes.copy())  # what was admitted cannot be written to
    return expand(answers, start, stop)


def feedback_spec(spec: RoundSpec) -> RoundSpec:
    """The same question, answered by the server: what clients check the teacher against."""
    return replace(spec, clients=(SERVER,))
