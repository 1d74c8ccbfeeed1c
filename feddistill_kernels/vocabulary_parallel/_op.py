"""Collectives and autograd; the arithmetic is in the backends and in ``_statistics``."""

from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from feddistill_kernels._backend import load
from feddistill_kernels._check import NO_ID, distinct_ids, labels_in_vocabulary, no_derivative_twice
from feddistill_kernels.vocabulary_parallel import _statistics
from feddistill_kernels.vocabulary_parallel._statistics import Loss, Shard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def each(student: Tensor, rest: tuple[Any, ...], group: "ProcessGroup") -> Tensor:
    """The loss of each row ``[N]``, the same on every rank; ``rest`` as in ``distillation``."""
    call = _Call.of(student, rest, group)
    if not (student.requires_grad and torch.is_grad_enabled()):
        return call.forward()[0]
    loss: Tensor = _Each.apply(student, call)  # type: ignore[no-untyped-call]  # torch types no apply
    return loss


def rows(student: Tensor, *rest: Any, group: "ProcessGroup", gradient: Tensor) -> Tensor:
    """The same, with the gradient of the sum written to ``gradient [N, V_r]``, which may be the student."""
    call = _Call.of(student, rest, group)
    cost, statistics, slopes = call.forward()
    call.module.gradient(call.shard, call.loss, statistics, slopes, gradient)
    return cost


class _Call(NamedTuple):
    shard: Shard
    loss: Loss
    backend: str
    group: "ProcessGroup"

    @staticmethod
    def of(student: Tensor, rest: tuple[Any, ...], group: "ProcessGroup") -> "_Call":
        teacher, ids, log_tail, labels, scale, vocab, *numbers, backend = rest
        first, whole = _place(student, vocab, ids, group)
        student, teacher = student.detach(), teacher.detach()
        shard = Shard(student, teacher, ids, log_tail, labels, scale, first, whole)
        _check_ids(shard)
        return _Call(shard, Loss(*numbers), backend, group)

    @property
    def module(self) -> ModuleType:
        return load("vocabulary_parallel", self.backend, self.shard.student, kind=self.loss.kind)

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of each row, and the statistics and slopes of whole rows that its gradient needs."""
        shard, loss = self.shard, self.loss
        rows = _statistics.combined(_gathered(self.module.statistics(shard, loss), self.group))
        _statistics.rows_with_a_choice(shard, rows, loss)
        cost, slopes = torch.zeros_like(shard.scale), torch.zeros_like(rows[:2])
        if loss.kd:
            sums = _gathered(self.module.sums(shard, loss, rows), self.group).sum(0)
            value, slopes = _statistics.divergence(sums, rows, shard, loss)
            cost += loss.kd * value
        if loss.ce:
            cost += loss.ce * _statistics.cross_entropy(rows)
        return torch.where(shard.scale != 0, shard.scale * cost, 0.0), rows, slopes


class _Each(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, call: _Call) -> Tensor:
        cost, rows, slopes = call.forward()
        ctx.save_for_backward(student, *call.shard[1:], rows, slopes)
        ctx.call = call._replace(shard=None)  # type: ignore[arg-type]  # autograd keeps the tensors
        return cost

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        no_derivative_twice()
        *tensors, rows, slopes = ctx.saved_tensors
        shard = Shard(*tensors)
        call = ctx.call._replace(shard=shard._replace(scale=shard.scale * upstream))
        gradient = torch.empty_like(shard.student, memory_format=torch.contiguous_format)
        call.module.gradient(call.shard, call.loss, rows, slopes, gradient)
        return gradient, None


def check_group(group: object) -> None:
    """Require a group that this process belongs to."""
    if torch.compiler.is_compiling():
        raise ValueError("group is for eager mode: torch.compile cannot see its collectives")
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError("group needs torch.distributed.init_process_group, which has not been called")
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group has not this process among its ranks")
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group must be a torch.distributed.ProcessGroup, got {type(group).__name__}")


def _place(student: Tensor, vocab: int, ids: Tensor | None, group: "ProcessGroup") -> tuple[Tensor, Tensor]:
    """The id of the student's first column, and the size of the whole vocabulary: tensors, for no host sync.

    On the CPU, where looking is free, whether the ranks' shards fit together.
    """
    rows, width = student.shape
    kept = 0 if ids is None else ids.shape[1]
    wide = student.dtype == torch.float64
    # Filled one by one: a list would be copied from the host, and waited for.
    mine = torch.stack(
        [
            torch.full((), x, dtype=torch.int64, device=student.device)
            for x in (rows, width, vocab, kept, wide)
        ]
    )
    shards = _gathered(mine, group)  # [R, 5]
    rank = dist.get_rank(group)
    if shards.device.type == "cpu":
        _check_shards(shards.tolist())
    whole = shards[:, 2].sum() if ids is None else shards[rank, 2]
    return shards[:rank, 1].sum(), whole


def _check_shards(shards: list[list[int]]) -> None:
    """Raise the same error on every rank, so that none waits for another."""
    rows, widths, vocabs, kept, wide = zip(*shards, strict=True)
    if len(set(rows)) > 1:
        raise ValueError(f"student must have the same rows on every rank, got {list(rows)}")
    if len(set(wide)) > 1:
        raise ValueError("student must be float64 on every rank of group or on none")
    if len(set(kept)) > 1:
        raise ValueError(
            f"teacher keeps {list(kept)} ids a row on the ranks of group, 0 for logits: it must be alike"
        )
    if kept[0]:
        if len(set(vocabs)) > 1 or vocabs[0] > sum(widths):
            raise ValueError(
                f"teacher's vocabulary is {list(vocabs)} on the ranks of group, student has {sum(widths)}"
                " columns in all; it must be one vocabulary of at most as many"
            )
        return
    padded = next((r for r, (v, w) in enumerate(zip(vocabs, widths, strict=True)) if v < w), len(shards))
    if any(vocabs[padded + 1 :]):
        raise ValueError(
            f"teacher has {vocabs[padded]} columns on rank {padded}, student has {widths[padded]}: a pad must"
            " be at the end of the whole vocabulary"
        )


def _check_ids(shard: Shard) -> None:
    if shard.student.device.type != "cpu":
        return
    live, vocab = shard.scale != 0, int(shard.vocab)
    if shard.labels is not None:
        labels_in_vocabulary(torch.where(live, shard.labels, 0), vocab)
    if shard.ids is not None:
        distinct_ids("teacher", torch.where(live[:, None], shard.ids, NO_ID), vocab)


def _gathered(mine: Tensor, group: "ProcessGroup") -> Tensor:
    """The tensors of all ranks, stacked: a reduction would add in an order that the network decides."""
    mine = mine.contiguous()
    everyone = mine.new_empty((dist.get_world_size(group), *mine.shape))
    if mine.numel():
        dist.all_gather(list(everyone.unbind()), mine, group=group)
    return everyone
