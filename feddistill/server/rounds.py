"""The server's loop over the rounds of federated distillation.

In each round (1) every client trains its specialist, from the second round on also on the last teacher;
(2) it predicts on the proxy texts and uploads a payload; (3) the server validates the payloads and aggregates
them into a teacher; (4) it trains the student and sends the teacher back. Nothing else leaves a client.
"""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from torch import nn

from feddistill import models, payload, training
from feddistill.accounting import measure
from feddistill.aggregation.answers import AnswerReader, RoundContext
from feddistill.aggregation.diagnostics import diagnose
from feddistill.aggregation.rules import Memory
from feddistill.aggregation.teacher import Aggregated, aggregate, weigh
from feddistill.config.tasks import TASKS
from feddistill.errors import ConfigError, PayloadError, RoundError
from feddistill.federation import answer_files, encoding
from feddistill.federation.answer_files import draws
from feddistill.models import adapters
from feddistill.server.clients import clients_of
from feddistill.server.request import request
from feddistill.store import layout
from feddistill.store.layout import LEDGER
from feddistill.store.logit_files import TensorFile, TopKFile
from feddistill.store.records import CostRecord, RoundRecord, StepRecord, TeacherRecord
from feddistill.store.run_directory import Json
from feddistill.tasks.choose import learner_of
from feddistill.tasks.learner import Learner, later
from feddistill.tasks.query import ProxyQuery
from feddistill.tasks.session import Session
from feddistill.types import Cost, RoundSpec


def run(session: Session) -> Json:
    """Run all rounds; the result is the student that is best on validation."""
    rounds = _Server(session)
    records = rounds.run_all()
    return {
        "rounds": records,
        "ledger": rounds.head,
        "description_bytes": sum(len(payload.canonical(d)) for d in rounds.clients.descriptions),
        "positions": session.query.positions,
        "student_bytes": 4 * models.trained_count(rounds.student.model),
        "lora_bytes": 4 * lora_count(session, rounds.student.model),
    }


def lora_count(session: Session, student: nn.Module) -> int:
    """Number of parameters that a client of the baseline ``fedlora`` uploads."""
    head = TASKS[session.config.task].new_head
    return adapters.count(student, session.config.fedlora.rank, head=head)


def run_all(session: Session) -> list[Json]:
    """Run all rounds; their records."""
    return _Server(session).run_all()


def decide(session: Session) -> list[Json]:
    """Run all rounds without a student: one teacher each, from stored or requested answers."""
    rounds = _Server(session)
    return [rounds.decide(number) for number in range(1, session.config.rounds + 1)]


class _Server:
    """State of the server over the rounds of a run: requests, teachers, the student, the ledger."""

    def __init__(self, session: Session):
        self.session = session
        self.clients = clients_of(session)
        config = session.config
        self.quorum = config.aggregation.quorum or config.clients.per_round or len(session.splits.private)
        self.memory: Memory = {}
        """State of the aggregation rule."""
        self.ledger: list[payload.Entry] = []
        published = session.run.read_json(LEDGER) if session.run.path(LEDGER).exists() else {}
        self.source_ledger: Json | None = published.get("from")
        """The ledger of the run that the answers were taken from, if this run is derived from it."""
        self.specs: dict[int, RoundSpec] = {}
        self._student: Learner | None = None
        self.best: StepRecord | None = None
        self.last: StepRecord | None = None

    @property
    def student(self) -> Learner:
        """The student, built when first needed: a run that is resumed at its end builds nothing."""
        if self._student is None:
            self._student = learner_of(self.session, self.session.config.student.model, "student.model")
        return self._student

    @property
    def head(self) -> str:
        """Head of the ledger so far."""
        return self.ledger[-1].head() if self.ledger else ""

    def run_all(self) -> list[Json]:
        """Run all rounds; their records."""
        return [self.run(number) for number in range(1, self.session.config.rounds + 1)]

    def run(self, number: int) -> Json:
        """Run round ``number``, or the rest of it."""
        run, step = self.session.run, layout.round_of(number)
        record = run.done(step, verify=False)
        if record is None:
            record = run.commit(step, self._round(number))
        else:
            self._request(number)
            self._enter(RoundRecord.from_json(record))
        self.last = RoundRecord.from_json(record).trained_student
        if self.best is None or self.session.task.better(self.last.on_validation, self.best.on_validation):
            self.best = self.last
        self._tidy(number)
        return record

    def _round(self, number: int) -> Json:
        decided = self.decide(number)
        entry = RoundRecord.from_json(decided)
        student = self._distil(number)
        request = payload.canonical(self.specs[number])
        downlink = len(request) + (entry.teacher.feedback_bytes if number < self.session.config.rounds else 0)
        task = self.session.task
        clients = _mean(entry.specialists, task.decides)
        own = StepRecord.from_json(student).on_validation[task.decides]
        others = "" if clients is None else f"clients {clients:.3f}, "
        self.session.progress.log(f"round {number}: {task.words} on validation: {others}student {own:.3f}")
        return {
            **decided,
            "student": student,
            "bytes": {
                "uplink": {name: upload.bytes for name, upload in entry.uploads.items()},
                "downlink": dict.fromkeys(entry.uploads, downlink),
            },
        }

    def decide(self, number: int) -> Json:
        """Run the part of a round before the student: clients train and answer, the teacher is aggregated."""
        spec = self._request(number)
        run = self.session.run
        specialists = self.clients.trained(spec, self.specs.get(number - 1))
        sent = self.clients.answered(spec, specialists)
        admitted: dict[str, answer_files.StoredAnswer] = {}
        files: dict[str, str] = {}
        refused: dict[str, PayloadError] = {}
        seen: set[tuple[str, int]] = set()
        for name in sent:
            stored = answer_files.StoredAnswer(run, layout.answer(number, name), spec)
            try:
                files[name] = stored.admit(seen, sender=name)
            except PayloadError as error:  # the round goes on without this client
                refused[name] = error
            else:
                admitted[name] = stored
                seen.add((name, number))
        if len(admitted) < self.quorum:
            silent = [f"{name} did not answer" for name in spec.clients if name not in sent]
            reasons = "; ".join([*map(str, refused.values()), *silent])
            raise RoundError(
                f"round {number}: {len(admitted)} valid answers, quorum {self.quorum}: {reasons}"
            )
        try:
            self.session.config.aggregation.fits(len(admitted))
        except ConfigError as error:
            raise RoundError(f"round {number}: {len(admitted)} valid answers: {error}") from None
        stored_teacher = self._aggregate(admitted, number, spec)
        teacher = TeacherRecord.from_json(stored_teacher)
        entry = payload.Entry(
            round=number,
            previous=self.head,
            request=payload.digest(payload.canonical(spec)),
            payloads=files,
            refused={name: type(error).__name__ for name, error in refused.items()},
            teacher=run.digest(teacher.log_probs),
            feedback=teacher.feedback,
        )
        decided: Json = {
            "round": number,
            "specialists": specialists,
            "uploads": sent,
            "refused": {name: str(error) for name, error in refused.items()},
            "missing": [name for name in spec.clients if name not in sent],
            "teacher": stored_teacher,
            "ledger": asdict(entry),
        }
        self._enter(RoundRecord.from_json(decided))
        return decided

    def _enter(self, decided: RoundRecord) -> None:
        """Publish the round in the ledger and keep the state that the next round needs."""
        self.memory = dict(decided.teacher.memory)
        self.ledger.append(payload.Entry(**decided.ledger))
        entries = [asdict(entry) for entry in self.ledger]
        other = {} if self.source_ledger is None else {"from": self.source_ledger}
        self.session.run.write_json(LEDGER, {"head": self.head, "rounds": entries, **other})

    def _request(self, number: int) -> RoundSpec:
        """The request of a round; the stored one if it was sent before this process started."""
        run, name = self.session.run, layout.request(number)
        if run.path(name).exists():
            spec = payload.parse_spec(run.read_bytes(name))
        else:
            spec = request(self.session, number, quorum=self.quorum, previous=self.head)
            run.write_bytes(name, payload.canonical(spec))
        self.specs[number] = spec
        return spec

    def _aggregate(
        self, admitted: Mapping[str, answer_files.StoredAnswer], number: int, spec: RoundSpec
    ) -> Json:
        """(3) Aggregate the teacher, and encode it for the clients."""
        run, name = self.session.run, layout.teacher(number)
        if (record := run.done(name)) is not None:
            return record
        config = self.session.config.aggregation
        question, stored_answers = self.session.query, admitted.values()
        answerers: list[AnswerReader]
        if question.compressed:
            answerers = [answer_files.answer_reader(encoding.topk, stored) for stored in stored_answers]
        else:
            read = encoding.codes if config.rule.of_codes else encoding.expand
            answerers = [answer_files.answer_reader(read, stored) for stored in stored_answers]
        labels = question.labels
        student, requests = self._student_answers(spec)
        # Admitted clients only: if the only client that knows a class was refused, the others decide it.
        known = RoundContext(
            names=tuple(admitted),
            descriptions=tuple(d for d in self.clients.descriptions if d.client in admitted),
            labels=labels,
            domains=question.domains,
            student=student,
            memory=self.memory,
        )
        with self.session.progress.step(f"round {number}: aggregate"), measure() as cost:
            weights = weigh(config.rule.weighting(), answerers, spec.positions, known)
            made: list[Aggregated] = []

            def make(path: Path) -> None:
                file = _new_teacher(path, question, spec)
                made.append(
                    aggregate(
                        answerers,
                        spec.positions,
                        config.rule,
                        weights,
                        sharpen=config.sharpen,
                        mix=config.nnm_byzantine,
                        context=known,
                        k=spec.k,
                        sink=file.put,
                    )
                )

            kind = TopKFile if question.compressed else TensorFile
            teacher = kind.open(run.write(layout.tensors(name), make))
            mass, shares, memory = made[0].mass, made[0].weights, made[0].memory
            diagnostics = diagnose(list(admitted), answerers, teacher, labels, mass, shares)
        feedback, sent = self._feedback(teacher, spec, layout.feedback(number))
        codistil = self.session.config.clients.codistillation.enabled
        file = layout.tensors(name)
        content: Json = {
            "log_probs": file,
            "feedback": feedback,
            "feedback_bytes": sum(run.path(file).stat().st_size for file in sent) if codistil else 0,
            "diagnostics": asdict(diagnostics),
            "memory": memory,
            "cost": asdict(cost.cost + requests),
        }
        return run.commit(name, content, [file, *sent])

    def _student_answers(self, spec: RoundSpec) -> tuple[AnswerReader | None, Cost]:
        """The student's answers before this round, if the rule needs them, and their cost.

        There are none in the first round, nor if teachers are made without a student.
        """
        if "student" not in self.session.config.aggregation.rule.needs() or spec.round == 1:
            return None, Cost()
        run, name, back = self.session.run, layout.student_answers(spec.round), encoding.feedback_spec(spec)
        if (record := run.done(name)) is None:
            if (start := self._start()) is None:
                return None, Cost()
            self.student.restore(start.file)
            before = self.student.meter.flops
            with (
                self.session.progress.step(f"round {spec.round}: the student answers") as on_step,
                measure() as cost,
            ):
                for shard in range(payload.shards(back)):
                    seed = draws(self.session.config.seed, spec.round, encoding.SERVER, shard)
                    said = self.student.compressed(back, seed, *payload.rows_of(back, shard), on_step)
                    self._keep(name, back, shard, said)
                cost.flops = self.student.meter.flops - before
            record = run.commit(name, {"cost": asdict(cost.cost)}, answer_files.flat(name, back))
        stored = answer_files.StoredAnswer(run, name, back)
        stored.admit(sender=encoding.SERVER)
        if self.session.query.compressed:
            return answer_files.answer_reader(encoding.topk, stored), CostRecord.from_json(record).cost
        return answer_files.answer_reader(encoding.expand, stored), CostRecord.from_json(record).cost

    def _keep(self, name: str, back: RoundSpec, shard: int, answers: payload.Answers) -> bytes:
        """Write answers of the server in the format of a client's; returns the payload."""
        envelope, content = answer_files.files(name, back)[shard]
        encoded = payload.encode(answers, back, encoding.SERVER, shard)
        self.session.run.write_bytes(content, encoded)
        self.session.run.write_bytes(envelope, payload.seal(encoded, back, encoding.SERVER, shard))
        return encoded

    def _start(self) -> StepRecord | None:
        """The student that training continues from; ``None`` in the first round."""
        return self.best if self.session.config.distill.rollback else self.last

    def _feedback(self, teacher: TensorFile | TopKFile, spec: RoundSpec, step: str) -> tuple[str, list[str]]:
        """Encode the teacher for the clients; the digest for the ledger, and the files."""
        back, digests = encoding.feedback_spec(spec), []
        for shard in range(payload.shards(back)):
            seed = draws(self.session.config.seed, spec.round, encoding.SERVER, shard)
            answers = encoding.compress_rows(teacher, *payload.rows_of(back, shard), back, seed)
            digests.append(payload.digest(self._keep(step, back, shard, answers)))
        return payload.digest_of(digests), answer_files.flat(step, back)

    def _distil(self, number: int) -> Json:
        """(4) Train the student on the teachers and the labels that the server has."""
        config = self.session.config
        first = max(1, number - config.distill.teacher_history)
        teachers = [layout.tensors(layout.teacher(n)) for n in range(number, first - 1, -1)]
        settings = config.student.training
        if number > 1:
            settings = later(settings, None, config.student.later_head_learning_rate)
        start = self._start()
        return self.student.step(
            layout.student(number),
            f"round {number}: the student learns",
            start.file if start else None,
            lambda: self.student.teacher_examples(*teachers),
            settings,
            steps=training.steps_of(settings, self.student.proxy_examples()),
            distill=config.distill,
        )

    def _tidy(self, number: int) -> None:
        """Delete all weights but the newest specialists and the best and last student."""
        if self.session.config.keep_checkpoints == "all":
            return
        run, keep = self.session.run, {record.weights for record in (self.best, self.last) if record}
        self.clients.tidy(number)
        for earlier in range(1, number):
            student = layout.tensors(layout.student(earlier))
            if student not in keep:
                run.remove(student)


def _new_teacher(path: Path, question: ProxyQuery, spec: RoundSpec) -> TensorFile | TopKFile:
    if question.compressed:
        return TopKFile.create(path, spec.positions, spec.k, spec.vocab_size)
    return TensorFile.create(path, (spec.positions, spec.vocab_size))


def _mean(specialists: Mapping[str, StepRecord], metric: str) -> float | None:
    values = [step.validation[metric] for step in specialists.values() if step.validation is not None]
    return fmean(values) if values else None
