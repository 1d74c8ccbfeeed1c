"""The ``feddistill`` command. A command's module is imported when it runs: ``--help`` is instant."""

from importlib import import_module

import click
from click.shell_completion import CompletionItem

from feddistill import __version__
from feddistill.errors import FeddistillError

COMMANDS = {
    "train": "Train a student on what several clients know.",
    "plan": "Say what a run would cost, before it runs.",
    "evaluate": "Evaluate a run's student: its own test set, your texts, or a benchmark.",
    "export": "Write a run's student as transformers loads it, with a model card.",
    "report": "Write a run's or a study's report again.",
    "sweep": "Run a study: a grid of settings and seeds, resumable.",
    "compare": "Show the figures of several runs side by side.",
    "aggregate": "Make other teachers of the answers that a run stored.",
    "distill": "Train another student from the teachers that a run stored.",
    "forget": "Make a run again as if a client had never been there.",
    "verify": "Check that a run is what its ledger says.",
    "inspect": "Show what a payload file says, and whether it is well-formed.",
    "deploy": "Prepare a federation over Flower: certificates, commands, a folder for each institution.",
    "keys": "Make and show the key that signs a client's answers.",
    "config": "Show or check a configuration.",
    "kernels": "List the kernels and what runs them here.",
    "bench": "Measure the kernels against PyTorch and others.",
}
"""Command name to help line: one module of this package each."""


class Commands(click.Group):
    """Knows every command's name and help without importing it; turns our errors into one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of one command."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"feddistill.cli.{cmd_name}"), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """From the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """From the table alone."""

        return [
            CompletionItem(name, help=text) for name, text in COMMANDS.items() if name.startswith(incomplete)
        ]

    def invoke(self, ctx: click.Context) -> object:
        """A user's mistake is one line and exit status 2; ours keeps its traceback."""
        try:
            return super().invoke(ctx)
        except FeddistillError as error:
            click.echo(f"feddistill: {' '.join(str(error).split())}", err=True)
            ctx.exit(2)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="feddistill")
def main() -> None:
    """Federated distillation: train one language model together, share neither data nor weights."""
