"""A client's side of the protocol: what it does when it is asked. Whatever it sends is made in here."""

from collections.abc import Callable
from dataclasses import asdict

from torch import Tensor

from feddistill import payload
from feddistill.federation.protocol import PART, Reply, Task, parts_of
from feddistill.methods.client import Client
from feddistill.store import Json, RunDirectory

Lie = Callable[[int], Callable[[Tensor], Tensor]]
"""From a round to what a simulated attacker makes of its answers."""

FEEDBACK = ("safetensors", "json")
"""Endings of the teacher's two files, payload and envelope."""


class Agent:
    """Answers tasks with ``client``, whose run directory is its own or, in one process, the server's."""

    def __init__(self, client: Client, *, lie: Lie | None = None, alone: bool = True):
        """``alone``: the run directory is this client's; rounds that it missed are no error there."""
        self.client = client
        self.lie = lie
        self.alone = alone

    def handle(self, task: Task) -> Reply:
        """Do what is asked, once; asked again, say what was found.

        Raises:
            FeddistillError: It cannot.
        """
        content, blobs = {
            "describe": self._describe,
            "publish": self._nothing,
            "digest": self._digest,
            "train": self._train,
            "answer": self._answer,
        }[task.kind](task)
        return Reply(self.client.name, content, blobs)

    def _describe(self, task: Task) -> tuple[Json, dict[str, bytes]]:
        splits = self.client.session.splits
        told = {
            "description": asdict(self.client.describe()),
            "version": payload.VERSION,
            "proxy": splits.proxy.digest(),
            "vocabulary": payload.fingerprint(splits.label_names),
        }
        return told, {}

    def _nothing(self, task: Task) -> tuple[Json, dict[str, bytes]]:
        """The proxy texts are here already."""
        return {}, {}

    def _digest(self, task: Task) -> tuple[Json, dict[str, bytes]]:
        """Keep the teacher of round ``task.round``."""
        run, name = self.client.session.run, f"rounds/{task.round:03d}/feedback"
        if not all(run.path(f"{name}.{end}").exists() for end in FEEDBACK):
            receive(run, f"{name}.safetensors", task)
            if run.path(f"{name}.safetensors").exists():
                run.write_bytes(f"{name}.json", task.content["envelope"].encode())
        return {}, {}

    def _train(self, task: Task) -> tuple[Json, dict[str, bytes]]:
        before = task.content["asked"]
        asked = None if before is None else payload.parse_spec(before.encode())
        if not self.alone:
            return self.client.train(task.round, asked), {}
        run = self.client.session.run
        if asked is not None and not run.path(f"rounds/{asked.round:03d}/feedback.json").exists():
            asked = None  # it was away when the teacher was sent
        record = self.client.train(task.round, asked)
        self.client.tidy(task.round)
        return record, {}

    def _answer(self, task: Task) -> tuple[Json, dict[str, bytes]]:
        """One part of the payload, and with the first its envelope."""
        spec = payload.parse_spec(task.content["spec"].encode())
        lie = None if self.lie is None else self.lie(spec.round)
        record = self.client.answer(spec, f"{self.client.step(spec.round)}.safetensors", lie)
        run, part = self.client.session.run, task.content["part"]
        content, envelope = (run.read_bytes(record[name]) for name in ("payload", "envelope"))
        told = {"parts": parts_of(len(content)), "part": part, "cost": record["cost"]}
        piece = content[part * PART : (part + 1) * PART]
        return told, {"payload": piece, **({"envelope": envelope} if part == 0 else {})}


def receive(run: RunDirectory, name: str, task: Task) -> None:
    """Keep a part of a file; with the last that was missing, the file."""
    part, parts = task.content["part"], task.content["parts"]
    pieces = [f"{name}.part-{index}" for index in range(parts)]
    run.write_bytes(pieces[part], task.blobs["part"])
    if all(run.path(piece).exists() for piece in pieces):
        run.write_bytes(name, b"".join(map(run.read_bytes, pieces)))
        for piece in pieces:
            run.remove(piece)
