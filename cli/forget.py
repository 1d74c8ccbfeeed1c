"""``feddistill forget``."""

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--client", "clients", multiple=True, required=True, metavar="NAME", help="Whom; may be repeated."
)
@click.option(
    "--out", type=click.Path(file_okay=False, path_type=Path), help="A new run.  [default: RUN-without-NAME]"
)
def forget(run: Path, clients: tuple[str, ...], out: Path | None) -> None:
    """Make RUN again as if a client had never been there; only what it had a part in is done again.

    RUN is not changed. Delete it, and its copies, when the new run is what you go on with: its payloads are
    what the client said.

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
