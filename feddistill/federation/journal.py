"""What happens between server and clients: a line of JSON for each event, and numbers for Prometheus."""

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from feddistill.federation.protocol import Reply, Task
from feddistill.progress import Show

EVENTS = "federation.jsonl"
METRICS = "metrics.prom"

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

    def __init__(self, root: Path, show: Show):
        self.root = root
        self.show = show
        self._numbers: defaultdict[tuple[str, str, str], float] = defaultdict(float)

    def asked(self, task: Task, clients: Sequence[str], attempt: int) -> None:
        """Clients were sent ``task``."""
        for name in clients:
            self._count("tasks_total", name, task)
            self._numbers["round", name, ""] = task.round
        self._event("asked", task, clients=list(clients), attempt=attempt)

    def replied(self, task: Task, reply: Reply, seconds: float) -> None:
        """A reply was taken."""
        self._count("replies_total", reply.client, task)
        self._count("received_bytes_total", reply.client, task, reply.bytes())
        self._numbers["reply_seconds", reply.client, task.kind] = seconds
        told: dict[str, Any] = {"client": reply.client, "bytes": reply.bytes(), "seconds": round(seconds, 3)}
        for key in ("shard", "shards"):
            if isinstance(reply.content.get(key), int):
                told[key] = reply.content[key]
        self._event("replied", task, **told)

    def dropped(self, task: Task, reply: Reply) -> None:
        """A reply came late, or a second time."""
        self._event("dropped", task, client=reply.client)

    def failed(self, task: Task, client: str, why: str, seconds: float) -> None:
        """A client failed or was absent; it may be asked again."""
        self._count("failures_total", client, task)
        self._event("failed", task, client=client, why=why, seconds=round(seconds, 3))
        self.show.say(f"round {task.round}: {client} did not {task.kind}: {why}")

    def given_up(self, task: Task, client: str) -> None:
        """A client is not asked again in this round."""
        self._event("given_up", task, client=client)
        self.show.say(f"round {task.round}: went on without {client}")

    def _count(self, name: str, client: str, task: Task, by: int = 1) -> None:
        self._numbers[name, client, task.kind] += by

    def _event(self, event: str, task: Task, **told: Any) -> None:
        line: dict[str, Any] = {
            "time": round(time.time(), 3),
            "event": event,
            "task": task.kind,
            "round": task.round,
        }
        with (self.root / EVENTS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({**line, **told}) + "\n")
        partial = self.root / f"{METRICS}.partial"
        partial.write_text(self.metrics(), encoding="utf-8")
        partial.replace(self.root / METRICS)

    def metrics(self) -> str:
        """In the text format of Prometheus, for a file collector."""
        lines = []
        for name, (kind, text) in HELP.items():
            rows = sorted((client, what, n) for (of, client, what), n in self._numbers.items() if of == name)
            if rows:
                lines += [f"# HELP feddistill_{name} {text}", f"# TYPE feddistill_{name} {kind}"]
            for client, what, number in rows:
                labels = f'client="{client}"' + (f',task="{what}"' if what else "")
                lines.append(f"feddistill_{name}{{{labels}}} {number:g}")
        return "\n".join([*lines, ""])
