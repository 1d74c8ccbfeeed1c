"""A distillation step of a language model, and the server's memory: ``python -m bench.language``.

The step: a Llama-like student of two layers reads four sequences of 512 tokens, V = 49,152; the teacher
keeps k = 64. ``ours`` is the training's own loss; ``dense`` has the teacher's log-probabilities
``[tokens, V]`` and eager PyTorch. Both have the head's three products, which are most of a wide student's
step. Forward and backward to all gradients, in turns, in one process; the most memory above what was there
before, each in a process of its own. The server merges and stores one round of four clients.
"""

import ctypes
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.nn import functional

from bench.machine import describe
from feddistill import aggregation
from feddistill.config.training import DistillConfig
from feddistill.heads import head_of, hidden_states
from feddistill.rules import MeanProbs
from feddistill.tensorfile import TopKFile
from feddistill.training.blocks import block_loss
from feddistill_kernels import TopK, topk_compress

V, LENGTH, K, SEQUENCES, KD_WEIGHT = 49_152, 512, 64, 4, 0.5
HIDDEN = (128, 256, 576)
"""Sizes of students."""
POSITIONS, CLIENTS, KEPT = 40_000, 4, 16


def _student(hidden: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=V,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=2,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return LlamaForCausalLM(settings)


def _lesson() -> tuple[Tensor, Tensor, TopK]:
    torch.manual_seed(1)
    ids = torch.randint(0, V, (SEQUENCES, LENGTH + 1))
    parts = [topk_compress(15 * torch.randn(128, V), K) for _ in range(SEQUENCES * LENGTH // 128)]
    teacher = TopK(
        torch.cat([p.ids for p in parts]),
        torch.cat([p.log_probs for p in parts]),
        torch.cat([p.log_tail for p in parts]),
        V,
    )
    return ids[:, :-1].contiguous(), ids[:, 1:].flatten(), teacher


def ours(model: Any, ids: Tensor, labels: Tensor, teacher: TopK) -> float:
    """The step of ``training.blocks``."""
    model.zero_grad()
    taught = torch.ones(len(labels), dtype=torch.bool)
    distill = DistillConfig(temperature=1.0, kd_weight=KD_WEIGHT)
    loss = block_loss(
        hidden_states(model, ids).flatten(0, 1), *head_of(model), labels, teacher, taught, distill, V
    )
    loss.backward()
    return float(loss.detach())


def dense(model: Any, ids: Tensor, labels: Tensor, teacher: Tensor) -> float:
    """The same loss by a person who has the teacher's whole rows; the tail has next to nothing."""
    model.zero_grad()
    log_p = model(input_ids=ids).logits.flatten(0, 1).log_softmax(-1)
    loss = KD_WEIGHT * functional.kl_div(log_p, teacher, log_target=True, reduction="batchmean")
    loss = loss + (1 - KD_WEIGHT) * functional.nll_loss(log_p, labels)
    loss.backward()
    return float(loss.detach())


def _measured(which: str, hidden: int, out: Any) -> None:
    """Peak memory of one step above what was there before it, the teacher included."""
    model, (ids, labels, teacher) = _student(hidden), _lesson()
    model.zero_grad()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is not there to be filled again
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    if which == "ours":
        ours(model, ids, labels, teacher)
    else:
        dense(model, ids, labels, teacher.expand())
    out.put(_status("VmHWM") - before)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _server(out: Any) -> None:
    """One round: merge the answers of all clients into a teacher on disk, rows made as they are asked for."""

    def answerer(client: int) -> Callable[[int, int], TopK]:
        def rows(start: int, stop: int) -> TopK:
            random = torch.Generator().manual_seed(client * POSITIONS + start)
            ids = torch.randint(0, V // KEPT, (stop - start, KEPT), generator=random) * KEPT
            ids = (ids + torch.arange(KEPT)).sort(-1).values.int()
            scores = torch.rand(stop - start, KEPT + 1, generator=random).log_softmax(-1)
            return TopK(ids, scores[:, :KEPT].contiguous(), scores[:, KEPT].contiguous(), V)

        return rows

    with tempfile.TemporaryDirectory() as folder:
        file = TopKFile.create(Path(folder) / "teacher.safetensors", POSITIONS, KEPT, V)
        clients = [answerer(client) for client in range(CLIENTS)]
        start = time.perf_counter()
        found = aggregation.aggregate(clients, POSITIONS, MeanProbs(), k=KEPT, sink=file.put)
        teacher = TopKFile.open(Path(folder) / "teacher.safetensors")
        labels = torch.zeros(POSITIONS, dtype=torch.long)
        names = [str(c) for c in range(CLIENTS)]
        aggregation.diagnose(names, clients, teacher, labels, found.mass, found.weights)
        seconds = time.perf_counter() - start
    out.put({"peak_memory_bytes": _status("VmHWM"), "seconds": round(seconds, 2)})


def _apart(target: Callable[..., None], *given: Any) -> Any:
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    process = context.Process(target=target, args=(*given, out))
    process.start()
    found = out.get()
    process.join()
    return found


def _step(hidden: int, times: int) -> dict[str, Any]:
    """Both in turns, for a student of this size."""
    model, (ids, labels, teacher) = _student(hidden), _lesson()
    whole = teacher.expand()
    losses = {"ours": ours(model, ids, labels, teacher), "dense": dense(model, ids, labels, whole)}
    seconds: dict[str, list[float]] = {"ours": [], "dense": []}
    steps: dict[str, Callable[[], float]] = {
        "ours": lambda: ours(model, ids, labels, teacher),
        "dense": lambda: dense(model, ids, labels, whole),
    }
    for _ in range(times):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    memory = {which: _apart(_measured, which, hidden) for which in ("ours", "dense")}
    return {
        "hidden": hidden,
        "seconds": {name: round(value, 3) for name, value in median.items()},
        "memory_bytes": memory,
        "loss": losses,
        "times_faster": round(median["dense"] / median["ours"], 2),
        "times_smaller": round(memory["dense"] / memory["ours"], 2),
    }


def table(found: dict[str, Any]) -> str:
    """What was measured, for the documents."""
    lines = [
        "| student's width | ours, s | dense, s | faster | ours, MB | dense, MB | smaller | losses apart |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for step in found["steps"]:
        s, m, loss = step["seconds"], step["memory_bytes"], step["loss"]
        apart = abs(loss["ours"] - loss["dense"]) / loss["dense"]
        lines.append(
            f"| {step['hidden']} | {s['ours']:.2f} | {s['dense']:.2f} | {step['times_faster']:.2f}× "
            f"| {m['ours'] / 1e6:.0f} | {m['dense'] / 1e6:.0f} | {step['times_smaller']:.1f}× | {apart:.0e} |"
        )
    server, on = found["server"], found["machine"]
    note = (
        f"A step of {found['sequences']} sequences of {found['sequence']} tokens, "
        f"V = {found['vocabulary']:,}, "
        f"k = {found['k']}, float32, {found['threads']} threads of {on['machine']['cpu']}, torch "
        f"{on['versions']['torch']}, commit {on['commit'][:7]}. Memory is the most above what was there "
        f"before, the dense teacher included. A server that merges {server['clients']} clients' answers to "
        f"{server['positions']:,} positions (k = {server['k']}) peaks at "
        f"{server['peak_memory_bytes'] / 2**30:.2f} GiB, its imports included."
    )
    return "\n".join([*lines, "", note])


@click.command()
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--times", default=3, show_default=True, help="Steps of each that are timed.")
def main(out: Path | None, times: int) -> None:
    """Measure, and write what was found."""
    found = {
        "schema": "language-1",
        "machine": describe("cpu"),
        "threads": torch.get_num_threads(),
        "vocabulary": V,
        "sequence": LENGTH,
        "sequences": SEQUENCES,
        "k": K,
        "kd_weight": KD_WEIGHT,
        "steps": [_step(hidden, times) for hidden in HIDDEN],
        "server": {"vocabulary": V, "positions": POSITIONS, "clients": CLIENTS, "k": KEPT, **_apart(_server)},
    }
    text = json.dumps(found, indent=1) + "\n"
    click.echo(text)
    if out:
        out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
