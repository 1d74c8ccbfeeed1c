"""Ask many clients and bear with those that fail: ask again, take each answer once, give up in time."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from feddistill.federation.journal import Journal
from feddistill.federation.protocol import PART, Patience, Reply, Task, Transport, parts_of


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
