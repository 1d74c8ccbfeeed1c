"""A GGUF file as the student, as a client's model, and as a client's model with LoRA: trained and exported.

The file is a Llama of a few kilobytes, or, with two arguments, FOLDER and NAME, any other.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM

sys.path.append(str(Path(__file__).parents[1]))
import gguf_fixtures

with tempfile.TemporaryDirectory() as scratch:
    folder, name = (Path(scratch) / "model", gguf_fixtures.NAME) if len(sys.argv) < 3 else sys.argv[1:3]
    if len(sys.argv) < 3:
        gguf_fixtures.write(folder)
    model = {"source": {"kind": "hub", "name": str(folder), "gguf": name}, "max_tokens": 32}
    training = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-3}
    source, parts = {"kind": "embedded", "name": "sotu_eras"}, ("private", "proxy", "validation", "test")
    config = {
        "task": "causal_lm",
        "rounds": 2,
        "threads": 1,
        "data": {"source": source, "partition": {"kind": "iid", "clients": 2}}
        | {part: {"size": size} for part, size in zip(parts, (2, 1, 1, 1), strict=True)},
        "clients": {"models": [model, {**model, "lora": {"rank": 2}}], "training": training},
        "student": {"model": model, "training": training},
    }
    (Path(scratch) / "run.yaml").write_text(yaml.safe_dump(config))
    for arguments in (
        ["train", "run.yaml", "--out", "run", "--quiet"],
        ["export", "run", "--out", "student"],
    ):
        done = subprocess.run([sys.executable, "-m", "feddistill.cli", *arguments], cwd=scratch)
        if done.returncode:
            sys.exit(f"{arguments[0]}: exit status {done.returncode}; right: it trains and exports")
    ids = torch.arange(5, 25)[None]
    student, start = (
        AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **more)
        for where, more in ((f"{scratch}/student", {}), (folder, {"gguf_file": name}))
    )
    with torch.inference_mode():
        apart = float((student(input_ids=ids).logits - start(input_ids=ids).logits).abs().max())
print(f"the exported student differs from the file's model by {apart:.3f}; right: it trained, so it differs")
sys.exit(apart < 1e-4)
