"""Settings that were renamed: refused where a user writes them, read where a run has stored them."""

from pathlib import Path

import pytest
import yaml

from feddistill.config import as_stored, digest, load, load_stored, parse, parse_stored
from feddistill.config.renamed import RENAMED, with_new_names, with_old_names
from feddistill.errors import ConfigError

RECORDED = Path(__file__).parent / "recorded_run" / "run" / "config.yaml"
DIGEST = "75e37dfa342eb8e68871dd5874f66481"
"""The ``config_digest`` in the recorded run's result."""


def nested(path, value):
    *groups, last = path.split(".")
    made = {last: value}
    for name in reversed(groups):
        made = {name: made}
    return made


CASES = [
    (entry.old, old, entry.new, new) for entry in RENAMED for old, new in (entry.values or {1: None}).items()
]


@pytest.mark.parametrize(("old", "value", "new", "now"), CASES, ids=str)
def test_an_old_name_is_refused_with_the_new_one(old, value, new, now, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(nested(old, value)))
    expected = f"{old} is now called {new}"
    if now is not None:
        expected = f"{old} = {value} is now {new} = {str(now).lower() if isinstance(now, bool) else now}"
    with pytest.raises(ConfigError) as error:
        load(path)
    assert str(error.value) == expected
    with pytest.raises(ConfigError):
        load(None, (f"{old}={value}",))
    with pytest.raises(ConfigError):
        parse(nested(old, value))


def test_the_names_of_a_stored_run_stay(tmp_path):
    stored = load_stored(RECORDED)
    assert digest(stored) == DIGEST
    assert as_stored(stored) == yaml.safe_load(RECORDED.read_text())
    assert stored.distill.teacher_history  # read, not left at the default
    assert stored.data.exclude_clients
    copied = stored.model_copy(update={"seed": 7})  # as methods do for a run within a run
    assert "replay" in as_stored(copied)["distill"]
    sent = parse_stored(as_stored(stored))
    assert digest(sent) == DIGEST


def test_a_derived_run_has_the_new_names():
    derived = load_stored(RECORDED, ("aggregation.sharpen=2",))
    assert "teacher_history" in as_stored(derived)["distill"]
    with pytest.raises(ConfigError, match=r"distill\.replay is now called distill\.teacher_history"):
        load_stored(RECORDED, ("distill.replay=1",))


def test_renaming_and_back_is_the_identity():
    settings = parse({"task": "question_answering", "distill": {"rollback": False}}).model_dump(mode="json")
    old = with_old_names(settings)
    assert old["task"] == "reading"
    assert old["distill"]["accept"] == "always"
    assert "question_answering" not in old
    assert with_new_names(old) == settings
