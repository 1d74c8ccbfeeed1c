"""``python -m bench.answering --out bench/results/answering.json``: inference speed of a client.

Two clients. A Llama-like language model reads blocks of 128 tokens, V = 49,152; its answer has 16 entries of
three bytes per token. ``ours`` is the product's inference with its codec, ``topk`` a plain loop that keeps
``torch.topk`` of the log-probabilities, ``dense`` a loop that keeps all of them, as dense targets need. A
small pretrained encoder classifies definitions of one to fifty words: ``ours`` batches texts of similar
length, ``in order`` takes them in the given order. All run in turns in one process; medians are reported.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from bench.machine import describe, publish
from feddistill import models, payload
from feddistill.accounting import FlopMeter
from feddistill.config.data import EmbeddedSource
from feddistill.config.models import ModelConfig
from feddistill.data.sources import read
from feddistill.federation.encoding import compress_parts
from feddistill.modelio.inference import answer, answer_rows
from feddistill.modelio.outputs import hidden_states
from feddistill.modelio.packing import PackedTexts, pack
from feddistill.types import RoundSpec

V, LENGTH, BLOCKS, BATCH, K = 49_152, 128, 24, 8, 16
HIDDEN = (128, 576)
TEXTS, CLASSES = 512, 10


class _Uncounted(FlopMeter):
    """A meter that counts nothing: this benchmark needs no FLOPs."""

    def __init__(self) -> None: ...

    def add(self, batch: int, length: int, *, training: bool) -> None: ...


def _llama(hidden: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            hidden_size=hidden,
            intermediate_size=hidden * 8 // 3,
            num_hidden_layers=4,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 64,
            tie_word_embeddings=True,
            use_cache=False,
        )
    ).eval()


def _ours(model: Any, blocks: PackedTexts, bf16: bool) -> Any:
    rows = torch.arange(blocks.rows).numpy()
    spec = RoundSpec("run", 1, "", len(rows), V, "", "topk", K, "n", 1, ("a",))

    def states(ids: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        return hidden_states(model, ids).flatten(0, 1)[places]

    rows_found = answer_rows(
        model, states, blocks, rows, V, pad_id=0, batch_size=BATCH, bf16=bf16, meter=_Uncounted()
    )
    found = compress_parts(rows_found, spec, 0)
    assert isinstance(found, payload.Answers)
    return found


def _plain(model: Any, blocks: PackedTexts, bf16: bool) -> Any:
    """Batches of the blocks of full length."""
    whole = [torch.from_numpy(blocks[b]) for b in range(len(blocks)) if len(blocks[b]) == LENGTH]
    for first in range(0, len(whole), BATCH):
        ids = torch.stack(whole[first : first + BATCH])
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            yield model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)


def _topk(model: Any, blocks: PackedTexts, bf16: bool) -> Any:
    return [log_probs.topk(K) for log_probs in _plain(model, blocks, bf16)]


def _dense(model: Any, blocks: PackedTexts, bf16: bool) -> Any:
    return [log_probs.half() for log_probs in _plain(model, blocks, bf16)]


TOKENS: Mapping[str, Callable[..., Any]] = {"ours": _ours, "topk": _topk, "dense": _dense}


def _in_turns(runs: Mapping[str, Callable[[], Any]], times: int) -> dict[str, float]:
    """Median seconds of each run."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for name in (*runs, *list(runs) * times):  # the first run of each is the warm-up
        start = time.perf_counter()
        runs[name]()
        seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


def _language(hidden: int, bf16: bool, times: int) -> dict[str, Any]:
    model = _llama(hidden)
    tokens = torch.randint(1, V, (BLOCKS * (LENGTH - 1) - 1,)).tolist()
    blocks = pack([tokens], end=0, length=LENGTH)
    seconds = _in_turns(
        {name: lambda run=run: run(model, blocks, bf16) for name, run in TOKENS.items()},  # type: ignore[misc]  # defaults
        times,
    )
    return {
        "hidden": hidden,
        "precision": "bfloat16" if bf16 else "float32",
        "tokens_per_second": {name: round(blocks.rows / s) for name, s in seconds.items()},
    }


def _texts(bf16: bool, times: int) -> dict[str, Any]:
    config = ModelConfig(max_tokens=64)
    specialist = models.build(config, CLASSES, 0, "m")
    tokens = specialist.encode(read(EmbeddedSource(), "texts").texts[:TEXTS])
    more = {"pad_id": specialist.pad_id, "batch_size": 32, "bf16": bf16, "meter": _Uncounted()}

    def in_order() -> None:
        for first in range(0, TEXTS, 32):
            answer(specialist.model, tokens[first : first + 32], CLASSES, **more)

    whole = {"ours": lambda: answer(specialist.model, tokens, CLASSES, **more), "in order": in_order}
    seconds = _in_turns(whole, times)
    return {
        "precision": "bfloat16" if bf16 else "float32",
        "texts_per_second": {name: round(TEXTS / s) for name, s in seconds.items()},
    }


def table(found: Mapping[str, Any]) -> str:
    """Markdown table for the documentation."""
    lines = [
        "| prediction | ours | top-k loop | dense loop | speed-up over top-k, dense |",
        "|--|--:|--:|--:|--:|",
    ]
    for case in found["language"]:
        s = case["tokens_per_second"]
        who = f"{case['hidden']} wide, {case['precision']}, tokens/s"
        times = f"{s['ours'] / s['topk']:.1f}×, {s['ours'] / s['dense']:.1f}×"
        lines.append(f"| {who} | {s['ours']:,} | {s['topk']:,} | {s['dense']:,} | {times} |")
    on = found["machine"]
    texts = "; ".join(
        f"{case['precision']} {case['texts_per_second']['ours']:,} texts/s in batches of one length, "
        f"{case['texts_per_second']['in order']:,} in the given order"
        for case in found["texts"]
    )
    note = (
        f"Sequences of {LENGTH} tokens, V = {V:,}, k = {K}, {on['threads']} threads of {on['cpu']}, torch "
        f"{found['versions']['torch']}, commit {found['commit'][:7]}. An encoder over definitions: {texts}."
    )
    return "\n".join([*lines, "", note])


@click.command()
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--times", default=5, show_default=True, help="Timed passes of each.")
def main(out: Path | None, times: int) -> None:
    """Measure; print the result and write it to --out."""
    found = {
        "schema": "answering-1",
        **describe("cpu"),
        "language": [_language(hidden, bf16, times) for hidden in HIDDEN for bf16 in (False, True)],
        "texts": [_texts(bf16, times) for bf16 in (False, True)],
    }
    publish(found, out)


if __name__ == "__main__":
    main()
