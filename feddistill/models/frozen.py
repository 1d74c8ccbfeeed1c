"""What frozen layers make of a text, computed once.

Embeddings and the layers from the input on that are not trained give the same hidden states in every epoch
and every round. They are computed for each text by itself, so that they do not depend on which texts share
a batch, nor on the order in which they are first met: a run that is resumed computes the same bits.
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
    """Hidden states ``[L, H]`` by the token ids of a text, as many as fit into ``limit`` bytes."""

    limit: int
    kept: dict[tuple[bool, bytes], Tensor] = field(default_factory=dict)
    """By whether it was in bfloat16, and the ids."""
    size: int = 0

    def keep(self, key: tuple[bool, bytes], states: Tensor) -> None:
        """Put it in, if there is room."""
        if self.size + states.nbytes <= self.limit:
            self.kept[key] = states
            self.size += states.nbytes


def depth(body: nn.Module, layers: nn.ModuleList) -> int:
    """How many of ``layers``, counted from the input, are frozen, and with all that stands before them."""
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
    """Of the weights that the first ``count`` layers' states depend on."""
    later = {id(p) for layer in layers[count:] for p in layer.parameters()}
    found = hashlib.sha256(f"{type(body).__name__} {count}".encode())
    for name, parameter in body.named_parameters():
        if id(parameter) not in later:
            found.update(name.encode())
            found.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def remember(body: nn.Module, layers: nn.ModuleList, count: int, states: States) -> None:
    """Have ``body`` look the first ``count`` of its ``layers`` up in ``states`` from now on.

    ``body`` maps ``input_ids [B, L]``, padded on the right, and ``attention_mask`` to hidden states. The
    frozen part runs without dropout, as when it is evaluated.

    Raises:
        ModelError: A layer gives more than hidden states (at the first text).
    """
    memory = _Memory(body, states)
    for index, layer in enumerate(layers[:count]):
        layer.forward = memory.instead(layer.forward, last=index == count - 1)
    body.register_forward_pre_hook(memory.look_up, with_kwargs=True)


class _Reached(Exception):  # no error: what follows the last frozen layer is not wanted
    def __init__(self, output: Any):
        self.output = output


class _Memory:
    def __init__(self, body: nn.Module, states: States):
        self.body, self.states = body, states
        self.computing = False
        self.batch: Tensor | None = None
        """What the last frozen layer gives for the batch that is being read, ``[B, L, H]``."""

    def instead(self, original: Callable[..., Any], *, last: bool) -> Callable[..., Any]:
        """A layer's ``forward`` that computes only when it is asked to."""

        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self.computing:
                return self.batch if last else hidden
            output = original(hidden, *args, **kwargs)
            if last:
                raise _Reached(output)
            return output

        return forward

    def look_up(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before ``body`` reads a batch: have its states ready."""
        if self.computing:
            return
        given = {**dict(zip(("input_ids", "attention_mask"), args, strict=False)), **kwargs}
        ids: Tensor = given["input_ids"]
        mask: Tensor | None = given.get("attention_mask")
        lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(1).tolist()
        texts = [self._of(row[:length]) for row, length in zip(ids, lengths, strict=True)]
        self.batch = texts[0].new_zeros(*ids.shape, texts[0].shape[-1])
        for row, text in zip(self.batch, texts, strict=True):
            row[: len(text)] = text

    def _of(self, ids: Tensor) -> Tensor:
        key = (torch.is_autocast_enabled(ids.device.type), ids.cpu().numpy().tobytes())
        found = self.states.kept.get(key)
        if found is None:
            found = self._compute(ids)
            self.states.keep(key, found)
        return found

    def _compute(self, ids: Tensor) -> Tensor:
        training = self.body.training
        self.computing = True
        self.body.eval()
        try:
            # Not inference mode: what is computed while answering is trained upon later.
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
