"""Requests to many clients: repeat on failure, accept each reply once, give up after the limits."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from feddistill.federation.journal import Journal
from feddistill.federation.protocol import PART, Instruction, Reply, RetryPolicy, Transport, parts_of


class Requests:
    """Sends instructions through ``transport`` and logs the events in ``journal``."""

    def __init__(self, transport: Transport, retry_policy: RetryPolicy, journal: Journal):
        self.transport = transport
        self.retry_policy = retry_policy
        self.journal = journal

    def gather(self, instruction: Instruction, clients: Sequence[str]) -> Iterator[Reply]:
        """One reply per client, in order of arrival; none of a client that fails ``attempts`` times."""
        waiting, left = list(clients), self.retry_policy.connect
        for attempt in range(self.retry_policy.attempts):
            if not waiting:
                return
            begun = time.monotonic()
            present = self.transport.clients(waiting, left)
            left = max(0.0, left - (time.monotonic() - begun))
            self.journal.asked(instruction, present, attempt)
            start = time.perf_counter()
            for reply in self.transport.ask(instruction, present, self.retry_policy.reply):
                seconds = time.perf_counter() - start
                if reply.client not in waiting:  # late or repeated
                    self.journal.dropped(instruction, reply)
                elif reply.error is not None:
                    self.journal.failed(instruction, reply.client, reply.error, seconds)
                else:
                    waiting.remove(reply.client)
                    self.journal.replied(instruction, reply, seconds)
                    yield reply
            for name in waiting:
                if name not in present:
                    self.journal.failed(instruction, name, "absent", time.perf_counter() - start)
        for name in waiting:
            self.journal.given_up(instruction, name)

    def send(self, instruction: Instruction, content: bytes, clients: Sequence[str]) -> None:
        """Send a file in parts; a client that misses a part is sent no more."""
        parts = parts_of(len(content))
        for part in range(parts):
            piece = content[part * PART : (part + 1) * PART]
            place = {**instruction.content, "part": part, "parts": parts}
            clients = [
                reply.client
                for reply in self.gather(replace(instruction, content=place, blobs={"part": piece}), clients)
            ]
