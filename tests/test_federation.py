"""Clients that are elsewhere: the same bytes, and what becomes of a run when they fail."""

import json
from dataclasses import replace

import pytest
import torch
from elsewhere_fixtures import NAMES, RETRY_POLICY, Elsewhere, decided, run
from safetensors.torch import load, save

from feddistill import data, payload
from feddistill.client.in_process import LocalTransport
from feddistill.config import parse
from feddistill.engines.remote import RemoteClient
from feddistill.errors import ConfigError, ModelError, RoundError
from feddistill.federation.journal import EVENT_COUNTS
from feddistill.federation.protocol import Reply
from feddistill.methods.averaging import averaged
from feddistill.runs import experiment
from feddistill.server.clients import instruction_for
from feddistill.store.layout import EVENTS
from feddistill.store.run_directory import RunDirectory
from feddistill.tasks.session import Average, Engine, Session
from feddistill.types import Cost


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def config(tiny_settings):
    return parse(tiny_settings | {"baselines": [], "aggregation": {"quorum": 2}})


@pytest.fixture
def brief(config):
    """One round, where a second would show nothing new."""
    return parse(config.model_dump(mode="json") | {"rounds": 1})


@pytest.fixture
def brief_local(brief, runs):
    if not (runs / "brief").exists():
        experiment.run(brief, runs / "brief")
    return runs / "brief"


@pytest.fixture
def local(config, runs):
    if not (runs / "local").exists():
        experiment.run(config, runs / "local")
    return runs / "local"


def test_clients_elsewhere_give_what_clients_here_give(config, local, tmp_path):
    run(config, tmp_path / "run", Elsewhere(tmp_path / "state"))
    assert decided(tmp_path / "run") == decided(local)
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == list(NAMES)


@pytest.fixture
def shards(config):
    """Answers that are four messages."""
    raw = config.model_dump(mode="json")
    return parse(raw | {"payload": raw["payload"] | {"shard_mib": 0.0003}})


@pytest.fixture
def brief_shards(shards):
    return parse(shards.model_dump(mode="json") | {"rounds": 1})


@pytest.fixture
def sharded(shards, runs):
    if not (runs / "sharded").exists():
        experiment.run(shards, runs / "sharded")
    return runs / "sharded"


def test_large_answers_travel_in_shards(shards, sharded, local, tmp_path):
    transport = Elsewhere(tmp_path / "state")
    run(shards, tmp_path / "run", transport)
    found = decided(tmp_path / "run")
    assert found == decided(sharded)
    for client in NAMES:
        assert transport.asked.count(("answer", 1, client)) == 4
        assert transport.asked.count(("digest", 1, client)) == 4
        assert len(list((sharded / "rounds/001/payloads").glob(f"{client}.*.safetensors"))) == 4
    whole = decided(local)
    assert found["result"]["metrics"] == whole["result"]["metrics"]
    for one, other in zip(found["ledger"]["rounds"], whole["ledger"]["rounds"], strict=True):
        assert one["teacher"] == other["teacher"]


def test_shards_that_came_are_not_asked_for_again(shards, sharded, tmp_path):
    transport = Elsewhere(tmp_path / "state")

    def die(instruction, name):
        if instruction.kind == "answer" and name == "client-1" and instruction.content["shard"] == 2:
            raise KeyboardInterrupt

    transport.fault = die
    with pytest.raises(KeyboardInterrupt):
        run(shards, tmp_path / "run", transport)
    transport = Elsewhere(tmp_path / "state")
    run(shards, tmp_path / "run", transport, resume=True)
    assert decided(tmp_path / "run") == decided(sharded)
    again = [name for kind, number, name in transport.asked if (kind, number) == ("answer", 1)]
    assert again == ["client-1", "client-2", *NAMES]  # client-0 had sent the third


@pytest.mark.parametrize("lacks", [1, 3])
def test_a_client_that_does_not_send_every_shard_has_not_answered(lacks, brief_shards, tmp_path):
    transport = Elsewhere(tmp_path / "state")
    transport.fault = lambda instruction, name: (
        []
        if name == "client-1" and instruction.kind == "answer" and instruction.content["shard"] == lacks
        else None
    )
    result = run(brief_shards, tmp_path / "run", transport)
    assert result["missing"] == {"1": ["client-1"]}
    last = [
        instruction
        for instruction in transport.asked
        if instruction[0] == "answer" and instruction[2] == "client-1"
    ]
    assert len(last) == lacks + RETRY_POLICY.attempts  # the shards behind it are not asked for


def test_one_shard_that_is_refused_refuses_the_answer(brief_shards, tmp_path):
    transport = Elsewhere(tmp_path / "state")

    def other(instruction, name):
        if instruction.kind != "answer" or name != "client-1" or instruction.content["shard"] != 2:
            return None
        swapped = transport.own[name].handle(replace(instruction, content=instruction.content | {"shard": 1}))
        return [replace(swapped, content=swapped.content | {"shard": 2})]

    transport.fault = other
    result = run(brief_shards, tmp_path / "run", transport)
    assert "sequence" in result["refused"]["1"]["client-1"]
    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert ledger["rounds"][0]["refused"] == {"client-1": "MalformedEnvelope"}


def test_an_answer_in_the_name_of_another_is_refused(brief, tmp_path):
    transport = Elsewhere(tmp_path / "state")

    def other(instruction, name):
        if instruction.kind == "answer" and name == "client-1":
            return [replace(transport.own["client-2"].handle(instruction), client="client-1")]
        return None

    transport.fault = other
    result = run(brief, tmp_path / "run", transport)
    assert list(result["refused"]["1"]) == ["client-1"]
    assert "must be client-1, got client-2" in result["refused"]["1"]["client-1"]


def once(kind, name, *replies):
    """The first time that ``name`` is asked for ``kind`` something else comes back."""
    left = [replies]

    def fault(instruction, asked):
        return left.pop() if left and instruction.kind == kind and asked == name else None

    return fault


@pytest.mark.parametrize("kind", ["describe", "train", "answer"])
@pytest.mark.parametrize("replies", [(), (Reply("client-1", error="OSError"),)], ids=["silent", "an error"])
def test_who_fails_once_is_asked_again(kind, replies, brief, brief_local, tmp_path):
    transport = Elsewhere(tmp_path / "state")
    transport.fault = once(kind, "client-1", *replies)
    run(brief, tmp_path / "run", transport)
    assert decided(tmp_path / "run") == decided(brief_local)


def test_replies_that_come_twice_or_for_another_are_dropped(brief, brief_local, tmp_path):
    transport = Elsewhere(tmp_path / "state")

    def twice(instruction, name):
        if instruction.kind != "train":
            return None
        reply = transport.own[name].handle(instruction)
        return [reply, reply, Reply("nobody", {"test": {"accuracy": 2.0}})]

    transport.fault = twice
    run(brief, tmp_path / "run", transport)
    assert decided(tmp_path / "run") == decided(brief_local)
    events = [json.loads(line) for line in (tmp_path / "run" / EVENTS).read_text().splitlines()]
    assert sum(event["event"] == "dropped" for event in events) == 2 * 3


def test_a_round_goes_on_without_a_client_and_takes_it_back_in(config, tmp_path):
    transport = Elsewhere(tmp_path / "state")
    transport.fault = lambda instruction, name: (
        [Reply(name, error="MemoryError")]
        if (instruction.kind, instruction.round, name) == ("train", 1, "client-2")
        else None
    )
    result = run(config, tmp_path / "run", transport)
    assert result["missing"] == {"1": ["client-2"]}
    answered = [
        sorted(p.stem for p in (tmp_path / "run").glob(f"rounds/00{n}/payloads/*.json")) for n in (1, 2)
    ]
    assert answered == [["client-0", "client-1"], list(NAMES)]


def test_fewer_than_the_quorum_stop_the_run_where_it_goes_on(config, local, tmp_path):
    transport = Elsewhere(tmp_path / "state")
    transport.fault = lambda instruction, name: (
        [Reply(name, error="MemoryError")] if instruction.kind == "answer" and name != "client-0" else None
    )
    with pytest.raises(RoundError, match="round 1: 1 valid answers, quorum 2: client-1 did not answer"):
        run(config, tmp_path / "run", transport)
    transport.fault, transport.asked = lambda instruction, name: None, []
    run(config, tmp_path / "run", transport, resume=True)
    assert decided(tmp_path / "run") == decided(local)
    assert ("answer", 1, "client-0") not in transport.asked  # its answer was there
    assert ("train", 1, "client-1") not in transport.asked
    assert ("answer", 1, "client-1") in transport.asked


@pytest.mark.parametrize("kind", ["describe", "train", "answer", "digest"])
def test_a_killed_coordinator_goes_on(kind, config, local, tmp_path):
    transport = Elsewhere(tmp_path / "state")

    def die(instruction, name):
        if instruction.kind == kind and name == "client-2":
            raise KeyboardInterrupt

    transport.fault = die
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path / "run", transport)
    run(config, tmp_path / "run", Elsewhere(tmp_path / "state"), resume=True)
    assert decided(tmp_path / "run") == decided(local)


def test_a_client_that_is_killed_has_not_lost_what_it_did(config, local, tmp_path, monkeypatch):
    """Killed when it has trained and before it says so: asked again, it does not train again."""
    transport = Elsewhere(tmp_path / "state")
    trained = []
    from feddistill.training import fit

    monkeypatch.setattr(
        "feddistill.training.fit", lambda *args, **more: trained.append(1) or fit(*args, **more)
    )

    def lost(instruction, name):
        if instruction.kind == "train" and (instruction.round, name) not in seen:
            seen.add((instruction.round, name))
            transport.own[name].handle(instruction)
            return []
        return None

    seen = set()
    transport.fault = lost
    run(config, tmp_path / "run", transport)
    assert decided(tmp_path / "run") == decided(local)
    assert len(trained) == 2 * 3 + 2  # three clients and the student, two rounds


@pytest.mark.parametrize(
    ("told", "what"),
    [
        ({"version": "2"}, "version"),
        ({"proxy": "0" * 32}, "proxy"),
        ({"vocabulary": "0" * 32}, "vocabulary"),
        ({"version": "2", "proxy": "1"}, "version and proxy"),
    ],
)
def test_a_client_that_does_not_fit_takes_no_part(told, what, brief, tmp_path):
    transport, said = Elsewhere(tmp_path / "state"), []

    def other(instruction, name):
        if instruction.kind != "describe" or name != "client-1":
            return None
        reply = transport.own[name].handle(instruction)
        return [replace(reply, content=reply.content | told)]

    class Progress(experiment.NoProgress):
        def log(self, line):
            said.append(line)

    transport.fault = other
    result = run(brief, tmp_path / "run", transport, progress=Progress())
    assert f"client-1 takes no part: another {what}" in said
    assert result["missing"] == {"1": ["client-1"]}
    assert not [ask for ask in transport.asked if ask[0] != "describe" and ask[2] == "client-1"]


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (lambda content: content + b"x" * 10_000_000, "at most"),
        (lambda content: content[:-1], "bytes"),
        (lambda content: b"", "bytes"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "blake2b"),
    ],
    ids=["too large", "too short", "empty", "other bytes"],
)
def test_a_payload_that_is_refused_does_not_stop_the_round(change, refusal, brief, tmp_path):
    transport = Elsewhere(tmp_path / "state")

    def other(instruction, name):
        if instruction.kind != "answer" or name != "client-1":
            return None
        reply = transport.own[name].handle(instruction)
        content = change(reply.blobs["payload"])
        return [replace(reply, blobs=reply.blobs | {"payload": content})]

    transport.fault = other
    result = run(brief, tmp_path / "run", transport)
    assert refusal in result["refused"]["1"]["client-1"]
    assert result["metrics"]["student"]["accuracy"] > 0


def test_a_client_that_sends_too_much_is_cut_off(brief, tmp_path):
    transport = Elsewhere(tmp_path / "state")

    def endless(instruction, name):
        if instruction.kind != "answer" or name != "client-1":
            return None
        reply = transport.own[name].handle(instruction)
        return [replace(reply, blobs=dict.fromkeys(reply.blobs, b"\x00" * 10**7))]

    transport.fault = endless
    result = run(brief, tmp_path / "run", transport)
    assert "client-1" in result["refused"]["1"]
    bound = payload.bound(payload.parse_spec((tmp_path / "run/rounds/001/spec.json").read_bytes()))
    kept = tmp_path / "run/rounds/001/payloads"
    assert (kept / "client-1.safetensors").stat().st_size == bound + 1
    assert (kept / "client-1.json").stat().st_size == payload.ENVELOPE_LIMIT + 1


@pytest.mark.parametrize("blobs", [{}, {"envelope": b"{}"}, {"payload": b"1"}])
def test_a_reply_without_its_files_is_a_refusal(blobs, brief, tmp_path):
    transport = Elsewhere(tmp_path / "state")
    transport.fault = lambda instruction, name: (
        [Reply(name, {"shard": 0, "shards": 1}, blobs)]
        if (instruction.kind, name) == ("answer", "client-1")
        else None
    )
    result = run(brief, tmp_path / "run", transport)
    assert "client-1" in {**result["refused"]["1"], **dict.fromkeys(result["missing"].get("1", []), "")}


def test_fedavg_goes_through_the_clients(config, tmp_path):
    """The same weights to the last bit where the same arithmetic averages them."""
    raw = config.model_dump(mode="json")
    config = parse(raw | {"baselines": ["fedavg"], "fedavg": {"proximal": 0.01}})
    here = experiment.run(config, tmp_path / "here")
    transport = Elsewhere(tmp_path / "state")

    def averager(session, number, weights):
        blobs = {"weights": save(dict(weights))}
        instruction = replace(instruction_for(session, "average", number), blobs=blobs)
        replies = [transport.own[name].handle(instruction) for name in NAMES]
        states = [load(reply.blobs["weights"]) for reply in replies]
        assert all(state.keys() == weights.keys() for state in states)
        sent = sum(4 * tensor.numel() for state in states for tensor in state.values())
        average = averaged(states, [reply.content["examples"] for reply in replies])
        cost = sum((Cost(**reply.content["cost"]) for reply in replies), Cost())
        return Average(average, sent, sent, cost, [])

    engine = Engine(transport, "elsewhere", RETRY_POLICY, averager)
    there = experiment.run(config, tmp_path / "there", engine=engine)
    assert there["metrics"] == here["metrics"]
    assert there["bytes"] == here["bytes"]
    assert there["flops"]["baseline_fedavg"] == here["flops"]["baseline_fedavg"]
    assert not list((tmp_path / "state").glob("*/*/baselines/fedavg/001*"))  # tidied in the second round


def test_fedavg_takes_no_other_weights(config, tmp_path):
    directory = RunDirectory.create(tmp_path / "run", "")
    session = Session(
        config,
        data.load(config.data, config.seed),
        directory,
        experiment.NoProgress(),
        Engine(),
        LocalTransport,
    )
    instruction = replace(
        instruction_for(session, "average", 1), blobs={"weights": save({"x": torch.zeros(3)})}
    )
    directory.close()
    with pytest.raises(ModelError, match="not the weights of the student's architecture"):
        RemoteClient("client-0", tmp_path).handle(instruction)


def test_what_happened_is_written_down(config, tmp_path):
    transport = Elsewhere(tmp_path / "state")
    transport.fault = once("train", "client-1", Reply("client-1", error="OSError"))
    run(config, tmp_path / "run", transport)
    events = [json.loads(line) for line in (tmp_path / "run" / EVENTS).read_text().splitlines()]
    assert {event["event"] for event in events} == {"asked", "replied", "failed"}
    failed = next(event for event in events if event["event"] == "failed")
    assert (failed["client"], failed["why"], failed["round"]) == ("client-1", "OSError", 1)
    metrics = (tmp_path / "run" / EVENT_COUNTS).read_text()
    assert 'feddistill_tasks_total{client="client-1",task="train"} 3' in metrics
    assert 'feddistill_failures_total{client="client-1",task="train"} 1' in metrics
    assert "# TYPE feddistill_received_bytes_total counter" in metrics
    replied = [event for event in events if event["event"] == "replied" and event["task"] == "answer"]
    answers = [event["bytes"] for event in replied if event["client"] == "client-1"]
    counted = f'feddistill_received_bytes_total{{client="client-1",task="answer"}} {sum(answers):g}'
    assert counted in metrics


def test_a_run_is_resumed_with_the_engine_that_began_it(config, tmp_path):
    run(config, tmp_path / "run", Elsewhere(tmp_path / "state"))
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(ConfigError, match="was started with --engine elsewhere"):
        experiment.run(config, tmp_path / "run", resume=True)
