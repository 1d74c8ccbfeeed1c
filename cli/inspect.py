"""``feddistill inspect``."""

from pathlib import Path

import click

from feddistill.cli.paths import UserPath


@click.command()
@click.argument("payload", type=UserPath())
@click.option("--spec", type=UserPath(), help="Request of the round to check PAYLOAD against.")
@click.option(
    "--envelope",
    type=UserPath(),
    help="PAYLOAD's envelope, for --spec.  [default: the .json file beside PAYLOAD]",
)
@click.option(
    "--rows", type=click.IntRange(0), default=3, show_default=True, help="Number of answers to show."
)
@click.option(
    "--top", type=click.IntRange(0), default=5, show_default=True, help="Entries to show of each answer."
)
def inspect(payload: Path, spec: Path | None, envelope: Path | None, rows: int, top: int) -> None:
    """Show the contents of PAYLOAD; fail if it is not well-formed.

    With --spec (a run stores it as rounds/NNN/spec.json), also run the checks that the server of that round
    ran, except those for a second submission and for the time.
    """
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from feddistill import payload as payloads
    from feddistill.errors import ConfigError, DataError

    def content_of(path: Path) -> bytes:
        try:
            return path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None

    if envelope is not None and spec is None:
        raise ConfigError("--envelope needs --spec: an envelope is checked against a request")
    content = content_of(payload)
    verdict = "well-formed"
    if spec is not None:
        request = payloads.parse_spec(content_of(spec))
        vouching = content_of(envelope or payload.with_suffix(".json"))
        payloads.admit(vouching, content, request, frozenset(), now=0)
        signed = "signed" if request.keys else "not signed: the round enrolled no keys"
        verdict = f"well-formed, and answers round {request.round} of run {request.run_id!a} ({signed})"
    answers, metadata = payloads.read(content)
    console = Console(highlight=False, markup=False, emoji=False)
    size = f"{len(content)} bytes, {len(content) / len(answers):.1f} an answer"
    console.print(f"{payload}: {verdict}, {size}", soft_wrap=True)
    facts = Table(show_header=False, box=None)
    for key, value in metadata.items():
        facts.add_row(key, ascii(value)[1:-1])
    console.print(facts)
    for row in range(min(rows, len(answers))):
        one = answers.rows(row, row + 1)
        if isinstance(one, payloads.Dense):
            kept, tail, count = one.log_probs()[0], None, one.k
            ids = np.argsort(-kept, kind="stable")[:top]
            shown = [(int(i), float(kept[i])) for i in ids]
        else:
            log_probs, tails = one.log_probs()
            count = one.k if (lengths := getattr(one, "lengths", None)) is None else int(lengths[0])
            shown = list(zip(one.ids[0][:count].tolist(), log_probs[0][:count].tolist(), strict=True))
            shown = sorted(shown, key=lambda entry: -entry[1])[:top]
            tail = float(np.logaddexp.reduce([*tails, *log_probs[0][count:]]))
        entries = ", ".join(f"{i}: {np.exp(value):.3f}" for i, value in shown)
        rest = "" if tail is None else f"; all but the {count} kept: {np.exp(tail):.3f}"
        console.print(f"answer {row}: {entries}{rest}", soft_wrap=True)
