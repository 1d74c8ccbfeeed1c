"""``feddistill plan``."""

from pathlib import Path
from typing import Any

import click

from feddistill.cli.paths import UserPath


@click.command()
@click.argument("config", required=False, type=UserPath())
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def plan(config: Path | None, overrides: tuple[str, ...], as_json: bool) -> None:
    """Estimate the cost of CONFIG (default: the quickstart): bytes, operations, time, memory, disk.

    Reads the data and runs a few training steps of each model; writes nothing.
    """
    import json

    from feddistill import config as configuration

    settings = configuration.load(config, overrides)

    from feddistill.progress import NoProgress, TerminalProgress
    from feddistill.runs.plan import plan as estimate

    found = estimate(settings, NoProgress() if as_json else TerminalProgress())
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    _print(found)


def _print(found: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from feddistill.config.tasks import TASKS

    console = Console(highlight=False, markup=False, emoji=False)
    sent, task = found["bytes"], TASKS[found["task"]]
    rows = "" if task.row == "proxy text" else f"{found['rows']:,} rows (one a {task.row}), "
    console.print(
        f"{found['clients']} clients, {found['rounds']} rounds, {found['proxy_texts']} proxy texts, {rows}"
        f"{found['classes']} {task.choices}; the proxy set is {_bytes(sent['proxy_download'])}, "
        "downloaded once"
    )
    uploads = Table("upload of", "a client and round", f"a {task.row}", "the whole run", title="What travels")
    for name, codec in sent["codecs"].items():
        mark = " (chosen)" if name == sent["chosen"] else ""
        whole = _bytes(codec["all_rounds_and_clients"])
        uploads.add_row(f"answers, {name}{mark}", _bytes(codec["upload"]), f"{codec['a_row']} B", whole)
    times = found["clients"] * found["rounds"]
    for name, label in (
        ("fedavg", "FedAvg"),
        ("federated_lora", f"federated LoRA, rank {sent['federated_lora']['rank']}"),
    ):
        other = sent[name]
        console_label = f"{label}: {other['times_ours']} times the chosen"
        uploads.add_row(console_label, _bytes(other["upload"]), "-", _bytes(other["upload"] * times))
    console.print(uploads)
    even = sent["break_even_rows"]
    console.print(
        f"Answers of {even['fedavg']:,} rows a round would be as large as FedAvg's upload, "
        f"of {even['federated_lora']:,} as federated LoRA's."
    )
    costs = Table("phase", "seconds here", "floating-point operations", title="What is computed")
    for phase, operations in found["flops"].items():
        costs.add_row(phase, f"{found['seconds'][phase]:,.0f}", f"{operations:.3g}")
    console.print(costs)
    memory, disk = found["memory_bytes"], found["disk_bytes"]
    console.print(
        f"memory: {_bytes(memory['training'])} to train here, {_bytes(memory['aggregation'])} to aggregate; "
        f"disk: {_bytes(disk['total'])}, of which answers {_bytes(disk['answers'])}"
    )


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} TB"
