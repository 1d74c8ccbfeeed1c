"""The ``feddistill`` command. Each subcommand's module is imported only when it runs: ``--help`` is fast."""

from importlib import import_module

import click
from click.shell_completion import CompletionItem
from typing_extensions import override

from feddistill import __version__
from feddistill.errors import FeddistillError

COMMANDS = {
    "train": "Train a student by federated distillation.",
    "plan": "Estimate what a run would cost, before it runs.",
    "evaluate": "Evaluate a run's student on its test set, on your texts, or on a benchmark.",
    "export": "Export a run's student for transformers, with a model card.",
    "report": "Regenerate the report of a run or a study.",
    "sweep": "Run a study: a grid of settings and seeds, resumable.",
    "compare": "Compare the metrics of several runs.",
    "aggregate": "Re-aggregate the stored answers of a run into new teachers.",
    "distill": "Distill another student from the stored teachers of a run.",
    "forget": "Redo a run without the contributions of given clients.",
    "verify": "Verify a run against its ledger.",
    "inspect": "Show the contents of a payload file and check its format.",
    "deploy": "Set up a federation over Flower: certificates, commands, a folder for each institution.",
    "keys": "Generate and show the key that signs a client's answers.",
    "config": "Show or check a configuration.",
    "kernels": "List the kernels and the backends available for them.",
    "bench": "Benchmark the kernels against PyTorch and others.",
}
"""Command name to help line; each command is a module of this package."""


class Commands(click.Group):
    """Command group that lists its commands without importing them and prints errors as one line."""

    @override
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    @override
    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"feddistill.cli.{cmd_name}"), cmd_name)
        return command

    @override
    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    @override
    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        return [
            CompletionItem(name, help=text) for name, text in COMMANDS.items() if name.startswith(incomplete)
        ]

    @override
    def invoke(self, ctx: click.Context) -> object:
        """Run the command; a ``FeddistillError`` is printed as one line and exits with status 2."""
        try:
            return super().invoke(ctx)
        except FeddistillError as error:
            click.echo(f"feddistill: {' '.join(str(error).split())}", err=True)
            ctx.exit(2)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="feddistill")
def main() -> None:
    """Federated distillation: train one language model together, without sharing data or weights."""
