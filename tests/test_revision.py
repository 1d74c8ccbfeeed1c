"""Runs decided anew: the same answers under another rule, another student, a client forgotten or late."""

import json
import shutil
from dataclasses import replace

import pytest
from safetensors.numpy import load_file

from feddistill import payload
from feddistill.config import parse
from feddistill.errors import ConfigError, DataError, PayloadError, RunError
from feddistill.runs import experiment, rerun, verify
from feddistill.store.layout import LEDGER


def settings_of(tiny_settings, **changes):
    return {**tiny_settings, "baselines": ["public_only"], **changes}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs by a name, made once for all tests of this file."""
    return {"folder": tmp_path_factory.mktemp("runs")}


@pytest.fixture
def source(runs, tiny_settings):
    if "source" not in runs:
        runs["source"] = runs["folder"] / "source"
        experiment.run(parse(settings_of(tiny_settings)), runs["source"])
    return runs["source"]


def teachers(out):
    return [
        load_file(path)["log_probs"].tobytes() for path in sorted(out.glob("rounds/*/teacher.safetensors"))
    ]


def files(out):
    """What the run keeps, but for its lock."""
    return {
        str(p.relative_to(out)): p.read_bytes() for p in out.rglob("*") if p.is_file() and p.name != ".lock"
    }


def wrong(findings):
    return [finding.what for finding in findings if not finding.right]


def test_another_rule_is_what_a_run_with_that_rule_makes_of_these_answers(source, tmp_path):
    before = files(source)
    decided = rerun.aggregate(source, tmp_path / "median", ("aggregation.rule=median",))
    assert files(source) == before
    assert [round_["round"] for round_ in decided] == [1, 2]
    assert all(round_["teacher"]["diagnostics"]["teacher_accuracy"] is not None for round_ in decided)
    assert teachers(tmp_path / "median") != teachers(source)
    assert wrong(verify.run(tmp_path / "median", recompute=True)) == []
    same = tmp_path / "same"
    rerun.aggregate(source, same)
    assert teachers(same) == teachers(source)


def test_a_run_decided_anew_goes_on_to_its_student(source, tmp_path):
    out = tmp_path / "median"
    rerun.aggregate(source, out, ("aggregation.rule=median",))
    result = experiment.run(experiment.stored_config(out), out, resume=True)
    assert result["trust"]["rule"] == "median"
    assert [step["command"] for step in result["provenance"]["steps"]] == ["aggregate"]
    student = rerun.distill(out, tmp_path / "student")
    assert student["metrics"]["student"] == result["metrics"]["student"]
    assert [step["command"] for step in student["provenance"]["steps"]] == ["aggregate", "distill"]


def test_another_student_learns_from_the_same_teachers(source, tmp_path):
    out = tmp_path / "small"
    result = rerun.distill(source, out, ("student.model.layers=[0,1]",))
    assert teachers(out) == teachers(source)
    assert "public_only" not in result["metrics"]
    original = json.loads((source / "result.json").read_text())
    assert result["metrics"]["student"] != original["metrics"]["student"]
    assert result["metrics"]["clients"] == original["metrics"]["clients"]
    assert wrong(verify.run(out)) == []


@pytest.mark.parametrize(
    ("codistil", "keep", "baselines"),
    [(True, "last", ["public_only"]), (True, "all", []), (False, "last", [])],
)
def test_forget_equals_a_run_that_never_had_the_client(codistil, keep, baselines, tiny_settings, tmp_path):
    clients = {**tiny_settings["clients"], "codistillation": {"enabled": codistil}}
    settings = settings_of(tiny_settings, clients=clients, keep_checkpoints=keep, baselines=baselines)
    settings["aggregation"] = {"rule": {"kind": "mean_probs", "weights": "class_counts"}, "quorum": 3}
    experiment.run(parse(settings), tmp_path / "source")
    result = rerun.forget(tmp_path / "source", tmp_path / "without", ["client-1"])

    settings["data"] = {**settings["data"], "exclude_clients": ["client-1"]}
    settings["aggregation"]["quorum"] = 2
    never = experiment.run(parse(settings), tmp_path / "never")
    assert teachers(tmp_path / "without") == teachers(tmp_path / "never")
    assert result["metrics"] == never["metrics"]
    assert wrong(verify.run(tmp_path / "without", recompute=True)) == []
    kept = [str(path) for path in (tmp_path / "without").rglob("*") if "client-1" in path.name]
    assert kept == []


def test_who_is_forgotten_must_be_there_and_leave_enough(source, tiny_settings, tmp_path):
    with pytest.raises(ConfigError, match="has no client-7; its clients are client-0, client-1, client-2"):
        rerun.forget(source, tmp_path / "out", ["client-7"])
    rule = {"rule": {"kind": "trimmed_mean", "trim": 1}}
    trimmed = settings_of(tiny_settings, aggregation=rule, baselines=[], rounds=1)
    experiment.run(parse(trimmed), tmp_path / "trimmed")
    with pytest.raises(ConfigError, match="discards all 2 clients"):
        rerun.forget(tmp_path / "trimmed", tmp_path / "out", ["client-0"])
    assert not (tmp_path / "out").exists()


@pytest.fixture
def refused(runs, tiny_settings, monkeypatch):
    """A run that refused a client in its first round, and that client's answer as it should have been."""
    if "refused" not in runs:
        honest = payload.encode

        def damaged(answers, spec, client, shard=0):
            content = honest(answers, spec, client, shard)
            if client != "client-1" or spec.round != 1:
                return content
            good = runs["folder"] / "good"
            good.mkdir()
            (good / "mine.safetensors").write_bytes(content)
            (good / "mine.json").write_bytes(payload.seal(content, spec, client))
            return content[:-1]

        monkeypatch.setattr(payload, "encode", damaged)
        settings = settings_of(tiny_settings, aggregation={"quorum": 2}, baselines=[])
        result = experiment.run(parse(settings), runs["folder"] / "refused")
        assert list(result["refused"]["1"]) == ["client-1"]
        monkeypatch.undo()
        runs["refused"] = runs["folder"] / "refused"
    return runs["refused"], runs["folder"] / "good" / "mine.safetensors"


def test_a_late_answer_is_merged(refused, tmp_path):
    source, late = refused
    (decided, _) = rerun.aggregate(source, tmp_path / "merged", late=[late])
    assert decided["refused"] == {}
    assert set(decided["ledger"]["payloads"]) == {"client-0", "client-1", "client-2"}
    said = json.loads((tmp_path / "merged" / "provenance.json").read_text())
    assert said["steps"][0]["late"] == ["client-1, round 1"]
    assert wrong(verify.run(tmp_path / "merged", recompute=True)) == []
    assert teachers(tmp_path / "merged")[0] != teachers(source)[0]


def test_a_late_answer_passes_every_check(refused, tmp_path):
    source, late = refused
    for change, error in (
        (lambda path: path.write_bytes(b"{}"), "is not an envelope"),
        (lambda path: path.write_text(path.read_text().replace('"round":1', '"round":9')), "does not have"),
        (lambda path: path.write_text(path.read_text().replace("client-1", "client-9")), "UnknownClient"),
    ):
        shutil.copy(late, tmp_path / "x.safetensors")
        shutil.copy(late.with_suffix(".json"), tmp_path / "x.json")
        change(tmp_path / "x.json")
        with pytest.raises(PayloadError, match=error):
            rerun.aggregate(source, tmp_path / "out", late=[tmp_path / "x.safetensors"])
    second = source / "rounds/001/payloads/client-0.safetensors"
    with pytest.raises(PayloadError, match="SecondSubmission"):
        rerun.aggregate(source, tmp_path / "out", late=[second])
    with pytest.raises(RunError, match=r"cannot read .*nothing.json"):
        rerun.aggregate(source, tmp_path / "out", late=[tmp_path / "nothing.safetensors"])
    assert not (tmp_path / "out").exists()


def test_only_what_comes_after_the_answers_can_be_changed(source, tmp_path):
    with pytest.raises(ConfigError, match="rounds=1: this command can only change aggregation"):
        rerun.aggregate(source, tmp_path / "out", ("rounds=1",))
    with pytest.raises(ConfigError, match="this command can only change student, distill, baselines"):
        rerun.distill(source, tmp_path / "out", ("aggregation.rule=median",))
    with pytest.raises(RunError, match="is not a run"):
        rerun.distill(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_that_has_not_decided_everything_is_refused(source, tmp_path):
    shutil.copytree(source, tmp_path / "cut")
    (tmp_path / "cut/records/rounds/002/teacher.json").unlink()
    with pytest.raises(RunError, match="has no teacher of round 2 yet"):
        rerun.aggregate(tmp_path / "cut", tmp_path / "out")


def test_a_clean_run_verifies(source):
    findings = list(verify.run(source, recompute=True))
    assert wrong(findings) == []
    assert sum("client-" in finding.what for finding in findings) == 2 * 3


def damage(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("rounds/001/payloads/client-0.safetensors", "client-0's payload is the one that was counted"),
        ("rounds/002/payloads/client-2.json", "round 2: client-2: "),
        ("rounds/002/teacher.safetensors", "round 2: the teacher is intact"),
        ("rounds/001/feedback.safetensors", "round 1: the feedback sent to clients is intact"),
    ],
)
def test_damage_is_found_where_it_is(name, what, source, tmp_path):
    shutil.copytree(source, tmp_path / "run")
    damage(tmp_path / "run" / name)
    (found,) = wrong(verify.run(tmp_path / "run"))
    assert what in found


def test_answers_in_shards_are_verified_decided_again_and_taken_late(source, tiny_settings, tmp_path):
    settings = settings_of(tiny_settings, baselines=[], payload={"shard_mib": 0.0003})
    out = tmp_path / "sharded"
    experiment.run(parse(settings), out)
    assert teachers(out) == teachers(source)
    assert wrong(verify.run(out, recompute=True)) == []
    mine = tmp_path / "mine"
    mine.mkdir()
    for file in (out / "rounds/001/payloads").glob("client-1.*"):
        shutil.copy(file, mine)
    assert wrong(verify.kept(out, mine)) == []
    damage(mine / "client-1.0002.safetensors")
    assert "is the answer that was counted" in wrong(verify.kept(out, mine))[0]

    shards = sorted((out / "rounds/001/payloads").glob("client-1.*.safetensors"))
    assert len(shards) == 4

    damage(out / "rounds/002/payloads/client-2.0001.safetensors")
    (found,) = wrong(verify.run(out))
    assert "client-2's payload" in found


def test_a_late_answer_in_shards_has_all_of_them(tiny_settings, tmp_path, monkeypatch):
    honest, good = payload.encode, tmp_path / "good"
    good.mkdir()

    def damaged(answers, spec, client, shard=0):
        content = honest(answers, spec, client, shard)
        if client != "client-1" or spec.round != 1:
            return content
        (good / f"{shard}.safetensors").write_bytes(content)
        (good / f"{shard}.json").write_bytes(payload.seal(content, spec, client, shard))
        return content if shard != 3 else content[:-1]

    monkeypatch.setattr(payload, "encode", damaged)
    changes = {"aggregation": {"quorum": 2}, "baselines": [], "payload": {"shard_mib": 0.0003}, "rounds": 1}
    source = tmp_path / "source"
    experiment.run(parse(settings_of(tiny_settings, **changes)), source)
    monkeypatch.undo()
    late = sorted(good.glob("*.safetensors"))
    with pytest.raises(PayloadError, match="shard"):
        rerun.aggregate(source, tmp_path / "out", late=late[:3])
    (decided,) = rerun.aggregate(source, tmp_path / "out", late=late)
    assert set(decided["ledger"]["payloads"]) == {"client-0", "client-1", "client-2"}
    assert wrong(verify.run(tmp_path / "out", recompute=True)) == []


def rewritten(source, out, change):
    """A copy of a run whose ledger was changed and chained anew, as a dishonest server would."""
    shutil.copytree(source, out)
    rounds = json.loads((out / LEDGER).read_text())["rounds"]
    change(rounds)
    entries = []
    for said in rounds:
        previous = entries[-1].head() if entries else ""
        entries.append(replace(payload.Entry(**said), previous=previous))
    told = [
        json.loads(json.dumps(said | {"previous": e.previous}))
        for said, e in zip(rounds, entries, strict=True)
    ]
    (out / LEDGER).write_text(json.dumps({"head": entries[-1].head(), "rounds": told}))
    return out


def test_a_past_that_was_rewritten_is_seen_by_who_kept_the_next_request(source, tmp_path):
    def leave_out(rounds):
        del rounds[0]["payloads"]["client-1"]

    out = rewritten(source, tmp_path / "run", leave_out)
    found = wrong(verify.run(out))
    assert any("the result names the ledger's head" in line for line in found)
    assert any("round 2: the request differs from the request in the ledger" in line for line in found)
    kept = tmp_path / "kept"
    for name in ("rounds/001", "rounds/002"):
        (kept / name).mkdir(parents=True)
        shutil.copy(source / name / "spec.json", kept / name)
        for end in (".json", ".safetensors"):
            shutil.copy(source / name / "payloads" / f"client-1{end}", kept / name)
    assert wrong(verify.kept(source, kept)) == []
    found = wrong(verify.kept(out / LEDGER, kept))
    assert any("was left out: the ledger does not name client-1" in line for line in found)
    assert any("differs from the request in the ledger" in line for line in found)


def test_a_ledger_that_is_none_is_refused(source, tmp_path):
    good = json.loads((source / LEDGER).read_text())
    broken = {
        "its head is not": {**good, "head": "00" * 32},
        "round 1 is missing": {**good, "rounds": good["rounds"][1:]},
        "round 1 follows": {**good, "rounds": [{**good["rounds"][0], "previous": "00" * 32}]},
        "round 2 follows": {**good, "rounds": [{**good["rounds"][0], "teacher": "x"}, good["rounds"][1]]},
        "has no rounds": {"head": "", "rounds": []},
        "ledger:": {"head": "", "rounds": [{"round": "one"}]},
    }
    for message, content in broken.items():
        (tmp_path / LEDGER).write_text(json.dumps(content))
        with pytest.raises(DataError, match=message):
            list(verify.kept(tmp_path / LEDGER, source))
    with pytest.raises(RunError, match="neither a request"):
        list(verify.kept(source, tmp_path))
