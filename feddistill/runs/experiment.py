"""Execution of a run, from its configuration to its result."""

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
from feddistill.config.tasks import TASKS
from feddistill.errors import ConfigError, RunError
from feddistill.federation.protocol import OfflineTransport, RetryPolicy
from feddistill.progress import NoProgress, Progress
from feddistill.runs import results
from feddistill.runs.forecast import Forecast
from feddistill.server import rounds
from feddistill.store import layout, recipe
from feddistill.store.layout import CONFIG, DIGESTS, ENGINE, PROVENANCE, RESULT, SKEW
from feddistill.store.run_directory import Json, RunDirectory
from feddistill.tasks import conversations
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
    """Run ``config`` in the directory ``out``; returns the content of ``result.json``.

    Args:
        config: The configuration; it determines the result.
        out: A new or empty directory; with ``resume``, the directory of an interrupted run.
        resume: Continue after the last complete step. The result of a complete run is returned unchanged.
        progress: Where progress is shown; nowhere by default.
        engine: Execution engine of the federation; by default all clients run in this process.
        shared: Folder of the step cache shared by several runs.

    Raises:
        FeddistillError: An error that the user can fix; the run can be resumed afterwards.
    """
    progress = progress or NoProgress()
    start, started = time.perf_counter(), time.monotonic()
    if resume:
        directory = RunDirectory.open(out)
    else:  # check the settings before writing anything
        RunDirectory.check_free(out)
        config = resolve(config)
        _here(config, engine)
        prepare(config)
        splits = check(config, progress, build=_works_here(engine))
        directory = RunDirectory.create(out, configuration.dump(config))
        recipe.write(directory, configuration.as_stored(config))
    try:
        if resume:
            recipe.check(directory)
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
        forecast = Forecast(progress, started)
        session = Session(config, splits, directory, forecast, engine, LocalTransport, common)
        if engine.transport is None and not isinstance(progress, NoProgress):
            with progress.step("foretell the operations"):
                forecast.expect(session)
        found = {name: _method(session, name) for name in ("feddistill", *config.baselines)}
        _tidy(directory, config)
        result = results.summarise(config, splits, skew.non_iid, found, environment(config), recipe.NUMBER)
        if directory.path(PROVENANCE).exists():
            result["provenance"] = directory.read_json(PROVENANCE)
        result["seconds"]["this_process"] = round(time.perf_counter() - start, 3)
        result["peak_memory_bytes"] = max(result["peak_memory_bytes"], peak_memory_bytes())
        directory.write_json(RESULT, result)
        return directory.read_json(RESULT)
    finally:
        directory.close()


def decide(out: Path, progress: Progress | None = None) -> list[Json]:
    """Aggregate each round of the run in ``out`` without training a student (``server.rounds.decide``)."""
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
    """Read the data and, with ``build``, build every model; returns the data. Trains nothing."""
    progress = progress or NoProgress()
    transformers.utils.logging.set_verbosity_error()  # feddistill shows its own progress
    transformers.utils.logging.disable_progress_bar()
    with progress.step("read the data"):
        splits = conversations.of_splits(config, data.load(config.data, config.seed, config.task))
    with progress.step("build the models"):
        check_models(config, splits, build=build)
    return splits


def evaluate(out: Path, texts: FileSource | None = None) -> Json:
    """Metrics of a complete run's student, from the round with the best validation metric.

    Args:
        out: The run.
        texts: Labelled texts to evaluate on; ``None`` for the run's own test set.

    Raises:
        RunError: The run is not complete, or its student's weights were deleted.
        DataError: A label of ``texts`` is not among the student's labels.
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
            chosen = conversations.of_texts(config, chosen)
            if TASKS[config.task].labels == "class":
                data.check_pairs({"--texts": chosen.starts, splits.test.name: splits.test.starts})
        session = Session(config, splits, directory, NoProgress())
        learner = learner_of(session, config.student.model, "student.model")
        learner.restore(result["student_weights"])
        figures = learner.metrics(chosen)
        return {"run": str(out), "round": result["selected_round"], "examples": len(chosen), **figures}
    finally:
        directory.close()


def keeps_student(config: Config, out: Path) -> None:
    """Check that a run has stored its student's weights.

    Raises:
        RunError: Its configuration has ``keep_checkpoints: none``.
    """
    if config.keep_checkpoints == "none":
        raise RunError(f"{out} has no stored weights: it was run with keep_checkpoints: none")


def stored_config(out: Path) -> Config:
    """The resolved configuration of a stored run."""
    return configuration.load_stored(_config_file(out))


def stored_splits(config: Config, directory: RunDirectory) -> Splits:
    """Load the data of a run.

    Raises:
        RunError: The data differ from those the run was started with.
    """
    splits = conversations.of_splits(config, data.load(config.data, config.seed, config.task))
    _same_data(splits, directory)
    return splits


def environment(config: Config) -> Json:
    """Software versions and hardware on which the results may depend."""
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
    """Replace machine-dependent defaults by their values, so that the stored configuration is complete."""
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
    """The stored configuration; ``config`` must equal it in every setting that it specifies."""
    stored = stored_config(directory.root)
    if key := configuration.differs(config, stored):
        raise ConfigError(
            f"{directory.root} was started with another {key}; resume without changing settings"
        )
    return stored


def _same_data(splits: Splits, directory: RunDirectory) -> None:
    """Check that the data are unchanged since the run was started: files and hub data sets can change.

    Of a run with an older partition, and of one derived from it, the private texts are not checked: it is
    only read, and only training reads them.
    """
    sets = {part.name: part for part in (*splits.private, splits.proxy, splits.validation, splits.test)}
    digests = {name: part.digest(labels=True) for name, part in sets.items()}
    private = {part.name for part in splits.private}
    if not directory.path(DIGESTS).exists():
        directory.write_json(DIGESTS, digests)
        return
    stored = directory.read_json(DIGESTS)
    divided_otherwise = recipe.stored(directory) < recipe.DIVIDED or not private & stored.keys()
    for name in {**stored, **digests}.keys() - (private if divided_otherwise else set()):
        if stored.get(name) != digests.get(name):
            raise RunError(f"{name} is not what {directory.root} was started with: the data have changed")


def _engine(given: Engine | None, directory: RunDirectory) -> Engine:
    """The engine of a run: a resumed run needs the same one, since each stores client state elsewhere."""
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
    """Check that ``data.partition`` remote has an engine with remote clients."""
    if isinstance(config.data.partition, RemotePartition) and (engine is None or engine.transport is None):
        raise ConfigError("data.partition remote needs remote clients: --engine flower")


def _works_here(engine: Engine | None) -> bool:
    """True if this process builds all models.

    The coordinator of remote clients may run on a small machine: it builds only the student, when it trains
    it. The command that starts the coordinator has built all models.
    """
    return engine is None or engine.transport is None


def prepare(config: Config) -> None:
    """Set the number of threads of the process, on which results depend."""
    assert config.threads is not None, "resolve sets it"
    torch.set_num_threads(config.threads)


def _method(session: Session, name: str) -> Json:
    step = layout.method(name)
    if (record := session.run.done(step)) is not None:
        return record
    return session.run.commit(step, _load(name)(session))


def _tidy(directory: RunDirectory, config: Config) -> None:
    """Delete weights as ``keep_checkpoints`` requires; metrics stay in the records."""
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
    """Import a method's ``run``."""
    method: Callable[[Session], Json] = import_module(METHODS[name].module).run
    return method
