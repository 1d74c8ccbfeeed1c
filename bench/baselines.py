"""Competitors: plain PyTorch as one writes it by hand, its compiled form, and other libraries ("peers").

The function of a peer returns a callable, or a string: the reason why the peer cannot run.
"""

import math
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from feddistill_kernels import TeacherHead, TopK


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` for static shapes, its fastest mode."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=False)


# Losses.  They compute in the dtype of their inputs.


def divergence(student: Tensor, teacher: Tensor, kind: str, temperature: float) -> Tensor:
    """Divergence of each row, ``[N]``."""
    a, b = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    return _between(a, b, kind, "none").sum(-1)


def loss(
    student: Tensor, teacher: Tensor, labels: Tensor | None, kind: str, temperature: float, kd_weight: float
) -> Tensor:
    """The distillation loss, a mean over rows."""
    a, b = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
    soft = _between(a, b, kind, "sum") * temperature * temperature / student.shape[0]
    if labels is None:
        return soft
    return kd_weight * soft + (1 - kd_weight) * functional.cross_entropy(student, labels)


def _between(a: Tensor, b: Tensor, kind: str, reduction: str) -> Tensor:
    """Divergence between log-probabilities: ``a`` of the student, ``b`` of the teacher; beta is 1/2."""
    if kind == "forward_kl":
        return functional.kl_div(a, b, reduction=reduction, log_target=True)
    if kind == "reverse_kl":
        return functional.kl_div(b, a, reduction=reduction, log_target=True)
    assert kind == "jsd", kind
    m = torch.logaddexp(a, b) - math.log(2)
    of_teacher = functional.kl_div(m, b, reduction=reduction, log_target=True)
    return (of_teacher + functional.kl_div(m, a, reduction=reduction, log_target=True)) / 2


def topk_loss(student: Tensor, teacher: TopK, temperature: float) -> Tensor:
    """Mean forward KL over K + 1 events; the student's tail is summed over the classes in it."""
    a = (student / temperature).log_softmax(-1)
    ids = teacher.ids.long()
    tail = a.scatter(1, ids, -math.inf).logsumexp(-1)
    return _events(a.gather(1, ids), tail, teacher) * temperature**2 / len(teacher)


def topk_loss_shortcut(student: Tensor, teacher: TopK, temperature: float) -> Tensor:
    """The same with the student's tail as 1 - sum(kept): faster, but NaN or noise if the tail is small."""
    a = (student / temperature).log_softmax(-1)
    kept = a.gather(1, teacher.ids.long())
    tail = torch.log1p(-kept.exp().sum(-1))
    return _events(kept, tail, teacher) * temperature**2 / len(teacher)


def _events(kept: Tensor, tail: Tensor, teacher: TopK) -> Tensor:
    b, b_tail = teacher.log_probs, teacher.log_tail
    return (b.exp() * (b - kept)).sum() + (b_tail.exp() * (b_tail - tail)).sum()


def linear_loss(
    hidden: Tensor,
    weight: Tensor,
    teacher: Tensor | TopK | TeacherHead,
    temperature: float,
    labels: Tensor | None = None,
) -> Tensor:
    """The float32 loss of the logits ``hidden @ weight.T``; with ``labels``, their cross-entropy alone."""
    logits = (hidden @ weight.T).float()
    if labels is not None:
        return functional.cross_entropy(logits, labels)
    if isinstance(teacher, TopK):
        return topk_loss(logits, teacher, temperature)
    if isinstance(teacher, TeacherHead):
        teacher = teacher.hidden @ teacher.weight.T
    return loss(logits, teacher.float(), None, "forward_kl", temperature, 1.0)


# Compression.


def topk_compress(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, log-probabilities and log-tail.  With a bfloat16 sum, kept entries can add up to more than 1."""
    values, ids = logits.topk(k)
    log_probs = values.float() - logits.float().logsumexp(-1, keepdim=True)
    return ids, log_probs, torch.log1p(-log_probs.exp().sum(-1))


# Aggregation of tensors.


def torch_median(xs: Sequence[Tensor]) -> Tensor:
    """Median; of an even number of clients the lower of the middle two."""
    return torch.stack(list(xs)).median(0).values


def sorted_median(xs: Sequence[Tensor]) -> Tensor:
    """Median; of an even number of clients the mean of the middle two."""
    ordered, count = torch.stack(list(xs)).sort(0).values, len(xs)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2


def trimmed_mean(xs: Sequence[Tensor], trim: int) -> Tensor:
    """Trimmed mean by sorting."""
    return torch.stack(list(xs)).sort(0).values[trim : len(xs) - trim].mean(0)


def krum(xs: Sequence[Tensor], byzantine: int) -> Tensor:
    """The client closest to its C - f - 2 nearest neighbours (Blanchard et al., 2017)."""
    stacked = torch.stack([x.flatten() for x in xs]).float()
    near = torch.cdist(stacked, stacked).square().sort(1).values[:, 1 : len(xs) - byzantine - 1]
    return xs[int(near.sum(1).argmin())]


def geometric_median(xs: Sequence[Tensor], iterations: int = 32) -> Tensor:
    """Geometric median of each row by Weiszfeld's algorithm."""
    stacked = torch.stack(list(xs)).float()
    z = stacked.mean(0)
    for _ in range(iterations):
        weight = 1 / (stacked - z).norm(dim=-1, keepdim=True).clamp_min(1e-12)
        z = (stacked * weight).sum(0) / weight.sum(0)
    return z.to(xs[0].dtype)


def nearest_neighbour_mixing(xs: Sequence[Tensor], byzantine: int) -> list[Tensor]:
    """Mean of each client's C - f nearest neighbours, itself included (Allouah et al., 2023)."""
    stacked = torch.stack([x.flatten() for x in xs]).float()
    near = torch.cdist(stacked, stacked).topk(len(xs) - byzantine, largest=False).indices
    return [stacked[index].mean(0).view_as(xs[0]).to(xs[0].dtype) for index in near]


def aggregate(clients: Sequence[TopK], rule: str) -> Tensor:
    """Expand the answers, then apply the rule; dense log-probabilities."""
    stacked = torch.stack([client.expand() for client in clients])
    if rule == "median":
        ordered, count = stacked.sort(0).values, len(clients)
        return ((ordered[(count - 1) // 2] + ordered[count // 2]) / 2).log_softmax(-1)
    assert rule == "mean_probs", rule
    return stacked.logsumexp(0).log_softmax(-1)


# Peers.


def liger(kind: str, temperature: float, device: str) -> Callable[[Tensor, Tensor], Tensor] | str:
    """liger_kernel's losses, which take log-probabilities."""
    if find_spec("liger_kernel") is None:
        return "not installed"
    if device != "cuda":
        return "its kernels need a GPU"
    from liger_kernel.transformers.functional import liger_jsd, liger_kl_div

    def run(student: Tensor, teacher: Tensor) -> Tensor:
        a, b = (student / temperature).log_softmax(-1), (teacher / temperature).log_softmax(-1)
        soft: Tensor
        if kind == "forward_kl":
            soft = liger_kl_div(a, b, reduction="batchmean", log_target=True)
        else:
            soft = liger_jsd(a, b, beta={"jsd": 0.5, "reverse_kl": 1.0}[kind])
        return soft * temperature**2

    return run


def liger_linear(temperature: float, device: str) -> Callable[[Tensor, Tensor, TeacherHead], Tensor] | str:
    """liger_kernel's JSD of two linear layers; at ``jsd_beta=0`` the forward KL, without ``T**2``."""
    if find_spec("liger_kernel") is None:
        return "not installed"
    if device != "cuda":
        return "its kernels need a GPU"
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    jsd = LigerFusedLinearJSD(jsd_beta=0.0, temperature=temperature)

    def run(hidden: Tensor, weight: Tensor, teacher: TeacherHead) -> Tensor:
        soft: Tensor = jsd(hidden, weight, teacher.hidden, teacher.weight, None)
        return soft * temperature**2

    return run


def cut_cross_entropy(device: str) -> Callable[[Tensor, Tensor, Tensor], Tensor] | str:
    """Apple's fused linear layer and cross-entropy; labels only, no teacher."""
    if find_spec("cut_cross_entropy") is None:
        return "not installed"
    if device != "cuda":
        return "its kernels need a GPU"
    from cut_cross_entropy import linear_cross_entropy

    run: Callable[[Tensor, Tensor, Tensor], Tensor] = linear_cross_entropy
    return run


def byzfl(rule: str, setting: int | None = None, elements: int = 0) -> Callable[[list[Tensor]], Tensor] | str:
    """ByzFL's aggregators, which take flat tensors and compute in float32."""
    if find_spec("byzfl") is None:
        return "not installed"
    if rule == "Median" and elements >= 1 << 24:
        return "its median is torch.quantile, which takes fewer than 2**24 numbers"
    import byzfl

    aggregator = getattr(byzfl, rule)() if setting is None else getattr(byzfl, rule)(setting)
    return lambda xs: aggregator([x.flatten() for x in xs])


def distillkit(vocab: int, k: int) -> tuple[Callable[..., Any], Callable[..., Any]] | str:
    """DistillKit's compressor (k exact float32 values, packed ids) and its decompressor to ids and values."""
    if find_spec("distillkit") is None:
        return "not installed"
    from distillkit.compression import DistributionQuantizationConfig, LogprobCompressor

    exact = DistributionQuantizationConfig(
        d=vocab, k=k, exact_k=k, exact_dtype="float32", residual_bins=[], polynomial_terms=[]
    )
    compressor = LogprobCompressor(exact)
    return (
        lambda logits: compressor.compress(logits.float().log_softmax(-1)),
        compressor.decompress_to_sparse,
    )
