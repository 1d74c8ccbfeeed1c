"""The hidden states and the linear head of a language model, used apart; logits of question answering.

Applied to a whole batch, the head gives ``B L V`` numbers, which do not fit into memory. ``L`` is the number
of tokens of a block, ``H`` the hidden size, ``V`` the size of the vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

LOGITS = 1 << 23
"""Logits in memory at once: 32 MiB."""


def hidden_states(model: nn.Module, ids: Tensor) -> Tensor:
    """Last hidden states ``[B, L, H]`` of ``ids [B, L]``. Padding is on the right and needs no mask."""
    body = getattr(model, str(model.base_model_prefix))
    states: Tensor = body(input_ids=ids).last_hidden_state
    return states


def masked_states(model: nn.Module, ids: Tensor, attention: Tensor | None, positions: Tensor) -> Tensor:
    """The input ``[n, H]`` of a masked language model's head, at ``positions`` of ``ids [B * L]``.

    Architectures have different layers between the body and the head: so the whole model runs, but the head
    is applied to no rows.
    """
    held: list[Tensor] = []

    def gather(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor]:
        held.append(given[0].flatten(0, -2)[positions])
        return (held[0][:0],)

    head = model.get_output_embeddings()  # type: ignore[operator]  # transformers' models have it
    hook = head.register_forward_pre_hook(gather)
    try:
        model(input_ids=ids, attention_mask=attention)
    finally:
        hook.remove()
    return held[0]


def takes_types(model: nn.Module) -> bool:
    """True if the model distinguishes question and passage by token types, as BERT does."""
    kinds: int = getattr(model.config, "type_vocab_size", 0)
    return kinds > 1


def span_logits(model: nn.Module, ids: Tensor, attention: Tensor, types: Tensor | None) -> Tensor:
    """``[B, 2, L]`` logits of a model for question answering: of the answer's start, and of its end."""
    more = {} if types is None else {"token_type_ids": types}
    outputs = model(input_ids=ids, attention_mask=attention, **more)
    return torch.stack([outputs.start_logits, outputs.end_logits], 1)


def head_of(model: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight ``[V', H]`` and bias ``[V']`` of the head; ``V'`` is at least ``V``."""
    head = model.get_output_embeddings()  # type: ignore[operator]  # as above
    return head.weight, getattr(head, "bias", None)


def logits_of(model: nn.Module, hidden: Tensor, vocab_size: int, *, bf16: bool) -> Iterator[Tensor]:
    """Logits ``[m, V]``, float32, of ``hidden [n, H]``, ``m`` rows at a time."""
    weight, bias = head_of(model)
    weight, bias = weight[:vocab_size], None if bias is None else bias[:vocab_size]
    with torch.autocast(hidden.device.type, torch.bfloat16, enabled=bf16):
        for rows in hidden.split(max(1, LOGITS // vocab_size)):
            yield nn.functional.linear(rows, weight, bias).float()
