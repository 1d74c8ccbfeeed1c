"""The type of every path on the command line."""

import os.path
from pathlib import Path

import click
from typing_extensions import override


class UserPath(click.Path):
    """A path; ``~`` at its beginning is the home directory (in ``--out=~/run`` the shell leaves it)."""

    def __init__(self, *, exists: bool = False, file_okay: bool = True, dir_okay: bool = True) -> None:
        """As for ``click.Path``."""
        super().__init__(exists=exists, file_okay=file_okay, dir_okay=dir_okay, path_type=Path)

    @override
    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        return super().convert(os.path.expanduser(value), param, ctx)
