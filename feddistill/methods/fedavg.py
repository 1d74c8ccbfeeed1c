"""Baseline: federated averaging of the student's weights (McMahan et al., AISTATS 2017).

It needs one architecture for all and sends weights; ``fedavg.proximal`` makes it FedProx (Li et al., 2020).
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
    """As many rounds as the federation has, of the student's architecture at every client."""
    here = not isinstance(session.config.data.partition, RemotePartition)
    if session.engine.averager is None and not here:
        raise ConfigError("baselines: fedavg has the clients train, which --engine flower can")
    return {"rounds": rounds(session, "fedavg", averager=session.engine.averager)}


def plan(session: Session, learners: list[Learner], student: Learner) -> Iterator[Job]:
    """The jobs of ``run``."""
    return averaging_jobs(session, "fedavg", student)
