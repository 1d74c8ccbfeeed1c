"""Baseline: the student on all private texts in one place, which nobody could do. An upper bound."""

import numpy as np

from feddistill.methods.learner import Session
from feddistill.methods.learners import student_rounds
from feddistill.store import Json
from feddistill.types import TextSet


def run(session: Session) -> Json:
    """The student's steps, on the pool of the clients' labelled texts."""
    return {"rounds": student_rounds(session, "centralized", pool(session.splits.private))}


def pool(sets: tuple[TextSet, ...]) -> TextSet:
    """All clients' texts as one set."""
    return TextSet(
        name="all private texts",
        ids=tuple(f"{s.name}/{i}" for s in sets for i in s.ids),
        texts=tuple(text for s in sets for text in s.texts),
        labels=np.concatenate([s.labels for s in sets]),
        label_names=sets[0].label_names,
        starts=None if sets[0].starts is None else tuple(start for s in sets for start in s.starts or ()),
        answers=None if sets[0].answers is None else tuple(right for s in sets for right in s.answers or ()),
    )
