"""When a run will be done: lines of progress that say what is going on and how long it will take."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.table import Table

from feddistill.progress import Progress
from feddistill.runs.operations import jobs_of, learners_of, operations, run_operations
from feddistill.store.layout import RECORDS
from feddistill.store.run_directory import RunDirectory, read_object
from feddistill.tasks.session import Session
from feddistill.types import ProgressCallback

FIRST = 10.0
"""Seconds until the first line."""
LATER = 300.0
"""Seconds between two lines after it."""


@dataclass
class Forecast:
    """Progress that also logs, after ten seconds and then every five minutes, when the run will be done."""

    progress: Progress
    started: float = field(default_factory=time.monotonic)
    session: Session | None = None
    """The session whose operations are counted."""
    remaining: int = 0
    """Operations of the run that are to be done from ``expect`` on; 0: not known."""
    _last: float | None = None
    """When the last line was logged."""
    _since: float = 0.0

    def expect(self, session: Session) -> None:
        """Foretell the operations of ``session``, of which some may be done, before anything is trained."""
        clients, student = learners_of(session)
        jobs = jobs_of(session, clients, student)
        self.session, self.remaining = session, run_operations(jobs, session.config)
        if finished := done(session.run):  # records count frozen layers in every step that uses them
            recorded = sum(operations(job, session.config) * job.times for job in jobs)
            self.remaining = max(round(self.remaining * (1 - finished / recorded)), 0)
        session.work.flops = 0
        self._since = time.monotonic()

    @contextmanager
    def step(self, label: str) -> Iterator[ProgressCallback]:
        """As the progress that is wrapped."""
        with self.progress.step(label) as inner:

            def on_step(done: int, total: int) -> None:
                inner(done, total)
                self._tell(f"{label}, {done} of {total}")

            yield on_step

    def log(self, line: str) -> None:
        """As the progress that is wrapped."""
        self.progress.log(line)

    def table(self, table: Table | None) -> None:
        """As the progress that is wrapped."""
        self.progress.table(table)

    def _tell(self, what: str) -> None:
        now = time.monotonic()
        if now < (self.started + FIRST if self._last is None else self._last + LATER):
            return
        self._last = now
        left = self._left(now)
        then = "" if left is None else f"; done in about {duration(left)}"
        self.progress.log(f"{what}{then}")

    def _left(self, now: float) -> float | None:
        """Seconds until the run is done; ``None`` if it cannot be foretold."""
        work = 0 if self.session is None else self.session.work.flops
        if not work or work >= self.remaining:
            return None
        return (now - self._since) * (self.remaining - work) / work


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, to two figures or so.

    >>> duration(8), duration(96), duration(5000)
    ('10 s', '1 min 40 s', '1 h 23 min')
    """
    if seconds < 55:
        return f"{max(10 * round(seconds / 10), 10)} s"
    if seconds < 600:
        minutes, rest = divmod(10 * round(seconds / 10), 60)
        return f"{minutes} min" + (f" {rest} s" if rest else "")
    hours, minutes = divmod(round(seconds / 60), 60)
    return (f"{hours} h " if hours else "") + f"{minutes} min"


def done(run: RunDirectory) -> int:
    """Operations of the steps that ``run`` has recorded."""
    total = 0
    for path in run.path(RECORDS).rglob("*.json"):
        content = read_object(path).get("content", {})
        costs = [*content.get("costs", {}).values(), *([content["cost"]] if "cost" in content else [])]
        total += sum(cost["flops"] for cost in costs if "flops" in cost)
    return total
