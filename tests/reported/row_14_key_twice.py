"""A YAML key that stands twice: the first was lost in silence."""

import subprocess
import sys
import tempfile
from pathlib import Path

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder, "run.yaml")
    path.write_text("rounds: 2\nname: once\nrounds: 7\n")
    command = [sys.executable, "-m", "feddistill.cli", "config", "show", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

shown = [line for line in done.stdout.splitlines() if line.startswith("rounds")]
print("found:", *(shown or done.stderr.strip().splitlines()))
print("right: one line that names the key and lines 1 and 3, exit status 2")
line = done.stderr.strip()
right = done.returncode == 2 and len(line.splitlines()) == 1 and "rounds" in line and "lines 1 and 3" in line
print("right" if right else "WRONG")
sys.exit(not right)
