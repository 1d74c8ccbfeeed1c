"""Tasks and replies as Flower's records.

Files travel in ``ArrayRecord``, which is sent in pieces; as bytes in a ``ConfigRecord`` several times as
slowly.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from safetensors.numpy import load, save

from feddistill.federation.protocol import Reply, Task

BLOBS, FIELDS = "blobs", "fields"
ARRAYS = "arrays"
"""Where Flower's strategies put weights."""
WEIGHTS = "weights"
"""The file that they are to an agent."""


def of_task(task: Task) -> RecordDict:
    """To be sent to a client."""
    fields = {"kind": task.kind, "run": task.run, "round": task.round, "content": json.dumps(task.content)}
    return _record(fields, task.blobs)


def to_task(content: RecordDict) -> Task:
    """As a client got it; weights of Flower's strategy are a file of safetensors."""
    fields, blobs = _parts(content)
    if ARRAYS in content:
        weights = {name: array.numpy() for name, array in content[ARRAYS].items()}
        blobs[WEIGHTS] = save(weights)
    return Task(fields["kind"], fields["run"], fields["round"], json.loads(fields["content"]), blobs)


def of_reply(reply: Reply) -> RecordDict:
    """To be sent to the server."""
    fields = {"client": reply.client, "content": json.dumps(reply.content), "error": reply.error or ""}
    return _record(fields, reply.blobs)


def to_reply(content: RecordDict) -> Reply:
    """As the server got it; what a client sent is not to be trusted."""
    fields, blobs = _parts(content)
    told = json.loads(str(fields["content"]))
    if not isinstance(told, dict):
        raise ValueError("a reply's content is an object")
    return Reply(str(fields["client"]), told, blobs, str(fields["error"]) or None)


def of_weights(reply: Reply) -> RecordDict:
    """Weights as Flower's strategies average them."""
    weights = {name: Array(values) for name, values in load(reply.blobs[WEIGHTS]).items()}
    cost = reply.content["cost"]
    metrics = {
        "num-examples": reply.content["examples"],
        "seconds": float(cost["seconds"]),
        "flops": float(cost["flops"]),
    }
    return RecordDict({ARRAYS: ArrayRecord(weights), "metrics": MetricRecord(metrics)})


def _record(fields: Mapping[str, Any], blobs: Mapping[str, bytes]) -> RecordDict:
    record = RecordDict({FIELDS: ConfigRecord(dict(fields))})
    if blobs:
        arrays = {name: Array(np.frombuffer(content, np.uint8)) for name, content in blobs.items()}
        record[BLOBS] = ArrayRecord(arrays)
    return record


def _parts(content: RecordDict) -> tuple[dict[str, Any], dict[str, bytes]]:
    blobs: dict[str, bytes] = {}
    if BLOBS in content:
        arrays = content[BLOBS]
        for name in list(arrays):
            blobs[name] = arrays.pop(name).numpy().astype(np.uint8, copy=False).tobytes()
    return dict(content[FIELDS]), blobs
