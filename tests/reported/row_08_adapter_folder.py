"""A client's model is a PEFT adapter folder: merged into its base, and trained."""

import subprocess
import sys
import tempfile
from pathlib import Path

import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.append(str(Path(__file__).parents[1]))
import gguf_fixtures

with tempfile.TemporaryDirectory() as scratch:
    folder, base, adapter = (Path(scratch) / name for name in ("gguf", "base", "adapter"))
    gguf_fixtures.write(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_fixtures.NAME)
    for mark in ("is_quantized", "hf_quantizer", "quantization_method"):
        delattr(model, mark)
    del model.config.quantization_config
    model.save_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(adapter)
    for path in (base, adapter):
        AutoTokenizer.from_pretrained(folder, gguf_file=gguf_fixtures.NAME).save_pretrained(path)
    training = {"epochs": 1, "batch_size": 4, "learning_rate": 1e-3}
    source, parts = {"kind": "embedded", "name": "sotu_eras"}, ("private", "proxy", "validation", "test")
    config = {
        "task": "causal_lm",
        "rounds": 1,
        "threads": 1,
        "data": {"source": source, "partition": {"kind": "iid", "clients": 2}}
        | {part: {"size": size} for part, size in zip(parts, (2, 1, 1, 1), strict=True)},
        "clients": {
            "models": [{"source": {"kind": "hub", "name": str(adapter)}, "max_tokens": 32}],
            "training": training,
        },
        "student": {
            "model": {"source": {"kind": "hub", "name": str(base)}, "max_tokens": 32},
            "training": training,
        },
    }
    (Path(scratch) / "run.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "feddistill.cli", "train", "run.yaml", "--out", "run", "--quiet"]
    done = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
print(f"exit status {done.returncode}: {(done.stderr.strip().splitlines() or ['trained'])[-1]}; right: 0")
sys.exit(done.returncode)
