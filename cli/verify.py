"""``feddistill verify``."""

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--client-folder",
    "kept",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A client's own folder: check that RUN (or its ledger.json) tells what this client has seen.",
)
@click.option("--recompute", is_flag=True, help="Make every teacher again from the payloads, and compare.")
@click.option("--quiet", is_flag=True, help="Print only what is wrong.")
def verify(run: Path, kept: Path | None, recompute: bool, quiet: bool) -> None:
    """Check that RUN is what its ledger says; exit status 1 if not.

    The ledger chains the hashes of all requests, payloads and teachers. Each request names the ledger so far,
    and so does each answer to it.
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
