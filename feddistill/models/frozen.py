"""Cache of the hidden states of frozen layers.

Embeddings and the first layers, if they are not trained, give the same hidden states in every epoch and
every round. They are computed for one text at a time, so that they depend neither on the other texts of a
batch nor on the order of texts: a resumed run computes the same bits.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from feddistill.errors import ModelError


@dataclass(slots=True)
class States:
    """Hidden states ``[L, H]`` by the token ids of a text, up to ``limit`` bytes."""

    limit: int
    kept: dict[tuple[bool, bytes], Tensor] = field(default_factory=dict)
    """By whether the pass was in bfloat16, and the token ids."""
    size: int = 0

    def keep(self, key: tuple[bool, bytes], states: Tensor) -> None:
        """Store them, if there is room."""
        if self.size + states.nbytes <= self.limit:
            self.kept[key] = states
            self.size += states.nbytes


def depth(body: nn.Module, layers: nn.ModuleList) -> int:
    """Number of ``layers``, from the input on, that are frozen together with everything before them."""
    inside = {id(p) for layer in layers for p in layer.parameters()}
    first = next(iter(layers[0].parameters()))
    for parameter in body.parameters():
        if parameter is first:
            break
        if id(parameter) not in inside and parameter.requires_grad:
            return 0
    frozen = [not any(p.requires_grad for p in layer.parameters()) for layer in layers]
    return (frozen + [False]).index(False)


def fingerprint(body: nn.Module, layers: nn.ModuleList, count: int) -> str:
    """Hash of the weights that the states of the first ``count`` layers depend on."""
    later = {id(p) for layer in layers[count:] for p in layer.parameters()}
    h = hashlib.sha256(f"{type(body).__name__} {count}".encode())
    for name, parameter in body.named_parameters():
        if id(parameter) not in later:
            h.update(name.encode())
            h.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return h.hexdigest()


def remember(body: nn.Module, layers: nn.ModuleList, count: int, states: States) -> None:
    """Make ``body`` take the output of the first ``count`` of its ``layers`` from ``states``.

    ``body`` maps ``input_ids [B, L]``, padded on the right, and ``attention_mask`` to hidden states. The
    frozen part runs without dropout, as in evaluation.

    Raises:
        ModelError: A layer returns more than hidden states (raised at the first text).
    """
    memory = _Memory(body, states)
    for index, layer in enumerate(layers[:count]):
        layer.forward = memory.instead(layer.forward, last=index == count - 1)
    body.register_forward_pre_hook(memory.look_up, with_kwargs=True)


class _Reached(Exception):  # control flow: the layers after the last frozen one are skipped
    def __init__(self, output: Any):
        self.output = output


def _inputs(
    input_ids: Tensor, attention_mask: Tensor | None = None, *_: Any, **__: Any
) -> tuple[Tensor, Tensor | None]:
    """The token ids and the mask of a call of a model."""
    return input_ids, attention_mask


class _Memory:
    def __init__(self, body: nn.Module, states: States):
        self.body, self.states = body, states
        self.computing = False
        self.batch: Tensor | None = None
        """Output of the last frozen layer for the current batch, ``[B, L, H]``."""

    def instead(self, original: Callable[..., Any], *, last: bool) -> Callable[..., Any]:
        """A layer's ``forward`` that computes only while states are being computed."""

        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self.computing:
                return self.batch if last else hidden
            output = original(hidden, *args, **kwargs)
            if last:
                raise _Reached(output)
            return output

        return forward

    def look_up(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of ``body``: get the states of the batch ready."""
        if self.computing:
            return
        ids, mask = _inputs(*args, **kwargs)
        lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(1).tolist()
        texts = [self._states(row[:length]) for row, length in zip(ids, lengths, strict=True)]
        self.batch = texts[0].new_zeros(*ids.shape, texts[0].shape[-1])
        for row, text in zip(self.batch, texts, strict=True):
            row[: len(text)] = text

    def _states(self, ids: Tensor) -> Tensor:
        key = (torch.is_autocast_enabled(ids.device.type), ids.cpu().numpy().tobytes())
        states = self.states.kept.get(key)
        if states is None:
            states = self._compute(ids)
            self.states.keep(key, states)
        return states

    def _compute(self, ids: Tensor) -> Tensor:
        training = self.body.training
        self.computing = True
        self.body.eval()
        try:
            # Not inference mode: states that are computed in evaluation are trained on later.
            with torch.inference_mode(False), torch.no_grad():
                self.body(input_ids=ids.clone()[None], attention_mask=torch.ones_like(ids)[None])
        except _Reached as reached:
            output = reached.output
        finally:
            self.computing = False
            self.body.train(training)
        if not isinstance(output, Tensor):
            raise ModelError(f"frozen_cache_mb: a layer of {type(self.body).__name__} gives more than states")
        return output[0]
