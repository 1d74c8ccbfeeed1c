"""Federated averaging with Flower's strategy over the clients of the federation."""

from collections.abc import Iterable, Mapping

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from feddistill.engines.flower.records import instruction_record
from feddistill.engines.flower.transport import GridTransport
from feddistill.errors import RoundError
from feddistill.federation.protocol import Instruction
from feddistill.server.clients import instruction_for
from feddistill.tasks.session import Average, Session
from feddistill.types import Cost


class GridAverager:
    """An ``Averager``: the clients of ``transport`` train, Flower averages."""

    def __init__(self, transport: GridTransport):
        self.transport = transport

    def __call__(self, session: Session, number: int, weights: Mapping[str, Tensor]) -> Average:
        """Run round ``number``."""
        names = session.round_clients(number)
        quorum = session.config.aggregation.quorum or len(names)
        retry_policy = session.engine.retry_policy
        instruction = instruction_for(session, "average", number)
        cost, uplink, downlink = Cost(), 0, 0
        for _ in range(retry_policy.attempts):  # clients that have trained reply at once
            nodes = self.transport.nodes(names, retry_policy.connect)
            strategy = _Strategy(instruction, nodes)
            result = strategy.start(
                self.transport.grid, ArrayRecord(dict(weights)), num_rounds=1, timeout=retry_policy.reply
            )
            uplink += strategy.uplink
            downlink += strategy.downlink
            cost = strategy.cost  # clients that trained before report the same cost again
            if len(strategy.answered) == len(names):
                break
        if len(strategy.answered) < quorum:
            raise RoundError(
                f"fedavg: round {number}: {len(strategy.answered)} clients sent weights, quorum {quorum}"
            )
        return Average(
            result.arrays.to_torch_state_dict(),
            uplink=uplink,
            downlink=downlink,
            cost=cost,
            missing=[name for name in names if name not in strategy.answered],
        )


class _Strategy(FedAvg):  # type: ignore[misc]  # Flower is untyped
    """Flower's FedAvg, with clients by name and a count of the bytes sent."""

    def __init__(self, instruction: Instruction, nodes: Mapping[str, int]):
        super().__init__(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
        self.task = instruction
        self.nodes = nodes
        self.answered: list[str] = []
        self.uplink = self.downlink = 0
        self.cost = Cost()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Messages to all clients of the federation."""
        record = instruction_record(self.task)
        record[self.arrayrecord_key] = arrays
        self.downlink = size_of(arrays) * len(self.nodes)
        return list(self._construct_messages(record, list(self.nodes.values()), MessageType.TRAIN))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Flower's weighted mean, summed in the order of the names because Flower sums in float32."""
        names = {node: name for name, node in self.nodes.items()}
        came = sorted(replies, key=lambda message: names[message.metadata.src_node_id])
        for message in came:
            if message.has_error():
                continue
            content: RecordDict = message.content
            self.answered.append(names[message.metadata.src_node_id])
            self.uplink += size_of(content[self.arrayrecord_key])
            metrics = next(iter(content.metric_records.values()))
            self.cost += Cost(float(metrics["seconds"]), int(metrics["flops"]))
        arrays, metrics = super().aggregate_train(server_round, came)
        return arrays, metrics


def size_of(arrays: ArrayRecord) -> int:
    """Bytes of all weights in a message."""
    return sum(len(array.data) for array in arrays.values())
