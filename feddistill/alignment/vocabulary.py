"""The bytes that each id of a tokenizer stands for, in any family of tokenizers."""

import hashlib
import json
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from feddistill.alignment.strings import Lookup, Strings
from feddistill.errors import ModelError

BYTES, METASPACE, WORDPIECE = "byte-level", "metaspace", "wordpiece"
_FALLBACK = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_UNUSED = re.compile(r"\[unused\d+\]")
_SEPARATOR = "\u2028"  # in no byte-level alphabet


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: printable Latin-1 is itself, the others follow from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


ALPHABET = _byte_alphabet()
LETTERS = {byte: letter for letter, byte in ALPHABET.items()}
_TRANSLATION = {ord(letter): byte for letter, byte in ALPHABET.items()}


class Vocabulary:
    """A fast tokenizer of Hugging Face, and the bytes of each of its ids.

    Args:
        tokenizer: Byte-level BPE, WordPiece, or BPE or unigram as in SentencePiece, with or without byte
            fallback.
        name: Its name in errors.

    Raises:
        ModelError: It is not a fast tokenizer, or of another family.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str = "the tokenizer"):
        self.name = name
        if not isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
            raise ModelError(f"{name} ({type(tokenizer).__name__}) is no fast tokenizer: byte spans need one")
        state = tokenizer.backend_tokenizer.to_str()
        self._state: dict[str, Any] = json.loads(state)
        # A copy, because transformers keeps the truncation of its last call in the original.
        self.backend = Tokenizer.from_str(state)
        self.backend.no_truncation()
        self.backend.no_padding()
        self.model_json: Mapping[str, Any] = self._state["model"]
        self.kind = _kind(self._state, name)
        self.eos_id: int | None = tokenizer.eos_token_id
        self.fallback = bool(self.model_json.get("byte_fallback"))
        """True if ``<0xNN>`` stands for a byte."""
        self.special_ids: dict[str, int] = {
            token.content: number
            for number, token in self.backend.get_added_tokens_decoder().items()
            if token.special
        }
        self.special_ids |= {
            str(content): int(tokenizer.convert_tokens_to_ids(content))
            for content in tokenizer.all_special_tokens
        }
        self.unknown_id: int | None = tokenizer.unk_token_id
        self.tokens = self._canonical()

    def __len__(self) -> int:
        """One more than the highest id."""
        return len(self.tokens)

    def _canonical(self) -> list[bytes | None]:
        vocabulary = self.backend.get_vocab(with_added_tokens=True)
        names: list[str | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
        for name, number in vocabulary.items():
            names[number] = name
        plain = [name if name is not None else "" for name in names]
        if self.kind == BYTES:
            contents = _from_alphabet(plain)
        elif self.kind == METASPACE:
            contents = [name.replace("▁", " ").encode() for name in plain]
            if self.fallback:
                for number, name in enumerate(plain):
                    if byte := _FALLBACK.fullmatch(name):
                        contents[number] = bytes([int(byte[1], 16)])
        else:
            prefix = self.model_json["continuing_subword_prefix"]
            contents = [
                name.removeprefix(prefix).encode() if name.startswith(prefix) else f" {name}".encode()
                for name in plain
            ]
            for number, name in enumerate(plain):
                if _UNUSED.fullmatch(name):
                    contents[number] = None
        for number, token in self.backend.get_added_tokens_decoder().items():
            contents[number] = token.content.encode()  # appears in a text unchanged
        for special in (*self.special_ids.values(), self.model_json.get("unk_id")):
            if special is not None:
                contents[special] = None
        return [token or None if name else None for token, name in zip(contents, names, strict=True)]

    @cached_property
    def fingerprint(self) -> str:
        """BLAKE2b-128, in hexadecimal, of all that the ids of a text and their bytes depend on.

        These are the bytes of all ids in order, the model with its merges or scores, normalizer,
        pre-tokenizer, added tokens and post-processor.  Names, padding, truncation and the way in which a
        release of ``tokenizers`` writes merges and disabled settings have no influence.
        """
        h = hashlib.blake2b(digest_size=16)
        for token in self.tokens:
            raw = b"" if token is None else token
            h.update((-1 if token is None else len(raw)).to_bytes(4, "little", signed=True) + raw)
        keys = ("added_tokens", "normalizer", "post_processor", "pre_tokenizer")
        settings = _set({key: self._state.get(key) for key in keys})
        model = {key: value for key, value in self.model_json.items() if key not in ("vocab", "merges")}
        merges = [m if isinstance(m, str) else " ".join(m) for m in self.model_json.get("merges") or ()]
        for part in (settings, _set(model), self.model_json.get("vocab"), merges, self.eos_id):
            h.update(json.dumps(part, sort_keys=True, separators=(",", ":")).encode() + b"\n")
        return h.hexdigest()

    @cached_property
    def by_bytes(self) -> dict[bytes, int]:
        """The id of each byte string; of several, the lowest that is not byte fallback."""
        ids = {token: n for n, token in reversed(list(enumerate(self.tokens))) if token is not None}
        if self.fallback:
            for number, token in reversed(list(enumerate(self.tokens))):
                if token is not None and not _FALLBACK.fullmatch(self.backend.id_to_token(number) or ""):
                    ids[token] = number
        return ids

    @cached_property
    def strings(self) -> Strings:
        """The bytes of each id; empty for special ids."""
        return Strings([token or b"" for token in self.tokens])

    @cached_property
    def lookup(self) -> Lookup:
        """Maps the hash of bytes to the id that stands for them."""
        numbers = np.fromiter(self.by_bytes.values(), np.int64, len(self.by_bytes))
        return Lookup(self.strings.whole()[numbers], numbers)

    @cached_property
    def spaced(self) -> NDArray[np.bool_]:
        """``[V]``, True if the id's bytes begin with a space."""
        return np.asarray(self.strings.first(0) == ord(" "))

    @cached_property
    def word(self) -> NDArray[np.bool_]:
        """``[V]``, True if the first character, after a space, can be inside a word (WordPiece's ``##``)."""
        return np.fromiter((_is_word(token) for token in self.tokens), np.bool_, len(self))

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest token."""
        return int(self.strings.lengths.max(initial=0))


def canonical_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """The bytes of each id; ``None`` for special, unknown and unused ids.

    Byte-level alphabets are decoded, ``▁`` is a space, ``<0xNN>`` with byte fallback a byte.  A WordPiece
    that begins a word includes the space before it, as in the other families; one with ``##`` does not.

    Raises:
        ModelError: It is not a fast tokenizer, or of a family that is not supported.
    """
    return Vocabulary(tokenizer).tokens


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """``Vocabulary.fingerprint`` of a tokenizer; equal if equal texts always get equal ids."""
    return Vocabulary(tokenizer).fingerprint


def is_word_character(character: str) -> bool:
    """True if BERT's pre-tokenizer leaves it in a word: no space, punctuation or Chinese character."""
    return character.isalnum() and not ("\u3400" <= character <= "\u9fff" or character >= "\U00020000")


def _is_word(token: bytes | None) -> bool:
    text = (token or b"").decode(errors="ignore").removeprefix(" ")
    return bool(text) and is_word_character(text[0])


def _from_alphabet(names: list[str]) -> list[bytes | None]:
    translated = _SEPARATOR.join(names).translate(_TRANSLATION).split(_SEPARATOR)
    if len(translated) != len(names):  # a token contains the separator, which is not in the alphabet
        translated = [name.translate(_TRANSLATION) for name in names]
    contents: list[bytes | None] = []
    for name, text in zip(names, translated, strict=True):
        known = text.isascii() or all(letter in ALPHABET for letter in name)
        contents.append(text.encode("latin-1") if known else None)
    return contents


def _kind(state: Mapping[str, Any], name: str) -> str:
    """The family of a tokenizer, from its components."""
    model = state["model"]
    parts = [part for key in ("pre_tokenizer", "normalizer", "decoder") for part in _parts(state.get(key))]
    types = {part["type"] for part in parts}
    if model["type"] == "WordPiece":
        return WORDPIECE
    plain = not (model.get("end_of_word_suffix") or model.get("continuing_subword_prefix"))
    if model["type"] in ("BPE", "Unigram") and plain:
        if "ByteLevel" in types:
            return BYTES
        if "Metaspace" in types or any("▁" in json.dumps(part, ensure_ascii=False) for part in parts):
            return METASPACE
    raise ModelError(
        f"{name} is {model['type']} with {', '.join(sorted(types)) or 'nothing'} around it; only byte-level "
        "BPE, WordPiece, and BPE or unigram with a space written as '▁' can be converted to bytes"
    )


def _parts(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    inner = [p for key in ("pretokenizers", "normalizers", "decoders") for p in part.get(key, ())]
    return [part] if not inner else [leaf for p in inner for leaf in _parts(p)]


def _set(value: Any) -> Any:
    """Drop disabled and absent settings, which releases of ``tokenizers`` write differently."""
    if isinstance(value, dict):
        return {key: _set(inner) for key, inner in value.items() if inner is not None and inner is not False}
    return value


def adds_space(vocabulary: Vocabulary) -> bool:
    """True if its pre-tokenizer puts a space before every text."""
    return any(part.get("add_prefix_space") for part in _parts(vocabulary._state.get("pre_tokenizer")))
