"""Cache of training steps shared by the runs of a study: computed once, then reused.

Runs that differ only in what the server does with predictions have the same specialists in the first round;
runs that differ only in the clients have the same public-only baseline. A reused step keeps its original
costs, so that no result depends on which run came first.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from feddistill.config import Config
from feddistill.config.methods import METHODS
from feddistill.config.tasks import TASKS
from feddistill.errors import RunError
from feddistill.models.frozen import States
from feddistill.store import layout, recipe
from feddistill.store.run_directory import Json, RunDirectory

_NO_TRAINING = ("name", "baselines", "payload", "aggregation", "language", "keep_checkpoints")
_BASELINES = tuple(name for name, method in METHODS.items() if method.settings is not None)
_LOSS = tuple(f"distill.{name}" for name in ("kind", "temperature", "kd_weight", "beta", "teacher_history"))

INDEPENDENT = {
    f"{layout.specialists(1)}/": (
        *_NO_TRAINING,
        *_BASELINES,
        "rounds",
        "student",
        "distill",
        "simulate.attack",
        "clients.codistillation",
        "clients.per_round",
    ),
    f"{layout.baseline('public_only')}/": (
        *_NO_TRAINING,
        *_BASELINES,
        *_LOSS,
        "clients",
        "simulate",
        "data.partition",
        "data.exclude_clients",
        "data.histogram_epsilon",
    ),
}
"""Settings that a step does not depend on, by the start of its name; all others must be equal."""


_MODELS = 4
"""Models whose frozen activations one process caches."""

_FROZEN: dict[str, States] = {}


class StepCache:
    """A folder of steps, by a digest of their settings, and cached hidden states of frozen layers."""

    def __init__(self, root: Path, config: Config):
        self._root = root
        while len(_FROZEN) > _MODELS:
            del _FROZEN[next(iter(_FROZEN))]
        self.frozen = _FROZEN
        """Shared by all runs of this process."""
        self._keys = {
            beginning: key(config, settings)
            for beginning, settings in INDEPENDENT.items()
            if TASKS[config.task].shares_steps
        }

    def take(self, run: RunDirectory, step: str) -> Json | None:
        """Copy ``step`` of another run into ``run`` and return its record; ``None`` if it is not cached."""
        folder = self._folder(step)
        if folder is None or not folder.is_dir():
            return None
        try:
            cached = RunDirectory.open(folder)
        except RunError:  # another process is writing
            return None
        try:
            if cached.done(step) is None:
                return None
            run.adopt(cached, step)
        finally:
            cached.close()
        return run.done(step)

    def give(self, run: RunDirectory, step: str) -> None:
        """Add ``step`` of ``run`` to the cache, if other runs may share it."""
        folder = self._folder(step)
        if folder is None:
            return
        try:
            begun = folder.is_dir()
            cached = RunDirectory.open(folder) if begun else RunDirectory.create(folder, f"# {step}\n")
        except RunError:  # another process is writing: others compute the step again
            return
        try:
            cached.adopt(run, step)
        finally:
            cached.close()

    def _folder(self, step: str) -> Path | None:
        for beginning, name in self._keys.items():
            if step.startswith(beginning):
                return self._root / name
        return None


def key(config: Config, independent: tuple[str, ...]) -> str:
    """A digest of all settings except the ``independent`` ones, which are dotted names."""
    settings = {**config.model_dump(mode="json"), "(recipe)": recipe.NUMBER}
    for name in independent:
        *path, last = name.split(".")
        group: Any = settings
        for part in path:
            group = group[part]
        del group[last]  # KeyError for an unknown name
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
