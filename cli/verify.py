"""``feddistill verify``."""

from pathlib import Path

import click

from feddistill.cli.paths import UserPath


@click.command()
@click.argument("run", type=UserPath())
@click.option(
    "--client-folder",
    "kept",
    type=UserPath(exists=True, file_okay=False),
    help="Folder of a client: check that RUN (or its ledger.json) agrees with the files kept there.",
)
@click.option("--recompute", is_flag=True, help="Re-aggregate every teacher from the payloads and compare.")
@click.option("--quiet", is_flag=True, help="Print only failed checks.")
def verify(run: Path, kept: Path | None, recompute: bool, quiet: bool) -> None:
    """Verify RUN against its ledger; exit status 1 if a check fails.

    The ledger is a hash chain over all requests, payloads and teachers. Each request, and each answer to
    it, includes the head of the ledger before that round.
    """
    from feddistill.progress import NoProgress
    from feddistill.runs import verify

    found = verify.kept(run, kept) if kept else verify.run(run, recompute=recompute, progress=NoProgress())
    wrong = 0
    for finding in found:
        wrong += not finding.right
        if not (quiet and finding.right):
            click.echo(f"{'ok   ' if finding.right else 'WRONG'} {finding.what}")
    if wrong:
        click.echo(f"{wrong} wrong", err=True)
        raise click.exceptions.Exit(1)
