"""Tokenizers: of a model, or trained on the proxy texts."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
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
from feddistill.config.training import TextStart
from feddistill.errors import ModelError
from feddistill.models.pretrained import adapter_base
from feddistill.models.sources import first_line, gguf_of, location

END, PAD, MASK = "<|end|>", "<|pad|>", "<|mask|>"
STORED_START = "text_start"
"""Key in a tokenizer's files, with ``none`` for a model that was trained so."""


@dataclass(frozen=True, slots=True)
class TextBounds:
    """The tokens around each text that a language model reads: in training, evaluation and exports."""

    start: int | None
    """Id of the token before a text; ``None``: nothing, so that its first token is not predicted."""
    end: int
    """Id of the token after a text."""
    begins_blocks: bool
    """True if each block, or window of a long text, begins with ``start``; False if it begins with the last
    token of the one before."""


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


def text_bounds(
    tokenizer: PreTrainedTokenizerBase, text_start: TextStart, name: str, *, scratch: bool = False
) -> TextBounds:
    """The tokens around texts, as ``language.text_start`` says; the only place where this is decided.

    Args:
        tokenizer: The model's.
        text_start: The setting. ``auto``: the token that the tokenizer itself puts before a text that it
            encodes. If it puts none, ``bos`` for a model from scratch whose tokenizer has such a token that
            is not its end token, else ``eos``.
        name: The setting that errors name, as ``student.model``.
        scratch: True for a model that starts from random weights.

    Raises:
        ModelError: The tokenizer has no such token, puts several tokens before a text, or cannot be made to
            begin texts in this way.
    """
    end, (before, _) = end_id(tokenizer), _added(tokenizer)
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    if text_start == "auto":
        text_start = tokenizer.init_kwargs.get(STORED_START, "auto")
    if text_start == "auto":
        if len(before) > 1:
            tokens = " ".join(tokenizer.convert_ids_to_tokens(before))
            raise ModelError(
                f"{name}: its tokenizer puts {len(before)} tokens before a text ({tokens}), not one at most: "
                "choose language.text_start = bos, eos or none"
            )
        if before:
            return TextBounds(before[0], end, True)
        text_start = "bos" if scratch and bos not in (None, end) else "eos"
    if text_start == "bos" and bos is None:
        raise ModelError(f"{name}: its tokenizer has no token for language.text_start = bos")
    if not tokenizer.is_fast and before != ([bos] if text_start == "bos" else []):
        raise ModelError(
            f"{name}: language.text_start = {text_start} is not how its tokenizer begins texts, and it is no "
            f"fast one that could be changed, but {type(tokenizer).__name__}"
        )
    return TextBounds({"bos": bos, "eos": end}.get(text_start), end, text_start == "bos")


def begin_texts(tokenizer: PreTrainedTokenizerBase, bounds: TextBounds) -> None:
    """Make a tokenizer begin the texts that it encodes as ``bounds`` say, also when it is saved and loaded.

    What follows a text stays as it is. If texts do not begin with the bos token in training, the tokenizer
    gets another one, because other software begins texts with it: the end token, or none.
    """
    from tokenizers import processors

    before, after = _added(tokenizer)
    wanted = [bounds.start] if bounds.begins_blocks else []
    if before != wanted:
        backend = tokenizer.backend_tokenizer
        old = json.loads(backend.to_str()).get("post_processor")
        tokens = {int(n): str(tokenizer.convert_ids_to_tokens(n)) for n in (*wanted, *after) if n is not None}
        around = [[tokens[int(n)] for n in part if n is not None] for part in (wanted, after)]
        single = [*around[0], "$A", *around[1]]
        template = processors.TemplateProcessing(
            single=single,
            pair=[*single, "$B:1", *(f"{token}:1" for token in around[1])],
            special_tokens=[(token, number) for number, token in tokens.items()],
        )
        offsets = [processors.ByteLevel(trim_offsets=trim) for trim in _trims_offsets(old)]
        backend.post_processor = processors.Sequence([*offsets, template]) if offsets else template
    if not bounds.begins_blocks and tokenizer.bos_token_id is not None:
        tokenizer.bos_token = None if bounds.start is None else tokenizer.convert_ids_to_tokens(bounds.start)
    tokenizer.init_kwargs.pop(STORED_START, None)
    if bounds.start is None:
        tokenizer.init_kwargs[STORED_START] = "none"


def _added(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer itself puts before and after a text."""
    text = "a"
    whole = [int(n) for n in tokenizer(text, verbose=False).input_ids]
    plain = [int(n) for n in tokenizer(text, add_special_tokens=False, verbose=False).input_ids]
    for first in range(len(whole) - len(plain) + 1):
        if plain and whole[first : first + len(plain)] == plain:
            return whole[:first], whole[first + len(plain) :]
    ends = (tokenizer.eos_token_id, tokenizer.sep_token_id)  # no token of it stands for the text
    after = [number for number in whole if number in ends]
    return whole[: len(whole) - len(after)], after


def _trims_offsets(processor: Any) -> list[bool]:
    """``trim_offsets`` of each part of a post-processor, as JSON, that has it."""
    if processor is None:
        return []
    inner = [found for part in processor.get("processors", ()) for found in _trims_offsets(part)]
    return [processor["trim_offsets"]] if "trim_offsets" in processor else inner


def first_token_ends(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[int]:
    """For each text, the end of its first token, in characters."""
    encoded = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [offsets[0][1] if offsets else 0 for offsets in encoded.offset_mapping]


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
