"""zstd compression of a payload's byte planes, with bounded memory on reading, whatever arrives.

A plane holds bytes of one kind, which an entropy coder compresses better: of SmolLM2's answers at k = 16
(49 bytes per token) the planes take 32.4 bytes, the tensors as they are 39.2.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feddistill.errors import ConfigError
from feddistill.payload.codecs import U16, Tensors
from feddistill.payload.container import Malformed

LEVEL = 3
WINDOW_LIMIT = 1 << 23
"""The window that RFC 8878 recommends to support; an encoder of level 3 uses a quarter of it."""
BLOCK_LIMIT = 1 << 17
CHUNK = 1 << 18
"""Bytes decompressed at a time."""


def largest(content: int) -> int:
    """The most bytes of an honest frame with ``content`` bytes of content."""
    return content + (content >> 8) + 512


def compress(tensors: Tensors) -> NDArray[np.uint8]:
    """One frame with all planes, each in its own blocks; deterministic for one version of the library."""
    library = _library()
    total = sum(tensor.nbytes for tensor in tensors.values())
    compressor = library.ZstdCompressor(
        level=LEVEL, write_checksum=False, write_content_size=True, write_dict_id=False, threads=0
    ).compressobj(size=total)
    parts = []
    for name in sorted(tensors):
        for plane in _planes(name, tensors[name]):
            parts.append(compressor.compress(np.ascontiguousarray(plane).tobytes()))
            parts.append(compressor.flush(library.COMPRESSOBJ_FLUSH_BLOCK))
    parts.append(compressor.flush())
    return np.frombuffer(b"".join(parts), np.uint8)


def decompress(frame: memoryview, layout: dict[str, tuple[np.dtype[Any], tuple[int, ...]]]) -> Tensors:
    """Read the tensors of ``layout`` from a frame, in little more memory than the tensors take.

    Raises:
        Malformed: The input is not exactly one frame with content of exactly that size.
    """
    expected = sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in layout.values())
    _check(frame, expected)
    library = _library()
    reader = library.ZstdDecompressor(max_window_size=WINDOW_LIMIT).stream_reader(
        frame, read_size=CHUNK, read_across_frames=False
    )
    try:
        tensors = {name: _read(reader, name, *layout[name]) for name in sorted(layout)}
        if reader.read(1):
            raise Malformed("wrong content size", "zstd frame", f"{expected} bytes", "more")
    except library.ZstdError as error:
        raise Malformed("malformed frame", "zstd frame", "what a compressor wrote", str(error)) from None
    return tensors


def _planes(name: str, tensor: NDArray[Any]) -> Iterator[NDArray[np.uint8]]:
    """The bytes of a tensor in the order in which they are compressed.

    16-bit tensors: all low bytes, then all high bytes. ``val``: the differences along each row, column by
    column. ``cnt`` and ``dense``: column by column.
    """
    if tensor.dtype == U16:
        both = np.ascontiguousarray(tensor, U16).view(np.uint8).reshape(-1, 2)
        yield both[:, 0]
        yield both[:, 1]
    elif name == "val":
        yield np.diff(tensor, axis=1, prepend=np.uint8(0)).T
    else:
        yield tensor.T if name in ("cnt", "dense") else tensor


def _read(reader: Any, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """The inverse of ``_planes``."""
    tensor = np.empty(shape, dtype)
    if dtype == U16:
        both = tensor.view(np.uint8).reshape(-1, 2)
        for half in (0, 1):
            _fill(reader, both[:, half])
    elif name in ("val", "cnt", "dense"):
        for column in range(shape[1]):
            _fill(reader, tensor[:, column])
            if name == "val" and column:
                tensor[:, column] += tensor[:, column - 1]
    else:
        _fill(reader, tensor.reshape(-1))
    return tensor


def _fill(reader: Any, target: NDArray[np.uint8]) -> None:
    for start in range(0, len(target), CHUNK):
        part = target[start : start + CHUNK]
        block = bytearray(len(part))
        view, got = memoryview(block), 0
        while got < len(block):
            more = reader.readinto(view[got:])
            if not more:
                raise Malformed("wrong content size", "zstd frame", "as much as it declares", "less")
            got += more
        part[:] = np.frombuffer(block, np.uint8)


def _check(frame: memoryview, expected: int) -> None:
    """Check the frame's header and block headers (RFC 8878, section 3.1.1) before decompressing anything."""

    def malformed(required: str, given: object) -> Malformed:
        return Malformed("malformed frame", "zstd frame", required, given)

    if len(frame) < 6 or bytes(frame[:4]) != b"\x28\xb5\x2f\xfd":
        raise malformed("a frame that begins with 28 b5 2f fd", bytes(frame[:4]).hex())
    descriptor = frame[4]
    if descriptor & 0b11111:
        raise malformed("without dictionary, checksum and reserved bits", f"descriptor {descriptor:#04x}")
    single = bool(descriptor & 0b100000)
    size = (1 if single else 0, 2, 4, 8)[descriptor >> 6]
    place = 5 if single else 6
    if size == 0 or len(frame) < place + size:
        raise Malformed("wrong content size", "zstd frame", f"{expected} bytes, declared", "no declaration")
    content = int.from_bytes(frame[place : place + size], "little") + (256 if size == 2 else 0)
    if content != expected:
        raise Malformed("wrong content size", "zstd frame", f"{expected} bytes", content)
    window = content if single else (8 + (frame[5] & 7)) << (7 + (frame[5] >> 3))
    if window > WINDOW_LIMIT:
        raise malformed(f"with a window of at most {WINDOW_LIMIT} bytes", window)
    end, most = _blocks(frame, place + size, 64 + (expected >> 10))
    if end != len(frame):
        raise malformed("one frame and nothing behind it", f"{len(frame) - end} bytes more")
    if most < expected:
        raise Malformed("wrong content size", "zstd frame", f"{expected} bytes", f"blocks of at most {most}")


def _blocks(frame: memoryview, place: int, limit: int) -> tuple[int, int]:
    """The end of the last block, and the most bytes that the blocks can hold."""
    most = 0
    for _ in range(limit):
        if len(frame) < place + 3:
            raise Malformed("malformed frame", "zstd frame", "whole blocks", "a cut one")
        head = int.from_bytes(frame[place : place + 3], "little")
        last, kind, size = head & 1, head >> 1 & 3, head >> 3
        place += 3 + (1 if kind == 1 else size)
        if kind == 3 or size > BLOCK_LIMIT:
            given = f"kind {kind}, {size} bytes"
            raise Malformed("malformed frame", "zstd frame", "raw, RLE or compressed blocks", given)
        most += BLOCK_LIMIT if kind == 2 else size
        if last:
            return place, most
    raise Malformed("malformed frame", "zstd frame", f"at most {limit} blocks", "more")


def _library() -> Any:
    try:
        import zstandard
    except ImportError:
        raise ConfigError(
            "payload.compression = 'zstd' needs the package zstandard: pip install 'feddistill[protocol]'"
        ) from None
    return zstandard
