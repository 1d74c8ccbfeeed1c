"""The Flower app of a SuperNode: one instruction per process.

``app`` is a plain assignment because Flower looks for it without importing this.
"""

import gc
import os
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from feddistill.engines.flower.records import of_weights, reply_record, to_instruction
from feddistill.federation.protocol import Reply

app = ClientApp()


@app.query("hello")
def hello(message: Message, context: Context) -> Message:
    """Reply with the name of this SuperNode's client."""
    return Message(reply_record(Reply(_name(context))), reply_to=message)


@app.query("work")
def work(message: Message, context: Context) -> Message:
    """Carry out an instruction. Only the type of an error is sent: its text could hold private data."""
    return Message(reply_record(_handle(message, context)), reply_to=message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the weights that Flower's strategy sends.

    Raises:
        RuntimeError: By the type of what went wrong; that is all that Flower tells the server.
    """
    reply = _handle(message, context)
    if reply.error is not None:
        raise RuntimeError(reply.error)
    return Message(of_weights(reply), reply_to=message)


def _handle(message: Message, context: Context) -> Reply:
    name = _name(context)
    try:
        from feddistill.engines.remote import RemoteClient

        settings = context.node_config
        simulated = "partition-id" in settings
        if simulated and context.run_config["cwd"]:  # in a simulation, the command's
            os.chdir(str(context.run_config["cwd"]))
        state = _state(context)
        file = settings.get("data")
        client = RemoteClient(name, state, Path(str(file)).expanduser() if file else None, simulated)
        return client.handle(to_instruction(message.content))
    except Exception as error:
        _keep(context, error)
        return Reply(name, error=type(error).__name__)
    finally:
        gc.collect()  # a simulation's process works for one client after the other: models hold themselves


def _name(context: Context) -> str:
    """The institution's name; in a simulation, the name at its place in the partition."""
    settings = context.node_config
    return str(settings.get("client") or f"client-{settings['partition-id']}")


def _state(context: Context) -> Path:
    """The institution's folder; in a simulation, the common parent of all clients' folders."""
    told = context.run_config
    state = context.node_config.get("state") or told["state"] or Path(str(told["out"]), "clients")
    return Path(str(state)).expanduser()


def _keep(context: Context, error: Exception) -> None:
    """Log an error in full where only the institution reads it."""
    import traceback

    folder = _state(context)
    text = "".join(traceback.format_exception(error))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "errors.log").open("a", encoding="utf-8") as file:
            file.write(f"{_name(context)}: {text}\n")
    except OSError:  # the disk may be full
        print(text)
