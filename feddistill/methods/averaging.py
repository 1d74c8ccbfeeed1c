"""Federated averaging of the student's weights, shared by the methods that average weights."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import torch
from safetensors.torch import load_file
from torch import Tensor

from feddistill import models, training
from feddistill.accounting import measure
from feddistill.client.local_update import trained_by
from feddistill.methods.job import Job, evaluation, rounds_asked
from feddistill.modelio.padding import Tokens
from feddistill.store import layout
from feddistill.store.records import StepRecord
from feddistill.store.run_directory import Json
from feddistill.tasks.choose import learner_of
from feddistill.tasks.learner import Learner
from feddistill.tasks.session import Averager, Session
from feddistill.training import Examples
from feddistill.types import Cost, TextSet

Server = Callable[[Learner, int, str, list[str]], Json]
"""Server step: ``(learner, round, averaged weights, clients' weights)`` to a record that replaces the
average."""


def rounds(
    session: Session,
    name: str,
    server: Server | None = None,
    *,
    learner: Learner | None = None,
    lessons: Callable[[TextSet], Examples] | None = None,
    averager: Averager | None = None,
) -> list[Json]:
    """Run rounds in which each client trains the student's architecture from the last average on its texts.

    The average is weighted by the clients' numbers of texts. Clients train ``fedavg.epochs`` per round; each
    round samples the same clients as the federation.

    Args:
        session: Data, configuration and run directory.
        name: Name of the method.
        server: Server step applied to the average; ``None`` to use the average as it is.
        learner: Model to average; the student's architecture by default.
        lessons: Training examples of a client; from its private texts by default.
        averager: For remote clients: trains at the clients and averages their weights.
    """
    if learner is None:
        learner = learner_of(session, session.config.student.model, "student.model")
    taught = lessons or learner.examples
    records: list[Json] = []
    for number in range(1, session.config.rounds + 1):
        step = layout.baseline(name, number)
        if (record := session.run.done(step, verify=False)) is None:
            start = StepRecord.from_json(records[-1]).file if records else None
            if averager is None:
                record = _round(session, learner, name, number, start, server, taught)
            else:
                record = _round_elsewhere(session, learner, name, number, start, averager)
            session.run.remove(layout.baseline(name, number, "clients"))
        records.append(record)
    return records


def averaged(states: list[dict[str, Tensor]], examples: list[int]) -> dict[str, Tensor]:
    """``sum_k n_k w_k / sum_k n_k`` of every tensor, in float64.

    McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", AISTATS
    2017, algorithm 1; Flower's ``FedAvg`` computes the same in float32.
    """
    total = sum(examples)

    def mean(name: str) -> Tensor:
        first = states[0][name]
        if not first.is_floating_point():
            return first
        weighted = (state[name].double() * (n / total) for state, n in zip(states, examples, strict=True))
        return torch.stack(list(weighted)).sum(0).to(first.dtype)

    return {name: mean(name) for name in states[0]}


def _round_elsewhere(
    session: Session, learner: Learner, name: str, number: int, start: str | None, averager: Averager
) -> Json:
    run, step = session.run, layout.baseline(name, number)
    if start is None:
        learner.reset()
    else:
        learner.restore(start)
    with session.progress.step(f"{name}: round {number}: clients learn"), measure() as waiting:
        average = averager(session, number, models.trained(learner.model))
        learner.model.load_state_dict(dict(average.weights), strict=False)
        weights = layout.tensors(step)
        run.write(weights, lambda path: models.save(learner.model, path))
    figures, evaluated = learner.measured(f"{name}: round {number}")
    trained = Cost(average.cost.seconds, average.cost.flops, waiting.cost.peak_memory_bytes)
    content: Json = {
        "weights": weights,
        **figures,
        "costs": {"train": asdict(trained), "evaluate": asdict(evaluated)},
        "bytes": {"uplink": average.uplink, "downlink": average.downlink},
        "missing": average.missing,
    }
    return run.commit(step, content, [weights])


def _round(
    session: Session,
    learner: Learner,
    name: str,
    number: int,
    start: str | None,
    server: Server | None,
    taught: Callable[[TextSet], Examples],
) -> Json:
    run, step = session.run, layout.baseline(name, number)
    asked = session.round_clients(number)
    clients = [private for private in session.splits.private if private.name in asked]
    trained = [trained_by(session, learner, name, number, start, private, taught) for private in clients]
    steps = [StepRecord.from_json(record) for record in trained]
    files = [step_.file for step_ in steps]
    cost = sum((step_.training for step_ in steps), Cost())
    with measure() as averaging:
        states = [load_file(run.path(file)) for file in files]
        models.take(learner.model, averaged(states, [len(private) for private in clients]))
        weights = layout.tensors(step)
        run.write(weights, lambda path: models.save(learner.model, path))
    content: Json = {"weights": weights, "costs": {}}
    if server is None:
        metrics, evaluated = learner.measured(f"{name}: round {number}")
        content |= metrics
        costs = {"evaluate": evaluated}
    else:
        content |= server(learner, number, weights, files)
        distilled = StepRecord.from_json(content)
        weights, costs = distilled.file, dict(distilled.costs)
        cost += costs.get("train", Cost())
    costs |= {"train": cost + averaging.cost}
    sent = 4 * models.trained_count(learner.model) * len(clients)
    content |= {
        "costs": {what: asdict(spent) for what, spent in costs.items()},
        "bytes": {"uplink": sent, "downlink": sent},
    }
    return run.commit(step, content, [weights])


def averaging_jobs(
    session: Session, name: str, learner: Learner, shared: Sequence[Tokens] = ()
) -> Iterator[Job]:
    """Jobs of ``rounds``; ``shared`` are texts that every client trains on in addition to its own."""
    config, phase = session.config, f"baseline_{name}"
    settings = config.clients.training
    if config.fedavg.epochs is not None:
        settings = settings.model_copy(update={"epochs": config.fedavg.epochs})
    for private, turns in zip(session.splits.private, rounds_asked(session), strict=True):
        texts = [*learner.tokens(private), *shared]
        yield Job(phase, learner, texts, settings, training.steps_of(settings, len(texts)), len(turns))
    yield from evaluation(session, learner, config.rounds)
