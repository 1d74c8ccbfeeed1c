"""What travels and what is let in.

Checks come in an order in which nothing is parsed before its size is bounded by the server's own request,
and nothing is believed before it is checked: envelope, size, digest, container, metadata, tensors, frame,
values, and last that the bytes are the only ones that say this.
"""

import re
from collections.abc import Set
from dataclasses import replace

from feddistill.errors import DataError
from feddistill.payload import container, frames, refusals
from feddistill.payload.answers import STEPS_PER_NAT, Answers, Sampled
from feddistill.payload.codecs import (
    CODECS,
    COMPRESSIONS,
    U8,
    Checks,
    Tensors,
    answers_of,
    check_request,
    layout,
    row_bytes,
    tensors_of,
)
from feddistill.payload.envelope import CLIENT_NAME, FORMAT, VERSION, Envelope, digest, parse_envelope
from feddistill.payload.request import spec_digest
from feddistill.payload.shards import rows_of, shards
from feddistill.types import RoundSpec

FRAME = "zstd"
"""The only tensor of a compressed payload."""

REASONS: dict[str, type[refusals.Refusal]] = {
    "truncated": refusals.Truncated,
    "extra bytes": refusals.ExtraBytes,
    "header too large": refusals.HeaderTooLarge,
    "malformed header": refusals.MalformedHeader,
    "wrong tensors": refusals.WrongTensors,
    "wrong shape": refusals.WrongShape,
    "malformed frame": refusals.MalformedFrame,
    "wrong content size": refusals.WrongContentSize,
}
METADATA_REASONS: dict[str, type[refusals.Refusal]] = {
    "vocab_size": refusals.WrongVocabulary,
    "vocab_fingerprint": refusals.WrongVocabulary,
    "run": refusals.WrongRun,
    "round": refusals.WrongRound,
    "spec": refusals.WrongQuestion,
    "nonce": refusals.WrongNonce,
}


def encode(answers: Answers, spec: RoundSpec, client: str, shard: int = 0) -> bytes:
    """Answers to a shard of ``spec`` as the bytes of a payload; equal arguments give equal bytes.

    With ``compression: zstd`` they are equal for equal versions of the library.

    Raises:
        ValueError: The answers have another codec or shape than the request.
        ConfigError: The package zstandard is needed and not there.
    """
    given = (answers.codec, len(answers), answers.k, answers.vocab_size)
    asked = (spec.codec, _part(spec, shard).positions, spec.k, spec.vocab_size)
    if given != asked:
        raise ValueError(f"answers must be (codec, T, k, V) = {asked}, got {given}")
    if isinstance(answers, Sampled) and answers.draws != spec.draws:
        raise ValueError(f"answers must have {spec.draws} draws, got {answers.draws}")
    tensors = tensors_of(answers)
    if spec.compression == "zstd":
        tensors = {FRAME: frames.compress(tensors)}
    return container.pack(tensors, metadata_of(spec, client, shard))


def bound(spec: RoundSpec, shard: int = 0) -> int:
    """The most bytes that an honest payload can have, from the request alone."""
    content = _part(spec, shard).positions * row_bytes(spec)
    return 8 + container.HEADER_LIMIT + (frames.largest(content) if spec.compression == "zstd" else content)


def admit(
    envelope: bytes,
    content: bytes | memoryview,
    spec: RoundSpec,
    seen: Set[tuple[str, int]],
    shard: int = 0,
    *,
    sender: str | None = None,
    now: int | None = None,
) -> Answers:
    """The answers in a payload, after every check.

    Args:
        envelope: What ``seal`` made.
        content: What ``encode`` made; the answers are views of it where it is not compressed.
        spec: The request that they must answer.
        seen: ``(client, round)`` of what has been admitted.
        shard: Which part of the request.
        sender: Whom the transport had it from, where it knows: nobody answers in another's name.
        now: Seconds since 1970 (UTC), by the server's clock; needed where the round has a deadline.

    Raises:
        Refusal: A subclass for each reason. Nothing has been kept.
        ValueError: ``now`` is missing.

    Memory:
        The answers where they were compressed, and some 20 MiB, whatever arrives.
    """
    if spec.deadline is not None and now is None:
        raise ValueError("a round with a deadline needs the time: now")
    vouched = parse_envelope(envelope, spec, shard, now)
    client = vouched.client
    if sender is not None and client != sender:
        raise refusals.UnknownClient(sender, spec.round, "envelope, client", sender, client)
    if (client, spec.round) in seen:
        required = "the first of this round"
        raise refusals.SecondSubmission(client, spec.round, "submission", required, "another")
    if len(content) > bound(spec, shard):
        required = f"at most {bound(spec, shard)} bytes"
        raise refusals.TooLarge(client, spec.round, "payload", required, len(content))
    _check_bytes(content, vouched)
    return _decode(content, _part(spec, shard), client, metadata_of(spec, client, shard))


def reread(content: bytes | memoryview, spec: RoundSpec, shard: int = 0) -> Answers:
    """The answers in a payload that has been admitted, without looking at every value again."""
    tensors, _ = container.unpack(content)
    part = _part(spec, shard)
    return answers_of(_assemble(tensors, part, ""), part)


def read(content: bytes) -> tuple[Answers, dict[str, str]]:
    """A payload by itself, for a person to look at: well-formed, but the answer to no known request.

    Raises:
        Refusal: It is not well-formed.
    """
    metadata = _unpack(content, "?", 0)[1]
    spec = _spec_of(metadata)
    if not CLIENT_NAME.fullmatch(metadata["client"]):
        required = "1 to 64 letters, digits, '_' and '-'"
        raise refusals.UnknownClient("?", 0, "client", required, metadata["client"])
    return _decode(content, spec, "?", metadata), metadata


def _decode(content: bytes | memoryview, spec: RoundSpec, client: str, expected: dict[str, str]) -> Answers:
    tensors, metadata = _unpack(content, client, spec.round)
    _check_metadata(metadata, expected, client, spec.round)
    head = container.head(tensors, expected)
    try:
        answers = answers_of(_assemble(tensors, spec, client), spec)
    except container.Malformed as error:
        raise REASONS[error.reason](client, spec.round, error.field, error.required, error.given) from None
    Checks(spec, client)(answers)
    if head != bytes(content[: len(head)]):
        required = "canonical JSON, tensors in the order of their names"
        raise refusals.NotCanonical(client, spec.round, "header", required, "another form of it")
    return answers


def _unpack(content: bytes | memoryview, client: str, round_: int) -> tuple[Tensors, dict[str, str]]:
    try:
        return container.unpack(content)
    except container.Malformed as error:
        raise REASONS[error.reason](client, round_, error.field, error.required, error.given) from None


def _spec_of(metadata: dict[str, str]) -> RoundSpec:
    """A request that a payload with this metadata could answer."""
    codec, compression = metadata.get("codec", ""), metadata.get("compression", "")
    if codec not in CODECS:
        raise refusals.WrongMetadata("?", 0, "codec", f"one of {', '.join(CODECS)}", codec)
    if compression not in COMPRESSIONS:
        required = f"one of {', '.join(COMPRESSIONS)}"
        raise refusals.WrongMetadata("?", 0, "compression", required, compression)
    known = set(metadata_of(RoundSpec("", 0, "", 1, 1, "", codec, 1, "", 1), "", 0))
    if set(metadata) != known:
        raise refusals.WrongMetadata("?", 0, "metadata", f"{sorted(known)}", f"{sorted(metadata)}")
    step = f"1/{STEPS_PER_NAT}"
    for key, value in {"format": FORMAT, "version": VERSION, "step": step, "temperature": "1"}.items():
        if metadata[key] != value:
            raise refusals.WrongMetadata("?", 0, key, value, metadata[key])
    try:
        spec = RoundSpec(
            run_id=metadata["run"],
            round=_number(metadata["round"]),
            proxy_digest="",
            positions=_number(metadata["tokens"]),
            vocab_size=_number(metadata["vocab_size"]),
            vocab_fingerprint=metadata["vocab_fingerprint"],
            codec=codec,
            k=_number(metadata["k"]),
            nonce=metadata["nonce"],
            quorum=1,
            compression=compression,
            max_code=_number(metadata.get("max_code", "255")),
            draws=_number(metadata.get("draws", "0")),
        )
    except ValueError as error:
        raise refusals.WrongMetadata("?", 0, "metadata", "decimal numbers", str(error)) from None
    try:
        check_request(spec)
    except DataError as error:
        raise refusals.WrongMetadata("?", 0, "metadata", "of a possible request", str(error)) from None
    return spec


def _number(text: str) -> int:
    if not re.fullmatch(r"0|[1-9][0-9]{0,11}", text):
        raise ValueError(text)
    return int(text)


def _part(spec: RoundSpec, shard: int) -> RoundSpec:
    """A shard as if it were all that is asked."""
    start, stop = rows_of(spec, shard)
    return replace(spec, positions=stop - start, shard_rows=0)


def metadata_of(spec: RoundSpec, client: str, shard: int) -> dict[str, str]:
    """What a payload must say of itself."""
    own = {"threshold": {"max_code": str(spec.max_code)}, "sampled": {"draws": str(spec.draws)}}
    return {
        "format": FORMAT,
        "version": VERSION,
        "codec": spec.codec,
        "compression": spec.compression,
        "vocab_size": str(spec.vocab_size),
        "vocab_fingerprint": spec.vocab_fingerprint,
        "k": str(spec.k),
        "step": f"1/{STEPS_PER_NAT}",
        "temperature": "1",
        "run": spec.run_id,
        "round": str(spec.round),
        "client": client,
        "shard": f"{shard}/{shards(spec)}",
        "tokens": str(_part(spec, shard).positions),
        "nonce": spec.nonce,  # before the digest, which holds it too: a replay is called one
        "spec": spec_digest(spec),
        **own.get(spec.codec, {}),
    }


def _check_bytes(content: bytes | memoryview, vouched: Envelope) -> None:
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


def _assemble(tensors: Tensors, spec: RoundSpec, client: str) -> Tensors:
    """The tensors that the codec asks for, in their types and shapes."""
    wanted = layout(spec)
    names = [FRAME] if spec.compression == "zstd" else list(wanted)
    if sorted(tensors) != names:
        raise refusals.WrongTensors(client, spec.round, "tensors", names, sorted(tensors))
    if spec.compression == "zstd":
        frame = tensors[FRAME]
        if frame.dtype != U8 or frame.ndim != 1:
            shape = f"{frame.dtype} {list(frame.shape)}"
            raise refusals.WrongShape(client, spec.round, FRAME, "uint8 [bytes]", shape)
        return frames.decompress(frame.data, wanted)
    for name, (dtype, sizes) in wanted.items():
        found = tensors[name]
        if found.dtype != dtype or found.shape != sizes:
            given = f"{found.dtype} {list(found.shape)}"
            raise refusals.WrongShape(client, spec.round, name, f"{dtype} {list(sizes)}", given)
    return tensors
