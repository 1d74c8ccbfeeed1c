"""Comparison of runs: metrics, costs and the settings in which they differ."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from feddistill import config as configuration
from feddistill.config.methods import row_labels
from feddistill.report import metric_rows, task_of
from feddistill.report.result import Result
from feddistill.store.layout import CONFIG, RESULT
from feddistill.store.run_directory import Json, read_object


@dataclass(frozen=True, slots=True)
class Compared:
    """A run in a comparison."""

    run: str
    settings: Json
    """Settings that differ between the runs, by dotted name; ``None`` if missing. ``(recipe)`` is the number
    of the recipe of training."""
    figure: str
    """Name of the compared metric."""
    figures: dict[str, float]
    """Metric on the test set, by row label (student or baseline)."""
    uplink: int
    """Bytes uploaded by all clients in all rounds."""
    seconds: float


def side_by_side(runs: Iterable[Path]) -> list[Compared]:
    """Read and compare complete runs.

    Raises:
        RunError: A run has no result.
    """
    found = [
        (str(run), read_object(run / RESULT), configuration.load_stored(run / CONFIG).model_dump(mode="json"))
        for run in runs
    ]
    settings = [
        _leaves(config) | {"(recipe)": Result.from_json(result).recipe} for _, result, config in found
    ]
    keys = dict.fromkeys(key for one in settings for key in one)
    differ = [key for key in keys if len({json.dumps(one.get(key)) for one in settings}) > 1]
    return [
        Compared(
            name,
            {key: one.get(key) for key in differ},
            task_of(result).words,
            {row_labels()[who]: figures[task_of(result).decides] for who, figures in metric_rows(result)},
            Result.from_json(result).bytes.uplink,
            Result.from_json(result).total_seconds,
        )
        for (name, result, _), one in zip(found, settings, strict=True)
    ]


def _leaves(group: Json, prefix: str = "") -> Json:
    found: Json = {}
    for key, value in group.items():
        dotted = f"{prefix}.{key}" if prefix else key
        found |= _leaves(value, dotted) if isinstance(value, dict) else {dotted: value}
    return found
