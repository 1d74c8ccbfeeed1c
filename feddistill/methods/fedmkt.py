"""Baseline: FedMKT (Fan et al., COLING 2025), adapted: the teacher is the best single answer to each text.

For a labelled public text the teacher is the answer with the lowest cross-entropy among the clients' and the
student's; for an unlabelled text it is the mixture. Clients train on the whole distribution at temperature 1;
answers keep 128 entries. Two differences from the paper: all clients train on the same teacher, while there
each chooses between the server's answer and its own; and tokenizers are not aligned if answers are over
classes.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace

from feddistill.aggregation.rules.choice import MinCe
from feddistill.config import Config
from feddistill.config.training import PayloadConfig
from feddistill.methods.job import Job, federation
from feddistill.server import rounds
from feddistill.store import layout
from feddistill.store.records import RoundRecord
from feddistill.store.run_directory import Json
from feddistill.tasks.learner import Learner
from feddistill.tasks.session import Session
from feddistill.types import Cost

KEPT = 128


def run(session: Session) -> Json:
    """Run the rounds of federated distillation with FedMKT's settings, in a separate folder."""
    inner = replace(session, config=settings(session), run=session.run.within(layout.baseline("fedmkt")))
    for step in session.run.steps(layout.specialists(1)):  # round 1 is identical: private texts only
        inner.run.adopt(session.run, step)
    found = rounds.run_all(inner)
    return {"rounds": [_record(one) for one in found]}


def plan(session: Session, learners: list[Learner], student: Learner) -> Iterator[Job]:
    """Jobs of ``run``, for the cost estimate."""
    return federation(session, learners, student, "baseline_fedmkt")


def settings(session: Session) -> Config:
    """The run's configuration with the settings that FedMKT changes."""
    config, classes = session.config, len(session.splits.label_names)
    codistillation = config.clients.codistillation.model_copy(update={"enabled": True, "target": "soft"})
    payload = PayloadConfig(codec="topk", k=KEPT) if classes > KEPT else config.payload
    aggregation = config.aggregation.model_copy(
        update={"rule": MinCe(), "sharpen": 1.0, "nnm_byzantine": None}
    )
    return config.model_copy(
        update={
            "aggregation": aggregation,
            "clients": config.clients.model_copy(update={"codistillation": codistillation}),
            "distill": config.distill.model_copy(update={"temperature": 1.0}),
            "payload": payload,
        }
    )


def _record(one: Json) -> Json:
    """The record of a round's student, with the costs of the clients and the teacher."""
    entry = RoundRecord.from_json(one)
    spent = [step.training for step in entry.specialists.values()]
    spent += [upload.cost for upload in entry.uploads.values()]
    others = sum([*spent, entry.teacher.cost], Cost())
    student, traffic = entry.trained_student, entry.traffic
    return {
        **student.as_json(),
        "costs": {what: asdict(cost) for what, cost in {**student.costs, "others": others}.items()},
        "bytes": {"uplink": sum(traffic.uplink.values()), "downlink": sum(traffic.downlink.values())},
    }
