"""Cost estimate of a run: exact bytes, approximate operations, seconds extrapolated from a trial."""

import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from feddistill import models, payload
from feddistill.accounting import peak_memory_bytes
from feddistill.aggregation.answers import CHUNK
from feddistill.config import Config
from feddistill.config.data import RemotePartition
from feddistill.config.training import PayloadConfig, TrainingConfig
from feddistill.errors import ConfigError
from feddistill.methods.job import Job
from feddistill.progress import NoProgress, Progress
from feddistill.runs import experiment
from feddistill.runs.operations import first_met, jobs_of, learners_of, operations, padded_tokens
from feddistill.runs.results import proxy_bytes
from feddistill.server.request import request
from feddistill.server.rounds import lora_count
from feddistill.store.run_directory import Json, RunDirectory
from feddistill.tasks.check import DENSE_CLASSES
from feddistill.tasks.learner import Learner, labels_of
from feddistill.tasks.session import Session
from feddistill.training import TrainingExamples
from feddistill.types import RoundSpec, Splits

FLOAT = 4
TRIAL_STEPS = 3


def plan(config: Config, progress: Progress | None = None) -> Json:
    """Estimate the cost of ``config``; trains only a few steps of each model and writes nothing."""
    if isinstance(config.data.partition, RemotePartition):
        raise ConfigError("data.partition remote: cannot estimate the cost: it depends on the clients' texts")
    config = experiment.resolve(config)
    experiment.prepare(config)
    return estimate(config, experiment.check(config, progress), progress)


def estimate(config: Config, splits: Splits, progress: Progress | None = None) -> Json:
    """Estimate the cost of ``config`` on ``splits``.

    Uploads are exact: payloads are encoded, with empty answers. Operations are counted on one text of each
    length. Seconds are measured on this machine over a few steps of each model and multiplied by the
    number of steps of the run.

    Returns:
        ``bytes``, ``flops``, ``seconds``, ``memory_bytes``, ``disk_bytes``; ``docs/payload.md`` describes the
        codecs.
    """
    progress = progress or NoProgress()
    with tempfile.TemporaryDirectory() as scratch:
        directory = RunDirectory.create(Path(scratch) / "plan", "")
        try:
            return _plan(Session(config, splits, directory, progress))
        finally:
            directory.close()


def _plan(session: Session) -> Json:
    config, splits = session.config, session.splits
    learners, student = learners_of(session)
    jobs = jobs_of(session, learners, student)
    speeds: dict[tuple[int, int], float] = {}
    frozen: dict[int, float] = {}
    for job in jobs:
        learner = job.learner
        if id(learner) not in frozen:
            frozen[id(learner)] = _frozen_speed(session, learner)
        if (tried := _tried(job)) not in speeds:
            with session.progress.step(f"try {learner.name} for a few steps"):
                speeds[tried] = _speed(session, job)
    flops: dict[str, int] = {}
    seconds: dict[str, float] = {}
    for job, new in first_met(jobs):
        flops[job.phase] = flops.get(job.phase, 0) + operations(job, config) * job.times
        amount = job.steps if job.settings is not None else padded_tokens(job.texts, config)
        took = speeds[_tried(job)] * amount * job.times
        took += frozen[id(job.learner)] * sum(map(len, new))  # the states of frozen layers
        seconds[job.phase] = seconds.get(job.phase, 0.0) + took
    sent = _bytes(session, student)
    return {
        "task": config.task,
        "clients": len(splits.private),
        "rounds": config.rounds,
        "proxy_texts": len(splits.proxy),
        "rows": session.query.positions,
        "classes": session.query.vocab_size,
        "bytes": sent,
        "flops": {**flops, "total": sum(flops.values())},
        "seconds": {name: round(s, 3) for name, s in {**seconds, "total": sum(seconds.values())}.items()},
        "memory_bytes": {
            "training": peak_memory_bytes(),
            "aggregation": 3
            * FLOAT
            * min(CHUNK, len(splits.private) * session.query.positions * _columns(session)),
        },
        "disk_bytes": _disk(session, learners, student, sent["codecs"][_chosen(config)]["upload"]),
    }


def _tried(job: Job) -> tuple[int, int]:
    """Key of jobs that share one timing: the same model with the same batch size (0 for inference)."""
    return id(job.learner), 0 if job.settings is None else _batch(job.settings)


def _frozen_speed(session: Session, learner: Learner) -> float:
    """Seconds per token to compute the states of frozen layers; 0 if they are not cached."""
    some = learner.tokens(session.splits.proxy)[: session.config.clients.eval_batch_size]
    if learner.query_only or not learner.frozen_passes(some):
        return 0.0
    learner.compute_frozen(some[:1])
    start = time.perf_counter()
    learner.compute_frozen(some)
    return (time.perf_counter() - start) / sum(map(len, some))


def _batch(settings: TrainingConfig) -> int:
    return settings.batch_size * settings.gradient_accumulation


def _speed(session: Session, job: Job) -> float:
    """Seconds per training step or, for inference, per token."""
    learner, texts = job.learner, session.splits.proxy
    tokens = learner.tokens(texts)
    if job.settings is None:
        some = texts.select(range(min(session.config.clients.eval_batch_size, len(texts))), "trial")
        known = replace(some, labels=some.labels.clip(0))
        learner.metrics(known)
        start = time.perf_counter()
        learner.metrics(known)
        return (time.perf_counter() - start) / padded_tokens(learner.tokens(some), session.config)
    lessons: Any = learner.examples(texts)
    if isinstance(lessons, TrainingExamples):  # few proxy labels are known; timing does not depend on them
        lessons = TrainingExamples(tokens, labels_of(texts).clamp_min(0))
    ends: list[float] = []
    steps = 2 + TRIAL_STEPS  # the first one does work that is done once, and has no beginning here
    learner.fit(
        lessons,
        job.settings,
        seed=0,
        steps=steps,
        on_step=lambda done, total: ends.append(time.perf_counter()),
    )
    learner.reset()
    return median(end - start for start, end in pairwise(ends[1:]))


def _bytes(session: Session, student: Learner) -> Json:
    """Upload and download sizes for each codec, and for the baselines that send weights."""
    config, splits = session.config, session.splits
    clients, rows, classes = len(splits.private), session.query.positions, session.query.vocab_size
    codecs = {}
    for name, settings in _codecs(config, classes).items():
        spec = _spec(session, settings)
        upload = sum(_upload(spec, shard) for shard in range(payload.shards(spec)))
        codecs[name] = {
            "upload": upload,
            "a_row": round(upload / rows, 2),
            "all_rounds_and_clients": upload
            * min(config.clients.per_round or clients, clients)
            * config.rounds,
        }
    weights = FLOAT * models.trained_count(student.model)
    adapter = FLOAT * lora_count(session, student.model)
    chosen = codecs[_chosen(config)]
    return {
        "chosen": _chosen(config),
        "codecs": codecs,
        "proxy_download": proxy_bytes(splits),
        "fedavg": {"upload": weights, "times_ours": round(weights / chosen["upload"], 1)},
        "federated_lora": {
            "upload": adapter,
            "times_ours": round(adapter / chosen["upload"], 1),
            "rank": config.fedlora.rank,
        },
        "break_even_rows": {
            "fedavg": int(weights / chosen["a_row"]),
            "federated_lora": int(adapter / chosen["a_row"]),
        },
    }


def _upload(spec: RoundSpec, shard: int) -> int:
    """Bytes of a shard and its envelope."""
    start, stop = payload.rows_of(spec, shard)
    client = spec.clients[0]
    content = payload.encode(_empty(spec, stop - start), spec, client, shard)
    return len(content) + len(payload.seal(content, spec, client, shard))


def _empty(spec: RoundSpec, rows: int) -> payload.Answers:
    """Answers of the uncompressed size that every answer to ``spec`` has."""
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
    """Name of the configured codec in the table."""
    settings = config.payload
    size = {"dense": "", "sampled": f" draws={settings.samples}"}.get(settings.codec, f" k={settings.k}")
    return f"{settings.codec}{size}{', zstd: at most' if settings.compression == 'zstd' else ''}"


def _codecs(config: Config, classes: int) -> dict[str, PayloadConfig]:
    """The configured codec and, for comparison, other codecs at their usual settings."""
    usual = [PayloadConfig(codec="topk", k=k) for k in (16, 64) if k <= classes]
    if classes <= DENSE_CLASSES:
        usual.insert(0, PayloadConfig())
    found = {_chosen(config): config.payload}
    for settings in usual:
        found.setdefault(_chosen(config.model_copy(update={"payload": settings})), settings)
    return found


def _spec(session: Session, settings: PayloadConfig) -> RoundSpec:
    """The request of a run without compression: an upper bound, as compression depends on the answers."""
    plain = settings.model_copy(update={"compression": "none"})
    config = session.config.model_copy(update={"payload": plain})
    quorum = config.aggregation.quorum or len(session.splits.private)
    return request(replace(session, config=config), 1, quorum=quorum, previous="")


def _disk(session: Session, learners: list[Learner], student: Learner, upload: int) -> Json:
    """Upper bound of the size of the run's directory."""
    config, splits = session.config, session.splits
    clients, rows = len(splits.private), session.query.positions
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
    """Number of values in a row of the teacher."""
    return 2 * session.config.payload.k + 1 if session.query.compressed else session.query.vocab_size


def _size(learner: Learner) -> int:
    """Bytes of a checkpoint."""
    return sum(x.numel() * x.element_size() for x in learner.model.state_dict().values())
