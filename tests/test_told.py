"""What clients say beside their payloads: nobody is believed, and nobody can stop a run with it."""

import json
import math
from dataclasses import replace

import pytest
import yaml
from elsewhere_fixtures import NAMES, Elsewhere, institutions, run
from safetensors.numpy import load

from feddistill import payload
from feddistill.config import parse
from feddistill.errors import ConfigError, RoundError, RunError
from feddistill.payload import keys
from feddistill.progress import NoProgress
from feddistill.server import reports
from feddistill.server.clients import instruction_for
from feddistill.store.run_directory import RunDirectory
from feddistill.tasks.session import Session
from feddistill.types import Cost

COUNTS = {"kind": "mean_probs", "weights": "class_counts"}
COST = {"seconds": 1.5, "flops": 7, "peak_memory_bytes": 3}


@pytest.fixture
def brief(tiny_settings):
    """One round; who knows a class speaks for it."""
    return parse(tiny_settings | {"baselines": [], "rounds": 1, "aggregation": {"rule": COUNTS, "quorum": 2}})


def changed(transport, kind, change, client="client-1"):
    """A client says something else to tasks of one kind."""

    def fault(instruction, name):
        if instruction.kind != kind or name != client:
            return None
        reply = transport.own[name].handle(instruction)
        return [replace(reply, content=change(reply.content))]

    return fault


OTHERWISE = {"client": "client-1", "examples": None, "class_counts": [1.0] * 10}


@pytest.mark.parametrize(
    "described",
    [
        {"class_counts": None},
        {"class_counts": ["1"] * 10},
        {"class_counts": [1e39] * 10},
        {"class_counts": [-1.0] * 10},
        {"class_counts": [math.nan] * 10},
        {"class_counts": [1.0] * 9},
        {"client": "client-0"},
        {"client": 1},
        {"client": None},
    ],
    ids=str,
)
def test_a_description_has_one_form(described):
    assert reports.description(OTHERWISE, "client-1", {"class_counts"}, 10) is not None
    assert reports.description(OTHERWISE | described, "client-1", {"class_counts"}, 10) is None


@pytest.mark.parametrize("said", [None, 5, [], "x", {}, {"examples": 3}])
def test_what_is_no_description_is_none(said):
    assert reports.description(said, "client-1", set(), 10) is None


@pytest.mark.parametrize(
    "said",
    [
        None,
        {},
        {"validation": 5},
        {"costs": {}},
        {"costs": {"evaluate": COST}},
        {"costs": {"train": {**COST, "seconds": "x"}}},
        {"costs": {"train": {**COST, "seconds": math.inf}}},
        {"costs": {"train": {**COST, "seconds": math.nan}}},
        {"costs": {"train": {**COST, "flops": -1}}},
        {"costs": {"train": {**COST, "flops": 1.5}}},
        {"costs": {"train": COST}, "validation": {"accuracy": "1"}},
    ],
    ids=str,
)
def test_what_a_training_came_to_has_one_form(said):
    assert reports.training({"costs": {"train": COST}}, metrics=True) == {"costs": {"train": COST}}
    assert reports.training(said, metrics=True) is None


def test_who_describes_itself_or_its_training_otherwise_takes_no_part(brief, tmp_path):
    def counts_otherwise(said):
        return said | {"description": said["description"] | {"class_counts": [1e39] * 10}}

    transport = Elsewhere(tmp_path / "state")
    describes = changed(transport, "describe", counts_otherwise)
    trains = changed(transport, "train", lambda _: {"validation": 5}, "client-2")
    transport.fault = lambda *asked: describes(*asked) or trains(*asked)
    config = brief.model_copy(update={"aggregation": brief.aggregation.model_copy(update={"quorum": 1})})
    assert run(config, tmp_path / "run", transport)["missing"] == {"1": ["client-1", "client-2"]}
    assert "another form" in (tmp_path / "run/federation.jsonl").read_text()


def test_what_is_not_asked_for_is_not_kept():
    said = {
        "costs": {"train": COST, "evaluate": COST},
        "test": {"accuracy": 1.0},
        "loss": [1.0],
        "weights": "",
    }
    assert reports.training(said, metrics=False) == {"costs": {"train": COST, "evaluate": COST}}
    assert reports.training(said, metrics=True)["test"] == {"accuracy": 1.0}
    own = reports.description({"client": "a", "examples": 5, "class_counts": [1, 2]}, "a", {"size"}, 2)
    assert (own.examples, own.class_counts) == (5, None)
    assert reports.description({"client": "a", "examples": 0}, "a", {"size"}, 2) is None
    assert reports.cost({"seconds": True}) == Cost()


@pytest.fixture
def files(tiny_settings, tmp_path):
    """Three institutions."""
    return institutions(parse(tiny_settings), tmp_path / "institutions")


def at_clients(brief, **partition):
    raw = brief.model_dump(mode="json")
    raw["data"]["partition"] = {"kind": "remote", "names": list(NAMES), **partition}
    return parse(raw)


def uploads(run):
    """Of each client in the first round: what it answered, not for which request."""
    return {
        name: load((run / f"rounds/001/payloads/{name}.safetensors").read_bytes())["dense"].tobytes()
        for name in NAMES
    }


def test_a_new_run_answers_with_what_the_institution_has_now(brief, files, tmp_path):
    config, state = at_clients(brief), tmp_path / "state"
    run(config, tmp_path / "first", Elsewhere(state, files))
    texts = files["client-1"].parent / "private.jsonl"
    lines = texts.read_text().splitlines(keepends=True)
    texts.write_text("".join(lines[: len(lines) // 2]))
    run(config, tmp_path / "second", Elsewhere(state, files))
    first, second = uploads(tmp_path / "first"), uploads(tmp_path / "second")
    assert [name for name in NAMES if first[name] != second[name]] == ["client-1"]


def instruction(config, folder, kind="describe"):
    directory = RunDirectory.create(folder, "")
    try:
        from feddistill import data

        splits = data.load(config.data, config.seed)
        return instruction_for(Session(config, splits, directory, NoProgress()), kind, 0)
    finally:
        directory.close()


def test_a_run_goes_on_with_what_it_began_with(brief, files, tmp_path):
    config = at_clients(brief)
    client = Elsewhere(tmp_path / "state", files).own["client-0"]
    asked = instruction(config, tmp_path / "run")
    content = asked.content | {"part": 0, "parts": 1}
    client.handle(replace(asked, kind="publish", content=content, blobs={"part": b""}))
    assert client.handle(asked).content["description"]["class_counts"]
    file, texts = files["client-0"], files["client-0"].parent / "private.jsonl"
    before = file.read_text(), texts.read_text()
    texts.write_text(before[1] + before[1].splitlines()[0] + "\n")
    with pytest.raises(RunError, match="client-0: its texts have changed since this run began"):
        client.handle(asked)
    texts.write_text(before[1])
    model = config.clients.models[0].model_dump(mode="json") | {"max_tokens": 20}
    file.write_text(before[0] + yaml.safe_dump({"model": model}))
    with pytest.raises(RunError, match="client-0: its models have changed since this run began"):
        client.handle(asked)
    file.write_text(before[0])
    assert client.handle(asked).content["description"]["class_counts"]


@pytest.mark.parametrize("execution", ["", "../../elsewhere", "0" * 15, "0" * 17, "A" * 16])
def test_where_a_client_keeps_its_work_is_not_the_servers_to_choose(execution, brief, files, tmp_path):
    asked = instruction(at_clients(brief), tmp_path / "run")
    asked = replace(asked, content=asked.content | {"execution": execution})
    with pytest.raises(ConfigError, match="is not 16 hexadecimal digits"):
        Elsewhere(tmp_path / "state", files).own["client-0"].handle(asked)
    assert not (tmp_path / "state").exists()


class TestKeys:
    """Names that belong to keys."""

    @pytest.fixture
    def public(self, files):
        found = {}
        for name, file in files.items():
            found[name] = keys.make(file.parent / "answers.pem").public
            file.write_text(file.read_text() + "key: answers.pem\n")
        return found

    def test_answers_are_signed_and_nothing_else_is_told(self, brief, files, public, tmp_path):
        result = run(at_clients(brief, keys=public), tmp_path / "run", Elsewhere(tmp_path / "state", files))
        assert result["missing"] == {}
        spec = payload.parse_spec((tmp_path / "run/rounds/001/spec.json").read_bytes())
        assert dict(spec.keys) == public
        for name in NAMES:
            envelope = json.loads((tmp_path / f"run/rounds/001/payloads/{name}.json").read_text())
            assert envelope["signature"]
            record = json.loads((tmp_path / f"run/records/rounds/001/told/{name}.json").read_text())[
                "content"
            ]
            assert set(record) == {"costs"}, "no loss of its texts, no figure"
            assert all(set(cost) == set(COST) for cost in record["costs"].values())

    def test_nobody_answers_in_anothers_name(self, brief, files, public, tmp_path):
        transport = Elsewhere(tmp_path / "state", files)
        # Who calls itself client-1 has its own texts and its own key, not client-1's.
        false = files["client-1"].parent / "false.pem"
        keys.make(false)

        def fault(instruction, name):
            if (instruction.kind, name) != ("answer", "client-1"):
                return None
            reply = transport.own[name].handle(instruction)
            envelope = json.loads(reply.blobs["envelope"])
            signed = envelope | {"signature": keys.load(false).sign(b"whatever")}
            raw = json.dumps(signed, sort_keys=True, separators=(",", ":")).encode()
            return [replace(reply, blobs={**reply.blobs, "envelope": raw})]

        transport.fault = fault
        result = run(at_clients(brief, keys=public), tmp_path / "run", transport)
        assert set(result["refused"]["1"]) == {"client-1"}
        assert "signature" in result["refused"]["1"]["client-1"]

    def test_an_institution_without_its_key_says_so(self, brief, files, public, tmp_path):
        asked = instruction(at_clients(brief, keys=public), tmp_path / "run")
        texts = "source: {kind: files, path: private.jsonl}\n"
        files["client-0"].write_text(texts)
        files["client-1"].write_text(f"{texts}key: other.pem\n")
        keys.make(files["client-1"].parent / "other.pem")
        transport = Elsewhere(tmp_path / "state", files)
        for name, message in (("client-0", "key is missing"), ("client-1", "other.pem is key")):
            client = transport.own[name]
            published = replace(
                asked, kind="publish", content=asked.content | {"part": 0, "parts": 1}, blobs={"part": b""}
            )
            client.handle(published)
            with pytest.raises(ConfigError, match=message):
                client.handle(asked)

    def test_keys_are_of_all_or_of_none(self, brief):
        with pytest.raises(ConfigError, match=r"data\.partition\.keys must name just those .*client-1"):
            at_clients(brief, keys={"client-0": "0" * 64, "client-2": "0" * 64})
        with pytest.raises(ConfigError, match=r"data\.partition\.keys\.client-0: string should match"):
            at_clients(brief, keys=dict.fromkeys(NAMES, "short"))


def test_a_quorum_too_small_for_the_rule_is_refused(tiny_settings):
    partition = {**tiny_settings["data"]["partition"], "clients": 5}
    raw = tiny_settings | {"data": {**tiny_settings["data"], "partition": partition}}
    for aggregation in (
        {"rule": {"kind": "krum", "byzantine": 1}, "quorum": 4},
        {"rule": {"kind": "trimmed_mean", "trim": 2}, "quorum": 4},
        {"rule": {"kind": "cronus", "byzantine": 2}, "quorum": 3},
        {"nnm_byzantine": 2, "quorum": 4},
    ):
        with pytest.raises(ConfigError, match=r"aggregation\.quorum = \d is too few: aggregation\."):
            parse(raw | {"aggregation": aggregation})
        parse(raw | {"aggregation": aggregation | {"quorum": 5}})


def test_a_round_of_too_few_for_the_rule_stops_the_run(brief, tmp_path, monkeypatch):
    monkeypatch.setattr(
        type(brief.aggregation), "fits", lambda self, clients: _too_few() if clients == 2 else None
    )
    transport = Elsewhere(tmp_path / "state")
    transport.fault = lambda instruction, name: (
        [] if (instruction.kind, name) == ("answer", "client-1") else None
    )
    config = brief.model_copy(update={"aggregation": brief.aggregation.model_copy(update={"quorum": 1})})
    with pytest.raises(RoundError, match="round 1: 2 valid answers: too few for the rule"):
        run(config, tmp_path / "run", transport)


def _too_few():
    raise ConfigError("too few for the rule")
