"""Which learner a task has, and the student's architecture taught as the student is."""

from collections.abc import Callable

from torch import nn

from feddistill.config.models import ModelConfig
from feddistill.tasks.black_box import ClosedCausal, ClosedClassifier
from feddistill.tasks.language_model import CausalLearner
from feddistill.tasks.learner import Learner
from feddistill.tasks.masked_language_model import MaskedLearner
from feddistill.tasks.question_answering import ReadingLearner
from feddistill.tasks.session import Session

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
