"""Baseline: the student on the labelled proxy texts alone, with the student's number of steps."""

from collections.abc import Iterator

import numpy as np

from feddistill.methods.job import Job
from feddistill.methods.student_alone import student_jobs, student_rounds
from feddistill.store.run_directory import Json
from feddistill.tasks.learner import Learner
from feddistill.tasks.session import Session
from feddistill.types import TextSet


def run(session: Session) -> Json:
    """What a server could do without any client."""
    return {"rounds": student_rounds(session, "public_only", known_texts(session))}


def plan(session: Session, learners: list[Learner], student: Learner) -> Iterator[Job]:
    """The jobs of ``run``."""
    return student_jobs(session, "public_only", student, known_texts(session))


def known_texts(session: Session) -> TextSet:
    """The proxy texts with labels; all of them if the labels are the tokens."""
    proxy = session.splits.proxy
    if session.task.labels == "tokens":
        return proxy
    return proxy.select(np.flatnonzero(proxy.known), "data.proxy (labelled)")
