"""Text classification: one prediction per text, over the classes."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from typing_extensions import override

from feddistill import metrics, models, payload
from feddistill.config import Config
from feddistill.config.models import ModelConfig
from feddistill.config.training import DistillConfig
from feddistill.federation import answer_files, encoding
from feddistill.modelio import inference
from feddistill.models.tokenizers import with_token_types, without_token_types
from feddistill.store.logit_files import Chained, TensorFile
from feddistill.tasks.learner import BuiltModel, Learner, examples_of, labels_of
from feddistill.tasks.query import ProxyQuery, domains_of
from feddistill.training import BatchLoss, Examples, TextLoss, TrainingExamples
from feddistill.types import NO_LABEL, ProgressCallback, Splits, TextSet


class Classifier(Learner):
    """A classifier of texts."""

    specialist: models.Specialist

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
        return models.build(model, len(labels), seed, name, public, labels=labels)

    @override
    @classmethod
    def query(cls, config: Config, splits: Splits) -> ProxyQuery:
        proxy, names = splits.proxy, splits.label_names
        return ProxyQuery(
            positions=len(proxy),
            vocab_size=len(names),
            fingerprint=payload.fingerprint(names),
            labels=torch.from_numpy(proxy.labels),
            domains=domains_of(proxy),
        )

    @override
    @classmethod
    def check_built(
        cls, built: BuiltModel, config: Config, splits: Splits, name: str, query: ProxyQuery
    ) -> None:
        """Check that the model has room for pairs, if texts are pairs."""
        assert isinstance(built, models.Specialist), "build makes one"
        if splits.proxy.starts is not None:
            built.encode(splits.proxy.texts[:1], splits.proxy.starts[:1])

    @override
    @staticmethod
    def prepare_export(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        if models.reads_types(model):
            with_token_types(tokenizer)
        else:
            without_token_types(tokenizer)

    @cached_property
    def _tokens(self) -> dict[str, list[list[int]]]:
        return {}

    @override
    def tokens(self, texts: TextSet) -> list[list[int]]:
        if texts.name not in self._tokens:  # public sets are read in every round
            self._tokens[texts.name] = self.specialist.encode(texts.texts, texts.starts)
        return self._tokens[texts.name]

    @override
    def examples(self, texts: TextSet) -> TrainingExamples:
        return examples_of(self, texts)

    @override
    def teacher_examples(self, *teachers: str) -> TrainingExamples:
        proxy, count = self.session.splits.proxy, len(teachers)
        files = [TensorFile.open(self.session.run.path(teacher)) for teacher in teachers]
        return TrainingExamples(self.tokens(proxy) * count, labels_of(proxy).repeat(count), Chained(files))

    @override
    def with_teacher(
        self, private: TextSet, chosen: NDArray[np.int64], stored: answer_files.StoredAnswer, target: str
    ) -> TrainingExamples:
        own, proxy = self.examples(private), self.tokens(self.session.splits.proxy)
        tokens = [*own.tokens, *(proxy[row] for row in chosen)]
        teacher = torch.cat(list(stored.picked(encoding.expand, chosen)))
        if target == "hard":
            return TrainingExamples(tokens, torch.cat([own.labels, teacher.argmax(-1)]))
        mask = torch.cat([torch.zeros(len(own.tokens)), torch.ones(len(chosen))]).bool()
        filler = teacher.new_zeros(len(own.tokens), teacher.shape[1])
        labels = torch.cat([own.labels, torch.full((len(chosen),), NO_LABEL)])
        return TrainingExamples(tokens, labels, torch.cat([filler, teacher]), mask)

    @override
    def loss(self, examples: Examples, distill: DistillConfig | None, seed: int) -> BatchLoss:
        assert isinstance(examples, TrainingExamples), "of texts"
        return TextLoss(examples, distill)

    @override
    def metrics(self, texts: TextSet, on_step: ProgressCallback | None = None) -> dict[str, float]:
        return metrics.classification(self.answer(texts, on_step).numpy(), texts.labels).as_dict()

    @override
    def answer(
        self, texts: TextSet, on_step: ProgressCallback | None = None, start: int = 0, stop: int | None = None
    ) -> Tensor:
        tokens = self.tokens(texts)[start:stop]
        self.compute_frozen(tokens)
        log_probs = inference.answer(
            self.model,
            tokens,
            self.classes,
            pad_id=self.specialist.pad_id,
            batch_size=self.session.config.clients.eval_batch_size,
            bf16=self.session.bf16,
            meter=self.meter,
            on_step=on_step,
        )
        if log_probs.isnan().any():
            raise self.not_a_number()
        return log_probs
