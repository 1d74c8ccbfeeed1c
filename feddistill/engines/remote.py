"""A client in its own process, which may be restarted for each instruction: all its state is on disk."""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from feddistill import config as configuration
from feddistill import data
from feddistill.client.client import Client, ClientGroup
from feddistill.client.handler import Handler, receive
from feddistill.config import Config, institution
from feddistill.config.data import RemotePartition
from feddistill.config.tasks import TASKS
from feddistill.errors import ConfigError, DataError, RunError
from feddistill.federation.protocol import Instruction, Reply
from feddistill.payload import keys
from feddistill.payload.keys import PrivateKey
from feddistill.progress import NoProgress
from feddistill.runs import experiment
from feddistill.store import recipe
from feddistill.store.layout import CONFIG, INPUTS, PROXY
from feddistill.store.run_directory import RunDirectory
from feddistill.tasks import conversations
from feddistill.tasks.session import Session
from feddistill.types import UNLABELLED, Splits, TextSet

EXECUTION = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True, slots=True)
class RemoteClient:
    """One institution."""

    name: str
    state: Path
    """Its own folder, which holds everything that a later instruction needs."""
    file: Path | None = None
    """Its ``Institution`` file; ``None`` in a simulation, where each process selects its own texts."""
    simulated: bool = False
    """True if server and client belong to one user: only then may the server's settings name code to call
    or an address to query."""

    def handle(self, instruction: Instruction) -> Reply:
        """Carry out an instruction.

        Raises:
            FeddistillError: It cannot.
        """
        config = configuration.parse_stored(instruction.content["config"])
        if configuration.digest(config)[:16] != instruction.run:
            raise ConfigError(f"run {instruction.run} is not that of the settings that came with it")
        run = self._directory(config, instruction.run, str(instruction.content["execution"]))
        try:
            if instruction.kind == "publish":
                receive(run, PROXY, instruction)
                return Reply(self.name)
            experiment.prepare(config)
            splits = self._splits(config, tuple(instruction.content["labels"]), run)
            if splits is None:
                return Reply(self.name, {"proxy": None})
            own = self._with_own_model(config)
            self._unchanged(run, splits, own)
            session = Session(own, splits, run, NoProgress())
            return Handler(self._client(session)).handle(instruction)
        finally:
            run.close()

    def _directory(self, config: Config, run: str, execution: str) -> RunDirectory:
        """The client's folder for this execution of the run, not shared with a run of the same settings."""
        if not EXECUTION.fullmatch(execution):
            raise ConfigError(f"execution {execution[:80]!a} of run {run} is not 16 hexadecimal digits")
        folder = self.state / self.name / f"{run}-{execution}"
        if (folder / CONFIG).exists():
            directory = RunDirectory.open(folder)
            try:
                recipe.check(directory)
            except RunError:
                directory.close()
                raise
            return directory
        directory = RunDirectory.create(folder, configuration.dump(config))
        recipe.write(directory, configuration.as_stored(config))
        return directory

    def _splits(self, config: Config, labels: tuple[str, ...], run: RunDirectory) -> Splits | None:
        """The texts that this client may read; ``None`` if the proxy texts have not been sent yet."""
        if not isinstance(config.data.partition, RemotePartition):
            whole = conversations.of_splits(config, data.load(config.data, config.seed, config.task))
            places = [place for place, own in enumerate(whole.private) if own.name == self.name]
            if not places:
                raise ConfigError(f"{self.name} is no client of this run")
            (at,) = places
            own = (whole.private[at],)
            return Splits(own, whole.proxy, whole.validation, whole.test, (whole.places[at],))
        if self.file is None:
            raise ConfigError(f"{self.name} has no file that says where its texts are")
        if self.name not in config.data.partition.names:
            raise ConfigError(f"{self.name} is no client of this run")
        private = data.labelled(institution.load(self.file).source, labels, self.name, config.task)
        private = conversations.of_texts(config, private)
        if not len(private):
            raise DataError(f"{self.name} has no private examples")
        if not run.path(PROXY).exists():
            return None
        place = config.data.partition.names.index(self.name)
        nothing = _texts("data.validation", [], labels)
        proxy = self._proxy(run, labels)
        if TASKS[config.task].labels == "class":
            data.check_pairs({self.name: private.starts, proxy.name: proxy.starts})
        return Splits((private,), proxy, nothing, nothing, (place,))

    def _proxy(self, run: RunDirectory, labels: tuple[str, ...]) -> TextSet:
        try:
            rows = [json.loads(line) for line in run.read_bytes(PROXY).splitlines()]
            texts = _texts("data.proxy", [(str(row["id"]), str(row["text"])) for row in rows], labels)
            if any("start" in row for row in rows):
                texts = replace(texts, starts=tuple(int(row["start"]) for row in rows))
            if any("turns" in row for row in rows):
                turns = tuple(tuple((int(a), int(b)) for a, b in row["turns"]) for row in rows)
                texts = replace(texts, turns=turns)
            return texts
        except (ValueError, TypeError, KeyError) as error:
            raise RunError(f"{run.path(PROXY)} is damaged: {error}") from None

    def _with_own_model(self, config: Config) -> Config:
        own = None if self.file is None else institution.load(self.file).model
        if own is None:
            if not self.simulated and any(model.query_only for model in config.clients.models):
                raise ConfigError(
                    f"{self.name}: a model of kind callable or endpoint is named by the institution's own "
                    "file (model:), not by the server"
                )
            return config
        changed = config.model_copy(update={"clients": config.clients.model_copy(update={"models": (own,)})})
        try:
            return configuration.parse(changed.model_dump(mode="json"))
        except ConfigError as error:
            raise ConfigError(f"{self.file}: as clients.models.0 of this run: {error}") from None

    def _unchanged(self, run: RunDirectory, splits: Splits, config: Config) -> None:
        """Check that texts and model are those that the run started with."""
        models = json.dumps([model.model_dump(mode="json") for model in config.clients.models])
        now = {"texts": splits.private[0].digest(labels=True), "models": models}
        if not run.path(INPUTS).exists():
            run.write_json(INPUTS, now)
        before = run.read_json(INPUTS)
        changed = " and ".join(what for what in now if before.get(what) != now[what])
        if changed:
            raise RunError(f"{self.name}: its {changed} have changed since this run began; start a new one")

    def _client(self, session: Session) -> Client:
        (client,) = ClientGroup(session).clients
        client.key = self._key(session.config)
        return client

    def _key(self, config: Config) -> PrivateKey | None:
        """The client's signing key, if the run has enrolled keys."""
        enrolled = getattr(config.data.partition, "keys", {}).get(self.name)
        if enrolled is None:
            return None
        path = None if self.file is None else institution.load(self.file).key
        if path is None:
            raise ConfigError(f"{self.file}: key is missing; the server enrolled {enrolled} for {self.name}")
        key = keys.load(path)
        if key.public != enrolled:
            raise ConfigError(f"{path} is key {key.public}; the server enrolled {enrolled} for {self.name}")
        return key


def _texts(name: str, rows: list[tuple[str, str]], labels: tuple[str, ...]) -> TextSet:
    return TextSet(
        name,
        tuple(i for i, _ in rows),
        tuple(text for _, text in rows),
        np.full(len(rows), UNLABELLED, np.int64),
        labels,
    )
