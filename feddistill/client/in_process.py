"""The embedded engine: all clients in this process, one at a time, in the server's own run directory."""

from collections.abc import Callable, Iterator, Sequence

from safetensors.torch import load_file
from torch import Tensor

from feddistill import payload
from feddistill.aggregation.attacks import AttackContext, attackers
from feddistill.client.client import ClientGroup
from feddistill.client.handler import Handler
from feddistill.errors import PayloadError, RoundError
from feddistill.federation import answer_files, encoding
from feddistill.federation.protocol import Instruction, Reply
from feddistill.seeds import derive
from feddistill.store import layout
from feddistill.tasks.session import Session


class LocalTransport:
    """Clients that are objects. What goes wrong at one of them is an exception here."""

    shares_run = True

    def __init__(self, session: Session):
        self.session = session
        self.group = ClientGroup(session)
        self.attackers = attackers(
            session.config.simulate.attack, [client.name for client in self.group.clients]
        )

    def clients(self, wanted: Sequence[str], wait: float) -> Sequence[str]:
        """See ``Transport``."""
        return wanted

    def ask(self, instruction: Instruction, clients: Sequence[str], timeout: float) -> Iterator[Reply]:
        """See ``Transport``; ``timeout`` is not looked at."""
        # Liars last: they see what the others say.
        for client in sorted(self.group.clients, key=lambda client: client.name in self.attackers):
            if client.name in clients:
                attack = None if client.name not in self.attackers else self._attacker(client.name)
                yield Handler(client, attack=attack, alone=False).handle(instruction)

    def tidy(self, number: int) -> None:
        """Weights that nobody goes on from."""
        for client in self.group.clients:
            client.tidy(number)

    def _attacker(self, name: str) -> Callable[[int], Callable[[Tensor], Tensor]]:
        return lambda number: self._attack(name, number)

    def _attack(self, name: str, number: int) -> Callable[[Tensor], Tensor]:
        """What the simulated attacker ``name`` makes of its own answers, knowing all honest ones."""
        attack, names = self.attackers[name], [client.name for client in self.group.clients]
        said = (self._said(other, number) for other in names if other not in self.attackers)
        honest = [answers for answers in said if answers is not None]
        if not honest:
            raise RoundError(f"round {number}: no honest client was admitted, so {name} has nothing to see")
        before = teacher = None
        if number > 1:
            before = self._said(name, 1)
            path = self.session.run.path(layout.tensors(layout.teacher(number - 1)))
            teacher = load_file(path)["log_probs"]
        seed = derive(self.session.config.seed, "attack", number, name)
        return lambda own: attack(AttackContext(own, honest, seed, len(names), before, teacher))

    def _said(self, name: str, number: int) -> Tensor | None:
        """What ``name`` answered in a round, as the server reads it; ``None`` where it was refused."""
        run, _step = self.session.run, layout.round_of(number)
        if run.done(layout.answer(number, name)) is None:  # it was not asked
            return None
        spec = payload.parse_spec(run.read_bytes(layout.request(number)))
        stored = answer_files.StoredAnswer(run, layout.answer(number, name), spec)
        try:
            stored.admit()
        except PayloadError:
            return None
        return answer_files.answer_reader(encoding.expand, stored)(0, spec.positions)
