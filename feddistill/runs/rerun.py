"""Re-running from stored answers: another rule, another student, or without some of the clients.

The source run is never changed. Its steps that remain valid are copied into a new run and only the others are
computed, so the result equals that of a run with the new settings.
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
from feddistill.store import layout, recipe
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
    """Aggregate the stored answers of a run into new teachers, in the new run ``out``.

    The answers are unchanged: if clients co-distil, their later answers still depend on the old teachers.
    ``train --resume`` then trains the student.

    Args:
        source: A complete run.
        out: A new or empty directory.
        overrides: Changed settings; only of ``aggregation``.
        late: Payloads that arrived after their round closed, with all shards of an answer; the envelope of
            each is the ``.json`` file beside it. They replace a refused payload of the same client.
        progress: Where progress is shown.

    Returns:
        The aggregation record of each round.

    Raises:
        PayloadError: A late payload is refused.
        RunError: ``source`` is not complete.
    """
    config = _changed(source, overrides, TEACHERS_OWN)
    RunDirectory.check_free(out, "choose another --out")
    original = _open(source, config)
    try:
        answers = _late_answers(original, late)
        added = {"late": [f"{name}, round {number}" for number, name in answers]} if late else {}
        made = _derive(original, out, config, "aggregate", {"set": list(overrides), **added}, (), progress)
        try:
            for number in _rounds(config):
                _adopt_answers(original, made, number)
                if original.done(layout.student_answers(number)) is not None:
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
    """Train another student from the stored teachers of a run, in the new run ``out``; returns its result.

    Args:
        source: A complete run, or one made by ``aggregate``.
        out: A new or empty directory.
        overrides: Changed settings of ``student``, ``distill`` and ``baselines``; no baseline is run unless
            ``baselines`` is set here.
        progress: Where progress is shown.

    Raises:
        RunError: ``source`` lacks the teacher of a round.
    """
    config = _changed(source, ("baselines=[]", *overrides), STUDENTS_OWN)
    RunDirectory.check_free(out, "choose another --out")
    original = _open(source, config)
    try:
        experiment.check(config, progress)  # before writing: the configuration of the new run is final
        made = _derive(original, out, config, "distill", {"set": list(overrides)}, (), progress)
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
    """Redo a run without ``clients``, in the new run ``out``; returns its result.

    The other clients' answers of the first round are reused. Without co-distillation, those of later rounds
    are reused as well. With co-distillation, later answers depend on teachers that included the removed
    clients: these rounds are recomputed from the specialists of the first round, which are trained again if
    their weights were deleted.

    Raises:
        ConfigError: A client is unknown, or too few clients are left.
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
                f"{source}: its remote clients were trained on teachers that include {', '.join(clients)}; "
                "train again without them"
            )
        made = _derive(original, out, config, "forget", {"forgotten": list(clients)}, absent, progress)
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
    """The stored configuration with overrides, which must be in the groups ``own``."""
    for override in overrides:
        if not override.startswith(own):
            groups = ", ".join(group.rstrip(".") for group in own)
            raise ConfigError(f"{override}: this command can only change {groups}")
    experiment.stored_config(source)  # raises if source is not a run
    return configuration.load_stored(source / CONFIG, overrides)


def _without(config: Config, absent: tuple[str, ...]) -> Config:
    """``config`` without the ``absent`` clients; a quorum is reduced to the number of clients left."""
    raw = config.model_dump(mode="json")
    raw["data"]["exclude_clients"] = list(absent)
    raw["baselines"] = [name for name in raw["baselines"] if name == "public_only"]  # uses no private texts
    clients = getattr(config.data.partition, "clients", None)
    quorum = config.aggregation.quorum
    if clients is not None and quorum is not None:
        raw["aggregation"]["quorum"] = max(1, min(quorum, clients - len(absent)))
    return configuration.parse(raw)


def _open(source: Path, config: Config) -> RunDirectory:
    """Open a run; raise unless every round has a teacher."""
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
    details: Json,
    absent: Sequence[str] = (),
    progress: Progress | None = None,
) -> RunDirectory:
    """Create a run with the configuration, the data digests and its provenance."""
    config.aggregation.check(len(set(_request(original, 1).clients) - set(absent)))
    made = RunDirectory.create(out, configuration.dump(config))
    recipe.write(made, configuration.as_stored(config))
    digests = original.read_json(layout.DIGESTS)
    if recipe.stored(original) < recipe.DIVIDED:  # the private texts are not divided like that any more
        digests = {name: digest for name, digest in digests.items() if name.startswith("data.")}
    made.write_json(layout.DIGESTS, {k: v for k, v in digests.items() if k not in absent})
    before = original.read_json(PROVENANCE)["steps"] if original.path(PROVENANCE).exists() else []
    step = {"command": command, "from": str(original.root), "config": configuration.digest(config), **details}
    if (number := recipe.stored(original)) != recipe.NUMBER:
        step["recipe"] = number
        if progress is not None:
            progress.log(
                f"{original.root} has recipe {number} of training; what is trained now has {recipe.NUMBER}"
            )
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
    """Copy the request of a round, and the clients' training records and answers.

    ``with_weights``: skip training records whose weights were deleted, since later steps need the weights.
    """
    layout.round_of(number)
    made.adopt_file(original, layout.request(number))
    specialists = layout.specialists(number)
    # Descriptions and training reports exist for remote clients.
    for folder in (layout.DESCRIPTIONS, specialists, layout.reports(number), layout.answers(number)):
        for name in original.steps(folder):
            gone = folder == specialists and not original.path(layout.tensors(name)).exists()
            if name.rsplit("/", 1)[1] not in absent and not (with_weights and gone):
                made.adopt(original, name)


def _late_answers(original: RunDirectory, paths: Sequence[Path]) -> dict[tuple[int, str], dict[int, Path]]:
    """Map ``(round, client)`` to the payload file of each shard."""
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
    """Run all admission checks on a late payload; returns its round, client and shard."""
    try:
        envelope, content = layout.envelope_of(path).read_bytes(), path.read_bytes()
        fields = json.loads(envelope)
        number, client, shard = int(fields["round"]), str(fields["client"]), int(fields["sequence"])
    except OSError as error:
        raise RunError(f"cannot read {error.filename}: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, RecursionError):
        raise PayloadError(f"{layout.envelope_of(path)} is not an envelope of a payload") from None
    if not original.path(layout.request(number)).exists():
        raise PayloadError(f"{path} answers round {number}, which {original.root} does not have")
    spec = _request(original, number)
    entries = payload.parse_entries(original.read_json(LEDGER)["rounds"])
    taken = frozenset((client, number) for client in entries[number - 1].payloads)
    if not 0 <= shard < payload.shards(spec):
        raise PayloadError(f"{path} is shard {shard} of an answer that has {payload.shards(spec)}")
    payload.admit(envelope, content, spec, taken, shard, now=int(time.time()))
    return number, client, shard
