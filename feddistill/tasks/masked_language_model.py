"""A masked language model as the methods use it: the rows of an answer are tokens that are hidden.

Texts are the same blocks as a causal model's, and row ``r`` is about the same token; it is hidden, and what
stands before and behind it is read.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from feddistill import metrics
from feddistill.modelio.outputs import masked_states
from feddistill.modelio.packing import PackedTexts
from feddistill.models.tokenizers import mask_id
from feddistill.tasks.language_model import CausalLanguageModel
from feddistill.tasks.query import masked_rows
from feddistill.training.blocks import Masking
from feddistill.types import ProgressCallback, TextSet


class MaskedLanguageModel(CausalLanguageModel):
    """See ``Learner``. Texts that are learned have other tokens hidden each time that they are read; those of
    the proxy set, half of these times, those that the teacher was asked."""

    @property
    def _masking(self) -> Masking:
        tokenizer = self.specialist.reader.tokenizer
        return Masking(mask_id(tokenizer, self.name), self.session.config.language.mask_probability)

    def _shown(self, blocks: PackedTexts, rows: NDArray[np.int64]) -> PackedTexts:
        return blocks.masking(rows, self._masking.token)

    def _states(self, ids: Tensor, attention: Tensor, places: Tensor) -> Tensor:
        return masked_states(self.model, ids, attention, places + 1)

    def figures(self, texts: TextSet, on_step: ProgressCallback | None = None) -> dict[str, float]:
        """How well the model predicts hidden tokens of ``texts``, the same each time."""
        blocks = self.blocks(texts)
        rows = masked_rows(self.session.config, blocks, texts.name)
        targets, at, total, right = torch.from_numpy(blocks.targets[rows]), 0, 0.0, 0
        for logits in self._logits(self._shown(blocks, rows), rows, on_step):
            wanted = targets[at : at + len(logits)]
            nats = torch.nn.functional.cross_entropy(logits, wanted, reduction="none")
            total += float(nats.double().sum())
            right += int((logits.argmax(-1) == wanted).sum())
            at += len(logits)
        return metrics.masked(total, right, len(rows)).as_dict()
