"""Clients whose model is only asked: a training leaves it as it is, and it is asked everything once.

What a language model says is kept in the run, so that a round, or a run that is resumed, does not pay for it
again. Nobody sees its operations: none are counted.
"""

from collections.abc import Iterator
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from feddistill import metrics, models, payload
from feddistill.config.models import BlackBoxModel, CallableModel, ModelConfig
from feddistill.federation import encoding
from feddistill.modelio.packing import PackedTexts
from feddistill.models import causal
from feddistill.models.tokenizers import tokenizer_of
from feddistill.store import layout
from feddistill.store.logit_files import TopKFile
from feddistill.store.run_directory import Json
from feddistill.tasks import endpoint
from feddistill.tasks.language_model import CausalLanguageModel
from feddistill.tasks.learner import Learner
from feddistill.tasks.translation import kept_before
from feddistill.types import Cost, ProgressCallback, RoundSpec, TextSet
from feddistill_kernels import TopK

CALLED = 8
"""Tokens, at the most, of the block that a model is tried with before a run."""


class _Closed(Learner):
    """What is only asked, as a learner that learns nothing."""

    query_only = True

    def restore(self, weights: str) -> None:
        """It has none."""

    def step(self, name: str, label: str, *args: Any, evaluate: bool = True, **kwargs: Any) -> Json:
        """Its figures, once in a run; there are no weights, and nothing is trained."""
        run = self.session.run
        if (record := run.done(name)) is not None:
            return record
        figures, cost = self.measured(label) if evaluate else ({}, Cost())
        costs = {"train": asdict(Cost()), "evaluate": asdict(cost)}
        return run.commit(name, {"weights": None, **figures, "trained": None, "costs": costs})

    @cached_property
    def _figures(self) -> dict[str, dict[str, float]]:
        return super().evaluate()

    def evaluate(self, on_step: ProgressCallback | None = None) -> dict[str, dict[str, float]]:
        """See ``Learner``; the same in every round."""
        return self._figures


class QueryOnlyClassifier(_Closed):
    """A function from texts to log-probabilities of the classes."""

    def _build(self, config: ModelConfig) -> models.Specialist:
        assert isinstance(config.source, CallableModel), "an endpoint is of language models"
        self._call = endpoint.function(config.source, self.name)
        self._said: dict[str, Tensor] = {}
        return models.Specialist(nn.Module(), None, config.max_tokens)

    def tokens(self, texts: TextSet) -> list[list[int]]:
        """None, of as many texts."""
        return [[]] * len(texts)

    def answer(
        self, texts: TextSet, on_step: ProgressCallback | None = None, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """See ``Learner``."""
        if texts.name not in self._said:
            self._said[texts.name] = endpoint.classes(self._call, texts.texts, self.classes, self.name)
        return self._said[texts.name][start:stop]


class QueryOnlyLanguageModel(_Closed, CausalLanguageModel):
    """A function or an endpoint that says which tokens are likeliest."""

    def _build(self, config: ModelConfig) -> causal.Causal:  # type: ignore[override]  # reads blocks
        assert isinstance(config.source, BlackBoxModel), "it is asked"
        self._blocks = {}
        built = opened(
            config,
            self.name,
            self.session.splits.proxy,
            self.session.config.language.completion_only,
        )
        self._box, most = endpoint.open_box(config.source, built.reader.tokenizer, self.name)
        wanted = kept_before(self.session.config.payload.k, built.reader.vocab_size)
        self._width = wanted if most is None else min(wanted, most)
        return built

    def compressed(
        self, spec: RoundSpec, seed: int, start: int, stop: int, on_step: ProgressCallback | None = None
    ) -> payload.Answers:
        """See ``Learner``."""
        proxy, (blocks, whole) = self.session.splits.proxy, self._asked()
        asked = whole[start:stop].numpy()
        if self._translation is None:
            said = self._said(proxy, blocks, asked, on_step)
            return encoding.compress_parts((endpoint.fitted(rows, spec.k) for rows in said), spec, seed)
        rows = self._translation.rows(asked)
        own = self._said(proxy, self._translation.client.blocks, rows, on_step)
        return encoding.compress_parts(self._translation.answers(own, rows, asked, spec.k), spec, seed)

    def figures(self, texts: TextSet, on_step: ProgressCallback | None = None) -> dict[str, float]:
        """How well it predicts ``texts``, as far as it says: a token that it does not name has a share of
        the others' probability."""
        blocks = self.blocks(texts)
        rows = np.flatnonzero(blocks.wanted)
        targets, at, total = torch.from_numpy(blocks.targets[rows]), 0, 0.0
        for said in self._said(texts, blocks, rows, on_step):
            total -= float(_log_prob(said, targets[at : at + len(said)]).double().sum())
            at += len(said)
        return metrics.language(total, len(rows), self.specialist.reader.bytes(texts)).as_dict()

    def _said(
        self, texts: TextSet, blocks: PackedTexts, rows: NDArray[np.int64], on_step: ProgressCallback | None
    ) -> Iterator[TopK]:
        """What it says of ``rows``, which ascend, some blocks' at a time."""
        step, size = blocks.length - 1, self.session.config.clients.eval_batch_size
        chunks = np.unique(rows // step // size)
        for done, chunk in enumerate(chunks.tolist(), 1):
            first, end = chunk * size * step, (chunk + 1) * size * step
            here = rows[slice(*np.searchsorted(rows, [first, end]))]
            which = range(chunk * size, min((chunk + 1) * size, len(blocks)))
            yield self._chunk(texts, blocks, chunk, which)[torch.from_numpy(here - first)]
            if on_step:
                on_step(done, len(chunks))

    def _chunk(self, texts: TextSet, blocks: PackedTexts, chunk: int, which: range) -> TopKFile:
        """All rows of some blocks: from the run, where they have been asked."""
        run = self.session.run
        place = layout.black_box_rows(self.name, texts.name, blocks.length, chunk)
        if not run.path(place).exists():
            said = self._box.ask([blocks[b].tolist() for b in which], self._width)

            def make(path: Path) -> None:
                count = sum(map(len, said))
                file, at = TopKFile.create(path, count, self._width, self._vocab_size), 0
                for rows in said:
                    file.put(at, rows)
                    at += len(rows)

            run.write(place, make)
        return TopKFile.open(run.path(place))


def opened(config: ModelConfig, name: str, proxy: TextSet, answers_only: bool = False) -> causal.Causal:
    """What a black box reads by; there is no model to look into."""
    tokenizer = tokenizer_of(config.source, f"{name}.source.tokenizer", proxy.texts)
    return causal.Causal(nn.Module(), causal.TextReader(tokenizer, answers_only), config.max_tokens)


def tried(config: ModelConfig, name: str, proxy: TextSet, classes: int, task: str) -> causal.Causal | None:
    """Ask a black box about the beginning of the first proxy text: what is wrong with it shows here.

    Returns what it reads by, of a language model.

    Raises:
        ModelError: It is not there, or says what is no answer.
    """
    source = config.source
    assert isinstance(source, BlackBoxModel), "it is asked"
    if task == "classification":
        assert isinstance(source, CallableModel), "an endpoint is of language models"
        endpoint.classes(endpoint.function(source, name), proxy.texts[:1], classes, name)
        return None
    built = opened(config, name, proxy)
    box, most = endpoint.open_box(source, built.reader.tokenizer, name)
    block = built.reader.blocks(proxy, min(CALLED, config.max_tokens))[0]
    box.ask([block.tolist()], most or 1)
    return built


def _log_prob(said: TopK, ids: Tensor) -> Tensor:
    """``[n]``, what rows say of one id each."""
    listed = said.ids == ids[:, None]
    others = max(said.vocab_size - said.ids.shape[1], 1)
    share = said.log_tail - torch.log(torch.tensor(float(others)))
    named = torch.where(listed, said.log_probs, -torch.inf).amax(-1)
    silent = (said.log_probs == -torch.inf).all(-1)
    found = torch.where(listed.any(-1), named, share)
    return torch.where(silent, -torch.log(torch.tensor(float(said.vocab_size))), found)
