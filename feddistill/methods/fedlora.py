"""Baseline: federated averaging of the student's head and low-rank adapters (LoRA: Hu et al., ICLR 2022).

Everything else of the student stays as it was pretrained, so an upload is small: the honest competitor of
answers where models are large. Adapters are peft's; what is averaged are their two factors.
"""

from collections.abc import Iterator

from torch import nn

from feddistill.methods.averaging import averaging_jobs, rounds
from feddistill.methods.job import Job
from feddistill.models import adapters
from feddistill.store.run_directory import Json
from feddistill.tasks.choose import learner_of
from feddistill.tasks.learner import Learner
from feddistill.tasks.session import Session


def run(session: Session) -> Json:
    """As ``fedavg``, of the adapters and the head alone."""
    return {"rounds": rounds(session, "fedlora", learner=adapted(session))}


def plan(session: Session, learners: list[Learner], student: Learner) -> Iterator[Job]:
    """The jobs of ``run``."""
    return averaging_jobs(session, "fedlora", adapted(session))


def adapted(session: Session) -> Learner:
    """The student's architecture, of which adapters and head are trained."""
    config = session.config.fedlora

    def adapt(model: nn.Module) -> None:
        adapters.add(model, config.rank, config.alpha, "student.model", "baselines: fedlora", head=True)

    return learner_of(session, session.config.student.model, "student.model", adapt=adapt)
