"""The safetensors container, written deterministically and checked strictly on reading.

The safetensors library writes metadata in no fixed order and accepts duplicate keys. Files written here are
valid safetensors, with one encoding per content.
"""

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

HEADER_LIMIT = 16 * 1024
DTYPES: dict[str, np.dtype[Any]] = {"U8": np.dtype("uint8"), "U16": np.dtype("<u2")}
FIELDS = ("dtype", "shape", "data_offsets")


class Malformed(Exception):
    """The bytes are not a well-formed container. ``reason`` is a key of ``admission.REASONS``."""

    def __init__(self, reason: str, field: str, required: object, given: object):
        super().__init__(f"{field} must be {required}, got {given}")
        self.reason, self.field, self.required, self.given = reason, field, required, given


@dataclass(frozen=True, slots=True)
class Entry:
    """The header's entry of a tensor, checked by itself."""

    name: str
    dtype: np.dtype[Any]
    shape: list[int]
    start: int
    stop: int


def pack(tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    """Write unsigned tensors and string metadata; equal arguments give equal bytes."""
    arrays = [np.ascontiguousarray(tensors[name]) for name in sorted(tensors)]
    return head(tensors, metadata) + b"".join(
        array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes() for array in arrays
    )


def head(tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    """The canonical header: everything before the tensors' bytes."""
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
    """Read tensors, which are views of ``content``, and metadata.

    The header is not compared with that of ``head``: the caller does so last, so that other errors are
    reported first.

    Raises:
        Malformed: The bytes are not a safetensors file of unsigned integers, or are ambiguous.
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
    if raw[:1] != b"{":  # as the library requires
        raise Malformed("malformed header", "header", "a JSON object without space before it", raw[:1])
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise Malformed("malformed header", "__metadata__", "an object of strings", metadata)
    data = memoryview(content)[8 + size :]
    tensors, end = {}, 0
    entries = [_entry(name, fields) for name, fields in header.items()]
    for entry in sorted(entries, key=lambda entry: entry.start):
        tensors[entry.name], end = _tensor(entry, data, end)
    if end < len(data):
        raise Malformed("extra bytes", "file", f"{8 + size + end} bytes", len(content))
    return tensors, metadata


def parse_object(raw: bytes, field: str) -> dict[str, Any]:
    """Read a JSON object; duplicate keys, floats and NaN are errors."""
    try:
        parsed = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_no_duplicates,
            parse_float=_no_number,
            parse_constant=_no_number,
        )
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise Malformed("malformed header", field, "a JSON object", str(error)) from None
    if not isinstance(parsed, dict):
        raise Malformed("malformed header", field, "a JSON object", type(parsed).__name__)
    return parsed


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for key, value in pairs:
        if key in unique:
            raise ValueError(f"duplicate key {key!r}")
        unique[key] = value
    return unique


def _no_number(text: str) -> Any:
    raise ValueError(f"{text[:20]} is not an integer")


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**48


def _entry(name: str, fields: object) -> Entry:
    """Check the header's entry of a tensor, as far as that is possible without the other tensors."""
    if not isinstance(fields, dict) or set(fields) != set(FIELDS):
        raise Malformed("malformed header", f"tensor {name!r}", "dtype, shape and data_offsets", fields)
    dtype, shape, offsets = (fields[field] for field in FIELDS)
    if dtype not in list(DTYPES):
        raise Malformed("wrong shape", f"tensor {name!r}, dtype", " or ".join(DTYPES), dtype)
    if not isinstance(shape, list) or not 1 <= len(shape) <= 2 or not all(map(_is_size, shape)):
        raise Malformed("wrong shape", f"tensor {name!r}, shape", "one or two sizes", shape)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise Malformed("malformed header", f"tensor {name!r}, data_offsets", "two offsets", offsets)
    return Entry(name, DTYPES[dtype], shape, *offsets)


def _tensor(entry: Entry, data: memoryview, end: int) -> tuple[NDArray[Any], int]:
    """The tensor of an entry, which must start at ``end``, and its own end."""
    tensor, count, size = f"tensor {entry.name!r}", math.prod(entry.shape), entry.stop - entry.start
    if count == 0:
        raise Malformed("wrong tensors", f"{tensor}, shape", "not empty", entry.shape)
    if entry.start != end:
        offsets = [entry.start, entry.stop]
        raise Malformed("wrong tensors", f"{tensor}, data_offsets", f"from {end} on", offsets)
    if size != count * entry.dtype.itemsize:
        raise Malformed("wrong tensors", f"{tensor}, bytes", count * entry.dtype.itemsize, size)
    if entry.stop > len(data):
        raise Malformed("truncated", tensor, f"bytes up to {entry.stop}", len(data))
    return np.frombuffer(data[entry.start : entry.stop], entry.dtype).reshape(entry.shape), entry.stop
