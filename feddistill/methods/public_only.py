"""Baseline: the student trained on the labelled proxy texts only, for as many steps as the student."""

from collections.abc import Iterator

import numpy as np

from feddistill.methods.job import Job
from feddistill.methods.student_alone import student_jobs, student_rounds
from feddistill.store.run_directory import Json
from feddistill.tasks.learner import Learner
from feddistill.tasks.session import Session
from feddistill.types import TextSet


def run(session: Session) -> Json:
    """Train without any client."""
    return {"rounds": student_rounds(session, "public_only", known_texts(session))}


def plan(session: Session, learners: list[Learner], student: Learner) -> Iterator[Job]:
    """Jobs of ``run``, for the cost estimate."""
    return student_jobs(session, "public_only", student, known_texts(session))


def known_texts(session: Session) -> TextSet:
    """The labelled proxy texts; all of them for language modelling."""
    proxy = session.splits.proxy
    if session.task.labels == "tokens":
        return proxy
    return proxy.select(np.flatnonzero(proxy.known), "data.proxy (labelled)")
