"""What travels and what is let in.

Checks come in an order in which nothing is parsed before its size is bounded by the server's own request,
and nothing is believed before it is checked: envelope, size, digest, container, metadata, tensors, values.
"""

import re
from collections.abc import Set
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feddistill.payload import container, refusals
from feddistill.payload.answers import STEPS_PER_NAT, Answers, Dense, Ranked
from feddistill.payload.envelope import CLIENT_NAME, FORMAT, VERSION, Envelope, digest, parse_envelope
from feddistill.payload.request import spec_digest
from feddistill.types import RoundSpec

WIDE = 65_536
"""A vocabulary above this needs a third byte an id."""
MASS = (0.9, 1.1)
BLOCK = 1 << 20
"""Entries checked at a time: the float64 copies that the checks make stay below 10 MiB each."""

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


def encode(answers: Answers, spec: RoundSpec, client: str, shard: tuple[int, int] = (0, 1)) -> bytes:
    """Answers to ``spec`` as the bytes of a payload; equal arguments give equal bytes.

    Raises:
        ValueError: The answers have another codec or shape than the request.
    """
    given = (answers.codec, *answers.codes.shape, answers.vocab_size)
    asked = (spec.codec, spec.positions, spec.k, spec.vocab_size)
    if given != asked:
        raise ValueError(f"answers must be (codec, T, k, V) = {asked}, got {given}")
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
    vouched = parse_envelope(envelope, spec, shard[0])
    client = vouched.client
    if (client, spec.round) in seen:
        required = "the first of this round"
        raise refusals.SecondSubmission(client, spec.round, "submission", required, "another")
    if len(content) > bound(spec):
        raise refusals.TooLarge(client, spec.round, "payload", f"at most {bound(spec)} bytes", len(content))
    _check_bytes(content, vouched)
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
    if spec.codec == "dense" and spec.k != spec.vocab_size:
        raise refusals.WrongMetadata("?", 0, "k", f"{spec.vocab_size}, as there are classes", spec.k)
    if not CLIENT_NAME.fullmatch(metadata["client"]):
        required = "1 to 64 letters, digits, '_' and '-'"
        raise refusals.UnknownClient("?", 0, "client", required, metadata["client"])
    answers = _assemble(tensors, spec, "?")
    _check_values(answers, "?", spec.round)
    return answers, metadata


_ANY = RoundSpec("", 0, "", 1, 1, "", "dense", 1, "", 1)


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


def _check_bytes(content: bytes, vouched: Envelope) -> None:
    client, round_, size = vouched.client, vouched.round, len(content)
    if vouched.size != size:
        kind = refusals.Truncated if size < vouched.size else refusals.ExtraBytes
        raise kind(client, round_, "payload", f"{vouched.size} bytes", size)
    if vouched.blake2b != digest(content):
        raise refusals.DigestMismatch(client, round_, "payload, blake2b", vouched.blake2b, digest(content))


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
    rows = max(1, BLOCK // answers.codes.shape[1])
    for start in range(0, len(answers), rows):
        _check_block(answers.rows(start, start + rows), start, client, round_)


def _check_block(answers: Answers, start: int, client: str, round_: int) -> None:
    """Some of the answers, of which the first is answer ``start``."""
    if isinstance(answers, Ranked):
        if int(answers.ids.max()) >= answers.vocab_size:
            required = f"below {answers.vocab_size}"
            raise refusals.IdOutOfRange(client, round_, "idx", required, int(answers.ids.max()))
        ordered = np.sort(answers.ids, axis=1)
        if wrong := _where((ordered[:, 1:] == ordered[:, :-1]).any(1)):
            given = f"a repetition in row {start + wrong[0]}"
            raise refusals.IdRepeated(client, round_, "idx", "distinct in each row", given)
        if wrong := _where((answers.codes[:, 1:] < answers.codes[:, :-1]).any(1)):
            given = f"row {start + wrong[0]} is not"
            raise refusals.NotInOrder(client, round_, "val", "in rank order", given)
    mass = answers.mass()
    if wrong := _where(np.logical_or(mass < MASS[0], mass > MASS[1])):
        given = f"{mass[wrong[0]]:.3f} in row {start + wrong[0]}"
        raise refusals.WrongMass(client, round_, "sum of probabilities", f"within {list(MASS)}", given)


def _where(wrong: Any) -> list[int]:
    """The first row that is wrong, if there is one."""
    return [int(wrong.argmax())] if wrong.any() else []
