"""``python -m bench.language``: a distillation step of a language model, and the server's memory.

The step: a Llama-like student with two layers reads four sequences of 512 tokens, V = 49,152; the teacher
has k = 64. ``ours`` is the loss of the product's training. Two losses in eager PyTorch use a dense teacher,
``[tokens, V]``: ``textbook`` as in tutorials, from both models' logits, and ``dense`` optimised by hand, from
the teacher's log-probabilities and one log-softmax for both terms. All include the three products of the
head, which dominate a wide student's step. Time: forward and backward to all gradients, in turns, in one
process, in float32 and bfloat16 (autocast, which ``precision: auto`` selects if the CPU supports it).
Memory: the peak above the state before the step, each in its own process, whose allocator returns freed
memory at once. The server aggregates and stores one round of four clients.
"""

import ctypes
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

from bench.machine import describe, publish
from feddistill.aggregation.diagnostics import diagnose
from feddistill.aggregation.rules import MeanProbs
from feddistill.aggregation.teacher import aggregate
from feddistill.config.training import DistillConfig
from feddistill.modelio.outputs import head_of, hidden_states
from feddistill.store.logit_files import TopKFile
from feddistill.training.blocks import block_loss
from feddistill_kernels import TopK, topk_compress

V, LENGTH, K, SEQUENCES, KD_WEIGHT = 49_152, 512, 64, 4, 0.5
HIDDEN = (128, 256, 576)
"""Hidden sizes of the students."""
POSITIONS, CLIENTS, KEPT = 40_000, 4, 16
M_MMAP_THRESHOLD = -3
"""Parameter of ``mallopt``."""


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


def ours(model: Any, ids: Tensor, labels: Tensor, teacher: TopK, bf16: bool) -> float:
    """The loss of the product's training."""
    model.zero_grad()
    taught = torch.ones(len(labels), dtype=torch.bool)
    distill = DistillConfig(temperature=1.0, kd_weight=KD_WEIGHT)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        hidden = hidden_states(model, ids).flatten(0, 1)
    kind = torch.bfloat16 if bf16 else torch.float32
    weight, _ = head_of(model)
    total = block_loss(hidden.to(kind), weight.to(kind), None, labels, teacher, taught, distill, V)
    loss = total / len(labels)
    loss.backward()
    return float(loss.detach())


def dense(model: Any, ids: Tensor, labels: Tensor, teacher: Tensor, bf16: bool) -> float:
    """The same loss from dense teacher log-probabilities, optimised by hand."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        log_p = model(input_ids=ids).logits.flatten(0, 1).log_softmax(-1)
        loss = KD_WEIGHT * functional.kl_div(log_p, teacher, log_target=True, reduction="batchmean")
        loss = loss + (1 - KD_WEIGHT) * functional.nll_loss(log_p, labels)
    loss.backward()
    return float(loss.detach())


def textbook(model: Any, ids: Tensor, labels: Tensor, teacher: Tensor, bf16: bool) -> float:
    """The same loss as in tutorials: soft targets and cross-entropy, from logits."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(input_ids=ids).logits.flatten(0, 1)
        soft = functional.kl_div(logits.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")
        loss = KD_WEIGHT * soft + (1 - KD_WEIGHT) * functional.cross_entropy(logits, labels)
    loss.backward()
    return float(loss.detach())


STEPS: dict[str, Callable[..., float]] = {"ours": ours, "dense": dense, "textbook": textbook}


def _measured(which: str, hidden: int, bf16: bool, out: Any) -> None:
    """Peak memory that one step adds, the teacher included.

    A small step is taken first, so that the model and the code are not counted. Freed memory returns to the
    system at once, so that the peak is memory in use and not what glibc's heap keeps.
    """
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    model, (ids, labels, teacher) = _student(hidden), _lesson()

    def step(sequences: int, length: int) -> None:
        rows = torch.arange(len(labels)).view(SEQUENCES, LENGTH)[:sequences, :length].flatten()
        targets = teacher[rows] if which == "ours" else teacher[rows].expand()
        STEPS[which](model, ids[:sequences, :length].contiguous(), labels[rows], targets, bf16)

    step(1, 8)
    model.zero_grad()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    step(SEQUENCES, LENGTH)
    out.put(_status("VmHWM") - before)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def _server(out: Any) -> None:
    """Aggregate one round's answers into a teacher on disk; rows are generated on demand."""

    def answer_reader(client: int) -> Callable[[int, int], TopK]:
        def rows(start: int, stop: int) -> TopK:
            random = torch.Generator().manual_seed(client * POSITIONS + start)
            ids = torch.randint(0, V // KEPT, (stop - start, KEPT), generator=random) * KEPT
            ids = (ids + torch.arange(KEPT)).sort(-1).values.int()
            scores = torch.rand(stop - start, KEPT + 1, generator=random).log_softmax(-1)
            return TopK(ids, scores[:, :KEPT].contiguous(), scores[:, KEPT].contiguous(), V)

        return rows

    with tempfile.TemporaryDirectory() as folder:
        file = TopKFile.create(Path(folder) / "teacher.safetensors", POSITIONS, KEPT, V)
        clients = [answer_reader(client) for client in range(CLIENTS)]
        start = time.perf_counter()
        found = aggregate(clients, POSITIONS, MeanProbs(), k=KEPT, sink=file.put)
        teacher = TopKFile.open(Path(folder) / "teacher.safetensors")
        labels = torch.zeros(POSITIONS, dtype=torch.long)
        names = [str(c) for c in range(CLIENTS)]
        diagnose(names, clients, teacher, labels, found.mass, found.weights)
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


def _step(hidden: int, bf16: bool, times: int) -> dict[str, Any]:
    """Time all losses in turns for a student of this size."""
    model, (ids, labels, teacher) = _student(hidden), _lesson()
    given = {name: teacher if name == "ours" else teacher.expand() for name in STEPS}
    losses = {name: step(model, ids, labels, given[name], bf16) for name, step in STEPS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in STEPS}
    for _ in range(times):
        for name, step in STEPS.items():
            start = time.perf_counter()
            step(model, ids, labels, given[name], bf16)
            seconds[name].append(time.perf_counter() - start)
    return {
        "hidden": hidden,
        "precision": "bfloat16" if bf16 else "float32",
        "seconds": {name: round(statistics.median(values), 3) for name, values in seconds.items()},
        "memory_bytes": {name: _apart(_measured, name, hidden, bf16) for name in STEPS},
        "loss": losses,
    }


def table(found: dict[str, Any]) -> str:
    """Markdown table for the documentation."""
    lines = [
        "| student's width, precision | ours, s | dense, s | textbook, s | speed-up | ours, MB | dense, MB "
        "| textbook, MB | memory ratio | loss difference |",
        "|--|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for step in found["steps"]:
        s, m, loss = step["seconds"], step["memory_bytes"], step["loss"]
        faster, smaller = ("–".join(f"{c[n] / c['ours']:.1f}" for n in ("dense", "textbook")) for c in (s, m))
        apart = max(abs(loss["ours"] / loss[name] - 1) for name in ("dense", "textbook"))
        took = " | ".join(f"{s[name]:.2f}" for name in STEPS)
        held = " | ".join(f"{m[name] / 1e6:.0f}" for name in STEPS)
        who = f"{step['hidden']}, {step['precision']}"
        lines.append(f"| {who} | {took} | {faster}× | {held} | {smaller}× | {apart:.0e} |")
    server, on = found["server"], found["machine"]
    note = (
        f"A step of {found['sequences']} sequences of {found['sequence']} tokens, "
        f"V = {found['vocabulary']:,}, "
        f"k = {found['k']}, {found['threads']} threads of {on['machine']['cpu']}, torch "
        f"{on['versions']['torch']}, commit {on['commit'][:7]}. Memory is the peak increase over the "
        "state before the step, dense teacher included. A server that aggregates "
        f"{server['clients']} clients' answers to {server['positions']:,} positions (k = {server['k']}) "
        f"peaks at {server['peak_memory_bytes'] / 2**30:.2f} GiB, imports included."
    )
    return "\n".join([*lines, "", note])


@click.command()
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--times", default=3, show_default=True, help="Timed steps of each loss.")
def main(out: Path | None, times: int) -> None:
    """Measure; print the result and write it to --out."""
    found = {
        "schema": "language-2",
        "machine": describe("cpu"),
        "threads": torch.get_num_threads(),
        "vocabulary": V,
        "sequence": LENGTH,
        "sequences": SEQUENCES,
        "k": K,
        "kd_weight": KD_WEIGHT,
        "steps": [_step(hidden, bf16, times) for hidden in HIDDEN for bf16 in (False, True)],
        "server": {"vocabulary": V, "positions": POSITIONS, "clients": CLIENTS, "k": KEPT, **_apart(_server)},
    }
    publish(found, out)


if __name__ == "__main__":
    main()
