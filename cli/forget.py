"""``feddistill forget``."""

from pathlib import Path

import click

from feddistill.cli.paths import UserPath


@click.command()
@click.argument("run", type=UserPath())
@click.option(
    "--client",
    "clients",
    multiple=True,
    required=True,
    metavar="NAME",
    help="Client to remove; may be repeated.",
)
@click.option(
    "--out",
    type=UserPath(file_okay=False),
    help="Directory of the new run.  [default: RUN-without-NAME]",
)
def forget(run: Path, clients: tuple[str, ...], out: Path | None) -> None:
    """Redo RUN without the given clients; only the steps that depended on them are recomputed.

    RUN is not changed. It still contains the client's payloads: delete it and its copies once you use the
    new run.

    \b
    Example:
      feddistill forget runs/quickstart --client client-2
    """
    from feddistill.progress import TerminalProgress
    from feddistill.store.run_directory import free

    progress = TerminalProgress()
    with progress.step("load torch and transformers"):
        from feddistill import report
        from feddistill.runs import rerun

    out = out or free(run.with_name(f"{run.name}-without-{'-'.join(clients)}"))
    result = rerun.forget(run, out, clients, progress=progress)
    page = report.write(out)
    report.print_table(result)
    click.echo(f"run: {out}\nreport: {page}")
