"""Masked language modelling: as causal language modelling, but a row predicts a masked token.

Texts are packed into the same blocks as a causal model's, and row ``r`` is about the same token, which is
masked; the tokens before and after it are read.
"""

from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from feddistill import metrics
from feddistill.config import Config
from feddistill.config.training import DistillConfig
from feddistill.modelio.outputs import masked_states
from feddistill.modelio.packing import PackedTexts
from feddistill.models.tokenizers import mask_id
from feddistill.seeds import generator
from feddistill.tasks.language_model import CausalLanguageModel, cross_entropy
from feddistill.training import BatchLoss, Examples
from feddistill.training.blocks import BlockExamples, Masking
from feddistill.training.losses import MaskedLoss
from feddistill.types import ProgressCallback, TextSet


class MaskedLanguageModel(CausalLanguageModel):
    """A masked language model.

    In training, masked tokens are drawn anew each time a block is read; in proxy texts with a teacher, the
    tokens that the teacher predicts are masked instead half of the time.
    """

    masked: ClassVar[bool] = True
    draws_inputs: ClassVar[bool] = True

    @override
    @staticmethod
    def query_rows(config: Config, blocks: PackedTexts, name: str) -> NDArray[np.int64]:
        """The rows whose tokens are masked to predict or evaluate the texts ``name``: a random share of those
        in the loss, the same for all models."""
        in_loss = np.flatnonzero(blocks.loss_mask)
        count = max(1, round(config.language.mask_probability * len(in_loss)))
        drawn = generator(config.seed, "hidden", name).permutation(len(in_loss))[:count]
        return in_loss[np.sort(drawn)]

    @override
    @staticmethod
    def prepare_export(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        return

    @property
    def _masking(self) -> Masking:
        token = mask_id(self.specialist.tokenizer, self.name)
        return Masking(token, self.session.config.language.mask_probability)

    @override
    def loss(self, examples: Examples, distill: DistillConfig | None, seed: int) -> BatchLoss:
        assert isinstance(examples, BlockExamples), "of blocks"
        vocab_size = self.specialist.reader.vocab_size
        return MaskedLoss(examples, distill, vocab_size, self.session.bf16, self._masking, seed)

    @override
    def _inputs(self, blocks: PackedTexts, rows: NDArray[np.int64]) -> PackedTexts:
        return blocks.masking(rows, self._masking.token)

    @override
    def _states(self, ids: Tensor, attention: Tensor, positions: Tensor) -> Tensor:
        return masked_states(self.model, ids, attention, positions + 1)

    @override
    def metrics(self, texts: TextSet, on_step: ProgressCallback | None = None) -> dict[str, float]:
        blocks = self.blocks(texts)
        rows = self.query_rows(self.session.config, blocks, texts.name)
        nats, right = 0.0, 0
        for logits, targets in self._logits_and_targets(blocks, rows, on_step):
            nats += cross_entropy(logits, targets)
            right += int((logits.argmax(-1) == targets).sum())
        return metrics.masked(nats, right, len(rows)).as_dict()
