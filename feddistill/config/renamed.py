"""Settings that had another name before 0.1.0: refused in a user's file, accepted in a run's own file.

A run keeps the names that it was started with, because its digest, and so its id, depends on them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from feddistill.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Renamed:
    """A setting, or values of one, under its old and its new name."""

    old: str
    new: str
    values: Mapping[str, Any] | None = None
    """Old values to new ones; ``None`` if they are the same."""


RENAMED = (
    Renamed("task", "task", {"reading": "question_answering"}),
    Renamed("data.partition.kind", "data.partition.kind", {"at_clients": "remote"}),
    Renamed("data.partition", "data.partition", {"at_clients": "remote"}),
    Renamed("data.absent", "data.exclude_clients"),
    Renamed("clients.answer_batch_size", "clients.eval_batch_size"),
    Renamed("payload.draws", "payload.samples"),
    Renamed("aggregation.mix", "aggregation.nnm_byzantine"),
    Renamed("distill.replay", "distill.teacher_history"),
    Renamed("distill.accept", "distill.rollback", {"improve": True, "always": False}),
    Renamed("language.positions", "language.completion_only", {"every": False, "answer": True}),
    Renamed("language.step", "language.position_stride"),
    Renamed("language.masked", "language.mask_probability"),
    Renamed("reading.unanswerable", "question_answering.allow_no_answer"),
    Renamed("reading.answer_tokens", "question_answering.max_answer_tokens"),
    Renamed("reading", "question_answering"),
)
"""Single settings come before the groups that they were in."""


def refuse(raw: Mapping[str, Any]) -> None:
    """Refuse old names in a user's settings.

    Raises:
        ConfigError: A setting has its old name; the message has the new one.
    """
    for entry in RENAMED:
        is_set, value = _at(raw, entry.old)
        if not is_set:
            continue
        if entry.values is None:
            raise ConfigError(f"{entry.old} is now called {entry.new}")
        if isinstance(value, str) and value in entry.values:
            new = entry.values[value]
            new = str(new).lower() if isinstance(new, bool) else new
            raise ConfigError(f"{entry.old} = {value} is now {entry.new} = {new}")
        if entry.old != entry.new:
            raise ConfigError(f"{entry.old} is now called {entry.new}")


def has_old_names(raw: Mapping[str, Any]) -> bool:
    """True if any setting has its old name."""
    try:
        refuse(raw)
    except ConfigError:
        return True
    return False


def with_new_names(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Translate the settings of a run that was started under old names to the new ones.

    >>> with_new_names({"distill": {"accept": "always", "replay": 2}})
    {'distill': {'teacher_history': 2, 'rollback': False}}
    """
    return _renamed(raw, [(entry.old, entry.new, entry.values) for entry in RENAMED])


def with_old_names(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of ``with_new_names``.

    >>> with_old_names({"distill": {"rollback": False, "teacher_history": 2}})
    {'distill': {'replay': 2, 'accept': 'always'}}
    """
    inverse: list[tuple[str, str, Mapping[Any, Any] | None]] = []
    for entry in RENAMED:
        values = None if entry.values is None else {new: old for old, new in entry.values.items()}
        inverse.append((entry.new, entry.old, values))
    return _renamed(raw, inverse)


def _renamed(
    raw: Mapping[str, Any], pairs: list[tuple[str, str, Mapping[Any, Any] | None]]
) -> dict[str, Any]:
    made = _copy(raw)
    for source, target, values in pairs:
        is_set, value = _at(made, source)
        if not is_set:
            continue
        if values is not None and isinstance(value, str | bool):
            value = values.get(value, value)
        if source == target:
            _set(made, target, value)
        elif not isinstance(value, Mapping) or values is not None:
            _remove(made, source)
            _set(made, target, value)
        else:  # a group: its settings that keep their names
            _remove(made, source)
            for name, inner in value.items():
                _set(made, f"{target}.{name}", inner)
    return made


def _copy(value: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(inner) if isinstance(inner, Mapping) else inner for key, inner in value.items()}


def _at(raw: Mapping[str, Any], path: str) -> tuple[bool, Any]:
    place: Any = raw
    for name in path.split("."):
        if not isinstance(place, Mapping) or name not in place:
            return False, None
        place = place[name]
    return True, place


def _set(raw: dict[str, Any], path: str, value: Any) -> None:
    *groups, last = path.split(".")
    for name in groups:
        raw = raw.setdefault(name, {})
    raw[last] = value


def _remove(raw: dict[str, Any], path: str) -> None:
    *groups, last = path.split(".")
    for name in groups:
        raw = raw[name]
    del raw[last]
