"""``feddistill bench``; in a clone also ``python -m bench``."""

import json
import sys
from pathlib import Path
from typing import Any

import click

from feddistill.cli.paths import UserPath

from .bars import bars, described
from .names import FAMILIES, FAMILY
from .record import SCHEMA


def families(ctx: click.Context, parameter: click.Parameter, value: str | None) -> frozenset[str] | None:
    """Parse the comma-separated names of ``--compare``."""
    if value is None:
        return None
    names = frozenset(filter(None, value.split(",")))
    if unknown := sorted(names - set(FAMILIES)):
        raise click.BadParameter(f"{', '.join(unknown)}; choose from {', '.join(FAMILIES)}")
    return names


def results(ctx: click.Context, parameter: click.Parameter, path: Path | None) -> tuple[Path, Any] | None:
    """Read a result file: its path and content."""
    if path is None:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"cannot read {path}: {error}") from error
    if not isinstance(found, dict) or found.get("schema") != SCHEMA:
        raise click.BadParameter(f"{path} is not a result file of schema {SCHEMA}")
    return path, found


@click.command(
    context_settings={"help_option_names": ["-h", "--help"]}, epilog=f"Operators: {', '.join(FAMILY)}."
)
@click.argument("ops", metavar="[OPERATOR]...", nargs=-1, type=click.Choice(list(FAMILY)))
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Where the operators run.",
)
@click.option(
    "--compare",
    metavar="NAMES",
    callback=families,
    help=f"Competitors, comma-separated: {', '.join(FAMILIES)}.  [default: all that can run]",
)
@click.option(
    "--only", metavar="TEXT", default="", help="Run the cases whose name contains TEXT, e.g. 'float32 N=1 '."
)
@click.option("--headline", is_flag=True, help="Run only the headline cases, those that plots show.")
@click.option("--quick", is_flag=True, help="Smoke test: two cases per operator, briefly, no torch.compile.")
@click.option(
    "--out",
    type=UserPath(dir_okay=False),
    help="Write the result file, as JSON.",
)
@click.option(
    "--draw",
    metavar="FILE",
    type=UserPath(),
    callback=results,
    help="Measure nothing; plot the result file FILE: two SVG files beside it.",
)
@click.option(
    "--check",
    metavar="FILE",
    type=UserPath(),
    callback=results,
    help="Measure nothing; compare the result file FILE with the required speeds. The exit status is 1 if "
    "one is missed.",
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
    """Measure the kernels against PyTorch, torch.compile and other libraries.

    Without an OPERATOR, all are measured.

    Competitors run in one process, in turns, so that other load on the machine affects all of them alike.
    Before a case is timed, their results are compared with ours; if one differs, the exit status is 1.

    The table has one line per competitor: median time and its quartiles, the median as a multiple of the
    case's limit (the bytes that must move, at the speed of a plain copy), bandwidth and its share of the
    copy's, the time as a multiple of ours, and the extra memory of a call. Details: bench/METHOD.md in the
    repository.
    """
    if draw or check:
        if draw:
            from .draw import draw as write

            for plot in write(draw[1], draw[0]):
                click.echo(plot)
        sys.exit(report(check[1]) if check else 0)
    import torch

    from .cases import Setup, chosen
    from .run import run
    from .timing import DisagreementError

    if device == "cuda" and not torch.cuda.is_available():
        raise click.BadParameter("no GPU that PyTorch can use", param_hint="--device")
    if compare is None:
        compare = frozenset(FAMILIES) - ({"compile"} if quick else set())
    found = chosen(ops or tuple(FAMILY), device, only, quick)
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
    """Print each requirement and whether it is met; return the exit status."""
    *lines, last = described(bars(found))
    for line in (*lines, last):
        click.echo(line)
    return int(last != "0 missed")


if __name__ == "__main__":
    main()
