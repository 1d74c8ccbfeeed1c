"""``feddistill keys``."""

from pathlib import Path

import click


@click.group()
def keys() -> None:
    """Make and show the key that signs a client's answers."""


@keys.command()
@click.argument("file", type=click.Path(path_type=Path))
def make(file: Path) -> None:
    """Write a new private key to FILE and print its public key.

    FILE is PEM (PKCS #8, not encrypted), readable by its owner alone; a file that exists is never
    overwritten. The public key goes to the server, which enrols it.

    \b
    Example:
      feddistill keys make north.pem
    """
    from feddistill.payload import keys as signing

    click.echo(signing.make(file).public)


@keys.command()
@click.argument("file", type=click.Path(path_type=Path))
def show(file: Path) -> None:
    """Print the public key of the private key in FILE."""
    from feddistill.payload import keys as signing

    click.echo(signing.load(file).public)
