"""Tasks and replies as Flower's records.

Files travel in ``ArrayRecord``, which is sent in pieces; as bytes in a ``ConfigRecord`` several times as
slowly.
"""

import json
import re
from collections.abc import Mapping
from io import BytesIO
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from safetensors.numpy import load, save

from feddistill.federation.protocol import Instruction, Reply

BLOBS, FIELDS = "blobs", "fields"
ARRAYS = "arrays"
"""Where Flower's strategies put weights."""
WEIGHTS = "weights"
"""The file that they are to an agent."""
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
ERROR = re.compile(r"[A-Za-z0-9_.]{1,64}")
"""The type of what went wrong."""
CONTENT = 1 << 20
"""Characters of a reply's JSON at the most."""
FILES = 64 << 20
"""Bytes of a reply's files at the most."""


def instruction_record(instruction: Instruction) -> RecordDict:
    """To be sent to a client."""
    fields = {
        "kind": instruction.kind,
        "run": instruction.run,
        "round": instruction.round,
        "content": json.dumps(instruction.content),
    }
    return _record(fields, instruction.blobs)


def to_instruction(content: RecordDict) -> Instruction:
    """As a client got it; weights of Flower's strategy are a file of safetensors."""
    fields, blobs = content[FIELDS], _blobs(content)
    if ARRAYS in content:
        weights = {name: array.numpy() for name, array in content[ARRAYS].items()}
        blobs[WEIGHTS] = save(weights)
    return Instruction(fields["kind"], fields["run"], fields["round"], json.loads(fields["content"]), blobs)


def reply_record(reply: Reply) -> RecordDict:
    """To be sent to the server."""
    fields = {"client": reply.client, "content": json.dumps(reply.content), "error": reply.error or ""}
    return _record(fields, reply.blobs)


def to_reply(content: RecordDict) -> Reply:
    """As the server got it.

    What a client sent is not to be trusted: anything may be wrong with it, and anything be raised.
    """
    fields = content[FIELDS]
    name, said, error = (str(fields[key]) for key in ("client", "content", "error"))
    if not NAME.fullmatch(name):
        raise ValueError("a client's name is 1 to 64 letters, digits, '_' and '-'")
    if len(said) > CONTENT:
        raise ValueError(f"a reply's content has at most {CONTENT} characters")
    told = json.loads(said)
    if not isinstance(told, dict):
        raise ValueError("a reply's content is an object")
    if BLOBS in content and sum(len(array.data) for array in content[BLOBS].values()) > FILES:
        raise ValueError(f"a reply's files have at most {FILES} bytes")
    if error and not ERROR.fullmatch(error):
        error = "an error that is no type's name"
    return Reply(name, told, _blobs(content), error or None)


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


def _blobs(content: RecordDict) -> dict[str, bytes]:
    """The files, each taken out of the record: no two copies of one are in memory."""
    if BLOBS not in content:
        return {}
    arrays = content[BLOBS]
    return {name: _bytes(arrays.pop(name)) for name in list(arrays)}


def _bytes(array: Array) -> bytes:
    """What ``_record`` put in. A stranger may claim any size or type: only bytes that are there count."""
    file = BytesIO(array.data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("another version of numpy's format")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    content = array.data[file.tell() :]
    if dtype != np.uint8 or shape != (len(content),):
        raise ValueError("a file is an array of bytes")
    return bytes(content)
