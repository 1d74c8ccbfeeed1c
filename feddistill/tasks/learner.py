"""The base of all tasks: a model that is trained, predicts the proxy texts and is evaluated."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import ClassVar, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from feddistill import models, payload, training
from feddistill.accounting import FlopMeter, measure
from feddistill.config import Config
from feddistill.config.models import ModelConfig
from feddistill.config.tasks import TASKS
from feddistill.config.training import DistillConfig, TrainingConfig
from feddistill.errors import ModelError
from feddistill.federation import answer_files, encoding
from feddistill.modelio.padding import Tokens
from feddistill.models import adapters, frozen
from feddistill.seeds import derive
from feddistill.store import layout
from feddistill.store.run_directory import Json
from feddistill.tasks.query import ProxyQuery
from feddistill.tasks.session import Session
from feddistill.training import BatchLoss, Examples, TrainingExamples
from feddistill.types import NO_LABEL, UNLABELLED, Cost, ProgressCallback, RoundSpec, Splits, TextSet


class BuiltModel(Protocol):
    """A model with the tokenizer that it reads with."""

    @property
    def model(self) -> nn.Module:
        """The model."""
        ...

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer."""
        ...

    @property
    def max_tokens(self) -> int:
        """The longest input."""
        ...

    @property
    def pad_id(self) -> int:
        """Fills inputs that are shorter than others in a batch."""
        ...


class Learner(ABC):
    """One architecture, whose weights are restored, trained and saved. Holds two copies of the weights.

    A task is a subclass. It implements ``build``, ``query``, ``tokens``, ``examples``, ``teacher_examples``,
    ``with_teacher``, ``loss``, ``metrics`` and, if its predictions are dense, ``answer``; if they are not,
    ``compressed``.
    """

    query_only: ClassVar[bool] = False
    """True for a query-only model: never trained; its cost cannot be planned, its FLOPs not counted."""

    draws_inputs: ClassVar[bool] = False
    """True if training changes tokens at random, so that the states of frozen layers are not cached."""

    specialist: BuiltModel

    def __init__(
        self,
        session: Session,
        config: ModelConfig,
        name: str,
        *,
        adapt: Callable[[nn.Module], None] | None = None,
    ):
        """Build the model.

        Args:
            session: The run.
            config: The architecture.
            name: The setting that it comes from, as ``student.model``.
            adapt: Changes the model in place before anything is done with it; ``None``: ``config.lora``.
        """
        self.session = session
        self.name = name
        self.classes = len(session.splits.label_names)
        seed, public = derive(session.config.seed, "init", name), session.splits.proxy.texts
        self.specialist = self.build(session.config, config, name, seed, public, self.classes)
        self.model = self.specialist.model
        if adapt is None and config.lora is not None:
            head = TASKS[session.config.task].new_head
            adapt = partial(adapters.adapt, config=config, name=name, head=head)
        if adapt is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive(session.config.seed, "adapt", name))
                adapt(self.model)
        adapters.check_trains(self.model, name)
        if torch.cuda.is_available():
            self.model.cuda()
        self.meter = FlopMeter(self.model, session.work)
        self._warned = False
        self._frozen: models.FrozenLayers | None = None
        if config.frozen_cache_mb:
            self._frozen = models.remember_frozen(self.model, config, name, session.frozen, self.meter)
        self._initial = {key: value.clone() for key, value in self.model.state_dict().items()}

    @classmethod
    @abstractmethod
    def build(
        cls, config: Config, model: ModelConfig, name: str, seed: int, public: Sequence[str], classes: int
    ) -> BuiltModel:
        """The model before any training.

        Args:
            config: The run's settings.
            model: The architecture.
            name: The setting that errors name.
            seed: For random weights.
            public: The proxy texts, for a tokenizer that is trained on them.
            classes: Number of classes; 0 for tasks without classes.

        Raises:
            ModelError: The model cannot be loaded, cut or made to read its tokenizer's texts.
        """

    @classmethod
    @abstractmethod
    def query(cls, config: Config, splits: Splits) -> ProxyQuery:
        """What is predicted of the proxy texts."""

    @classmethod
    def check_data(cls, config: Config, splits: Splits) -> None:
        """Raise ``ConfigError`` if the data do not fit the settings of the task; by default nothing."""
        return

    @classmethod
    def check_model(
        cls, config: Config, splits: Splits, model: ModelConfig, name: str, query: ProxyQuery
    ) -> None:
        """Build a model once, and raise ``ModelError`` or ``ConfigError`` if it does not fit the run."""
        built = cls.build(config, model, name, 0, splits.proxy.texts, len(splits.label_names))
        cls.check_built(built, config, splits, name, query)
        adapters.adapt(built.model, model, name, head=TASKS[config.task].new_head)
        adapters.check_trains(built.model, name)

    @classmethod
    def check_built(
        cls, built: BuiltModel, config: Config, splits: Splits, name: str, query: ProxyQuery
    ) -> None:
        """Raise ``ModelError`` or ``ConfigError`` if a built model does not fit; by default nothing."""
        return

    @staticmethod
    def prepare_export(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
        """Change model and tokenizer in place before they are exported; by default nothing."""
        return

    @abstractmethod
    def tokens(self, texts: TextSet) -> Sequence[Tokens]:
        """Token ids of each input that the model reads ``texts`` as."""

    @abstractmethod
    def examples(self, texts: TextSet) -> Examples:
        """Training examples of ``texts`` with their labels."""

    @abstractmethod
    def teacher_examples(self, *teachers: str) -> Examples:
        """Training examples of the proxy texts with known labels and a teacher's predictions.

        Args:
            teachers: Files of the run, one for each teacher; the proxy texts are repeated for each.
        """

    @abstractmethod
    def with_teacher(
        self, private: TextSet, chosen: NDArray[np.int64], stored: answer_files.StoredAnswer, target: str
    ) -> Examples:
        """Training examples of ``private`` with labels, then of proxy texts with the teacher's predictions.

        Args:
            private: The client's own texts.
            chosen: Indices of the proxy examples, ascending.
            stored: The teacher.
            target: ``hard`` for the teacher's likeliest class, ``soft`` for its distribution.
        """

    @abstractmethod
    def loss(self, examples: Examples, distill: DistillConfig | None, seed: int) -> BatchLoss:
        """The loss of a batch of ``examples``, which a method of this class made."""

    @abstractmethod
    def metrics(self, texts: TextSet, on_step: ProgressCallback | None = None) -> dict[str, float]:
        """Metrics of the model on ``texts``, whose labels are known."""

    def answer(
        self, texts: TextSet, on_step: ProgressCallback | None = None, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """Log-probabilities ``[N, V]`` of ``texts``, or of those from ``start`` to ``stop``.

        Only tasks with dense predictions implement it.
        """
        raise NotImplementedError(f"task = {self.session.config.task} has no dense predictions")

    def compressed(
        self, spec: RoundSpec, seed: int, start: int, stop: int, on_step: ProgressCallback | None = None
    ) -> payload.Answers:
        """Predictions of the rows from ``start`` to ``stop`` of the proxy query, in the round's codec."""
        return encoding.compress(self.answer(self.session.splits.proxy, on_step, start, stop), spec, seed)

    def proxy_examples(self) -> int:
        """Number of examples in one epoch over the proxy texts."""
        return len(self.session.splits.proxy)

    def projection(self) -> Json | None:
        """How predictions were projected since the last call; ``None`` if the tokenizer is the student's.

        ``rows``, the share ``answered`` of them, ``coverage`` (mean share of the mass that is kept) and
        ``seconds``.
        """
        return None

    def reset(self) -> None:
        """Restore the weights before any training."""
        self.model.load_state_dict(self._initial)

    def restore(self, weights: str) -> None:
        """Load weights that a step wrote, after checking that the file is unchanged."""
        self.session.run.done(layout.step_of(weights))
        self.load(weights)

    def load(self, weights: str) -> None:
        """Load weights that the current step wrote."""
        models.restore(self.model, self.session.run.path(weights))

    def fit(
        self,
        examples: Examples,
        config: TrainingConfig,
        *,
        seed: int,
        steps: int | None = None,
        distill: DistillConfig | None = None,
        proximal: float = 0.0,
        on_step: ProgressCallback | None = None,
    ) -> training.Trained:
        """Train on ``examples`` from the current weights."""
        if not self.draws_inputs:
            self.compute_frozen(examples.tokens)
        return training.fit(
            self.model,
            examples,
            config,
            loss=self.loss(examples, distill, seed),
            seed=seed,
            bf16=self.session.bf16,
            pad_id=self.specialist.pad_id,
            head=models.head_parameters(self.model),
            meter=self.meter,
            steps=steps,
            proximal=proximal,
            on_step=on_step,
        )

    def compute_frozen(self, tokens: Sequence[Tokens]) -> None:
        """Fill the cache of frozen layers, if there is one, with what they make of ``tokens``."""
        if self._frozen is None:
            return
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, torch.bfloat16, enabled=self.session.bf16):
            without = self._frozen.fill(tokens)
        if without and not self._warned:
            self._warned = True
            self.session.progress.log(
                f"{self.name}.frozen_cache_mb has no room for {without} of {len(tokens)} texts: their frozen "
                "layers are computed each time"
            )

    def frozen_passes(self, tokens: Sequence[Tokens]) -> Sequence[tuple[int, int]]:
        """Rows and length of the passes of ``compute_frozen``."""
        return [] if self._frozen is None else list(frozen.passes_over(tokens))

    def evaluate(self, on_step: ProgressCallback | None = None) -> dict[str, dict[str, float]]:
        """Metrics on the validation set, by which models are selected, and on the test set."""
        splits = self.session.splits
        sets = {"validation": splits.validation, "test": splits.test}
        return {name: self.metrics(texts, on_step) for name, texts in sets.items()}

    def step(
        self,
        name: str,
        label: str,
        start: str | None,
        examples: Callable[[], Examples],
        config: TrainingConfig,
        *,
        steps: int | None = None,
        distill: DistillConfig | None = None,
        proximal: float = 0.0,
        evaluate: bool = True,
    ) -> Json:
        """Train from the weights in file ``start`` (``None``: anew), evaluate, save; once in a run.

        Returns:
            The step's record: ``weights`` (a file of the run), ``trained``, ``costs`` and, with ``evaluate``,
            ``validation`` and ``test``.
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
                examples(),
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
        metrics, cost = self.measured(label) if evaluate else ({}, Cost())
        weights = layout.tensors(name)
        run.write(weights, lambda path: models.save(self.model, path))
        content = {
            "weights": weights,
            **metrics,
            "trained": asdict(trained),
            "costs": {"train": asdict(train.cost), "evaluate": asdict(cost)},
        }
        record = run.commit(name, content, [weights])
        if cache is not None:
            cache.give(run, name)
        return record

    def measured(self, label: str) -> tuple[dict[str, dict[str, float]], Cost]:
        """``evaluate``, and its cost."""
        before = self.meter.flops
        with self.session.progress.step(f"{label}: evaluate") as on_step, measure() as evaluated:
            metrics = self.evaluate(on_step)
            evaluated.flops = self.meter.flops - before
        return metrics, evaluated.cost

    def not_a_number(self) -> ModelError:
        """The error for predictions that are NaN."""
        return ModelError(f"{self.name}: the model predicts NaN: training diverged; lower the learning rate")


def examples_of(learner: Learner, texts: TextSet, teacher: Tensor | None = None) -> TrainingExamples:
    """Training examples of ``texts`` with their class labels and, if given, a teacher's predictions."""
    return TrainingExamples(learner.tokens(texts), labels_of(texts), teacher)


def labels_of(texts: TextSet) -> Tensor:
    """``[N]`` class labels; ``NO_LABEL`` for texts without one."""
    labels = torch.from_numpy(texts.labels)
    return torch.where(labels == UNLABELLED, NO_LABEL, labels)


def best_of(session: Session, best: Json | None, new: Json) -> Json:
    """The record that is better on validation; the earlier one if they are equal."""
    return new if best is None else session.task.best([best, new])


def later(config: TrainingConfig, epochs: float | None, head_learning_rate: float | None) -> TrainingConfig:
    """``config`` for a model that has been trained before: its head is no longer random."""
    changed = {"epochs": epochs or config.epochs, "head_learning_rate": head_learning_rate}
    return config.model_copy(update=changed)
