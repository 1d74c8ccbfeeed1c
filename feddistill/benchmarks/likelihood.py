"""Log-likelihoods by a causal language model, of continuations and of documents in sliding windows."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from feddistill.errors import ModelError
from feddistill.modelio.padding import pad
from feddistill.models.tokenizers import TextBounds
from feddistill.runs.trained_models import Student
from feddistill.types import ProgressCallback

ROWS = 2048
"""Maximum rows of logits in memory: 400 MB for a vocabulary of 50,000."""
TOKENS = 8192
"""Maximum tokens of a forward pass."""


@dataclass(frozen=True, slots=True)
class Scored:
    """Token ids, the last ``count`` of which are scored; at least one token precedes them."""

    ids: tuple[int, ...]
    count: int


def log_likelihoods(
    student: Student, scored: Sequence[Scored], on_step: ProgressCallback | None = None
) -> NDArray[np.float64]:
    """Natural log-likelihood ``[N]`` of each sequence's scored tokens, given the tokens before them.

    Only the logits of scored positions are computed, if the architecture supports ``logits_to_keep``.
    """
    found = np.zeros(len(scored))
    done = 0
    for batch in _batches(scored):
        part = [scored[place] for place in batch]
        found[batch] = _sums(student, part).numpy()
        done += len(batch)
        if on_step is not None:
            on_step(done, len(scored))
    return found


def windows(tokens: Sequence[int], bounds: TextBounds, length: int, stride: int) -> Iterator[Scored]:
    """Split a document into overlapping windows that score every token once.

    The first window has ``length - 1`` tokens after the start token; without a start token the document's
    first token is not scored. Each later window ends ``stride`` tokens further and scores only these, with at
    least ``length - stride`` tokens of context, of which the first is the start token if that begins blocks.

    >>> [(w.ids, w.count) for w in windows([1, 2, 3, 4, 5, 6], TextBounds(0, 0, False), 4, 2)]
    [((0, 1, 2, 3), 3), ((2, 3, 4, 5), 2), ((3, 4, 5, 6), 1)]
    >>> [(w.ids, w.count) for w in windows([1, 2, 3, 4, 5, 6], TextBounds(9, 0, True), 4, 2)]
    [((9, 1, 2, 3), 3), ((9, 3, 4, 5), 2), ((9, 4, 5, 6), 1)]
    """
    whole = tuple(tokens) if bounds.start is None else (bounds.start, *tokens)
    end = min(length, len(whole))
    yield Scored(whole[:end], end - 1)
    while end < len(whole):
        before, end = end, min(end + stride, len(whole))
        yield Scored(_last(whole[:end], bounds, length), end - before)


def _last(ids: tuple[int, ...], bounds: TextBounds, length: int) -> tuple[int, ...]:
    """The last ``length`` tokens, of which the first is the start token if that begins blocks."""
    cut = ids[-length:]
    return (ids[0], *cut[1:]) if bounds.begins_blocks else cut


def plain(student: Student, text: str) -> list[int]:
    """Tokens of a text alone."""
    ids = student.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return [int(token) for token in ids]


def encode(student: Student, text: str) -> list[int]:
    """Tokens of a text to be continued: with the tokenizer's prefix tokens, without an end token."""
    ids = [int(token) for token in student.tokenizer(text, verbose=False)["input_ids"]]
    while ids and ids[-1] in (student.tokenizer.eos_token_id, student.tokenizer.sep_token_id):
        ids.pop()
    return ids


def continuation(student: Student, context: str, text: str) -> Scored:
    """Encode ``context + text``, scoring the tokens that follow the context.

    If the sequence exceeds the model's maximum length, the beginning of the context is dropped.
    """
    before, bounds = encode(student, context), student.bounds
    whole = encode(student, context + text)
    if not before:
        if bounds.start is None:
            raise ModelError(f"{student.name} predicts no text's first token, so {text!r} needs a context")
        before, whole = [bounds.start], [bounds.start, *whole]
    count = max(1, len(whole) - len(before))
    if count >= student.max_tokens:
        raise ModelError(
            f"{student.name} reads {student.max_tokens} tokens, too few for {text!r} and a context"
        )
    return Scored(_last(tuple(whole), bounds, student.max_tokens), count)


def _batches(scored: Sequence[Scored]) -> Iterator[list[int]]:
    """Indices into ``scored``, batched by length within the limits ``ROWS`` and ``TOKENS``."""
    order = sorted(range(len(scored)), key=lambda place: (-len(scored[place].ids), scored[place].count))
    batch: list[int] = []
    for place in order:
        if batch and _too_many([scored[other] for other in (*batch, place)]):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _too_many(part: Sequence[Scored]) -> bool:
    longest = max(len(one.ids) for one in part)
    positions = longest - min(len(one.ids) - one.count for one in part)  # scored in any sequence
    return len(part) * positions > ROWS or len(part) * longest > TOKENS


def _sums(student: Student, part: Sequence[Scored]) -> Tensor:
    ids, mask = pad([one.ids for one in part], _filler(student))
    lengths = torch.tensor([len(one.ids) for one in part])
    counts = torch.tensor([one.count for one in part])
    last = int(lengths.max())
    ids, mask = ids[:, :last].to(student.device), mask[:, :last].to(student.device)
    first = int((lengths - counts).min()) - 1  # the position that predicts the first scored token
    logits = _logits(student, ids, mask, first, last - 1).float()
    targets = ids[:, first + 1 : last]
    chosen = logits.gather(2, targets.unsqueeze(2)).squeeze(2) - logits.logsumexp(2)
    places = torch.arange(first + 1, last)
    wanted = (places >= (lengths - counts)[:, None]) & (places < lengths[:, None])
    return chosen.cpu().double().masked_fill(~wanted, 0.0).sum(1)


def _logits(student: Student, ids: Tensor, mask: Tensor, first: int, stop: int) -> Tensor:
    """Logits of positions ``first`` to ``stop``, ``[B, stop - first, V]``."""
    model: nn.Module = student.model
    fewer = "logits_to_keep" in inspect.signature(model.forward).parameters
    kept = {"logits_to_keep": torch.arange(first, stop, device=ids.device)} if fewer else {}
    with (
        torch.inference_mode(),
        torch.autocast(student.device.type, torch.bfloat16, enabled=student.bf16),
    ):
        logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False, **kept).logits
    return logits if fewer else logits[:, first:stop]


def _filler(student: Student) -> int:
    pad_id = student.tokenizer.pad_token_id
    return 0 if pad_id is None else int(pad_id)
