"""The learner of a task, found by the table of tasks."""

from collections.abc import Callable

from torch import nn

from feddistill.config.models import ModelConfig
from feddistill.config.tasks import TASKS, imported
from feddistill.tasks.learner import Learner
from feddistill.tasks.session import Session


def learner_class(task: str, *, query_only: bool = False) -> type[Learner]:
    """The class of a task's learner, or of its query-only learner; its module is imported now."""
    entry = TASKS[task]
    name = entry.query_only if query_only else entry.learner
    assert name is not None, "the configuration allows a query-only model"
    learner: type[Learner] = imported(name)
    return learner


def learner_of(
    session: Session, config: ModelConfig, name: str, *, adapt: Callable[[nn.Module], None] | None = None
) -> Learner:
    """A learner of the session's task; see ``Learner`` for the arguments.

    Without ``adapt`` it is built once in a session. Every training starts from weights that it loads or
    resets, so methods that use it one after the other do not affect each other.
    """
    kind = learner_class(session.config.task, query_only=config.query_only)
    if adapt is not None:
        return kind(session, config, name, adapt=adapt)
    key = name, config.model_dump_json()
    if key not in session.learners:
        session.learners[key] = kind(session, config, name)
    learner: Learner = session.learners[key]
    return learner
