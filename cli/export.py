"""``feddistill export``."""

from pathlib import Path

import click

from feddistill.cli.paths import UserPath


@click.command()
@click.argument("run", type=UserPath())
@click.option(
    "--out",
    type=UserPath(file_okay=False),
    help="Directory of the exported model.  [default: RUN-export]",
)
@click.option(
    "--licence",
    "--license",
    default="unknown",
    show_default=True,
    metavar="NAME",
    help="Licence of the student, by its name on the hub: apache-2.0, cc-by-4.0, ...",
)
@click.option(
    "--anonymous", is_flag=True, help="Omit the clients' names and numbers of examples from the model card."
)
@click.option("--push", metavar="OWNER/NAME", help="Also upload the model to the Hugging Face hub.")
@click.option("--private", is_flag=True, help="Make the repository on the hub private.")
def export(
    run: Path, out: Path | None, licence: str, anonymous: bool, push: str | None, private: bool
) -> None:
    """Export RUN's student for transformers: weights, tokenizer, model card.

    \b
    Example:
      feddistill export runs/quickstart --out student --licence apache-2.0
    """
    from feddistill.errors import ConfigError
    from feddistill.progress import TerminalProgress
    from feddistill.store.run_directory import free

    if private and push is None:
        raise ConfigError("--private needs --push")
    with TerminalProgress().step("load torch and transformers"):
        from feddistill import release

    folder = release.export(
        run, out or free(run.with_name(f"{run.name}-export")), licence=licence, anonymous=anonymous
    )
    click.echo(f"model: {folder}\ncard: {folder / 'README.md'}")
    if push is not None:
        click.echo(f"hub: {release.push(folder, push, private=private)}")
