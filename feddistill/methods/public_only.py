"""Baseline: the student on the labelled proxy texts alone, with the student's number of steps."""

import numpy as np

from feddistill.config import LANGUAGE
from feddistill.methods.learner import Session
from feddistill.methods.learners import student_rounds
from feddistill.store import Json


def run(session: Session) -> Json:
    """What a server could do without any client."""
    proxy = session.splits.proxy
    if session.config.task in LANGUAGE:  # the tokens are there
        return {"rounds": student_rounds(session, "public_only", proxy)}
    labelled = np.flatnonzero(proxy.known)
    return {"rounds": student_rounds(session, "public_only", proxy.select(labelled, "data.proxy (labelled)"))}
