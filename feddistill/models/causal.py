"""Causal and masked language models, and the packing of texts into blocks for them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import log2

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
from feddistill.types import Span, TextSet

LARGE = 1e4
"""Logits, about, of the check that a head is linear; far beyond a soft cap."""
EXACT = 1e-4
"""Error of these logits, relative to the largest of them."""
CHANGES = (
    "final_logit_softcapping",
    "logits_soft_cap",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "dim_model_base",
)
"""Settings of architectures that cap or scale logits, to name them in an error."""


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
        assert not texts.conversations, "written as texts before"
        encoded = self.tokenizer(
            list(texts.texts), add_special_tokens=False, return_offsets_mapping=self.answers_only
        )
        loss_mask: list[list[bool]] | None = None
        if self.answers_only and texts.turns is not None:
            loss_mask = [
                [any(first < end and last > start for start, end in spans) for first, last in offsets]
                for offsets, spans in zip(encoded.offset_mapping, texts.turns, strict=True)
            ]
        elif self.answers_only and texts.starts is not None:
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
        spans: list[tuple[Span, ...]] = [((0, len(text)),) for text in texts.texts]
        if self.answers_only and texts.turns is not None:
            spans = list(texts.turns)
        elif self.answers_only and texts.starts is not None:
            spans = [((start, len(t)),) for start, t in zip(texts.starts, texts.texts, strict=True)]
        ignored = [0] * len(texts)
        if self.bounds.start is None:
            ignored = first_token_ends(self.tokenizer, texts.texts)
        return sum(
            len(text[max(start, first) : end].encode())
            for text, parts, first in zip(texts.texts, spans, ignored, strict=True)
            for start, end in parts
        )


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
    with torch.no_grad():
        states = hidden_states(model, ids)
        if not torch.allclose(states[0, :-1], states[1, :-1], atol=1e-4):
            kind = type(model).__name__
            raise LooksAheadError(f"{name}: {kind} looks ahead, so it is no causal language model")
        _is_linear(model, lambda: (hidden_states(model, ids), model(input_ids=ids).logits), vocab_size, name)


def _is_masked(model: nn.Module, vocab_size: int, name: str) -> None:
    """Check, with two texts that differ in their last token, that what is before it depends on it."""
    ids = _two_texts(vocab_size)

    def states() -> Tensor:
        return masked_states(model, ids, None, torch.arange(ids.numel())).view(*ids.shape, -1)

    model.eval()
    with torch.no_grad():
        first, second = states()
        if torch.equal(first[:-1], second[:-1]):
            kind = type(model).__name__
            raise LooksBackError(
                f"{name}: {kind} does not see what follows, so it is no masked language model"
            )
        _is_linear(model, lambda: (states(), model(input_ids=ids).logits), vocab_size, name)


def _two_texts(vocab_size: int) -> Tensor:
    ids = torch.arange(8).remainder(vocab_size).repeat(2, 1)
    ids[1, -1] = vocab_size - 1
    return ids


def _is_linear(
    model: nn.Module, predict: Callable[[], tuple[Tensor, Tensor]], vocab_size: int, name: str
) -> None:
    """Check that the logits are the head's product with the states that ``predict`` returns with them.

    The logits of random weights are so small that a soft cap leaves them as they are. So the head is
    multiplied for the check, by a power of two, which is undone exactly.
    """
    weight, bias = head_of(model)
    if len(weight) < vocab_size:
        raise ModelError(f"{name}: the head has {len(weight)} rows, the tokenizer {vocab_size} tokens")
    is_zero = not weight.any()
    if is_zero:
        weight.copy_(torch.linspace(-1, 1, weight.numel()).view_as(weight))
    size = float(nn.functional.linear(predict()[0], weight, bias).abs().max())
    scale = 2.0 ** round(log2(LARGE / max(size, 1e-30)))
    try:
        weight.mul_(scale)
        states, logits = predict()
        made = nn.functional.linear(states, weight, bias)
    finally:
        weight.mul_(0.0 if is_zero else 1 / scale)
    if not (made - logits).abs().max() <= EXACT * made.abs().max():
        known = model.config.get_text_config().to_dict()  # type: ignore[operator, union-attr]  # transformers' models have it
        changes = [f"{key} = {known[key]}" for key in CHANGES if known.get(key) not in (None, 1)]
        raise ModelError(
            f"{name}: the logits of {type(model).__name__} are not the product of its hidden states and its "
            f"head{f' ({changes[0]})' if changes else ''}, which is what the losses compute"
        )
