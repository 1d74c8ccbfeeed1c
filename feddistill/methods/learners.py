"""Which learner a task has, and the student's architecture taught as the student is."""

from collections.abc import Callable

from torch import nn

from feddistill import training
from feddistill.config.models import ModelConfig
from feddistill.methods.black_box import ClosedCausal, ClosedClassifier
from feddistill.methods.causal import CausalLearner
from feddistill.methods.learner import Learner, Session, best_of, later
from feddistill.methods.masked import MaskedLearner
from feddistill.methods.reading import ReadingLearner
from feddistill.store import Json
from feddistill.types import TextSet

LEARNERS: dict[str, type[Learner]] = {
    "classification": Learner,
    "causal_lm": CausalLearner,
    "masked_lm": MaskedLearner,
    "reading": ReadingLearner,
}
"""By task."""

CLOSED: dict[str, type[Learner]] = {"classification": ClosedClassifier, "causal_lm": ClosedCausal}
"""By task, of models that are only asked."""


def learner_of(
    session: Session, config: ModelConfig, name: str, *, adapt: Callable[[nn.Module], None] | None = None
) -> Learner:
    """The learner of the session's task."""
    kinds = CLOSED if config.black_box else LEARNERS
    return kinds[session.config.task](session, config, name, adapt=adapt)


def student_rounds(session: Session, name: str, texts: TextSet) -> list[Json]:
    """Train the student's architecture on labelled ``texts`` exactly as the student is trained.

    As many segments as there are rounds, as many steps in each, the same schedule and selection: what
    differs from the student is only what it learns from.
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
        start = records[-1] if config.distill.accept == "always" and records else best
        record = learner.step(
            f"baselines/{name}/{number:03d}",
            f"{name}: segment {number} of {config.rounds}",
            start["weights"] if start else None,
            lambda: learner.lessons(texts),
            settings,
            steps=steps,
        )
        records.append(record)
        best = best_of(session, best, record)
    return records
