"""Tokenizers: of a model, or trained on the proxy texts."""

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from feddistill.config.models import (
    HubModel,
    ModelSource,
    PackageModel,
    QueryOnlyModel,
    ScratchModel,
    TrainedTokenizer,
)
from feddistill.errors import ModelError
from feddistill.models.pretrained import adapter_base
from feddistill.models.sources import first_line, gguf_of, location

END, PAD, MASK = "<|end|>", "<|pad|>", "<|mask|>"


def tokenizer_of(
    source: ModelSource | TrainedTokenizer, name: str, public: Sequence[str] = ()
) -> PreTrainedTokenizerBase:
    """The tokenizer that a model of ``source`` reads with.

    Args:
        source: Of the model, or of the tokenizer itself.
        name: The setting that errors name, as ``student.model``.
        public: The proxy texts, on which a ``trained`` tokenizer is trained.

    Raises:
        ModelError: It cannot be loaded.
    """
    while isinstance(source, ScratchModel | QueryOnlyModel):
        assert source.tokenizer is not None, "checked with the configuration"
        source = source.tokenizer
    if isinstance(source, TrainedTokenizer):
        return _fast(_trained(source.vocab_size, source.mask, tuple(public)), source.mask)
    where, gguf = location(source, name), gguf_of(source)
    try:
        tokenizer = _load(source, where, gguf, name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"{name}.source: cannot load a tokenizer from {where!r}: {first_line(error)}"
        ) from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ModelError(f"{name}.source: the tokenizer has neither a padding nor an end token")
    return tokenizer


def _load(
    source: HubModel | PackageModel, where: str, gguf: dict[str, str], name: str
) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder; of an adapter without one, that of its base model."""
    revision = getattr(source, "revision", None) or "main"
    try:
        return AutoTokenizer.from_pretrained(where, revision=revision, **gguf)
    except (OSError, ValueError, KeyError):
        base = adapter_base(source, name)
        if base is None:
            raise
        return AutoTokenizer.from_pretrained(base)


def end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token that ends a text; for tokenizers without one (BERT's), of the separator."""
    for token in (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id):
        if token is not None:
            return int(token)
    raise ModelError("the tokenizer has no token that could end a text")


def without_token_types(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make a tokenizer return no token types, which GPT-2 would add to its input and Llama refuse."""
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names


def separates_pairs(tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if the tokenizer puts a token of its own between two texts: BERT's does, GPT-2's does not."""
    alone, both = (tokenizer.num_special_tokens_to_add(pair=pair) for pair in (False, True))
    return bool(both > alone)


def with_token_types(tokenizer: PreTrainedTokenizerBase) -> None:
    """Make a tokenizer return token types, which tell the texts of a pair apart."""
    kept = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    tokenizer.model_input_names = [kept[0], "token_type_ids", *kept[1:]]
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names


def mask_id(tokenizer: PreTrainedTokenizerBase, name: str) -> int:
    """Id of the mask token.

    Raises:
        ModelError: The tokenizer has none.
    """
    if tokenizer.mask_token_id is None:
        raise ModelError(f"{name}: its tokenizer has no mask token, which task = masked_lm needs")
    return int(tokenizer.mask_token_id)


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of all that the ids of a text depend on: equal if texts are tokenized alike."""
    tokens: Any = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    how = ""
    if tokenizer.is_fast:
        whole = json.loads(tokenizer.backend_tokenizer.to_str())
        for key in ("truncation", "padding", "post_processor"):  # set by calls, not part of the tokenizer
            whole.pop(key, None)
        how = json.dumps(whole, sort_keys=True)
    return hashlib.blake2b(json.dumps([tokens, how]).encode(), digest_size=16).hexdigest()


@lru_cache(maxsize=8)
def _trained(vocab_size: int, mask: bool, texts: tuple[str, ...]) -> str:
    """The tokenizer as JSON, from which each caller makes its own copy."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if not texts:
        raise ModelError("a trained tokenizer needs the proxy texts, and there are none")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD, *([MASK] if mask else [])],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return str(made.to_str())


def _fast(text: str, mask: bool) -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer

    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text),
        eos_token=END,
        pad_token=PAD,
        mask_token=MASK if mask else None,
    )
