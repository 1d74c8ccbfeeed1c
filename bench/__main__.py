"""``python -m bench``, from the root of the repository."""

import json
import sys
from pathlib import Path
from typing import Any

import click
import torch

from bench.bars import bars, said
from bench.baselines import FAMILIES
from bench.cases import OPERATORS, Setup, chosen
from bench.run import SCHEMA, run
from bench.timing import DisagreementError


def families(ctx: click.Context, parameter: click.Parameter, value: str | None) -> frozenset[str] | None:
    """Names between commas."""
    if value is None:
        return None
    names = frozenset(filter(None, value.split(",")))
    if unknown := sorted(names - set(FAMILIES)):
        raise click.BadParameter(f"{', '.join(unknown)}; choose from {', '.join(FAMILIES)}")
    return names


def results(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> tuple[Path, Any] | None:
    """A result file and what it holds."""
    if path is None:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise click.BadParameter(f"{path} is not a result file of schema {SCHEMA}")
    return path, found


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("ops", metavar="[OP]...", nargs=-1, type=click.Choice(list(OPERATORS)))
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--compare",
    metavar="NAMES",
    callback=families,
    help=f"Of {','.join(FAMILIES)}; default: those that can run.",
)
@click.option("--only", metavar="TEXT", default="", help="Cases whose name holds TEXT, say 'float32 N=1 '.")
@click.option("--headline", is_flag=True, help="Only the cases that figures show.")
@click.option(
    "--quick", is_flag=True, help="Two cases an operator, briefly, without the compiler: does it work?"
)
@click.option(
    "--out", type=click.Path(dir_okay=False, path_type=Path), help="Write what was measured here, as JSON."
)
@click.option(
    "--draw", metavar="FILE", type=click.Path(path_type=Path), callback=results, help="Draw a result file."
)
@click.option(
    "--check",
    metavar="FILE",
    type=click.Path(path_type=Path),
    callback=results,
    help="Hold a result file against the bars; exit status 1 where one is missed.",
)
def main(
    ops: tuple[str, ...],
    device: str,
    compare: frozenset[str] | None,
    only: str,
    headline: bool,
    quick: bool,
    out: Path | None,
    draw: tuple[Path, Any] | None,
    check: tuple[Path, Any] | None,
) -> None:
    """Measure operators, all by default, against eager PyTorch, torch.compile and peers.

    They run in one process and in turns, so that whatever else the machine does hits them alike.  How, and
    how to read it: bench/METHOD.md.  Where one computes something else than ours the run ends with status 1.
    """
    if draw or check:
        if draw:
            from bench.draw import draw as write

            for figure in write(draw[1], draw[0]):
                click.echo(figure)
        sys.exit(report(check[1]) if check else 0)
    if device == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("no GPU that PyTorch can use", param_hint="--device")
    if compare is None:
        compare = frozenset(FAMILIES) - ({"compile"} if quick else set())
    found = chosen(ops or tuple(OPERATORS), device, only, quick)
    cases = [case for case in found if case.headline or not headline]
    if not cases:
        raise click.UsageError("no such case")
    try:
        measured = run(cases, Setup(device, compare), quick=quick, echo=click.echo)
    except DisagreementError as error:
        raise click.ClickException(str(error)) from error
    if out:
        out.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


def report(found: dict[str, Any]) -> int:
    """Print the bars; the exit status."""
    *lines, last = said(bars(found))
    for line in (*lines, last):
        click.echo(line)
    return int(last != "0 missed")


if __name__ == "__main__":
    main(prog_name="python -m bench")
