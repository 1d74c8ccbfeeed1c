"""Read and write result files.  Needs only the standard library."""

import json
import os
from pathlib import Path
from typing import Any

SCHEMA = 1


def load(path: Path) -> dict[str, Any] | None:
    """Read a result file; ``None`` if it does not exist.

    Raises:
        ValueError: The file is not a result file.
    """
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise ValueError(f"{path} is not a result file of schema {SCHEMA}")
    return found


def save(path: Path, results: dict[str, Any]) -> None:
    """Write atomically, so that a killed run leaves the previous file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)


def note(path: Path, step: str, status: int, seconds: float, said: str = "") -> None:
    """Add the outcome of a step of ``bench/gpu.sh`` to a result file, created if it does not exist."""
    results = load(path) or {"schema": SCHEMA, "device": "cuda", "cases": []}
    entry = {"step": step, "status": status, "seconds": round(seconds, 1)}
    steps = [other for other in results.get("steps", []) if other["step"] != step]
    results["steps"] = [*steps, {**entry, "said": said} if said else entry]
    save(path, results)


def joined(before: dict[str, Any] | None, after: dict[str, Any]) -> dict[str, Any]:
    """Merge the cases of two runs; of a case that both have, the later one counts."""
    if not before:
        return after
    measured = {case["name"] for case in after["cases"]}
    kept = [case for case in before["cases"] if case["name"] not in measured]
    return {
        **before,
        **after,
        "seconds": round(before.get("seconds", 0.0) + after["seconds"], 1),
        "skipped": {**before.get("skipped", {}), **after["skipped"]},
        "cases": [*kept, *after["cases"]],
    }
