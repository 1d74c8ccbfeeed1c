"""Baseline: every client alone, with as many steps as it takes in the federation."""

from feddistill import training
from feddistill.config import Config
from feddistill.config.training import TrainingConfig
from feddistill.methods.learner import Learner, Session, later, lessons_of
from feddistill.store import Json
from feddistill.types import TextSet


def run(session: Session) -> Json:
    """For each client the segment that is best on its validation, and the best client by validation."""
    crew = Crew(session)
    clients: dict[str, list[Json]] = {}
    for position, private in enumerate(session.splits.private):
        records: list[Json] = []
        for number in range(1, session.config.rounds + 1):
            start = records[-1]["weights"] if records else None
            records.append(train_alone(session, crew.learner(position), private, number, start))
        clients[private.name] = records
    return {"clients": clients}


class Crew:
    """The clients' models: one learner for each architecture, whatever the number of clients."""

    def __init__(self, session: Session):
        self._session = session
        self._learners: dict[int, Learner] = {}

    def learner(self, position: int) -> Learner:
        """The learner of the client at ``position``; architectures are dealt out in turn."""
        models = self._session.config.clients.models
        index = position % len(models)
        if index not in self._learners:
            self._learners[index] = Learner(self._session, models[index], f"clients.models.{index}")
        return self._learners[index]


def train_alone(session: Session, learner: Learner, private: TextSet, number: int, start: str | None) -> Json:
    """Segment ``number`` of a client that learns from its private texts alone.

    The first is also the client's first round in the federation: there is no teacher yet.
    """
    return learner.step(
        f"alone/{number:03d}/{private.name}",
        f"{private.name} alone: segment {number}",
        start,
        lambda: lessons_of(learner, private),
        client_settings(session.config, number),
        steps=client_steps(session.config, number, len(private), len(session.splits.proxy)),
    )


def client_settings(config: Config, number: int) -> TrainingConfig:
    """How a client trains in round ``number``."""
    if number == 1:
        return config.clients.training
    epochs = config.clients.codistillation.epochs if config.clients.codistillation.enabled else None
    return later(config.clients.training, epochs, config.clients.codistillation.head_learning_rate)


def client_steps(config: Config, number: int, private: int, proxy: int) -> int:
    """How many steps a client takes in round ``number``, over private and digested texts."""
    digested = 0
    if number > 1 and config.clients.codistillation.enabled:
        digested = min(config.clients.codistillation.examples or proxy, proxy)
    return training.steps_of(client_settings(config, number), private + digested)
