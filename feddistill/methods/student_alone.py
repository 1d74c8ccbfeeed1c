"""Training of the student's architecture on other texts, with the student's settings."""

from collections.abc import Iterator

from feddistill import training
from feddistill.methods.job import Job, evaluation
from feddistill.store import layout
from feddistill.store.records import StepRecord
from feddistill.store.run_directory import Json
from feddistill.tasks.choose import learner_of
from feddistill.tasks.learner import Learner, best_of, later
from feddistill.tasks.session import Session
from feddistill.types import TextSet


def student_rounds(session: Session, name: str, texts: TextSet) -> list[Json]:
    """Train the student's architecture on labelled ``texts`` with the student's settings.

    Number of segments, steps per segment, schedule and selection equal those of the student; only the
    training examples differ.
    """
    config = session.config
    learner = learner_of(session, config.student.model, "student.model")
    steps = training.steps_of(config.student.training, learner.proxy_examples())
    records: list[Json] = []
    best: Json | None = None
    for number in range(1, config.rounds + 1):
        settings = config.student.training
        if number > 1:
            settings = later(settings, None, config.student.later_head_learning_rate)
        start = records[-1] if not config.distill.rollback and records else best
        record = learner.step(
            layout.baseline(name, number),
            f"{name}: segment {number} of {config.rounds}",
            StepRecord.from_json(start).file if start else None,
            lambda: learner.examples(texts),
            settings,
            steps=steps,
        )
        records.append(record)
        best = best_of(session, best, record)
    return records


def student_jobs(session: Session, name: str, student: Learner, texts: TextSet) -> Iterator[Job]:
    """Jobs of ``student_rounds``."""
    config = session.config
    settings = config.student.training
    steps = training.steps_of(settings, len(student.tokens(session.splits.proxy)))
    yield Job(f"baseline_{name}", student, student.tokens(texts), settings, steps, config.rounds)
    yield from evaluation(session, student, config.rounds)
