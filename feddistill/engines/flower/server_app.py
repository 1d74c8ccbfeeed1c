"""What a SuperLink runs: the same coordinator as in one process, over the grid."""

import json
import os
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from feddistill.engines.flower.transport import GridTransport
from feddistill.errors import FeddistillError
from feddistill.federation.protocol import Patience
from feddistill.progress import Quiet

app = ServerApp()

OUTCOME = "outcome.json"
"""In the folder that the command made for this: whether all went well, or what the user can mend."""


class Lines(Quiet):
    """Leaves what is worth keeping to the command that started the run."""

    def __init__(self, path: Path):
        self.path = path

    def say(self, line: str) -> None:
        """See ``progress.Show``."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """A run, new or resumed, in the folder that ``feddistill train`` has named."""
    from feddistill import config as configuration
    from feddistill import experiment
    from feddistill.engines.flower.averaging import GridAverager
    from feddistill.methods.learner import Engine

    told = context.run_config
    os.chdir(str(told["cwd"]))
    folder, out = Path(str(told["folder"])), Path(str(told["out"]))
    show = Lines(folder / "said.txt")
    patience = Patience(float(str(told["connect"])), float(str(told["reply"])), int(str(told["attempts"])))
    outcome: dict[str, str] = {}
    try:
        config = configuration.load(folder / "config.yaml")
        transport = GridTransport(grid, show)
        engine = Engine(transport, str(told["engine"]), patience, GridAverager(transport))
        experiment.run(config, out, resume=bool(told["resume"]), show=show, engine=engine)
    except FeddistillError as error:
        outcome = {"error": str(error)}
        raise
    finally:
        partial = folder / f"{OUTCOME}.partial"
        partial.write_text(json.dumps(outcome), encoding="utf-8")
        partial.replace(folder / OUTCOME)
