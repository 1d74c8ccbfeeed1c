"""The client's side of the protocol: handles the server's instructions and makes the replies."""

from collections.abc import Callable
from dataclasses import asdict
from itertools import chain

from safetensors.torch import load, save
from torch import Tensor

from feddistill import models, payload
from feddistill.client import local_update
from feddistill.client.client import Client
from feddistill.errors import ModelError
from feddistill.federation import answer_files, encoding
from feddistill.federation.protocol import Instruction, Reply
from feddistill.store import layout
from feddistill.store.records import StepRecord, UploadRecord
from feddistill.store.run_directory import Json, RunDirectory
from feddistill.tasks.choose import learner_of
from feddistill.types import RoundSpec

Attacker = Callable[[int], Callable[[Tensor], Tensor]]
"""From a round to the change that a simulated attacker makes to its answers."""

PARTS = ("envelope", "payload")
"""The two files of a shard."""


class Handler:
    """Handles instructions with ``client``; its run directory is its own or, in one process, the server's."""

    def __init__(self, client: Client, *, attack: Attacker | None = None, alone: bool = True):
        """``alone``: the run directory is the client's own, in which rounds may be missing."""
        self.client = client
        self.attack = attack
        self.alone = alone

    def handle(self, instruction: Instruction) -> Reply:
        """Carry out an instruction once; repeated, reply with the stored result.

        Raises:
            FeddistillError: It cannot.
        """
        content, blobs = {
            "describe": self._describe,
            "publish": self._nothing,
            "digest": self._digest,
            "train": self._train,
            "answer": self._answer,
            "average": self._average,
        }[instruction.kind](instruction)
        return Reply(self.client.name, content, blobs)

    def _describe(self, instruction: Instruction) -> tuple[Json, dict[str, bytes]]:
        splits = self.client.session.splits
        told = {
            "description": asdict(self.client.describe()),
            "version": payload.VERSION,
            "proxy": splits.proxy.digest(),
            "vocabulary": self.client.session.query.fingerprint,
        }
        return told, {}

    def _nothing(self, instruction: Instruction) -> tuple[Json, dict[str, bytes]]:
        """Confirm that the proxy texts are on disk."""
        return {}, {}

    def _digest(self, instruction: Instruction) -> tuple[Json, dict[str, bytes]]:
        """Store a shard of the teacher of the instruction's round."""
        run, spec = self.client.session.run, encoding.feedback_spec(_spec(instruction.content["asked"]))
        for place, part in zip(self._feedback(spec)[instruction.content["shard"]], PARTS, strict=True):
            run.write_bytes(place, instruction.blobs[part])
        return {}, {}

    def _feedback(self, spec: RoundSpec) -> list[tuple[str, str]]:
        return answer_files.files(layout.feedback(spec.round), spec)

    def _train(self, instruction: Instruction) -> tuple[Json, dict[str, bytes]]:
        before = instruction.content["asked"]
        asked = None if before is None else _spec(before)
        if not self.alone:
            return self.client.train(instruction.round, asked), {}
        run = self.client.session.run
        if asked is not None:
            files = chain(*self._feedback(encoding.feedback_spec(asked)))
            if not all(run.path(file).exists() for file in files):
                asked = None  # the client was offline when the teacher was sent
        record = self.client.train(instruction.round, asked)
        self.client.tidy(instruction.round)
        # Costs and, in a simulation, metrics; never the loss curve of private texts.
        return {name: record[name] for name in ("costs", "validation", "test") if name in record}, {}

    def _answer(self, instruction: Instruction) -> tuple[Json, dict[str, bytes]]:
        """Reply with one shard: payload and envelope."""
        spec, shard = _spec(instruction.content["spec"]), int(instruction.content["shard"])
        attack = None if self.attack is None else self.attack(spec.round)
        answered = self.client.answer(spec, layout.tensors(self.client.step(spec.round)), attack)
        upload = UploadRecord.from_json(answered)
        run, step = self.client.session.run, layout.answer(spec.round, self.client.name)
        places = answer_files.files(step, spec)[shard]
        blobs = {part: run.read_bytes(place) for place, part in zip(places, PARTS, strict=True)}
        return {"shard": shard, "shards": upload.shards, "cost": asdict(upload.cost)}, blobs

    def _average(self, instruction: Instruction) -> tuple[Json, dict[str, bytes]]:
        """Train the student's architecture from the averaged weights (``fedavg``)."""
        session, _step = self.client.session, layout.baseline("fedavg", instruction.round)
        learner = learner_of(session, session.config.student.model, "student.model")
        given = load(instruction.blobs["weights"])
        if {n: t.shape for n, t in given.items()} != {
            n: t.shape for n, t in models.trained(learner.model).items()
        }:
            raise ModelError("these are not the weights of the student's architecture")
        learner.model.load_state_dict(given, strict=False)
        start = layout.tensors(layout.baseline("fedavg", instruction.round, "start"))
        session.run.write(start, lambda path: models.save(learner.model, path))
        private, taught = self.client.private, learner.examples
        record = local_update.trained_by(
            session, learner, "fedavg", instruction.round, start, private, taught
        )
        learner.restore(StepRecord.from_json(record).file)
        session.run.remove(start)
        for earlier in range(1, instruction.round):
            session.run.remove(layout.baseline("fedavg", earlier))
        told = {"examples": len(private), "cost": asdict(StepRecord.from_json(record).training)}
        return told, {"weights": save(models.trained(learner.model))}


def _spec(said: str) -> RoundSpec:
    return payload.parse_spec(said.encode())


def receive(run: RunDirectory, name: str, instruction: Instruction) -> None:
    """Store a part of a file; when all parts are there, the file."""
    part, parts = instruction.content["part"], instruction.content["parts"]
    pieces = [f"{name}.part-{index}" for index in range(parts)]
    run.write_bytes(pieces[part], instruction.blobs["part"])
    if all(run.path(piece).exists() for piece in pieces):
        run.write_bytes(name, b"".join(map(run.read_bytes, pieces)))
        for piece in pieces:
            run.remove(piece)
