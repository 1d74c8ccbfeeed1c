"""lm-evaluation-harness's tasks for a causal student (extra ``eval``; imported on use)."""

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
    """Evaluate with ``lm_eval.simple_evaluate``.

    Args:
        student: A causal language model.
        tasks: Names of tasks, groups or tags of the harness.
        limit: Only the first examples of each task.
        folder: Folder with YAML files of custom tasks, in the harness's format.

    Returns:
        ``results`` by task, and the ``versions`` of harness and tasks.

    Raises:
        ConfigError: The harness is not installed, a task is unknown, or the model is not a causal one.
        DataError: A task's data cannot be loaded.
    """
    if not TASKS[student.task].generates:
        raise ConfigError(
            "--tasks: lm-evaluation-harness needs a causal language model; "
            f"{student.name} is a model for {student.task}"
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
    bounds = student.bounds
    model = HFLM(
        pretrained=student.model,
        tokenizer=student.tokenizer,
        max_length=student.max_tokens,
        batch_size=student.batch_size,
        mixed_precision_dtype="bfloat16" if student.bf16 else None,
        prefix_token_id=bounds.end if bounds.start is None else bounds.start,
        add_bos_token=bounds.begins_blocks,
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
