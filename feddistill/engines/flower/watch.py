"""Shows the progress of a run that another process coordinates: log lines and a table of its clients."""

import json
from pathlib import Path

from rich.table import Table

from feddistill.progress import Progress
from feddistill.store.layout import EVENTS
from feddistill.store.run_directory import Json

"""In the folder that the command made for this: whether all went well, or what the user can mend."""
STATES = {"asked": "working", "replied": "done", "failed": "failed", "given_up": "left out"}


class Watch:
    """Reads what is new at each call."""

    def __init__(self, out: Path, said: Path, progress: Progress):
        self.events, self.said, self.progress = out / EVENTS, said, progress
        self._at = {self.events: self.events.stat().st_size if self.events.exists() else 0}
        self.rows: dict[str, Json] = {}

    def look(self) -> None:
        """Show new log lines and each client's last state."""
        for line in self._new(self.said):
            self.progress.log(line)
        changed = False
        for line in self._new(self.events):
            changed = self._take(json.loads(line)) or changed
        if changed:
            self.progress.table(self.table())

    def close(self) -> None:
        """Remove the table."""
        self.progress.table(None)

    def table(self) -> Table:
        """Clients in the order of their names."""
        made = Table("client", "round", "task", "state", "shard", "received", "seconds")
        for name, row in sorted(self.rows.items()):
            shard = f"{row.get('shard', 0) + 1}/{row['shards']}" if row.get("shards", 1) > 1 else ""
            seconds = f"{row['seconds']:.1f}" if "seconds" in row else ""
            made.add_row(
                name, str(row["round"]), row["task"], row["state"], shard, f"{row['received']:,} B", seconds
            )
        return made

    def _take(self, event: Json) -> bool:
        if event["event"] not in STATES:
            return False
        names = event["clients"] if event["event"] == "asked" else [event["client"]]
        for name in names:
            received = self.rows.get(name, {}).get("received", 0) + event.get("bytes", 0)
            told: Json = {
                key: event[key] for key in ("round", "task", "shard", "shards", "seconds") if key in event
            }
            self.rows[name] = {**told, "state": STATES[event["event"]], "received": received}
        return True

    def _new(self, path: Path) -> list[str]:
        """Complete lines that have been added."""
        if not path.exists():
            return []
        with path.open("rb") as file:
            file.seek(self._at.get(path, 0))
            text = file.read()
        whole = text.rfind(b"\n") + 1
        self._at[path] = self._at.get(path, 0) + whole
        return text[:whole].decode().splitlines()
