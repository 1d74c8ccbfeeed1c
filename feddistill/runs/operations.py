"""Operations of a run, foretold: the jobs of its methods, counted as the run will count them."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from importlib import import_module
from itertools import islice

import numpy as np
import torch

from feddistill.config import Config
from feddistill.config.methods import FEDERATED, METHODS
from feddistill.methods.job import Job
from feddistill.modelio.padding import Tokens, padded
from feddistill.tasks.choose import learner_of
from feddistill.tasks.learner import Learner
from feddistill.tasks.session import Session


def learners_of(session: Session) -> tuple[list[Learner], Learner]:
    """The models of the clients, in the order of the settings, and the student."""
    config = session.config
    count = min(len(config.clients.models), max(session.splits.places) + 1)
    clients = [
        learner_of(session, model, f"clients.models.{index}")
        for index, model in enumerate(config.clients.models[:count])
    ]
    return clients, learner_of(session, config.student.model, "student.model")


def jobs_of(session: Session, learners: list[Learner], student: Learner) -> list[Job]:
    """Jobs of federated distillation and of each baseline, but for those of query-only models."""
    methods = [METHODS[name] for name in (FEDERATED, *session.config.baselines)]
    plans = (getattr(import_module(method.module), method.plan) for method in methods)
    return [job for plan in plans for job in plan(session, learners, student) if not job.learner.query_only]


def operations(job: Job, config: Config) -> int:
    """Operations of one repetition of a job, as its record will have them.

    Those of frozen layers whose states are cached are counted once, as if the cache were empty before.
    """
    return _above(job, config) + _frozen(job.learner, [] if _is_drawn(job) else job.texts)


def run_operations(jobs: Iterable[Job], config: Config) -> int:
    """Operations that a process runs for all of ``jobs``: frozen layers once for a text."""
    total = 0
    for job, new in first_met(jobs):
        total += _above(job, config) * job.times
        total += 0 if _is_drawn(job) else _frozen(job.learner, new)
    return total


def first_met(jobs: Iterable[Job]) -> Iterator[tuple[Job, list[Tokens]]]:
    """Each job with the texts that its model has not met in an earlier one."""
    known: defaultdict[int, set[bytes]] = defaultdict(set)
    for job in jobs:
        new: dict[bytes, Tokens] = {}
        for text in job.texts if job.times else ():
            key = np.asarray(text, np.int64).tobytes()
            if key not in known[id(job.learner)]:
                new[key] = text
        known[id(job.learner)] |= new.keys()
        yield job, list(new.values())


def _is_drawn(job: Job) -> bool:
    """True if the tokens are drawn anew each time, so that nothing is cached."""
    return job.settings is not None and job.learner.draws_inputs


def _above(job: Job, config: Config) -> int:
    """Operations of the layers that are not cached."""
    meter, drawn = job.learner.meter, _is_drawn(job)
    before = meter.flops
    for lengths in _batches(job, config):
        shape = len(lengths), padded(max(lengths))
        meter.add(*shape, training=job.settings is not None)
        if drawn:
            meter.add_cached(*shape)
    done, meter.flops = meter.flops - before, before
    return done


def _frozen(learner: Learner, texts: Sequence[Tokens]) -> int:
    """Operations of the layers that are cached, each distinct text once."""
    before = learner.meter.flops
    for shape in learner.frozen_passes(texts):
        learner.meter.add_cached(*shape)
    done, learner.meter.flops = learner.meter.flops - before, before
    return done


def padded_tokens(texts: Sequence[Tokens], config: Config) -> int:
    """Tokens of all batches of an inference pass, padding included."""
    return sum(len(batch) * padded(batch[-1]) for batch in _inference(texts, config))


def _inference(texts: Sequence[Tokens], config: Config) -> Iterator[list[int]]:
    ordered, size = sorted(map(len, texts)), config.clients.eval_batch_size
    yield from (ordered[start : start + size] for start in range(0, len(ordered), size))


def _batches(job: Job, config: Config) -> Iterator[list[int]]:
    """The lengths in each batch of a job."""
    if job.settings is None:
        yield from _inference(job.texts, config)
        return
    endless = _epochs(list(map(len, job.texts)), job.settings.batch_size)
    yield from islice(endless, job.steps * job.settings.gradient_accumulation)


def _epochs(lengths: list[int], size: int) -> Iterator[list[int]]:
    """Batches of lengths, epoch after epoch, in the order that training would draw."""
    from feddistill.training.trainer import in_batches

    order = torch.Generator().manual_seed(0)
    while True:
        rows = list(in_batches(lengths, size, order))
        yield from (
            [lengths[row] for row in rows[start : start + size]] for start in range(0, len(rows), size)
        )
