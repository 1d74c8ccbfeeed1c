"""One optimiser step over texts of unequal length, as one batch and as batches of two: one loss.

Llama from random weights (no dropout); all blocks of a client fit into its first step. The loss of that step is
logged before any weight has changed.
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
  source: {kind: embedded, name: sotu_eras}
  private: {size: 12}
  proxy: {size: 4}
  validation: {size: 3}
  test: {size: 3}
  partition: {kind: by_source}
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
  training: &training {epochs: 1, batch_size: BATCH, gradient_accumulation: PARTS, learning_rate: 1.0e-4}
student:
  model: *model
  training: *training
"""


def first_loss(folder: Path, batch: int, parts: int) -> float:
    """Of the first client's first step."""
    config = folder / f"{batch}.yaml"
    config.write_text(CONFIG.replace("BATCH", str(batch)).replace("PARTS", str(parts)))
    command = [sys.executable, "-m", "feddistill.cli", "train", str(config), "--quiet", "--out", str(folder / str(batch))]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    record = sorted((folder / str(batch)).glob("records/alone/001/*.json"))[0]
    return float(json.loads(record.read_text())["content"]["trained"]["loss_curve"][0][1])


with tempfile.TemporaryDirectory() as scratch:
    whole, parts = first_loss(Path(scratch), 1024, 1), first_loss(Path(scratch), 2, 512)
apart = abs(parts / whole - 1)
print(f"loss of the step in one batch {whole:.6f}, in batches of two {parts:.6f}; right: equal to 1e-6")
sys.exit(apart > 1e-6)
