"""Progress of a run: bars in a terminal, log lines elsewhere."""

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich import progress as bars
from rich.console import Console
from rich.live import Live
from rich.table import Table

from feddistill.types import ProgressCallback


class Progress(Protocol):
    """Shows the steps of a run."""

    def step(self, label: str) -> AbstractContextManager[ProgressCallback]:
        """Context manager: shows ``label`` and yields a progress callback."""
        ...

    def log(self, line: str) -> None:
        """A line that stays."""
        ...

    def table(self, table: Table | None) -> None:
        """A table in the place of the last one, at the foot of the terminal; ``None`` takes it away."""
        ...


class NoProgress:
    """Shows nothing: for tests, and programs that import us."""

    @contextmanager
    def step(self, label: str) -> Iterator[ProgressCallback]:
        """No output."""
        yield lambda done, total: None

    def log(self, line: str) -> None:
        """No output."""

    def table(self, table: Table | None) -> None:
        """No output."""


class TerminalProgress:
    """A bar for the step that runs, and a line for each thing worth keeping; lines only when piped."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(file=sys.stderr)
        self._live: Live | None = None

    @contextmanager
    def step(self, label: str) -> Iterator[ProgressCallback]:
        """A bar that shows ``label``."""
        columns = (
            bars.TextColumn("{task.description}"),
            bars.BarColumn(),
            bars.MofNCompleteColumn(),
            bars.TimeElapsedColumn(),
        )
        with bars.Progress(
            *columns, console=self.console, transient=True, disable=not self.console.is_terminal
        ) as shown:
            task = shown.add_task(label, total=None)

            def on_step(done: int, total: int) -> None:
                shown.update(task, completed=done, total=total)

            yield on_step

    def log(self, line: str) -> None:
        """Print a line."""
        self.console.print(line, highlight=False, markup=False)

    def table(self, table: Table | None) -> None:
        """Show a table at the foot of the terminal; nothing when piped."""
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
