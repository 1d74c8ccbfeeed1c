"""Baseline: federated averaging, then distillation of the clients' ensemble at the server.

Lin et al., "Ensemble Distillation for Robust Model Fusion in Federated Learning", NeurIPS 2020, algorithm 1:
the teacher is the softmax of the mean of the clients' logits. Clients send their weights to the server.
"""

from collections.abc import Iterator

import torch

from feddistill import training
from feddistill.methods.averaging import averaging_jobs, rounds
from feddistill.methods.job import Job, rounds_asked
from feddistill.store import layout
from feddistill.store.run_directory import Json
from feddistill.tasks.learner import Learner, labels_of, later
from feddistill.tasks.session import Session
from feddistill.training import TrainingExamples


def run(session: Session) -> Json:
    """Average as ``fedavg`` does, then train the average on the proxy texts for the student's steps."""
    config, proxy = session.config, session.splits.proxy

    def distil(learner: Learner, number: int, average: str, clients: list[str]) -> Json:
        settings = config.student.training
        if number > 1:
            settings = later(settings, None, config.student.later_head_learning_rate)

        def lessons() -> TrainingExamples:
            logits = []
            for weights in clients:
                learner.restore(weights)
                logits.append(learner.answer(proxy))
            teacher = torch.stack(logits).mean(0).log_softmax(-1)
            learner.load(average)
            return TrainingExamples(learner.tokens(proxy), labels_of(proxy), teacher)

        return learner.step(
            layout.baseline("feddf", number, "distilled"),
            f"feddf: round {number}: the average learns from the ensemble",
            None,
            lessons,
            settings,
            steps=training.steps_of(config.student.training, len(proxy)),
            distill=config.distill,
        )

    return {"rounds": rounds(session, "feddf", distil)}


def plan(session: Session, learners: list[Learner], student: Learner) -> Iterator[Job]:
    """Jobs of ``run``, for the cost estimate."""
    config, phase = session.config, "baseline_feddf"
    yield from averaging_jobs(session, "feddf", student)
    proxy, settings = list(student.tokens(session.splits.proxy)), config.student.training
    yield Job(phase, student, proxy, times=sum(map(len, rounds_asked(session))))  # the ensemble
    yield Job(phase, student, proxy, settings, training.steps_of(settings, len(proxy)), config.rounds)
