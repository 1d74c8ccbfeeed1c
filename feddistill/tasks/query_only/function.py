"""Query-only models that are Python functions (``docs/black_boxes.md``)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from feddistill.config.models import CallableModel
from feddistill.errors import ModelError
from feddistill.models.sources import first_line
from feddistill.tasks.query_only.predictions import SLACK, Block, ranked
from feddistill_kernels import TopK


def function(source: CallableModel, name: str) -> Callable[[Any], Any]:
    """Import the function of ``source``.

    Raises:
        ModelError: It cannot be imported, or is not callable.
    """
    module, _, attribute = source.name.partition(":")
    try:
        loaded: Any = import_module(module)
        for part in attribute.split("."):
            loaded = getattr(loaded, part)
    except Exception as error:  # the module's own code runs
        raise ModelError(f"{name}.source.name = {source.name!r}: {first_line(error)}") from error
    if not callable(loaded):
        raise ModelError(f"{name}.source.name = {source.name!r} is {type(loaded).__name__}, not callable")
    call: Callable[[Any], Any] = loaded
    return call


def classes(call: Callable[[Any], Any], texts: Sequence[str], count: int, name: str) -> Tensor:
    """``[N, V]`` log-probabilities of ``count`` classes that a function predicts for each of ``texts``.

    Raises:
        ModelError: The function fails, or a row is not a distribution.
    """
    try:
        log_probs = np.asarray(call(list(texts)), np.float64)
    except Exception as error:
        raise ModelError(f"{name}: the function failed: {first_line(error)}") from error
    if log_probs.shape != (len(texts), count):
        raise ModelError(
            f"{name}: {len(texts)} texts and {count} classes, but the answer has the shape "
            f"{list(log_probs.shape)}"
        )
    mass = np.exp(log_probs).sum(1)
    if not (np.abs(mass - 1) < SLACK).all():
        wrong = int(np.argmax(~(np.abs(mass - 1) < SLACK)))
        raise ModelError(
            f"{name}: the probabilities of text {wrong} add up to {mass[wrong]:.4g}; log-probabilities are "
            "required"
        )
    return torch.from_numpy(log_probs - np.log(mass)[:, None]).float()


@dataclass(frozen=True, slots=True)
class Function:
    """A language model that is a function of blocks."""

    call: Callable[[Any], Any]
    vocab_size: int
    name: str

    def query(self, blocks: Sequence[Block], width: int) -> list[TopK]:
        """Call the function once with all blocks."""
        try:
            replies = list(self.call([list(map(int, block)) for block in blocks]))
        except Exception as error:
            raise ModelError(f"{self.name}: the function failed: {first_line(error)}") from error
        if len(replies) != len(blocks):
            raise ModelError(f"{self.name}: {len(blocks)} blocks, but {len(replies)} answers")
        return [self._rows(block, reply, width) for block, reply in zip(blocks, replies, strict=True)]

    def _rows(self, block: Block, reply: Any, width: int) -> TopK:
        try:
            ids, log_probs = reply
        except (TypeError, ValueError):
            raise ModelError(f"{self.name}: an answer must be (ids, log_probs)") from None
        rows = ranked(ids, log_probs, self.vocab_size, self.name, width)
        if len(rows) != len(block) - 1:
            raise ModelError(
                f"{self.name}: a block of {len(block)} tokens has {len(block) - 1} to predict, but the "
                f"answer has {len(rows)} rows"
            )
        return rows
