"""Mutate the golden payloads: each is refused with a typed error, or is the one encoding of what it says.

python -m tests.fuzz_payload --cases 100000
"""

import argparse
import json
import random
import resource
import struct
import sys
import time
import tracemalloc
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import zstandard

sys.path.append(str(Path(__file__).parent))

from payload_fixtures import GOLDEN, NOW, SPECS, answers_to, equal, reseal

from feddistill import payload
from feddistill.errors import PayloadError
from feddistill.payload import container, zstd
from feddistill.payload.admission import metadata_of
from feddistill.payload.codecs import tensors_of

SLOWEST = 1.0
"""Seconds that no case may take."""
CHOICES = ("", "0", "1", "-1", "255", "256", "65536", "../x", "é", "\x00", "null", "zstd", "topk", "9" * 30)


@dataclass
class Tally:
    """What happened."""

    accepted: int = 0
    refused: Counter = field(default_factory=Counter)
    slowest: tuple[float, str] = (0.0, "")
    memory: tuple[float, str] = (0.0, "")
    """Peak over twice the bound."""


def fuzz(cases, seed):
    """Run ``cases`` mutations.

    Raises:
        AssertionError: An accepted one is not what it should be, or a case took too much time or memory.
    """
    dice, tally = random.Random(seed), Tally()
    golden = {n: tuple((GOLDEN / f"{n}{s}").read_bytes() for s in (".json", ".safetensors")) for n in SPECS}
    for name, files in golden.items():  # what is imported or cached when first used is no case's memory
        payload.admit(*files, SPECS[name], frozenset(), now=NOW)
    tracemalloc.start()
    try:
        for case in range(cases):
            name = dice.choice(sorted(SPECS))
            mutation = dice.choice(MUTATIONS)
            label = f"seed {seed}, case {case}: {mutation.__name__} of {name}"
            envelope, content = mutation(dice, name, *golden[name], golden)
            _try(label, name, envelope, content, golden[name], tally)
    finally:
        tracemalloc.stop()
    return tally


def _try(label, name, envelope, content, honest, tally):
    asked = SPECS[name]
    limit = 2 * payload.bound(asked)
    tracemalloc.reset_peak()
    before, start = tracemalloc.get_traced_memory()[0], time.perf_counter()
    try:
        got = payload.admit(envelope, content, asked, frozenset(), now=NOW)
    except PayloadError as error:
        got, kind = None, type(error).__name__
    except Exception as error:
        raise AssertionError(f"{label}: {type(error).__name__}: {error}") from error
    seconds, peak = time.perf_counter() - start, tracemalloc.get_traced_memory()[1] - before
    tally.slowest = max(tally.slowest, (seconds, label))
    tally.memory = max(tally.memory, (peak / limit, label))
    assert seconds < SLOWEST, f"{label}: {seconds:.2f} s"
    assert peak < limit, f"{label}: {peak} bytes, where {limit} are allowed"
    if got is None:
        tally.refused[kind] += 1
        return
    tally.accepted += 1
    again = payload.encode(got, asked, "north")
    if asked.compression == "none":
        assert again == bytes(content), f"{label}: a second encoding of the same answers"
    assert equal(payload.admit(*reseal(again, asked), asked, frozenset(), now=NOW), got), label
    if envelope == honest[0]:
        assert equal(got, answers_to(asked)), f"{label}: other answers under the envelope of these"


def on_the_way(dice, name, envelope, content, golden):
    """Bytes change after sealing."""
    if dice.random() < 0.5:
        return _bytes(dice, envelope, golden, 0), content
    return envelope, _bytes(dice, content, golden, 1)


def by_a_liar(dice, name, envelope, content, golden):
    """Bytes change before sealing."""
    return reseal(_bytes(dice, content, golden, 1), SPECS[name])


def envelope_fields(dice, name, envelope, content, golden):
    """Fields of the envelope, signed again."""
    said = json.loads(envelope)
    key = dice.choice(sorted(said))
    value = dice.choice([*CHOICES, None, True, 0, -1, 2**63, said["size"] + 1, said["blake2b"][::-1], [], {}])
    return reseal(content, SPECS[name], **{key: value})


def header_fields(dice, name, envelope, content, golden):
    """Fields of the header, in canonical JSON or not."""
    (size,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + size])
    place = header[dice.choice(sorted(header))]
    key = dice.choice(sorted(place))
    match dice.randrange(5):
        case 0:
            del place[key]
        case 1:
            place[dice.choice(CHOICES)] = place.pop(key)
        case 2:
            place[key] = dice.choice([*CHOICES, 1, -1, 2**50, None, [], [0, 5], [5, 5], [5, 0], [2**40, 8]])
        case 3:
            header[dice.choice(["val", "more", "__metadata__", ""])] = place
    separators = dice.choice([(",", ":"), (", ", ": ")])
    raw = json.dumps(header, sort_keys=dice.random() < 0.8, separators=separators).encode()
    raw += b" " * (-len(raw) % 8)
    return reseal(struct.pack("<Q", len(raw)) + raw + content[8 + size :], SPECS[name])


def values(dice, name, envelope, content, golden):
    """Numbers in the tensors, in a file that is well-formed in every other way."""
    asked = SPECS[name]
    tensors = {n: tensor.copy() for n, tensor in tensors_of(answers_to(asked)).items()}
    for _ in range(dice.randint(1, 3)):
        flat = tensors[dice.choice(sorted(tensors))].reshape(-1)
        here, there = dice.randrange(len(flat)), dice.randrange(len(flat))
        match dice.randrange(3):
            case 0:
                flat[here] = dice.choice([0, 1, 254, 255, dice.randrange(256)])
            case 1:
                flat[here] = min(int(flat[here]) + 1, 255)
            case 2:
                flat[here], flat[there] = flat[there], flat[here]
    if asked.compression == "zstd":
        tensors = {"zstd": zstd.compress(tensors)}
    return reseal(container.pack(tensors, metadata_of(asked, "north", 0)), asked)


def frame(dice, name, envelope, content, golden):
    """What is in the zstd frame, or how it is made."""
    asked = SPECS[name]
    planes = b"".join(
        np.ascontiguousarray(plane).tobytes()
        for n, tensor in sorted(tensors_of(answers_to(asked)).items())
        for plane in zstd._planes(n, tensor)
    )
    made = zstd.compress(tensors_of(answers_to(asked))).tobytes()
    match dice.randrange(5):
        case 0:
            made = _bytes(dice, made, golden, 1)
        case 1:
            made = made[:4] + bytes([made[4] ^ 1 << dice.randrange(8)]) + made[5:]
        case 2:
            compressor = zstandard.ZstdCompressor(
                level=dice.randint(-5, 19),
                write_checksum=dice.random() < 0.2,
                write_content_size=dice.random() < 0.8,
            )
            made = compressor.compress(planes)
        case 3:
            made = zstandard.ZstdCompressor(level=3).compress(_bytes(dice, planes, golden, 1))
        case 4:
            made = made * 2 if dice.random() < 0.5 else made + dice.randbytes(dice.randint(1, 9))
    tensors = {"zstd": np.frombuffer(made or b"\x00", np.uint8)}
    return reseal(container.pack(tensors, metadata_of(asked, "north", 0)), asked)


MUTATIONS = (on_the_way, by_a_liar, envelope_fields, header_fields, values, frame)


def _bytes(dice, content, golden, part):
    """Flip bits, splice, delete, repeat, cut, extend."""
    changed = bytearray(content)
    start = dice.randrange(len(changed))
    stop = min(start + dice.choice([1, 1, 2, 3, 8, 64]), len(changed))
    match dice.randrange(7):
        case 0 | 1:
            for _ in range(dice.randint(1, 4)):
                changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
        case 2:
            changed[start:stop] = dice.randbytes(stop - start)
        case 3:
            other = golden[dice.choice(sorted(golden))][part]
            changed[start:stop] = other[start:stop]
        case 4:
            del changed[start:stop]
        case 5:
            changed[start:start] = changed[start:stop]
        case 6:
            changed[dice.randrange(len(changed)) :] = dice.randbytes(dice.randint(0, 3))
    return bytes(changed)


def main():
    """Print what happened."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz_payload", description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    tally = fuzz(options.cases, options.seed)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(
        f"{options.cases} cases in {time.perf_counter() - start:.0f} s: {tally.accepted} accepted and equal,"
    )
    print(f"{sum(tally.refused.values())} refused: {dict(tally.refused.most_common())}")
    print(f"slowest: {1e3 * tally.slowest[0]:.1f} ms ({tally.slowest[1]})")
    print(f"memory: at most {tally.memory[0]:.0%} of twice the bound ({tally.memory[1]});")
    print(f"the process grew by {grown / 1024:.1f} MiB")


if __name__ == "__main__":
    main()
