"""Six rows of tsv with open quotation marks in rows 2 and 5: three rows were lost in silence."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

with tempfile.TemporaryDirectory() as folder:
    texts = ["one", '"two', "three", "four", '"five', "six"]
    rows = [f"{text}\t{'ab'[row % 2]}" for row, text in enumerate(texts)]
    Path(folder, "six.tsv").write_text("\n".join(["text\tlabel", *rows, ""]))
    source = {"kind": "files", "path": f"{folder}/six.tsv"}
    # Each client and each set reads the six rows: the parts need exactly six.
    data = {
        "source": source,
        "private": {"size": 3},
        "proxy": {"size": 1},
        "validation": {"size": 1},
        "test": {"size": 1},
        "partition": {"kind": "iid", "clients": 1},
    }
    config = Path(folder, "run.yaml")
    config.write_text(json.dumps({"data": data, "baselines": [], "payload": {"codec": "dense"}}))
    command = [sys.executable, "-m", "feddistill.cli", "config", "check", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

print("found:", *(done.stderr or done.stdout).strip().splitlines()[-1:])
print("right: the six rows are enough for 3 + 1 + 1 + 1 texts, and are counted")
right = done.returncode == 0 and "6 rows (six.tsv 6)" in done.stdout
print("right" if right else "WRONG")
sys.exit(not right)
