"""Clients in folders of their own, and what a run with them came to."""

import json
from collections import Counter
from dataclasses import replace

from feddistill import data
from feddistill.engines.remote import RemoteClient
from feddistill.federation import protocol
from feddistill.federation.protocol import RetryPolicy
from feddistill.runs import experiment
from feddistill.tasks.session import Engine

NAMES = ("client-0", "client-1", "client-2")
RETRY_POLICY = RetryPolicy(connect=0, reply=1, attempts=2)


class Elsewhere:
    """Carries tasks to clients with folders of their own, as JSON and bytes; does what a network does."""

    def __init__(self, state, files=None, names=NAMES):
        files = files or {}
        self.own = {name: RemoteClient(name, state, files.get(name)) for name in names}
        self.asked = []
        self.sent = Counter()
        """Bytes of files sent, by kind of instruction and client."""
        self.fault = lambda instruction, name: None
        """What a client does instead of its work: a list of replies, or an exception."""

    def clients(self, wanted, wait):
        return [name for name in wanted if name in self.own]

    def tidy(self, number):
        pass

    def ask(self, instruction, clients, timeout):
        assert sum(map(len, instruction.blobs.values())) <= protocol.PART
        for name in clients:
            self.asked.append((instruction.kind, instruction.round, name))
            self.sent[instruction.kind, name] += sum(map(len, instruction.blobs.values()))
            sent = replace(instruction, content=json.loads(json.dumps(instruction.content)))
            instead = self.fault(sent, name)
            if instead is not None:
                yield from instead
                continue
            reply = self.own[name].handle(sent)
            assert reply.bytes() <= 2 * protocol.PART
            yield replace(reply, content=json.loads(json.dumps(reply.content)))


def institutions(config, folder):
    """Each client's texts in a folder of its own, with the file that says where they are; these by name."""
    splits, files = data.load(config.data, config.seed), {}
    for texts in splits.private:
        own = folder / texts.name
        own.mkdir(parents=True)
        labels = (splits.label_names[label] for label in texts.labels)
        rows = [json.dumps({"text": t, "label": n}) for t, n in zip(texts.texts, labels, strict=True)]
        (own / "private.jsonl").write_text("\n".join(rows) + "\n")
        files[texts.name] = own / "data.yaml"
        files[texts.name].write_text("source: {kind: files, path: private.jsonl}\n")
    return files


def decided(run):
    """What must not depend on what carried it."""
    result = json.loads((run / "result.json").read_text())
    varies = {"seconds", "peak_memory_bytes", "environment"}
    payloads = {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.glob("rounds/*/payloads/*"))}
    assert len(payloads) >= 4
    return {
        "result": {key: value for key, value in result.items() if key not in varies},
        "payloads": payloads,
        "ledger": json.loads((run / "ledger.json").read_text()),
    }


def run(config, out, transport, **options):
    return experiment.run(config, out, engine=Engine(transport, "elsewhere", RETRY_POLICY), **options)
