"""Baseline: federated averaging of the student's weights (McMahan et al., AISTATS 2017).

It needs one architecture for all and sends weights; ``fedavg.proximal`` makes it FedProx (Li et al., 2020).
"""

from feddistill.methods.averaging import rounds
from feddistill.methods.learner import Session
from feddistill.store import Json


def run(session: Session) -> Json:
    """As many rounds as the federation has, of the student's architecture at every client."""
    return {"rounds": rounds(session, "fedavg")}
