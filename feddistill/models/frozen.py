"""Cache of the hidden states of frozen layers.

Embeddings and the first layers, if they are not trained, give the same hidden states in every epoch and
every round. ``fill`` computes them for texts of one length at a time, always as many rows, so that they
depend neither on other texts nor on the order of texts: a resumed run computes the same bits.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from feddistill.accounting import FlopMeter
from feddistill.errors import ModelError
from feddistill.modelio.padding import TYPE, Tokens, inputs

ROWS = 16
"""Rows of every pass that fills the cache; the last of a length is filled up with its first text."""

Key = tuple[bool, bytes]
"""Whether the pass is in bfloat16, and the token ids with their types."""


@dataclass(slots=True)
class States:
    """Hidden states ``[L, H]`` of texts, up to ``limit`` bytes."""

    limit: int
    kept: dict[Key, Tensor] = field(default_factory=dict)
    """The texts that were asked for last come last."""
    size: int = 0

    def make_room(self, wanted: Sequence[Key], width: int) -> list[Key]:
        """Drop what is in the way of ``wanted``; the keys to compute, of those that have room.

        Args:
            wanted: Distinct; the first ones are kept if not all have room.
            width: Bytes of the states of one token.
        """
        total, chosen = 0, dict.fromkeys(wanted)
        for key in wanted:
            total += width * len(key[1]) // 8
            if total > self.limit:
                del chosen[key]
        for key in wanted:
            if (states := self.kept.pop(key, None)) is None:
                continue
            if key in chosen:
                self.kept[key] = states
            else:
                self.size -= states.nbytes
        missing = [key for key in chosen if key not in self.kept]
        more = sum(width * len(ids) // 8 for _, ids in missing)
        while self.size + more > self.limit:
            self.size -= self.kept.pop(next(iter(self.kept))).nbytes
        return missing

    def keep(self, key: Key, states: Tensor) -> None:
        """Store the states of one text, for which there is room."""
        self.kept[key] = states
        self.size += states.nbytes


def stay_in_evaluation(module: nn.Module) -> None:
    """Put ``module`` into evaluation mode, which ``train`` of the whole model does not end: no dropout."""
    module.eval()
    module.train = _unchanged  # type: ignore[assignment]  # the parent's ``train`` ignores what it returns


def _unchanged(mode: bool = True) -> None:
    pass


def fingerprint(body: nn.Module, layers: nn.ModuleList, count: int) -> str:
    """Hash of the weights that the states of the first ``count`` layers depend on."""
    later = {id(p) for layer in layers[count:] for p in layer.parameters()}
    h = hashlib.sha256(f"{type(body).__name__} {count}".encode())
    for name, parameter in body.named_parameters():
        if id(parameter) not in later:
            h.update(name.encode())
            h.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return h.hexdigest()


def _passes(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    for length, count in sorted(_counts(lengths).items()):
        for _ in range(-(-count // ROWS)):
            yield ROWS, length


def passes_over(tokens: Sequence[Tokens]) -> Iterator[tuple[int, int]]:
    """Rows and length of each pass that computes the distinct ones of ``tokens``, in order of length."""
    return _passes([len(ids) // 8 for ids in {_bytes(text) for text in tokens}])


class _Reached(Exception):  # control flow: the layers after the last frozen one are skipped
    def __init__(self, output: Any):
        self.output = output


class FrozenLayers:
    """Makes a body take the output of its first layers, which are frozen, from ``states`` if it is there.

    ``body`` maps ``input_ids [B, L]``, padded on the right, and ``attention_mask`` to hidden states. A batch
    of which a text is missing runs through the frozen layers; both without dropout.
    """

    def __init__(
        self,
        body: nn.Module,
        layers: Sequence[nn.Module],
        states: States,
        meter: FlopMeter | None = None,
    ):
        """Change ``body`` in place.

        Args:
            body: The model without its head.
            layers: Its first layers.
            states: The cache, which models with equal layers share.
            meter: Counts what runs through the frozen layers. A ``fill`` counts all of its texts, also those
                that were in the cache: the operations of a step must not depend on which steps this process
                ran before.
        """
        self.body, self.states, self._meter = body, states, meter
        self._filling = False
        self._width = 0
        """Bytes of the states of one token; 0 until the first is computed."""
        self._batch: Tensor | None = None
        """Output of the last frozen layer for the batch, ``[B, L, H]``; ``None``: not in the cache."""
        for index, layer in enumerate(layers):
            layer.forward = self._instead(layer.forward, last=index == len(layers) - 1)
        body.register_forward_pre_hook(self._look_up, with_kwargs=True)

    def fill(self, tokens: Sequence[Tokens]) -> int:
        """Compute the states of ``tokens``, each text once; the number of distinct texts without room.

        Which ones have room depends on ``tokens`` and the limit alone.

        Raises:
            ModelError: A layer returns more than hidden states.
        """
        device = next(self.body.parameters()).device
        bf16 = torch.is_autocast_enabled(device.type)
        wanted = sorted({(bf16, _bytes(text)) for text in tokens}, key=lambda key: (len(key[1]), key[1]))
        for rows, length in _passes([len(ids) // 8 for _, ids in wanted]):
            self._ran(rows, length, ran=False)
        if not wanted:
            return 0
        if not self._width:
            probe = self._compute(torch.tensor([_ids(wanted[0]).tolist()], device=device))
            self._width = probe.shape[-1] * probe.element_size()
        by_length: defaultdict[int, list[Key]] = defaultdict(list)
        for key in self.states.make_room(wanted, self._width):
            by_length[len(key[1])].append(key)
        for same in by_length.values():
            for start in range(0, len(same), ROWS):
                group = same[start : start + ROWS]
                ids = [_ids(key) for key in group]
                full = np.stack(ids + ids[:1] * (ROWS - len(group)))
                output = self._compute(torch.from_numpy(full).to(device))
                self._ran(*full.shape, counted=False)
                for key, states in zip(group, output, strict=False):
                    self.states.keep(key, states.clone())
        return sum(key not in self.states.kept for key in wanted)

    def _instead(self, original: Callable[..., Any], *, last: bool) -> Callable[..., Any]:
        """A layer's ``forward`` that computes only what is not in the cache."""

        def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._batch is not None:
                return self._batch if last else hidden
            output = original(hidden, *args, **kwargs)
            if last and self._filling:
                raise _Reached(output)
            return output

        return forward

    def _look_up(self, body: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook of ``body``: get the states of the batch ready."""
        self._batch = None
        if self._filling:
            return
        ids, mask = _inputs(*args, **kwargs)
        bf16 = torch.is_autocast_enabled(ids.device.type)
        lengths = [ids.shape[1]] * len(ids) if mask is None else mask.sum(1).tolist()
        rows = ids.cpu().numpy()
        kept = self.states.kept
        texts = [kept.get((bf16, row[:length].tobytes())) for row, length in zip(rows, lengths, strict=True)]
        found = [text for text in texts if text is not None]
        if len(found) < len(texts):
            self._ran(*ids.shape)
            return
        batch = found[0].new_zeros(*ids.shape, found[0].shape[-1])
        if mask is None:
            torch.stack(found, out=batch)
        else:
            batch[mask.bool()] = torch.cat(found)
        self._batch = batch

    def _ran(self, rows: int, length: int, *, counted: bool = True, ran: bool = True) -> None:
        if self._meter is not None:
            self._meter.add_cached(rows, length, counted=counted, ran=ran)

    def _compute(self, ids: Tensor) -> Tensor:
        self._filling = True
        training = self.body.training
        self.body.eval()
        try:
            # Not inference mode: states that are computed in evaluation are trained on later.
            with torch.inference_mode(False), torch.no_grad():
                self.body(**inputs(ids.clone()), attention_mask=torch.ones_like(ids))
        except _Reached as reached:
            output = reached.output
        finally:
            self._filling = False
            self.body.train(training)
        if not isinstance(output, Tensor):
            raise ModelError(f"frozen_cache_mb: a layer of {type(self.body).__name__} gives more than states")
        return output


def _inputs(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *_: Any,
    token_type_ids: Tensor | None = None,
    **__: Any,
) -> tuple[Tensor, Tensor | None]:
    """The token ids, with their types, and the mask of a call of a model."""
    return input_ids if token_type_ids is None else input_ids + TYPE * token_type_ids, attention_mask


def _bytes(text: Tokens) -> bytes:
    return np.asarray(text, dtype=np.int64).tobytes()


def _ids(key: Key) -> NDArray[np.int64]:
    return np.frombuffer(key[1], np.int64)


def _counts(lengths: Sequence[int]) -> dict[int, int]:
    values, counts = np.unique(np.asarray(lengths, np.int64), return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))
