"""A causal language model with an untied head: the bytes of its LoRA in ``train`` and in ``plan``.

One layer of width 16, rank 8 on the query and value projections: 2 * 8 * (16 + 16) = 512 numbers, 2048 bytes.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIG = """
name: adapters
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
        settings: {hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 2,
          intermediate_size: 32, max_position_embeddings: 48, tie_word_embeddings: false}
        tokenizer: {kind: trained, vocab_size: 300}
  training: &training {epochs: 1, batch_size: 8, learning_rate: 3.0e-3}
student:
  model: *model
  training: *training
"""

with tempfile.TemporaryDirectory() as scratch:
    folder = Path(scratch)
    lines = [{"text": f"{number} birds sing by the river where stones lie still"} for number in range(9)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "run.yaml").write_text(CONFIG.replace("TEXTS", str(folder / "texts.jsonl")))

    def feddistill(*arguments: str) -> str:
        """Output of the command."""
        command = [sys.executable, "-m", "feddistill.cli", *arguments]
        return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout

    feddistill("train", "run.yaml", "--out", "run")
    trained = json.loads((folder / "run" / "result.json").read_text())["bytes"]["lora_uplink_same_rounds"]
    planned = json.loads(feddistill("plan", "run.yaml", "--json"))["bytes"]["federated_lora"]["upload"]
print(f"one upload of LoRA: train {trained} B, plan {planned} B; right: 2048 B")
sys.exit(not trained == planned == 2048)
