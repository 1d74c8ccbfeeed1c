"""``feddistill train``."""

from pathlib import Path

import click


@click.command()
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting; may be repeated."
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    help="Directory of the run.  [default: runs/NAME, or the next free runs/NAME-2, ...]",
)
@click.option("--resume", is_flag=True, help="Go on with the interrupted run in --out.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def train(
    config: Path | None, overrides: tuple[str, ...], out: Path | None, resume: bool, quiet: bool
) -> None:
    """Train a student on what CONFIG's clients know.

    Without CONFIG: the embedded quickstart, offline, on real text, in minutes on two cores.

    \b
    Example:
      feddistill train examples/quickstart.yaml --set distill.temperature=4
    """
    from feddistill import config as configuration
    from feddistill.errors import ConfigError

    if resume and out is None:
        raise ConfigError("--resume needs --out DIR: the run to go on with")
    stored = resume and config is None and out is not None
    settings = configuration.load(out / "config.yaml" if stored and out else config, overrides)

    from feddistill.progress import Quiet, Terminal
    from feddistill.store import free

    show = Quiet() if quiet else Terminal()
    with show.step("load torch and transformers"):  # seconds; a wrong setting has not waited for it
        from feddistill import experiment, report

    out = out or free(Path("runs") / settings.name)
    show.say(f"run: {out}")
    result = experiment.run(settings, out, resume=resume, show=show)
    with show.step("write the report"):
        page = report.write(out)
    if not quiet:
        report.print_table(result)
        click.echo(f"report: {page}")
