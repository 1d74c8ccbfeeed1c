"""Federated distillation: clients answer the proxy set, the server trains the student on their aggregate."""

from collections.abc import Iterator

from feddistill.methods.job import Job, federation
from feddistill.server import rounds
from feddistill.store.run_directory import Json
from feddistill.tasks.learner import Learner
from feddistill.tasks.session import Session


def run(session: Session) -> Json:
    """Run all rounds with ``feddistill.server.rounds``."""
    return rounds.run(session)


def plan(session: Session, learners: list[Learner], student: Learner) -> Iterator[Job]:
    """Jobs of ``run``, for the cost estimate."""
    return federation(session, learners, student)
