"""The embedded engine: all clients in this process, one at a time, in the server's own run directory."""

from collections.abc import Callable, Iterator, Sequence

from safetensors.torch import load_file
from torch import Tensor

from feddistill import payload
from feddistill.aggregation.attacks import Sight, liars
from feddistill.client.client import Crew
from feddistill.client.handler import Agent
from feddistill.errors import PayloadError, RoundError
from feddistill.federation import answer_files, encoding
from feddistill.federation.protocol import Reply, Task
from feddistill.seeds import derive
from feddistill.tasks.session import Session


class LocalTransport:
    """Clients that are objects. What goes wrong at one of them is an exception here."""

    shares_run = True

    def __init__(self, session: Session):
        self.session = session
        self.crew = Crew(session)
        self.liars = liars(session.config.simulate.attack, [client.name for client in self.crew.clients])

    def clients(self, wanted: Sequence[str], wait: float) -> Sequence[str]:
        """See ``Transport``."""
        return wanted

    def ask(self, task: Task, clients: Sequence[str], timeout: float) -> Iterator[Reply]:
        """See ``Transport``; ``timeout`` is not looked at."""
        # Liars last: they see what the others say.
        for client in sorted(self.crew.clients, key=lambda client: client.name in self.liars):
            if client.name in clients:
                lie = None if client.name not in self.liars else self._liar(client.name)
                yield Agent(client, lie=lie, alone=False).handle(task)

    def tidy(self, number: int) -> None:
        """Weights that nobody goes on from."""
        for client in self.crew.clients:
            client.tidy(number)

    def _liar(self, name: str) -> Callable[[int], Callable[[Tensor], Tensor]]:
        return lambda number: self._lie(name, number)

    def _lie(self, name: str, number: int) -> Callable[[Tensor], Tensor]:
        """What the simulated attacker ``name`` makes of its own answers, knowing all honest ones."""
        attack, names = self.liars[name], [client.name for client in self.crew.clients]
        said = (self._said(other, number) for other in names if other not in self.liars)
        honest = [answers for answers in said if answers is not None]
        if not honest:
            raise RoundError(f"round {number}: no honest client was admitted, so {name} has nothing to see")
        before = teacher = None
        if number > 1:
            before = self._said(name, 1)
            path = self.session.run.path(f"rounds/{number - 1:03d}/teacher.safetensors")
            teacher = load_file(path)["log_probs"]
        seed = derive(self.session.config.seed, "attack", number, name)
        return lambda own: attack(Sight(own, honest, seed, len(names), before, teacher))

    def _said(self, name: str, number: int) -> Tensor | None:
        """What ``name`` answered in a round, as the server reads it; ``None`` where it was refused."""
        run, step = self.session.run, f"rounds/{number:03d}"
        if run.done(f"{step}/payloads/{name}") is None:  # it was not asked
            return None
        spec = payload.parse_spec(run.read_bytes(f"{step}/spec.json"))
        shelf = answer_files.Shelf(run, f"{step}/payloads/{name}", spec)
        try:
            shelf.admit()
        except PayloadError:
            return None
        return answer_files.answerer(encoding.expand, shelf)(0, spec.positions)
