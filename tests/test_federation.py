"""Clients that are elsewhere: the same bytes, and what becomes of a run when they fail."""

import json
import re
import shutil
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
def made(tmp_path_factory):
    """Runs that several tests read, by name; and the folder that they are in."""
    return {"folder": tmp_path_factory.mktemp("runs")}


@pytest.fixture
def config(tiny_settings):
    """Smaller than tiny: what is compared here is equal or not."""
    data = {
        "private": {"size": 120},
        "proxy": {"size": 60, "labelled": 20},
        "validation": {"size": 30},
        "test": {"size": 40},
        "partition": {**tiny_settings["data"]["partition"], "min_examples": 20},
    }
    clients = {**tiny_settings["clients"], "codistillation": {"examples": 30}}
    changes = {"data": data, "clients": clients, "baselines": [], "aggregation": {"quorum": 2}}
    return parse(tiny_settings | changes)


def changed(config, **changes):
    return parse(config.model_dump(mode="json") | changes)


@pytest.fixture
def brief(config):
    """One round, where a second would show nothing new."""
    return changed(config, rounds=1)


def locally(made, name, config):
    """The run ``name`` of ``config`` with clients in this process."""
    if name not in made:
        made[name] = made["folder"] / name
        experiment.run(config, made[name])
    return made[name]


@pytest.fixture
def brief_local(brief, made):
    return locally(made, "brief", brief)


@pytest.fixture
def local(config, made):
    return locally(made, "local", config)


@pytest.fixture
def elsewhere(config, made):
    """A run of clients elsewhere; what they keep is in the folder ``state`` beside it."""
    if "elsewhere" not in made:
        transport = Elsewhere(made["folder"] / "state")
        run(config, made["folder"] / "elsewhere", transport)
        made["elsewhere"] = made["folder"] / "elsewhere"
    return made["elsewhere"]


def test_clients_elsewhere_give_what_clients_here_give(elsewhere, local):
    assert decided(elsewhere) == decided(local)
    assert sorted(p.name for p in (elsewhere.parent / "state").iterdir()) == list(NAMES)


@pytest.fixture
def shards(config):
    """Answers that are four messages, the last of them shorter."""
    return changed(config, payload={**config.payload.model_dump(mode="json"), "shard_mib": 0.00016})


@pytest.fixture
def sharded(shards, made):
    return locally(made, "sharded", shards)


def test_large_answers_travel_in_shards(shards, sharded, local, tmp_path):
    """Also through a stop: shards that came are not asked for again."""
    transport = Elsewhere(tmp_path / "state")

    def die(instruction, name):
        if instruction.kind == "answer" and name == "client-1" and instruction.content["shard"] == 2:
            raise KeyboardInterrupt

    transport.fault = die
    with pytest.raises(KeyboardInterrupt):
        run(shards, tmp_path / "run", transport)
    transport = Elsewhere(tmp_path / "state")
    run(shards, tmp_path / "run", transport, resume=True)
    found = decided(tmp_path / "run")
    assert found == decided(sharded)
    again = [name for kind, number, name in transport.asked if (kind, number) == ("answer", 1)]
    assert again == ["client-1", "client-2", *NAMES]  # client-0 had sent the third
    for client in NAMES:
        assert transport.asked.count(("answer", 2, client)) == 4
        assert transport.asked.count(("digest", 1, client)) == 4
        assert len(list((sharded / "rounds/001/payloads").glob(f"{client}.*.safetensors"))) == 4
    whole = decided(local)
    assert found["result"]["metrics"] == whole["result"]["metrics"]
    for one, other in zip(found["ledger"]["rounds"], whole["ledger"]["rounds"], strict=True):
        assert one["teacher"] == other["teacher"]


@pytest.fixture
def some_shards(shards, made):
    """Round 1: two clients do not send every shard; round 2: one sends a shard in another's place."""
    if "some shards" not in made:
        transport, out = Elsewhere(made["folder"] / "some-state"), made["folder"] / "some-shards"

        def fault(instruction, name):
            if instruction.kind != "answer":
                return None
            match instruction.round, name, instruction.content["shard"]:
                case (1, "client-1", 1) | (1, "client-2", 3):
                    return []
                case 2, "client-1", 2:
                    asked = replace(instruction, content=instruction.content | {"shard": 1})
                    swapped = transport.own[name].handle(asked)
                    return [replace(swapped, content=swapped.content | {"shard": 2})]
            return None

        transport.fault = fault
        result = run(changed(shards, aggregation={"quorum": 1}), out, transport)
        made["some shards"] = result, transport, out
    return made["some shards"]


def test_a_teacher_is_sent_if_it_is_used_and_counted_if_it_is_sent(config, tmp_path):
    for enabled in (True, False):
        clients = {**config.clients.model_dump(mode="json"), "codistillation": {"enabled": enabled}}
        transport = Elsewhere(tmp_path / f"state-{enabled}")
        out = tmp_path / f"run-{enabled}"
        result = run(changed(config, clients=clients), out, transport)
        requests = sum((out / f"rounds/{n:03d}/spec.json").stat().st_size for n in (1, 2))
        for client in NAMES:
            counted = sum(entry["downlink"][client] for entry in result["bytes"]["by_round"])
            assert counted - requests == transport.sent["digest", client]
        assert any(kind == "digest" for kind, _, _ in transport.asked) == enabled


@pytest.mark.parametrize(("client", "lacks"), [("client-1", 1), ("client-2", 3)])
def test_a_client_that_does_not_send_every_shard_has_not_answered(client, lacks, some_shards):
    result, transport, _ = some_shards
    assert result["missing"] == {"1": ["client-1", "client-2"]}
    asked = transport.asked.count(("answer", 1, client))
    assert asked == lacks + RETRY_POLICY.attempts  # the shards behind it are not asked for


def test_one_shard_that_is_refused_refuses_the_answer(some_shards):
    result, _, out = some_shards
    assert list(result["refused"]) == ["2"]
    assert "sequence" in result["refused"]["2"]["client-1"]
    ledger = json.loads((out / "ledger.json").read_text())
    assert ledger["rounds"][1]["refused"] == {"client-1": "MalformedEnvelope"}


def once(kind, name, *replies):
    """The first time that ``name`` is asked for ``kind`` something else comes back."""
    left = [replies]

    def fault(instruction, asked):
        return left.pop() if left and instruction.kind == kind and asked == name else None

    return fault


ONCE = ("describe", "train", "answer")


@pytest.fixture
def failed_once(brief, made):
    """For each task client-1 is silent once, and client-2 reports an error once."""
    if "failed once" not in made:
        transport, out = Elsewhere(made["folder"] / "once-state"), made["folder"] / "failed-once"
        faults = [once(kind, "client-1") for kind in ONCE]
        faults += [once(kind, "client-2", Reply("client-2", error="OSError")) for kind in ONCE]
        transport.fault = lambda *asked: next(
            (instead for fault in faults if (instead := fault(*asked)) is not None), None
        )
        run(brief, out, transport)
        made["failed once"] = transport, out
    return made["failed once"]


def test_who_fails_once_is_asked_again(failed_once, brief_local):
    transport, out = failed_once
    for kind in ONCE:
        assert [name for asked, _, name in transport.asked if asked == kind] == [*NAMES, *NAMES[1:]]
    assert decided(out) == decided(brief_local)


def test_what_happened_is_written_down(failed_once):
    _, out = failed_once
    events = [json.loads(line) for line in (out / EVENTS).read_text().splitlines()]
    assert {event["event"] for event in events} == {"asked", "replied", "failed"}
    failed = [event for event in events if event["event"] == "failed" and event["task"] == "train"]
    assert [(event["client"], event["why"], event["round"]) for event in failed] == [
        ("client-2", "OSError", 1)
    ]
    metrics = (out / EVENT_COUNTS).read_text()
    assert 'feddistill_tasks_total{client="client-1",task="train"} 2' in metrics
    assert 'feddistill_failures_total{client="client-2",task="train"} 1' in metrics
    assert "# TYPE feddistill_received_bytes_total counter" in metrics
    answer = sum(path.stat().st_size for path in out.glob("rounds/001/payloads/client-0.*"))
    (received,) = re.findall(r'received_bytes_total{client="client-0",task="answer"} (\d+)', metrics)
    assert answer <= int(received) < answer + 1000


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


def test_fewer_than_the_quorum_stop_the_run_where_it_goes_on(brief, brief_local, tmp_path):
    transport = Elsewhere(tmp_path / "state")
    transport.fault = lambda instruction, name: (
        [Reply(name, error="MemoryError")] if instruction.kind == "answer" and name != "client-0" else None
    )
    with pytest.raises(RoundError, match="round 1: 1 valid answers, quorum 2: client-1 did not answer"):
        run(brief, tmp_path / "run", transport)
    transport.fault, transport.asked = lambda instruction, name: None, []
    run(brief, tmp_path / "run", transport, resume=True)
    assert decided(tmp_path / "run") == decided(brief_local)
    assert ("answer", 1, "client-0") not in transport.asked  # its answer was there
    assert ("train", 1, "client-1") not in transport.asked
    assert ("answer", 1, "client-1") in transport.asked


def test_a_killed_coordinator_goes_on(config, local, tmp_path):
    """Killed at each kind of task in turn; clients too are started anew."""
    for kind in ("describe", "train", "answer", "digest"):
        transport = Elsewhere(tmp_path / "state")

        def die(instruction, name, kind=kind):
            if instruction.kind == kind and name == "client-2":
                raise KeyboardInterrupt

        transport.fault = die
        with pytest.raises(KeyboardInterrupt):
            run(config, tmp_path / "run", transport, resume=kind != "describe")
        assert transport.asked[-1][0] == kind
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
    "told",
    [
        {"client-1": {"version": "2"}, "client-2": {"proxy": "0" * 32}},
        {"client-1": {"vocabulary": "0" * 32}, "client-2": {"version": "2", "proxy": "1"}},
    ],
)
def test_a_client_that_does_not_fit_takes_no_part(told, brief, tmp_path):
    transport, said = Elsewhere(tmp_path / "state"), []

    def other(instruction, name):
        if instruction.kind != "describe" or name not in told:
            return None
        reply = transport.own[name].handle(instruction)
        return [replace(reply, content=reply.content | told[name])]

    class Progress(experiment.NoProgress):
        def log(self, line):
            said.append(line)

    transport.fault = other
    lenient = changed(brief, aggregation={"quorum": 1})
    result = run(lenient, tmp_path / "run", transport, progress=Progress())
    for name, other_than in told.items():
        assert f"{name} takes no part: another {' and '.join(other_than)}" in said
    assert result["missing"] == {"1": ["client-1", "client-2"]}
    assert {name for kind, _, name in transport.asked if kind != "describe"} == {"client-0"}


def with_payload(change):
    return lambda reply: [replace(reply, blobs=reply.blobs | {"payload": change(reply.blobs["payload"])})]


FAULTS = {
    "too large": with_payload(lambda content: content + b"x" * 10_000_000),
    "too short": with_payload(lambda content: content[:-1]),
    "empty": with_payload(lambda content: b""),
    "other bytes": with_payload(lambda content: content[:-1] + bytes([content[-1] ^ 1])),
    "of another": lambda reply: [replace(reply, client="client-1")],
    "endless": lambda reply: [replace(reply, blobs=dict.fromkeys(reply.blobs, b"\x00" * 10**7))],
    "no files": lambda reply: [replace(reply, blobs={})],
    "no payload": lambda reply: [replace(reply, blobs={"envelope": b"{}"})],
    "no envelope": lambda reply: [replace(reply, blobs={"payload": b"1"})],
}
"""What a client sends for its answer: two clients in each round, and client-0 as it should."""
PLACES = {fault: (1 + place // 2, NAMES[1 + place % 2]) for place, fault in enumerate(FAULTS)}


@pytest.fixture
def mistreated(config, made):
    if "mistreated" not in made:
        transport, out = Elsewhere(made["folder"] / "bad-state"), made["folder"] / "mistreated"

        def fault(instruction, name):
            if instruction.kind != "answer":
                return None
            for bad, place in PLACES.items():
                if place == (instruction.round, name):
                    author = "client-2" if bad == "of another" else name
                    return FAULTS[bad](transport.own[author].handle(instruction))
            return None

        transport.fault = fault
        rounds = max(number for number, _ in PLACES.values())
        result = run(changed(config, rounds=rounds, aggregation={"quorum": 1}), out, transport)
        assert result["status"] == "complete"
        made["mistreated"] = result, out
    return made["mistreated"]


@pytest.mark.parametrize(
    ("fault", "refusal"),
    [
        ("too large", "at most"),
        ("too short", "bytes"),
        ("empty", "bytes"),
        ("other bytes", "blake2b"),
        ("of another", "must be client-1, got client-2"),
        ("endless", ""),
    ],
)
def test_a_payload_that_is_refused_does_not_stop_the_round(fault, refusal, mistreated):
    number, client = PLACES[fault]
    result, out = mistreated
    assert refusal in result["refused"][str(number)][client]
    assert client in json.loads((out / "ledger.json").read_text())["rounds"][number - 1]["refused"]


def test_only_who_sent_something_wrong_is_refused(mistreated):
    result, _ = mistreated
    left_out = {
        (int(number), client)
        for kind in ("refused", "missing")
        for number, clients in result[kind].items()
        for client in clients
    }
    assert left_out == set(PLACES.values())


def test_a_client_that_sends_too_much_is_cut_off(mistreated):
    number, client = PLACES["endless"]
    folder = mistreated[1] / f"rounds/00{number}"
    bound = payload.bound(payload.parse_spec((folder / "spec.json").read_bytes()))
    assert (folder / f"payloads/{client}.safetensors").stat().st_size == bound + 1
    assert (folder / f"payloads/{client}.json").stat().st_size == payload.ENVELOPE_LIMIT + 1


@pytest.mark.parametrize("fault", ["no files", "no payload", "no envelope"])
def test_a_reply_without_its_files_is_a_refusal(fault, mistreated):
    (number, client), result = PLACES[fault], mistreated[0]
    assert client in {*result["refused"].get(str(number), ()), *result["missing"].get(str(number), ())}


def test_fedavg_goes_through_the_clients(config, tmp_path):
    """The same weights to the last bit where the same arithmetic averages them."""
    config = changed(config, baselines=["fedavg"], fedavg={"proximal": 0.01})
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


def test_a_run_is_resumed_with_the_engine_that_began_it(elsewhere, config, tmp_path):
    shutil.copytree(elsewhere, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    with pytest.raises(ConfigError, match="was started with --engine elsewhere"):
        experiment.run(config, tmp_path / "run", resume=True)
