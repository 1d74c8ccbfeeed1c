"""Extractive question answering: two rows per question, over the characters of the passage."""

from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from feddistill import metrics, payload
from feddistill.alignment.rows import ProjectedMass, collect
from feddistill.config import Config
from feddistill.config.models import ModelConfig
from feddistill.config.training import DistillConfig
from feddistill.errors import ConfigError
from feddistill.federation import answer_files, encoding
from feddistill.modelio import inference
from feddistill.modelio.outputs import takes_types
from feddistill.modelio.passages import QAWindow, likeliest
from feddistill.models import reading
from feddistill.models.tokenizers import without_token_types
from feddistill.store.logit_files import Chained, TopKFile
from feddistill.tasks.learner import BuiltModel, Learner
from feddistill.tasks.query import ProxyQuery, domains_of
from feddistill.training import BatchLoss, Examples
from feddistill.training.blocks import NO_TEACHER
from feddistill.training.losses import QuestionLoss
from feddistill.training.spans import (
    NO_ANSWER,
    SpanExamples,
    concatenate,
    ids_of,
    token_labels,
    with_hard_targets,
)
from feddistill.types import NO_LABEL, ProgressCallback, RoundSpec, Splits, TextSet
from feddistill_kernels import TopK

CHUNK = 1024
"""Questions whose predictions are in memory at once."""


class QuestionAnswering(Learner):
    """A model that predicts where the answer to a question begins and ends."""

    specialist: reading.PassageReader

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
    ) -> reading.PassageReader:
        return reading.build(model, config.question_answering, seed, name, public)

    @override
    @classmethod
    def query(cls, config: Config, splits: Splits) -> ProxyQuery:
        """Two rows a text: the first and the last character of its answer, or "no answer"."""
        proxy = splits.proxy
        longest = max(len(proxy.question(row)[1]) for row in range(len(proxy)))
        answers = proxy.answers or (None,) * len(proxy)
        domains = domains_of(proxy)
        return ProxyQuery(
            positions=2 * len(proxy),
            vocab_size=longest + 1,
            fingerprint=payload.fingerprint(["no answer", f"{longest} characters of a passage"]),
            labels=torch.tensor([ids_of(right) for right in answers]).flatten(),
            domains=None if domains is None else domains.repeat_interleave(2),
            compressed=True,
        )

    @override
    @classmethod
    def check_data(cls, config: Config, splits: Splits) -> None:
        """Check that every question has an answer, unless ``allow_no_answer``."""
        if config.question_answering.allow_no_answer:
            return
        for texts in (*splits.private, splits.proxy, splits.validation, splits.test):
            for row, right in enumerate(texts.answers or ()):
                if right == ():
                    raise ConfigError(
                        f"{texts.name}: {texts.ids[row]} has no answer, which "
                        "question_answering.allow_no_answer: true allows"
                    )

    @override
    @classmethod
    def check_built(
        cls, built: BuiltModel, config: Config, splits: Splits, name: str, query: ProxyQuery
    ) -> None:
        """Check that the model can read all questions that it will be given."""
        assert isinstance(built, reading.PassageReader), "build makes one"
        count = len(config.clients.models)
        own = [
            private
            for place, private in zip(splits.places, splits.private, strict=True)
            if name == f"clients.models.{place % count}"
        ]
        for texts in (splits.proxy, splits.validation, splits.test, *own):
            built.windows(texts)

    @override
    @staticmethod
    def prepare_export(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        if not takes_types(model):
            without_token_types(tokenizer)

    @cached_property
    def _windows(self) -> dict[str, list[QAWindow]]:
        return {}

    def windows(self, texts: TextSet) -> list[QAWindow]:
        """``texts`` as this model reads them."""
        if texts.name not in self._windows:  # public sets are read in every round
            self._windows[texts.name] = self.specialist.windows(texts)
        return self._windows[texts.name]

    @override
    def tokens(self, texts: TextSet) -> list[list[int]]:
        return [window.ids for window in self.windows(texts)]

    @override
    def examples(self, texts: TextSet) -> SpanExamples:
        windows = self.windows(texts)
        answers = texts.answers or (None,) * len(texts)
        return SpanExamples(windows, token_labels(windows, answers))

    @override
    def teacher_examples(self, *teachers: str) -> SpanExamples:
        own, count = self.examples(self.session.splits.proxy), len(teachers)
        files = [TopKFile.open(self.session.run.path(teacher)) for teacher in teachers]
        windows = [*own.windows] * count
        return SpanExamples(windows, own.labels.repeat(count, 1), Chained(files), torch.arange(len(windows)))

    @override
    def with_teacher(
        self, private: TextSet, chosen: NDArray[np.int64], stored: answer_files.StoredAnswer, target: str
    ) -> SpanExamples:
        own, windows = self.examples(private), self.windows(self.session.splits.proxy)
        rows = np.stack([2 * chosen, 2 * chosen + 1], 1).ravel()
        teacher = TopK.cat(list(stored.picked(encoding.topk, rows)))
        unknown = torch.full((len(chosen), 2), NO_LABEL)
        teacher_rows = torch.arange(len(chosen))
        predicted = (teacher.log_probs > -torch.inf).any(-1).view(-1, 2).all(-1)
        teacher_rows[~predicted] = NO_TEACHER
        proxy = SpanExamples([windows[row] for row in chosen], unknown, teacher, teacher_rows)
        return concatenate(own, with_hard_targets(proxy) if target == "hard" else proxy)

    @override
    def loss(self, examples: Examples, distill: DistillConfig | None, seed: int) -> BatchLoss:
        assert isinstance(examples, SpanExamples), "of questions"
        return QuestionLoss(examples, distill, takes_types(self.model))

    @override
    def compressed(
        self, spec: RoundSpec, seed: int, start: int, stop: int, on_step: ProgressCallback | None = None
    ) -> payload.Answers:
        return encoding.compress_parts(self._predictions(spec, start, stop, on_step), spec, seed)

    def _predictions(
        self, spec: RoundSpec, start: int, stop: int, on_step: ProgressCallback | None
    ) -> Iterator[TopK]:
        windows = self.windows(self.session.splits.proxy)
        last = -(-stop // 2)
        for first in range(start // 2, last, CHUNK):
            chunk = windows[first : min(first + CHUNK, last)]
            rows = of_characters(chunk, self._logits(chunk, on_step), spec.k, spec.vocab_size)
            yield rows[max(start - 2 * first, 0) : stop - 2 * first]

    def _logits(self, windows: list[QAWindow], on_step: ProgressCallback | None) -> list[torch.Tensor]:
        """``[2, T]`` logits of each window."""
        all_logits = inference.answer_windows(
            self.model,
            windows,
            pad_id=self.specialist.pad_id,
            types=self.specialist.types,
            batch_size=self.session.config.clients.eval_batch_size,
            bf16=self.session.bf16,
            meter=self.meter,
            on_step=on_step,
        )
        if any(logits.isnan().any() for logits in all_logits):
            raise self.not_a_number()
        return all_logits

    @override
    def metrics(self, texts: TextSet, on_step: ProgressCallback | None = None) -> dict[str, float]:
        windows, longest = self.windows(texts), self.session.config.question_answering.max_answer_tokens
        answers, predicted, golds = texts.answers or (None,) * len(texts), [], []
        all_logits = self._logits(windows, on_step)
        for row, (window, logits) in enumerate(zip(windows, all_logits, strict=True)):
            _, passage = texts.question(row)
            start, end = logits
            score, first, last = likeliest(start, end, window, longest)
            empty = self.specialist.unanswerable and score < float(logits[:, window.no_answer].double().sum())
            predicted.append("" if empty else passage[window.starts[first] : window.ends[last]])
            golds.append([passage[a:b] for a, b in answers[row] or ()])
        return metrics.reading(predicted, golds, unanswerable=self.specialist.unanswerable).as_dict()


def of_characters(windows: list[QAWindow], all_logits: list[torch.Tensor], k: int, vocab_size: int) -> TopK:
    """Project predictions over tokens to characters: two rows a window, the likeliest ``k`` ids first.

    Args:
        windows: ``n`` of them.
        all_logits: ``[2, T]`` of each, ``-inf`` for tokens that an answer cannot begin or end with.
        k: Entries of a row.
        vocab_size: Characters of the longest passage, plus one for "no answer".
    """
    count = 2 * len(windows)
    projected = ProjectedMass(np.arange(count), np.ones(count), np.zeros(count))
    for number, (window, logits) in enumerate(zip(windows, all_logits, strict=True)):
        mass = logits.double().softmax(-1).numpy()
        tokens = np.flatnonzero(window.choices)
        for side, edge in enumerate((window.starts + 1, window.ends)):
            ids = np.where(tokens == window.no_answer, NO_ANSWER, edge[tokens])
            projected.parts.append((np.full(len(tokens), 2 * number + side), ids, mass[side, tokens]))
    return collect(projected, count, k, vocab_size, 0.0).rows
