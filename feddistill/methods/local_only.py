"""Baseline: every client alone, with as many steps as it takes in the federation if it is always asked."""

from feddistill.methods.client import Crew
from feddistill.methods.learner import Session
from feddistill.store import Json


def run(session: Session) -> Json:
    """Each client's segments, one for each round, on its private texts alone."""
    found: dict[str, list[Json]] = {}
    for client in Crew(session).clients:
        records: list[Json] = []
        for number in range(1, session.config.rounds + 1):
            start = records[-1]["weights"] if records else None
            records.append(client.train_alone(number, start))
        found[client.name] = records
    return {"clients": found}
