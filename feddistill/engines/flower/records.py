"""Instructions and replies as Flower's records.

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
"""Key of the weights in messages of Flower's strategies."""
WEIGHTS = "weights"
"""Name of the weights among the blobs of an instruction."""
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
ERROR = re.compile(r"[A-Za-z0-9_.]{1,64}")
"""Key of the type of an error."""
CONTENT = 1 << 20
"""Largest JSON content of a reply, in characters."""
FILES = 64 << 20
"""Largest total of a reply's files, in bytes."""


def instruction_record(instruction: Instruction) -> RecordDict:
    """An instruction as a record, to be sent to a client."""
    fields = {
        "kind": instruction.kind,
        "run": instruction.run,
        "round": instruction.round,
        "content": json.dumps(instruction.content),
    }
    return _record(fields, instruction.blobs)


def to_instruction(content: RecordDict) -> Instruction:
    """The instruction in a received record; weights of Flower's strategy become safetensors bytes."""
    fields, blobs = content[FIELDS], _blobs(content)
    if ARRAYS in content:
        weights = {name: array.numpy() for name, array in content[ARRAYS].items()}
        blobs[WEIGHTS] = save(weights)
    return Instruction(fields["kind"], fields["run"], fields["round"], json.loads(fields["content"]), blobs)


def reply_record(reply: Reply) -> RecordDict:
    """A reply as a record, to be sent to the server."""
    fields = {"client": reply.client, "content": json.dumps(reply.content), "error": reply.error or ""}
    return _record(fields, reply.blobs)


def to_reply(content: RecordDict) -> Reply:
    """The reply in a received record.

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
    """Weights in the form that Flower's strategies average."""
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
    """The files, each removed from the record so that no file is in memory twice."""
    if BLOBS not in content:
        return {}
    arrays = content[BLOBS]
    return {name: _bytes(arrays.pop(name)) for name in list(arrays)}


def _bytes(array: Array) -> bytes:
    """The bytes that ``_record`` stored. A hostile sender may claim any size: only actual bytes count."""
    file = BytesIO(array.data)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("another version of numpy's format")
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    content = array.data[file.tell() :]
    if dtype != np.uint8 or shape != (len(content),):
        raise ValueError("a file is an array of bytes")
    return bytes(content)
