"""``python -m bench.robustness``: every rule against every attack, on the quickstart's own data and models.

Ten clients train once for each seed. Then the first ``f`` of them are attackers: an attack replaces their
answers, the rule aggregates a teacher, and its accuracy is measured on the proxy texts whose labels the
server does not have. For a few cells a student is trained as in the quickstart's first round and evaluated on
the test set. No setting was chosen on the test set.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor

from bench import machine
from bench.heatmap import ALONE, HONEST, LYING, draw, table
from feddistill import config as configuration
from feddistill import data
from feddistill.aggregation.answers import RoundContext
from feddistill.aggregation.attacks import ATTACKS, Attack, AttackContext, LeastLikely, SecondBest, attackers
from feddistill.aggregation.rules import ASSUMED, RULES, MeanProbs, Rule
from feddistill.aggregation.rules.distance import Cronus, GeometricMedian, Krum, MultiKrum
from feddistill.aggregation.rules.means import MeanLogits, PriorCorrected
from feddistill.aggregation.rules.order import Median, TrimmedMean
from feddistill.aggregation.rules.remembered import ExpGuard
from feddistill.aggregation.teacher import aggregate, weigh
from feddistill.client.client import ClientGroup
from feddistill.config import Config
from feddistill.progress import NoProgress
from feddistill.seeds import derive
from feddistill.store.run_directory import RunDirectory
from feddistill.tasks.choose import learner_of
from feddistill.tasks.learner import Learner, examples_of, labels_of
from feddistill.tasks.session import Session
from feddistill.training import TrainingExamples
from feddistill.types import ClientDescription

SCHEMA = 1
RESULT = Path(__file__).parent / "results" / "robustness.json"
CLIENTS = 10
SEEDS = (0, 1, 2)
LIARS = (1, 2, 3, 4)
NAMES = tuple(f"client-{index}" for index in range(CLIENTS))


@dataclass(frozen=True)
class Defence:
    """A rule, optionally with nearest-neighbour mixing."""

    rule: Rule
    mix: int | None = None

    def as_dict(self) -> dict[str, Any]:
        return {**self.rule.model_dump(mode="json"), **({} if self.mix is None else {"mix": self.mix})}


# Settings of rules for the most attackers of ten that they tolerate, at most four.
SETTINGS: dict[str, Rule] = {
    "trimmed_mean": TrimmedMean(trim=3),
    "krum": Krum(byzantine=3),
    "multi_krum": MultiKrum(byzantine=3),
    "cronus": Cronus(byzantine=4),
}
RECOMMENDED = "stacked"
DEFENCES: dict[str, Defence] = {
    **{name: Defence(SETTINGS.get(name, rule())) for name, rule in RULES.items()},
    "mean_probs, class_counts": Defence(MeanProbs(weights="class_counts")),
    "mean_probs, validation": Defence(MeanProbs(weights="validation")),
    "mean_probs, confidence": Defence(MeanProbs(weights="confidence")),
    "mean_probs, verified": Defence(MeanProbs(weights="verified")),
    "mean_probs, verified_counts": Defence(MeanProbs(weights="verified_counts")),
    "mean_logits, verified": Defence(MeanLogits(weights="verified")),
    "prior_corrected, verified_counts": Defence(PriorCorrected(weights="verified_counts")),
    "median, mix 4": Defence(Median(), 4),
    "geometric_median, mix 4": Defence(GeometricMedian(), 4),
    "expguard of median": Defence(ExpGuard(base=Median())),
}
MIXED = (SecondBest(clients=2), LeastLikely(clients=2))
# Defences whose students are trained: the default, the quickstart's rule, and those that verify.
STUDENTS = {
    "mean_probs": (HONEST, LYING),
    "mean_probs, class_counts": (LYING,),
    "mean_probs, verified": (LYING,),
    "prior_corrected, verified_counts": (HONEST, ALONE, LYING),
    RECOMMENDED: (HONEST, ALONE, LYING),
}


@dataclass(frozen=True)
class World:
    """The trained clients of one seed."""

    session: Session
    answers: tuple[Tensor, ...]
    truth: Tensor
    """Labels of all proxy texts, ``[N]``; the server has a few of them."""
    labels: Tensor
    descriptions: tuple[ClientDescription, ...]


def settings(seed: int) -> Config:
    """The quickstart with ten clients and one round."""
    overrides = (f"data.partition.clients={CLIENTS}", "rounds=1", "threads=1", f"seed={seed}")
    return configuration.load(None, (*overrides, "precision=bf16", "baselines=[]"))


def world(seed: int, folder: Path, answers: Path | None) -> World:
    """Train ten honest clients and store their answers in ``answers``, or read them from there."""
    config = settings(seed)
    splits = data.load(config.data, seed)
    open_labels = config.data.proxy.model_copy(update={"labelled": len(splits.proxy)})
    truth = data.load(config.data.model_copy(update={"proxy": open_labels}), seed).proxy
    assert truth.ids == splits.proxy.ids, "the same texts"
    run = RunDirectory.create(folder, configuration.dump(config))
    session = Session(config, splits, run, NoProgress())
    stored = None if answers is None else answers / f"clients-{seed}.npz"
    if stored is not None and stored.exists():
        said = [torch.from_numpy(a) for a in np.load(stored)["answers"]]
    else:
        said = []
        for client in ClientGroup(session).clients:
            learner = client.learner
            learner.reset()
            examples = examples_of(learner, client.private)
            name = f"alone/001/{client.name}"
            learner.fit(examples, config.clients.training, seed=derive(seed, name))
            said.append(learner.answer(splits.proxy))
        if stored is not None:
            stored.parent.mkdir(parents=True, exist_ok=True)
            np.savez(stored, answers=torch.stack(said).numpy())
    descriptions = tuple(
        ClientDescription(p.name, len(p), tuple(float(n) for n in p.label_counts())) for p in splits.private
    )
    labels = torch.from_numpy(splits.proxy.labels)
    return World(session, tuple(said), torch.from_numpy(truth.labels), labels, descriptions)


def attacked(found: World, attacks: Sequence[Attack], seed: int) -> list[Tensor]:
    """All clients' answers, the attackers' after the attack."""
    lying = attackers(attacks, NAMES)
    honest = [a for a, name in zip(found.answers, NAMES, strict=True) if name not in lying]
    return [
        lying[name](AttackContext(own, honest, derive(seed, "attack", name), CLIENTS))
        if name in lying
        else own
        for own, name in zip(found.answers, NAMES, strict=True)
    ]


def teacher(found: World, defence: Defence, answers: Sequence[Tensor], present: Sequence[int]) -> Tensor:
    """Aggregate the answers of the clients ``present``, with the quickstart's sharpening."""
    read = [_reader(answers[index]) for index in present]
    known = RoundContext(
        names=tuple(NAMES[index] for index in present),
        descriptions=tuple(found.descriptions[index] for index in present),
        labels=found.labels,
    )
    rows = len(found.truth)
    weights = weigh(defence.rule.weighting(), read, rows, known)
    made = aggregate(
        read,
        rows,
        defence.rule,
        weights,
        sharpen=found.session.config.aggregation.sharpen,
        mix=defence.mix,
        context=known,
    )
    assert isinstance(made.teacher, Tensor)
    return made.teacher


def _reader(answers: Tensor) -> Callable[[int, int], Tensor]:
    return lambda start, stop: answers[start:stop]


def accuracy(found: World, log_probs: Tensor) -> float:
    """Teacher's accuracy on the proxy texts whose labels the server does not have."""
    hidden = found.labels < 0
    return round(float((log_probs.argmax(-1) == found.truth)[hidden].float().mean()), 4)


def student_accuracy(found: World, learner: Learner, log_probs: Tensor) -> float:
    """Student's accuracy on the test set after the quickstart's first round."""
    config, proxy = found.session.config, found.session.splits.proxy
    learner.reset()
    learner.fit(
        TrainingExamples(learner.tokens(proxy), labels_of(proxy), log_probs),
        config.student.training,
        seed=derive(config.seed, "rounds/001/student"),
        distill=config.distill,
    )
    test = found.session.splits.test
    return round(float((learner.answer(test).argmax(-1).numpy() == test.labels).mean()), 4)


def cases() -> Iterator[tuple[str, int, tuple[Attack, ...]]]:
    """Name, number of attackers, attacks."""
    yield HONEST, 0, ()
    for name, attack in ATTACKS.items():
        for count in LIARS:
            yield name, count, (attack(clients=count),)
    yield LYING, 4, MIXED


def measure(seeds: Sequence[int], answers: Path | None, students: bool) -> dict[str, Any]:
    """Measure all cells."""
    teachers: dict[str, dict[str, dict[str, list[float]]]] = {}
    trained: dict[str, dict[str, list[float]]] = {}
    seconds = []
    everyone, honest = range(CLIENTS), range(4, CLIENTS)
    for seed in seeds:
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            found = world(seed, Path(folder) / "run", answers)
            seconds.append({"clients": round(time.perf_counter() - start)})
            for name, count, attacks in cases():
                said = attacked(found, attacks, seed)
                cell = teachers.setdefault(name, {}).setdefault(str(count), {})
                for key, defence in DEFENCES.items():
                    made = teacher(found, defence, said, everyone)
                    cell.setdefault(key, []).append(accuracy(found, made))
            alone = teachers.setdefault(ALONE, {}).setdefault("0", {})
            for key in STUDENTS:
                made = teacher(found, DEFENCES[key], found.answers, honest)
                alone.setdefault(key, []).append(accuracy(found, made))
            click.echo(f"seed {seed}: teachers after {time.perf_counter() - start:.0f} s")
            if students:
                learner = learner_of(found.session, found.session.config.student.model, "student.model")
                lies = attacked(found, MIXED, seed)
                worlds = {
                    HONEST: (found.answers, everyone),
                    ALONE: (found.answers, honest),
                    LYING: (lies, everyone),
                }
                for key, name in ((key, name) for key, names in STUDENTS.items() for name in names):
                    made = teacher(found, DEFENCES[key], *worlds[name])
                    figure = student_accuracy(found, learner, made)
                    trained.setdefault(key, {}).setdefault(name, []).append(figure)
                    took = time.perf_counter() - start
                    click.echo(f"seed {seed}: {key}: {name}: student {figure} after {took:.0f} s")
            seconds[-1]["all"] = round(time.perf_counter() - start)
            found.session.run.close()
    return {
        "schema": SCHEMA,
        "assumed": ASSUMED,
        **machine.describe("cpu"),
        "seeds": list(seeds),
        "seconds": seconds,
        "clients": CLIENTS,
        "rules": {key: defence.as_dict() for key, defence in DEFENCES.items()},
        "recommended": RECOMMENDED,
        "teacher_accuracy": teachers,
        "student_accuracy": trained,
    }


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), default=RESULT, show_default=True)
@click.option("--seed", "seeds", type=int, multiple=True, default=SEEDS, show_default=True)
@click.option(
    "--answers",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder to store the clients' answers in, and to reuse them from.",
)
@click.option("--students/--no-students", default=True, help="Also train the students.")
@click.option("--redraw", is_flag=True, help="Measure nothing; plot the result file --out.")
def main(out: Path, seeds: tuple[int, ...], answers: Path | None, students: bool, redraw: bool) -> None:
    """Measure rules against attacks on the quickstart's data; write a result file, a heat map and a table."""
    if not redraw:
        torch.set_num_threads(1)  # the answers, and so the table, depend on it
        out.write_text(json.dumps(measure(seeds, answers, students), indent=1) + "\n", encoding="utf-8")
    found = json.loads(out.read_text(encoding="utf-8"))
    click.echo(draw(found, out))
    click.echo(table(found))


if __name__ == "__main__":
    main(prog_name="python -m bench.robustness")
