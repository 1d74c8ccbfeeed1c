"""A language model in two: a body that gives hidden states, and a linear head; what points at an answer.

Applied to all of them the head gives ``B L V`` numbers, which nobody has the memory for: so the two are used
apart. ``L`` tokens of a block, ``H`` hidden size, ``V`` vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

LOGITS = 1 << 23
"""Logits that are there at once: 32 MiB of them."""


def hidden_states(model: nn.Module, ids: Tensor) -> Tensor:
    """Last hidden states ``[B, L, H]`` of ``ids [B, L]``. Padding stands behind: it needs no mask."""
    body = getattr(model, str(model.base_model_prefix))
    states: Tensor = body(input_ids=ids).last_hidden_state
    return states


def masked_states(model: nn.Module, ids: Tensor, attention: Tensor | None, places: Tensor) -> Tensor:
    """What the head of a masked language model multiplies, ``[n, H]``, at ``places`` of ``ids [B * L]``.

    Between the body and the product there are layers, another in each architecture: so the whole model runs,
    and the product is left out.
    """
    held: list[Tensor] = []

    def gather(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor]:
        held.append(given[0].flatten(0, -2)[places])
        return (held[0][:0],)

    head = model.get_output_embeddings()  # type: ignore[operator]  # transformers' models have it
    hook = head.register_forward_pre_hook(gather)
    try:
        model(input_ids=ids, attention_mask=attention)
    finally:
        hook.remove()
    return held[0]


def takes_types(model: nn.Module) -> bool:
    """Whether a model tells a question's tokens from its passage's by their types, as BERT does."""
    kinds: int = getattr(model.config, "type_vocab_size", 0)
    return kinds > 1


def span_logits(model: nn.Module, ids: Tensor, attention: Tensor, types: Tensor | None) -> Tensor:
    """``[B, 2, L]`` of a model for question answering: where the answer starts, and where it ends."""
    more = {} if types is None else {"token_type_ids": types}
    said = model(input_ids=ids, attention_mask=attention, **more)
    return torch.stack([said.start_logits, said.end_logits], 1)


def head_of(model: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight ``[V', H]`` and bias ``[V']`` of the head; ``V'`` is at least ``V``."""
    head = model.get_output_embeddings()  # type: ignore[operator]  # as above
    return head.weight, getattr(head, "bias", None)


def logits_of(model: nn.Module, hidden: Tensor, vocab_size: int, *, bf16: bool) -> Iterator[Tensor]:
    """Of ``hidden [n, H]``, ``[m, V]`` in float32, ``m`` rows at a time."""
    weight, bias = head_of(model)
    weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
    with torch.autocast(hidden.device.type, torch.bfloat16, enabled=bf16):
        for rows in hidden.split(max(1, LOGITS // vocab_size)):
            yield nn.functional.linear(rows, weight, bias).float()
