"""Baseline: federated averaging of the student's weights (McMahan et al., AISTATS 2017).

All clients share one architecture and send weights; ``fedavg.proximal`` makes it FedProx (Li et al., 2020).
"""

from collections.abc import Iterator

from feddistill.config.data import RemotePartition
from feddistill.errors import ConfigError
from feddistill.methods.averaging import averaging_jobs, rounds
from feddistill.methods.job import Job
from feddistill.store.run_directory import Json
from feddistill.tasks.learner import Learner
from feddistill.tasks.session import Session


def run(session: Session) -> Json:
    """Average the student's architecture over the clients, for as many rounds as the federation has."""
    here = not isinstance(session.config.data.partition, RemotePartition)
    if session.engine.averager is None and not here:
        raise ConfigError(
            "baselines: fedavg with data.partition remote needs --engine flower: the clients must train"
        )
    return {"rounds": rounds(session, "fedavg", averager=session.engine.averager)}


def plan(session: Session, learners: list[Learner], student: Learner) -> Iterator[Job]:
    """Jobs of ``run``, for the cost estimate."""
    return averaging_jobs(session, "fedavg", student)
