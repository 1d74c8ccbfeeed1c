"""The distillation loss of hidden states and a vocabulary projection, without storing all logits."""

from dataclasses import dataclass

from torch import Tensor, nn
from typing_extensions import override

from feddistill_kernels._backend import named
from feddistill_kernels._check import bind, floating, no_forward_mode, same_device
from feddistill_kernels.distillation._settings import check_labels, check_settings, lifted, row_scale
from feddistill_kernels.linear_distillation._op import each, total
from feddistill_kernels.topk import TopK

__all__ = ["LinearDistillationLoss", "TeacherHead", "linear_distillation_loss"]

WORKSPACE_BYTES = {"cpu": 128 << 20}
"""As much as the products gain from; elsewhere ``1 << 30``.  Measured: see bench/NOTES.md."""


@dataclass(frozen=True)
class TeacherHead:
    """A teacher by its hidden states and vocabulary projection, whose logits are made a chunk at a time.

    Args:
        hidden: ``[N, H']``, ``H'`` its own.
        weight: ``[V, H']``, of ``hidden``'s dtype.
        bias: ``[V]`` or ``None``.

    Raises:
        ValueError: Shapes, dtypes or devices do not fit.

    Example:
        >>> import torch
        >>> len(TeacherHead(torch.zeros(3, 8), torch.zeros(100, 8)))
        3
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None

    def __post_init__(self) -> None:
        _check_head(self.hidden, self.weight, self.bias, "TeacherHead's ")

    def __len__(self) -> int:
        """``N``."""
        return self.hidden.shape[0]


def linear_distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher: Tensor | TopK | TeacherHead,
    labels: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    kind: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    workspace_bytes: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """``distillation_loss`` of the logits ``hidden @ weight.T + bias``, which are never all in memory.

    Rows are processed in chunks: the logits, the loss with its gradient in their place, and from that the
    gradients of ``hidden``, ``weight`` and ``bias``, all in the forward pass.  Rows of weight 0 are dropped
    before the first product; if there are labels or row weights, finding them is the only GPU sync.
    (Hsu et al., "Liger Kernel", 2024, section 3.2, does so for hard labels.)

    Args:
        hidden: ``[N, H]``, float16, bfloat16, float32 or (reference only) float64.
        weight: ``[V, H]``, of ``hidden``'s dtype.  Rows past the teacher's vocabulary are padding: no
            probability, no gradient.
        teacher: Logits ``[N, V]``, ``TopK`` made at the same ``temperature``, or ``TeacherHead``; it gets no
            gradient.
        labels: As in ``distillation_loss``.
        bias: ``[V]``, of ``hidden``'s dtype, or ``None``.
        kind: This and the settings down to ``reduction``: see ``distillation_loss``.
        beta: See there.
        temperature: See there.
        kd_weight: See there.
        ignore_index: See there.
        row_weight: See there.
        reduction: See there.  With ``"none"`` backward computes the logits again.
        workspace_bytes: Memory for a chunk's logits, including the teacher's if they are computed or
            gathered; a chunk has at least one row.  ``None`` for 128 MiB on a CPU, 1 GiB elsewhere.
        backend: As in ``softmax_divergence``, for the loss; the products are torch's.

    Returns:
        A scalar, or ``[N]`` for ``"none"``; float32 (float64 for float64 hidden states).

    Raises:
        ValueError: As in ``distillation_loss``, or ``hidden``, ``weight`` and ``bias`` do not fit together.
        BackendError: ``backend`` was named and cannot run here.

    Memory:
        The gradients that are required and the workspace; if ``hidden`` is float16, or bfloat16 with several
        chunks, also a float32 ``[V, H]`` in which ``weight``'s gradient is summed.  Backward scales the
        gradients in new memory, unless the upstream gradient is 1 and the graph is not retained.  Logits have
        ``hidden``'s dtype, as a linear layer's do.

    Example:
        >>> import torch
        >>> hidden, weight = torch.eye(2, 3, requires_grad=True), torch.eye(4, 3)
        >>> loss = linear_distillation_loss(hidden, weight, torch.zeros(2, 4))
        >>> loss
        tensor(0.1074, grad_fn=...)
        >>> loss.backward()
        >>> hidden.grad[0]
        tensor([ 0.1127, -0.0376, -0.0376])
    """
    rows, _, width = _check_head(hidden, weight, bias)
    vocab, tensors = _teacher(teacher)
    given = next(x for x in tensors if x is not None)
    floating(hidden=hidden, teacher=given)
    same_device(hidden, teacher=given)
    check_settings(rows, width, len(given), vocab, kind, beta, temperature)
    check_labels(labels, kd_weight, reduction)
    if workspace_bytes is None:
        workspace_bytes = WORKSPACE_BYTES.get(hidden.device.type, 1 << 30)
    if workspace_bytes < 1:
        raise ValueError(f"workspace_bytes must be at least 1, got {workspace_bytes}")
    scale = row_scale(hidden, labels, ignore_index, row_weight, reduction == "mean")
    no_forward_mode(hidden=hidden, weight=weight, bias=bias)
    hard = labels if kd_weight < 1 else None
    kd, ce = float(kd_weight * temperature**2), float(1 - kd_weight)
    masked = labels is not None or row_weight is not None
    numbers = (vocab, kind, float(beta), float(temperature), kd, ce, masked, workspace_bytes, named(backend))
    if reduction == "none":
        return each(hidden, weight, bias, *tensors, hard, scale, *numbers)
    scale, divisor = lifted(hidden, scale)
    loss = total(hidden, weight, bias, *tensors, hard, scale, *numbers)
    return loss if divisor is None else loss / divisor


class LinearDistillationLoss(nn.Module):
    """``linear_distillation_loss`` as a module: the settings once, the tensors at each call.

    Args:
        kind: This and the others: see ``linear_distillation_loss``.

    Example:
        >>> import torch
        >>> loss = LinearDistillationLoss(temperature=2.0)
        >>> loss
        LinearDistillationLoss(kind='forward_kl', temperature=2.0)
        >>> loss(torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, 5))
        tensor(0.)
    """

    def __init__(
        self,
        *,
        kind: str = "forward_kl",
        beta: float = 0.5,
        temperature: float = 1.0,
        kd_weight: float = 1.0,
        ignore_index: int = -100,
        reduction: str = "mean",
        workspace_bytes: int | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.beta = beta
        self.temperature = temperature
        self.kd_weight = kd_weight
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.workspace_bytes = workspace_bytes
        self.backend = backend

    @override
    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        teacher: Tensor | TopK | TeacherHead,
        labels: Tensor | None = None,
        row_weight: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        return linear_distillation_loss(
            hidden,
            weight,
            teacher,
            labels,
            bias=bias,
            kind=self.kind,
            beta=self.beta,
            temperature=self.temperature,
            kd_weight=self.kd_weight,
            ignore_index=self.ignore_index,
            row_weight=row_weight,
            reduction=self.reduction,
            workspace_bytes=self.workspace_bytes,
            backend=self.backend,
        )

    @override
    def extra_repr(self) -> str:
        defaults = {"beta": 0.5, "kd_weight": 1.0, "ignore_index": -100, "reduction": "mean"}
        defaults |= {"workspace_bytes": None, "backend": None}
        shown = ["kind", "temperature", *(name for name in defaults if getattr(self, name) != defaults[name])]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None, whose: str = "") -> tuple[int, int, int]:
    """N, H and V."""
    rows, size = bind("N H", **{f"{whose}hidden": hidden})
    vocab, columns = bind("V H", **{f"{whose}weight": weight})
    if columns != size:
        raise ValueError(f"{whose}weight has {columns} columns, {whose}hidden has {size}")
    tensors = {f"{whose}weight": weight}
    if bias is not None:
        tensors[f"{whose}bias"] = bias
        (count,) = bind("V", **{f"{whose}bias": bias})
        if count != vocab:
            raise ValueError(f"{whose}bias has {count} entries, {whose}weight has {vocab} rows")
    floating(**{f"{whose}hidden": hidden})
    for name, tensor in tensors.items():
        if tensor.dtype != hidden.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, {whose}hidden is {hidden.dtype}; they must be alike")
    same_device(hidden, **tensors)
    return rows, size, vocab


def _teacher(teacher: Tensor | TopK | TeacherHead) -> tuple[int, list[Tensor | None]]:
    """The vocabulary, and logits or log-probabilities, ids, log tail, hidden, weight, bias."""
    if isinstance(teacher, TopK):
        return teacher.vocab_size, [teacher.log_probs, teacher.ids, teacher.log_tail, None, None, None]
    if isinstance(teacher, TeacherHead):
        bias = None if teacher.bias is None else teacher.bias.detach()
        return len(teacher.weight), [None, None, None, teacher.hidden.detach(), teacher.weight.detach(), bias]
    _, vocab = bind("N V", teacher=teacher)
    return vocab, [teacher, None, None, None, None, None]
