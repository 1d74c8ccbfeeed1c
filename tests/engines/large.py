"""``python -m tests.engines.large``: answers of 300 MB from each client over Flower, and their memory.

Ten thousand classes, the 4,096 likeliest of each public text. Exit status 1 where the coordinator has held
more than 600 MB by the time that the teacher is made.
"""

import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import yaml

from feddistill.store.run_directory import RunDirectory

CLASSES, KEPT = 10_000, 4096
MEGABYTE = 10**6
LIMIT = 600 * MEGABYTE


def lines(path: Path, count: int, *, labelled: bool) -> None:
    """Texts of a few words; every class is somebody's."""
    draw = random.Random(path.name)
    with path.open("w") as file:
        for number in range(count):
            words = " ".join(f"{draw.randrange(10**4)}" for _ in range(4))
            label = {"label": f"class {number % CLASSES:05d}"} if labelled else {}
            file.write(json.dumps({"text": f"{number} {words}", **label}) + "\n")


def settings(folder: Path, clients: int, texts: int) -> dict:
    """A configuration for these texts; models are as small as they come."""
    for client in range(clients):
        lines(folder / f"client-{client}.jsonl", CLASSES, labelled=True)
    lines(folder / "others.jsonl", 200, labelled=True)
    lines(folder / "proxy.jsonl", texts, labelled=False)
    model = {"layers": [0], "freeze_embeddings": True, "max_tokens": 16}
    training = {"epochs": 0.02}
    others = {"source": {"kind": "files", "path": str(folder / "others.jsonl")}}
    public = {"kind": "files", "path": str(folder / "proxy.jsonl"), "label_column": None}
    return {
        "name": "large",
        "rounds": 1,
        "threads": 1,
        "data": {
            "labels": [f"class {number:05d}" for number in range(CLASSES)],
            "proxy": {"source": public},
            "validation": others,
            "test": others,
            "partition": {
                "kind": "given",
                "sources": {
                    f"client-{client}": {"kind": "files", "path": str(folder / f"client-{client}.jsonl")}
                    for client in range(clients)
                },
            },
        },
        "payload": {"codec": "topk", "k": KEPT, "shard_mib": 4},
        "clients": {"models": [model], "training": training},
        "student": {"model": model, "training": training},
    }


@click.command()
@click.option("--clients", type=click.IntRange(1), default=3, show_default=True)
@click.option("--megabytes", type=click.IntRange(1), default=300, show_default=True, help="Of each client.")
@click.option("--out", type=click.Path(path_type=Path), help="Write the figures here, as JSON.")
def main(clients: int, megabytes: int, out: Path | None) -> None:
    """Print how much was sent, and what it took."""
    texts = megabytes * MEGABYTE // (3 * KEPT)
    with tempfile.TemporaryDirectory() as name:
        config, run = Path(name) / "large.yaml", Path(name) / "run"
        config.write_text(yaml.safe_dump(settings(Path(name), clients, texts), sort_keys=False))
        program = Path(sys.executable).with_name("feddistill")
        command = [program, "train", config, "--engine", "flower-sim", "--out", run, "--quiet"]
        subprocess.run(command, check=True)
        events = [json.loads(line) for line in (run / "federation.jsonl").read_text().splitlines()]
        directory = RunDirectory.open(run)
        record = directory.done("rounds/001")
        directory.close()
    assert record is not None
    sent = record["bytes"]["uplink"]
    found = {
        "classes": CLASSES,
        "texts": texts,
        "uplink_bytes": sent,
        "messages": sum(e["event"] == "replied" and e["task"] == "answer" for e in events),
        "coordinator_peak_bytes": record["teacher"]["cost"]["peak_memory_bytes"],
        "with_student_peak_bytes": record["student"]["costs"]["evaluate"]["peak_memory_bytes"],
        "clients_peak_bytes": max(u["cost"]["peak_memory_bytes"] for u in record["uploads"].values()),
        "teacher_seconds": round(record["teacher"]["cost"]["seconds"], 1),
        "seconds": round(events[-1]["time"] - events[0]["time"], 1),
    }
    click.echo(
        f"{clients} clients, {min(sent.values()) / MEGABYTE:.0f} MB each, {found['messages']} messages"
    )
    for what in ("coordinator", "with_student", "clients"):
        click.echo(f"peak memory, {what.replace('_', ' ')}: {found[f'{what}_peak_bytes'] / MEGABYTE:.0f} MB")
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n")
    raise SystemExit(found["coordinator_peak_bytes"] > LIMIT)


if __name__ == "__main__":
    main()
