"""``feddistill inspect``."""

from pathlib import Path

import click


@click.command()
@click.argument("payload", type=click.Path(path_type=Path))
@click.option("--rows", default=3, show_default=True, help="How many answers to show.")
@click.option("--top", default=5, show_default=True, help="How many entries of each.")
def inspect(payload: Path, rows: int, top: int) -> None:
    """Show what PAYLOAD says, and refuse it where it is not well-formed.

    Whether it answers a certain round is for the server of that round to say.
    """
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from feddistill import payload as payloads
    from feddistill.errors import DataError

    try:
        content = payload.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {payload}: {error.strerror}") from None
    answers, metadata = payloads.read(content)
    console = Console(highlight=False, markup=False)
    console.print(
        f"{payload}: well-formed, {len(content)} bytes, {len(content) / len(answers):.1f} an answer"
    )
    facts = Table(show_header=False, box=None)
    for key, value in metadata.items():
        facts.add_row(key, ascii(value)[1:-1])
    console.print(facts)
    for row in range(min(rows, len(answers))):
        one = answers.rows(row, row + 1)
        if isinstance(one, payloads.Dense):
            kept, tail = one.log_probs()[0], None
            ids = np.argsort(-kept, kind="stable")[:top]
            shown = [(int(i), float(kept[i])) for i in ids]
        else:
            log_probs, tails = one.log_probs()
            shown = list(zip(one.ids[0][:top].tolist(), log_probs[0][:top].tolist(), strict=True))
            tail = float(tails[0])
        entries = ", ".join(f"{i}: {np.exp(value):.3f}" for i, value in shown)
        rest = "" if tail is None else f"; all but the {one.codes.shape[1]} kept: {np.exp(tail):.3f}"
        console.print(f"answer {row}: {entries}{rest}")
