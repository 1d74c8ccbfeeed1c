"""Studies: one configuration over a grid of settings and seeds, with one run per cell.

A cell is an ordinary run in a separate folder, so a killed study resumes at the first incomplete step. Steps
that several cells share are computed once, by the first of them (``tasks.step_cache``).
"""

import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError

from feddistill import config as configuration
from feddistill.config import Config, strict_yaml
from feddistill.errors import ConfigError, FeddistillError, RunError
from feddistill.progress import NoProgress, Progress
from feddistill.settings_model import Setting
from feddistill.store.layout import CONFIG, RESULT
from feddistill.store.run_directory import Json, read_object

STUDY = "study.yaml"
CELLS = "cells"
SHARED = "shared"
"""Folder of the step cache shared by the cells; deleted when all cells are complete."""


class Study(Setting):
    """Content of a study file."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    question: str = ""
    """The research question, shown in the report."""
    base: Path | None = None
    """A configuration, relative to the study's file; ``null`` for the quickstart."""
    settings: dict[str, Any] = Field(default_factory=dict)
    """Settings of every run by dotted name: ``data.partition.clients: 10``."""
    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Values to try, by dotted name of the setting: every combination is a cell."""
    cases: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Named groups of settings; each is run with every combination of the grid."""
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    target: float | None = Field(default=None, gt=0)
    """Target accuracy (bits per byte) on validation; the report shows the round in which it was
    reached and the bytes uploaded until then."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of a study."""

    name: str
    """Name of the folder."""
    labels: Mapping[str, Any]
    """Short name to value of the settings in which the cells differ, without the seed."""
    seed: int
    config: Config


def load(path: Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study file, apply overrides such as ``seeds=[0]``, check the configuration of every cell.

    Raises:
        ConfigError: The file is not a study, a cell's settings are invalid, or two cells have the same name.
    """
    raw = strict_yaml.read(path)
    raw = configuration.untied(raw)
    if not isinstance(raw, dict):
        raise ConfigError(f"{path} must be a mapping, got {type(raw).__name__}")
    _flatten(raw, once=True)
    for text in overrides:
        configuration.override(raw, text)
    _flatten(raw, once=False)
    if raw.get("base") is not None:
        raw["base"] = (path.parent / os.path.expanduser(str(raw["base"]))).resolve()
    try:
        study = Study.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        reason = first["msg"]
        if first["type"] == "unknown_setting":
            reason = f"{first['ctx']['key']} is not a setting; known: {first['ctx']['known']}"
        raise ConfigError(f"{path}: {place + ': ' if place else ''}{reason}") from None
    cells(study)
    return study


def cells(study: Study) -> list[Cell]:
    """All cells of a study in the order of its file, seeds innermost."""
    short = _short(study.grid)
    found = []
    for values in itertools.product(*study.grid.values()):
        for case in study.cases or {"": {}}:
            chosen = dict(zip(study.grid, values, strict=True))
            labels = {short[key]: value for key, value in chosen.items()}
            if case:
                labels["case"] = case
            settings = {**study.settings, **chosen, **study.cases.get(case, {})}
            for seed in study.seeds:
                name = "_".join(f"{key}={_word(value)}" for key, value in {**labels, "seed": seed}.items())
                texts = tuple(f"{key}={_yaml(value)}" for key, value in {**settings, "seed": seed}.items())
                try:
                    config = configuration.load(study.base, texts)
                except ConfigError as error:
                    raise ConfigError(f"cell {name}: {error}") from None
                found.append(Cell(name, labels, seed, config))
    names = [cell.name for cell in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"two cells are both called {twice[0]}")
    return found


def sweep(
    study: Study,
    out: Path,
    *,
    jobs: int = 1,
    progress: Progress | None = None,
    after: Callable[[Path], object] | None = None,
) -> dict[str, str]:
    """Run every incomplete cell in ``out``; returns the error message of each failed cell by name.

    The first seed of every cell is run first, so that an interrupted study still compares all cells.

    Args:
        study: The study to run.
        out: A new folder, or the folder of the same study.
        jobs: Number of parallel runs; with more than one, each has its own process.
        progress: Where progress is shown.
        after: Called with the folder of each completed run, in the process that ran it.

    Raises:
        RunError: ``out`` holds another study.
    """
    progress = progress or NoProgress()
    _claim(study, out)
    todo = [cell for cell in cells(study) if not _is_done(cell, out)]
    todo.sort(key=lambda cell: study.seeds.index(cell.seed))
    done = len(cells(study)) - len(todo)
    if done:
        progress.log(f"{done} of {done + len(todo)} runs are done")
    failed: dict[str, str] = {}
    if jobs == 1:
        for cell in todo:
            failed |= _log_outcome(cell.name, _run(cell, out, progress, after), progress)
    else:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, mp_context=spawn) as pool:
            waiting = {pool.submit(_run, cell, out, None, after): cell.name for cell in todo}
            for future in as_completed(waiting):
                failed |= _log_outcome(waiting[future], future.result(), progress)
    if not failed:
        shutil.rmtree(out / SHARED, ignore_errors=True)
    return failed


def collect(out: Path) -> tuple[Study, list[tuple[Cell, Json]]]:
    """Load a study and the results of its complete cells."""
    study = load(out / STUDY)
    found = [
        (cell, read_object(out / CELLS / cell.name / RESULT)) for cell in cells(study) if _is_done(cell, out)
    ]
    if not found:
        raise RunError(f"{out}: no run of this study is complete yet")
    return study, found


def _is_done(cell: Cell, out: Path) -> bool:
    """True if a cell has a result.

    Raises:
        RunError: The result is of other settings: the study's base has changed since.
    """
    folder = out / CELLS / cell.name
    if not (folder / RESULT).exists():
        return False
    stored = configuration.load_stored(folder / CONFIG)
    if key := configuration.differs(cell.config, stored):
        raise RunError(f"{folder} was run with another {key}; choose another --out, or remove it")
    return True


def _run(
    cell: Cell, out: Path, progress: Progress | None, after: Callable[[Path], object] | None
) -> str | None:
    from feddistill.runs import experiment  # takes seconds: after the study is checked

    folder = out / CELLS / cell.name
    resume = (folder / CONFIG).exists()
    try:
        experiment.run(cell.config, folder, resume=resume, progress=progress, shared=out / SHARED)
        if after is not None:
            after(folder)
    except FeddistillError as error:
        return " ".join(str(error).split())
    return None


def _log_outcome(name: str, error: str | None, progress: Progress) -> dict[str, str]:
    progress.log(f"{name}: {error or 'done'}")
    return {} if error is None else {name: error}


def _claim(study: Study, out: Path) -> None:
    """Write the study into its folder, or check that the folder has the same study."""
    text = yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    path = out / STUDY
    if path.exists():
        before = path.read_text(encoding="utf-8")
        if before != text:
            raise RunError(f"{out} holds another study, or other settings of this one; choose another --out")
        return
    try:
        if out.exists() and any(out.iterdir()):
            raise RunError(f"{out} already exists and is not a study; choose another --out")
        out.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from None


def _flatten(raw: dict[str, Any], *, once: bool) -> None:
    """Write the settings of ``raw`` with dotted names; with ``once``, none may stand there twice."""
    for group in ("settings", "grid"):
        raw[group] = _flat(raw.get(group) or {}, whole=group == "settings", once=once)
    if isinstance(cases := raw.get("cases"), dict):
        raw["cases"] = {name: _flat(case or {}, whole=True, once=once) for name, case in cases.items()}


def _flat(group: Any, prefix: str = "", *, whole: bool, once: bool = False) -> dict[str, Any]:
    """Nested names as dotted ones; ``whole``: a mapping without further names is a value of its own."""
    if not isinstance(group, dict):
        raise ConfigError(f"{prefix or 'settings, grid'} must be a mapping, got {group!r}")
    found: dict[str, Any] = {}
    for key, value in group.items():
        dotted = f"{prefix}.{key}" if prefix else str(key)
        if isinstance(value, dict) and not (whole and "kind" in value):
            inner = _flat(value, dotted, whole=whole, once=once)
        else:
            inner = {dotted: value}
        if once and (twice := _lost(found, inner)):
            raise ConfigError(f"{twice} stands twice, with dots and nested; give it once")
        found |= inner
    return found


def _lost(before: Mapping[str, Any], after: Mapping[str, Any]) -> str | None:
    """A setting of ``before`` that ``after`` sets again, itself or in a mapping that is a value."""
    leaves = _flat(before, whole=False)
    again = [*after, *_flat(after, whole=False)]
    return next((name for name in leaves if any(f"{name}.".startswith(f"{key}.") for key in again)), None)


def _short(grid: Mapping[str, Any]) -> dict[str, str]:
    """The last parts of dotted names, as many as tell them apart."""
    names = {}
    for key in grid:
        parts = key.split(".")
        for length in range(1, len(parts) + 1):
            tail = ".".join(parts[-length:])
            if sum(other == tail or other.endswith(f".{tail}") for other in grid) == 1:
                break
        names[key] = tail
    return names


def _word(value: Any) -> str:
    """A value as part of a folder's name.

    >>> _word(0.1), _word({"kind": "median", "trim": 1})
    ('0.1', 'kind-median-trim-1')
    """
    return re.sub(r"[^A-Za-z0-9.]+", "-", value if isinstance(value, str) else json.dumps(value)).strip("-")


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("\n...\n").strip()


def groups(found: Sequence[tuple[Cell, Json]]) -> Iterator[tuple[Mapping[str, Any], list[Json]]]:
    """Group results by cell labels: labels and the results of all seeds."""
    by_labels: dict[str, tuple[Mapping[str, Any], list[Json]]] = {}
    for cell, result in found:
        by_labels.setdefault(json.dumps(cell.labels), (cell.labels, []))[1].append(result)
    yield from by_labels.values()
