"""Baseline: federated averaging of the student's low-rank adapters (LoRA: Hu et al., ICLR 2022).

A head with random weights, as a classifier's, is trained and averaged as well. All other weights of the
student keep their pretrained values, so uploads are small: the baseline to compare with for large models. The
adapters are peft's; each of their two factors is averaged.
"""

from collections.abc import Iterator

from torch import nn

from feddistill.config.tasks import TASKS
from feddistill.methods.averaging import averaging_jobs, rounds
from feddistill.methods.job import Job
from feddistill.models import adapters
from feddistill.store.run_directory import Json
from feddistill.tasks.choose import learner_of
from feddistill.tasks.learner import Learner
from feddistill.tasks.session import Session


def run(session: Session) -> Json:
    """Run ``fedavg`` on the adapters and a new head only."""
    return {"rounds": rounds(session, "fedlora", learner=adapted(session))}


def plan(session: Session, learners: list[Learner], student: Learner) -> Iterator[Job]:
    """Jobs of ``run``, for the cost estimate."""
    return averaging_jobs(session, "fedlora", adapted(session))


def adapted(session: Session) -> Learner:
    """The student's architecture with trainable adapters and, if it is new, head."""
    config, head = session.config.fedlora, TASKS[session.config.task].new_head

    def adapt(model: nn.Module) -> None:
        adapters.add(model, config.rank, config.alpha, "student.model", "baselines: fedlora", head=head)

    return learner_of(session, session.config.student.model, "student.model", adapt=adapt)
