"""Classifiers, and what all models have in common: source, layers kept, parts frozen, weights files.

A classifier maps ``input_ids [B, L]`` and ``attention_mask [B, L]`` to an output with ``.logits [B, V]``.
"""

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from feddistill.accounting import FlopMeter
from feddistill.config.models import ModelConfig, QueryOnlyModel, ScratchModel
from feddistill.errors import ModelError
from feddistill.modelio.outputs import takes_types
from feddistill.modelio.padding import PAD_TO, TYPE, padded
from feddistill.models import frozen
from feddistill.models.frozen import FrozenLayers, States
from feddistill.models.heads import class_names, order_head
from feddistill.models.layers import body_of, cut, frozen_depth, layer_list
from feddistill.models.pretrained import pretrained
from feddistill.models.sources import first_line
from feddistill.models.tokenizers import separates_pairs, tokenizer_of

PROJECTIONS = ("query", "value", "q_proj", "v_proj", "q_lin", "v_lin", "c_attn")
"""The projections that peft adapts by default, under the names of the architectures."""


SHORT = 32
"""Tokens up to which texts are short (``_attention``)."""


class MeanPoolClassifier(nn.Module):
    """An encoder, the mean of its last hidden states over the text, a linear head."""

    def __init__(self, encoder: nn.Module, hidden_size: int, classes: int, dropout: float = 0.1):
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden_size, classes)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """``[B, L]`` to ``logits [B, V]``."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **types).last_hidden_state
        if attention_mask is None:
            pooled = hidden.mean(1)
        else:
            mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * mask).sum(1) / mask.sum(1)
        return SequenceClassifierOutput(logits=self.head(self.dropout(pooled)))


@dataclass(frozen=True, slots=True)
class Specialist:
    """A model with the tokenizer that it reads with."""

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    max_tokens: int

    def encode(self, texts: Sequence[str], starts: Sequence[int] | None = None) -> list[list[int]]:
        """Token ids of each text or pair, cut at ``max_tokens``: of a pair the longer text.

        Where the tokenizer puts no token between two texts, the second begins with a line break.

        Args:
            texts: Texts, or pairs that a line break joins.
            starts: First character of each pair's second text; ``None`` for plain texts.

        Raises:
            ModelError: ``max_tokens`` is too small for pairs.
        """
        cut = {"truncation": "longest_first", "max_length": self.max_tokens}
        if starts is None:
            return [list(ids) for ids in self.tokenizer(list(texts), **cut).input_ids]
        needed = self.tokenizer.num_special_tokens_to_add(pair=True) + 2
        if self.max_tokens < needed:
            raise ModelError(f"max_tokens = {self.max_tokens}, but a pair of texts needs at least {needed}")
        between = 0 if separates_pairs(self.tokenizer) else 1
        types = reads_types(self.model)
        encoded = self.tokenizer(
            [text[: start - 1] for text, start in zip(texts, starts, strict=True)],
            [text[start - between :] for text, start in zip(texts, starts, strict=True)],
            return_token_type_ids=types,
            **cut,
        )
        if not types:
            return [list(ids) for ids in encoded.input_ids]
        return [
            [token + TYPE * kind for token, kind in zip(ids, kinds, strict=True)]
            for ids, kinds in zip(encoded.input_ids, encoded.token_type_ids, strict=True)
        ]

    @property
    def pad_id(self) -> int:
        """Fills texts that are shorter than others in a batch."""
        return int(self.tokenizer.pad_token_id)


def build(
    config: ModelConfig,
    classes: int,
    seed: int,
    name: str,
    public: Sequence[str] = (),
    *,
    labels: Sequence[str] = (),
) -> Specialist:
    """The model before any training.

    Args:
        config: The architecture.
        classes: Number of classes.
        seed: For random weights.
        name: The setting that errors name, as ``student.model``.
        public: The proxy texts, for a tokenizer that is trained on them.
        labels: The classes in order, to which the rows of a trained head are matched by name.

    Raises:
        ModelError: The source cannot be found or loaded, or lacks layers that ``config`` names, or its head
            has other classes.
    """
    tokenizer = tokenizer_of(config.source, name, public)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _with_head(config, classes, tokenizer, name, labels)
    cut(model, config, name)
    reads(model, tokenizer, config.max_tokens, name)
    return Specialist(model, tokenizer, config.max_tokens)


def reads_types(model: nn.Module) -> bool:
    """True if a classifier tells the texts of a pair apart by token types, as BERT does."""
    return takes_types(body_of(model))


def head_parameters(model: nn.Module) -> set[str]:
    """Names of the parameters that start from random weights."""
    body = "encoder." if isinstance(model, MeanPoolClassifier) else f"{model.base_model_prefix}."
    return {name for name, _ in model.named_parameters() if not name.startswith(body)}


def embeddings(model: nn.Module) -> nn.Embedding:
    """The embedding table of the input tokens."""
    body = model.encoder if isinstance(model, MeanPoolClassifier) else model
    table = body.get_input_embeddings()  # type: ignore[operator]  # transformers' models have it
    assert isinstance(table, nn.Embedding)
    return table


def trained_count(model: nn.Module) -> int:
    """Number of trained parameters, which federated averaging would send."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def trained(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that are trained, by name."""
    return {name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}


def save(model: nn.Module, path: Path) -> None:
    """Write the weights as safetensors.

    Raises:
        OSError: The disk is full or not writable, also if safetensors raises its own error.
    """
    try:
        save_model(model, str(path))
    except SafetensorError as error:
        raise OSError(errno.EIO, str(error)) from None


def take(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load weights into a model; of tied weights one suffices."""
    named = {key: value.data_ptr() for key, value in model.state_dict().items()}
    given = {named[key] for key in weights}
    assert all(place in given for place in named.values()), "weights of the whole model"
    model.load_state_dict(weights, strict=False)


def restore(model: nn.Module, path: Path) -> None:
    """Read weights that ``save`` wrote into a model of the same architecture."""
    try:
        load_model(model, str(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ModelError(f"{path} does not hold this model's weights: {str(error).splitlines()[0]}") from None


def _with_head(
    config: ModelConfig,
    classes: int,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    labels: Sequence[str],
) -> nn.Module:
    if config.head == "auto":
        known = class_names(config.source, name) if labels else ()
        count = {} if known else {"num_labels": classes}
        whole: nn.Module = loaded(config, AutoModelForSequenceClassification, count, tokenizer, name)
        if known:
            order_head(whole, known, labels, name)
        return whole
    model = loaded(config, AutoModel, {}, tokenizer, name)
    return MeanPoolClassifier(model, model.config.hidden_size, classes)


def loaded(
    config: ModelConfig, auto: Any, labels: dict[str, int], tokenizer: PreTrainedTokenizerBase, name: str
) -> Any:
    """A model of one of transformers' ``Auto`` classes, in float32; random weights follow torch's seed."""
    if isinstance(config.source, ScratchModel):
        scratch = _scratch_config(config.source, tokenizer, labels, name)
        try:
            model = auto.from_config(scratch, dtype=torch.float32, **_attention(config))
        except (ValueError, RuntimeError, TypeError) as error:
            raise ModelError(f"{name}.source.settings: {first_line(error)}") from None
    else:
        assert not isinstance(config.source, QueryOnlyModel), "a query-only model has no weights"
        model = pretrained(config.source, auto, name, **_attention(config), **labels)
        _fit_embeddings(model, len(tokenizer), config, name)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.use_cache = False
    return model


def _fit_embeddings(model: Any, tokens: int, config: ModelConfig, name: str) -> None:
    """Check that the embeddings have a row for each token, or add rows, drawn like those that are there."""
    rows = model.get_input_embeddings().weight.shape[0]
    if tokens <= rows:
        return
    if not config.resize_embeddings:
        raise ModelError(
            f"{name}: its tokenizer has {tokens} tokens, its embeddings have {rows} rows; "
            "resize_embeddings: true adds rows"
        )
    model.resize_token_embeddings(tokens)


def _attention(config: ModelConfig) -> dict[str, str]:
    """transformers' attention for short texts on a CPU, where torch's fused one is slower: in a step over
    16 texts of 20 tokens 5.6 ms a layer in bfloat16, for 0.6 (``bench/NOTES.md``)."""
    short = config.max_tokens <= SHORT and not torch.cuda.is_available()
    return {"attn_implementation": "eager"} if short else {}


def _scratch_config(
    source: ScratchModel, tokenizer: PreTrainedTokenizerBase, labels: dict[str, int], name: str
) -> PretrainedConfig:
    try:
        plain = AutoConfig.for_model(source.architecture)
    except ValueError:
        from transformers import CONFIG_MAPPING

        near = get_close_matches(source.architecture, list(CONFIG_MAPPING), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ModelError(
            f"{name}.source.architecture = {source.architecture!r} is not one of transformers'{hint}"
        ) from None
    known = {*plain.to_dict(), *plain.attribute_map}
    for key in source.settings:
        if key not in known:  # transformers would ignore it
            near = get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ModelError(f"{name}.source.settings.{key} is not a setting of {source.architecture}{hint}")
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return AutoConfig.for_model(source.architecture, **{**settings, **source.settings, **labels})


def remember_frozen(
    model: nn.Module, config: ModelConfig, name: str, known: dict[str, States], meter: FlopMeter | None = None
) -> FrozenLayers | None:
    """Cache the hidden states of the frozen layers, in place; ``None`` for a model that is trained from its
    first layer on, as one with adapters is.

    Args:
        model: As built.
        config: Its settings.
        name: The setting that errors name.
        known: The caches of models with equal layers.
        meter: Counts the frozen layers when they are computed, and no longer in every pass.
    """
    path, layers = layer_list(model, name)
    body = model.get_submodule(path.partition(".")[0])
    count = frozen_depth(body, layers)
    if not count:
        return None
    empty = States(config.frozen_cache_mb << 20)
    states = known.setdefault(frozen.fingerprint(body, layers, count), empty)
    if meter is not None:
        meter.cache([f"{path}.{index}" for index in range(count)])
    return FrozenLayers(body, list(layers[:count]), states, meter)


def read(model: nn.Module, tokenizer: PreTrainedTokenizerBase, length: int) -> None:
    """Run a model on the CPU on a text of ``length`` tokens, padded as in a batch; errors pass through."""
    pad = int(tokenizer.pad_token_id or 0)
    ids, mask = torch.full((1, padded(length)), pad), torch.zeros(1, padded(length), dtype=torch.long)
    ids[0, :length], mask[0, :length] = int(pad == 0), 1  # tokens of padding may have no position
    ids[0, 0] = len(tokenizer) - 1
    with torch.inference_mode():
        model.eval()(input_ids=ids, attention_mask=mask)


def reads(model: nn.Module, tokenizer: PreTrainedTokenizerBase, length: int, name: str) -> None:
    """Check that the model reads a text of ``length`` tokens, of which one is the tokenizer's last."""
    longest = getattr(body_of(model).config, "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise ModelError(f"{name}.max_tokens = {length}, but the model reads at most {longest}")
    if longest is not None and padded(length) > longest:
        raise ModelError(
            f"{name}.max_tokens = {length} is padded to {padded(length)}, but the model reads at most "
            f"{longest}; take {longest - longest % PAD_TO}"
        )
    try:
        read(model, tokenizer, length)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        reason = first_line(error)
        raise ModelError(
            f"{name}: the model cannot read {length} tokens of its tokenizer: {reason}"
        ) from None
