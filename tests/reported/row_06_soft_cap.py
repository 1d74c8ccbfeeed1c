"""Gemma 2 from scratch with a soft cap of 5 on its logits: the model's own value, or refused in one line."""

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = "The people of the union."
CLI = "import sys; from feddistill.cli import main; sys.exit(main())"


def feddistill(folder, *arguments):
    command = [sys.executable, "-c", CLI, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)  # not in another checkout


def write_inputs(folder):
    (folder / "one.txt").write_text(TEXT)
    texts = [
        f"the {word} of the union number {n}." for n in range(30) for word in ("people", "state", "peace")
    ]
    (folder / "texts.txt").write_text("\n".join(texts))
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    shape |= {"head_dim": 16, "intermediate_size": 64, "max_position_embeddings": 64}
    shape |= {"final_logit_softcapping": 5.0, "tie_word_embeddings": False}
    tokenizer = {"kind": "trained", "vocab_size": 300}
    source = {"kind": "scratch", "architecture": "gemma2", "settings": shape, "tokenizer": tokenizer}
    model, training = {"source": source, "max_tokens": 64}, {"epochs": 4, "learning_rate": 0.03}
    data = {name: {"size": 20} for name in ("private", "proxy", "validation", "test")}
    data |= {"source": {"kind": "files", "path": str(folder / "texts.txt")}}
    data |= {"partition": {"kind": "iid", "clients": 1}}
    config = {"task": "causal_lm", "rounds": 1, "precision": "fp32", "threads": 1, "data": data}
    config |= {"clients": {"models": [model], "training": {**training, "batch_size": 2}}}
    config |= {"student": {"model": model, "training": {**training, "batch_size": 2}}}
    (folder / "run.yaml").write_text(yaml.safe_dump(config))


with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    write_inputs(folder)
    done = feddistill(folder, "train", "run.yaml", "--out", "run")
    if done.returncode == 2:
        print(done.stderr.strip())
        sys.exit("softcapping" not in done.stderr.splitlines()[-1] or "Traceback" in done.stderr)
    assert done.returncode == 0, done.stderr
    feddistill(folder, "export", "run", "--out", "export")
    found = json.loads(feddistill(folder, "evaluate", "run", "--texts", "one.txt", "--json").stdout)
    model, tokenizer = (a.from_pretrained(folder / "export") for a in (AutoModelForCausalLM, AutoTokenizer))
    end = tokenizer.eos_token_id
    ids = torch.tensor([[end, *tokenizer(TEXT)["input_ids"], end]])
    with torch.no_grad():
        right = float(model(input_ids=ids, labels=ids).loss)
    print(f"evaluated: {found['cross_entropy']:.4f} nats a token; the model itself (right): {right:.4f}")
    sys.exit(not math.isclose(found["cross_entropy"], right, abs_tol=1e-3))
