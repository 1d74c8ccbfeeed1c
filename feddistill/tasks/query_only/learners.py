"""Learners of query-only models: a training step leaves them unchanged, and each text is queried once.

Predictions of a language model are stored in the run, so that later rounds and a resumed run do not pay for
them again. The model's operations cannot be counted.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from feddistill import metrics, models, payload
from feddistill.config import Config
from feddistill.config.models import CallableModel, EndpointModel, ModelConfig
from feddistill.federation import encoding
from feddistill.modelio.packing import PackedTexts
from feddistill.models import causal
from feddistill.models.tokenizers import tokenizer_of
from feddistill.store import layout
from feddistill.store.logit_files import TopKFile
from feddistill.store.run_directory import Json
from feddistill.tasks.classification import Classifier
from feddistill.tasks.language_model import CausalLanguageModel
from feddistill.tasks.learner import Learner
from feddistill.tasks.query import ProxyQuery
from feddistill.tasks.query_only.endpoint import Endpoint
from feddistill.tasks.query_only.function import Function, classes, function
from feddistill.tasks.query_only.predictions import QueryOnlyModel, fitted
from feddistill.tasks.session import Session
from feddistill.tasks.translation import kept_before
from feddistill.types import Cost, ProgressCallback, RoundSpec, Splits, TextSet
from feddistill_kernels import TopK

TRIAL_TOKENS = 8
"""Tokens, at most, of the block that a model is tried with before a run."""


class _QueryOnly(Learner):
    """A learner without weights."""

    query_only: ClassVar[bool] = True

    @override
    def restore(self, weights: str) -> None:
        return  # there are no weights

    @override
    def step(self, name: str, label: str, *args: Any, evaluate: bool = True, **kwargs: Any) -> Json:
        """Evaluate, once in a run; nothing is trained."""
        run = self.session.run
        if (record := run.done(name)) is not None:
            return record
        results, cost = self.measured(label) if evaluate else ({}, Cost())
        costs = {"train": asdict(Cost()), "evaluate": asdict(cost)}
        return run.commit(name, {"weights": None, **results, "trained": None, "costs": costs})

    @cached_property
    def _results(self) -> dict[str, dict[str, float]]:
        return super().evaluate()

    @override
    def evaluate(self, on_step: ProgressCallback | None = None) -> dict[str, dict[str, float]]:
        return self._results  # the same in every round


class QueryOnlyClassifier(_QueryOnly, Classifier):
    """A function from texts to log-probabilities of the classes."""

    @override
    @classmethod
    def build(
        cls,
        config: Config,
        model: ModelConfig,
        name: str,
        seed: int,
        public: Sequence[str],
        labels: Sequence[str],
    ) -> models.Specialist:
        return models.Specialist(nn.Module(), None, model.max_tokens)

    @override
    @classmethod
    def check_model(
        cls, config: Config, splits: Splits, model: ModelConfig, name: str, query: ProxyQuery
    ) -> None:
        """Call the function with the first proxy text."""
        classes(_function(model, name), splits.proxy.texts[:1], query.vocab_size, name)

    def __init__(self, session: Session, config: ModelConfig, name: str, **kwargs: Any):
        super().__init__(session, config, name, **kwargs)
        self._call = _function(config, name)
        self._answers: dict[str, Tensor] = {}

    @override
    def tokens(self, texts: TextSet) -> list[list[int]]:
        return [[]] * len(texts)  # it has no tokens

    @override
    def answer(
        self, texts: TextSet, on_step: ProgressCallback | None = None, start: int = 0, stop: int | None = None
    ) -> Tensor:
        if texts.name not in self._answers:
            self._answers[texts.name] = classes(self._call, texts.texts, self.classes, self.name)
        return self._answers[texts.name][start:stop]


class QueryOnlyLanguageModel(_QueryOnly, CausalLanguageModel):
    """A function or an endpoint that returns the likeliest next tokens."""

    @override
    @classmethod
    def build(
        cls,
        config: Config,
        model: ModelConfig,
        name: str,
        seed: int,
        public: Sequence[str],
        labels: Sequence[str],
    ) -> causal.Causal:
        tokenizer = tokenizer_of(model.source, f"{name}.source.tokenizer", public)
        reader = causal.reader_of(tokenizer, model, config.language, name)
        return causal.Causal(nn.Module(), reader, model.max_tokens)

    @override
    @classmethod
    def check_model(
        cls, config: Config, splits: Splits, model: ModelConfig, name: str, query: ProxyQuery
    ) -> None:
        """Query the model with the beginning of the first proxy text."""
        built = cls.build(config, model, name, 0, splits.proxy.texts, ())
        opened, most = open_model(model, built.tokenizer, name)
        block = built.reader.blocks(splits.proxy, min(TRIAL_TOKENS, model.max_tokens))[0]
        opened.query([block.tolist()], most or 1)
        cls.check_built(built, config, splits, name, query)

    def __init__(self, session: Session, config: ModelConfig, name: str, **kwargs: Any):
        super().__init__(session, config, name, **kwargs)
        self._opened, most = open_model(config, self.specialist.tokenizer, name)
        width = kept_before(session.config.payload.k, self._vocab_size)
        self._width = width if most is None else min(width, most)

    @property
    def _vocab_size(self) -> int:
        return self.specialist.reader.vocab_size

    @override
    def compressed(
        self, spec: RoundSpec, seed: int, start: int, stop: int, on_step: ProgressCallback | None = None
    ) -> payload.Answers:
        proxy, (blocks, query_rows) = self.session.splits.proxy, self._query()
        rows = query_rows[start:stop].numpy()
        if self._translation is None:
            predictions = self._predictions(proxy, blocks, rows, on_step)
            return encoding.compress_parts((fitted(part, spec.k) for part in predictions), spec, seed)
        own_rows = self._translation.client_rows(rows)
        own = self._predictions(proxy, self._translation.client.blocks, own_rows, on_step)
        projected = self._translation.answers(own, own_rows, rows, spec.k)
        return encoding.compress_parts(projected, spec, seed)

    @override
    def metrics(self, texts: TextSet, on_step: ProgressCallback | None = None) -> dict[str, float]:
        """Metrics; a token that the model does not name has an even share of the tail's probability."""
        blocks = self.blocks(texts)
        rows = np.flatnonzero(blocks.loss_mask)
        targets, start, nats = torch.from_numpy(blocks.targets[rows]), 0, 0.0
        for part in self._predictions(texts, blocks, rows, on_step):
            nats -= float(_log_prob(part, targets[start : start + len(part)]).double().sum())
            start += len(part)
        return metrics.language(nats, len(rows), self.specialist.reader.bytes(texts)).as_dict()

    def _predictions(
        self, texts: TextSet, blocks: PackedTexts, rows: NDArray[np.int64], on_step: ProgressCallback | None
    ) -> Iterator[TopK]:
        """Predictions of ``rows``, which ascend, some blocks at a time."""
        step, size = blocks.length - 1, self.session.config.clients.eval_batch_size
        chunks = np.unique(rows // step // size)
        for done, chunk in enumerate(chunks.tolist(), 1):
            first, end = chunk * size * step, (chunk + 1) * size * step
            in_chunk = rows[slice(*np.searchsorted(rows, [first, end]))]
            numbers = range(chunk * size, min((chunk + 1) * size, len(blocks)))
            yield self._chunk(texts, blocks, chunk, numbers)[torch.from_numpy(in_chunk - first)]
            if on_step:
                on_step(done, len(chunks))

    def _chunk(self, texts: TextSet, blocks: PackedTexts, chunk: int, numbers: range) -> TopKFile:
        """Predictions of all rows of some blocks, from the run if they have been queried before."""
        run = self.session.run
        file_name = layout.black_box_rows(self.name, texts.name, blocks.length, chunk)
        if not run.path(file_name).exists():
            predictions = self._opened.query([blocks[b].tolist() for b in numbers], self._width)

            def make(path: Path) -> None:
                file, start = (
                    TopKFile.create(path, sum(map(len, predictions)), self._width, self._vocab_size),
                    0,
                )
                for rows in predictions:
                    file.put(start, rows)
                    start += len(rows)

            run.write(file_name, make)
        return TopKFile.open(run.path(file_name))


def open_model(
    model: ModelConfig, tokenizer: PreTrainedTokenizerBase, name: str
) -> tuple[QueryOnlyModel, int | None]:
    """The model, and the most entries that it gives per row; ``None`` if there is no limit.

    Raises:
        ModelError: The function cannot be imported.
    """
    if isinstance(model.source, EndpointModel):
        return Endpoint(model.source, tokenizer, name), model.source.top
    assert isinstance(model.source, CallableModel), "the only other query-only source"
    return Function(function(model.source, name), len(tokenizer), f"{name} ({model.source.name})"), None


def _function(model: ModelConfig, name: str) -> Callable[[Any], Any]:
    assert isinstance(model.source, CallableModel), "an endpoint is a language model"
    return function(model.source, name)


def _log_prob(rows: TopK, ids: Tensor) -> Tensor:
    """``[n]``, the log-probability of one id per row."""
    listed = rows.ids == ids[:, None]
    others = max(rows.vocab_size - rows.ids.shape[1], 1)
    share = rows.log_tail - torch.log(torch.tensor(float(others)))
    named = torch.where(listed, rows.log_probs, -torch.inf).amax(-1)
    abstained = (rows.log_probs == -torch.inf).all(-1)
    log_probs = torch.where(listed.any(-1), named, share)
    return torch.where(abstained, -torch.log(torch.tensor(float(rows.vocab_size))), log_probs)
