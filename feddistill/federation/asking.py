"""Ask many clients and bear with those that fail: ask again, take each answer once, give up in time."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from feddistill.federation.journal import Journal
from feddistill.federation.protocol import PART, Patience, Reply, Task, Transport, parts_of
from feddistill.store import Json, RunDirectory


class Asking:
    """Asks through ``transport``, and writes what happens into ``journal``."""

    def __init__(self, transport: Transport, patience: Patience, journal: Journal):
        self.transport = transport
        self.patience = patience
        self.journal = journal

    def gather(self, task: Task, clients: Sequence[str]) -> Iterator[Reply]:
        """One reply of each client, as they come; who fails or is silent ``attempts`` times has none."""
        waiting, patience = list(clients), self.patience.connect
        for attempt in range(self.patience.attempts):
            if not waiting:
                return
            begun = time.monotonic()
            present = self.transport.clients(waiting, patience)
            patience = max(0.0, patience - (time.monotonic() - begun))
            self.journal.asked(task, present, attempt)
            start = time.perf_counter()
            for reply in self.transport.ask(task, present, self.patience.reply):
                seconds = time.perf_counter() - start
                if reply.client not in waiting:  # late, or twice
                    self.journal.dropped(task, reply)
                elif reply.error is not None:
                    self.journal.failed(task, reply.client, reply.error, seconds)
                else:
                    waiting.remove(reply.client)
                    self.journal.replied(task, reply, seconds)
                    yield reply
            for name in waiting:
                if name not in present:
                    self.journal.failed(task, name, "absent", time.perf_counter() - start)
        for name in waiting:
            self.journal.given_up(task, name)

    def send(self, task: Task, content: bytes, clients: Sequence[str]) -> None:
        """Send a file in parts; a client that misses one has none of it."""
        parts = parts_of(len(content))
        for part in range(parts):
            piece = content[part * PART : (part + 1) * PART]
            told = {**task.content, "part": part, "parts": parts}
            clients = [
                reply.client
                for reply in self.gather(replace(task, content=told, blobs={"part": piece}), clients)
            ]

    def fetch(self, task: Task, clients: Sequence[str], bound: int, run: RunDirectory) -> Iterator[Json]:
        """Files that clients send in parts, written to ``run`` part by part: never one whole in memory.

        Yields, for each client, ``client``, ``envelope`` (bytes), ``cost`` and ``file``, a name in ``run``; a
        client that sends more than ``bound`` bytes has them cut off, and its envelope tells.
        """
        begun: dict[str, Json] = {}
        part = 0
        while clients:
            more = []
            for reply in self.gather(replace(task, content={**task.content, "part": part}), clients):
                if reply.content.get("part") != part:
                    self.journal.failed(task, reply.client, "another part", 0.0)
                    continue
                file = f"receiving/{reply.client}"
                piece = reply.blobs.get("payload", b"")
                if part == 0:
                    run.remove(file)
                    begun[reply.client] = {
                        "client": reply.client,
                        "envelope": reply.blobs.get("envelope", b""),
                        "cost": reply.content.get("cost", {}),
                        "file": file,
                    }
                size = run.append_bytes(file, piece)
                if size <= bound and part + 1 < int(reply.content.get("parts", 1)):
                    more.append(reply.client)
                else:
                    yield begun.pop(reply.client)
            part, clients = part + 1, more
