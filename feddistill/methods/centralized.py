"""Baseline: the student trained on the pooled private texts of all clients. An upper bound."""

from collections.abc import Iterator

import numpy as np

from feddistill.methods.job import Job
from feddistill.methods.student_alone import student_jobs, student_rounds
from feddistill.store.run_directory import Json
from feddistill.tasks.learner import Learner
from feddistill.tasks.session import Session
from feddistill.types import TextSet


def run(session: Session) -> Json:
    """Train the student on the pool of the clients' labelled texts."""
    return {"rounds": student_rounds(session, "centralized", pool(session.splits.private))}


def plan(session: Session, learners: list[Learner], student: Learner) -> Iterator[Job]:
    """Jobs of ``run``, for the cost estimate."""
    return student_jobs(session, "centralized", student, pool(session.splits.private))


def pool(sets: tuple[TextSet, ...]) -> TextSet:
    """Concatenate the texts of all clients into one set."""
    return TextSet(
        name="all private texts",
        ids=tuple(f"{s.name}/{i}" for s in sets for i in s.ids),
        texts=tuple(text for s in sets for text in s.texts),
        labels=np.concatenate([s.labels for s in sets]),
        label_names=sets[0].label_names,
        starts=None if sets[0].starts is None else tuple(start for s in sets for start in s.starts or ()),
        answers=None if sets[0].answers is None else tuple(right for s in sets for right in s.answers or ()),
        turns=None if sets[0].turns is None else tuple(spans for s in sets for spans in s.turns or ()),
    )
