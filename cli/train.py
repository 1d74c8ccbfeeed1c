"""``feddistill train``."""

from pathlib import Path

import click

from feddistill.cli.paths import UserPath


@click.command()
@click.argument("config", required=False, type=UserPath())
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting; may be repeated."
)
@click.option(
    "--out",
    type=UserPath(file_okay=False),
    help="Directory of the run.  [default: runs/NAME, or the next free runs/NAME-2, ...]",
)
@click.option("--resume", is_flag=True, help="Resume the interrupted run in --out.")
@click.option("--quiet", is_flag=True, help="Print only errors.")
@click.option(
    "--engine",
    type=click.Choice(["local", "flower-sim", "flower"]),
    default="local",
    show_default=True,
    help="Where clients run: in this process, in Flower's simulation, or at SuperNodes.",
)
@click.option("--superlink", metavar="HOST:PORT", help="Engine flower: address of the SuperLink.")
@click.option(
    "--root-certificates",
    type=UserPath(exists=True, dir_okay=False),
    help="Engine flower: root certificates that verify the SuperLink.",
)
@click.option(
    "--connect-timeout",
    "connect",
    default=600.0,
    show_default=True,
    help="Engine flower: seconds to wait for clients to connect.",
)
@click.option(
    "--reply-timeout",
    "reply",
    default=3600.0,
    show_default=True,
    help="Engine flower: seconds to wait for a reply.",
)
@click.option(
    "--attempts", default=3, show_default=True, help="Engine flower: attempts to send a request to a client."
)
def train(
    config: Path | None,
    overrides: tuple[str, ...],
    out: Path | None,
    resume: bool,
    quiet: bool,
    engine: str,
    superlink: str | None,
    root_certificates: Path | None,
    connect: float,
    reply: float,
    attempts: int,
) -> None:
    """Train a student by federated distillation as CONFIG specifies.

    Without CONFIG: the embedded quickstart, offline, on real text, in minutes on two cores.
    All engines give the same results; see docs/deployment.md for deployment over Flower.

    \b
    Example:
      feddistill train examples/quickstart.yaml --set distill.temperature=4
      feddistill train --engine flower --superlink 127.0.0.1:8000 --root-certificates ca.crt
    """
    from feddistill import config as configuration
    from feddistill.errors import ConfigError
    from feddistill.store.layout import CONFIG

    if (engine == "flower") != (superlink is not None):
        raise ConfigError("--engine flower needs --superlink, and --superlink needs --engine flower")
    if resume and out is None:
        raise ConfigError("--resume needs --out DIR, the run to resume")
    stored = resume and config is None and out is not None
    settings = (
        configuration.load_stored(out / CONFIG, overrides)
        if stored and out
        else configuration.load(config, overrides)
    )

    from feddistill.progress import NoProgress, TerminalProgress
    from feddistill.store.run_directory import free

    progress = NoProgress() if quiet else TerminalProgress()
    with progress.step("load torch and transformers"):  # takes seconds: settings are checked first
        from feddistill import report
        from feddistill.runs import experiment
    out = out or free(Path("runs") / settings.name)
    progress.log(f"run: {out}")
    if engine == "local":
        result = experiment.run(settings, out, resume=resume, progress=progress)
    else:
        from feddistill.engines.flower import launch
        from feddistill.federation.protocol import RetryPolicy

        link = None if superlink is None else launch.Link(superlink, root_certificates)
        retry_policy = RetryPolicy(connect, reply, attempts)
        result = launch.train(
            settings, out, link, resume=resume, retry_policy=retry_policy, progress=progress
        )
    with progress.step("write the report"):
        page = report.write(out)
    if not quiet:
        report.print_table(result)
        click.echo(f"report: {page}")
