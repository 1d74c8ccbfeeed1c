"""``python -m bench.aggregation``: speed and memory of the server's aggregation of stored answers.

Answers are on disk as in a payload (two bytes per id, one per probability) and are read, decoded and
aggregated chunk by chunk. Speed: rows per second with ten clients. Memory: peak of a separate process that
aggregates 64 clients x 100,000 rows x 64 entries and does nothing else; the teacher is included.
"""

import json
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from bench import machine
from feddistill.aggregation.rules import RULES
from feddistill.aggregation.teacher import aggregate
from feddistill.payload import Ranked, quantise_topk
from feddistill_kernels import TopK, topk_compress

SCHEMA = 1
RESULT = Path(__file__).parent / "results" / "aggregation.json"
VOCAB = 49_152
TILE = 500  # distinct rows; a file repeats them
RULES_MERGED = ("mean_probs", "median")
ENOUGH_ROWS_PER_S = 50_000
ENOUGH_BYTES = 1.5 * 2**30


def store(folder: Path, clients: int, rows: int, k: int) -> None:
    """Write for each client the ids (uint16), codes (uint8) and tails (uint8) of ``rows`` rows."""
    generator = torch.Generator().manual_seed(0)
    candidates = 4 * k  # clients share the set of likely ids
    ids = torch.stack([torch.randperm(VOCAB, generator=generator)[:candidates] for _ in range(TILE)]).int()
    truth = 3 * torch.randn(TILE, candidates, generator=generator)
    for client in range(clients):
        compressed = topk_compress(truth + torch.randn(TILE, candidates, generator=generator), k)
        kept = ids.gather(1, compressed.ids.long())
        made = quantise_topk(
            kept.numpy(), compressed.log_probs.numpy(), compressed.log_tail.clamp_min(-21.0).numpy(), VOCAB
        )
        times = rows // TILE
        for name, array in (("ids", made.ids.astype(np.uint16)), ("codes", made.codes), ("tail", made.tail)):
            with (folder / f"{client}.{name}").open("wb") as file:
                for _ in range(times):
                    file.write(array.tobytes())


def reader(folder: Path, client: int, k: int) -> Callable[[int, int], TopK]:
    """Return a function that reads a range of rows of a stored answer from disk."""
    files = {name: os.open(folder / f"{client}.{name}", os.O_RDONLY) for name in ("ids", "codes", "tail")}

    def read(name: str, dtype: type[np.generic], width: int, start: int, stop: int) -> Any:
        size = np.dtype(dtype).itemsize * width
        return np.frombuffer(os.pread(files[name], (stop - start) * size, start * size), dtype)

    def answer(start: int, stop: int) -> TopK:
        ids = read("ids", np.uint16, k, start, stop).reshape(-1, k).astype(np.int32)
        codes = read("codes", np.uint8, k, start, stop).reshape(-1, k)
        kept, tail = Ranked(ids, codes, read("tail", np.uint8, 1, start, stop), VOCAB).log_probs()
        return TopK(torch.from_numpy(ids), torch.from_numpy(kept), torch.from_numpy(tail), VOCAB)

    return answer


def merge(folder: Path, clients: int, rows: int, k: int, rule: str) -> tuple[float, float]:
    """Aggregate once; wall-clock seconds and CPU seconds of all threads."""
    answers = [reader(folder, client, k) for client in range(clients)]
    start, used = time.perf_counter(), time.process_time()
    made = aggregate(answers, rows, RULES[rule]())
    assert len(made.teacher) == rows
    return time.perf_counter() - start, time.process_time() - used


def peak(folder: Path, clients: int, rows: int, k: int, rule: str, queue: Any) -> None:
    """Body of a separate process: bytes before, peak bytes, seconds."""
    before = high_water()
    seconds, _ = merge(folder, clients, rows, k, rule)
    queue.put((before, high_water(), seconds))


def high_water() -> int:
    """Peak resident bytes of this process; ``ru_maxrss`` would include its parent's."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def table(found: dict[str, Any]) -> str:
    """Markdown table for the documentation."""
    lines = ["| aggregated | rule | rows per second | peak memory, GiB |", "|---|---|--:|--:|"]
    for case in found["cases"]:
        rows = case.get("rows")
        what = f"{case['clients']} clients, k = {case['k']}{f', {rows:,} rows' if rows else ''}"
        speed = case["rows_per_s"] if rows is None else rows / case["seconds"]
        memory = f"{case['peak_bytes'] / 2**30:.2f}" if rows else "–"
        lines.append(f"| {what} | `{case['rule']}` | {speed:,.0f} | {memory} |")
    machine_ = found["machine"]
    note = (
        f"{machine_['cpu']}, {machine_['threads']} threads, V = {found['vocab']:,}, answers read from disk; "
        f"{found['cases'][-1]['imports_bytes'] / 2**30:.2f} GiB of the peak are imports. "
        f"Commit {found['commit'][:7]}."
    )
    return "\n".join([*lines, "", note])


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the result file, as JSON."
)
@click.option("--rows", default=100_000, show_default=True, help="Rows of the memory measurement.")
@click.option("--repeats", default=3, show_default=True)
@click.option("--threads", type=int, help="Threads of PyTorch.  [default: its own choice]")
def main(out: Path | None, rows: int, repeats: int, threads: int | None) -> None:
    """Measure the aggregation of stored answers.  Exit status 1 if a requirement is missed."""
    if threads:
        torch.set_num_threads(threads)
    cases: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for k in (16, 64):
            store(folder, 10, 20_000, k)
            for rule in RULES_MERGED:
                seconds, used = zip(
                    *(merge(folder, 10, 20_000, k, rule) for _ in range(repeats)), strict=True
                )
                speeds = {
                    "rows_per_s": round(20_000 / statistics.median(seconds)),
                    "best": round(20_000 / min(seconds)),
                    "rows_per_cpu_s": round(20_000 / min(used)),
                }
                cases.append({"clients": 10, "k": k, "rule": rule, **speeds})
                click.echo(
                    f"10 clients, k={k}, {rule}: {speeds['rows_per_s']:,} rows/s, at best "
                    f"{speeds['best']:,}; {speeds['rows_per_cpu_s']:,} a second of one processor"
                )
        store(folder, 64, rows, 64)
        spawn = multiprocessing.get_context("spawn")
        for rule in RULES_MERGED:
            queue = spawn.Queue()
            child = spawn.Process(target=peak, args=(folder, 64, rows, 64, rule, queue))
            child.start()
            before, most, took = queue.get()
            child.join()
            cases.append(
                {
                    "clients": 64,
                    "k": 64,
                    "rule": rule,
                    "rows": rows,
                    "peak_bytes": most,
                    "imports_bytes": before,
                    "seconds": round(took, 1),
                }
            )
            click.echo(
                f"64 clients x {rows:,} rows x k=64, {rule}: peak {most / 2**30:.2f} GiB, "
                f"{before / 2**30:.2f} of it imports; {took:.0f} s"
            )
    slow = [case for case in cases if case.get("best", ENOUGH_ROWS_PER_S) < ENOUGH_ROWS_PER_S]
    large = [case for case in cases if case.get("peak_bytes", 0) > ENOUGH_BYTES]
    for case in (*slow, *large):
        click.echo(f"missed: {case}")
    if out:
        found = {"schema": SCHEMA, **machine.describe("cpu"), "vocab": VOCAB, "cases": cases}
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if slow or large:
        raise SystemExit(1)


if __name__ == "__main__":
    main(prog_name="python -m bench.aggregation")
