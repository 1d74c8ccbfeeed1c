"""Divergences between softmaxes, and the distillation loss made of them, without storing either softmax."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from feddistill_kernels._backend import named
from feddistill_kernels._check import bind, floating, no_forward_mode, same_device
from feddistill_kernels._kinds import KINDS
from feddistill_kernels.distillation._op import each, total, total_in_place, total_of
from feddistill_kernels.distillation._settings import (
    check_labels,
    check_settings,
    lifted,
    row_scale,
    work_dtype,
)
from feddistill_kernels.topk import TopK
from feddistill_kernels.vocabulary_parallel import _op as vocabulary_parallel
from feddistill_kernels.vocabulary_parallel._op import check_group

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["DistillationLoss", "distillation_loss", "kinds", "softmax_divergence"]


def kinds() -> tuple[str, ...]:
    """Names of the divergences.

    >>> kinds()
    ('forward_kl', 'reverse_kl', 'jsd', 'tvd', 'skew_forward_kl', 'skew_reverse_kl'...)
    """
    return tuple(KINDS)


def softmax_divergence(
    student: Tensor,
    teacher: Tensor | TopK,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    backend: str | None = None,
    group: "ProcessGroup | None" = None,
) -> Tensor:
    """Divergence of the student from the teacher, one number per row.

    With ``p = softmax(student / T)``, ``q = softmax(teacher / T)`` and natural logarithms::

        forward_kl       KL(q || p)                                  mass-covering (Hinton et al., 2015)
        reverse_kl       KL(p || q)                                  mode-seeking (Gu et al., "MiniLLM", 2024)
        jsd              beta KL(q || m) + (1 - beta) KL(p || m)     m = beta q + (1 - beta) p; 0 means
                                                                     forward_kl, 1 reverse_kl (as TRL's GKD)
        tvd              1/2 sum_v |p_v - q_v|                       (Wen et al., "f-Distill", 2023)
        skew_forward_kl  KL(q || 0.1 q + 0.9 p)                      (Ko et al., "DistiLLM", 2024)
        skew_reverse_kl  KL(p || 0.1 p + 0.9 q)

    A ``TopK`` teacher is K + 1 events, its kept ids and one tail; the student's tail is all its other
    ids.  Nothing is clamped, padded or renormalised, so the number is >= 0, a lower bound of the dense
    one, and equal to it at K = V.

    Nothing is reduced, masked or multiplied by ``T**2``: ``distillation_loss`` does that.

    Args:
        student: Logits ``[N, V]``, float16, bfloat16, float32 or (reference only) float64.  The only input
            with a gradient.  Columns past the teacher's vocabulary are padding: no probability, no gradient.
        teacher: Logits ``[N, V]`` of any of those dtypes, or ``TopK`` made at the same ``temperature``, on
            the student's device.  ``-inf`` marks a token that the teacher rules out.  Rows of a ``TopK`` may
            keep different numbers of ids, see there.
        kind: One of ``kinds()``.
        beta: The teacher's share of the mixture in ``jsd``, in [0, 1]; the other kinds have none.
        temperature: ``T > 0``.
        backend: ``"reference"``, ``"native"`` or ``"triton"``.  ``None`` takes the best for the device; a
            backend named here is never replaced by another.
        group: A process group, each rank of which holds some columns of the logits: see
            ``distillation_loss``.

    Returns:
        ``[N]`` in nats, float32 (float64 for a float64 student).  ``inf`` where the second distribution of
        a KL rules out a token that the first allows.  A NaN logit gives NaN in its row only.

    Raises:
        ValueError: Shapes do not fit, ``kind`` is unknown, ``beta`` or ``temperature`` is out of range.  On
            the CPU also for a row of nothing but ``-inf``, or a ``TopK`` with an id outside the vocabulary or
            twice in a row; elsewhere, where looking would stall the device's queue, such a row gives NaN, and
            one with an id twice is undefined.
        BackendError: ``backend`` was named and cannot run here.

    Memory:
        Backward keeps the inputs and one number a row.  Temporaries are bounded, whatever N and V are.

    Example:
        >>> import torch
        >>> z = torch.tensor([[2.0, 0.0, -1.0]])
        >>> softmax_divergence(z, z.flip(1), temperature=2.0)
        tensor([0.7324])
    """
    vocab, *teacher_tensors = _check(student, teacher, kind, beta, temperature, group)
    scale = torch.ones(student.shape[0], dtype=work_dtype(student), device=student.device)
    numbers = (vocab, kind, float(beta), float(temperature), 1.0, 0.0, named(backend))
    return _each(student, (*teacher_tensors, None, scale, *numbers), group)


def distillation_loss(
    student: Tensor,
    teacher: Tensor | TopK,
    labels: Tensor | None = None,
    *,
    kind: str = "forward_kl",
    beta: float = 0.5,
    temperature: float = 1.0,
    kd_weight: float = 1.0,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
    inplace: bool = False,
    backend: str | None = None,
    group: "ProcessGroup | None" = None,
) -> Tensor:
    """Distillation loss with hard labels, mask and reduction; its gradient is made in the forward pass.

    With ``D`` the ``softmax_divergence`` at temperature ``T`` and ``w_n`` the row weights::

        L_n  = kd_weight * T**2 * D_n + (1 - kd_weight) * CE(student_n, labels_n)       CE at T = 1
        mean = sum_n w_n L_n / sum_n w_n          sum = sum_n w_n L_n          none = w_n L_n

    ``T**2`` keeps the gradient's size as the temperature rises (Hinton et al., "Distilling the Knowledge
    in a Neural Network", 2015, section 2).

    Args:
        student: Logits ``[N, V]``, as in ``softmax_divergence``.  The only input with a gradient.
        teacher: Logits ``[N, V]`` or ``TopK``, as in ``softmax_divergence``.
        labels: int64 ``[N]``, in ``[0, V)`` or ``ignore_index``.  Needed if ``kd_weight < 1``; with
            ``kd_weight = 1`` they only mark the rows to leave out.
        kind: One of ``kinds()``.
        beta: See ``softmax_divergence``.
        temperature: ``T > 0``.
        kd_weight: Share of the divergence, in [0, 1].
        ignore_index: A row with this label has weight 0.
        row_weight: Float ``[N]``, >= 0; ``None`` for ones.  A row of weight 0 costs nothing, whatever is in
            it (NaN included), and is left out of the mean.  With no row left the loss and gradient are 0.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        inplace: Write the gradient over ``student``'s memory, saving one ``[N, V]``.  After the call
            ``student`` holds no logits.  Autograd refuses a backward pass that needs them (say, of a
            log_softmax that made them).  If no gradient is required, nothing is written.
        backend: See ``softmax_divergence``.
        group: A process group over which the vocabulary is split: each rank passes its columns of the logits,
            in the order of the ranks, any number of them (0 too), and with a dense teacher the same columns
            of the teacher's.  A ``TopK``, labels and everything else are the same on every rank; ids and
            labels are those of the whole vocabulary.  Every rank gets the same loss, and in backward the
            gradient of its columns without communication.  A call has three collectives of a few numbers a
            row.

    Returns:
        A scalar, or ``[N]`` for ``"none"``; float32 (float64 for a float64 student).

    Raises:
        ValueError: As in ``softmax_divergence``; ``kd_weight`` or ``reduction`` is out of range; labels are
            missing or outside the vocabulary (checked on the CPU only); ``inplace`` with reduction
            ``"none"``, under ``torch.compile``, or with a student that is a leaf or whose rows share
            memory; ``group`` under ``torch.compile``, before
            ``init_process_group``, or with shards that do not fit together (checked on the CPU only).
        BackendError: ``backend`` was named and cannot run here.
        RuntimeError: From backward with ``create_graph=True``, or of a student that carries a tangent: the
            losses are differentiable once, in reverse.

    Memory:
        One ``[N, V]`` in the student's dtype, the gradient; none with ``inplace``.  With ``"none"`` the
        gradient is made in backward, from the inputs.  A backward that retains the graph takes another one.

    Example:
        >>> import torch
        >>> student = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.0]], requires_grad=True)
        >>> teacher = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 3.0]])
        >>> labels = torch.tensor([0, -100])
        >>> loss = distillation_loss(student, teacher, labels, kd_weight=0.5, temperature=2.0)
        >>> loss
        tensor(0.2471, grad_fn=...)
        >>> loss.backward()
        >>> student.grad[1]
        tensor([0., 0., 0.])
    """
    vocab, *teacher_tensors = _check(student, teacher, kind, beta, temperature, group)
    check_labels(labels, kd_weight, reduction)
    scale = row_scale(student, labels, ignore_index, row_weight, reduction == "mean")
    wants_gradient = student.requires_grad and torch.is_grad_enabled()
    if inplace:
        _check_inplace(student, reduction, wants_gradient)
    hard = labels if kd_weight < 1 else None
    kd, ce = float(kd_weight * temperature**2), float(1 - kd_weight)
    numbers = (vocab, kind, float(beta), float(temperature), kd, ce, named(backend))
    if reduction == "none":
        return _each(student, (*teacher_tensors, hard, scale, *numbers), group)
    if not wants_gradient:
        return _each(student, (*teacher_tensors, hard, scale, *numbers), group).sum()
    scale, divisor = lifted(student, scale)
    arguments = (*teacher_tensors, hard, scale, *numbers)
    rows = None if group is None else partial(vocabulary_parallel.rows, group=group)
    if inplace:
        loss = total_in_place(rows, student, *arguments)
    elif rows is not None:
        loss = total_of(rows, student, *arguments)
    else:
        loss = total(student, *arguments)
    return loss if divisor is None else loss / divisor


class DistillationLoss(nn.Module):
    """``distillation_loss`` as a module: the settings once, the tensors at each call.

    Args:
        kind: This and the others: see ``distillation_loss``.

    Example:
        >>> import torch
        >>> loss = DistillationLoss(kind="jsd", temperature=2.0)
        >>> loss
        DistillationLoss(kind='jsd', temperature=2.0)
        >>> loss(torch.zeros(2, 3), torch.zeros(2, 3))
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
        inplace: bool = False,
        backend: str | None = None,
        group: "ProcessGroup | None" = None,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.beta = beta
        self.temperature = temperature
        self.kd_weight = kd_weight
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.inplace = inplace
        self.backend = backend
        self.group = group

    @override
    def forward(
        self,
        student: Tensor,
        teacher: Tensor | TopK,
        labels: Tensor | None = None,
        row_weight: Tensor | None = None,
    ) -> Tensor:
        return distillation_loss(
            student,
            teacher,
            labels,
            kind=self.kind,
            beta=self.beta,
            temperature=self.temperature,
            kd_weight=self.kd_weight,
            ignore_index=self.ignore_index,
            row_weight=row_weight,
            reduction=self.reduction,
            inplace=self.inplace,
            backend=self.backend,
            group=self.group,
        )

    @override
    def extra_repr(self) -> str:
        defaults = {"beta": 0.5, "kd_weight": 1.0, "ignore_index": -100, "reduction": "mean"}
        defaults |= {"inplace": False, "backend": None}
        shown = ["kind", "temperature", *(name for name in defaults if getattr(self, name) != defaults[name])]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)


def _each(student: Tensor, arguments: tuple[Any, ...], group: "ProcessGroup | None") -> Tensor:
    """The loss of each row, of this process's logits or of all ranks' together."""
    return each(student, *arguments) if group is None else vocabulary_parallel.each(student, arguments, group)


def _check(
    student: Tensor,
    teacher: Tensor | TopK,
    kind: str,
    beta: float,
    temperature: float,
    group: "ProcessGroup | None",
) -> tuple[int, Tensor, Tensor | None, Tensor | None]:
    """The teacher's vocabulary, and the teacher as tensors: logits, or log-probabilities, ids and tail."""
    rows, width = bind("N V", student=student)
    if group is not None:
        check_group(group)
    tensors: tuple[Tensor, Tensor | None, Tensor | None]
    if isinstance(teacher, TopK):
        vocab, count = teacher.vocab_size, teacher.ids.shape[0]
        tensors = (teacher.log_probs, teacher.ids, teacher.log_tail)
        if group is not None:
            width = vocab  # the student has the other columns on other ranks
    else:
        count, vocab = bind("N V", teacher=teacher)
        tensors = (teacher, None, None)
    floating(student=student, teacher=tensors[0])
    same_device(student, teacher=tensors[0])
    no_forward_mode(student=student)
    check_settings(rows, width, count, vocab, kind, beta, temperature)
    return vocab, *tensors


def _check_inplace(student: Tensor, reduction: str, wants_gradient: bool) -> None:
    if torch.compiler.is_compiling():
        raise ValueError("inplace=True is for eager mode: under torch.compile the compiler plans memory")
    if reduction == "none":
        raise ValueError(
            "inplace=True needs reduction 'mean' or 'sum': for 'none' the gradient waits for backward"
        )
    if wants_gradient and student.is_leaf:
        raise ValueError("inplace=True would overwrite student, which is a leaf that requires a gradient")
    (near, within), (far, rows) = sorted(zip(student.stride(), student.shape, strict=True))
    if (rows > 1 and far < near * (within - 1) + 1) or (within > 1 and near == 0):
        raise ValueError(
            "inplace=True needs a student whose rows do not share memory, got an expanded tensor or the like"
        )
