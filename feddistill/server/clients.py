"""The server's exchange with the clients: instructions out, replies in.

A reply is stored before it is used, so a restarted server requests nothing twice. Replies of remote clients
are validated before they are stored.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, replace

from typing_extensions import override

from feddistill import data, payload
from feddistill.config import as_stored, digest
from feddistill.config.data import RemotePartition
from feddistill.federation import answer_files, encoding
from feddistill.federation.journal import Journal
from feddistill.federation.protocol import Instruction, Kind, Reply
from feddistill.federation.retry import Requests
from feddistill.server import reports
from feddistill.store import layout
from feddistill.store.run_directory import Json
from feddistill.tasks.session import Session
from feddistill.types import ClientDescription, Cost, RoundSpec


class Clients:
    """Clients in this process, which write into the server's run directory."""

    def __init__(self, session: Session):
        self.session = session
        self.transport = session.transport()
        self.requests = Requests(
            self.transport, session.engine.retry_policy, Journal(session.run.root, session.progress)
        )
        self.descriptions = self._described()
        self.names = [description.client for description in self.descriptions]

    def trained(self, spec: RoundSpec, last: RoundSpec | None) -> Json:
        """(1) The training record of each client, in the order of the request.

        A client that does not take the last teacher is not waited for again in this round.

        Args:
            spec: The request of this round.
            last: The request that the last teacher belongs to; ``None`` if there is none.
        """
        run, number = self.session.run, spec.round
        names = [name for name in spec.clients if name in self.names]
        stored = {name: run.done(layout.report(number, name)) for name in names}
        records = {name: record for name, record in stored.items() if record is not None}
        missing = [name for name in names if name not in records]
        if not missing:
            return records
        request = None if last is None else payload.canonical(last).decode()
        if last is not None:
            missing = self._send_teacher(last, missing)
        instruction = self._instruction("train", number, asked=request)
        for reply in self.requests.gather(instruction, missing):
            if (record := self._training(number, reply)) is not None:
                records[reply.client] = record
            else:
                self.requests.journal.failed(instruction, reply.client, "a reply of another form", 0.0)
        return {name: records[name] for name in names if name in records}

    def answered(self, spec: RoundSpec, trained: Collection[str]) -> Json:
        """(2) The upload record of each client that has ``trained``; payloads are not validated yet."""
        run = self.session.run
        stored = {name: run.done(layout.answer(spec.round, name)) for name in spec.clients}
        records = {name: record for name, record in stored.items() if record is not None}
        missing = [name for name in trained if name not in records]
        instruction = self._instruction("answer", spec.round, spec=payload.canonical(spec).decode(), shard=0)
        records |= self._uploads(instruction, spec, missing)
        return {name: records[name] for name in spec.clients if name in records}

    def tidy(self, number: int) -> None:
        """Delete client weights in the server's run directory that no later round starts from."""
        self.transport.tidy(number)

    def _described(self) -> list[ClientDescription]:
        """The descriptions of the clients that take part: same format version, proxy set and vocabulary."""
        run, splits = self.session.run, self.session.splits
        names = [private.name for private in splits.private]
        stored = {name: run.done(layout.description(name)) for name in names}
        known = {name: _stored(**record) for name, record in stored.items() if record is not None}
        required = {
            "version": payload.VERSION,
            "proxy": splits.proxy.digest(),
            "vocabulary": self.session.query.fingerprint,
        }
        needs, classes = self.session.config.aggregation.rule.needs(), len(splits.label_names)
        for reply in self.requests.gather(
            self._instruction("describe", 0), [name for name in names if name not in known]
        ):
            content = reply.content
            if content.get("proxy") is None:
                content = self._published(reply.client) or content
            wrong = [key for key, value in required.items() if content.get(key) != value]
            own = reports.description(content.get("description"), reply.client, needs, classes)
            if wrong or own is None:
                wrong = wrong or ["form of description"]
                self.session.progress.log(f"{reply.client} takes no part: another {' and '.join(wrong)}")
                continue
            known[reply.client] = own
            self._store_description(own)
        return [known[name] for name in names if name in known]

    def _published(self, name: str) -> Json | None:
        """Send the proxy texts to a client that has none; the description that it then sends."""
        texts = b"".join(data.lines(self.session.splits.proxy))
        self.requests.send(self._instruction("publish", 0), texts, [name])
        return next(
            (reply.content for reply in self.requests.gather(self._instruction("describe", 0), [name])), None
        )

    def _send_teacher(self, last: RoundSpec, clients: Sequence[str]) -> list[str]:
        """Send the last teacher; the clients that have it."""
        return list(clients)

    def _training(self, number: int, reply: Reply) -> Json | None:
        """The training record in a reply; ``None`` if it has another form."""
        return reply.content

    def _uploads(self, instruction: Instruction, spec: RoundSpec, clients: Sequence[str]) -> Json:
        """Request the answers of ``clients``; their upload records."""
        replies = self.requests.gather(instruction, clients)
        return {
            reply.client: self.session.run.done(layout.answer(spec.round, reply.client)) or {}
            for reply in replies
        }

    def _store_description(self, own: ClientDescription) -> None:
        """Store the description of a remote client."""

    def _instruction(self, kind: Kind, number: int, **content: object) -> Instruction:
        return Instruction(kind, digest(self.session.config)[:16], number, content)


class RemoteClients(Clients):
    """Clients in other processes: the teacher is sent to them, and their replies are stored here."""

    @override
    def _send_teacher(self, last: RoundSpec, clients: Sequence[str]) -> list[str]:
        run, missing = self.session.run, list(clients)
        places = answer_files.files(layout.feedback(last.round), encoding.feedback_spec(last))
        for shard, (envelope, content) in enumerate(places):
            instruction = self._instruction(
                "digest", last.round, asked=payload.canonical(last).decode(), shard=shard
            )
            blobs = {"envelope": run.read_bytes(envelope), "payload": run.read_bytes(content)}
            missing = [
                reply.client for reply in self.requests.gather(replace(instruction, blobs=blobs), missing)
            ]
        return missing

    @override
    def _training(self, number: int, reply: Reply) -> Json | None:
        simulated = not isinstance(self.session.config.data.partition, RemotePartition)
        record = reports.training(reply.content, metrics=simulated)
        return (
            None if record is None else self.session.run.commit(layout.report(number, reply.client), record)
        )

    @override
    def _uploads(self, instruction: Instruction, spec: RoundSpec, clients: Sequence[str]) -> Json:
        run = self.session.run
        return {
            name: answer_files.store(run, layout.answer(spec.round, name), spec, cost)
            for name, cost in self._fetched(instruction, spec, clients).items()
        }

    @override
    def _store_description(self, own: ClientDescription) -> None:
        self.session.run.commit(layout.description(own.client), {"description": asdict(own)})

    @override
    def _instruction(self, kind: Kind, number: int, **content: object) -> Instruction:
        return instruction_for(self.session, kind, number, **content)

    def _fetched(self, instruction: Instruction, spec: RoundSpec, clients: Sequence[str]) -> dict[str, Cost]:
        """Fetch the shards that are not on disk; the cost of each client of which all shards are there.

        A shard that is too long is truncated, and then refused because its envelope does not match.
        """
        run = self.session.run
        costs = {}
        for name in clients:
            file = layout.answer_cost(spec.round, name)
            costs[name] = reports.cost(run.read_json(file)) if run.path(file).exists() else Cost()
        for shard in range(payload.shards(spec)):
            places = {
                name: answer_files.files(layout.answer(spec.round, name), spec)[shard] for name in costs
            }
            missing = [name for name, place in places.items() if not all(run.path(p).exists() for p in place)]
            for reply in self.requests.gather(
                replace(instruction, content={**instruction.content, "shard": shard}), missing
            ):
                if reply.content.get("shard") != shard:
                    self.requests.journal.failed(instruction, reply.client, "another shard", 0.0)
                    continue
                envelope, content = places[reply.client]
                costs[reply.client] = reports.cost(reply.content.get("cost"))
                run.write_json(layout.answer_cost(spec.round, reply.client), asdict(costs[reply.client]))
                longest = payload.bound(spec, shard) + 1
                run.write_bytes(content, reply.blobs.get("payload", b"")[:longest])
                run.write_bytes(envelope, reply.blobs.get("envelope", b"")[: payload.ENVELOPE_LIMIT + 1])
            costs = {
                name: cost
                for name, cost in costs.items()
                if all(run.path(place).exists() for place in places[name])
            }
        return costs


def clients_of(session: Session) -> Clients:
    """The clients of a run, in this process or remote."""
    return Clients(session) if session.engine.transport is None else RemoteClients(session)


def instruction_for(session: Session, kind: Kind, number: int, **content: object) -> Instruction:
    """An instruction for a remote client; it has all settings, because the client may just have started."""
    config = session.config
    settings = {
        "config": as_stored(config),
        "labels": list(session.splits.label_names),
        "execution": session.run.execution,
    }
    return Instruction(kind, digest(config)[:16], number, {**settings, **content})


def _stored(description: Json) -> ClientDescription:
    """The content of a stored description."""

    def of(client: str, examples: int | None, class_counts: Sequence[int] | None) -> ClientDescription:
        return ClientDescription(client, examples, None if class_counts is None else tuple(class_counts))

    return of(**description)
