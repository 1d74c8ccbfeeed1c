"""A run from its configuration to its result: the one place where everything is put together."""

import platform
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import torch
import transformers

from feddistill import config as configuration
from feddistill import data
from feddistill.accounting import peak_memory_bytes
from feddistill.client.in_process import LocalTransport
from feddistill.config import Config
from feddistill.config.data import FileSource, RemotePartition
from feddistill.config.methods import METHODS
from feddistill.errors import ConfigError, RunError
from feddistill.federation.protocol import OfflineTransport, RetryPolicy
from feddistill.progress import NoProgress, Progress
from feddistill.runs import results
from feddistill.server import rounds
from feddistill.store import layout
from feddistill.store.layout import CONFIG, DIGESTS, ENGINE, PROVENANCE, RESULT, SKEW
from feddistill.store.run_directory import Json, RunDirectory
from feddistill.tasks.check import check as check_models
from feddistill.tasks.choose import learner_of
from feddistill.tasks.session import Engine, Session
from feddistill.tasks.step_cache import StepCache
from feddistill.types import Splits

LOCAL = "local"


def run(
    config: Config,
    out: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    engine: Engine | None = None,
    shared: Path | None = None,
) -> Json:
    """Run ``config`` in the directory ``out``; returns what ``result.json`` holds.

    Args:
        config: Everything that decides the outcome.
        out: A new or empty directory; with ``resume``, one that an interrupted run left.
        resume: Go on after the last step that is whole. A complete run is returned as it is.
        show: Where progress is shown; nowhere by default.
        engine: What carries the federation; by default all clients work in this process.
        shared: A folder of steps that other runs have done and this one need not do (``sharing``).

    Raises:
        FeddistillError: The user's to mend; nothing that a resume would trust is half-written.
    """
    progress = progress or NoProgress()
    start = time.perf_counter()
    if resume:
        directory = RunDirectory.open(out)
    else:  # nothing is written for settings that cannot run
        RunDirectory.check_free(out)
        config = resolve(config)
        _here(config, engine)
        prepare(config)
        splits = check(config, progress, build=_works_here(engine))
        directory = RunDirectory.create(out, configuration.dump(config))
    try:
        if resume:
            config = _same(config, directory)
            if (done := _result(directory)) is not None:
                return done
            prepare(config)
            splits = check(config, progress, build=_works_here(engine))
        _same_data(splits, directory)
        engine = _engine(engine, directory)
        skew = data.skew(splits)
        directory.write_json(SKEW, asdict(skew))
        common = None if shared is None else StepCache(shared, config)
        session = Session(config, splits, directory, progress, engine, LocalTransport, common)
        found = {name: _method(session, name) for name in ("feddistill", *config.baselines)}
        _tidy(directory, config)
        result = results.summarise(config, splits, skew.non_iid, found, environment(config))
        if directory.path(PROVENANCE).exists():
            result["provenance"] = directory.read_json(PROVENANCE)
        result["seconds"]["this_process"] = round(time.perf_counter() - start, 3)
        result["peak_memory_bytes"] = max(result["peak_memory_bytes"], peak_memory_bytes())
        directory.write_json(RESULT, result)
        return directory.read_json(RESULT)
    finally:
        directory.close()


def decide(out: Path, progress: Progress | None = None) -> list[Json]:
    """What each round of the run in ``out`` decides, without a student: see ``server.rounds.decide``."""
    progress = progress or NoProgress()
    config = stored_config(out)
    directory = RunDirectory.open(out)
    try:
        prepare(config)
        splits = check(config, progress)
        _same_data(splits, directory)
        return rounds.decide(
            Session(config, splits, directory, progress, _engine(None, directory), LocalTransport)
        )
    finally:
        directory.close()


def check(config: Config, progress: Progress | None = None, *, build: bool = True) -> Splits:
    """Read the data and ``build`` every model once; returns the data. Nothing is trained or written."""
    progress = progress or NoProgress()
    transformers.utils.logging.set_verbosity_error()  # its chatter and bars; what we show is enough
    transformers.utils.logging.disable_progress_bar()
    with progress.step("read the data"):
        splits = data.load(config.data, config.seed, config.task)
    with progress.step("build the models"):
        check_models(config, splits, build=build)
    return splits


def evaluate(out: Path, texts: FileSource | None = None) -> Json:
    """Figures of a complete run's student: of the round that was best on validation.

    Args:
        out: The run.
        texts: Labelled texts to evaluate on; ``None`` for the run's own test set.

    Raises:
        RunError: The run is not complete, or its student's weights are gone.
        DataError: A label of ``texts`` is not one that the student knows.
    """
    config = stored_config(out)
    directory = RunDirectory.open(out)
    try:
        result = _result(directory)
        if result is None:
            raise RunError(f"{out} is not complete; go on with: feddistill train --resume --out {out}")
        keeps_student(config, out)
        prepare(config)
        splits = check(config)
        _same_data(splits, directory)
        chosen = splits.test
        if texts is not None:
            chosen = data.labelled(texts, splits.label_names, "--texts", config.task)
        session = Session(config, splits, directory, NoProgress())
        learner = learner_of(session, config.student.model, "student.model")
        learner.restore(result["student_weights"])
        figures = learner.metrics(chosen)
        return {"run": str(out), "round": result["selected_round"], "examples": len(chosen), **figures}
    finally:
        directory.close()


def keeps_student(config: Config, out: Path) -> None:
    """Refuse a run that has left no weights.

    Raises:
        RunError: It says ``keep_checkpoints: none``.
    """
    if config.keep_checkpoints == "none":
        raise RunError(f"{out} has left no weights: it was run with keep_checkpoints: none")


def stored_config(out: Path) -> Config:
    """The resolved configuration that a run was started with."""
    return configuration.load_stored(_config_file(out))


def stored_splits(config: Config, directory: RunDirectory) -> Splits:
    """The data of a run.

    Raises:
        RunError: They are not what it was started with.
    """
    splits = data.load(config.data, config.seed, config.task)
    _same_data(splits, directory)
    return splits


def environment(config: Config) -> Json:
    """What the numbers may depend on besides the configuration."""
    return {
        "python": platform.python_version(),
        "feddistill": version("feddistill"),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": version("numpy"),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "threads": config.threads,
        "precision": config.precision,
    }


def _config_file(out: Path) -> Path:
    path = out / CONFIG
    if not path.is_file():
        raise RunError(f"{out} is not a run: it has no {CONFIG}")
    return path


def resolve(config: Config) -> Config:
    """Settle what the machine decides, so that the stored configuration says all."""
    chosen: Json = {}
    if config.threads is None:
        chosen["threads"] = torch.get_num_threads()
    if config.precision == "auto":
        chosen["precision"] = "bf16" if _fast_bf16() else "fp32"
    return config.model_copy(update=chosen)


def _fast_bf16() -> bool:
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _same(config: Config, directory: RunDirectory) -> Config:
    """The stored configuration, which ``config`` must agree with in all that it settles itself."""
    stored = stored_config(directory.root)
    if key := configuration.differs(config, stored):
        raise ConfigError(
            f"{directory.root} was started with another {key}; resume without changing settings"
        )
    return stored


def _same_data(splits: Splits, directory: RunDirectory) -> None:
    """The data that the run began with: files and hub sets can change under a configuration."""
    sets = {part.name: part for part in (*splits.private, splits.proxy, splits.validation, splits.test)}
    digests = {name: part.digest(labels=True) for name, part in sets.items()}
    if not directory.path(DIGESTS).exists():
        directory.write_json(DIGESTS, digests)
        return
    stored = directory.read_json(DIGESTS)
    for name in {**stored, **digests}:
        if stored.get(name) != digests.get(name):
            raise RunError(f"{name} is not what {directory.root} was started with: the data have changed")


def _engine(given: Engine | None, directory: RunDirectory) -> Engine:
    """The engine that a run goes on with: the one that began it, as each keeps clients' state elsewhere."""
    engine = given or Engine()
    before = directory.read_json(ENGINE)["name"] if directory.path(ENGINE).exists() else None
    if directory.path(PROVENANCE).exists():
        return engine if before in (None, LOCAL) else Engine(OfflineTransport(), before, RetryPolicy(0, 0, 1))
    if before is None:
        directory.write_json(ENGINE, {"name": engine.name})
    elif before != engine.name:
        raise ConfigError(f"{directory.root} was started with --engine {before}; resume with the same")
    return engine


def _here(config: Config, engine: Engine | None) -> None:
    """Whether the texts are where the clients will work."""
    if isinstance(config.data.partition, RemotePartition) and (engine is None or engine.transport is None):
        raise ConfigError("data.partition remote needs clients elsewhere: --engine flower")


def _works_here(engine: Engine | None) -> bool:
    """Whether this process has the models; a coordinator of clients elsewhere, which may be small, has the
    student when it teaches it, and the command that starts it has built them all."""
    return engine is None or engine.transport is None


def prepare(config: Config) -> None:
    """The process's threads, which the numbers depend on."""
    assert config.threads is not None, "resolve settles it"
    torch.set_num_threads(config.threads)


def _method(session: Session, name: str) -> Json:
    step = layout.method(name)
    if (record := session.run.done(step)) is not None:
        return record
    return session.run.commit(step, _load(name)(session))


def _tidy(directory: RunDirectory, config: Config) -> None:
    """Weights of the baselines: their figures are in the records."""
    if config.keep_checkpoints != "all":
        for name in (layout.ALONE, layout.BASELINES):
            directory.remove(name)
    if config.keep_checkpoints == "none":
        for number in range(1, config.rounds + 1):
            directory.remove(layout.specialists(number))
            directory.remove(layout.tensors(layout.student(number)))


def _result(directory: RunDirectory) -> Json | None:
    return directory.read_json(RESULT) if directory.path(RESULT).exists() else None


def _load(name: str) -> Callable[[Session], Json]:
    """The ``run`` of a method's module."""
    method: Callable[[Session], Json] = import_module(METHODS[name].module).run
    return method
