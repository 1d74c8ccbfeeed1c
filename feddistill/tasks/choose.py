"""Which learner a task has, and the student's architecture taught as the student is."""

from collections.abc import Callable

from torch import nn

from feddistill.config.models import ModelConfig
from feddistill.tasks.black_box import QueryOnlyClassifier, QueryOnlyLanguageModel
from feddistill.tasks.language_model import CausalLanguageModel
from feddistill.tasks.learner import Learner
from feddistill.tasks.masked_language_model import MaskedLanguageModel
from feddistill.tasks.question_answering import QuestionAnswering
from feddistill.tasks.session import Session

LEARNERS: dict[str, type[Learner]] = {
    "classification": Learner,
    "causal_lm": CausalLanguageModel,
    "masked_lm": MaskedLanguageModel,
    "question_answering": QuestionAnswering,
}
"""By task."""

QUERY_ONLY: dict[str, type[Learner]] = {
    "classification": QueryOnlyClassifier,
    "causal_lm": QueryOnlyLanguageModel,
}
"""By task, of models that are only asked."""


def learner_of(
    session: Session, config: ModelConfig, name: str, *, adapt: Callable[[nn.Module], None] | None = None
) -> Learner:
    """The learner of the session's task."""
    kinds = QUERY_ONLY if config.black_box else LEARNERS
    return kinds[session.config.task](session, config, name, adapt=adapt)
