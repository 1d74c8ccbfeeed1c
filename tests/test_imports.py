"""The architecture, as a table that fails when the code disagrees with it."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# package: (folder, top-level packages that it may import besides itself and the standard library)
PACKAGES = {
    "feddistill_kernels": ("feddistill_kernels", {"torch", "triton"}),
    "feddistill": (
        "feddistill",
        {"cryptography", "datasets", "feddistill_kernels", "flwr", "flwr_datasets", "jinja2"}
        | {"httpx", "huggingface_hub", "lm_eval", "matplotlib", "peft", "rouge_score", "sacrebleu"}
        | {"numpy", "pandas", "pyarrow", "pydantic", "pydantic_core", "rich", "safetensors", "sklearn"}
        | {"tokenizers", "torch", "transformers", "yaml", "zstandard"},
    ),
    "feddistill.cli": (
        "cli",
        {"click", "feddistill", "feddistill_kernels", "numpy", "rich", "torch"},
    ),
    "bench": (
        "bench",
        {"click", "feddistill", "feddistill_kernels", "matplotlib", "numpy", "torch"}
        | {"tokenizers", "transformers", "triton", "yaml"}
        # peers, where they are installed
        | {"byzfl", "cut_cross_entropy", "distillkit", "editdistance", "liger_kernel", "rapidfuzz"},
    ),
}

# module of feddistill: the modules of feddistill below it that it may import
FOUNDATION = {"errors", "setting", "types"}
BELOW_STAGES = FOUNDATION | {"accounting", "attacks", "batches", "config", "keys", "rules", "seeds"}
BELOW_STAGES |= {"blocks", "heads", "passages", "presets", "squad", "tasks", "tensorfile", "weights"}
STAGES = {"aggregation", "alignment", "answering", "data", "evaluation", "models", "payload", "training"}
BELOW_METHODS = BELOW_STAGES | STAGES | {"progress", "store"}
MODULES = {
    "errors": set(),
    "setting": set(),
    "types": set(),
    "seeds": set(),
    "batches": set(),
    "blocks": set(),
    "heads": set(),
    "passages": {"errors"},
    "squad": set(),
    "tasks": set(),
    "progress": {"types"},
    "tensorfile": set(),
    "accounting": {"types"},
    "keys": {"errors"},
    "deployment": {"config", "data", "errors", "keys"},
    "federation": {"progress", "store"},
    "store": {"errors"},
    "rules": {"errors", "setting"},
    "attacks": {"errors", "setting"},
    "weights": {"types"},
    "presets": {"errors"},
    "config": {"attacks", "errors", "presets", "rules", "setting"},
    **dict.fromkeys(sorted(STAGES), BELOW_STAGES),  # stages do not import each other
    "black_box": {"alignment", "config", "errors", "models", "payload"},
    "sharing": {"config", "errors", "models", "store"},
    "methods": BELOW_METHODS | {"black_box", "federation", "sharing"},
    "results": {"attacks", "config", "data", "rules", "store", "tasks", "types"},
    "planning": BELOW_METHODS | {"methods", "results"},
    "revision": BELOW_METHODS | {"experiment", "methods"},
    "verification": BELOW_METHODS | {"methods", "revision"},
    "study": {"config", "errors", "experiment", "progress", "setting", "store"},
    "report": {"config", "data", "errors", "store", "study", "tasks"},
    "experiment": BELOW_METHODS | {"federation", "methods", "planning", "results", "sharing"},
    "students": BELOW_METHODS | {"experiment"},
    "benchmarks": BELOW_METHODS | {"students"},
    "release": BELOW_METHODS | {"experiment", "report", "students"},
    "engines": BELOW_METHODS | {"experiment", "federation", "methods"},
    "__init__": set(),
}


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level and path.is_relative_to(ROOT / "bench"):
                continue  # bench/ has two names: tests/test_bench.py
            assert node.level == 0, f"{path}: imports are absolute"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "feddistill"}
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_the_table_allows(package):
    folder, allowed = PACKAGES[package]
    allowed = allowed | {package} | sys.stdlib_module_names
    for path in (ROOT / folder).rglob("*.py"):
        foreign = {name for name in imports(path) if name.split(".")[0] not in allowed}
        assert not foreign, f"{path.relative_to(ROOT)} may not import {sorted(foreign)}"


def modules() -> dict[str, list[Path]]:
    found = {}
    for path in (ROOT / "feddistill").rglob("*.py"):
        top = path.relative_to(ROOT / "feddistill").parts[0].removesuffix(".py")
        found.setdefault(top, []).append(path)
    return found


def test_every_module_has_a_place_in_the_table():
    assert set(modules()) == set(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_what_is_below_them(module):
    allowed = MODULES[module] | {module}
    for path in modules()[module]:
        ours = {name.split(".")[1] for name in imports(path) if name.startswith("feddistill.")}
        above = {name for name in ours - allowed if name in MODULES}
        assert not above, f"{path.relative_to(ROOT)} may not import {sorted(above)}"


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    ).stdout.strip()


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import feddistill.cli; feddistill.cli.main(['--help'], standalone_mode=False)", "torch"),
        ("import feddistill.config", "torch"),
        ("import feddistill", "torch"),
        ("import feddistill.cli.bench", "torch"),
        ("import feddistill_kernels", "triton"),
        ("import feddistill_kernels", "transformers"),
    ],
)
def test_importing_has_no_heavy_effects(statement, absent):
    assert run(f"{statement}\nimport sys; print('{absent}' in sys.modules)").endswith("False")
