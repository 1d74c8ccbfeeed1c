"""Optimiser steps over blocks of unequal length, as one batch and as batches of one: one loss.

A Llama from random weights (no dropout) trains for thirty steps, each over all blocks of its client, the last
of which is short. Its loss in the last step says whether the gradients were the same.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIG = """
name: steps
task: causal_lm
rounds: 1
threads: 1
precision: fp32
data:
  source: {kind: files, path: TEXTS, label_column: null}
  private: {size: 5}
  proxy: {size: 1}
  validation: {size: 1}
  test: {size: 2}
  partition: {kind: iid, clients: 1}
clients:
  models:
    - &model
      max_tokens: 48
      source:
        kind: scratch
        architecture: llama
        settings: {hidden_size: 32, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1,
          intermediate_size: 64, max_position_embeddings: 48}
        tokenizer: {kind: trained, vocab_size: 300}
  training: &training {epochs: EPOCHS, batch_size: BATCH, gradient_accumulation: PARTS, learning_rate: 3.0e-3}
student:
  model: *model
  training: *training
"""


def trained(folder: Path, epochs: int, batch: int, parts: int) -> tuple[int, float]:
    """Steps of the client, and the loss of its last step."""
    name = f"{epochs}-{batch}-{parts}"
    texts, config, out = folder / "texts.jsonl", folder / f"{name}.yaml", folder / name
    words = "a bird sings by the river "
    lines = [{"text": f"{start} {words * (1 + start)}"} for start in range(9)]
    texts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = CONFIG
    for key, value in {"TEXTS": texts, "EPOCHS": epochs, "BATCH": batch, "PARTS": parts}.items():
        text = text.replace(key, str(value))
    config.write_text(text)
    command = [sys.executable, "-m", "feddistill.cli", "train", str(config), "--quiet", "--out", str(out)]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    record = json.loads(next(out.glob("records/alone/001/*.json")).read_text())["content"]["trained"]
    return int(record["steps"]), float(record["loss_curve"][-1][1])


with tempfile.TemporaryDirectory() as scratch:
    folder = Path(scratch)
    batches, _ = trained(folder, 1, 1, 1)
    steps, whole = trained(folder, 30, 64, 1)
    same_steps, parts = trained(folder, 30, 1, batches)
assert steps == same_steps == 30
print(
    f"loss of the last step in one batch {whole:.5f}, in {batches} batches {parts:.5f}; right: equal to 1e-4"
)
sys.exit(abs(parts / whole - 1) > 1e-4)
