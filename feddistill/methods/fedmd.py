"""Baseline: FedMD (Li and Wang, "FedMD: Heterogenous Federated Learning via Model Distillation", 2019).

Clients of any architecture train on the labelled public texts, then on their own; in each round they send
scores of the public texts, train on the mean of all scores (digest), and train on their own texts again
(revisit). There is no student.
"""

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from feddistill import training
from feddistill.accounting import measure
from feddistill.client.client import Client, ClientGroup
from feddistill.config.training import DistillConfig
from feddistill.methods.job import Job, client_texts, evaluation
from feddistill.store import layout
from feddistill.store.records import StepRecord
from feddistill.store.run_directory import Json
from feddistill.tasks.learner import Learner, examples_of, later
from feddistill.tasks.session import Session
from feddistill.training import TrainingExamples
from feddistill.types import NO_LABEL, UNLABELLED, Cost

DIGEST = DistillConfig(kind="mae", kd_weight=1.0)
FLOAT = 4
"""Bytes of a score in an upload."""


def run(session: Session) -> Json:
    """Run as many rounds as the federation has; the result is the clients' models."""
    group = ClientGroup(session)
    clients: dict[str, list[Json]] = {client.name: [] for client in group.clients}
    pretrained = {client.name: _pretrain(session, client) for client in group.clients}
    for number in range(1, session.config.rounds + 1):
        consensus, costs = _consensus(session, group, number)
        for client in group.clients:
            record = _digest(session, client, number, consensus)
            first = {"pretrain": pretrained[client.name]} if number == 1 else {}
            spent = StepRecord.from_json(record).costs
            costs_of = {
                **{what: asdict(cost) for what, cost in spent.items()},
                "answer": costs[client.name],
                **first,
            }
            clients[client.name].append({**record, "costs": costs_of})
    rows, classes = len(session.splits.proxy), len(session.splits.label_names)
    sent = FLOAT * rows * classes * len(group.clients)
    return {"clients": clients, "bytes": {"uplink": sent, "downlink": sent}}


def _pretrain(session: Session, client: Client) -> Json:
    """Train on labelled public texts, then on private ones (FedMD's transfer learning); returns the cost."""
    proxy = session.splits.proxy
    known = np.flatnonzero(proxy.labels != UNLABELLED)
    sets = {"private": client.private}
    if len(known):
        sets = {"public": proxy.select(known, "data.proxy (labelled)"), **sets}
    start, cost = None, Cost()
    for what, texts in sets.items():
        record = client.learner.step(
            layout.baseline("fedmd", 0, what, client.name),
            f"fedmd: {client.name} learns {what} texts",
            start,
            partial(examples_of, client.learner, texts),
            session.config.clients.training,
            evaluate=False,
        )
        step = StepRecord.from_json(record)
        start = step.weights
        cost += step.training
    return asdict(cost)


def _last(number: int, client: Client) -> str:
    """The file with a client's weights before round ``number``."""
    what = "private" if number == 1 else "revisit"
    return layout.tensors(layout.baseline("fedmd", number - 1, what, client.name))


def _consensus(session: Session, group: ClientGroup, number: int) -> tuple[str, dict[str, Json]]:
    """The file with the mean of the clients' scores, and each client's cost of answering."""
    run, name = session.run, layout.baseline("fedmd", number, "consensus")
    if (record := run.done(name)) is None:
        scores: list[Tensor] = []
        costs: dict[str, Json] = {}
        for client in group.clients:
            learner = client.learner
            learner.restore(_last(number, client))
            before = learner.meter.flops
            with (
                session.progress.step(f"fedmd: round {number}: {client.name} answers") as on_step,
                measure() as cost,
            ):
                answered = learner.answer(session.splits.proxy, on_step)
                cost.flops = learner.meter.flops - before
            scores.append(answered - answered.mean(-1, keepdim=True))
            costs[client.name] = asdict(cost.cost)
        run.write_bytes(layout.tensors(name), save({"scores": torch.stack(scores).mean(0)}))
        record = run.commit(name, {"file": layout.tensors(name), "costs": costs}, [layout.tensors(name)])
    return record["file"], record["costs"]


def _digest(session: Session, client: Client, number: int, consensus: str) -> Json:
    """Train a client on the consensus, then on its own texts; the record has the cost of both."""
    settings, learner, proxy = session.config.fedmd, client.learner, session.splits.proxy
    head = session.config.clients.codistillation.head_learning_rate
    training = session.config.clients.training

    def lessons() -> TrainingExamples:
        scores = load_file(session.run.path(consensus))["scores"]
        nothing = torch.full((len(proxy),), NO_LABEL)
        return TrainingExamples(learner.tokens(proxy), nothing, scores)

    layout.baseline("fedmd", number)
    digested = learner.step(
        layout.baseline("fedmd", number, "digest", client.name),
        f"fedmd: round {number}: {client.name} digests",
        _last(number, client),
        lessons,
        later(training, settings.digest_epochs, head),
        distill=DIGEST,
        evaluate=False,
    )
    record = learner.step(
        layout.baseline("fedmd", number, "revisit", client.name),
        f"fedmd: round {number}: {client.name} revisits its own texts",
        StepRecord.from_json(digested).weights,
        partial(examples_of, learner, client.private),
        later(training, settings.revisit_epochs, head),
    )
    revisited = StepRecord.from_json(record)
    cost = StepRecord.from_json(digested).training + revisited.training
    costs = {what: asdict(spent) for what, spent in {**revisited.costs, "train": cost}.items()}
    return {**record, "costs": costs}


def plan(session: Session, learners: list[Learner], student: Learner) -> Iterator[Job]:
    """Jobs of ``run``, for the cost estimate."""
    known = session.splits.proxy.select(np.flatnonzero(session.splits.proxy.known), "labelled")
    config, rounds, phase = session.config, session.config.rounds, "baseline_fedmd"
    settings = config.clients.training

    def steps(epochs: float, examples: int) -> int:
        return training.steps_of(settings.model_copy(update={"epochs": epochs}), examples)

    for learner, own in client_texts(session, learners):
        proxy, public = learner.tokens(session.splits.proxy), learner.tokens(known)
        for texts in (public, own):
            if len(texts):
                yield Job(phase, learner, texts, settings, steps(settings.epochs, len(texts)))
        yield Job(phase, learner, proxy, times=rounds)
        digested = steps(config.fedmd.digest_epochs, len(proxy))
        yield Job(phase, learner, proxy, settings, digested, rounds)
        yield Job(phase, learner, own, settings, steps(config.fedmd.revisit_epochs, len(own)), rounds)
        yield from evaluation(session, learner, rounds)
