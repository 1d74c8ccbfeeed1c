"""Steps that runs of a study have in common: the first run does them, the others take them over.

Runs that differ only in what the server does with answers have the same specialists in their first round;
runs that differ only in the clients have the same model of the server alone. A step is taken over with the
costs that it had where it was done, so that no figure depends on who came first.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from feddistill.config import Config
from feddistill.config.methods import METHODS
from feddistill.errors import RunError
from feddistill.models.frozen import States
from feddistill.store import layout
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
"""By the beginning of a step's name, the settings that it does not depend on: all others must be equal."""


_MODELS = 4
"""Whose frozen layers' states one process keeps."""

_FROZEN: dict[str, States] = {}


class StepCache:
    """A folder of steps, under a digest of what they depend on; and what frozen layers made of texts."""

    def __init__(self, root: Path, config: Config):
        self._root = root
        while len(_FROZEN) > _MODELS:
            del _FROZEN[next(iter(_FROZEN))]
        self.frozen = _FROZEN
        """Of all runs of this process."""
        self._keys = {
            beginning: key(config, settings)
            for beginning, settings in INDEPENDENT.items()
            if config.task == "classification"
        }

    def take(self, run: RunDirectory, step: str) -> Json | None:
        """What ``step`` found in another run, taken over into ``run``; ``None`` where none has done it."""
        place = self._place(step)
        if place is None or not place.is_dir():
            return None
        try:
            there = RunDirectory.open(place)
        except RunError:  # somebody is putting something in
            return None
        try:
            if there.done(step) is None:
                return None
            run.adopt(there, step)
        finally:
            there.close()
        return run.done(step)

    def give(self, run: RunDirectory, step: str) -> None:
        """Keep ``step`` of ``run`` for others, if it is one that they may have in common."""
        place = self._place(step)
        if place is None:
            return
        try:
            begun = place.is_dir()
            there = RunDirectory.open(place) if begun else RunDirectory.create(place, f"# {step}\n")
        except RunError:  # somebody else is putting something in: what is missing is done again
            return
        try:
            there.adopt(run, step)
        finally:
            there.close()

    def _place(self, step: str) -> Path | None:
        for beginning, name in self._keys.items():
            if step.startswith(beginning):
                return self._root / name
        return None


def key(config: Config, independent: tuple[str, ...]) -> str:
    """A digest of all settings but those ``independent`` ones, given by dotted names."""
    settings = config.model_dump(mode="json")
    for name in independent:
        *path, last = name.split(".")
        group: Any = settings
        for part in path:
            group = group[part]
        del group[last]  # a name that is none is a mistake
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
