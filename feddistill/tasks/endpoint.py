"""Models that are only asked: a Python function, or an endpoint in the manner of OpenAI's completions.

What they say of a token is a few ids with their log-probabilities, as ``TopK``: ``n`` rows, ``V`` ids.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from feddistill.alignment import Vocabulary
from feddistill.config.models import BlackBoxModel, CallableModel, EndpointModel
from feddistill.errors import ModelError
from feddistill.models.sources import first_line
from feddistill.payload.answers import fill_ids
from feddistill_kernels import TopK

Block = Sequence[int]

SLACK = 1e-3
"""By which probabilities may add up to more than 1."""

TRIES = 4
"""Of a request that a server is too busy for, or that does not arrive."""

PAUSE = 0.5
"""Seconds before the second; doubled each time."""

TOKEN_ID = "token_id:"
"""What vLLM writes before an id, where it is asked to write ids."""


class BlackBox(Protocol):
    """A language model that is only asked."""

    def ask(self, blocks: Sequence[Block], width: int) -> list[TopK]:
        """What it says of each block's tokens but the first, ``[L - 1]`` rows of ``width`` entries.

        Raises:
            ModelError: It cannot be reached, or says what is no answer.
        """
        ...


def open_box(
    source: BlackBoxModel, tokenizer: PreTrainedTokenizerBase, name: str
) -> tuple[BlackBox, int | None]:
    """The model of ``source``, and how many entries a row has at the most.

    Raises:
        ModelError: There is none.
    """
    if isinstance(source, CallableModel):
        return Called(function(source, name), len(tokenizer), f"{name} ({source.name})"), None
    return Endpoint(source, tokenizer, name), source.top


def function(source: CallableModel, name: str) -> Callable[[Any], Any]:
    """What ``source`` names.

    Raises:
        ModelError: It cannot be imported, or called.
    """
    module, _, attribute = source.name.partition(":")
    try:
        found: Any = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # whatever the module does as it is imported
        raise ModelError(f"{name}.source.name = {source.name!r}: {first_line(error)}") from error
    if not callable(found):
        raise ModelError(f"{name}.source.name = {source.name!r} is {type(found).__name__}, not callable")
    made: Callable[[Any], Any] = found
    return made


def classes(call: Callable[[Any], Any], texts: Sequence[str], count: int, name: str) -> Tensor:
    """``[N, V]`` log-probabilities that a function gives the ``count`` classes of each of ``texts``.

    Raises:
        ModelError: It fails, or gives what is no distribution.
    """
    try:
        said = np.asarray(call(list(texts)), np.float64)
    except Exception as error:
        raise ModelError(f"{name}: the function failed: {first_line(error)}") from error
    if said.shape != (len(texts), count):
        raise ModelError(
            f"{name}: {len(texts)} texts and {count} classes, but the answer has the shape {list(said.shape)}"
        )
    mass = np.exp(said).sum(1)
    if not (np.abs(mass - 1) < SLACK).all():
        wrong = int(np.argmax(~(np.abs(mass - 1) < SLACK)))
        raise ModelError(
            f"{name}: the probabilities of text {wrong} add up to {mass[wrong]:.4g}; log-probabilities are "
            "wanted"
        )
    return torch.from_numpy(said - np.log(mass)[:, None]).float()


def ranked(
    ids: ArrayLike, log_probs: ArrayLike, vocab_size: int, name: str, width: int | None = None
) -> TopK:
    """Rows as they were said, in the order of their probabilities, with as many entries as ``width``.

    Args:
        ids: ``[n, k]``.
        log_probs: ``[n, k]``; an entry of ``-inf`` is none. A row of none has no opinion.
        vocab_size: ``V``.
        name: What errors call the model.
        width: Entries that a row is cut or filled up to; ``None`` for ``k``. What fills it up has what each
            of the others has where they are all alike.

    Raises:
        ModelError: They are no distributions over some of ``V`` ids.
    """
    try:
        chosen, said = np.asarray(ids, np.int64), np.asarray(log_probs, np.float64)
    except (TypeError, ValueError) as error:
        raise ModelError(f"{name}: an answer is no array: {first_line(error)}") from None
    if chosen.ndim != 2 or chosen.shape != said.shape:
        raise ModelError(
            f"{name}: ids and log-probabilities must both be [n, k], got {list(chosen.shape)} and "
            f"{list(said.shape)}"
        )
    there = said > -np.inf
    if np.isnan(said).any() or (said > SLACK).any():
        raise ModelError(f"{name}: answers are not log-probabilities: {said[~(said <= SLACK)].flat[0]:.4g}")
    if ((chosen < 0) | (chosen >= vocab_size))[there].any():
        wrong = chosen[there & ((chosen < 0) | (chosen >= vocab_size))].flat[0]
        raise ModelError(f"{name}: id {wrong} is not one of its tokenizer's {vocab_size}")
    ordered = np.sort(np.where(there, chosen, -1 - np.arange(chosen.shape[1])), axis=1)
    if (ordered[:, 1:] == ordered[:, :-1]).any():
        raise ModelError(f"{name}: a row names an id twice")
    mass = np.exp(said).sum(1)
    if (mass > 1 + SLACK).any():
        raise ModelError(f"{name}: the probabilities of a row add up to {mass.max():.4g}")
    complete = there.sum(1) == vocab_size
    said = said - np.log(np.where(complete | (mass > 1), mass, 1.0))[:, None]
    return _fitted(chosen, said, vocab_size, width or chosen.shape[1])


def fitted(rows: TopK, width: int) -> TopK:
    """The same with ``width`` entries a row; its own come likeliest first."""
    ids, log_probs = rows.ids.numpy().astype(np.int64), rows.log_probs.double().numpy()
    return _fitted(ids, log_probs, rows.vocab_size, width)


def _fitted(ids: NDArray[np.int64], said: NDArray[np.float64], vocab_size: int, width: int) -> TopK:
    width = min(width, vocab_size)
    short = max(0, width - ids.shape[1])
    ids = np.pad(ids, ((0, 0), (0, short)))
    said = np.pad(said, ((0, 0), (0, short)), constant_values=-np.inf)
    order = np.argsort(-said, axis=1, kind="stable")[:, :width]
    ids, said = np.take_along_axis(ids, order, 1), np.take_along_axis(said, order, 1)
    there = said > -np.inf
    count = there.sum(1)
    rest = np.where(count == vocab_size, 0.0, np.clip(1 - np.exp(said).sum(1), 1e-9, 1.0))
    share = rest / np.maximum(vocab_size - count, 1)
    silent = count == 0
    with np.errstate(divide="ignore"):
        filled = np.where(there, said, np.where(silent, -np.inf, np.log(share))[:, None])
        tail = np.where(silent, 0.0, np.log(share * (vocab_size - width)))
    chosen = np.where(there, ids, fill_ids(np.where(there, ids, 0).astype(np.int32), there))
    order = np.argsort(-filled, axis=1, kind="stable")  # an entry can be less likely than those not named
    chosen, filled = np.take_along_axis(chosen, order, 1), np.take_along_axis(filled, order, 1)
    return TopK(
        torch.from_numpy(chosen.astype(np.int32)),
        torch.from_numpy(filled.astype(np.float32)),
        torch.from_numpy(tail.astype(np.float32)),
        vocab_size,
    )


@dataclass(frozen=True, slots=True)
class Called:
    """A function of blocks: see ``docs/black_boxes.md``."""

    call: Callable[[Any], Any]
    vocab_size: int
    name: str

    def ask(self, blocks: Sequence[Block], width: int) -> list[TopK]:
        """See ``BlackBox``."""
        try:
            said = list(self.call([list(map(int, block)) for block in blocks]))
        except Exception as error:
            raise ModelError(f"{self.name}: the function failed: {first_line(error)}") from error
        if len(said) != len(blocks):
            raise ModelError(f"{self.name}: {len(blocks)} blocks, but {len(said)} answers")
        found = []
        for block, answer in zip(blocks, said, strict=True):
            try:
                ids, log_probs = answer
            except (TypeError, ValueError):
                raise ModelError(f"{self.name}: an answer must be (ids, log_probs)") from None
            rows = ranked(ids, log_probs, self.vocab_size, self.name, width)
            if len(rows) != len(block) - 1:
                raise ModelError(
                    f"{self.name}: a block of {len(block)} tokens has {len(block) - 1} to predict, but the "
                    f"answer has {len(rows)} rows"
                )
            found.append(rows)
        return found


class Endpoint:
    """``POST {url}/completions`` with token ids as prompts and ``logprobs``."""

    def __init__(self, source: EndpointModel, tokenizer: PreTrainedTokenizerBase, name: str):
        import httpx  # a tenth of a second, of which most runs have no use

        self.source, self.tokenizer = source, tokenizer
        self.name = f"{name} ({source.url})"
        headers = {}
        if source.key_variable is not None:
            key = os.environ.get(source.key_variable)
            if not key:
                raise ModelError(f"{name}.source.key_variable: {source.key_variable} is not set")
            headers["Authorization"] = f"Bearer {key}"
        self._http = httpx.Client(timeout=source.timeout, headers=headers)
        self._errors = (httpx.TransportError, httpx.InvalidURL)

    def ask(self, blocks: Sequence[Block], width: int) -> list[TopK]:
        """See ``BlackBox``."""
        asks = [[list(map(int, block))] for block in blocks]
        if not self.source.echo:
            asks = [[ids[:end] for end in range(1, len(ids))] for (ids,) in asks]
        with ThreadPoolExecutor(self.source.parallel) as pool:
            said = list(pool.map(self._told, asks))
        return [self._rows(rows, width) for rows in said]

    def _told(self, prompts: list[list[int]]) -> list[Mapping[str, float]]:
        """Of one block: what each row says."""
        if not self.source.echo:
            return [self._first(choice) for choice in self._choices(prompts)]
        (choice,) = self._choices(prompts)
        return self._prompt(choice, len(prompts[0]))

    def _choices(self, prompts: list[list[int]]) -> list[Any]:
        request = {
            "model": self.source.model,
            "prompt": prompts,
            "max_tokens": 1,
            "temperature": 0,
            "logprobs": self.source.top,
            "echo": self.source.echo,
        }
        reply = self._post(request)
        try:
            choices = sorted(reply["choices"], key=lambda choice: choice.get("index", 0))
        except (KeyError, TypeError, AttributeError):
            raise ModelError(f"{self.name}: the reply has no choices") from None
        if len(choices) != len(prompts):
            raise ModelError(f"{self.name}: {len(prompts)} prompts, but {len(choices)} choices")
        return choices

    def _post(self, request: dict[str, Any]) -> Any:
        url = f"{self.source.url.rstrip('/')}/completions"
        for attempt in range(TRIES):
            if attempt:
                time.sleep(PAUSE * 2 ** (attempt - 1))
            try:
                reply = self._http.post(url, json=request)
            except self._errors as error:
                reason = f"cannot be reached: {first_line(error)}"
                continue
            if reply.status_code == 429 or reply.status_code >= 500:
                reason = f"answers {reply.status_code}: {_first_words(reply.text)}"
                continue
            if reply.status_code != 200:
                raise ModelError(f"{self.name} answers {reply.status_code}: {_first_words(reply.text)}")
            try:
                return reply.json()
            except ValueError:
                raise ModelError(f"{self.name}: the reply is not JSON") from None
        raise ModelError(f"{self.name} {reason} ({TRIES} tries)")

    def _prompt(self, choice: Any, length: int) -> list[Mapping[str, float]]:
        """Of a prompt that is told again: all its tokens but the first."""
        said = self._top(choice)
        if len(said) < length:
            raise ModelError(
                f"{self.name}: a prompt of {length} tokens comes back with {len(said)}; where the server "
                "does not echo a prompt's log-probabilities, set echo: false"
            )
        rows = said[1:length]
        if not all(isinstance(row, Mapping) for row in rows):
            raise ModelError(f"{self.name}: tokens of a prompt come back without log-probabilities")
        return rows

    def _first(self, choice: Any) -> Mapping[str, float]:
        """Of the token that was added."""
        said = self._top(choice)
        if not said or not isinstance(said[0], Mapping):
            raise ModelError(f"{self.name}: the reply has no top_logprobs")
        return said[0]

    def _top(self, choice: Any) -> list[Any]:
        try:
            return list(choice["logprobs"]["top_logprobs"])
        except (KeyError, TypeError):
            raise ModelError(f"{self.name}: the reply has no logprobs.top_logprobs") from None

    @cached_property
    def _by_bytes(self) -> Mapping[bytes, int]:
        return Vocabulary(self.tokenizer, self.name).by_bytes

    @cached_property
    def _by_name(self) -> Mapping[str, int]:
        return dict(self.tokenizer.get_vocab())

    def _id(self, token: str) -> int | None:
        """By its number, its text, or its name; ``None`` for part of a character, which has no text."""
        if token.startswith(TOKEN_ID) and token[len(TOKEN_ID) :].isdigit():
            return int(token[len(TOKEN_ID) :])
        found = self._by_bytes.get(token.encode("utf-8", "surrogatepass"))
        return self._by_name.get(token) if found is None else found

    def _rows(self, said: list[Mapping[str, float]], width: int) -> TopK:
        columns = max((len(row) for row in said), default=1)
        ids = np.zeros((len(said), columns), np.int64)
        log_probs = np.full((len(said), columns), -np.inf)
        for at, row in enumerate(said):
            known: dict[int, float] = {}
            for token, value in row.items():
                number = self._id(token)
                if not isinstance(value, int | float):
                    raise ModelError(f"{self.name}: the log-probability of {token!r} is {value!r}")
                if number is not None:  # two spellings of one id: the likelier
                    known[number] = max(known.get(number, -np.inf), value)
            ids[at, : len(known)], log_probs[at, : len(known)] = list(known), list(known.values())
        return ranked(ids, log_probs, len(self.tokenizer), self.name, width)


def _first_words(text: str) -> str:
    """Of what a server says about an error."""
    return " ".join(text.split())[:200]
