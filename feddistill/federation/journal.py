"""Journal of the exchange between server and clients: JSON lines of events, counters for Prometheus."""

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from feddistill.federation.protocol import Instruction, Reply
from feddistill.progress import Progress
from feddistill.store import layout
from feddistill.store.layout import EVENT_COUNTS, EVENTS

HELP = {
    "tasks_total": ("counter", "Tasks that clients were asked to do."),
    "replies_total": ("counter", "Replies that were taken."),
    "failures_total": ("counter", "Times a client failed or was absent."),
    "received_bytes_total": ("counter", "Bytes of files that clients sent."),
    "reply_seconds": ("gauge", "Seconds that the last reply took."),
    "round": ("gauge", "The round that a client was last asked about."),
}


class Journal:
    """Writes ``federation.jsonl`` and ``metrics.prom`` in the folder of a run."""

    def __init__(self, root: Path, progress: Progress):
        self.root = root
        self.progress = progress
        self._numbers: defaultdict[tuple[str, str, str], float] = defaultdict(float)

    def asked(self, instruction: Instruction, clients: Sequence[str], attempt: int) -> None:
        """``instruction`` was sent to clients."""
        for name in clients:
            self._count("tasks_total", name, instruction)
            self._numbers["round", name, ""] = instruction.round
        self._event("asked", instruction, clients=list(clients), attempt=attempt)

    def replied(self, instruction: Instruction, reply: Reply, seconds: float) -> None:
        """A reply was accepted."""
        self._count("replies_total", reply.client, instruction)
        self._count("received_bytes_total", reply.client, instruction, reply.bytes())
        self._numbers["reply_seconds", reply.client, instruction.kind] = seconds
        told: dict[str, Any] = {"client": reply.client, "bytes": reply.bytes(), "seconds": round(seconds, 3)}
        for key in ("shard", "shards"):
            if isinstance(reply.content.get(key), int):
                told[key] = reply.content[key]
        self._event("replied", instruction, **told)

    def dropped(self, instruction: Instruction, reply: Reply) -> None:
        """A late or repeated reply was dropped."""
        self._event("dropped", instruction, client=reply.client)

    def failed(self, instruction: Instruction, client: str, why: str, seconds: float) -> None:
        """A client failed or was absent; the request may be repeated."""
        self._count("failures_total", client, instruction)
        self._event("failed", instruction, client=client, why=why, seconds=round(seconds, 3))
        self.progress.log(f"round {instruction.round}: {client} did not {instruction.kind}: {why}")

    def given_up(self, instruction: Instruction, client: str) -> None:
        """The request to a client is not repeated in this round."""
        self._event("given_up", instruction, client=client)
        self.progress.log(f"round {instruction.round}: went on without {client}")

    def _count(self, name: str, client: str, instruction: Instruction, by: int = 1) -> None:
        self._numbers[name, client, instruction.kind] += by

    def _event(self, event: str, instruction: Instruction, **told: Any) -> None:
        line: dict[str, Any] = {
            "time": round(time.time(), 3),
            "event": event,
            "task": instruction.kind,
            "round": instruction.round,
        }
        with (self.root / EVENTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, **told}) + "\n")
        partial = self.root / layout.partial(EVENT_COUNTS)
        partial.write_text(self.metrics(), encoding="utf-8")
        partial.replace(self.root / EVENT_COUNTS)

    def metrics(self) -> str:
        """The counters in the text format of Prometheus, for a file collector."""
        lines = []
        for name, (kind, text) in HELP.items():
            rows = sorted((client, what, n) for (of, client, what), n in self._numbers.items() if of == name)
            if rows:
                lines += [f"# HELP feddistill_{name} {text}", f"# TYPE feddistill_{name} {kind}"]
            for client, what, number in rows:
                labels = f'client="{client}"' + (f',task="{what}"' if what else "")
                lines.append(f"feddistill_{name}{{{labels}}} {number:g}")
        return "\n".join([*lines, ""])
