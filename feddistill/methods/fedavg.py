"""Baseline: federated averaging of the student's weights (McMahan et al., AISTATS 2017).

It needs one architecture for all and sends weights; ``fedavg.proximal`` makes it FedProx (Li et al., 2020).
"""

from feddistill.config.data import AtClientsPartition
from feddistill.errors import ConfigError
from feddistill.methods.averaging import rounds
from feddistill.methods.learner import Session
from feddistill.store import Json


def run(session: Session) -> Json:
    """As many rounds as the federation has, of the student's architecture at every client."""
    here = not isinstance(session.config.data.partition, AtClientsPartition)
    if session.engine.averager is None and not here:
        raise ConfigError("baselines: fedavg has the clients train, which --engine flower can")
    return {"rounds": rounds(session, "fedavg", averager=session.engine.averager)}
