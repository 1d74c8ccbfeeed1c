"""The column ``prompt_column`` of a classifier was glued to its text: "A dog runsa cat sits"."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

with tempfile.TemporaryDirectory() as folder:
    rows = [f"A dog runs,a cat sits {row},{row % 2}" for row in range(40)]
    Path(folder, "pairs.csv").write_text("\n".join(["first,second,label", *rows, ""]))

    def check(**columns: str) -> subprocess.CompletedProcess[str]:
        """Check a configuration that reads the columns."""
        data = {
            "source": {"kind": "files", "path": f"{folder}/pairs.csv", **columns},
            "private": {"size": 10},
            "proxy": {"size": 10, "labelled": 4},
            "validation": {"size": 10},
            "test": {"size": 10},
            "partition": {"kind": "iid", "clients": 1},
        }
        tokenizer = {"kind": "trained", "vocab_size": 300}
        settings = {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "intermediate_size": 16,
        }
        source = {"kind": "scratch", "architecture": "bert", "tokenizer": tokenizer, "settings": settings}
        model = {"source": source, "max_tokens": 32}
        models = {"clients": {"models": [model]}, "student": {"model": model}}
        config = Path(folder, "run.yaml")
        config.write_text(json.dumps({"data": data, "baselines": [], **models}))
        command = [sys.executable, "-m", "feddistill.cli", "config", "check", str(config)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    glued = check(text_column="second", prompt_column="first")
    paired = check(text_column="first", pair_column="second")

for name, done in {"prompt_column": glued, "pair_column": paired}.items():
    print(
        f"found with {name}: status {done.returncode},",
        *(done.stderr or done.stdout).strip().splitlines()[-1:],
    )
print("right: prompt_column is refused in one line that names pair_column, which is accepted")
right = glued.returncode == 2 and "pair_column" in glued.stderr and "Traceback" not in glued.stderr
right = right and paired.returncode == 0
print("right" if right else "WRONG")
sys.exit(not right)
