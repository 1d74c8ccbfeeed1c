"""Models that point at the answer to a question in a passage."""

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
    """Whether it may say that there is no answer."""

    @property
    def pad_id(self) -> int:
        """What shorter pages of a batch are filled with."""
        return int(self.tokenizer.pad_token_id)

    @property
    def types(self) -> bool:
        """Whether the model reads types of tokens."""
        return takes_types(self.model)

    def windows(self, texts: TextSet) -> list[QAWindow]:
        """A page of each text; what of a passage is behind ``max_tokens`` is not read."""
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
    """The model as it is before any training; what is random in it is drawn from ``seed``.

    ``name`` is the setting that errors name, as ``student.model``; ``public`` are the proxy texts, for a
    tokenizer that is trained on them.

    Raises:
        ModelError: It cannot be had, cut, or made to read.
    """
    tokenizer = tokenizer_of(config.source, name, public)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = loaded(config, AutoModelForQuestionAnswering, {}, tokenizer, name)
    cut(model, config, name)
    reads(model, tokenizer, config.max_tokens, name)
    return PassageReader(model, tokenizer, config.max_tokens, name, reading.allow_no_answer)
