"""``feddistill keys``."""

from pathlib import Path

import click

from feddistill.cli.paths import UserPath


@click.group()
def keys() -> None:
    """Generate and show the key that signs a client's answers."""


@keys.command()
@click.argument("file", type=UserPath())
def make(file: Path) -> None:
    """Generate a private key, write it to FILE and print its public key.

    FILE is PEM (PKCS #8, not encrypted) with permissions for its owner only; an existing file is never
    overwritten. The server enrols the public key.

    \b
    Example:
      feddistill keys make north.pem
    """
    from feddistill.payload import keys as signing

    click.echo(signing.make(file).public)


@keys.command()
@click.argument("file", type=UserPath())
def show(file: Path) -> None:
    """Print the public key of the private key in FILE."""
    from feddistill.payload import keys as signing

    click.echo(signing.load(file).public)
