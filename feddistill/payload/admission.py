"""What travels and what is let in.

Checks come in an order in which nothing is parsed before its size is bounded by the server's own request,
and nothing is believed before it is checked: envelope, size, digest, container, metadata, tensors, values.
"""

import hashlib
import json
import re
from collections.abc import Sequence, Set
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feddistill.payload import container, refusals
from feddistill.payload.answers import STEPS_PER_NAT, Answers, Dense, Ranked
from feddistill.types import ClientDescription, RoundSpec

FORMAT = "feddistill-payload"
VERSION = "1"
ENVELOPE_LIMIT = 4096
WIDE = 65_536
"""A vocabulary above this needs a third byte an id."""
MASS = (0.9, 1.1)
CLIENT_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")

REASONS: dict[str, type[refusals.Refusal]] = {
    "truncated": refusals.Truncated,
    "extra bytes": refusals.ExtraBytes,
    "header too large": refusals.HeaderTooLarge,
    "malformed header": refusals.MalformedHeader,
    "wrong tensors": refusals.WrongTensors,
    "wrong shape": refusals.WrongShape,
}
METADATA_REASONS: dict[str, type[refusals.Refusal]] = {
    "vocab_size": refusals.WrongVocabulary,
    "vocab_fingerprint": refusals.WrongVocabulary,
    "run": refusals.WrongRun,
    "round": refusals.WrongRound,
    "spec": refusals.WrongQuestion,
    "nonce": refusals.WrongNonce,
}


def canonical(value: RoundSpec | ClientDescription) -> bytes:
    """The one JSON form of a value: sorted keys, no spaces, ASCII."""
    return _json(asdict(value))


def spec_digest(spec: RoundSpec) -> str:
    """Hash of a request; an answer names it, so it answers this request and no other."""
    return hashlib.blake2b(canonical(spec), digest_size=16).hexdigest()


def fingerprint(names: Sequence[str]) -> str:
    """Hash of an ordered list of classes or tokens."""
    return hashlib.blake2b(_json(list(names)), digest_size=16).hexdigest()


def encode(answers: Answers, spec: RoundSpec, client: str, shard: tuple[int, int] = (0, 1)) -> bytes:
    """Answers to ``spec`` as the bytes of a payload; equal arguments give equal bytes."""
    tensors: dict[str, NDArray[Any]]
    if isinstance(answers, Dense):
        tensors = {"dense": answers.codes}
    else:
        tensors = {
            "idx": (answers.ids & 0xFFFF).astype("<u2"),
            "val": answers.codes,
            "tail": answers.tail,
        }
        if answers.vocab_size > WIDE:
            tensors["idx_hi"] = (answers.ids >> 16).astype(np.uint8)
    return container.pack(tensors, _metadata(spec, client, shard))


def seal(content: bytes, spec: RoundSpec, client: str, sequence: int = 0) -> bytes:
    """The envelope of a payload: who sends what, for which round, and the hash of its bytes."""
    return _json(
        {
            "format": FORMAT,
            "version": VERSION,
            "run": spec.run_id,
            "round": spec.round,
            "client": client,
            "sequence": sequence,
            "size": len(content),
            "blake2b": hashlib.blake2b(content, digest_size=32).hexdigest(),
        }
    )


def bound(spec: RoundSpec) -> int:
    """The most bytes that an honest payload can have, from the request alone."""
    id_bytes = 3 if spec.vocab_size > WIDE else 2
    row = spec.vocab_size if spec.codec == "dense" else spec.k * (id_bytes + 1) + 1
    return 8 + container.HEADER_LIMIT + spec.positions * row


def admit(
    envelope: bytes,
    content: bytes,
    spec: RoundSpec,
    seen: Set[tuple[str, int]],
    shard: tuple[int, int] = (0, 1),
) -> Answers:
    """The answers in a payload, after every check.

    Args:
        envelope: What ``seal`` made.
        content: What ``encode`` made.
        spec: The request that they must answer.
        seen: ``(client, round)`` of what has been admitted.
        shard: Which part of the proxy set, of how many.

    Raises:
        Refusal: A subclass for each reason. Nothing has been kept.
    """
    client = _open(envelope, spec, shard[0])
    if (client, spec.round) in seen:
        raise refusals.SecondSubmission(
            client, spec.round, "submission", "the first of this round", "another"
        )
    if len(content) > bound(spec):
        raise refusals.TooLarge(client, spec.round, "payload", f"at most {bound(spec)} bytes", len(content))
    _same_bytes(envelope, content, client, spec)
    try:
        tensors, metadata = container.unpack(content)
    except container.Malformed as error:
        reason = REASONS[error.reason]
        raise reason(client, spec.round, error.field, error.required, error.given) from None
    _check_metadata(metadata, _metadata(spec, client, shard), client, spec.round)
    answers = _assemble(tensors, spec, client)
    _check_values(answers, client, spec.round)
    return answers


def read(content: bytes) -> tuple[Answers, dict[str, str]]:
    """A payload by itself, for a person to look at: well-formed, but the answer to no known request.

    Raises:
        Refusal: It is not well-formed.
    """
    try:
        tensors, metadata = container.unpack(content)
    except container.Malformed as error:
        raise REASONS[error.reason]("?", 0, error.field, error.required, error.given) from None
    known = set(_metadata(_ANY, "", (0, 1)))
    if set(metadata) != known:
        raise refusals.WrongMetadata("?", 0, "metadata", f"{sorted(known)}", f"{sorted(metadata)}")
    if metadata["format"] != FORMAT or metadata["version"] != VERSION:
        given = f"{metadata['format']} {metadata['version']}"
        raise refusals.WrongMetadata("?", 0, "format", f"{FORMAT} {VERSION}", given)
    try:
        spec = RoundSpec(
            run_id=metadata["run"],
            round=_number(metadata["round"]),
            proxy_digest="",
            positions=_number(metadata["tokens"]),
            vocab_size=_number(metadata["vocab_size"]),
            vocab_fingerprint=metadata["vocab_fingerprint"],
            codec=metadata["codec"],
            k=_number(metadata["k"]),
            nonce=metadata["nonce"],
            quorum=1,
        )
    except ValueError as error:
        raise refusals.WrongMetadata("?", 0, "metadata", "decimal numbers", str(error)) from None
    if spec.codec not in ("dense", "topk"):
        raise refusals.WrongMetadata("?", 0, "codec", "dense or topk", spec.codec)
    answers = _assemble(tensors, spec, "?")
    _check_values(answers, "?", spec.round)
    return answers, metadata


_ANY = RoundSpec("", 0, "", 1, 1, "", "dense", 1, "", 1)


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode("ascii")


def _number(text: str) -> int:
    if not re.fullmatch(r"0|[1-9][0-9]{0,11}", text):
        raise ValueError(text)
    return int(text)


def _metadata(spec: RoundSpec, client: str, shard: tuple[int, int]) -> dict[str, str]:
    return {
        "format": FORMAT,
        "version": VERSION,
        "codec": spec.codec,
        "vocab_size": str(spec.vocab_size),
        "vocab_fingerprint": spec.vocab_fingerprint,
        "k": str(spec.k),
        "step": f"1/{STEPS_PER_NAT}",
        "temperature": "1",
        "run": spec.run_id,
        "round": str(spec.round),
        "client": client,
        "shard": f"{shard[0]}/{shard[1]}",
        "tokens": str(spec.positions),
        "spec": spec_digest(spec),
        "nonce": spec.nonce,
    }


def _open(envelope: bytes, spec: RoundSpec, sequence: int) -> str:
    """Who sends, if the envelope is well-formed and for this round. Until then there is no name to use."""
    if len(envelope) > ENVELOPE_LIMIT:
        given = f"{len(envelope)} bytes"
        raise refusals.MalformedEnvelope(
            "?", spec.round, "envelope", f"at most {ENVELOPE_LIMIT} bytes", given
        )
    try:
        found = container.parse_object(envelope, "envelope")
    except container.Malformed as error:
        raise refusals.MalformedEnvelope("?", spec.round, "envelope", error.required, error.given) from None
    wanted = {"format": str, "version": str, "run": str, "round": int, "client": str, "sequence": int}
    wanted |= {"size": int, "blake2b": str}
    if set(found) != set(wanted) or any(type(found[key]) is not kind for key, kind in wanted.items()):
        raise refusals.MalformedEnvelope("?", spec.round, "envelope", f"an object of {sorted(wanted)}", found)
    client = found["client"]
    if not CLIENT_NAME.fullmatch(client):
        required = "1 to 64 letters, digits, '_' and '-'"
        raise refusals.UnknownClient("?", spec.round, "client", required, client)
    if client not in spec.clients:
        raise refusals.UnknownClient("?", spec.round, "client", "enrolled in this round", client)
    expected: dict[str, tuple[type[refusals.Refusal], object]] = {
        "format": (refusals.MalformedEnvelope, FORMAT),
        "version": (refusals.MalformedEnvelope, VERSION),
        "run": (refusals.WrongRun, spec.run_id),
        "round": (refusals.WrongRound, spec.round),
        "sequence": (refusals.MalformedEnvelope, sequence),
    }
    for key, (refusal, value) in expected.items():
        if found[key] != value:
            raise refusal(client, spec.round, f"envelope, {key}", value, found[key])
    return str(client)


def _same_bytes(envelope: bytes, content: bytes, client: str, spec: RoundSpec) -> None:
    vouched = container.parse_object(envelope, "envelope")
    if vouched["size"] != len(content):
        kind = refusals.Truncated if len(content) < vouched["size"] else refusals.ExtraBytes
        raise kind(client, spec.round, "payload", f"{vouched['size']} bytes", len(content))
    digest = hashlib.blake2b(content, digest_size=32).hexdigest()
    if vouched["blake2b"] != digest:
        raise refusals.DigestMismatch(client, spec.round, "payload, blake2b", vouched["blake2b"], digest)


def _check_metadata(found: dict[str, str], expected: dict[str, str], client: str, round_: int) -> None:
    if set(found) != set(expected):
        missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
        given = f"missing {missing}, unknown {unknown}"
        raise refusals.WrongMetadata(client, round_, "metadata", f"{len(expected)} known fields", given)
    for key, value in expected.items():
        if found[key] != value:
            raise METADATA_REASONS.get(key, refusals.WrongMetadata)(client, round_, key, value, found[key])


def _assemble(tensors: dict[str, NDArray[Any]], spec: RoundSpec, client: str) -> Answers:
    """The tensors that the codec asks for, in their types and shapes."""
    rows, k = spec.positions, spec.k
    if spec.codec == "dense":
        wanted: dict[str, tuple[str, tuple[int, ...]]] = {"dense": ("uint8", (rows, spec.vocab_size))}
    else:
        wanted = {"idx": ("uint16", (rows, k)), "val": ("uint8", (rows, k)), "tail": ("uint8", (rows,))}
        if spec.vocab_size > WIDE:
            wanted["idx_hi"] = ("uint8", (rows, k))
    if set(tensors) != set(wanted):
        raise refusals.WrongTensors(client, spec.round, "tensors", sorted(wanted), sorted(tensors))
    for name, (dtype, shape) in wanted.items():
        given = tensors[name]
        if given.dtype != np.dtype(dtype) or given.shape != shape:
            required = f"{dtype} {list(shape)}"
            raise refusals.WrongShape(
                client, spec.round, name, required, f"{given.dtype} {list(given.shape)}"
            )
    if spec.codec == "dense":
        return Dense(tensors["dense"])
    ids = tensors["idx"].astype(np.int32)
    if "idx_hi" in tensors:
        ids |= tensors["idx_hi"].astype(np.int32) << 16
    return Ranked(ids, tensors["val"], tensors["tail"], spec.vocab_size)


def _check_values(answers: Answers, client: str, round_: int) -> None:
    if isinstance(answers, Ranked):
        if int(answers.ids.max()) >= answers.vocab_size:
            required = f"below {answers.vocab_size}"
            raise refusals.IdOutOfRange(client, round_, "idx", required, int(answers.ids.max()))
        ordered = np.sort(answers.ids, axis=1)
        if row := _first((ordered[:, 1:] == ordered[:, :-1]).any(1)):
            raise refusals.IdRepeated(
                client, round_, "idx", "distinct in each row", f"a repetition in row {row}"
            )
        if row := _first((answers.codes[:, 1:] < answers.codes[:, :-1]).any(1)):
            raise refusals.NotInOrder(client, round_, "val", "in rank order", f"row {row} is not")
    mass = answers.mass()
    if row := _first(np.logical_or(mass < MASS[0], mass > MASS[1])):
        given = f"{mass[int(row)]:.3f} in row {row}"
        raise refusals.WrongMass(client, round_, "sum of probabilities", f"within {list(MASS)}", given)


def _first(wrong: Any) -> str:
    """The first row that is wrong, in words; empty (false) where none is."""
    return str(int(wrong.argmax())) if wrong.any() else ""
