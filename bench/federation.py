"""``python -m bench.federation``: cost of one more client for the server, in Flower's simulation.

Federations of 25 to 200 tiny clients with equally many texts; a tenth of the clients takes part in each
round. The coordinator holds one reply at a time: neither its memory nor its seconds per reply may grow with
the number of clients.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import yaml

from bench import machine
from feddistill.store.run_directory import RunDirectory

SCHEMA = 1
RESULT = Path(__file__).parent / "results" / "federation.json"
COUNTS = (25, 50, 100, 200)
TEXTS, ROUNDS = 40, 2


def settings(clients: int) -> dict[str, Any]:
    """A configuration of tiny clients."""
    model = {"layers": [0], "freeze_embeddings": True, "max_tokens": 16}
    return {
        "name": f"scale-{clients}",
        "rounds": ROUNDS,
        "threads": 1,
        "data": {
            "source": {"kind": "embedded", "name": "wordnet_topics"},
            "private": {"size": TEXTS * clients},
            "proxy": {"size": 200, "labelled": 50},
            "validation": {"size": 100},
            "test": {"size": 100},
            "partition": {"kind": "iid", "clients": clients},
        },
        "clients": {"models": [model], "training": {"epochs": 1}, "per_round": clients // 10},
        "aggregation": {"quorum": 1},
        "student": {"model": model, "training": {"epochs": 1}},
    }


def measure(clients: int, folder: Path) -> dict[str, Any]:
    """Run one federation; return the measurements from its journal and result."""
    config, out = folder / f"{clients}.yaml", folder / f"run-{clients}"
    config.write_text(yaml.safe_dump(settings(clients), sort_keys=False))
    program = Path(sys.executable).with_name("feddistill")
    start = time.perf_counter()
    command = [program, "train", config, "--engine", "flower-sim", "--out", out, "--quiet"]
    subprocess.run(command, check=True)
    seconds = time.perf_counter() - start
    events = [json.loads(line) for line in (out / "federation.jsonl").read_text().splitlines()]
    replies = [event for event in events if event["event"] == "replied"]
    result = json.loads((out / "result.json").read_text())
    directory = RunDirectory.open(out)
    last = directory.done(f"rounds/{ROUNDS:03d}")
    directory.close()
    assert last is not None
    return {
        "clients": clients,
        "asked_in_a_round": clients // 10,
        "replies": len(replies),
        "seconds": round(seconds, 1),
        "seconds_a_reply": round((events[-1]["time"] - events[0]["time"]) / len(replies), 3),
        "coordinator_peak_bytes": last["student"]["costs"]["evaluate"]["peak_memory_bytes"],
        "missing": result["missing"],
        "uplink_bytes": result["bytes"]["uplink"],
    }


def table(found: dict[str, Any]) -> str:
    """Markdown table for the documentation."""
    lines = [
        "| clients | clients per round | replies | seconds | seconds per reply | peak memory, MB |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for case in found["cases"]:
        lines.append(
            f"| {case['clients']} | {case['asked_in_a_round']} | {case['replies']} | {case['seconds']:.0f} | "
            f"{case['seconds_a_reply']:.2f} | {case['coordinator_peak_bytes'] / 1e6:.0f} |"
        )
    where = found["machine"]
    note = f"{where['cpu']}, {where['cores']} cores, Flower {found['flower']}; commit {found['commit'][:7]}."
    return "\n".join([*lines, "", note])


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--clients", "counts", type=int, multiple=True, default=COUNTS, show_default=True)
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULT, show_default=True)
def main(counts: Sequence[int], out: Path) -> None:
    """Measure federations of several sizes and write a result file."""
    from importlib.metadata import version

    cases = []
    with tempfile.TemporaryDirectory() as name:
        for count in counts:
            cases.append(measure(count, Path(name)))
            click.echo(json.dumps(cases[-1]))
    found = {"schema": SCHEMA, **machine.describe("cpu"), "flower": version("flwr"), "cases": cases}
    out.write_text(json.dumps(found, indent=1) + "\n")
    click.echo(table(found))


if __name__ == "__main__":
    main()
