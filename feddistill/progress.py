"""What a person sees while a run works: bars in a terminal, nothing elsewhere."""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from feddistill.types import Tick


class Show(Protocol):
    """How steps of a run are shown."""

    def step(self, label: str) -> AbstractContextManager[Tick]:
        """Show ``label`` while the body runs; the body calls what it is given."""
        ...

    def say(self, line: str) -> None:
        """A line that stays."""
        ...

    def table(self, table: Table | None) -> None:
        """A table in the place of the last one, at the foot of the terminal; ``None`` takes it away."""
        ...


class Quiet:
    """Shows nothing: for tests, and programs that import us."""

    @contextmanager
    def step(self, label: str) -> Iterator[Tick]:
        """See ``Show``."""
        yield lambda done, total: None

    def say(self, line: str) -> None:
        """See ``Show``."""

    def table(self, table: Table | None) -> None:
        """See ``Show``."""


class Terminal:
    """A bar for the step that runs, and a line for each thing worth keeping; lines only when piped."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(file=sys.stderr)
        self._live: Live | None = None

    @contextmanager
    def step(self, label: str) -> Iterator[Tick]:
        """See ``Show``."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(
            *columns, console=self.console, transient=True, disable=not self.console.is_terminal
        ) as bars:
            task = bars.add_task(label, total=None)

            def tick(done: int, total: int) -> None:
                bars.update(task, completed=done, total=total)

            yield tick

    def say(self, line: str) -> None:
        """See ``Show``."""
        self.console.print(line, highlight=False, markup=False)

    def table(self, table: Table | None) -> None:
        """See ``Show``; nothing when piped."""
        if not self.console.is_terminal:
            return
        if table is None:
            if self._live is not None:
                self._live.stop()
            self._live = None
            return
        if self._live is None:
            self._live = Live(console=self.console, transient=True, auto_refresh=False)
            self._live.start()
        self._live.update(table, refresh=True)
