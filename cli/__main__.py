"""``python -m feddistill.cli``."""

from feddistill.cli import main

main(prog_name="feddistill")
