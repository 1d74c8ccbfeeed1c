"""The server's side: instructions go out over Flower's grid, replies come back one at a time."""

import time
from collections.abc import Iterator, Sequence

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from feddistill.engines.flower.records import instruction_record, to_reply
from feddistill.federation.protocol import Instruction, Reply
from feddistill.progress import Progress

HELLO = f"{MessageType.QUERY}.hello"
WORK = f"{MessageType.QUERY}.work"
MARGIN = 60.0
"""Seconds that a message outlives its timeout."""
HELLO_SECONDS = 120.0


class GridTransport:
    """Clients at SuperNodes, which report their names once."""

    def __init__(self, grid: Grid, progress: Progress, poll: float = 0.3):
        self.grid = grid
        self.progress = progress
        self.poll = poll
        self._nodes: dict[str, int] = {}
        self._met: set[int] = set()

    def clients(self, wanted: Sequence[str], wait: float) -> Sequence[str]:
        """The clients of ``wanted`` that are connected."""
        end = time.monotonic() + wait
        while True:
            online = set(self.grid.get_node_ids())
            self._meet(sorted(online - self._met))
            self._met &= online  # a SuperNode that reconnects reports its name again
            present = [name for name in wanted if self._nodes.get(name) in online]
            if len(present) == len(wanted) or time.monotonic() > end:
                return present
            time.sleep(self.poll)

    def tidy(self, number: int) -> None:
        """Nothing to delete: clients keep their own weights."""

    def nodes(self, wanted: Sequence[str], wait: float) -> dict[str, int]:
        """The SuperNodes of the clients of ``wanted`` that are connected."""
        return {name: self._nodes[name] for name in self.clients(wanted, wait)}

    def ask(self, instruction: Instruction, clients: Sequence[str], timeout: float) -> Iterator[Reply]:
        """Send an instruction to clients and yield their replies."""
        nodes = {self._nodes[name]: name for name in clients}
        for node, message in self._exchange(instruction_record(instruction), WORK, list(nodes), timeout):
            if message.has_error():
                yield Reply(nodes[node], error=f"Flower's error {message.error.code}")
                continue
            reply = _read(message)
            if reply is None:
                yield Reply(nodes[node], error="a malformed reply")
                continue
            if reply.client != nodes[node]:
                yield Reply(nodes[node], error="a reply in another's name")
                continue
            yield reply

    def _meet(self, nodes: Sequence[int]) -> None:
        """Request the names of new SuperNodes."""
        for node, message in self._exchange(RecordDict(), HELLO, nodes, HELLO_SECONDS):
            if message.has_error():
                continue
            self._met.add(node)
            reply = _read(message)
            if reply is None:
                self.progress.log(f"SuperNode {node} does not report a name and is ignored")
                continue
            name, online = reply.client, set(self.grid.get_node_ids())
            other = self._nodes.get(name)
            if other is not None and other != node and other in online:
                self.progress.log(f"a second SuperNode reports the name {name} and is ignored")
                continue
            before = next((known for known, at in self._nodes.items() if at == node), name)
            if before != name:
                self.progress.log(f"{before}'s SuperNode reports the name {name}; it is not used as {name}")
                continue
            self._nodes[name] = node

    def _exchange(
        self, content: RecordDict, kind: str, nodes: Sequence[int], timeout: float
    ) -> Iterator[tuple[int, Message]]:
        """Send to all, then pull one message at a time, so that only one is in memory."""
        if not nodes:
            return
        messages = [Message(content, node, kind, ttl=timeout + MARGIN) for node in nodes]
        sent = zip(self.grid.push_messages(messages), nodes, strict=True)
        waiting = {identifier: node for identifier, node in sent if identifier}
        end = time.monotonic() + timeout
        while waiting and time.monotonic() < end:
            came = False
            for identifier in list(waiting):
                for message in self.grid.pull_messages([identifier]):
                    came = True
                    yield waiting.pop(identifier), message
            if not came:
                time.sleep(self.poll)


def _read(message: Message) -> Reply | None:
    """The reply in a message, or ``None`` if it is not one."""
    try:
        return to_reply(message.content)
    except Exception:  # a hostile message must not end the coordinator
        return None
