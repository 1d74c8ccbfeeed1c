"""Whole runs: the same numbers again, after any kill, with a client refused."""

import json
import re
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from feddistill import config as configuration
from feddistill import payload, training
from feddistill.cli import main
from feddistill.config import parse
from feddistill.errors import ConfigError, FeddistillError, ModelError, RoundError, RunError
from feddistill.runs import experiment
from feddistill.server import rounds
from feddistill.store import layout
from feddistill.store.run_directory import RunDirectory

VARIES = {"seconds", "peak_memory_bytes", "environment"}


def outcome(result):
    """What must be equal in equal runs."""
    return {key: value for key, value in result.items() if key not in VARIES}


@pytest.fixture(scope="module")
def whole(tiny_model, tmp_path_factory):
    """An uninterrupted run, once for all tests of this file."""
    return {}


@pytest.fixture
def finished(whole, tiny_config, tmp_path_factory):
    if "out" not in whole:
        out = tmp_path_factory.mktemp("whole") / "run"
        whole["result"], whole["out"] = experiment.run(tiny_config, out), out
    return whole


def test_the_result_is_a_stable_interface(finished):
    result = json.loads((finished["out"] / "result.json").read_text())
    assert result == finished["result"]
    assert result["status"] == "complete"
    assert {"seed", "rounds", "config_digest", "metrics", "bytes", "flops", "seconds"} <= set(result)
    metrics = result["metrics"]
    for figures in (metrics["student"], metrics["public_only"], metrics["centralized"]):
        assert {"accuracy", "macro_f1"} <= set(figures)
    for figures in (metrics["local_only"]["mean"], metrics["local_only"]["best"]):
        assert {"accuracy", "macro_f1"} <= set(figures)
    assert {"uplink", "downlink", "proxy"} <= set(result["bytes"])
    assert result["seconds"]["total"] > 0
    assert all(isinstance(flops, int) for flops in result["flops"].values())


def test_uploads_are_counted_as_they_lie_on_disk(finished):
    payloads = [
        p for p in finished["out"].glob("rounds/*/payloads/*") if p.suffix in (".safetensors", ".json")
    ]
    assert len(payloads) == 2 * 2 * 3
    on_disk = sum(path.stat().st_size for path in payloads)
    traffic = finished["result"]["bytes"]
    assert traffic["uplink"] - traffic["descriptions"] == on_disk


def test_another_seed_gives_another_run(finished, tiny_settings, tmp_path):
    other = experiment.run(parse({**tiny_settings, "seed": 1, "baselines": []}), tmp_path / "other")
    assert other["metrics"]["student"] != finished["result"]["metrics"]["student"]


INTERRUPTED = """
import gc, json, os, resource, signal, sys
from pathlib import Path
import flwr_datasets.partitioner, sklearn.metrics, torch._dynamo
from feddistill import training
from feddistill.config import load
from feddistill.errors import RunError
from feddistill.modelio import inference
from feddistill.runs import experiment
from feddistill.server import rounds
from feddistill.training import trainer

gc.freeze()  # what a run imports late is imported above, once and not by each process
config, out = load(Path(sys.argv[1])), Path(sys.argv[2])


def fill_the_disk():
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


def kill(module, name, count):
    original, calls = getattr(module, name), 0

    def deadly(*args, **kwargs):
        nonlocal calls
        calls += 1
        done = original(*args, **kwargs)
        if calls < count:
            return done
        os.kill(os.getpid(), signal.SIGKILL)  # the work is done, and nothing of it written

    setattr(module, name, deadly)


# In a round of three clients, fit is called for each of them and then for the student; answer is called
# twice to evaluate each of them, and once for each client's answers.
stops = {
    "full disk": fill_the_disk,
    "specialist training": lambda: kill(training, "fit", 2),  # round 1, second client
    "answering": lambda: kill(inference, "answer", 17),  # round 2, second client
    "aggregation": lambda: kill(rounds, "diagnose", 1),  # round 2
    "distillation": lambda: kill(training, "fit", 1),  # round 2, the student
}
for phase, prepare in stops.items():
    if not os.fork():
        prepare()
        try:
            experiment.run(config, out, resume=out.exists())
        except RunError as error:
            sys.exit(error.args[0])
        sys.exit()
    status = os.waitstatus_to_exitcode(os.wait()[1])
    files = [str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()]
    print(json.dumps([phase, status, files]))
"""


@pytest.fixture
def interrupted(whole, tiny_file, tmp_path_factory):
    """A run in one process after the other: the first had a full disk, the others were killed."""
    if "interrupted" not in whole:
        out = tmp_path_factory.mktemp("interrupted") / "run"
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", INTERRUPTED, str(tiny_file), str(out)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        phases = {phase: stop for phase, *stop in map(json.loads, done.stdout.splitlines())}
        whole["interrupted"] = out, phases, done.stderr
    return whole["interrupted"]


DONE_AND_LOST = {
    "specialist training": ("records/alone/001/client-0.json", "records/alone/001/client-1.json"),
    "answering": ("rounds/002/payloads/client-0.json", "rounds/002/payloads/client-1.json"),
    "aggregation": ("rounds/002/payloads/client-2.json", "records/rounds/002/teacher.json"),
    "distillation": ("records/rounds/002/teacher.json", "records/rounds/002/student.json"),
}


def test_a_killed_run_resumes_to_the_same_numbers(interrupted, finished, tiny_config):
    out, phases, errors = interrupted
    for phase, (last, lost) in DONE_AND_LOST.items():
        status, files = phases[phase]
        assert status == -signal.SIGKILL, errors
        assert last in files, phase
        assert lost not in files, phase
    assert not (out / "result.json").exists()
    resumed = experiment.run(tiny_config, out, resume=True)
    assert outcome(resumed) == outcome(finished["result"])
    for path in finished["out"].glob("rounds/*/payloads/*.safetensors"):
        assert path.read_bytes() == (out / path.relative_to(finished["out"])).read_bytes()


def test_a_full_disk_is_one_clear_error(interrupted):
    """A limit on file size stands for a full disk: writing a model's weights fails half-way."""
    _, phases, errors = interrupted
    status, files = phases["full disk"]
    assert status == 1
    assert "cannot write" in errors
    assert ".safetensors" in errors
    assert not [path for path in files if path.endswith((".safetensors", ".partial"))]


def test_a_finished_run_is_returned_as_it_is(finished, tiny_config):
    assert experiment.run(tiny_config, finished["out"], resume=True) == finished["result"]


@pytest.mark.parametrize(("rollback", "start"), [(True, "best"), (False, "last")])
def test_the_student_goes_on_from_its_best_round_or_its_last(rollback, start, tiny_settings):
    server = object.__new__(rounds._Server)
    server.session = SimpleNamespace(config=parse(tiny_settings | {"distill": {"rollback": rollback}}))
    server.best, server.last = "best", "last"
    assert server._start() == start


def test_what_clients_are_sent_is_counted(finished):
    """A request in each round, and the teacher of each round but the last, which has no next one."""
    requests = [(finished["out"] / layout.request(number)).stat().st_size for number in (1, 2)]
    feedback = sum(file.stat().st_size for file in finished["out"].glob("rounds/001/feedback.*"))
    first, last = (set(sent["downlink"].values()) for sent in finished["result"]["bytes"]["by_round"])
    assert feedback > 0
    assert (first, last) == ({requests[0] + feedback}, {requests[1]})


def test_settings_do_not_change_under_a_run(finished, tiny_settings):
    changed = parse({**tiny_settings, "distill": {"temperature": 3.0}})
    with pytest.raises(ConfigError, match=r"was started with another distill\.temperature"):
        experiment.run(changed, finished["out"], resume=True)


def test_a_run_in_the_way_is_left_alone(finished, tiny_config):
    with pytest.raises(RunError, match="already exists"):
        experiment.run(tiny_config, finished["out"])


def test_the_student_can_be_evaluated_again(finished):
    figures = experiment.evaluate(finished["out"])
    assert figures["accuracy"] == finished["result"]["metrics"]["student"]["accuracy"]


def corrupting(victim):
    """Uploads of ``victim`` arrive with one byte changed."""
    original = payload.admit

    def admit(envelope, content, *asked, **more):
        if victim.encode() in envelope:
            content = content[:-1] + bytes([content[-1] ^ 1])
        return original(envelope, content, *asked, **more)

    return admit


def test_a_corrupted_payload_is_refused_and_the_round_goes_on(tiny_settings, tmp_path, monkeypatch):
    monkeypatch.setattr(payload, "admit", corrupting("client-1"))
    settings = {**tiny_settings, "baselines": [], "aggregation": {"quorum": 2}}
    result = experiment.run(parse(settings), tmp_path / "run")
    assert result["status"] == "complete"
    assert set(result["refused"]) == {"1", "2"}
    assert "client-1" in result["refused"]["1"]["client-1"]
    assert [set(t["agreement"]) for t in result["teacher"]] == [{"client-0", "client-2"}] * 2


def test_a_refused_client_takes_no_class_with_it(tiny_settings, tmp_path, monkeypatch):
    """Whoever alone has seen a class may be refused: the others' answers to it count then."""
    monkeypatch.setattr(payload, "admit", corrupting("client-1"))
    data = {**tiny_settings["data"], "partition": {"kind": "dirichlet", "clients": 3, "alpha": 0.05}}
    data["partition"]["min_examples"] = 20
    rule = {"rule": {"kind": "mean_probs", "weights": "class_counts"}, "quorum": 2}
    settings = {**tiny_settings, "data": data, "baselines": [], "aggregation": rule}
    result = experiment.run(parse(settings), tmp_path / "run")
    assert all(0 < t["mass"] < 10 for t in result["teacher"])


def test_a_training_that_diverges_is_named(tiny_settings, tmp_path):
    student = {**tiny_settings["student"], "training": {"learning_rate": 1e30, "epochs": 1}}
    with pytest.raises(ModelError, match=r"student.*: training diverged"):
        experiment.run(parse({**tiny_settings, "student": student, "baselines": []}), tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"payload": {"codec": "topk", "k": 11}}, r"payload\.k = 11, but there are only 10 classes"),
        ({"aggregation": {"rule": {"kind": "trimmed_mean", "trim": 2}}}, r"trim = 2 discards all 3 clients"),
        (
            {"student": {"model": {"source": {"kind": "package", "package": "absent"}}}},
            r"'absent' is not installed",
        ),
    ],
)
def test_what_cannot_run_is_refused_before_anything_is_written(change, message, tiny_settings, tmp_path):
    with pytest.raises(FeddistillError, match=message):
        experiment.run(parse({**tiny_settings, **change}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_public_only_without_labels_is_refused_before_any_training(tiny_settings, tmp_path):
    data = {**tiny_settings["data"], "proxy": {"size": 120, "labelled": 0}}
    with pytest.raises(ConfigError, match=r"public_only needs labels, but data\.proxy\.labelled is 0"):
        experiment.run(parse({**tiny_settings, "data": data}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_that_change_under_a_run_are_noticed(finished, tmp_path):
    shutil.copytree(finished["out"], tmp_path / "copy")
    digests = json.loads((tmp_path / "copy/data/digests.json").read_text())
    (tmp_path / "copy/data/digests.json").write_text(json.dumps({**digests, "data.test": "other"}))
    with pytest.raises(RunError, match=r"data\.test is not what .* was started with: the data have changed"):
        experiment.evaluate(tmp_path / "copy")


def test_too_few_answers_stop_the_run_where_it_can_resume(tiny_settings, tmp_path, monkeypatch):
    config = parse({**tiny_settings, "baselines": []})
    with monkeypatch.context() as patched:
        patched.setattr(payload, "admit", corrupting("client-1"))
        with pytest.raises(RoundError, match=r"round 1: 2 valid answers, quorum 3: .*client-1"):
            experiment.run(config, tmp_path / "run")
    assert experiment.run(config, tmp_path / "run", resume=True)["refused"] == {}


@pytest.mark.parametrize("codistillation", [{"enabled": False}, {"target": "soft", "examples": None}])
def test_codistillation_has_its_variants(codistillation, tiny_settings, tmp_path):
    clients = {**tiny_settings["clients"], "codistillation": codistillation}
    result = experiment.run(parse({**tiny_settings, "clients": clients, "baselines": []}), tmp_path / "run")
    assert (result["bytes"]["downlink"] > 5000) == codistillation.get("enabled", True)


def test_the_last_teachers_are_replayed_in_as_many_steps(tiny_settings, tmp_path, monkeypatch):
    taught, fitted = [], training.fit

    def seen(model, lessons, *args, **more):
        if lessons.teacher is not None:  # the student: clients take the teacher's first choices for labels
            count = len(lessons.tokens)
            taught.append((count, lessons.teacher[torch.arange(count)], more["steps"]))
        return fitted(model, lessons, *args, **more)

    monkeypatch.setattr(training, "fit", seen)
    settings = {**tiny_settings, "rounds": 3, "baselines": [], "distill": {"teacher_history": 1}}
    experiment.run(parse(settings), tmp_path / "run")
    rounds = tmp_path / "run" / "rounds"
    teachers = [load_file(rounds / f"00{n}" / "teacher.safetensors")["log_probs"] for n in (1, 2, 3)]
    assert [count for count, _, _ in taught] == [120, 240, 240]
    assert torch.equal(taught[1][1], torch.cat([teachers[1], teachers[0]]))
    assert torch.equal(taught[2][1], torch.cat([teachers[2], teachers[1]]))
    assert len({steps for _, _, steps in taught}) == 1


ONE_OF_EACH = [
    ({"codec": "topk", "k": 3}, "mean_logits"),
    ({"codec": "threshold", "k": 6, "epsilon": 0.05, "compression": "zstd"}, "median"),
    ({"codec": "sampled", "samples": 5}, {"kind": "mean_probs", "weights": "size"}),
    ({}, "trimmed_mean"),
    ({}, {"kind": "mean_probs", "weights": "class_counts"}),
]


@pytest.mark.parametrize(("codec", "rule"), ONE_OF_EACH, ids=str)
def test_every_codec_rule_and_weighting_carries_a_run(codec, rule, tiny_settings, tmp_path):
    data = {**tiny_settings["data"], "histogram_epsilon": 1.0}
    changes = {"data": data, "payload": codec, "aggregation": {"rule": rule}, "rounds": 1, "baselines": []}
    result = experiment.run(parse({**tiny_settings, **changes}), tmp_path / "run")
    assert result["status"] == "complete"
    assert result["refused"] == {}


def test_old_checkpoints_are_tidied_and_the_student_kept(finished):
    out = finished["out"]
    assert not (out / "alone").exists()
    assert (out / finished["result"]["student_weights"]).is_file()
    assert (out / "rounds/002/specialists/client-0.safetensors").is_file()
    RunDirectory.open(out).close()


def test_an_edited_configuration_is_noticed_by_whatever_reads_the_run(tiny_settings, tmp_path):
    out = tmp_path / "run"
    experiment.run(parse(tiny_settings | {"rounds": 1, "baselines": []}), out)
    path = out / "config.yaml"
    honest = path.read_text()
    path.write_text(f"# read by nobody\n{honest}")
    assert configuration.load_stored(path).rounds == 1
    path.write_text(honest.replace("temperature: ", "temperature: 1"))
    words = r"config\.yaml was edited after the run was started: distill\.temperature; undo it, or start"
    for command in (
        ["train", "--resume", "--out"],
        ["evaluate"],
        ["compare"],
        ["report"],
        ["verify", "--recompute"],
    ):
        done = CliRunner().invoke(main, [*command, str(out)])
        assert done.exit_code == 2, command
        assert re.search(words, done.stderr.strip()), command
