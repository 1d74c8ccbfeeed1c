"""Models for extractive question answering."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForQuestionAnswering, PreTrainedTokenizerBase

from feddistill.config.models import ModelConfig
from feddistill.config.training import QuestionAnsweringConfig
from feddistill.modelio.outputs import takes_types
from feddistill.modelio.passages import QAWindow, windows
from feddistill.models import cut, loaded, reads
from feddistill.models.tokenizers import tokenizer_of
from feddistill.types import TextSet


@dataclass(frozen=True, slots=True)
class PassageReader:
    """A model for question answering with the tokenizer that it reads with."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int
    name: str
    unanswerable: bool
    """True if it may predict that there is no answer."""

    @property
    def pad_id(self) -> int:
        """Fills windows that are shorter than others in a batch."""
        return int(self.tokenizer.pad_token_id)

    @property
    def types(self) -> bool:
        """True if the model reads token types."""
        return takes_types(self.model)

    def windows(self, texts: TextSet) -> list[QAWindow]:
        """A window of each text; passages are truncated at ``max_tokens``."""
        return [
            windows(
                self.tokenizer,
                *texts.question(row),
                self.max_tokens,
                self.name,
                unanswerable=self.unanswerable,
            )[0]
            for row in range(len(texts))
        ]


def build(
    config: ModelConfig, reading: QuestionAnsweringConfig, seed: int, name: str, public: Sequence[str] = ()
) -> PassageReader:
    """The model before any training; arguments as for ``models.build``.

    Raises:
        ModelError: It cannot be loaded, cut, or made to read its tokenizer's texts.
    """
    tokenizer = tokenizer_of(config.source, name, public)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = loaded(config, AutoModelForQuestionAnswering, {}, tokenizer, name)
    cut(model, config, name)
    reads(model, tokenizer, config.max_tokens, name)
    return PassageReader(model, tokenizer, config.max_tokens, name, reading.allow_no_answer)
