"""``feddistill config``."""

from pathlib import Path

import click

from feddistill.cli.paths import UserPath


@click.group()
def config() -> None:
    """Show or check a configuration."""


@config.command()
@click.argument("config", required=False, type=UserPath())
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting.")
def show(config: Path | None, overrides: tuple[str, ...]) -> None:
    """Print CONFIG (default: the quickstart) with every default filled in."""
    from feddistill import config as configuration

    click.echo(configuration.dump(configuration.load(config, overrides)), nl=False)


@config.command()
@click.argument("config", required=False, type=UserPath())
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting.")
def check(config: Path | None, overrides: tuple[str, ...]) -> None:
    """Check CONFIG (default: the quickstart), its data and its models, without training."""
    from feddistill import config as configuration

    settings = configuration.load(config, overrides)

    from feddistill import data
    from feddistill.report import skew_lines
    from feddistill.runs import experiment

    splits = experiment.check(settings)
    for line in data.describe(settings.data):
        click.echo(line)
    for line in skew_lines(data.skew(splits)):
        click.echo(line)
    click.echo(f"ok: {configuration.digest(settings)}")
