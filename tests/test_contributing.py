"""CONTRIBUTING.md's table of changes: the paths exist, and each change is made as the table describes it.

The changes are made beside the sources, in a process of their own: a class in a new file and its entry in a
table. The existing tests, commands and documents must then find the new entry.
"""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Change of the table: the test that makes it, or that counts what it needs.
SHOWN = {
    "a divergence": "tests/kernels/test_kinds.py",
    "an aggregation rule": "tests/test_contributing.py",
    "a simulated attack": "tests/test_contributing.py",
    "a baseline": "tests/test_tables.py",
    "a task": "tests/test_tables.py",
    "a backend of an operator": "tests/test_contributing.py",
    "a setting": "tests/test_config.py",
    "a command": "tests/test_contributing.py",
    "a payload version": "tests/hostile_fixtures.py",
}

CONTRIBUTION = {
    "blend.py": '''
"""A rule."""

from typing import Literal

from pydantic import Field
from typing_extensions import override

from feddistill.aggregation.rules.means import mixture
from feddistill.aggregation.rules.rule import Rule


class Blend(Rule):
    """The mixture of the clients, as contributed by a test."""

    kind: Literal["blend"] = "blend"
    strength: float = Field(default=0.5, ge=0, le=1)

    @override
    def combine(self, block, shares):
        return mixture(block.x, shares)
''',
    "uniform.py": '''
"""An attack."""

from typing import Literal

from typing_extensions import override

from feddistill.aggregation.attacks import Attack


class Uniform(Attack):
    """Uniform answers: an attack that a test contributes in 2025."""

    kind: Literal["uniform"] = "uniform"

    @override
    def __call__(self, context):
        return (0 * context.own).log_softmax(-1)
''',
    "greet.py": '''
"""A command."""

import click


@click.command()
def greet() -> None:
    """Greet."""
    click.echo("hello")
''',
    "_native.py": '''
"""A backend of the operator vocabulary_parallel, which has none but the reference."""


def missing(device_type):
    return None
''',
    "made.py": """
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import feddistill.cli
from feddistill.aggregation import attacks
from feddistill.aggregation.rules import table

from blend import Blend
from uniform import Uniform

table.RULES["blend"] = Blend
attacks.ATTACKS["uniform"] = Uniform
feddistill.cli.COMMANDS["greet"] = "Greet."
feddistill.cli.__path__.append(str(Path(__file__).parent))

from click.testing import CliRunner

from feddistill_kernels import available_backends, vocabulary_parallel

vocabulary_parallel.__path__.append(str(Path(__file__).parent))
assert available_backends("vocabulary_parallel") == ("native", "reference")

invoke = CliRunner().invoke
assert "Greet." in invoke(feddistill.cli.main, ["--help"]).stdout
assert invoke(feddistill.cli.main, ["greet"]).stdout == "hello\\n"
rule = "aggregation.rule={kind: blend, strength: 0.25}"
choices = ["config", "show", "--set", rule, "--set", "simulate.attack=uniform"]
shown = invoke(feddistill.cli.main, choices).stdout
assert "kind: blend" in shown and "strength: 0.25" in shown and "kind: uniform" in shown, shown
wrong = invoke(feddistill.cli.main, ["config", "check", "--set", rule.replace("0.25", "2")])
assert wrong.exit_code == 2 and "strength" in wrong.stderr, wrong.stderr

root = Path(sys.argv[1])
sys.path.insert(0, str(root / "docs"))
import build_tables

assert "| `blend` | The mixture of the clients" in build_tables.rules()
assert "| `uniform` | Uniform answers" in build_tables.attacks()

tests = ["test_rules.py", "test_attacks.py", "test_config.py"]
options = ["-q", "-n0", "-p", "no:cacheprovider", "-k", "blend or uniform", "--rootdir", str(root)]
sys.exit(pytest.main([*options, *(str(root / "tests" / name) for name in tests)]))
""",
}


def rows():
    """``(change, files)`` of the table."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    found = re.findall(r"^\| ([^|]+) \| (.+) \|$", text, flags=re.MULTILINE)
    return dict(found[found.index(("change", "files")) + 1 :])


def test_each_change_is_made_by_a_test_that_exists():
    changes = {change for change in rows() if not change.startswith("…")}
    assert changes == set(SHOWN)
    assert not [path for path in SHOWN.values() if not (ROOT / path).exists()]


def test_tables_that_the_table_names_are_where_it_says():
    named = re.findall(r"table `([A-Z]+)` \(`([\w/.]+)`\)", " ".join(rows().values()))
    assert {name for name, _ in named} == {"RULES", "ATTACKS", "COMMANDS"}
    for name, path in named:
        body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
        targets = [node.target for node in body if isinstance(node, ast.AnnAssign)]
        targets += [target for node in body if isinstance(node, ast.Assign) for target in node.targets]
        assert name in [target.id for target in targets if isinstance(target, ast.Name)], path


def test_a_rule_an_attack_a_command_and_a_backend_are_found_everywhere(tmp_path):
    for name, content in CONTRIBUTION.items():
        (tmp_path / name).write_text(content.lstrip(), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "made.py"), str(ROOT)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    of_rules = (ROOT / "tests/test_rules.py").read_text(encoding="utf-8").count("(rule, honest")
    assert passed > of_rules > 5, done.stdout


@pytest.mark.parametrize("path", ["feddistill/payload/envelope.py"])
def test_the_payload_version_stands_once(path):
    files = (ROOT / "feddistill").rglob("*.py")
    hits = [
        str(file.relative_to(ROOT)) for file in files if re.search(r"^VERSION = ", file.read_text(), re.M)
    ]
    assert hits == [path]
    assert (
        'refusals.WrongMetadata, "version must be 1, got 2"'
        in (ROOT / SHOWN["a payload version"]).read_text()
    )
