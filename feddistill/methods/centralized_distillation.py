"""Baseline: a client's architecture trained on the pooled private texts, then distilled into the student.

An upper bound of federated distillation: distillation without the restriction that texts stay private.
"""

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial

from safetensors.torch import load_file, save

from feddistill import training
from feddistill.accounting import measure
from feddistill.methods.centralized import pool
from feddistill.methods.job import Job, evaluation
from feddistill.store import layout
from feddistill.store.records import CostRecord, StepRecord
from feddistill.store.run_directory import Json
from feddistill.tasks.choose import learner_of
from feddistill.tasks.learner import Learner, best_of, examples_of, labels_of, later
from feddistill.tasks.session import Session
from feddistill.training import TrainingExamples


def run(session: Session) -> Json:
    """Train teacher and student in as many segments as there are rounds.

    In each segment the teacher takes as many steps as all clients together, on the pool of their texts; the
    student takes as many as in the federation.
    """
    config, proxy = session.config, session.splits.proxy
    teacher = learner_of(session, config.clients.models[0], "clients.models.0")
    student = learner_of(session, config.student.model, "student.model")
    texts = pool(session.splits.private)
    records: list[Json] = []
    best: Json | None = None
    taught: str | None = None
    for number in range(1, config.rounds + 1):
        layout.baseline("centralized_distillation", number)
        settings, ours = config.clients.training, config.student.training
        if number > 1:
            settings = later(settings, None, config.clients.codistillation.head_learning_rate)
            ours = later(ours, None, config.student.later_head_learning_rate)
        teaching = teacher.step(
            layout.baseline("centralized_distillation", number, "teacher"),
            f"centralized_distillation: segment {number}: the teacher learns",
            taught,
            partial(examples_of, teacher, texts),
            settings,
            steps=sum(training.steps_of(settings, len(private)) for private in session.splits.private),
            evaluate=False,
        )
        taught = StepRecord.from_json(teaching).file
        answering = _answers(session, teacher, number, taught)

        def lessons(file: str = answering["answers"]) -> TrainingExamples:
            answers = load_file(session.run.path(file))["log_probs"]
            return TrainingExamples(student.tokens(proxy), labels_of(proxy), answers)

        start = records[-1] if not config.distill.rollback and records else best
        record = student.step(
            layout.baseline("centralized_distillation", number, "student"),
            f"centralized_distillation: segment {number}: the student learns",
            StepRecord.from_json(start).file if start else None,
            lessons,
            ours,
            distill=config.distill,
        )
        spent = {
            **StepRecord.from_json(record).costs,
            "teach": StepRecord.from_json(teaching).training,
            "answer": CostRecord.from_json(answering).cost,
        }
        costs = {what: asdict(cost) for what, cost in spent.items()}
        records.append({**record, "costs": costs})
        best = best_of(session, best, record)
    return {"rounds": records}


def _answers(session: Session, teacher: Learner, number: int, weights: str) -> Json:
    """Store the teacher's log-probabilities on the proxy texts; the record has the file and the cost."""
    run, step = session.run, layout.baseline("centralized_distillation", number, "answers")
    if (record := run.done(step)) is None:
        teacher.restore(weights)
        before = teacher.meter.flops
        label = f"centralized_distillation: segment {number}: the teacher answers"
        with session.progress.step(label) as on_step, measure() as cost:
            log_probs = teacher.answer(session.splits.proxy, on_step)
            cost.flops = teacher.meter.flops - before
        file = layout.tensors(step)
        run.write_bytes(file, save({"log_probs": log_probs}))
        record = run.commit(step, {"answers": file, "cost": asdict(cost.cost)}, [file])
    return record


def plan(session: Session, learners: list[Learner], student: Learner) -> Iterator[Job]:
    """Jobs of ``run``, for the cost estimate."""
    config, rounds, phase = session.config, session.config.rounds, "baseline_centralized_distillation"
    teacher, settings, learns = learners[0], config.clients.training, config.student.training
    texts = teacher.tokens(pool(session.splits.private))
    steps = sum(training.steps_of(settings, len(private)) for private in session.splits.private)
    yield Job(phase, teacher, texts, settings, steps, rounds)
    proxy = student.tokens(session.splits.proxy)
    yield Job(phase, student, proxy, learns, training.steps_of(learns, len(proxy)), rounds)
    yield Job(phase, teacher, teacher.tokens(session.splits.proxy), times=rounds)
    yield from evaluation(session, student, rounds)
