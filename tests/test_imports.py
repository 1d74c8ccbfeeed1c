"""The architecture, as a table that fails when the code disagrees with it."""

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# package: (folder, top-level packages that it may import besides itself and the standard library)
PACKAGES = {
    "feddistill_kernels": ("feddistill_kernels", {"torch", "triton", "typing_extensions"}),
    "feddistill": (
        "feddistill",
        {"accelerate", "cryptography", "datasets", "feddistill_kernels", "flwr", "flwr_datasets", "jinja2"}
        | {"httpx", "huggingface_hub", "lm_eval", "matplotlib", "peft", "rouge_score", "sacrebleu"}
        | {"numpy", "pandas", "pyarrow", "pydantic", "pydantic_core", "rich", "safetensors", "sklearn"}
        | {"tokenizers", "torch", "transformers", "typing_extensions", "yaml", "zstandard"},
    ),
    "feddistill.cli": (
        "cli",
        {"click", "feddistill", "feddistill_kernels", "numpy", "rich", "torch", "typing_extensions"},
    ),
    "bench": (
        "bench",
        {"click", "feddistill", "feddistill_kernels", "matplotlib", "numpy", "torch"}
        | {"tokenizers", "transformers", "triton", "yaml"}
        # peers, where they are installed
        | {"byzfl", "cut_cross_entropy", "distillkit", "editdistance", "liger_kernel", "rapidfuzz"},
    ),
}

# Modules and packages of feddistill, lowest first: what each may import besides itself and FOUNDATION.
FOUNDATION = {"errors", "seeds", "settings_model", "types"}
MODULES = {
    **{module: set() for module in sorted(FOUNDATION)},
    "metrics": set(),
    "accounting": set(),
    "progress": set(),
    "store": set(),
    "aggregation": set(),
    "payload": set(),
    "alignment": {"payload"},
    "config": {"aggregation", "store"},
    "modelio": {"accounting"},
    "data": {"config"},
    "models": {"accounting", "config", "modelio"},
    "training": {"accounting", "config", "modelio", "store"},
    "federation": {"payload", "progress", "store"},
    "tasks": {"accounting", "aggregation", "alignment", "config", "federation", "metrics", "modelio"}
    | {"models", "payload", "progress", "store", "training"},
    # The two sides do not import each other.
    "client": {"accounting", "aggregation", "config", "federation", "models", "payload", "store", "tasks"}
    | {"training"},
    "server": {"accounting", "aggregation", "config", "data", "federation", "models", "payload", "store"}
    | {"tasks", "training"},
    "methods": {"accounting", "aggregation", "client", "config", "modelio", "models", "server", "store"}
    | {"tasks", "training"},
    "runs": {"accounting", "aggregation", "client", "config", "data", "federation", "methods", "modelio"}
    | {"models", "payload", "progress", "server", "store", "tasks", "training"},
    "engines": {"client", "config", "data", "federation", "payload", "progress", "runs", "server", "store"}
    | {"tasks"},
    "report": {"config", "data", "runs", "store"},
    "release": {"config", "models", "report", "runs", "store", "tasks"},
    "benchmarks": {"accounting", "config", "data", "metrics", "modelio", "models", "progress", "runs"}
    | {"store"},
    "__init__": set(),
}

# Folders of feddistill_kernels: what each may import besides itself and MACHINERY.
MACHINERY = {"_backend", "_check", "_native", "_triton"}
KERNELS = {
    "topk": set(),
    "order_statistics": set(),
    "distances": {"order_statistics"},
    "aggregation": {"order_statistics", "topk"},
    "vocabulary_parallel": {"_kinds"},
    "distillation": {"_kinds", "topk", "vocabulary_parallel"},
    "linear_distillation": {"distillation", "topk"},
}
MACHINERY_MODULES = {
    "_check": set(),
    "_dispatch": set(),
    "_kinds": set(),
    "_native": set(),
    "_triton": set(),
    "_backend": {"_check", "_dispatch"},
    "__init__": {*KERNELS, "_backend", "_native"},
}


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> frozenset[str]:
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level and path.is_relative_to(ROOT / "bench"):
                continue  # bench/ has two names: tests/test_bench.py
            assert node.level == 0, f"{path}: imports are absolute"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names if node.module == "feddistill"}
    return frozenset(found)


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_import_only_what_the_table_allows(package):
    folder, allowed = PACKAGES[package]
    allowed = allowed | {package} | sys.stdlib_module_names
    for path in (ROOT / folder).rglob("*.py"):
        foreign = {name for name in imports(path) if name.split(".")[0] not in allowed}
        assert not foreign, f"{path.relative_to(ROOT)} may not import {sorted(foreign)}"


@cache
def modules(package: str) -> dict[str, list[Path]]:
    """The files of each module and folder of a package; ``cli`` and ``bench`` are packages of their own."""
    found = {}
    for path in files(package):
        top = path.relative_to(ROOT / package).parts[0].removesuffix(".py")
        found.setdefault(top, []).append(path)
    return found


def files(package: str) -> list[Path]:
    inside = (ROOT / package).rglob("*.py")
    return sorted(
        path for path in inside if path.relative_to(ROOT / package).parts[0] not in ("bench", "cli")
    )


def imported(package: str, module: str) -> dict[Path, set[str]]:
    """By file of a module: the other modules of its package that it imports."""
    return {
        path: {name.split(".")[1] for name in imports(path) if name.startswith(f"{package}.")}
        & modules(package).keys() - {module}
        for path in modules(package)[module]
    }


def test_every_module_has_a_place_in_the_table():
    assert set(modules("feddistill")) == set(MODULES)
    assert set(modules("feddistill_kernels")) == {*KERNELS, *MACHINERY_MODULES}


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_only_what_is_below_them(module):
    order = [*MODULES]
    assert all(order.index(lower) < order.index(module) for lower in MODULES[module])
    needed = set()
    for path, others in imported("feddistill", module).items():
        above = others - MODULES[module] - (FOUNDATION if module not in FOUNDATION else set())
        assert not above, f"{path.relative_to(ROOT)} may not import {sorted(above)}"
        needed |= others
    assert needed >= MODULES[module], (
        f"{module} imports no {sorted(MODULES[module] - needed)}: shorten its row"
    )


@pytest.mark.parametrize("module", [*MACHINERY_MODULES, *KERNELS])
def test_operators_import_only_what_is_below_them(module):
    allowed = MACHINERY_MODULES[module] if module in MACHINERY_MODULES else KERNELS[module] | MACHINERY
    for path, others in imported("feddistill_kernels", module).items():
        above = others - allowed
        assert not above, f"{path.relative_to(ROOT)} may not import {sorted(above)}"


@pytest.mark.parametrize("package", ["feddistill", "feddistill_kernels"])
def test_no_files_import_each_other_in_a_circle(package):
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in files(package)}
    names = {name.removesuffix(".__init__"): path for name, path in names.items()}
    graph = {}
    for name, path in names.items():
        froms = [node for node in ast.walk(parsed(path)) if isinstance(node, ast.ImportFrom)]
        parts = {f"{node.module}.{alias.name}" for node in froms for alias in node.names}
        # A name that is a module is imported from it, and not from its package's __init__.
        parts |= {node.module for node in froms if f"{node.module}.{node.names[0].name}" not in names}
        graph[name] = parts & names.keys() - {name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_feddistill_has_few_entries():
    tracked = subprocess.run(
        ["git", "ls-files", "feddistill"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.splitlines()
    entries = {path.split("/")[1] for path in tracked}
    assert {"__init__.py", "py.typed"} <= entries
    assert len(entries) <= 28, sorted(entries)


@pytest.mark.parametrize(
    "path", [path for path in files("feddistill") if path.name == "__init__.py"], ids=lambda p: p.parent.name
)
def test_an_init_only_re_exports(path):
    first, *rest = parsed(path).body
    assert isinstance(first, ast.Expr), "a docstring"
    for node in rest:
        if isinstance(node, ast.ImportFrom):
            continue
        assert isinstance(node, ast.Assign), f"{path}:{node.lineno}"
        assert [ast.unparse(target) for target in node.targets] in (["__all__"], ["__version__"])


LAYOUT = ROOT / "feddistill/store/layout.py"
# Names of a run's folders that are also keys of records, settings and messages: as paths alone they are
# names on disk, as other strings they are not.
WORDS = {
    "baselines",
    "before",
    "data",
    "execution",
    "feedback",
    "figures",
    "methods",
    "rounds",
    "server",
    "specialists",
}
WORDS |= {"student", "teacher"}
PATH_METHODS = {"Path", "glob", "joinpath", "path", "remove", "rglob", "steps", "with_name", "within"}


def strings(tree: ast.AST) -> list[ast.Constant]:
    """String constants that are neither docstrings nor formats such as ``:03d``."""
    others = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    formats = [node.format_spec for node in ast.walk(tree) if isinstance(node, ast.FormattedValue)]
    others |= {id(value) for format_ in formats if format_ for value in format_.values}
    constants = (node for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return [node for node in constants if isinstance(node.value, str) and id(node) not in others]


def names_on_disk() -> set[str]:
    """Names of files and folders in the layout of a run; ``.json`` and other suffixes are none."""
    tree = parsed(LAYOUT)
    suffixes = {
        part.value
        for node in ast.walk(tree)
        if isinstance(node, ast.JoinedStr)
        for part in node.values[1:]
        if isinstance(part, ast.Constant) and part.value.startswith(".")
    }
    pieces = {piece for node in strings(tree) for piece in node.value.split("/")}
    return {piece for piece in pieces - suffixes if re.search("[a-z]", piece)} - {"*"}


def names_in(tree: ast.AST, names: set[str]) -> list[tuple[int, str]]:
    """``(line, name)`` of each string in which a name on disk stands."""
    paths = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            paths |= {id(node.left), id(node.right)}
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else ast.unparse(node.func)
            if called in PATH_METHODS:
                paths |= {id(argument) for argument in node.args}
    hits = []
    for node in strings(tree):
        text = node.value
        parts = text.split("/")
        is_path = id(node) in paths or (len(parts) > 1 and not re.search(r"[\s<>:]", text))
        for name in names:
            whole = rf"(?<![\w./-]){re.escape(name)}(?![\w-])"
            if (name in parts and (is_path or name not in WORDS)) or ("." in name and re.search(whole, text)):
                hits.append((node.lineno, name))
    return hits


def test_names_on_disk_are_found():
    names = names_on_disk()
    assert {"config.yaml", "result.json", "spec.json", "told", "payloads", "described", ".lock"} <= names
    assert {name for name in names if "." not in name} >= WORDS
    wrong = """run.path("teacher"), f"rounds/{n:03d}", "told", root / "student", f"no result.json in {x}" """
    right = """row["teacher"], "rounds", "untold", root / name, "a student / a teacher", "my_result.json" """
    assert sorted(name for _, name in names_in(ast.parse(wrong), names)) == [
        "result.json",
        "rounds",
        "student",
        "teacher",
        "told",
    ]
    assert names_in(ast.parse(right), names) == []


def test_names_on_disk_stand_in_the_layout_alone():
    names, hits = names_on_disk(), []
    for path in files("feddistill"):
        if path != LAYOUT:
            found = names_in(parsed(path), names)
            hits += [f"{path.relative_to(ROOT)}:{line}: {name}" for line, name in found]
    assert not hits, "\n".join(hits)


def test_results_look_nothing_up_by_a_literal_key():
    path = ROOT / "feddistill/runs/results.py"
    hits = []
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Subscript):
            key = node.slice
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".get", ".pop", ".setdefault")):
            key = node.args[0]
        else:
            continue
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            hits.append(f"{node.lineno}: {ast.unparse(node)}")
    assert not hits, "\n".join(hits)


def test_few_lines_look_something_up_by_a_literal_key():
    literal = re.compile(r'\["[a-z_]+"\]')
    lines = [line for path in files("feddistill") for line in path.read_text(encoding="utf-8").splitlines()]
    assert sum(bool(literal.search(line)) for line in lines) <= 200


def run(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    ).stdout.strip()


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import feddistill.cli; feddistill.cli.main(['--help'], standalone_mode=False)", {"torch"}),
        ("import feddistill.config", {"torch"}),
        ("import feddistill", {"torch"}),
        ("import feddistill.cli.bench", {"torch"}),
        ("import feddistill_kernels", {"triton", "transformers"}),
    ],
)
def test_importing_has_no_heavy_effects(statement, absent):
    assert run(f"{statement}\nimport sys; print({absent} & set(sys.modules))").endswith("set()")
