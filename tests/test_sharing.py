"""What runs of a study have in common is done once, and is what each would have done."""

import json

import pytest
import yaml

from feddistill import config
from feddistill.config import parse
from feddistill.runs import experiment, study, trained_models
from feddistill.store import layout
from feddistill.store.run_directory import RunDirectory, read_object
from feddistill.tasks import step_cache
from feddistill.tasks.learner import Learner

CHANGED = {
    "rounds": 2,
    "baselines": ["public_only", "fedmd"],
    "payload.codec": "topk",
    "payload.k": 2,
    "aggregation.rule": "median",
    "distill.kind": "jsd",
    "distill.temperature": 3,
    "distill.kd_weight": 0.9,
    "distill.teacher_history": 1,
    "clients.codistillation.examples": 10,
    "fedmd.digest_epochs": 2,
    "keep_checkpoints": "all",
}
"""Of which neither shared step may depend."""
OF_STUDENT = {"student.training.epochs": 2}
OF_CLIENTS = {"clients.training.epochs": 3, "data.partition.alpha": 100, "clients.evaluate": False}


def settings(tiny_settings, **changes):
    base = {
        **json.loads(json.dumps(tiny_settings)),
        "rounds": 1,
        "baselines": ["public_only"],
        "keep_checkpoints": "all",
    }
    for name, value in changes.items():
        config.override(base, f"{name}={yaml.safe_dump(value, default_flow_style=True).splitlines()[0]}")
    return parse(base)


def done(out, beginning):
    """Weights' digests and figures of the steps whose names begin so."""
    found = {}
    for path in sorted((out / "records" / beginning).glob("*.json")):
        record = read_object(path)
        figures = {key: record["content"].get(key) for key in ("validation", "test")}
        found[path.stem] = (record["files"], figures, record["content"]["costs"]["train"]["flops"])
    return found


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return tmp_path_factory.mktemp("first")


@pytest.fixture
def whole(first, tiny_settings):
    """A run by itself, and one that left what it has for others."""
    if not (first / "alone").exists():
        experiment.run(settings(tiny_settings), first / "alone")
        experiment.run(settings(tiny_settings), first / "giving", shared=first / "shared")
    return first


def test_giving_changes_nothing(whole):
    for beginning in ("alone/001", "baselines/public_only"):
        assert done(whole / "giving", beginning) == done(whole / "alone", beginning)


class FarEnoughError(Exception):
    """What is to be compared is done."""


@pytest.mark.parametrize(
    ("beginning", "more", "last"),
    [
        ("alone/001", OF_STUDENT, layout.teacher(1)),
        ("baselines/public_only", OF_CLIENTS, layout.method("public_only")),
    ],
)
def test_a_shared_step_does_not_depend_on_what_differs(
    beginning, more, last, whole, tiny_settings, tmp_path, monkeypatch
):
    """Run without anything to take over, with all of it changed: every bit of the step is the same."""
    rounds = {} if beginning == "alone/001" else {"rounds": 1}  # the server alone has as many segments
    changed = settings(tiny_settings, **{**CHANGED, **more, **rounds})
    commit = RunDirectory.commit

    def until_last(self, step, *content):
        record = commit(self, step, *content)
        if step == last:
            raise FarEnoughError
        return record

    monkeypatch.setattr(RunDirectory, "commit", until_last)
    with pytest.raises(FarEnoughError):
        experiment.run(changed, tmp_path / "other")
    assert done(tmp_path / "other", beginning) == done(whole / "alone", beginning)
    plain = settings(tiny_settings)
    (independent,) = [names for start, names in step_cache.INDEPENDENT.items() if start.startswith(beginning)]
    assert step_cache.key(changed, independent) == step_cache.key(plain, independent)


def test_what_is_there_is_taken_over(whole, tiny_settings, tmp_path, monkeypatch):
    fitted = []
    fit = Learner.fit

    def counted(learner, *args, **more):
        fitted.append(learner.name)
        return fit(learner, *args, **more)

    monkeypatch.setattr(Learner, "fit", counted)
    other = settings(tiny_settings, **{"distill.temperature": 4})
    result = experiment.run(other, tmp_path / "taking", shared=whole / "shared")
    assert fitted == ["student.model"]
    by_itself = experiment.run(other, tmp_path / "itself")
    assert result["metrics"] == by_itself["metrics"]
    assert result["bytes"] == by_itself["bytes"]


def test_another_seed_is_another_step(whole, tiny_settings, tmp_path):
    experiment.run(settings(tiny_settings, seed=5), tmp_path / "seed", shared=whole / "shared")
    own, other = (done(out, "alone/001") for out in (whole / "alone", tmp_path / "seed"))
    assert own.keys() == other.keys()
    assert all(own[step][0] != other[step][0] for step in own)


def test_a_damaged_step_is_not_taken_over(whole, tiny_settings, tmp_path):
    sources = [path for path in (whole / "shared").rglob("*.safetensors") if "alone" in str(path)]
    damaged = tmp_path / "shared"
    for path in sources:
        place = damaged / path.relative_to(whole / "shared")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(path.read_bytes()[:-1])
    for path in (whole / "shared").rglob("*"):
        place = damaged / path.relative_to(whole / "shared")
        if path.is_file() and not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
    with pytest.raises(experiment.RunError, match="missing or damaged"):
        experiment.run(settings(tiny_settings), tmp_path / "run", shared=damaged)


def test_a_study_may_leave_no_weights(whole, tiny_settings, tmp_path):
    run = tmp_path / "run"
    kept = {"rounds": 2, "keep_checkpoints": "none", "distill.rollback": False}
    result = experiment.run(settings(tiny_settings, **kept), run, shared=whole / "shared")
    assert result["status"] == "complete"
    for place in ("alone", "baselines", "rounds/*/specialists", "rounds/*/student.safetensors"):
        assert not list(run.glob(place)), place
    assert list(run.glob("rounds/002/payloads/*.safetensors"))
    for ask in (experiment.evaluate, trained_models.load):
        with pytest.raises(experiment.RunError, match=r"has no stored weights: .* keep_checkpoints: none"):
            ask(run)


def test_a_study_leaves_nothing_shared_when_all_is_done(tiny_settings, tmp_path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump({**tiny_settings, "rounds": 1, "baselines": []}))
    content = {"name": "two", "base": "base.yaml", "grid": {"distill.temperature": [1, 2]}, "seeds": [0]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    chosen = study.load(tmp_path / "study.yaml")
    assert study.sweep(chosen, tmp_path / "out") == {}
    assert not (tmp_path / "out" / study.SHARED).exists()
    first, second = (tmp_path / "out/cells" / cell.name for cell in study.cells(chosen))
    assert done(first, "alone/001") == done(second, "alone/001")
    record = "records/alone/001/client-0.json"
    costs = [read_object(out / record)["content"]["costs"] for out in (first, second)]
    assert costs[0] == costs[1]  # seconds too: it ran once
