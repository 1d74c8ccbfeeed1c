"""Write payloads, and check those that arrive.

The order of the checks ensures that nothing is parsed before its size is bounded by the server's own request:
envelope, size, digest, container, metadata, tensors, frame, values, and last that the encoding is canonical.
"""

import re
from collections.abc import Set
from dataclasses import asdict, dataclass, fields, replace

from feddistill.errors import DataError
from feddistill.payload import container, refusals, zstd
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

CONSTANTS = {"format": FORMAT, "version": VERSION, "step": f"1/{STEPS_PER_NAT}", "temperature": "1"}
"""Metadata that is the same in every payload."""

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


@dataclass(frozen=True, slots=True)
class Metadata:
    """The metadata of a payload, in the order in which it is compared with the request."""

    format: str
    version: str
    codec: str
    compression: str
    vocab_size: str
    vocab_fingerprint: str
    k: str
    step: str
    temperature: str
    run: str
    round: str
    client: str
    shard: str
    tokens: str
    nonce: str
    """Before ``spec``, whose digest covers it too: so a replay is reported as one."""
    spec: str
    max_code: str = "255"
    """In the codec ``threshold`` only."""
    draws: str = "0"
    """In the codec ``sampled`` only."""

    def to_dict(self) -> dict[str, str]:
        """The fields of a payload with this codec."""
        omitted = {"max_code", "draws"} - _own_fields(self.codec)
        return {name: value for name, value in asdict(self).items() if name not in omitted}


def encode(answers: Answers, spec: RoundSpec, client: str, shard: int = 0) -> bytes:
    """Encode the answers to a shard of ``spec`` as a payload; equal arguments give equal bytes.

    With ``compression: zstd`` this holds for one version of the library.

    Raises:
        ValueError: The answers have another codec or shape than the request.
        ConfigError: The package zstandard is needed but not installed.
    """
    given = (answers.codec, len(answers), answers.k, answers.vocab_size)
    required = (spec.codec, _part(spec, shard).positions, spec.k, spec.vocab_size)
    if given != required:
        raise ValueError(f"answers must be (codec, T, k, V) = {required}, got {given}")
    if isinstance(answers, Sampled) and answers.draws != spec.draws:
        raise ValueError(f"answers must have {spec.draws} draws, got {answers.draws}")
    tensors = tensors_of(answers)
    if spec.compression == "zstd":
        tensors = {FRAME: zstd.compress(tensors)}
    return container.pack(tensors, metadata_of(spec, client, shard))


def bound(spec: RoundSpec, shard: int = 0) -> int:
    """The most bytes that an honest payload for the request can have."""
    content = _part(spec, shard).positions * row_bytes(spec)
    return 8 + container.HEADER_LIMIT + (zstd.largest(content) if spec.compression == "zstd" else content)


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
    """Make all checks of a payload and return its answers.

    Args:
        envelope: From ``seal``.
        content: From ``encode``; without compression the answers are views of it.
        spec: The request that the answers must match.
        seen: ``(client, round)`` of the answers that have been admitted.
        shard: The shard of the request.
        sender: The client that the transport authenticated, if it does: it must be the envelope's client.
        now: Seconds since 1970 (UTC) by the server's clock; needed if the round has a deadline.

    Raises:
        Refusal: A subclass for each reason. Nothing is stored.
        ValueError: ``now`` is missing.

    Memory:
        The answers if they were compressed, and about 20 MiB, whatever arrives.
    """
    if spec.deadline is not None and now is None:
        raise ValueError("a round with a deadline needs the time: now")
    checked = parse_envelope(envelope, spec, shard, now)
    client = checked.client
    if sender is not None and client != sender:
        raise refusals.UnknownClient(sender, spec.round, "envelope, client", sender, client)
    if (client, spec.round) in seen:
        required = "the first of this round"
        raise refusals.SecondSubmission(client, spec.round, "submission", required, "another")
    if len(content) > bound(spec, shard):
        required = f"at most {bound(spec, shard)} bytes"
        raise refusals.TooLarge(client, spec.round, "payload", required, len(content))
    _check_bytes(content, checked)
    return _decode(content, _part(spec, shard), client, metadata_of(spec, client, shard))


def reread(content: bytes | memoryview, spec: RoundSpec, shard: int = 0) -> Answers:
    """Read the answers of an admitted payload, without checking the values again."""
    tensors, _ = container.unpack(content)
    part = _part(spec, shard)
    return answers_of(_assemble(tensors, part, ""), part)


def read(content: bytes) -> tuple[Answers, dict[str, str]]:
    """Read a payload without its request, for inspection.

    Raises:
        Refusal: It is not well-formed.
    """
    metadata = _unpack(content, "?", 0)[1]
    parsed = _parse_metadata(metadata)
    spec = _spec_of(parsed)
    if not CLIENT_NAME.fullmatch(parsed.client):
        required = "1 to 64 letters, digits, '_' and '-'"
        raise refusals.UnknownClient("?", 0, "client", required, parsed.client)
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


def _parse_metadata(metadata: dict[str, str]) -> Metadata:
    """The metadata of a payload whose request is not known, with the codec's fields and fixed values."""
    codec, compression = metadata.get("codec", ""), metadata.get("compression", "")
    if codec not in CODECS:
        raise refusals.WrongMetadata("?", 0, "codec", f"one of {', '.join(CODECS)}", codec)
    if compression not in COMPRESSIONS:
        required = f"one of {', '.join(COMPRESSIONS)}"
        raise refusals.WrongMetadata("?", 0, "compression", required, compression)
    names = {field.name for field in fields(Metadata)} - {"max_code", "draws"} | _own_fields(codec)
    if set(metadata) != names:
        raise refusals.WrongMetadata("?", 0, "metadata", f"{sorted(names)}", f"{sorted(metadata)}")
    for key, value in CONSTANTS.items():
        if metadata[key] != value:
            raise refusals.WrongMetadata("?", 0, key, value, metadata[key])
    return Metadata(**metadata)


def _own_fields(codec: str) -> set[str]:
    """The metadata fields of one codec only."""
    return {"threshold": {"max_code"}, "sampled": {"draws"}}.get(codec, set())


def _spec_of(metadata: Metadata) -> RoundSpec:
    """A request that a payload with this metadata could answer."""
    try:
        spec = RoundSpec(
            run_id=metadata.run,
            round=_number(metadata.round),
            proxy_digest="",
            positions=_number(metadata.tokens),
            vocab_size=_number(metadata.vocab_size),
            vocab_fingerprint=metadata.vocab_fingerprint,
            codec=metadata.codec,
            k=_number(metadata.k),
            nonce=metadata.nonce,
            quorum=1,
            compression=metadata.compression,
            max_code=_number(metadata.max_code),
            draws=_number(metadata.draws),
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
    """The request for one shard, as if it were the whole request."""
    start, stop = rows_of(spec, shard)
    return replace(spec, positions=stop - start, shard_rows=0)


def metadata_of(spec: RoundSpec, client: str, shard: int) -> dict[str, str]:
    """The metadata that a payload must have."""
    return Metadata(
        **CONSTANTS,
        codec=spec.codec,
        compression=spec.compression,
        vocab_size=str(spec.vocab_size),
        vocab_fingerprint=spec.vocab_fingerprint,
        k=str(spec.k),
        run=spec.run_id,
        round=str(spec.round),
        client=client,
        shard=f"{shard}/{shards(spec)}",
        tokens=str(_part(spec, shard).positions),
        nonce=spec.nonce,
        spec=spec_digest(spec),
        max_code=str(spec.max_code),
        draws=str(spec.draws),
    ).to_dict()


def _check_bytes(content: bytes | memoryview, envelope: Envelope) -> None:
    client, round_, size = envelope.client, envelope.round, len(content)
    if envelope.size != size:
        kind = refusals.Truncated if size < envelope.size else refusals.ExtraBytes
        raise kind(client, round_, "payload", f"{envelope.size} bytes", size)
    if envelope.blake2b != digest(content):
        raise refusals.DigestMismatch(client, round_, "payload, blake2b", envelope.blake2b, digest(content))


def _check_metadata(metadata: dict[str, str], expected: dict[str, str], client: str, round_: int) -> None:
    if set(metadata) != set(expected):
        missing, unknown = set(expected) - set(metadata), set(metadata) - set(expected)
        given = f"missing {sorted(missing)}, unknown {sorted(unknown)}"
        raise refusals.WrongMetadata(client, round_, "metadata", f"{len(expected)} known fields", given)
    for key, value in expected.items():
        if metadata[key] != value:
            raise METADATA_REASONS.get(key, refusals.WrongMetadata)(client, round_, key, value, metadata[key])


def _assemble(tensors: Tensors, spec: RoundSpec, client: str) -> Tensors:
    """The decompressed tensors of a payload, with types and shapes checked."""
    tensor_layout = layout(spec)
    names = [FRAME] if spec.compression == "zstd" else list(tensor_layout)
    if sorted(tensors) != names:
        raise refusals.WrongTensors(client, spec.round, "tensors", names, sorted(tensors))
    if spec.compression == "zstd":
        frame = tensors[FRAME]
        if frame.dtype != U8 or frame.ndim != 1:
            shape = f"{frame.dtype} {list(frame.shape)}"
            raise refusals.WrongShape(client, spec.round, FRAME, "uint8 [bytes]", shape)
        return zstd.decompress(frame.data, tensor_layout)
    for name, (dtype, sizes) in tensor_layout.items():
        tensor = tensors[name]
        if tensor.dtype != dtype or tensor.shape != sizes:
            given = f"{tensor.dtype} {list(tensor.shape)}"
            raise refusals.WrongShape(client, spec.round, name, f"{dtype} {list(sizes)}", given)
    return tensors
