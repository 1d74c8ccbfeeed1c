"""Baseline: the student on the labelled proxy texts alone, with the student's number of steps."""

import numpy as np

from feddistill.methods.learner import Session, student_rounds
from feddistill.store import Json
from feddistill.types import UNLABELLED


def run(session: Session) -> Json:
    """What a server could do without any client."""
    proxy = session.splits.proxy
    labelled = np.flatnonzero(proxy.labels != UNLABELLED)
    return {"rounds": student_rounds(session, "public_only", proxy.select(labelled, "data.proxy (labelled)"))}
