"""lm-evaluation-harness's tasks for a causal student (extra ``eval``; imported when it is asked for)."""

from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from feddistill.config.tasks import TASKS
from feddistill.errors import ConfigError, DataError
from feddistill.runs.trained_models import Student
from feddistill.store.run_directory import Json


def evaluate(
    student: Student, tasks: Sequence[str], *, limit: int | None = None, folder: Path | None = None
) -> Json:
    """The figures that ``lm_eval.simple_evaluate`` gives.

    Args:
        student: A causal language model.
        tasks: Names that the harness knows: tasks, groups or tags.
        limit: Only the first examples of each task.
        folder: Tasks of your own: YAML files in the harness's form.

    Returns:
        ``results`` by task, and the ``versions`` of harness and tasks.

    Raises:
        ConfigError: The harness is not installed, does not know a task, or the model is of another kind.
        DataError: A task's data cannot be had.
    """
    if not TASKS[student.task].generates:
        raise ConfigError(
            "--tasks: lm-evaluation-harness measures causal language models; "
            f"{student.name} is one of {student.task}"
        )
    try:
        from lm_eval import __version__, simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ConfigError(
            f"--tasks needs lm-evaluation-harness ({error}): pip install 'feddistill[eval]'"
        ) from None
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--task-folder {folder}: no such folder")
    manager = TaskManager(include_path=None if folder is None else str(folder))
    for name in tasks:
        if name not in manager.all_tasks:
            near = get_close_matches(name, manager.all_tasks, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"--tasks: lm-evaluation-harness has no task {name!r}{hint}")
    model = HFLM(
        pretrained=student.model,
        tokenizer=student.tokenizer,
        max_length=student.max_tokens,
        batch_size=student.batch_size,
        mixed_precision_dtype="bfloat16" if student.bf16 else None,
    )
    try:
        found = simple_evaluate(
            model=model, tasks=list(tasks), limit=limit, task_manager=manager, log_samples=False
        )
    except (OSError, ValueError) as error:  # no network, no such data set
        raise DataError(f"--tasks {','.join(tasks)}: {' '.join(str(error).split())}") from None
    return {
        "model": student.name,
        "limit": limit,
        "results": found["results"],
        "versions": {"lm_eval": __version__, **found["versions"]},
    }
