"""A client's part of a round of federated averaging."""

from collections.abc import Callable

from feddistill import training
from feddistill.store import layout
from feddistill.store.run_directory import Json
from feddistill.tasks.learner import Learner, later
from feddistill.tasks.session import Session
from feddistill.training import Examples
from feddistill.types import TextSet


def trained_by(
    session: Session,
    learner: Learner,
    name: str,
    number: int,
    start: str | None,
    private: TextSet,
    taught: Callable[[TextSet], Examples],
) -> Json:
    """Train a client in round ``number`` from the weights in file ``start``; returns the step record."""
    config = session.config
    settings = config.clients.training
    if config.fedavg.epochs is not None:
        settings = settings.model_copy(update={"epochs": config.fedavg.epochs})
    if number > 1:
        settings = later(settings, None, config.clients.codistillation.head_learning_rate)
    lessons = taught(private)
    return learner.step(
        layout.baseline(name, number, "clients", private.name),
        f"{name}: round {number}: {private.name} learns",
        start,
        lambda: lessons,
        settings,
        steps=training.steps_of(settings, len(lessons.tokens)),
        proximal=config.fedavg.proximal,
        evaluate=False,
    )
