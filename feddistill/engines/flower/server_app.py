"""The Flower app of a SuperLink: the same coordinator as in one process, over the grid."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from feddistill.engines.flower.transport import GridTransport
from feddistill.errors import ConfigError, FeddistillError
from feddistill.federation.protocol import RetryPolicy
from feddistill.progress import NoProgress
from feddistill.store import layout
from feddistill.store.layout import MESSAGES, OUTCOME

app = ServerApp()


class Lines(NoProgress):
    """Writes log lines for the command that started the run; prints them if Flower's own command did."""

    def __init__(self, path: Path | None):
        self.path = path

    def log(self, line: str) -> None:
        """Log a line."""
        if self.path is None:
            print(line, flush=True)
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """A run, new or resumed, with the settings of ``feddistill train`` or of ``flwr run``."""
    from feddistill import config as configuration
    from feddistill.engines.flower.averaging import GridAverager
    from feddistill.runs import experiment
    from feddistill.tasks.session import Engine

    told = context.run_config
    folder = Path(str(told["folder"])) if told["folder"] else None
    progress = Lines(folder / MESSAGES if folder else None)
    retry_policy = RetryPolicy(
        float(str(told["connect"])), float(str(told["reply"])), int(str(told["attempts"]))
    )
    outcome: dict[str, str] = {}
    try:
        file, out = _absolute(told, "config"), _absolute(told, "out")
        if told["cwd"]:
            os.chdir(str(told["cwd"]))
        config = configuration.load_stored(file)
        transport = GridTransport(grid, progress)
        engine = Engine(transport, str(told["engine"]), retry_policy, GridAverager(transport))
        experiment.run(config, out, resume=bool(told["resume"]), progress=progress, engine=engine)
    except FeddistillError as error:
        outcome = {"error": str(error)}
        raise
    finally:
        if folder:
            partial = folder / layout.partial(OUTCOME)
            partial.write_text(json.dumps(outcome), encoding="utf-8")
            partial.replace(folder / OUTCOME)


def _absolute(told: Mapping[str, object], key: str) -> Path:
    """A path in the run's settings; it must be absolute, as this process has another working directory."""
    path = Path(str(told[key]))
    if not path.is_absolute():
        raise ConfigError(f"flwr run --run-config: {key} = {str(told[key])!r} has to be an absolute path")
    return path
