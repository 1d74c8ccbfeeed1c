"""Map each id of a client's vocabulary to an id of the student's."""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from feddistill.alignment.vocabulary import (
    BYTES,
    LETTERS,
    WORDPIECE,
    Vocabulary,
    adds_space,
)
from feddistill.errors import ModelError

Ids = NDArray[np.int32]
NOWHERE = -1
FORMAT = "feddistill-vocabulary-map-1"
_ARRAYS = ("plain", "bare", "spaced", "exact")


@dataclass(frozen=True, slots=True)
class VocabularyMap:
    """The student's id that receives the mass of each of a client's ``V`` ids; ``NOWHERE`` for the tail."""

    client: Vocabulary
    student: Vocabulary
    plain: Ids
    """``[V]``, for the id's bytes."""
    bare: Ids
    """``[V]``, for the bytes without the space that they begin with."""
    spaced: Ids
    """``[V]``, for the bytes with a space before them, if they have none."""
    exact: NDArray[np.int32]
    """``[V]``, 1 if ``plain`` has the same bytes or is the same special token, else 0."""
    cache: str = "not asked"
    """``hit``, ``built``, or why it was rebuilt."""
    exact_seconds: float = 0.0
    """Time to find ids of the same bytes."""
    sparse_seconds: float = 0.0
    """Time to split the others into the student's pieces."""

    @property
    def identity(self) -> bool:
        """True if both tokenizers are the same."""
        return self.client.fingerprint == self.student.fingerprint

    def coverage(self) -> dict[str, float]:
        """Shares ``exact``, ``first_piece`` and ``nowhere`` of the client's ids that have bytes."""
        known = np.fromiter((token is not None for token in self.client.tokens), np.bool_, len(self.client))
        count = max(int(known.sum()), 1)
        exact = int((known & (self.exact > 0)).sum()) / count
        lost = int((known & (self.plain == NOWHERE)).sum()) / count
        return {"exact": exact, "first_piece": 1 - exact - lost, "nowhere": lost}


def map_vocabulary(client: Vocabulary, student: Vocabulary, folder: Path | None = None) -> VocabularyMap:
    """Map a client's vocabulary into the student's.

    An id is mapped to the student's id of the same bytes.  If there is none, it is mapped to the first piece
    into which the student's tokenizer splits its bytes: a model that predicts ``" colour"`` token by token
    predicts ``" col"`` first.  Special ids are mapped to those of the same name, the end of a text to the end
    of a text, and the unknown token nowhere.

    Args:
        client: Vocabulary of the predicting model.
        student: Vocabulary of the learning model.
        folder: Caches maps by both fingerprints; ``None``: no cache.

    Raises:
        ModelError: The file with this map's name in ``folder`` is the map of other tokenizers.
    """
    if folder is None:
        return _build(client, student, "not asked")
    path = folder / f"{client.fingerprint}-{student.fingerprint}.safetensors"
    if not path.exists():
        made = _build(client, student, "built")
    else:
        loaded = _load(path, client, student)
        if isinstance(loaded, VocabularyMap):
            return loaded
        made = _build(client, student, f"built anew: {path} {loaded}")
    folder.mkdir(parents=True, exist_ok=True)
    arrays = {name: getattr(made, name) for name in _ARRAYS}
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_bytes(save(arrays, _metadata(client, student) | {"digest": _digest(arrays)}))
    partial.replace(path)
    return made


def check_alignable(client: str, student: str, same_tokenizer: bool, name: str) -> None:
    """Check that a client's predictions can be projected to the student's tokens.

    Args:
        client: Kind of the client's model, ``causal`` or ``masked``.
        student: Kind of the student's model.
        same_tokenizer: True if their fingerprints are equal.
        name: The client's name in errors.

    Raises:
        ModelError: The kinds differ, or both are masked models with different tokenizers.
    """
    kinds = ("causal", "masked")
    for kind in (client, student):
        if kind not in kinds:
            raise ValueError(f"a language model is {' or '.join(kinds)}, not {kind!r}")
    if client == "masked" and student == "causal":
        raise ModelError(
            f"{name}: a masked language model sees what follows, so it cannot predict the next token for a "
            "causal student; give it a causal model, or the student a masked one"
        )
    if client != student:
        raise ModelError(
            f"{name}: a causal language model does not see what follows, so it cannot predict for a masked "
            "student; give it a masked model, or the student a causal one"
        )
    if client == "masked" and not same_tokenizer:
        raise ModelError(
            f"{name}: a masked language model needs the student's tokenizer: the probabilities of its pieces "
            "are no chain, so they cannot be joined"
        )


def _build(client: Vocabulary, student: Vocabulary, cache: str) -> VocabularyMap:
    start = time.perf_counter()
    size = len(client)
    if client.fingerprint == student.fingerprint:
        same = np.arange(size, dtype=np.int32)
        ones = np.ones(size, np.int32)
        return VocabularyMap(client, student, same, same, same, ones, cache, time.perf_counter() - start)
    there = student.by_bytes
    plain = np.fromiter(
        (NOWHERE if token is None else there.get(token, NOWHERE) for token in client.tokens), np.int32, size
    )
    for number, other in _special(client, student):
        plain[number] = other
    exact = (plain != NOWHERE).astype(np.int32)
    middle = time.perf_counter()
    rest = [n for n in np.flatnonzero(plain == NOWHERE).tolist() if client.tokens[n] is not None]
    plain[rest] = first_pieces(student, [client.tokens[n] or b"" for n in rest])
    bare, spaced = _variant(client, student, plain, lead=False), _variant(client, student, plain, lead=True)
    seconds = middle - start, time.perf_counter() - middle
    return VocabularyMap(client, student, plain, bare, spaced, exact, cache, *seconds)


def _special(client: Vocabulary, student: Vocabulary) -> list[tuple[int, int]]:
    pairs = {
        number: student.special_ids[content]
        for content, number in client.special_ids.items()
        if content in student.special_ids and number != client.unknown_id
    }
    if client.eos_id is not None and student.eos_id is not None:
        pairs[client.eos_id] = student.eos_id
    return list(pairs.items())


def _variant(client: Vocabulary, student: Vocabulary, plain: Ids, *, lead: bool) -> Ids:
    """The map for the bytes without the space that they begin with, or with a space added."""
    variant = plain.copy()
    # A byte-level tokenizer neither adds nor drops a space.
    if (student if lead else client).kind == BYTES:
        return variant
    changed = [
        n
        for n, token in enumerate(client.tokens)
        if token is not None and len(token) > 1 - lead and token.startswith(b" ") != lead
    ]
    tokens = [client.tokens[n] or b"" for n in changed]
    strings = [b" " + token if lead else token[1:] for token in tokens]
    numbers = np.array([student.by_bytes.get(s, NOWHERE) for s in strings], np.int32)
    rest = np.flatnonzero(numbers == NOWHERE)
    numbers[rest] = first_pieces(student, [strings[i] for i in rest])
    variant[changed] = numbers
    return variant


def first_pieces(vocabulary: Vocabulary, strings: Sequence[bytes]) -> Ids:
    """The id of the first piece of each string; ``NOWHERE`` if the tokenizer cannot encode it.

    >>> import numpy
    >>> from tokenizers import Tokenizer, models, pre_tokenizers
    >>> from transformers import PreTrainedTokenizerFast
    >>> ids = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))} | {"ab": 256}
    >>> t = Tokenizer(models.BPE(ids, [("a", "b")]))
    >>> t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    >>> first_pieces(Vocabulary(PreTrainedTokenizerFast(tokenizer_object=t)), [b"abc"])
    array([256], dtype=int32)
    """
    if vocabulary.kind == WORDPIECE:
        ids = [_first_word_piece(vocabulary, string) for string in strings]
    else:
        ids = [_first_of_model(vocabulary, string) for string in strings]
        if vocabulary.kind == BYTES and not adds_space(vocabulary):
            _as_in_a_text(vocabulary, strings, ids)
    return np.array(ids, np.int32)


def _as_in_a_text(vocabulary: Vocabulary, strings: Sequence[bytes], ids: list[int]) -> None:
    """Re-encode strings that are valid text with the whole tokenizer, which splits more than its model."""
    texts = {n: text for n, string in enumerate(strings) if (text := _decoded(string)) is not None}
    encodings = vocabulary.backend.encode_batch_fast(list(texts.values()), add_special_tokens=False)
    for number, encoding in zip(texts, encodings, strict=True):
        first = encoding.ids[0] if encoding.ids else NOWHERE
        token = vocabulary.tokens[first] if first != NOWHERE else None
        if token is not None and strings[number].startswith(token):
            ids[number] = first


def _first_of_model(vocabulary: Vocabulary, string: bytes) -> int:
    if vocabulary.kind == BYTES:
        text: str | None = "".join(LETTERS[byte] for byte in string)
    else:
        decoded = _decoded(string)
        text = None if decoded is None else decoded.replace(" ", "▁")
    if text is None:  # part of a character: only byte fallback can encode it
        return vocabulary.by_bytes.get(string[:1], NOWHERE) if vocabulary.fallback else NOWHERE
    pieces = vocabulary.backend.model.tokenize(text)
    first = pieces[0].id if pieces else NOWHERE
    return first if first != NOWHERE and vocabulary.tokens[first] is not None else NOWHERE


def _first_word_piece(vocabulary: Vocabulary, string: bytes) -> int:
    """Longest match first, as in WordPiece; after white space among the pieces that begin a word."""
    text = _decoded(string)
    if text is None:
        return NOWHERE
    normalizer = vocabulary.backend.normalizer
    read = text if normalizer is None else normalizer.normalize_str(text)
    word = read.lstrip()
    raw = (b" " if text[:1].isspace() or len(word) < len(read) else b"") + word.encode()
    if not word:
        return NOWHERE
    for stop in range(min(len(raw), vocabulary.longest), raw.startswith(b" "), -1):
        if (number := vocabulary.by_bytes.get(raw[:stop])) is not None:
            return number
    return NOWHERE


def _decoded(string: bytes) -> str | None:
    try:
        return string.decode()
    except UnicodeDecodeError:
        return None


def _metadata(client: Vocabulary, student: Vocabulary) -> dict[str, str]:
    return {"format": FORMAT, "client": client.fingerprint, "student": student.fingerprint}


def _digest(arrays: dict[str, Ids]) -> str:
    h = hashlib.blake2b(digest_size=16)
    for name in _ARRAYS:
        h.update(arrays[name].astype("<i4").tobytes())
    return h.hexdigest()


def _load(path: Path, client: Vocabulary, student: Vocabulary) -> VocabularyMap | str:
    """The map in a file, or what is wrong with the file.

    Raises:
        ModelError: The file is intact, but the map of other tokenizers.
    """
    start = time.perf_counter()
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            for key, value in _metadata(client, student).items():
                if metadata.get(key) != value:
                    raise ModelError(
                        f"{path} is not the map of these two tokenizers: its {key} is "
                        f"{json.dumps(metadata.get(key))}, not {value}; move it away"
                    )
            if set(file.keys()) != set(_ARRAYS):
                return "is damaged: other arrays"
            arrays = {name: file.get_tensor(name) for name in _ARRAYS}
    except (OSError, SafetensorError) as error:
        return f"is damaged: {str(error).splitlines()[0]}"
    for name, array in arrays.items():
        if array.dtype != np.int32 or array.shape != (len(client),):
            return f"is damaged: {name} is {array.dtype} {list(array.shape)}"
        if array.min(initial=0) < NOWHERE or array.max(initial=0) >= max(len(student), 2):
            return f"is damaged: {name} has ids out of range"
    if _digest(arrays) != metadata.get("digest"):
        return "is damaged: it has another digest"
    return VocabularyMap(client, student, **arrays, cache="hit", exact_seconds=time.perf_counter() - start)
