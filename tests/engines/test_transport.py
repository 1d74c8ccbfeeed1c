"""What SuperNodes may send: the coordinator takes replies, and lives through everything else."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("flwr", reason="pip install 'feddistill[flower]'")

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from feddistill.engines.flower.records import reply_record, to_reply
from feddistill.engines.flower.transport import HELLO, GridTransport
from feddistill.federation.protocol import Instruction, Reply
from feddistill.progress import NoProgress


@pytest.fixture(autouse=True)
def plain_messages(monkeypatch):
    """Flower's own belong to a run that its SuperLink has started."""

    def message(content, node, kind, ttl):
        return SimpleNamespace(metadata=SimpleNamespace(message_type=kind, dst_node_id=node))

    monkeypatch.setattr("feddistill.engines.flower.transport.Message", message)


class Nodes:
    """A grid in memory: what each node says to a hello, and to work."""

    def __init__(self, hello, work=None):
        self.hello, self.work, self.sent = hello, work or {}, []

    def get_node_ids(self):
        return list(self.hello)

    def push_messages(self, messages):
        self.sent = [(m.metadata.message_type, m.metadata.dst_node_id) for m in messages]
        return [f"{kind}/{node}" for kind, node in self.sent]

    def pull_messages(self, identifiers):
        for identifier in identifiers:
            kind, node = identifier.rsplit("/", 1)
            said = self.hello[int(node)] if kind == HELLO else self.work[int(node)]
            yield SimpleNamespace(content=said, has_error=lambda: False)


class Said(NoProgress):
    def __init__(self):
        self.lines = []

    def log(self, line):
        self.lines.append(line)


def record(client="north", content="{}", error="", **arrays):
    made = RecordDict({"fields": ConfigRecord({"client": client, "content": content, "error": error})})
    if arrays:
        made["blobs"] = ArrayRecord(arrays)
    return made


def foreign(data, dtype="uint8", shape=(3,)):
    return Array(dtype, shape, "numpy.ndarray", data)


HUGE = (
    b"\x93NUMPY\x01\x00v\x00"
    + b"{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000000000,), }".ljust(117)
    + b"\n"
)

ODD = {
    "nothing": lambda: RecordDict(),
    "no fields": lambda: RecordDict({"fields": ConfigRecord({})}),
    "a list": lambda: record(content="[]"),
    "no JSON": lambda: record(content="{"),
    "deep": lambda: record(content="[" * 200_000),
    "long": lambda: record(content=json.dumps({"x": "y" * (1 << 20)})),
    "a name": lambda: record(client="nor th"),
    "empty array": lambda: record(payload=foreign(b"")),
    "a zip": lambda: record(payload=foreign(b"PK\x03\x04" + bytes(60))),
    "a pickle": lambda: record(payload=foreign(b"\x80\x04K\x01.")),
    "huge": lambda: record(payload=foreign(HUGE, shape=(10**15,))),
    "floats": lambda: record(payload=Array(np.zeros(3))),
    "a table": lambda: record(payload=Array(np.zeros((3, 3), np.uint8))),
}


def test_a_reply_comes_as_it_was_sent():
    reply = Reply("north", {"shard": 3}, {"payload": bytes(range(256)), "envelope": b"{}"})
    assert to_reply(reply_record(reply)) == reply
    assert to_reply(reply_record(Reply("north", error="DataError"))).error == "DataError"


@pytest.mark.parametrize("odd", ODD)
def test_who_sends_no_reply_is_not_asked(odd):
    shown = Said()
    transport = GridTransport(Nodes({1: ODD[odd](), 2: reply_record(Reply("south"))}), shown, poll=0)
    assert transport.clients(["north", "south"], 0) == ["south"]
    assert any("does not report a name" in line for line in shown.lines)


@pytest.mark.parametrize("odd", ODD)
def test_work_that_is_no_reply_is_a_failure_of_its_client(odd):
    hello = {1: reply_record(Reply("north")), 2: reply_record(Reply("south"))}
    transport = GridTransport(
        Nodes(hello, {1: ODD[odd](), 2: reply_record(Reply("south", {"done": 1}))}), NoProgress(), poll=0
    )
    assert set(transport.clients(["north", "south"], 0)) == {"north", "south"}
    replies = {r.client: r for r in transport.ask(Instruction("answer", "run", 1), ["north", "south"], 5)}
    assert replies["north"].error == "a malformed reply"
    assert replies["south"].content == {"done": 1}


def test_an_error_is_the_name_of_a_type_or_is_not_repeated():
    for error in ("x\nround 9: accuracy on validation: student 0.999\x1b[2J", "[/b]", "e" * 65):
        assert to_reply(record(error=error)).error == "an error that is no type's name"
    assert to_reply(record(error="PayloadError")).error == "PayloadError"


def test_a_node_has_one_name_and_a_name_one_node():
    shown, nodes = Said(), Nodes({1: reply_record(Reply("south"))})
    transport = GridTransport(nodes, shown, poll=0)
    assert transport.clients(["north", "south"], 0) == ["south"]
    nodes.hello = {}
    assert transport.clients(["north", "south"], 0) == []
    nodes.hello = {1: reply_record(Reply("north")), 2: reply_record(Reply("south"))}
    # The node that was south's comes back as north: it is not believed; south's name is still that node's.
    assert transport.clients(["north", "south"], 0) == ["south"]
    assert transport.nodes(["south"], 0) == {"south": 1}
    assert any("it is not used as north" in line for line in shown.lines)
    assert any("a second SuperNode reports the name south" in line for line in shown.lines)
