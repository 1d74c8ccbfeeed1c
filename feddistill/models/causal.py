"""Causal and masked language models, and the packing of texts into blocks for them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedTokenizerBase

from feddistill.config.models import ModelConfig, ScratchModel
from feddistill.config.training import LanguageConfig
from feddistill.errors import ModelError
from feddistill.modelio.outputs import head_of, hidden_states, masked_states
from feddistill.modelio.packing import PackedTexts, pack
from feddistill.models import cut, loaded, reads
from feddistill.models.tokenizers import TextBounds, first_token_ends, mask_id, text_bounds, tokenizer_of
from feddistill.types import TextSet


class LooksAheadError(ModelError):
    """A model attends to the tokens that it should predict: it is a masked one."""


class LooksBackError(ModelError):
    """A model does not attend to later tokens: it is a causal one."""


@dataclass(frozen=True, slots=True)
class TextReader:
    """Packs texts into blocks with a tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    bounds: TextBounds
    answers_only: bool = False
    """True to leave tokens of prompts out of losses and metrics."""

    @property
    def vocab_size(self) -> int:
        """``V``; a model's head may have more rows, which are padding."""
        return len(self.tokenizer)

    def blocks(self, texts: TextSet, length: int) -> PackedTexts:
        """Pack all of ``texts`` into blocks of ``length`` tokens."""
        encoded = self.tokenizer(
            list(texts.texts), add_special_tokens=False, return_offsets_mapping=self.answers_only
        )
        loss_mask = None
        if self.answers_only and texts.starts is not None:
            loss_mask = [
                [first >= start for first, _ in offsets]
                for offsets, start in zip(encoded.offset_mapping, texts.starts, strict=True)
            ]
        return pack(
            encoded.input_ids,
            self.bounds.end,
            length,
            loss_mask,
            begin=self.bounds.start if self.bounds.begins_blocks else None,
            predict_first=self.bounds.start is not None,
        )

    def bytes(self, texts: TextSet) -> int:
        """Bytes of the texts in UTF-8, without what is not predicted; for bits per byte."""
        starts = [0] * len(texts) if not self.answers_only or texts.starts is None else texts.starts
        if self.bounds.start is None:
            firsts = first_token_ends(self.tokenizer, texts.texts)
            starts = [max(*pair) for pair in zip(starts, firsts, strict=True)]
        return sum(len(text[start:].encode()) for text, start in zip(texts.texts, starts, strict=True))


def reader_of(
    tokenizer: PreTrainedTokenizerBase, config: ModelConfig, language: LanguageConfig, name: str
) -> TextReader:
    """The reader of a model with this tokenizer; ``name`` is the setting that errors name."""
    scratch = isinstance(config.source, ScratchModel)
    bounds = text_bounds(tokenizer, language.text_start, name, scratch=scratch)
    return TextReader(tokenizer, bounds, language.completion_only)


@dataclass(frozen=True, slots=True)
class Causal:
    """A language model with its reader."""

    model: nn.Module
    reader: TextReader
    max_tokens: int

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The reader's tokenizer."""
        return self.reader.tokenizer

    @property
    def pad_id(self) -> int:
        """Fills blocks that are shorter than others in a batch; no token of the block attends to it."""
        return int(self.tokenizer.pad_token_id)


def build(
    config: ModelConfig,
    seed: int,
    name: str,
    public: Sequence[str] = (),
    *,
    language: LanguageConfig | None = None,
    masked: bool = False,
) -> Causal:
    """The model before any training; arguments as for ``models.build``, and the settings of its texts.

    Raises:
        ModelError: As ``models.build``; or the model attends to later tokens or, if it should be ``masked``,
            does not; or its head is not linear.
    """
    tokenizer = tokenizer_of(config.source, name, public)
    reader = reader_of(tokenizer, config, language or LanguageConfig(), name)
    if masked:
        mask_id(tokenizer, name)
    auto = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = loaded(config, auto, {}, tokenizer, name)
    cut(model, config, name)
    reads(model, tokenizer, config.max_tokens, name)
    check = _is_masked if masked else _is_causal
    check(model, len(tokenizer), name)
    return Causal(model, reader, config.max_tokens)


def _is_causal(model: nn.Module, vocab_size: int, name: str) -> None:
    """Check, with two texts that differ in their last token, that nothing before it depends on it."""
    ids = _two_texts(vocab_size)
    model.eval()
    with torch.inference_mode():
        states, logits = hidden_states(model, ids), model(input_ids=ids).logits
        if not torch.allclose(states[0, :-1], states[1, :-1], atol=1e-4):
            kind = type(model).__name__
            raise LooksAheadError(f"{name}: {kind} looks ahead, so it is no causal language model")
        _is_linear(model, states, logits, vocab_size, name)


def _is_masked(model: nn.Module, vocab_size: int, name: str) -> None:
    """Check, with two texts that differ in their last token, that what is before it depends on it."""
    ids = _two_texts(vocab_size)
    model.eval()
    with torch.inference_mode():
        logits = model(input_ids=ids).logits
        states = masked_states(model, ids, None, torch.arange(ids.numel())).unflatten(0, ids.shape)
        if torch.equal(states[0, :-1], states[1, :-1]):
            kind = type(model).__name__
            raise LooksBackError(
                f"{name}: {kind} does not see what follows, so it is no masked language model"
            )
        _is_linear(model, states, logits, vocab_size, name)


def _two_texts(vocab_size: int) -> Tensor:
    ids = torch.arange(8).remainder(vocab_size).repeat(2, 1)
    ids[1, -1] = vocab_size - 1
    return ids


def _is_linear(model: nn.Module, states: Tensor, logits: Tensor, vocab_size: int, name: str) -> None:
    """Check that the logits are the head's product with ``states``."""
    weight, bias = head_of(model)
    if len(weight) < vocab_size:
        raise ModelError(f"{name}: the head has {len(weight)} rows, the tokenizer {vocab_size} tokens")
    made = nn.functional.linear(states, weight, bias)
    if not torch.allclose(made, logits, rtol=1e-3, atol=1e-3):
        raise ModelError(f"{name}: the head of {type(model).__name__} does more than a product")
