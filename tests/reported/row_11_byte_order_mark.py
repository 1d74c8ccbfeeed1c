"""A jsonl file with a byte order mark: it was refused."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

with tempfile.TemporaryDirectory() as folder:
    rows = [json.dumps({"text": f"text {row}", "label": "ab"[row % 2]}) for row in range(8)]
    Path(folder, "marked.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8-sig")
    data = {
        "source": {"kind": "files", "path": f"{folder}/marked.jsonl"},
        "private": {"size": 5},
        "proxy": {"size": 1},
        "validation": {"size": 1},
        "test": {"size": 1},
        "partition": {"kind": "iid", "clients": 1},
    }
    config = Path(folder, "run.yaml")
    config.write_text(json.dumps({"data": data, "baselines": []}))
    command = [sys.executable, "-m", "feddistill.cli", "config", "check", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

print("found:", *(done.stderr or done.stdout).strip().splitlines()[-1:])
print("right: eight rows are read")
right = done.returncode == 0 and "Traceback" not in done.stderr
print("right" if right else "WRONG")
sys.exit(not right)
