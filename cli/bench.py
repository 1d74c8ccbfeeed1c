"""``feddistill bench``."""

import sys
from pathlib import Path

import click


@click.command(context_settings={"ignore_unknown_options": True}, add_help_option=False)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def bench(ctx: click.Context, arguments: tuple[str, ...]) -> None:
    """Run the benchmarks of the tree that feddistill stands in: ``python -m bench``."""
    import feddistill
    from feddistill.errors import FeddistillError

    tree = Path(feddistill.__file__).parents[1]
    if not (tree / "bench" / "__main__.py").is_file():
        if {"-h", "--help"} & set(arguments):
            click.echo(ctx.get_help())
            return
        raise FeddistillError(
            "bench is not part of an installed feddistill; run `python -m bench` in a clone of the repository"
        )
    sys.path.insert(0, str(tree))
    from bench.__main__ import main

    main(list(arguments), prog_name=ctx.command_path)
