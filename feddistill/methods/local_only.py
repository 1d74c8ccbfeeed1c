"""Baseline: each client trains alone, for as many steps as in a federation that samples it every round."""

from collections.abc import Iterator

from feddistill.client.client import ClientGroup
from feddistill.methods.job import Job, client_steps, client_texts, evaluation, rounds_asked
from feddistill.store.records import StepRecord
from feddistill.store.run_directory import Json
from feddistill.tasks.learner import Learner
from feddistill.tasks.session import Session


def run(session: Session) -> Json:
    """Train each client on its private texts only, one segment per round."""
    found: dict[str, list[Json]] = {}
    for client in ClientGroup(session).clients:
        records: list[Json] = []
        for number in range(1, session.config.rounds + 1):
            start = StepRecord.from_json(records[-1]).weights if records else None
            records.append(client.train_alone(number, start))
        found[client.name] = records
    return {"clients": found}


def plan(session: Session, learners: list[Learner], student: Learner) -> Iterator[Job]:
    """Jobs of ``run``, for the cost estimate."""
    config = session.config
    for (learner, own), turns in zip(client_texts(session, learners), rounds_asked(session), strict=True):
        first, later = client_steps(config, len(own), learner.proxy_examples())
        settings, missed = config.clients.training, int(1 not in turns)
        yield Job("baseline_local_only", learner, own, settings, first, missed)
        yield Job("baseline_local_only", learner, own, settings, later, config.rounds - 1)
        yield from evaluation(session, learner, config.rounds - 1 + missed)
