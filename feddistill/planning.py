"""What a run would cost, before anything runs: bytes exactly, operations nearly, seconds from a trial."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from feddistill import models, payload, training
from feddistill.accounting import peak_memory_bytes
from feddistill.aggregation.answers import CHUNK
from feddistill.batches import pad
from feddistill.config import Config
from feddistill.config.training import PayloadConfig, TrainingConfig
from feddistill.methods.centralized import pool
from feddistill.methods.check import DENSE_CLASSES
from feddistill.methods.feddistill import LORA_RANK, request
from feddistill.methods.learner import Learner, Session, labels_of
from feddistill.methods.learners import learner_of
from feddistill.progress import Quiet, Show
from feddistill.results import proxy_bytes
from feddistill.store import Json, RunDirectory
from feddistill.training import Lessons
from feddistill.types import UNLABELLED, RoundSpec, Splits

COUNTED = ("public_only", "local_only", "centralized")
"""Baselines whose costs are foretold."""
FLOAT = 4
TRIAL_STEPS = 3


@dataclass(frozen=True, slots=True)
class Job:
    """A training or a pass of answers that the run would do ``times`` over."""

    phase: str
    learner: Learner
    texts: Sequence[Sequence[int]]
    steps: int | None
    """Of training; ``None`` for a pass over ``texts``."""
    times: int = 1


def plan(config: Config, splits: Splits, show: Show | None = None) -> Json:
    """The costs of ``config`` on ``splits``.

    Uploads are exact: payloads are encoded, with empty answers.  Operations are counted on one text of each
    length; seconds are those of a few steps of each model, timed here, times the steps that the run would
    take.

    Returns:
        ``bytes``, ``flops``, ``seconds``, ``memory_bytes``, ``disk_bytes``; see ``docs/payload.md`` for what
        the codecs are.
    """
    show = show or Quiet()
    with tempfile.TemporaryDirectory() as scratch:
        directory = RunDirectory.create(Path(scratch) / "plan", "")
        try:
            return _plan(Session(config, splits, directory, show))
        finally:
            directory.close()


def _plan(session: Session) -> Json:
    config, splits = session.config, session.splits
    count = min(len(config.clients.models), max(splits.places) + 1)
    learners = [
        learner_of(session, model, f"clients.models.{index}")
        for index, model in enumerate(config.clients.models[:count])
    ]
    student = learner_of(session, config.student.model, "student.model")
    jobs = list(_jobs(session, learners, student))
    speeds = {}
    for learner in {id(job.learner): job.learner for job in jobs}.values():
        with session.show.step(f"try {learner.name} for a few steps"):
            speeds[id(learner)] = _speed(session, learner)
    flops: dict[str, int] = {}
    seconds: dict[str, float] = {}
    for job in jobs:
        operations, time_ = _cost(job, config, *speeds[id(job.learner)])
        flops[job.phase] = flops.get(job.phase, 0) + operations * job.times
        seconds[job.phase] = seconds.get(job.phase, 0.0) + time_ * job.times
    sent = _bytes(session, student)
    return {
        "clients": len(splits.private),
        "rounds": config.rounds,
        "proxy_texts": len(splits.proxy),
        "rows": session.question.positions,
        "classes": session.question.vocab_size,
        "not_counted": [name for name in config.baselines if name not in COUNTED],
        "bytes": sent,
        "flops": {**flops, "total": sum(flops.values())},
        "seconds": {name: round(s, 1) for name, s in {**seconds, "total": sum(seconds.values())}.items()},
        "memory_bytes": {
            "training": peak_memory_bytes(),
            "aggregation": 3
            * FLOAT
            * min(CHUNK, len(splits.private) * session.question.positions * _columns(session)),
        },
        "disk_bytes": _disk(session, learners, student, sent["codecs"][_chosen(config)]["upload"]),
    }


def _jobs(session: Session, learners: list[Learner], student: Learner) -> Iterator[Job]:
    """As the methods go about it: see ``feddistill.methods``."""
    config, splits = session.config, session.splits
    rounds = config.rounds
    for place, private in zip(splits.places, splits.private, strict=True):
        learner = learners[place % len(config.clients.models)]
        own, proxy = list(learner.tokens(private)), list(learner.tokens(splits.proxy))
        digest = config.clients.codistillation
        settings = config.clients.training
        later = settings.model_copy(update={"epochs": digest.epochs if digest.enabled else settings.epochs})
        digested = min(digest.examples or len(proxy), len(proxy)) if digest.enabled else 0
        steps = (training.steps_of(settings, len(own)), training.steps_of(later, len(own) + digested))
        yield Job("clients_train", learner, own, steps[0])
        yield Job("clients_train", learner, [*own, *proxy[:digested]], steps[1], rounds - 1)
        yield Job("clients_answer", learner, proxy, None, rounds)
        yield from _evaluated(session, learner, rounds)
        if "local_only" in config.baselines:
            yield Job("baseline_local_only", learner, own, steps[1], rounds - 1)
            yield from _evaluated(session, learner, rounds - 1)
    proxy = student.tokens(splits.proxy)
    steps_of_student = training.steps_of(config.student.training, len(proxy))
    yield Job("server_train", student, proxy, steps_of_student, rounds)
    yield from _evaluated(session, student, rounds)
    labelled = np.flatnonzero(splits.proxy.labels != UNLABELLED)
    if session.question.compressed:  # a language model has the next tokens
        labelled = np.arange(len(splits.proxy))
    sets = {"public_only": splits.proxy.select(labelled, "labelled"), "centralized": pool(splits.private)}
    for name, texts in sets.items():
        if name in config.baselines:
            yield Job(f"baseline_{name}", student, student.tokens(texts), steps_of_student, rounds)
            yield from _evaluated(session, student, rounds)


def _evaluated(session: Session, learner: Learner, times: int) -> Iterator[Job]:
    for texts in (session.splits.validation, session.splits.test):
        yield Job("evaluate", learner, learner.tokens(texts), None, times)


def _speed(session: Session, learner: Learner) -> tuple[float, float]:
    """Seconds a training step, and seconds a token of an answer."""
    config, texts = session.config, session.splits.proxy
    training_config = config.student.training if learner.name == "student.model" else config.clients.training
    need = training_config.batch_size * training_config.gradient_accumulation
    tokens = learner.tokens(texts)
    lessons: Any = learner.lessons(texts)
    if isinstance(lessons, Lessons):  # the server knows few labels; any will do
        lessons = Lessons(tokens, labels_of(texts).clamp_min(0))
    _fit(learner, lessons, training_config, session, 1)  # what is done once
    one, several = (_fit(learner, lessons, training_config, session, steps) for steps in (1, 1 + TRIAL_STEPS))
    some = texts.select(range(min(need, len(texts))), "trial")
    known = replace(some, labels=some.labels.clip(0))
    learner.figures(known)
    start = time.perf_counter()
    learner.figures(known)
    answered = time.perf_counter() - start
    learner.reset()
    return max(several - one, 1e-6) / TRIAL_STEPS, answered / _padded(learner.tokens(some), config)


def _fit(learner: Learner, lessons: Any, settings: TrainingConfig, session: Session, steps: int) -> float:
    start = time.perf_counter()
    learner.fit(lessons, settings, seed=0, steps=steps)
    return time.perf_counter() - start


def _padded(tokens: Sequence[Sequence[int]], config: Config) -> int:
    """Tokens of all batches of a pass of answers, padding included."""
    ordered = sorted(map(len, tokens))
    size = config.clients.answer_batch_size
    batches = (ordered[start : start + size] for start in range(0, len(ordered), size))
    return sum(len(batch) * _length(batch[-1]) for batch in batches)


def _cost(job: Job, config: Config, step_seconds: float, token_seconds: float) -> tuple[int, float]:
    """Operations and seconds of one of the job's times."""
    meter = job.learner.meter
    before = meter.flops
    if job.steps is None:
        ordered = sorted(map(len, job.texts))
        size = config.clients.answer_batch_size
        for start in range(0, len(ordered), size):
            batch = ordered[start : start + size]
            meter.add(len(batch), _length(batch[-1]), training=False)
        return meter.flops - before, token_seconds * _padded(job.texts, config)
    settings = config.student.training if job.learner.name == "student.model" else config.clients.training
    lengths = list(map(len, job.texts))
    batches = islice(_batches(lengths, settings.batch_size), job.steps * settings.gradient_accumulation)
    for batch in batches:
        meter.add(len(batch), _length(max(batch)), training=True)
    return meter.flops - before, step_seconds * job.steps


def _batches(lengths: list[int], size: int) -> Iterator[list[int]]:
    """Lengths in batches, epoch after epoch, in an order such as training draws."""
    from feddistill.training.trainer import in_batches

    order = torch.Generator().manual_seed(0)
    while True:
        rows = list(in_batches(lengths, size, order))
        yield from (
            [lengths[row] for row in rows[start : start + size]] for start in range(0, len(rows), size)
        )


def _length(longest: int) -> int:
    """Of a batch, padded."""
    return int(pad([[0] * longest], 0)[0].shape[1])


def _bytes(session: Session, student: Learner) -> Json:
    """What travels: for each codec, and for what others would send in as many rounds."""
    config, splits = session.config, session.splits
    clients, rows, classes = len(splits.private), session.question.positions, session.question.vocab_size
    codecs = {}
    for name, settings in _codecs(config, classes).items():
        spec = _spec(session, settings)
        upload = sum(_upload(spec, shard) for shard in range(payload.shards(spec)))
        codecs[name] = {
            "upload": upload,
            "a_text": round(upload / rows, 2),
            "all_rounds_and_clients": upload
            * min(config.clients.per_round or clients, clients)
            * config.rounds,
        }
    weights = FLOAT * models.trained_count(student.model)
    adapter = FLOAT * models.lora_count(student.model, LORA_RANK)
    chosen = codecs[_chosen(config)]
    return {
        "chosen": _chosen(config),
        "codecs": codecs,
        "proxy_download": proxy_bytes(splits),
        "fedavg": {"upload": weights, "times_ours": round(weights / chosen["upload"], 1)},
        "federated_lora": {
            "upload": adapter,
            "times_ours": round(adapter / chosen["upload"], 1),
            "rank": LORA_RANK,
        },
        "break_even_proxy_texts": {
            "fedavg": int(weights / chosen["a_text"]),
            "federated_lora": int(adapter / chosen["a_text"]),
        },
    }


def _upload(spec: RoundSpec, shard: int) -> int:
    """Bytes of a shard and its envelope."""
    start, stop = payload.rows_of(spec, shard)
    client = spec.clients[0]
    content = payload.encode(_empty(spec, stop - start), spec, client, shard)
    return len(content) + len(payload.seal(content, spec, client, shard))


def _empty(spec: RoundSpec, rows: int) -> payload.Answers:
    """Answers of the size that every answer to ``spec`` has, but for what zstd takes off it."""
    k = spec.k
    codes = np.zeros((rows, k), np.uint8)
    if spec.codec == "dense":
        return payload.Dense(codes)
    ids = np.zeros((rows, k), np.int32)
    if spec.codec == "sampled":
        return payload.Sampled(ids, codes, spec.draws, spec.vocab_size)
    lengths = np.full(rows, k, np.uint16) if spec.codec == "threshold" else None
    return payload.Ranked(ids, codes, codes[:, 0], spec.vocab_size, lengths)


def _chosen(config: Config) -> str:
    """What the table calls the configured codec."""
    settings = config.payload
    size = {"dense": "", "sampled": f" draws={settings.draws}"}.get(settings.codec, f" k={settings.k}")
    return f"{settings.codec}{size}{', zstd: at most' if settings.compression == 'zstd' else ''}"


def _codecs(config: Config, classes: int) -> dict[str, PayloadConfig]:
    """The configured one and, for comparison, the others at their usual settings."""
    usual = [PayloadConfig(codec="topk", k=k) for k in (16, 64) if k <= classes]
    if classes <= DENSE_CLASSES:
        usual.insert(0, PayloadConfig())
    found = {_chosen(config): config.payload}
    for settings in usual:
        found.setdefault(_chosen(config.model_copy(update={"payload": settings})), settings)
    return found


def _spec(session: Session, settings: PayloadConfig) -> RoundSpec:
    """As a run would ask, without compression: a bound then, as answers decide what it takes off."""
    plain = settings.model_copy(update={"compression": "none"})
    config = session.config.model_copy(update={"payload": plain})
    quorum = config.aggregation.quorum or len(session.splits.private)
    return request(replace(session, config=config), 1, quorum=quorum, previous="")


def _disk(session: Session, learners: list[Learner], student: Learner, upload: int) -> Json:
    """The run's directory at its largest."""
    config, splits = session.config, session.splits
    clients, rows = len(splits.private), session.question.positions
    whole = config.keep_checkpoints == "all"
    rounds = config.rounds
    kept = [learners[place % len(config.clients.models)] for place in splits.places]
    specialists = sum(map(_size, kept)) * (rounds if whole else min(rounds, 3))
    students = _size(student) * (rounds if whole else min(rounds, 2))
    baselines = _size(student) * rounds * len({"public_only", "centralized"} & set(config.baselines))
    if "local_only" in config.baselines:
        baselines += sum(map(_size, kept)) * (rounds - 1)
    answers = rounds * (upload * (clients + 1) + FLOAT * rows * _columns(session))
    return {
        "checkpoints": specialists + students + baselines,
        "answers": answers,
        "total": specialists + students + baselines + answers,
    }


def _columns(session: Session) -> int:
    """Numbers of a row of the teacher."""
    return 2 * session.config.payload.k + 1 if session.question.compressed else session.question.vocab_size


def _size(learner: Learner) -> int:
    """Of a checkpoint."""
    return sum(x.numel() * x.element_size() for x in learner.model.state_dict().values())
