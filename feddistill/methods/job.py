"""Jobs: the trainings and inference passes of a method, which ``plan`` adds up."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from feddistill import training
from feddistill.aggregation.rules.choice import MinCe
from feddistill.config import Config
from feddistill.config.training import TrainingConfig
from feddistill.modelio.padding import Tokens
from feddistill.tasks.learner import Learner
from feddistill.tasks.session import Session


@dataclass(frozen=True, slots=True)
class Job:
    """A training or an inference pass that the run would repeat ``times`` times."""

    phase: str
    learner: Learner
    texts: Sequence[Tokens]
    settings: TrainingConfig | None = None
    """Training settings; ``None`` for an inference pass over ``texts``."""
    steps: int = 0
    """Optimiser steps of a training."""
    times: int = 1


def client_texts(session: Session, learners: list[Learner]) -> Iterator[tuple[Learner, list[Tokens]]]:
    """Each client's model, with the client's private texts as tokens of that model."""
    for place, private in zip(session.splits.places, session.splits.private, strict=True):
        learner = learners[place % len(learners)]
        yield learner, list(learner.tokens(private))


def rounds_asked(session: Session) -> list[list[int]]:
    """For each client, the rounds that sample it."""
    asked = {n: session.round_clients(n) for n in range(1, session.config.rounds + 1)}
    return [[n for n in asked if private.name in asked[n]] for private in session.splits.private]


def client_steps(config: Config, own: int, proxy: int, late: bool = False) -> tuple[int, int]:
    """Steps in a client's first round, and in each later one; ``late`` if its first round is not round 1."""
    digest, settings = config.clients.codistillation, config.clients.training
    later = settings.model_copy(update={"epochs": digest.epochs if digest.enabled else settings.epochs})
    digested = min(digest.examples or proxy, proxy) if digest.enabled else 0
    return training.steps_of(settings, own + late * digested), training.steps_of(later, own + digested)


def federation(
    session: Session, learners: list[Learner], student: Learner, baseline: str | None = None
) -> Iterator[Job]:
    """Jobs of the rounds of federated distillation, or of a ``baseline`` that reuses its first round."""
    config, rounds = session.config, session.config.rounds
    settings, digest = config.clients.training, config.clients.codistillation
    for (learner, own), turns in zip(client_texts(session, learners), rounds_asked(session), strict=True):
        proxy, late = list(learner.tokens(session.splits.proxy)), 1 not in turns
        first, later = client_steps(config, len(own), len(proxy), late)
        digested = min(digest.examples or len(proxy), len(proxy)) if digest.enabled else 0
        phase, both = baseline or "clients_train", [*own, *proxy[:digested]]
        yield Job(phase, learner, both if late else own, settings, first, min(len(turns), 1))
        yield Job(phase, learner, both, settings, later, max(len(turns) - 1, 0))
        yield Job(baseline or "clients_answer", learner, proxy, times=len(turns))
        if baseline is None and config.clients.evaluate:
            yield from evaluation(session, learner, len(turns))
    proxy, learns = list(student.tokens(session.splits.proxy)), config.student.training
    steps = training.steps_of(learns, len(proxy))
    yield Job(baseline or "server_train", student, proxy, learns, steps, rounds)
    rule = config.aggregation.rule if baseline is None else MinCe()
    if "student" in rule.needs():
        yield Job(baseline or "server_aggregate", student, proxy, times=rounds - 1)
    yield from evaluation(session, student, rounds)


def evaluation(session: Session, learner: Learner, times: int) -> Iterator[Job]:
    """Jobs that evaluate on the validation and test sets, ``times`` times."""
    for texts in (session.splits.validation, session.splits.test):
        yield Job("evaluate", learner, learner.tokens(texts), times=times)
