"""Clients in other processes without co-distillation: the teacher, which they do not use, is not sent."""

import sys
import tempfile
from pathlib import Path

import feddistill

sys.path.append(str(Path(feddistill.__file__).parents[1] / "tests"))  # of the version that is tried
import elsewhere_fixtures

from feddistill.config import parse

SCRATCH = {"kind": "scratch", "architecture": "bert", "tokenizer": {"kind": "trained", "vocab_size": 300}}
SIZE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
model = {"source": {**SCRATCH, "settings": SIZE}, "max_tokens": 16}
training = {"epochs": 1, "batch_size": 16, "learning_rate": 1e-3}
config = parse(
    {
        "rounds": 2,
        "threads": 1,
        "precision": "fp32",
        "baselines": [],
        "data": {
            "private": {"size": 90},
            "proxy": {"size": 40, "labelled": 20},
            "validation": {"size": 20},
            "test": {"size": 20},
            "partition": {"kind": "iid", "clients": 3},
        },
        "clients": {"models": [model], "training": training, "codistillation": {"enabled": False}},
        "student": {"model": model, "training": training},
    }
)
with tempfile.TemporaryDirectory() as folder:
    transport = elsewhere_fixtures.Elsewhere(Path(folder) / "clients")
    result = elsewhere_fixtures.run(config, Path(folder) / "run", transport)
sent = sum(kind == "digest" for kind, *_ in transport.asked)
print(
    f"messages with a teacher: {sent}, bytes counted: {result['bytes']['downlink']}; right: no such message"
)
sys.exit(sent > 0)
