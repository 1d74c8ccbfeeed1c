"""Verification of a run against its ledger, by its owner or by a participating client."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from feddistill import payload
from feddistill.errors import DataError, PayloadError, RunError
from feddistill.federation import encoding
from feddistill.federation.answer_files import StoredAnswer
from feddistill.payload import Entry
from feddistill.progress import Progress
from feddistill.runs import rerun
from feddistill.store import layout
from feddistill.store.layout import LEDGER, RESULT
from feddistill.store.run_directory import Json, RunDirectory, read_object
from feddistill.types import RoundSpec


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check."""

    right: bool
    what: str


Ledger = tuple[Entry, ...]


def run(root: Path, *, recompute: bool = False, progress: Progress | None = None) -> Iterator[Finding]:
    """Verify a run: the hash chain, every request, every payload, every teacher.

    Args:
        root: The run's directory.
        recompute: Also aggregate each teacher again from the payloads; the bytes must be equal.
        progress: Where progress is shown.

    Raises:
        RunError: The run has no ledger.
    """
    directory = RunDirectory.open(root)
    try:
        ledgers = _ledgers(read_object(root / LEDGER))
        if directory.path(RESULT).exists():
            head = directory.read_json(RESULT)["ledger"]
            yield Finding(
                head == ledgers[0][-1].head(), f"the result names the ledger's head, {head[:16]}..."
            )
        yield Finding(True, f"the ledger is a chain of {len(ledgers[0])} rounds")
        for entry in ledgers[0]:
            yield from _round(directory, entry, ledgers)
    finally:
        directory.close()
    if recompute:
        with tempfile.TemporaryDirectory() as scratch:
            again = rerun.aggregate(root, Path(scratch) / "again", progress=progress)
        for entry, decided in zip(ledgers[0], again, strict=True):
            made = Entry(**decided["ledger"])
            same = (made.teacher, made.feedback) == (entry.teacher, entry.feedback)
            yield Finding(same, f"round {entry.round}: the payloads give this teacher, to the byte")


def kept(ledger: Path, own: Path) -> Iterator[Finding]:
    """Check a published ledger against the requests and payloads that a client stored.

    Args:
        ledger: ``ledger.json`` of a run, or its directory.
        own: A folder with requests (``spec.json``) and payloads beside their envelopes, at any depth.

    Raises:
        RunError: A file cannot be read, or the folder has neither requests nor payloads.
    """
    ledgers = _ledgers(read_object(ledger / LEDGER if ledger.is_dir() else ledger))
    yield Finding(True, f"the ledger is a chain of {len(ledgers[0])} rounds")
    requests = sorted(own.rglob(layout.REQUEST))
    payloads = sorted(own.rglob(layout.tensors("*")))
    if not requests and not payloads:
        raise RunError(
            f"{own} has neither a request ({layout.REQUEST}) nor a payload ({layout.tensors('*')})"
        )
    for path in requests:
        spec = payload.parse_spec(path.read_bytes())
        yield _asked(spec, ledgers, str(path))
    answers: dict[tuple[Path, str, object], dict[int, Path]] = {}
    for path in payloads:
        beside = layout.envelope_of(path)
        if beside.exists():
            fields = read_object(beside)
            key = (path.parent, str(fields.get("client")), fields.get("round"))
            answers.setdefault(key, {})[int(fields.get("sequence", 0))] = path
    for (_, client, number), found in answers.items():
        yield _counted([found[shard] for shard in sorted(found)], client, number, ledgers[0])


def _ledgers(found: Json) -> list[Ledger]:
    """The run's ledger and those of the runs that it was derived from, newest first."""
    ledgers = [payload.parse_entries(found.get("rounds"))]
    if not ledgers[0]:
        raise DataError("ledger: has no rounds")
    if found.get("head") != ledgers[0][-1].head():
        raise DataError("ledger: its head is not that of its last round")
    return ledgers + (_ledgers(found["from"]) if isinstance(found.get("from"), dict) else [])


def _asked(spec: RoundSpec, ledgers: list[Ledger], name: str) -> Finding:
    """Check that a ledger contains a request and that its ``previous`` is the head before that round."""
    digest = payload.digest(payload.canonical(spec))
    for ledger in ledgers:
        before = ledger[spec.round - 2].head() if 1 < spec.round <= len(ledger) + 1 else ""
        if spec.round <= len(ledger) and ledger[spec.round - 1].request == digest and spec.previous == before:
            return Finding(
                True, f"round {spec.round}: {name} is in the ledger and names the rounds before it"
            )
    return Finding(False, f"round {spec.round}: {name} differs from the request in the ledger")


def _counted(paths: list[Path], client: str, number: object, ledger: Ledger) -> Finding:
    """Check that the ledger lists an answer as used or as refused."""
    path = paths[0]
    entry = ledger[number - 1] if isinstance(number, int) and 1 <= number <= len(ledger) else None
    if entry is None:
        return Finding(False, f"{path}: the ledger has no round {number}")
    if client in entry.refused:
        return Finding(True, f"round {number}: {path} was refused: {entry.refused[client]}")
    if client not in entry.payloads:
        return Finding(False, f"round {number}: {path} was left out: the ledger does not name {client}")
    digests = [payload.digest(path.read_bytes()) for path in paths]
    same = entry.payloads[client] == payload.digest_of(digests)
    return Finding(same, f"round {number}: {path} is the answer that was counted for {client}")


def _round(directory: RunDirectory, entry: Entry, ledgers: list[Ledger]) -> Iterator[Finding]:
    layout.round_of(entry.round)
    spec = payload.parse_spec(directory.read_bytes(layout.request(entry.round)))
    yield _asked(spec, ledgers, "the request")
    for client, digest in sorted(entry.payloads.items()):
        yield _admitted(directory, spec, client, digest)
    for client, reason in sorted(entry.refused.items()):
        error = _refusal(directory, spec, client)
        given = type(error).__name__ if error else "nothing"
        yield Finding(given == reason, f"round {entry.round}: {client} is refused for {reason}")
    whole = directory.digest(layout.tensors(layout.teacher(entry.round))) == entry.teacher
    yield Finding(whole, f"round {entry.round}: the teacher is intact")
    try:
        feedback = StoredAnswer(directory, layout.feedback(entry.round), encoding.feedback_spec(spec))
        sent = feedback.admit(sender=encoding.SERVER) == entry.feedback
    except PayloadError:
        sent = False
    yield Finding(sent, f"round {entry.round}: the feedback sent to clients is intact")


def _admitted(directory: RunDirectory, spec: RoundSpec, client: str, digest: str) -> Finding:
    what = f"round {spec.round}: {client}'s payload is the one that was counted, and well-formed"
    stored = StoredAnswer(directory, layout.answer(spec.round, client), spec)
    try:
        found = payload.digest_of([directory.digest(content) for _, content in stored.files])
        if found == digest:
            stored.admit(sender=client)
        return Finding(found == digest, what)
    except RunError as error:
        return Finding(False, f"round {spec.round}: {error}")
    except PayloadError as refusal:
        return Finding(False, f"round {spec.round}: {client}: {refusal}")


def _refusal(directory: RunDirectory, spec: RoundSpec, client: str) -> PayloadError | None:
    try:
        StoredAnswer(directory, layout.answer(spec.round, client), spec).admit(sender=client)
    except PayloadError as error:
        return error
    return None
