"""``feddistill kernels``."""

import click


@click.command()
def kernels() -> None:
    """List the kernels and the backends available on this machine."""
    import torch
    from rich.console import Console
    from rich.table import Table

    import feddistill_kernels as fk

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    table = Table("operator", *(f"{device} (first is used)" for device in devices))
    for op in fk.operators():
        table.add_row(op, *(", ".join(fk.available_backends(op, device)) or "-" for device in devices))
    console = Console()
    console.print(table)
    for key, value in fk.build_info().items():
        console.print(f"{key}: {value}", highlight=False)
