"""The server's side of what passes between it and the clients: what is asked, what is kept of the replies.

A reply is kept on disk before anything is made of it, so a server that is started again asks for nothing
twice; what a client says is read strictly before it is kept.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, replace

from feddistill import data, payload
from feddistill.config import as_stored, digest
from feddistill.config.data import RemotePartition
from feddistill.federation import answer_files, encoding
from feddistill.federation.journal import Journal
from feddistill.federation.protocol import Instruction, Kind
from feddistill.federation.retry import Requests
from feddistill.server import reports
from feddistill.store import layout
from feddistill.store.run_directory import Json
from feddistill.tasks.session import Session
from feddistill.types import ClientDescription, Cost, RoundSpec


class Clients:
    """With the clients of a run, through whatever carries it."""

    def __init__(self, session: Session):
        self.session = session
        self.transport = session.transport()
        self.requests = Requests(
            self.transport, session.engine.retry_policy, Journal(session.run.root, session.progress)
        )
        self.descriptions = self._described()
        self.names = [description.client for description in self.descriptions]

    def trained(self, spec: RoundSpec, last: RoundSpec | None) -> Json:
        """(1) What each client's training came to, in the order of the request; ``last`` is the request that
        the last teacher answers.

        Who does not take the last teacher is not waited for a second time in this round.
        """
        run, number, found = self.session.run, spec.round, {}
        names = [name for name in spec.clients if name in self.names]
        for name in names:
            if (record := run.done(layout.report(number, name))) is not None:
                found[name] = record
        missing = [name for name in names if name not in found]
        if not missing:
            return found
        if last is not None and not self.transport.shares_run:
            places = answer_files.files(layout.feedback(last.round), encoding.feedback_spec(last))
            for shard, (envelope, content) in enumerate(places):
                instruction = self._instruction(
                    "digest", last.round, asked=payload.canonical(last).decode(), shard=shard
                )
                blobs = {"envelope": run.read_bytes(envelope), "payload": run.read_bytes(content)}
                missing = [
                    reply.client for reply in self.requests.gather(replace(instruction, blobs=blobs), missing)
                ]
        question = None if last is None else payload.canonical(last).decode()
        instruction = self._instruction("train", number, asked=question)
        ours = not isinstance(self.session.config.data.partition, RemotePartition)
        for reply in self.requests.gather(instruction, missing):
            if self.transport.shares_run:
                found[reply.client] = reply.content
            elif (record := reports.training(reply.content, figures=ours)) is not None:
                found[reply.client] = run.commit(layout.report(number, reply.client), record)
            else:
                self.requests.journal.failed(instruction, reply.client, "a reply of another form", 0.0)
        return {name: found[name] for name in names if name in found}

    def answered(self, spec: RoundSpec, trained: Collection[str]) -> Json:
        """(2) What each client has uploaded, those asked that have ``trained``; nothing is believed yet."""
        run, folder, found = self.session.run, layout.answers(spec.round), {}
        for name in spec.clients:
            if (record := run.done(layout.answer(spec.round, name))) is not None:
                found[name] = record
        missing = [name for name in trained if name not in found]
        instruction = self._instruction("answer", spec.round, spec=payload.canonical(spec).decode(), shard=0)
        if self.transport.shares_run:  # what was sent is there
            for reply in self.requests.gather(instruction, missing):
                found[reply.client] = run.done(layout.answer(spec.round, reply.client)) or {}
        else:
            for name, cost in self._fetched(instruction, spec, folder, missing).items():
                found[name] = answer_files.store(run, layout.answer(spec.round, name), spec, cost)
        return {name: found[name] for name in spec.clients if name in found}

    def tidy(self, number: int) -> None:
        """Weights of clients in this process that nobody goes on from."""
        self.transport.tidy(number)

    def _described(self) -> list[ClientDescription]:
        """What each client says of itself, of those that fit; a client that does not fit is never asked."""
        run, found = self.session.run, {}
        names = [private.name for private in self.session.splits.private]
        for name in names:
            if (record := run.done(layout.description(name))) is not None:
                found[name] = record
        fits = {
            "version": payload.VERSION,
            "proxy": self.session.splits.proxy.digest(),
            "vocabulary": self.session.query.fingerprint,
        }
        needs, classes = self.session.config.aggregation.rule.needs(), len(self.session.splits.label_names)
        for reply in self.requests.gather(
            self._instruction("describe", 0), [n for n in names if n not in found]
        ):
            said = reply.content
            if said.get("proxy") is None:
                said = self._published(reply.client) or said
            wrong = [key for key, wanted in fits.items() if said.get(key) != wanted]
            own = reports.description(said.get("description"), reply.client, needs, classes)
            if wrong or own is None:
                wrong = wrong or ["form of description"]
                self.session.progress.log(f"{reply.client} takes no part: another {' and '.join(wrong)}")
                continue
            found[reply.client] = {"description": asdict(own)}
            if not self.transport.shares_run:
                run.commit(layout.description(reply.client), found[reply.client])
        return [description_of(found[name]["description"]) for name in names if name in found]

    def _published(self, name: str) -> Json | None:
        """Send the proxy texts to a client that has none; what it says then."""
        texts = b"".join(data.lines(self.session.splits.proxy))
        self.requests.send(self._instruction("publish", 0), texts, [name])
        return next(
            (reply.content for reply in self.requests.gather(self._instruction("describe", 0), [name])), None
        )

    def _fetched(
        self, instruction: Instruction, spec: RoundSpec, folder: str, clients: Sequence[str]
    ) -> dict[str, Cost]:
        """What answering cost each client of which every shard is on disk; those that were here are not asked
        for again. A shard that is too long is cut, and its envelope will tell."""
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

    def _instruction(self, kind: Kind, number: int, **content: object) -> Instruction:
        if self.transport.shares_run:
            return Instruction(kind, digest(self.session.config)[:16], number, content)
        return instruction_for(self.session, kind, number, **content)


def instruction_for(session: Session, kind: Kind, number: int, **content: object) -> Instruction:
    """For a client elsewhere, which is told all settings each time: it may have been started a moment ago."""
    config = session.config
    settings = {
        "config": as_stored(config),
        "labels": list(session.splits.label_names),
        "execution": session.run.execution,
    }
    return Instruction(kind, digest(config)[:16], number, {**settings, **content})


def description_of(record: Json) -> ClientDescription:
    """What a client said of itself."""
    counts = record["class_counts"]
    return ClientDescription(record["client"], record["examples"], None if counts is None else tuple(counts))
