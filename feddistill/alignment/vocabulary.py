"""What the ids of a tokenizer stand for, as bytes, whatever way its family writes them."""

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
    """GPT-2's characters for bytes: printable Latin-1 stands for itself, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


ALPHABET = _byte_alphabet()
LETTERS = {byte: letter for letter, byte in ALPHABET.items()}
_TRANSLATION = {ord(letter): byte for letter, byte in ALPHABET.items()}


class Vocabulary:
    """A fast tokenizer of Hugging Face, and the bytes of each of its ids.

    Args:
        tokenizer: Byte-level BPE, WordPiece, or BPE or unigram in the manner of SentencePiece, with or
            without byte fallback.
        name: What errors call it.

    Raises:
        ModelError: It is no fast tokenizer, or of another family.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str = "the tokenizer"):
        self.name = name
        if not isinstance(getattr(tokenizer, "backend_tokenizer", None), Tokenizer):
            raise ModelError(f"{name} ({type(tokenizer).__name__}) is no fast tokenizer: byte spans need one")
        state = tokenizer.backend_tokenizer.to_str()
        self._state: dict[str, Any] = json.loads(state)
        # A copy: transformers leaves the truncation of its last call in its own.
        self.backend = Tokenizer.from_str(state)
        self.backend.no_truncation()
        self.backend.no_padding()
        self.model_json: Mapping[str, Any] = self._state["model"]
        self.kind = _kind(self._state, name)
        self.eos_id: int | None = tokenizer.eos_token_id
        self.fallback = bool(self.model_json.get("byte_fallback"))
        """Whether ``<0xNN>`` stands for a byte."""
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
            found = _from_alphabet(plain)
        elif self.kind == METASPACE:
            found = [name.replace("▁", " ").encode() for name in plain]
            if self.fallback:
                for number, name in enumerate(plain):
                    if byte := _FALLBACK.fullmatch(name):
                        found[number] = bytes([int(byte[1], 16)])
        else:
            prefix = self.model_json["continuing_subword_prefix"]
            found = [
                name.removeprefix(prefix).encode() if name.startswith(prefix) else f" {name}".encode()
                for name in plain
            ]
            for number, name in enumerate(plain):
                if _UNUSED.fullmatch(name):
                    found[number] = None
        for number, token in self.backend.get_added_tokens_decoder().items():
            found[number] = token.content.encode()  # stands in a text as it is
        for special in (*self.special_ids.values(), self.model_json.get("unk_id")):
            if special is not None:
                found[special] = None
        return [token or None if name else None for token, name in zip(found, names, strict=True)]

    @cached_property
    def fingerprint(self) -> str:
        """BLAKE2b-128, in hexadecimal, of all that decides which ids a text has and what they stand for.

        The bytes of the ids in order; the model with its merges or scores, normalizer, pre-tokenizer, added
        tokens, and what stands before and after a text.  Not names, padding or truncation, nor how a release
        of ``tokenizers`` writes merges and settings that are off.
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
        """The id of each byte string: one that is no byte fallback, else the lowest."""
        found = {token: n for n, token in reversed(list(enumerate(self.tokens))) if token is not None}
        if self.fallback:
            for number, token in reversed(list(enumerate(self.tokens))):
                if token is not None and not _FALLBACK.fullmatch(self.backend.id_to_token(number) or ""):
                    found[token] = number
        return found

    @cached_property
    def strings(self) -> Strings:
        """The bytes of each id, empty where it has none."""
        return Strings([token or b"" for token in self.tokens])

    @cached_property
    def lookup(self) -> Lookup:
        """From the hash of bytes to the id that stands for them."""
        numbers = np.fromiter(self.by_bytes.values(), np.int64, len(self.by_bytes))
        return Lookup(self.strings.whole()[numbers], numbers)

    @cached_property
    def spaced(self) -> NDArray[np.bool_]:
        """``[V]``, whose bytes begin with a space."""
        return np.asarray(self.strings.first(0) == ord(" "))

    @cached_property
    def word(self) -> NDArray[np.bool_]:
        """``[V]``, whose first character, a space apart, can go on a word: WordPiece would write ``##``."""
        return np.fromiter((_is_word(token) for token in self.tokens), np.bool_, len(self))

    @cached_property
    def longest(self) -> int:
        """Bytes of the longest token."""
        return int(self.strings.lengths.max(initial=0))


def canonical_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """What each id stands for; ``None`` where it is special, unknown or unused.

    Byte-level alphabets are undone, ``▁`` is a space, ``<0xNN>`` with byte fallback a byte.  A WordPiece that
    begins a word has the space before it, as everywhere else; one behind ``##`` has none.

    Raises:
        ModelError: See ``Vocabulary``.
    """
    return Vocabulary(tokenizer).tokens


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """``Vocabulary.fingerprint`` of a tokenizer: equal for equal ids of equal texts."""
    return Vocabulary(tokenizer).fingerprint


def is_word_character(character: str) -> bool:
    """Whether BERT's pre-tokenizer leaves it beside a letter: no space, punctuation or Chinese character."""
    return character.isalnum() and not ("\u3400" <= character <= "\u9fff" or character >= "\U00020000")


def _is_word(token: bytes | None) -> bool:
    text = (token or b"").decode(errors="ignore").removeprefix(" ")
    return bool(text) and is_word_character(text[0])


def _from_alphabet(names: list[str]) -> list[bytes | None]:
    translated = _SEPARATOR.join(names).translate(_TRANSLATION).split(_SEPARATOR)
    if len(translated) != len(names):  # a token that has the separator, which is none of the alphabet
        translated = [name.translate(_TRANSLATION) for name in names]
    found: list[bytes | None] = []
    for name, text in zip(names, translated, strict=True):
        known = text.isascii() or all(letter in ALPHABET for letter in name)
        found.append(text.encode("latin-1") if known else None)
    return found


def _kind(state: Mapping[str, Any], name: str) -> str:
    """The family, by what the tokenizer is made of."""
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
        "BPE, WordPiece, and BPE or unigram with a space written as '▁' can be told in bytes"
    )


def _parts(part: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if part is None:
        return []
    inner = [p for key in ("pretokenizers", "normalizers", "decoders") for p in part.get(key, ())]
    return [part] if not inner else [leaf for p in inner for leaf in _parts(p)]


def _set(value: Any) -> Any:
    """Without what is off or absent: releases write more or less of that."""
    if isinstance(value, dict):
        return {key: _set(inner) for key, inner in value.items() if inner is not None and inner is not False}
    return value


def adds_space(vocabulary: Vocabulary) -> bool:
    """Whether its pre-tokenizer puts a space before every text."""
    return any(part.get("add_prefix_space") for part in _parts(vocabulary._state.get("pre_tokenizer")))
