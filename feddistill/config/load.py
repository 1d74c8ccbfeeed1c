"""Read a configuration: YAML and ``--set`` overrides to a checked ``Config``, and back."""

import hashlib
import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from feddistill.config import strict_yaml
from feddistill.config.data import FileSource
from feddistill.config.renamed import has_old_names, refuse, with_new_names, with_old_names
from feddistill.config.settings import QUICKSTART, Config
from feddistill.config.tasks import TASKS
from feddistill.errors import ConfigError
from feddistill.store.layout import RECIPE


def load(path: Path | None = None, overrides: tuple[str, ...] = ()) -> Config:
    """Read ``path`` (``None``: the quickstart), apply ``a.b=value`` overrides, and check the result.

    Raises:
        ConfigError: The file is not YAML, or a setting is unknown, missing or out of range. The message
            names it as the user wrote it.
    """
    raw = _read(path or QUICKSTART)
    for text in overrides:
        override(raw, text)
    return parse(raw)


def load_stored(path: Path, overrides: tuple[str, ...] = ()) -> Config:
    """Read the ``config.yaml`` of a run, which may have the old names of settings.

    Without ``overrides`` the configuration keeps these names, and lacks settings that did not exist when the
    run was started: ``as_stored``, ``dump`` and ``digest`` give what they gave then.

    Raises:
        ConfigError: As ``load``; or the file was edited after the run was started.
    """
    raw = _read(path)
    _check_unedited(raw, path)
    old = has_old_names(raw)
    raw = with_new_names(raw) if old else raw
    given = dict(raw)
    _as_run(raw)
    for text in overrides:
        override(raw, text)
    config = parse(raw)
    if not overrides:
        config._old_names, config._stored = old, given
    return config


def _check_unedited(raw: dict[str, Any], path: Path) -> None:
    """Compare with the settings that a run of today stores beside its ``config.yaml``."""
    beside = path.with_name(RECIPE)
    try:
        stored = json.loads(beside.read_bytes()) if beside.is_file() else {}
        started = stored.get("settings")
    except (ValueError, AttributeError):
        raise ConfigError(f"{beside} is damaged") from None
    if started is not None and started != raw:
        key = _first_difference(raw, started) or "a setting was added"
        raise ConfigError(f"{path} was edited after the run was started: {key}; undo it, or start a new run")


def parse_stored(raw: Mapping[str, Any]) -> Config:
    """Check settings of a run that another process sends; they may have the old names."""
    old = has_old_names(raw)
    new = with_new_names(raw) if old else dict(raw)
    given = dict(new)
    _as_run(new)
    config = parse(new)
    config._old_names, config._stored = old, given
    return config


def _as_run(stored: dict[str, Any]) -> None:
    """Add what a run did before there was a setting for it, if that is not the setting's default."""
    task = TASKS.get(str(stored.get("task")))
    if task is not None and task.labels == "tokens":
        stored.update(language={"text_start": "eos", **stored.get("language", {})})


def as_stored(config: Config) -> dict[str, Any]:
    """All settings as JSON values, those and under the names that their run was started with."""
    settings: dict[str, Any] = _known(config.model_dump(mode="json"), config._stored)
    return with_old_names(settings) if config._old_names else settings


def _known(settings: Any, stored: Any) -> Any:
    """``settings`` without those that ``stored``, which was written whole, does not have."""
    if isinstance(settings, dict) and isinstance(stored, dict):
        return {key: _known(value, stored[key]) for key, value in settings.items() if key in stored}
    if isinstance(settings, list) and isinstance(stored, list) and len(settings) == len(stored):
        return [_known(*pair) for pair in zip(settings, stored, strict=True)]
    return settings


def stored_task(config: Config) -> str:
    """The name of the task that the run was started with."""
    return str(as_stored(config)["task"])


def _read(source: Path) -> dict[str, Any]:
    raw = strict_yaml.read(source)
    raw = untied({} if raw is None else raw)
    if not isinstance(raw, dict):
        raise ConfigError(f"{source} must be a mapping of settings, got {type(raw).__name__}")
    return raw


def untied(raw: Any) -> Any:
    """A copy in which groups that YAML aliases share are separate: an override of one leaves the others."""
    if isinstance(raw, dict):
        return {key: untied(value) for key, value in raw.items()}
    return [untied(value) for value in raw] if isinstance(raw, list) else raw


def parse(raw: dict[str, Any]) -> Config:
    """Check a mapping of settings.

    Raises:
        ConfigError: As ``load``; a setting has the name that it had before 0.1.0.
    """
    refuse(raw)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(one_line(error, raw)) from None


def texts(path: Path, columns: dict[str, str | None], name: str) -> FileSource:
    """A source of local files with the given columns; ``name`` is its name in errors."""
    try:
        return FileSource.model_validate({"path": path, **columns})
    except ValidationError as error:
        raise ConfigError(f"{name}: {one_line(error, columns)}") from None


def dump(config: Config) -> str:
    """The configuration as YAML, with every default filled in; ``load`` reads it back unchanged."""
    text: str = yaml.safe_dump(as_stored(config), sort_keys=False, allow_unicode=True)
    return text


def digest(config: Config) -> str:
    """A hash of all settings."""
    canonical = json.dumps(as_stored(config), sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


def differs(given: Config, stored: Config) -> str | None:
    """The first setting that differs, but for those that ``given`` leaves to the machine, or ``None``."""
    resolved = {"threads": stored.threads, "precision": stored.precision}
    open_ = {key: value for key, value in resolved.items() if getattr(given, key) in (None, "auto")}
    ours, theirs = given.model_copy(update=open_).model_dump(mode="json"), stored.model_dump(mode="json")
    return None if ours == theirs else _first_difference(ours, theirs)


def _first_difference(a: object, b: object, path: str = "") -> str:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            if a.get(key) != b.get(key):
                return _first_difference(a.get(key), b.get(key), f"{path}.{key}" if path else str(key))
    return path


def override(raw: dict[str, Any], text: str) -> None:
    """Set ``a.b.0.c=value`` in nested mappings and lists; missing groups are created."""
    dotted, equals, value_text = text.partition("=")
    if not equals or not dotted:
        raise ConfigError(f"--set takes KEY=VALUE, got {text!r}")
    value = strict_yaml.parse(value_text, f"--set {dotted}: the value")
    place: Any = raw
    *groups, last = dotted.split(".")
    for depth, key in enumerate(groups):
        prefix = ".".join(groups[: depth + 1])
        if isinstance(place, list):
            place = place[_index(place, key, prefix)]
        else:
            if isinstance(place.get(key), str):  # rule: median, of which a setting is overridden
                place[key] = {"kind": place[key]}
            place = place.setdefault(key, {})
        if not isinstance(place, dict | list):
            raise ConfigError(f"--set {dotted}: {prefix} is {place!r}, not a group of settings")
    if isinstance(place, list):
        place[_index(place, last, dotted)] = value
    else:
        place[last] = value


def _index(place: list[Any], key: str, name: str) -> int:
    if not key.isdigit() or int(key) >= len(place):
        raise ConfigError(f"--set {name}: needs an index from 0 to {len(place) - 1}, got {key!r}")
    return int(key)


def one_line(error: ValidationError, raw: Any) -> str:
    """The first error as one line, with the setting's name as the user wrote it."""
    first, *more = error.errors()
    path = _as_written(first["loc"], raw)
    match first["type"]:
        case "unknown_setting":
            context = first["ctx"]
            dotted = ".".join([*path, context["key"]])
            if context["near"]:
                text = f"{dotted} is not a setting; did you mean {'.'.join([*path, context['near']])}?"
            else:
                text = f"{dotted} is not a setting; {'.'.join(path) or 'there'} has: {context['known']}"
        case "unknown_name":
            text = f"{'.'.join(path)} = {first['input']!r} does not exist; {first['ctx']['hint']}"
        case "value_error":  # ours, which names the setting
            text = str(first["ctx"]["error"])
        case "union_tag_invalid":
            context = first["ctx"]
            known = [tag.strip("' ") for tag in context["expected_tags"].split(",")]
            near = get_close_matches(str(context["tag"]), known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"
            text = f"{'.'.join([*path, 'kind'])} = {context['tag']!r} does not exist; {hint}"
        case "union_tag_not_found":
            text = f"{'.'.join(path)} has no kind; name it as well, as in {'.'.join([*path, 'kind'])}=…"
        case "missing":
            text = f"{'.'.join(path)} is missing"
        case _:
            reason = first["msg"][0].lower() + first["msg"][1:]
            text = f"{'.'.join(path)}: {reason}, got {first['input']!r}"
    return text + (f" (and {len(more)} more)" if more else "")


def _as_written(loc: tuple[int | str, ...], raw: Any) -> list[str]:
    """``loc`` without the union tags that pydantic adds."""
    path: list[str] = []
    place = raw
    for position, key in enumerate(loc):
        inside = (isinstance(place, dict) and key in place) or (
            isinstance(place, list) and isinstance(key, int) and key < len(place)
        )
        if inside:
            place = place[key]
            path.append(str(key))
        elif position == len(loc) - 1 and not _is_tag(place, key):
            path.append(str(key))
    return path


def _is_tag(place: Any, key: int | str) -> bool:
    return isinstance(place, dict) and place.get("kind") == key
