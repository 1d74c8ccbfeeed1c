"""The safetensors container, written to the byte and read with suspicion.

The safetensors library writes metadata in no fixed order and accepts duplicate keys; so a file is written
and checked here. What is written is valid safetensors.
"""

import json
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

HEADER_LIMIT = 16 * 1024
DTYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype("uint8"), "U16": np.dtype("<u2")}


class Malformed(Exception):
    """Not a well-formed container. ``reason`` is one of the keys of ``admission.REASONS``."""

    def __init__(self, reason: str, field: str, required: object, given: object):
        super().__init__(f"{field} must be {required}, got {given}")
        self.reason, self.field, self.required, self.given = reason, field, required, given


def pack(tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    """Unsigned tensors and string metadata to one file; equal arguments give equal bytes."""
    arrays = [np.ascontiguousarray(tensors[name]) for name in sorted(tensors)]
    return head(tensors, metadata) + b"".join(
        array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes() for array in arrays
    )


def head(tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    """Everything before the tensors' bytes: the one header that says this."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name in sorted(tensors):
        array = tensors[name]
        header[name] = {
            "dtype": next(code for code, dtype in DTYPES.items() if dtype == array.dtype),
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    raw = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw


def unpack(content: bytes | memoryview) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Tensors and metadata of a file, views of ``content``.

    Whether the header is the one that ``head`` writes is not looked at: a reader compares it at the end, so
    that whatever else is wrong is named first.

    Raises:
        Malformed: It is no safetensors file of unsigned integers, or says something twice or ambiguously.
    """
    if len(content) < 8:
        raise Malformed("truncated", "file", "at least 8 bytes", len(content))
    (size,) = struct.unpack("<Q", content[:8])
    if size > HEADER_LIMIT:
        raise Malformed("header too large", "header", f"at most {HEADER_LIMIT} bytes", size)
    if len(content) < 8 + size:
        raise Malformed("truncated", "header", f"{size} bytes", len(content) - 8)
    raw = bytes(content[8 : 8 + size])
    header = parse_object(raw, "header")
    if raw[:1] != b"{":  # the library asks for this
        raise Malformed("malformed header", "header", "a JSON object without space before it", raw[:1])
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise Malformed("malformed header", "__metadata__", "an object of strings", metadata)
    data = memoryview(content)[8 + size :]
    tensors, end = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: _start(*item)):
        tensors[name], end = _tensor(name, entry, data, end)
    if end < len(data):
        raise Malformed("extra bytes", "file", f"{8 + size + end} bytes", len(content))
    return tensors, metadata


def parse_object(raw: bytes, field: str) -> dict[str, Any]:
    """JSON of an object without a repeated key, a float or a number that is no number."""
    try:
        found = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise Malformed("malformed header", field, "a JSON object", str(error)) from None
    if not isinstance(found, dict):
        raise Malformed("malformed header", field, "a JSON object", type(found).__name__)
    return found


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"key {key!r} stands twice")
        found[key] = value
    return found


def _no_number(text: str) -> Any:
    raise ValueError(f"{text[:20]} is not an integer")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48


def _start(name: str, entry: object) -> int:
    """Where a tensor's bytes begin; everything about the entry is checked on the way."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise Malformed("malformed header", f"tensor {name!r}", "dtype, shape and data_offsets", entry)
    shape, offsets = entry["shape"], entry["data_offsets"]
    if entry["dtype"] not in list(DTYPES):
        raise Malformed("wrong shape", f"tensor {name!r}, dtype", " or ".join(DTYPES), entry["dtype"])
    if not isinstance(shape, list) or not 1 <= len(shape) <= 2 or not all(map(_is_size, shape)):
        raise Malformed("wrong shape", f"tensor {name!r}, shape", "one or two sizes", shape)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise Malformed("malformed header", f"tensor {name!r}, data_offsets", "two offsets", offsets)
    return int(offsets[0])


def _tensor(name: str, entry: dict[str, Any], data: memoryview, end: int) -> tuple[NDArray[Any], int]:
    """The tensor that must begin where the one before ended."""
    dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
    start, stop = entry["data_offsets"]
    count = shape[0] * (shape[1] if len(shape) == 2 else 1)
    if count == 0:
        raise Malformed("wrong tensors", f"tensor {name!r}, shape", "not empty", shape)
    if start != end:
        raise Malformed("wrong tensors", f"tensor {name!r}, data_offsets", f"from {end} on", [start, stop])
    if stop - start != count * dtype.itemsize:
        raise Malformed("wrong tensors", f"tensor {name!r}, bytes", count * dtype.itemsize, stop - start)
    if stop > len(data):
        raise Malformed("truncated", f"tensor {name!r}", f"bytes up to {stop}", len(data))
    return np.frombuffer(data[start:stop], dtype).reshape(shape), stop
