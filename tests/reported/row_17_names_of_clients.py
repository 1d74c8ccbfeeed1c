"""A partition by source whose sources are Chinese cities: two clients with distinct names."""

import json
import sys
import tempfile
from pathlib import Path

from feddistill.config import parse
from feddistill.data import load
from feddistill.errors import FeddistillError

with tempfile.TemporaryDirectory() as scratch:
    path = Path(scratch) / "texts.jsonl"
    lines = [
        {"text": f"text {i}", "label": "ab"[i // 2 % 2], "city": "北京" if i % 2 else "上海"}
        for i in range(40)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    source = {"kind": "files", "path": str(path), "source_column": "city"}
    part = {"source": source, "size": 4}
    parts = {"private": {"size": None}, "proxy": part, "validation": part, "test": part}
    config = parse({"data": {"source": source, "partition": {"kind": "by_source"}, **parts}})
    try:
        names = [client.name for client in load(config.data, 0).private]
    except FeddistillError as error:
        names = [str(error)]
print(f"clients: {names}; right: two names")
sys.exit(len(set(names)) != 2)
