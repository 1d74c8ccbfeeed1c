"""A model that learns, answers and is evaluated: what every method does with every model."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from feddistill import metrics, models, payload, training
from feddistill.accounting import FlopMeter, measure
from feddistill.config.models import ModelConfig
from feddistill.config.training import DistillConfig, TrainingConfig
from feddistill.errors import ModelError
from feddistill.federation import answer_files, encoding
from feddistill.modelio import inference
from feddistill.models import adapters
from feddistill.seeds import derive
from feddistill.store import layout
from feddistill.store.logit_files import Chained, TensorFile
from feddistill.store.run_directory import Json
from feddistill.tasks.session import Session
from feddistill.training import TrainingExamples
from feddistill.training.blocks import BlockExamples, Masking
from feddistill.training.spans import SpanExamples
from feddistill.types import NO_LABEL, UNLABELLED, Cost, ProgressCallback, RoundSpec, TextSet


class Learner:
    """One architecture, whose weights are put back, trained and saved. Holds two copies of the weights."""

    query_only = False
    """Whether it is only asked: then what it costs is not known before, and its operations never."""

    def __init__(
        self,
        session: Session,
        config: ModelConfig,
        name: str,
        *,
        adapt: Callable[[nn.Module], None] | None = None,
    ):
        """``adapt`` changes the model in place before anything is done with it; ``None``: ``config.lora``."""
        self.session = session
        self.name = name
        self.classes = len(session.splits.label_names)
        self.specialist = self._build(config)
        self.model = self.specialist.model
        if adapt is None and config.lora is not None:
            head = session.config.task in ("classification", "question_answering")
            adapt = partial(adapters.adapt, config=config, name=name, head=head)
        if adapt is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive(session.config.seed, "adapt", name))
                adapt(self.model)
        if torch.cuda.is_available():
            self.model.cuda()
        self.meter = FlopMeter(self.model)
        if config.frozen_cache_mb:
            models.remember_frozen(self.model, config, name, session.frozen)
        self._initial = {key: value.clone() for key, value in self.model.state_dict().items()}
        self._tokens: dict[str, list[list[int]]] = {}

    def _build(self, config: ModelConfig) -> models.Specialist:
        seed = derive(self.session.config.seed, "init", self.name)
        return models.build(config, self.classes, seed, self.name, self.session.splits.proxy.texts)

    def reset(self) -> None:
        """Back to the weights before any training."""
        self.model.load_state_dict(self._initial)

    def restore(self, weights: str) -> None:
        """Take up the weights that a step left, if they are still what it wrote."""
        self.session.run.done(layout.step_of(weights))
        self.load(weights)

    def load(self, weights: str) -> None:
        """Take up weights that this step has written itself."""
        models.restore(self.model, self.session.run.path(weights))

    def tokens(self, texts: TextSet) -> list[list[int]]:
        """Token ids; those of public sets are kept, as every round asks for them again."""
        if texts.name not in self._tokens:
            self._tokens[texts.name] = self.specialist.encode(texts.texts)
        return self._tokens[texts.name]

    def lessons(self, texts: TextSet) -> TrainingExamples:
        """``texts`` with the labels that they have."""
        return TrainingExamples(self.tokens(texts), labels_of(texts))

    def taught(self, *teachers: str) -> TrainingExamples:
        """The proxy texts with their labels and the answers of the teacher in a file of the run; with those
        of several teachers one after the other."""
        proxy, count = self.session.splits.proxy, len(teachers)
        files = [TensorFile.open(self.session.run.path(teacher)) for teacher in teachers]
        return TrainingExamples(self.tokens(proxy) * count, labels_of(proxy).repeat(count), Chained(files))

    def proxy_examples(self) -> int:
        """How many examples a pass over the proxy texts has."""
        return len(self.session.splits.proxy)

    def digested(
        self, own: TrainingExamples, chosen: NDArray[np.int64], stored: answer_files.StoredAnswer, target: str
    ) -> TrainingExamples:
        """``own``, and those texts ``chosen`` of the proxy set with what the teacher said to them."""
        proxy, mine = self.tokens(self.session.splits.proxy), len(own.tokens)
        tokens = [*own.tokens, *(proxy[row] for row in chosen)]
        picked = torch.cat(list(stored.picked(encoding.expand, chosen)))
        if target == "hard":
            return TrainingExamples(tokens, torch.cat([own.labels, picked.argmax(-1)]))
        taught = torch.cat([torch.zeros(mine), torch.ones(len(chosen))]).bool()
        filler = picked.new_zeros(mine, picked.shape[1])  # rows that are not taught
        nothing = torch.full((len(chosen),), NO_LABEL)
        return TrainingExamples(tokens, torch.cat([own.labels, nothing]), torch.cat([filler, picked]), taught)

    def compressed(
        self, spec: RoundSpec, seed: int, start: int, stop: int, on_step: ProgressCallback | None = None
    ) -> payload.Answers:
        """Rows from ``start`` to ``stop`` of what the model says to the proxy texts, in the round's codec."""
        return encoding.compress(self.answer(self.session.splits.proxy, on_step, start, stop), spec, seed)

    def projection(self) -> Json | None:
        """How answers were projected since this was asked last; ``None`` where they need not be.

        ``rows``, of them ``answered`` (a share), ``coverage`` (the mean share of the mass that is kept) and
        ``seconds``.
        """
        return None

    def answer(
        self, texts: TextSet, on_step: ProgressCallback | None = None, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """Log-probabilities ``[N, V]`` of ``texts``, or of those from ``start`` to ``stop``."""
        answers = inference.answer(
            self.model,
            self.tokens(texts)[start:stop],
            self.classes,
            pad_id=self.specialist.pad_id,
            batch_size=self.session.config.clients.eval_batch_size,
            bf16=self.session.bf16,
            meter=self.meter,
            on_step=on_step,
        )
        if answers.isnan().any():
            raise ModelError(
                f"{self.name}: the model answers NaN: training diverged; lower the learning rate"
            )
        return answers

    def fit(
        self,
        lessons: TrainingExamples | BlockExamples | SpanExamples,
        config: TrainingConfig,
        *,
        seed: int,
        steps: int | None = None,
        distill: DistillConfig | None = None,
        proximal: float = 0.0,
        on_step: ProgressCallback | None = None,
    ) -> training.Trained:
        """Train on ``lessons`` from the weights as they are."""
        return training.fit(
            self.model,
            lessons,
            config,
            seed=seed,
            bf16=self.session.bf16,
            pad_id=self.specialist.pad_id,
            head=models.head_parameters(self.model),
            meter=self.meter,
            steps=steps,
            distill=distill,
            proximal=proximal,
            vocab_size=self._vocab_size,
            masking=self._masking,
            on_step=on_step,
        )

    @property
    def _vocab_size(self) -> int:
        """Of a language model, ``V``."""
        return 0

    @property
    def _masking(self) -> Masking | None:
        """Of a masked language model, how tokens are hidden."""
        return None

    def figures(self, texts: TextSet, on_step: ProgressCallback | None = None) -> dict[str, float]:
        """How well the model does on labelled ``texts``."""
        return metrics.classification(self.answer(texts, on_step).numpy(), texts.labels).as_dict()

    def evaluate(self, on_step: ProgressCallback | None = None) -> dict[str, dict[str, float]]:
        """Figures on the validation and the test set. Whoever selects, selects on validation."""
        figures = {}
        splits = self.session.splits
        for name, texts in (("validation", splits.validation), ("test", splits.test)):
            figures[name] = self.figures(texts, on_step)
        return figures

    def step(
        self,
        name: str,
        label: str,
        start: str | None,
        lessons: Callable[[], Any],
        config: TrainingConfig,
        *,
        steps: int | None = None,
        distill: DistillConfig | None = None,
        proximal: float = 0.0,
        evaluate: bool = True,
    ) -> Json:
        """Train from the weights in file ``start`` (``None``: anew), evaluate, save; once in a run.

        Returns the record: ``weights`` (a file of the run), ``trained``, ``costs`` and, where it was
        evaluated, ``validation`` and ``test``.
        """
        run, cache = self.session.run, self.session.step_cache
        if (record := run.done(name)) is not None:
            return record
        if cache is not None and (record := cache.take(run, name)) is not None:
            return record
        if start is None:
            self.reset()
        else:
            self.restore(start)
        before = self.meter.flops
        with self.session.progress.step(label) as on_step, measure() as train:
            trained = self.fit(
                lessons(),
                config,
                seed=derive(self.session.config.seed, name),
                steps=steps,
                distill=distill,
                proximal=proximal,
                on_step=on_step,
            )
            train.flops = self.meter.flops - before
        if not math.isfinite(trained.loss):
            raise ModelError(f"{label}: training diverged, loss {trained.loss}; lower the learning rate")
        figures, cost = self.measured(label) if evaluate else ({}, Cost())
        weights = layout.tensors(name)
        run.write(weights, lambda path: models.save(self.model, path))
        content = {
            "weights": weights,
            **figures,
            "trained": asdict(trained),
            "costs": {"train": asdict(train.cost), "evaluate": asdict(cost)},
        }
        record = run.commit(name, content, [weights])
        if cache is not None:
            cache.give(run, name)
        return record

    def measured(self, label: str) -> tuple[dict[str, dict[str, float]], Cost]:
        """``evaluate``, and what that took."""
        before = self.meter.flops
        with self.session.progress.step(f"{label}: evaluate") as on_step, measure() as evaluated:
            figures = self.evaluate(on_step)
            evaluated.flops = self.meter.flops - before
        return figures, evaluated.cost


def examples_of(learner: Learner, texts: TextSet, teacher: Tensor | None = None) -> TrainingExamples:
    """``texts`` with the labels that they have and, if given, a teacher's answers to them."""
    return TrainingExamples(learner.tokens(texts), labels_of(texts), teacher)


def labels_of(texts: TextSet) -> Tensor:
    """``[N]`` labels as training wants them."""
    labels = torch.from_numpy(texts.labels)
    return torch.where(labels == UNLABELLED, NO_LABEL, labels)


def best_of(session: Session, best: Json | None, new: Json) -> Json:
    """The better on validation; the earlier where they are equal."""
    return new if best is None else session.task.best([best, new])


def later(config: TrainingConfig, epochs: float | None, head_learning_rate: float | None) -> TrainingConfig:
    """``config`` for a model that has been trained before: its head is no longer random."""
    changed: Mapping[str, Any] = {
        "epochs": epochs or config.epochs,
        "head_learning_rate": head_learning_rate,
    }
    return config.model_copy(update=dict(changed))
