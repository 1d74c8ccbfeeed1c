"""Query-only language models behind an HTTP endpoint with OpenAI's completions API."""

import math
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from feddistill.alignment import Vocabulary
from feddistill.config.models import EndpointModel
from feddistill.errors import ModelError
from feddistill.models.sources import first_line
from feddistill.tasks.query_only.predictions import SLACK, Block, ranked
from feddistill_kernels import TopK

TRIES = 4
"""Attempts at a request that fails or that the server is too busy for."""

PAUSE = 0.5
"""Seconds before the second attempt; doubled before each further one."""

TOKEN_ID = "token_id:"
"""Prefix of ids in vLLM's replies, if it is configured to return ids."""


class Endpoint:
    """``POST {url}/completions`` with token ids as prompts and ``logprobs``."""

    def __init__(self, source: EndpointModel, tokenizer: PreTrainedTokenizerBase, name: str):
        import httpx  # takes 0.1 s, which most runs need not spend

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

    def query(self, blocks: Sequence[Block], width: int) -> list[TopK]:
        """Send one request per block, several at a time."""
        requests = [[list(map(int, block))] for block in blocks]
        if not self.source.echo:
            requests = [[ids[:end] for end in range(1, len(ids))] for (ids,) in requests]
        with ThreadPoolExecutor(self.source.parallel) as pool:
            replies = list(pool.map(self._predictions, requests))
        return [self._rows(rows, width) for rows in replies]

    def _predictions(self, prompts: list[list[int]]) -> list[Mapping[str, float]]:
        """Log-probabilities by token text, for each row of a block."""
        if not self.source.echo:
            return [self._first(choice) for choice in self._choices(prompts)]
        (choice,) = self._choices(prompts)
        return self._prompt(choice, prompts[0])

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
            choices = list(reply["choices"])
            indices = [choice.get("index", place) for place, choice in enumerate(choices)]
        except (KeyError, TypeError, AttributeError):
            raise ModelError(f"{self.name}: the reply has no choices") from None
        if len(choices) != len(prompts):
            raise ModelError(f"{self.name}: {len(prompts)} prompts, but {len(choices)} choices")
        if any(type(index) is not int for index in indices) or sorted(indices) != list(range(len(prompts))):
            raise ModelError(f"{self.name}: the choices have the index {indices}, not one for each prompt")
        self._check_length(reply, sum(map(len, prompts)))
        return [choices[indices.index(place)] for place in range(len(prompts))]

    def _check_length(self, reply: Mapping[str, Any], sent: int) -> None:
        """Check that the server has read what was sent: some put a token of their own before it."""
        usage = reply.get("usage")
        read = usage.get("prompt_tokens") if isinstance(usage, Mapping) else None
        if read and read != sent:
            raise ModelError(
                f"{self.name}: usage.prompt_tokens = {read}, but {sent} tokens were sent; the server must "
                "add no token to a prompt"
            )

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

    def _prompt(self, choice: Any, prompt: list[int]) -> list[Mapping[str, float]]:
        """All tokens but the first of a prompt that is echoed."""
        echoed, length = self._top(choice), len(prompt)
        if len(echoed) > length + 1:
            raise ModelError(
                f"{self.name}: a prompt of {length} tokens comes back with {len(echoed)}, of which one was "
                "to be new"
            )
        if len(echoed) < length:
            raise ModelError(
                f"{self.name}: a prompt of {length} tokens comes back with {len(echoed)}; if the server "
                "does not echo a prompt's log-probabilities, set echo: false"
            )
        tokens = choice["logprobs"].get("tokens")
        if isinstance(tokens, list):
            for place, (token, sent) in enumerate(zip(tokens, prompt, strict=False)):
                number = self._id(str(token))
                if number is not None and number != sent and self.tokenizer.decode([sent]) != token:
                    raise ModelError(
                        f"{self.name}: logprobs.tokens[{place}] is {token!r}, sent was id {sent}"
                    )
        rows = echoed[1:length]
        if not all(isinstance(row, Mapping) for row in rows):
            raise ModelError(f"{self.name}: tokens of a prompt come back without log-probabilities")
        return rows

    def _first(self, choice: Any) -> Mapping[str, float]:
        """The token after the prompt."""
        generated = self._top(choice)
        if not generated or not isinstance(generated[0], Mapping):
            raise ModelError(f"{self.name}: the reply has no top_logprobs")
        return generated[0]

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
        """The id of a token given by id, text or name; ``None`` for a part of a character, and for an id
        beyond the tokenizer's, since a head may have more rows."""
        digits = token.removeprefix(TOKEN_ID)
        if digits != token and digits.isascii() and digits.isdecimal():
            number = int(digits) if len(digits) < 12 else len(self.tokenizer)
            return number if number < len(self.tokenizer) else None
        by_bytes = self._by_bytes.get(token.encode("utf-8", "surrogatepass"))
        return self._by_name.get(token) if by_bytes is None else by_bytes

    def _log_prob(self, token: str, given: Any) -> float:
        """A checked entry of ``top_logprobs``."""
        number = isinstance(given, int | float) and not isinstance(given, bool)
        if not number or not given <= SLACK:
            raise ModelError(f"{self.name}: the log-probability of {token[:40]!r} is {str(given)[:40]}")
        return float(max(given, -1e30)) if given > -math.inf else -math.inf

    def _rows(self, predictions: list[Mapping[str, float]], width: int) -> TopK:
        columns = max([len(row) for row in predictions] + [1])
        ids = np.zeros((len(predictions), columns), np.int64)
        log_probs = np.full((len(predictions), columns), -np.inf)
        for index, row in enumerate(predictions):
            known: dict[int, float] = {}
            foreign = 0.0
            for token, given in row.items():
                value, number = self._log_prob(token, given), self._id(token)
                if number is None:
                    foreign += math.exp(value)
                else:  # of two spellings of one id, the likelier
                    known[number] = max(known.get(number, -np.inf), value)
            mass = foreign + sum(map(math.exp, known.values()))
            if foreign and mass > 1 + SLACK:
                raise ModelError(f"{self.name}: the probabilities of a row add up to {mass:.4g}")
            ids[index, : len(known)], log_probs[index, : len(known)] = list(known), list(known.values())
        return ranked(ids, log_probs, len(self.tokenizer), self.name, width)


def _first_words(text: str) -> str:
    """The beginning of an error message, on one line."""
    return " ".join(text.split())[:200]
