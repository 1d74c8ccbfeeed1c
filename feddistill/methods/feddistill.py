"""The method: clients answer public texts, the server makes one teacher, a student learns from it.

Round after round: (1) every client trains its specialist, from the second round on also on the last
teacher's answers; (2) it answers the proxy texts and uploads a payload; (3) the server admits, aggregates,
(4) trains the student and sends the teacher back. Nothing else leaves a client.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from statistics import fmean

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from feddistill import aggregation, models, payload
from feddistill.accounting import measure
from feddistill.attacks import Sight, liars
from feddistill.config import digest
from feddistill.errors import PayloadError, RoundError
from feddistill.methods import wire
from feddistill.methods.client import Crew
from feddistill.methods.learner import Learner, Session, best_of, labels_of, later
from feddistill.rules import Memory
from feddistill.seeds import derive
from feddistill.store import Json
from feddistill.training import Lessons
from feddistill.types import RoundSpec, TextSet


def run(session: Session) -> Json:
    """All rounds; the student that is best on validation is the result."""
    rounds = _Rounds(session)
    records = [rounds.run(number) for number in range(1, session.config.rounds + 1)]
    return {
        "rounds": records,
        "description_bytes": sum(len(payload.canonical(d)) for d in rounds.descriptions),
        "student_bytes": 4 * models.trained_count(rounds.student.model),
    }


class _Rounds:
    """The server and its clients in one process, one client at a time."""

    def __init__(self, session: Session):
        self.session = session
        self.splits = session.splits
        self.run_id = _run_id(session)
        self.crew = Crew(session)
        self.descriptions = [client.describe() for client in self.crew.clients]
        self.liars = liars(session.config.simulate.attack, [client.name for client in self.crew.clients])
        self.memory: Memory = {}
        """What the rule remembers of former rounds."""
        self._student: Learner | None = None
        self.best: Json | None = None
        self.last: Json | None = None

    @property
    def student(self) -> Learner:
        """Built when first needed: a run that is resumed at its end builds nothing."""
        if self._student is None:
            self._student = Learner(self.session, self.session.config.student.model, "student.model")
        return self._student

    def run(self, number: int) -> Json:
        """Round ``number``, or what is still to do of it."""
        run, step = self.session.run, f"rounds/{number:03d}"
        record = run.done(step, verify=False)
        if record is None:
            record = self._round(number, step)
            run.commit(step, record)
        self.memory = record["teacher"]["memory"]
        self.last = record["student"]
        self.best = best_of(self.best, record["student"])
        self._tidy(number)
        return record

    def _round(self, number: int, step: str) -> Json:
        spec = self._spec(number)
        request = payload.canonical(spec)
        self.session.run.write_bytes(f"{step}/spec.json", request)
        specialists: Json = {}
        uploads: Json = {}
        admitted: dict[str, payload.Answers] = {}
        refused: Json = {}
        seen: set[tuple[str, int]] = set()
        before = self._spec(number - 1) if number > 1 else None
        # Liars last: they see what the others say.
        for client in sorted(self.crew.clients, key=lambda client: client.name in self.liars):
            specialists[client.name] = client.train(number, before)
            lie = self._lie(client.name, admitted, number) if client.name in self.liars else None
            upload = uploads[client.name] = client.answer(spec, specialists[client.name]["weights"], lie)
            try:
                admitted[client.name] = payload.admit(
                    self.session.run.read_bytes(upload["envelope"]),
                    self.session.run.read_bytes(upload["payload"]),
                    spec,
                    seen,
                )
            except PayloadError as error:  # the round goes on without this client
                refused[client.name] = str(error)
            else:
                seen.add((client.name, number))
        if len(admitted) < spec.quorum:
            reasons = "; ".join(refused.values())
            raise RoundError(
                f"round {number}: {len(admitted)} valid answers, quorum {spec.quorum}: {reasons}"
            )
        admitted = {name: admitted[name] for name in spec.clients if name in admitted}
        teacher = self._aggregate(admitted, number, spec, step)
        student = self._distil(teacher["log_probs"], number, step)
        downlink = len(request) + (teacher["feedback_bytes"] if number < self.session.config.rounds else 0)
        clients, own = _mean_accuracy(specialists), student["validation"]["accuracy"]
        self.session.show.say(
            f"round {number}: accuracy on validation: clients {clients:.3f}, student {own:.3f}"
        )
        return {
            "round": number,
            "specialists": specialists,
            "uploads": uploads,
            "refused": refused,
            "teacher": teacher,
            "student": student,
            "bytes": {
                "uplink": {name: upload["bytes"] for name, upload in uploads.items()},
                "downlink": dict.fromkeys(uploads, downlink),
            },
        }

    def _spec(self, number: int) -> RoundSpec:
        config, splits, settings = self.session.config, self.splits, self.session.config.payload
        classes = len(splits.label_names)
        k = {"dense": classes, "sampled": min(settings.draws, classes)}.get(settings.codec, settings.k)
        return RoundSpec(
            run_id=self.run_id,
            round=number,
            proxy_digest=splits.proxy.digest(),
            positions=len(splits.proxy),
            vocab_size=classes,
            vocab_fingerprint=payload.fingerprint(splits.label_names),
            codec=settings.codec,
            k=k,
            nonce=f"{derive(config.seed, self.run_id, 'nonce', number):08x}",
            quorum=config.aggregation.quorum or len(splits.private),
            clients=tuple(private.name for private in splits.private),
            compression=settings.compression,
            max_code=payload.max_code_of(settings.epsilon) if settings.codec == "threshold" else 255,
            draws=settings.draws if settings.codec == "sampled" else 0,
        )

    def _lie(
        self, name: str, admitted: Mapping[str, payload.Answers], number: int
    ) -> Callable[[Tensor], Tensor]:
        """What the simulated attacker ``name`` makes of its own answers, knowing all honest ones."""
        run, positions, attack = self.session.run, len(self.splits.proxy), self.liars[name]
        honest = [
            wire.expand(admitted[client.name], 0, positions)
            for client in self.crew.clients
            if client.name not in self.liars and client.name in admitted
        ]
        if not honest:
            raise RoundError(f"round {number}: no honest client was admitted, so {name} has nothing to see")
        before = teacher = None
        if number > 1:
            stored, first = f"rounds/001/payloads/{name}", self._spec(1)
            sent = payload.admit(
                run.read_bytes(f"{stored}.json"), run.read_bytes(f"{stored}.safetensors"), first, frozenset()
            )
            before = wire.expand(sent, 0, positions)
            teacher = load_file(run.path(f"rounds/{number - 1:03d}/teacher.safetensors"))["log_probs"]
        seed = derive(self.session.config.seed, "attack", number, name)
        clients = len(self.crew.clients)
        return lambda own: attack(Sight(own, honest, seed, clients, before, teacher))

    def _aggregate(
        self, admitted: Mapping[str, payload.Answers], number: int, spec: RoundSpec, step: str
    ) -> Json:
        """(3) The teacher, for the student as it is and for the clients as a payload."""
        run, name = self.session.run, f"{step}/teacher"
        if (record := run.done(name)) is not None:
            return record
        config = self.session.config.aggregation
        read = wire.codes if config.rule.of_codes else wire.expand
        answerers = [partial(read, answers) for answers in admitted.values()]
        labels = torch.from_numpy(self.splits.proxy.labels)
        # Of those who are in: where the only client that knows a class was refused, the others speak for it.
        known = aggregation.Known(
            names=tuple(admitted),
            descriptions=tuple(d for d in self.descriptions if d.client in admitted),
            labels=labels,
            domains=_domains(self.splits.proxy),
            memory=self.memory,
        )
        with self.session.show.step(f"round {number}: aggregate"), measure() as cost:
            weights = aggregation.weigh(config.rule.weighting(), answerers, spec.positions, known)
            made = aggregation.aggregate(
                answerers,
                spec.positions,
                config.rule,
                weights,
                sharpen=config.sharpen,
                mix=config.mix,
                known=known,
            )
            teacher = made.teacher
            assert isinstance(teacher, torch.Tensor), "these answers are dense"
            diagnostics = aggregation.diagnose(
                list(admitted), answerers, teacher, labels, made.mass, made.weights
            )
        run.write_bytes(f"{name}.safetensors", save({"log_probs": teacher}))
        back = wire.feedback_spec(spec)
        seed = derive(self.session.config.seed, "draws", number, wire.SERVER)
        feedback = payload.encode(wire.compress(teacher, back, seed), back, wire.SERVER)
        envelope = payload.seal(feedback, back, wire.SERVER)
        run.write_bytes(f"{step}/feedback.safetensors", feedback)
        run.write_bytes(f"{step}/feedback.json", envelope)
        codistil = self.session.config.clients.codistillation.enabled
        content: Json = {
            "log_probs": f"{name}.safetensors",
            "feedback_bytes": (len(feedback) + len(envelope)) if codistil else 0,
            "diagnostics": asdict(diagnostics),
            "memory": made.memory,
            "cost": asdict(cost.cost),
        }
        return run.commit(
            name, content, [content["log_probs"], f"{step}/feedback.safetensors", f"{step}/feedback.json"]
        )

    def _distil(self, teacher_file: str, number: int, step: str) -> Json:
        """(4) The student on the teacher's answers and the labels that the server has."""
        config = self.session.config
        settings = config.student.training
        if number > 1:
            settings = later(settings, None, config.student.later_head_learning_rate)
        start = self.last if config.distill.accept == "always" else self.best
        proxy = self.splits.proxy

        def lessons() -> Lessons:
            teacher = load_file(self.session.run.path(teacher_file))["log_probs"]
            return Lessons(self.student.tokens(proxy), labels_of(proxy), teacher)

        return self.student.step(
            f"{step}/student",
            f"round {number}: the student learns",
            start["weights"] if start else None,
            lessons,
            settings,
            distill=config.distill,
        )

    def _tidy(self, number: int) -> None:
        """Keep the newest specialists and the best student; everything else is one training away."""
        if self.session.config.keep_checkpoints == "all":
            return
        run, keep = self.session.run, {record["weights"] for record in (self.best, self.last) if record}
        for earlier in range(1, number):
            if earlier > 1:
                run.remove(f"rounds/{earlier:03d}/specialists")
            student = f"rounds/{earlier:03d}/student.safetensors"
            if student not in keep:
                run.remove(student)


def _domains(proxy: TextSet) -> Tensor | None:
    """Where each text is from, as small integers; ``None`` where that is not known."""
    if proxy.sources is None:
        return None
    names = {name: index for index, name in enumerate(sorted(set(proxy.sources)))}
    return torch.tensor([names[name] for name in proxy.sources])


def _run_id(session: Session) -> str:
    """The same for the same settings: payloads of equal runs are equal to the byte."""
    return digest(session.config)[:16]


def _mean_accuracy(specialists: Json) -> float:
    return fmean(s["validation"]["accuracy"] for s in specialists.values())
