"""``feddistill deploy``."""

from pathlib import Path

import click

from feddistill.cli.paths import UserPath


@click.group()
def deploy() -> None:
    """Set up a federation over Flower: one server, to which the institutions connect."""


@deploy.command()
@click.argument("folder", type=UserPath(file_okay=False))
@click.option(
    "--client",
    "clients",
    multiple=True,
    required=True,
    metavar="NAME",
    help="Name of an institution; may be repeated.",
)
@click.option("--host", required=True, help="Host name or address at which institutions reach the server.")
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    default=9092,
    show_default=True,
    help="Port of the server's reverse proxy.",
)
@click.option(
    "--runtime-port",
    type=click.IntRange(1, 65535),
    default=8000,
    show_default=True,
    help="Port of the SuperLink, on the loopback interface.",
)
@click.option(
    "--example", is_flag=True, help="Add example texts for each institution and a run that takes minutes."
)
def init(
    folder: Path, clients: tuple[str, ...], host: str, port: int, runtime_port: int, example: bool
) -> None:
    """Write FOLDER with certificates, the server's commands and a folder for each institution.

    With --host 127.0.0.1 everything runs on this machine, for a trial.

    \b
    Example:
      feddistill deploy init federation --host link.example.org --client north --client south
    """
    from feddistill.engines.flower import deployment

    deployment.write(folder, clients, host, port=port, runtime_port=runtime_port)
    if example:
        deployment.example(folder, clients)
    click.echo((folder / "README.md").read_text(encoding="utf-8"))
