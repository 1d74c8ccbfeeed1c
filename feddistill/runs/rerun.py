"""A finished run decided anew from what it stored: another rule, another student, a client forgotten.

The run itself is never touched. What it stored and what still holds is taken over into a new run, and only
the rest is done: so what comes out is what a run with these settings would have found.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from feddistill import config as configuration
from feddistill import payload
from feddistill.config import Config
from feddistill.errors import ConfigError, PayloadError, RunError
from feddistill.federation import answer_files
from feddistill.progress import Progress
from feddistill.runs import experiment
from feddistill.store import layout
from feddistill.store.layout import CONFIG, LEDGER, PROVENANCE
from feddistill.store.run_directory import Json, RunDirectory
from feddistill.types import Cost, RoundSpec

STUDENTS_OWN = ("student.", "distill.", "baselines")
TEACHERS_OWN = ("aggregation.",)


def aggregate(
    source: Path,
    out: Path,
    overrides: tuple[str, ...] = (),
    *,
    late: Sequence[Path] = (),
    progress: Progress | None = None,
) -> list[Json]:
    """Another teacher of each round from the answers that a run stored, in the new run ``out``.

    Answers are those that were given: where clients co-distil, they gave the later ones after they had seen
    the old teacher. ``train --resume`` goes on to the student.

    Args:
        source: A complete run.
        out: A new or empty directory.
        overrides: Of ``aggregation`` alone.
        late: Payloads that came after their round was closed, all shards of an answer; each one's envelope
            is the ``.json`` file beside it. They take the place of what that client sent in time and was
            refused.
        show: Where progress is shown.

    Returns:
        What each round decided.

    Raises:
        PayloadError: A late payload is refused.
        RunError: ``source`` is not complete.
    """
    config = _changed(source, overrides, TEACHERS_OWN)
    RunDirectory.check_free(out, "choose another --out")
    original = _open(source, config)
    try:
        answers = _late_answers(original, late)
        said = {"late": [f"{name}, round {number}" for number, name in answers]} if late else {}
        made = _derive(original, out, config, "aggregate", {"set": list(overrides), **said})
        try:
            for number in _rounds(config):
                _adopt_answers(original, made, number)
                if original.done(layout.student_answers(number)) is not None:  # what the student said
                    made.adopt(original, layout.student_answers(number))
            for baseline in config.baselines:
                made.adopt(original, layout.method(baseline))
            for (number, name), shards in answers.items():
                spec, step = _request(original, number), layout.answer(number, name)
                for shard, places in enumerate(answer_files.files(step, spec)):
                    path = shards[shard]
                    for place, file in zip(places, (layout.envelope_of(path), path), strict=True):
                        made.write_bytes(place, file.read_bytes())
                answer_files.store(made, step, spec, Cost())
        finally:
            made.close()
    finally:
        original.close()
    return experiment.decide(out, progress)


def distill(
    source: Path, out: Path, overrides: tuple[str, ...] = (), *, progress: Progress | None = None
) -> Json:
    """Another student from the teachers that a run made, in the new run ``out``; returns its result.

    Args:
        source: A complete run, or one that ``aggregate`` made.
        out: A new or empty directory.
        overrides: Of ``student``, ``distill`` and ``baselines``, which are none unless they are named here.
        show: Where progress is shown.

    Raises:
        RunError: ``source`` has no teacher of a round.
    """
    config = _changed(source, ("baselines=[]", *overrides), STUDENTS_OWN)
    RunDirectory.check_free(out, "choose another --out")
    original = _open(source, config)
    try:
        experiment.check(config, progress)  # before anything is written: the new run cannot be mended
        made = _derive(original, out, config, "distill", {"set": list(overrides)})
        try:
            for number in _rounds(config):
                _adopt_answers(original, made, number)
                made.adopt(original, layout.teacher(number))
        finally:
            made.close()
    finally:
        original.close()
    return experiment.run(config, out, resume=True, progress=progress)


def forget(source: Path, out: Path, clients: Sequence[str], *, progress: Progress | None = None) -> Json:
    """A run as if ``clients`` had never been there, in the new run ``out``; returns its result.

    The first round's answers of the others are taken over; so are the later ones where clients do not
    co-distil. Where they do, the others have learned from a teacher that knew the forgotten: these rounds are
    done again from the first round's specialists, which are trained again where they have been tidied away.

    Raises:
        ConfigError: A client is unknown, or too few are left.
        RunError: ``source`` is not complete.
    """
    before = experiment.stored_config(source)
    absent = tuple(dict.fromkeys((*before.data.exclude_clients, *clients)))
    config = _without(before, absent)
    RunDirectory.check_free(out, "choose another --out")
    original = _open(source, config)
    try:
        enrolled = _request(original, 1).clients
        if unknown := sorted(set(clients) - set(enrolled)):
            raise ConfigError(f"{source} has no {', '.join(unknown)}; its clients are {', '.join(enrolled)}")
        again = config.clients.codistillation.enabled and config.rounds > 1
        engine = original.read_json(layout.ENGINE)["name"] if original.path(layout.ENGINE).exists() else ""
        if again and engine not in ("", experiment.LOCAL):
            raise ConfigError(
                f"{source}: its clients are elsewhere and have learned from {', '.join(clients)}; "
                "train again without them"
            )
        made = _derive(original, out, config, "forget", {"forgotten": list(clients)}, absent)
        try:
            for number in _rounds(config):
                if number == 1 or not again:
                    _adopt_answers(original, made, number, absent, with_weights=again)
            for baseline in config.baselines:
                made.adopt(original, layout.method(baseline))
        finally:
            made.close()
    finally:
        original.close()
    return experiment.run(config, out, resume=True, progress=progress)


def _rounds(config: Config) -> range:
    return range(1, config.rounds + 1)


def _changed(source: Path, overrides: tuple[str, ...], own: tuple[str, ...]) -> Config:
    """The stored configuration with overrides of a few groups."""
    for override in overrides:
        if not override.startswith(own):
            groups = ", ".join(group.rstrip(".") for group in own)
            raise ConfigError(f"{override}: only {groups} can be changed here, by this command")
    experiment.stored_config(source)  # says it where this is no run
    return configuration.load_stored(source / CONFIG, overrides)


def _without(config: Config, absent: tuple[str, ...]) -> Config:
    """``config`` for fewer clients: a quorum of all of them stays one."""
    raw = config.model_dump(mode="json")
    raw["data"]["exclude_clients"] = list(absent)
    raw["baselines"] = [name for name in raw["baselines"] if name == "public_only"]  # nobody's private texts
    clients = getattr(config.data.partition, "clients", None)
    quorum = config.aggregation.quorum
    if clients is not None and quorum is not None:
        raw["aggregation"]["quorum"] = max(1, min(quorum, clients - len(absent)))
    return configuration.parse(raw)


def _open(source: Path, config: Config) -> RunDirectory:
    """A run that has decided every round."""
    original = RunDirectory.open(source)
    for number in _rounds(config):
        if original.done(layout.teacher(number)) is None:
            original.close()
            raise RunError(
                f"{source} has no teacher of round {number} yet; "
                f"go on with: feddistill train --resume --out {source}"
            )
    return original


def _request(original: RunDirectory, number: int) -> RoundSpec:
    return payload.parse_spec(original.read_bytes(layout.request(number)))


def _derive(
    original: RunDirectory,
    out: Path,
    config: Config,
    command: str,
    said: Json,
    absent: Sequence[str] = (),
) -> RunDirectory:
    """A new run with the configuration, the data's hashes, and where it comes from."""
    config.aggregation.check(len(set(_request(original, 1).clients) - set(absent)))
    made = RunDirectory.create(out, configuration.dump(config))
    digests = original.read_json(layout.DIGESTS)
    made.write_json(layout.DIGESTS, {k: v for k, v in digests.items() if k not in absent})
    before = original.read_json(PROVENANCE)["steps"] if original.path(PROVENANCE).exists() else []
    step = {"command": command, "from": str(original.root), "config": configuration.digest(config), **said}
    made.write_json(PROVENANCE, {"steps": [*before, step]})
    if original.path(layout.ENGINE).exists():
        made.adopt_file(original, layout.ENGINE)
    made.write_json(LEDGER, {"head": "", "rounds": [], "from": original.read_json(LEDGER)})
    return made


def _adopt_answers(
    original: RunDirectory,
    made: RunDirectory,
    number: int,
    absent: Sequence[str] = (),
    *,
    with_weights: bool = False,
) -> None:
    """What was asked in a round, and what the clients trained and answered.

    ``with_weights``: leave out trainings whose weights are gone, as something will go on from there.
    """
    layout.round_of(number)
    made.adopt_file(original, layout.request(number))
    specialists = layout.specialists(number)
    # Of clients elsewhere: what they said of themselves, and of their training.
    for folder in (layout.DESCRIPTIONS, specialists, layout.reports(number), layout.answers(number)):
        for name in original.steps(folder):
            gone = folder == specialists and not original.path(layout.tensors(name)).exists()
            if name.rsplit("/", 1)[1] not in absent and not (with_weights and gone):
                made.adopt(original, name)


def _late_answers(original: RunDirectory, paths: Sequence[Path]) -> dict[tuple[int, str], dict[int, Path]]:
    """By round and client, the payload of each shard."""
    answers: dict[tuple[int, str], dict[int, Path]] = {}
    for path in paths:
        number, client, shard = _late(original, path)
        answers.setdefault((number, client), {})[shard] = path
    for (number, client), shards in answers.items():
        wanted = payload.shards(_request(original, number))
        if len(shards) < wanted:
            raise PayloadError(
                f"{client}, round {number}: {len(shards)} of the {wanted} shards of the answer are given"
            )
    return answers


def _late(original: RunDirectory, path: Path) -> tuple[int, str, int]:
    """Round, client and shard of a payload that came late, after every check: its client may be late."""
    try:
        envelope, content = layout.envelope_of(path).read_bytes(), path.read_bytes()
        said = json.loads(envelope)
        number, client, shard = int(said["round"]), str(said["client"]), int(said["sequence"])
    except OSError as error:
        raise RunError(f"cannot read {error.filename}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise PayloadError(f"{layout.envelope_of(path)} is no envelope of a payload") from None
    if not original.path(layout.request(number)).exists():
        raise PayloadError(f"{path} answers round {number}, which {original.root} does not have")
    spec = _request(original, number)
    entries = payload.parse_entries(original.read_json(LEDGER)["rounds"])
    taken = frozenset((client, number) for client in entries[number - 1].payloads)
    if not 0 <= shard < payload.shards(spec):
        raise PayloadError(f"{path} is shard {shard} of an answer that has {payload.shards(spec)}")
    payload.admit(envelope, content, spec, taken, shard, now=int(time.time()))
    return number, client, shard
