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
    """Clients in this process. A failure of a client is an exception here."""

    def __init__(self, session: Session):
        self.session = session
        self.group = ClientGroup(session)
        self.attackers = attackers(
            session.config.simulate.attack, [client.name for client in self.group.clients]
        )

    def clients(self, wanted: Sequence[str], wait: float) -> Sequence[str]:
        """All of ``wanted``: clients in this process are always there."""
        return wanted

    def ask(self, instruction: Instruction, clients: Sequence[str], timeout: float) -> Iterator[Reply]:
        """Handle the instruction for one client after the other; ``timeout`` has no effect."""
        # Attackers last: they see the answers of the others.
        for client in sorted(self.group.clients, key=lambda client: client.name in self.attackers):
            if client.name in clients:
                attack = None if client.name not in self.attackers else self._attacker(client.name)
                yield Handler(client, attack=attack, alone=False).handle(instruction)

    def tidy(self, number: int) -> None:
        """Delete weights that no later round starts from."""
        for client in self.group.clients:
            client.tidy(number)

    def _attacker(self, name: str) -> Callable[[int], Callable[[Tensor], Tensor]]:
        return lambda number: self._attack(name, number)

    def _attack(self, name: str, number: int) -> Callable[[Tensor], Tensor]:
        """The change that the simulated attacker ``name`` makes to its answers, given all honest ones."""
        attack, names = self.attackers[name], [client.name for client in self.group.clients]
        said = (self._answers(other, number) for other in names if other not in self.attackers)
        honest = [answers for answers in said if answers is not None]
        if not honest:
            raise RoundError(f"round {number}: no honest client was admitted, so {name} has nothing to see")
        before = teacher = None
        if number > 1:
            before = self._answers(name, 1)
            path = self.session.run.path(layout.tensors(layout.teacher(number - 1)))
            teacher = load_file(path)["log_probs"]
        seed = derive(self.session.config.seed, "attack", number, name)
        return lambda own: attack(AttackContext(own, honest, seed, len(names), before, teacher))

    def _answers(self, name: str, number: int) -> Tensor | None:
        """The answers of ``name`` in a round as the server reads them; ``None`` if they were refused."""
        run, _step = self.session.run, layout.round_of(number)
        if run.done(layout.answer(number, name)) is None:  # not a client of this round
            return None
        spec = payload.parse_spec(run.read_bytes(layout.request(number)))
        stored = answer_files.StoredAnswer(run, layout.answer(number, name), spec)
        try:
            stored.admit()
        except PayloadError:
            return None
        return answer_files.answer_reader(encoding.expand, stored)(0, spec.positions)
