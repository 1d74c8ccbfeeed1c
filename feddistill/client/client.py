"""A client: its description, its training and its answers. Everything that it sends is made here."""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from feddistill import payload, training
from feddistill.accounting import measure
from feddistill.config.training import TrainingConfig
from feddistill.federation import answer_files, encoding
from feddistill.federation.answer_files import draws
from feddistill.payload.keys import PrivateKey
from feddistill.seeds import generator
from feddistill.store import layout
from feddistill.store.run_directory import Json
from feddistill.tasks.choose import learner_of
from feddistill.tasks.learner import Learner, later
from feddistill.tasks.session import Session
from feddistill.types import ClientDescription, RoundSpec, TextSet


class Client:
    """One institution: its private texts and its specialist model."""

    def __init__(self, session: Session, private: TextSet, group: "ClientGroup", place: int):
        self.key: PrivateKey | None = None
        """Key that signs its payloads, if the run has enrolled keys."""
        self.session = session
        self.config = session.config
        self.private = private
        self.name = private.name
        self._crew = group
        self._place = place

    @property
    def learner(self) -> Learner:
        """The model, shared with the other clients of this architecture: one of them trains at a time."""
        return self._crew.learner(self._place)

    def _has(self, step: str) -> bool:
        return self.session.run.done(step, verify=False) is not None

    def tidy(self, number: int) -> None:
        """Delete all weights but the newest and those of the first round, which ``local_only`` needs."""
        done = [n for n in range(2, number + 1) if self._has(self.step(n))]
        for earlier in done[:-1]:
            self.session.run.remove(layout.tensors(self.step(earlier)))

    @property
    def _evaluates(self) -> bool:
        """True in a simulation with ``clients.evaluate``; an institution has no validation or test set."""
        return self.config.clients.evaluate and len(self.session.splits.test) > 0

    def describe(self) -> ClientDescription:
        """Its description: no more than the aggregation rule needs."""
        counts, needs = None, self.config.aggregation.rule.needs()
        if "class_counts" in needs:
            exact = self.private.label_counts().astype(np.float64)
            epsilon = self.config.data.histogram_epsilon
            if epsilon is not None:  # one example changes one count by one: Laplace noise of scale 1/epsilon
                random = generator(self.config.seed, "histogram", self.name)
                noise = random.laplace(0.0, 1 / epsilon, len(exact))
                exact = np.maximum(np.round(exact + noise, 3), 0.0)
            counts = tuple(float(n) for n in exact)
        return ClientDescription(self.name, len(self.private) if "size" in needs else None, counts)

    def train_alone(self, number: int, start: str | None) -> Json:
        """Segment ``number`` on private texts alone, from the weights in file ``start``.

        The first is also the client's first round in the federation: there is no teacher yet.
        """
        return self.learner.step(
            layout.alone(number, self.name),
            f"{self.name} alone: segment {number}",
            start,
            lambda: self.learner.examples(self.private),
            self._settings(number),
            steps=self._steps(number, self._settings(number)),
            evaluate=self._evaluates,
        )

    def step(self, number: int) -> str:
        """The step of its training in round ``number``; the first round's is also that of ``local_only``."""
        return layout.specialist(number, self.name)

    def train(self, number: int, asked: RoundSpec | None) -> Json:
        """Round ``number``, from the weights of the last round that it took part in.

        ``asked`` is the request that the last teacher, sent back after it, answers; ``None`` without one.
        """
        if number == 1:
            return self.train_alone(number, None)
        before = next((n for n in range(number - 1, 0, -1) if self._has(self.step(n))), None)
        settings = self._settings(
            1 if before is None else number
        )  # a client that joins late starts as the others did
        return self.learner.step(
            self.step(number),
            f"round {number}: {self.name} learns",
            None if before is None else layout.tensors(self.step(before)),
            lambda: self._lessons(number, asked),
            settings,
            steps=self._steps(number, settings),
            evaluate=self._evaluates,
            distill=self.config.distill,
        )

    def answer(self, spec: RoundSpec, weights: str, attack: Callable[[Tensor], Tensor] | None = None) -> Json:
        """Answer the proxy texts with the model in file ``weights``: the upload.

        ``attack`` changes the answers of a simulated attacker before they are sent. It needs all of them in
        memory; otherwise one shard is in memory at a time.
        """
        run, name = self.session.run, layout.answer(spec.round, self.name)
        if (record := run.done(name)) is not None:
            return record
        learner, proxy = self.learner, self.session.splits.proxy
        learner.restore(weights)
        before = learner.meter.flops
        with (
            self.session.progress.step(f"round {spec.round}: {self.name} answers") as on_step,
            measure() as cost,
        ):
            lies = None if attack is None else attack(learner.answer(proxy, on_step))
            for shard, (envelope, content) in enumerate(answer_files.files(name, spec)):
                if run.path(envelope).exists():  # written last, before something interrupted this
                    continue
                start, stop = payload.rows_of(spec, shard)
                seed = draws(self.config.seed, spec.round, self.name, shard)
                if lies is None:
                    said = learner.compressed(spec, seed, start, stop, on_step)
                else:
                    said = encoding.compress(lies[start:stop], spec, seed)
                encoded = payload.encode(said, spec, self.name, shard)
                run.write_bytes(content, encoded)
                run.write_bytes(envelope, payload.seal(encoded, spec, self.name, shard, key=self.key))
            cost.flops = learner.meter.flops - before
        projection = learner.projection()
        if projection is not None and not self._answered_before(spec.round):
            self.session.progress.log(
                f"{self.name} has another tokenizer: it answers {projection['answered']:.1%} of the rows, "
                f"with {projection['coverage']:.1%} of what it knows, projected in {projection['seconds']} s"
            )
        return answer_files.store(run, name, spec, cost.cost, projection)

    def _answered_before(self, number: int) -> bool:
        return any(self._has(layout.answer(n, self.name)) for n in range(1, number))

    def _lessons(self, number: int, asked: RoundSpec | None) -> Any:
        """Private texts with labels and, if it co-distils, proxy texts with the last teacher."""
        settings = self.config.clients.codistillation
        if not settings.enabled or asked is None:
            return self.learner.examples(self.private)
        spec = encoding.feedback_spec(asked)
        stored = answer_files.StoredAnswer(self.session.run, layout.feedback(asked.round), spec)
        stored.admit()
        random = generator(self.config.seed, "digest", number, self.name)
        chosen = np.sort(random.permutation(self.learner.proxy_examples())[: settings.examples])
        return self.learner.with_teacher(self.private, chosen, stored, settings.target)

    def _settings(self, number: int) -> TrainingConfig:
        settings = self.config.clients.training
        if number == 1:
            return settings
        codistillation = self.config.clients.codistillation
        epochs = codistillation.epochs if codistillation.enabled else None
        return later(settings, epochs, codistillation.head_learning_rate)

    def _steps(self, number: int, settings: TrainingConfig) -> int:
        """Optimiser steps over private and distilled texts; ``local_only`` takes as many."""
        codistillation, digested = self.config.clients.codistillation, 0
        if number > 1 and codistillation.enabled:
            proxy = self.learner.proxy_examples()
            digested = min(codistillation.examples or proxy, proxy)
        return training.steps_of(settings, len(self.learner.tokens(self.private)) + digested)


class ClientGroup:
    """All clients of a process, with one model in memory per architecture."""

    def __init__(self, session: Session):
        self._session = session
        self._learners: dict[int, Learner] = {}
        self.clients = tuple(
            Client(session, private, self, place)
            for place, private in zip(session.splits.places, session.splits.private, strict=True)
        )

    def learner(self, place: int) -> Learner:
        """The model of the client at ``place`` in the partition; architectures are assigned in turn."""
        models = self._session.config.clients.models
        index = place % len(models)
        if index not in self._learners:
            self._learners[index] = learner_of(self._session, models[index], f"clients.models.{index}")
        return self._learners[index]
