"""The table of mutants fits the tree, and what `make mutants` refuses; no mutant is run here."""

import json

import pytest
from mutants import __main__ as runner


def test_mutants_and_their_areas_fit_the_tree():
    runner.check(runner.mutants(), runner.areas(), runner.ROOT)


def test_the_score_before_is_of_mutants_of_the_table():
    before = json.loads((runner.TABLE.parent / "before.json").read_text())
    assert set(before["mutants"]) <= {mutant.name for mutant in runner.mutants()}


@pytest.mark.parametrize(
    ("content", "tests", "message"),
    [
        (None, {"a": ["here.py"]}, "mutant m is stale: there is no code.py"),
        ("x < 2", {"a": ["here.py"]}, "mutant m is stale: its old text occurs 0 times in code.py"),
        ("x < 1; x < 1", {"a": ["here.py"]}, "mutant m is stale: its old text occurs 2 times in code.py"),
        ("x < 1", {"b": ["here.py"]}, "mutant m: docs/testing.md has no tests of the area a"),
        ("x < 1", {"a": ["there.py"]}, "docs/testing.md, a: there is no there.py"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(content, tests, message, tmp_path):
    (tmp_path / "here.py").touch()
    if content is not None:
        (tmp_path / "code.py").write_text(content)
    mutant = runner.Mutant("m", "a", "code.py", "x < 1", "x <= 1", "")
    with pytest.raises(runner.Wrong, match=message):
        runner.check([mutant], tests, tmp_path)


def test_only_a_mutant_that_was_killed_can_be_lost():
    survived = runner.Outcome(False, "", 1.0)
    now = {"a": survived, "b": survived, "c": runner.Outcome(True, "t", 1.0), "new": survived}
    before = {"a": {"killed": True, "by": "t"}, "b": {"killed": False}, "c": {"killed": True}}
    assert runner.lost(now, before) == ["lost: a, which was killed by t"]
