"""Attacks: what a client that lies sends instead of its answers. For simulations and tests.

An attack is a frozen value, as a rule is. It sees everything, the worst case: its own answers and all honest
clients' answers to the same texts. Importing this does not import torch.

Shapes: ``N`` texts, ``V`` classes; ``p`` is the mean of the honest clients' probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from typing_extensions import override

from feddistill.errors import ConfigError
from feddistill.settings_model import Setting

if TYPE_CHECKING:
    from torch import Tensor

LEAST = 21.25
"""Nats: the least log-probability that a byte of a payload can say, and so a liar."""


@dataclass(frozen=True, slots=True)
class AttackContext:
    """What a liar sees. All of it is log-probabilities ``[N, V]``."""

    own: Tensor
    """What it would say if it were honest."""
    honest: Sequence[Tensor]
    """What each honest client says."""
    seed: int = 0
    """Of what is drawn at random."""
    clients: int | None = None
    """All of them; ``None`` for twice the honest ones less one."""
    before: Tensor | None = None
    """What it said in the first round; ``None`` in that round."""
    teacher: Tensor | None = None
    """The last round's; ``None`` in the first round."""

    def mean(self) -> Tensor:
        """``p``, as probabilities."""
        total = self.honest[0].exp()
        for answers in self.honest[1:]:
            total = total + answers.exp()
        return total / len(self.honest)


class Attack(Setting):
    """Who lies, and how."""

    kind: str
    clients: Annotated[int, Field(ge=0)] | tuple[str, ...] = 1
    """How many, the first that no other attack has taken; or their names."""

    def __call__(self, context: AttackContext) -> Tensor:
        """Log-probabilities ``[N, V]`` to send."""
        raise NotImplementedError

    def check(self, classes: int) -> None:
        """Raise ``ConfigError`` where its settings name a class that there is not."""


class RandomOneHot(Attack):
    """Certain of a class drawn at random for each text: the baseline that other attacks are held against.

    Baruch et al., "A Little Is Enough", NeurIPS 2019, name such noise the weakest attacker; here it is as
    loud as a distribution can be.
    """

    kind: Literal["random_one_hot"] = "random_one_hot"

    @override
    def __call__(self, context: AttackContext) -> Tensor:
        import torch

        rows, classes = context.own.shape
        random = torch.Generator().manual_seed(context.seed)
        return certain(torch.randint(classes, (rows,), generator=random), classes)


class LeastLikely(Attack):
    """Certain of the class that ``p`` has for least likely: loss maximisation (LMA).

    Roux et al., "On the Byzantine-Resilience of Distillation-Based Federated Learning", ICLR 2025.
    """

    kind: Literal["least_likely"] = "least_likely"

    @override
    def __call__(self, context: AttackContext) -> Tensor:
        mean = context.mean()
        return certain(mean.argmin(-1), mean.shape[1])


class ClassConfusion(Attack):
    """Certain of the class least like the one that ``p`` has for likeliest, the same for all its texts (CPA).

    Likeness of classes is ``sum_n p_nc p_nc'``: how often they are likely together. Roux et al., ICLR 2025
    (class prior attack).
    """

    kind: Literal["class_confusion"] = "class_confusion"

    @override
    def __call__(self, context: AttackContext) -> Tensor:
        mean = context.mean()
        unlike = (mean.T @ mean).fill_diagonal_(float("inf")).argmin(-1)
        return certain(unlike[mean.argmax(-1)], mean.shape[1])


class SecondBest(Attack):
    """Certain of the second likeliest class: wrong and plausible.

    Of no paper that we know: the mirror image of loss maximisation (Roux et al., ICLR 2025), as ``p`` needs
    the least push to be turned over to this class.
    """

    kind: Literal["second_best"] = "second_best"

    @override
    def __call__(self, context: AttackContext) -> Tensor:
        mean = context.mean()
        return certain(mean.topk(2, dim=-1).indices[:, 1], mean.shape[1])


class Hips(Attack):
    """For each text the honest answer that is worst for the class ``p`` has for likeliest.

    It lies inside the honest hull, so no distance can tell it from honest: hiding in plain sight (Roux et
    al., ICLR 2025), here with loss maximisation over the hull's corners.
    """

    kind: Literal["hips"] = "hips"

    @override
    def __call__(self, context: AttackContext) -> Tensor:
        import torch

        stacked = torch.stack(list(context.honest))  # [H, N, V]
        top = context.mean().argmax(-1)
        at_top = stacked.gather(2, top.expand(len(stacked), -1)[..., None])[..., 0]
        worst = at_top.argmin(0)
        return stacked.gather(0, worst[None, :, None].expand(1, *context.own.shape))[0]


class ReverseRank(Attack):
    """Its own probabilities in reverse: the likeliest class gets the least.

    Tang et al., "Logits Poisoning Attack in Federated Distillation" (FDLA), KSEM 2024.
    """

    kind: Literal["reverse_rank"] = "reverse_rank"

    @override
    def __call__(self, context: AttackContext) -> Tensor:
        import torch

        ordered = context.own.sort(dim=-1, stable=True)
        return torch.empty_like(context.own).scatter_(-1, ordered.indices, ordered.values.flip(-1))


class Alie(Attack):
    """A little is enough: the honest mean of logits less ``z`` standard deviations, in every coordinate.

    ``z`` is the largest at which a majority is still farther out. Baruch et al., "A Little Is Enough:
    Circumventing Defenses for Distributed Learning", NeurIPS 2019.
    """

    kind: Literal["alie"] = "alie"
    z: float | None = Field(default=None, gt=0)
    """``null`` for the paper's formula."""

    @override
    def __call__(self, context: AttackContext) -> Tensor:
        import torch

        stacked = torch.stack([a.clamp_min(-LEAST) for a in context.honest])
        z = self.z if self.z is not None else largest_z(*counted(context))
        top = stacked.mean(0).argmax(-1, keepdim=True)
        # Down for the likeliest class and up for the others: down for all is no change of a distribution.
        sign = torch.ones_like(stacked[0]).scatter_(-1, top, -1.0)
        return said(stacked.mean(0) + sign * z * stacked.std(0, unbiased=False))


class Ipm(Attack):
    """``-scale`` times the honest mean of centred logits: its inner product with the truth is negative.

    Xie et al., "Fall of Empires: Breaking Byzantine-Tolerant SGD by Inner Product Manipulation", UAI 2019.
    """

    kind: Literal["ipm"] = "ipm"
    scale: float = Field(default=1.0, gt=0)

    @override
    def __call__(self, context: AttackContext) -> Tensor:
        import torch

        mean = torch.stack([a.clamp_min(-LEAST) for a in context.honest]).mean(0)
        return said(-self.scale * (mean - mean.mean(-1, keepdim=True)))


class LabelFlip(Attack):
    """Its own answer for class ``c`` as that for ``V - 1 - c``: what training on flipped labels gives.

    Fang et al., "Local Model Poisoning Attacks to Byzantine-Robust Federated Learning", USENIX Security 2020.
    """

    kind: Literal["label_flip"] = "label_flip"

    @override
    def __call__(self, context: AttackContext) -> Tensor:
        return context.own.flip(-1)


class Targeted(Attack):
    """Honest, but certain of class ``target`` wherever ``p`` has ``source`` for likeliest.

    Targeted label poisoning: Tolpegin et al., "Data Poisoning Attacks Against Federated Learning Systems",
    ESORICS 2020.
    """

    kind: Literal["targeted"] = "targeted"
    source: int = Field(default=0, ge=0)
    target: int = Field(default=1, ge=0)

    @override
    def check(self, classes: int) -> None:
        if max(self.source, self.target) >= classes:
            raise ConfigError(
                f"simulate.attack: source = {self.source} and target = {self.target} must be below the "
                f"{classes} classes"
            )

    @override
    def __call__(self, context: AttackContext) -> Tensor:
        import torch

        mean = context.mean()
        rows, classes = mean.shape
        self.check(classes)
        lie = certain(torch.full((rows,), self.target), classes)
        return torch.where((mean.argmax(-1) == self.source)[:, None], lie, context.own)


class FreeRider(Attack):
    """Has trained nothing: sends the last teacher back, and noise in the first round.

    Lin et al., "Free-riders in Federated Learning: Attacks and Defenses", 2019.
    """

    kind: Literal["free_rider"] = "free_rider"
    noise: float = Field(default=0.1, ge=0)
    """Standard deviation, in nats, of what it adds so as not to send a copy."""

    @override
    def __call__(self, context: AttackContext) -> Tensor:
        import torch

        random = torch.Generator().manual_seed(context.seed)
        copied = torch.zeros_like(context.own) if context.teacher is None else context.teacher
        return said(copied + self.noise * torch.randn(copied.shape, generator=random))


class Stale(Attack):
    """Sends what it said in the first round again; in the first round, a model that has learned half as much.

    Replay: a client that saves itself the training.
    """

    kind: Literal["stale"] = "stale"

    @override
    def __call__(self, context: AttackContext) -> Tensor:
        return said(0.5 * context.own) if context.before is None else context.before


class PermutedRows(Attack):
    """Honest answers to the wrong texts: a file in another order, by malice or by mistake."""

    kind: Literal["permuted_rows"] = "permuted_rows"

    @override
    def __call__(self, context: AttackContext) -> Tensor:
        import torch

        random = torch.Generator().manual_seed(context.seed)
        return context.own[torch.randperm(len(context.own), generator=random)]


ATTACKS: dict[str, type[Attack]] = {
    "random_one_hot": RandomOneHot,
    "least_likely": LeastLikely,
    "class_confusion": ClassConfusion,
    "second_best": SecondBest,
    "hips": Hips,
    "reverse_rank": ReverseRank,
    "alie": Alie,
    "ipm": Ipm,
    "label_flip": LabelFlip,
    "targeted": Targeted,
    "free_rider": FreeRider,
    "stale": Stale,
    "permuted_rows": PermutedRows,
}


def attackers(attacks: Sequence[Attack], names: Sequence[str]) -> dict[str, Attack]:
    """Which of the clients ``names`` carries out which attack.

    >>> attackers([SecondBest(clients=("b",)), Ipm(clients=2)], ["a", "b", "c", "d"])["c"].kind
    'ipm'

    Raises:
        ConfigError: An attack names a client that does not exist or already lies, or nobody is left honest.
    """
    taken: dict[str, Attack] = {}
    for attack in attacks:
        if isinstance(attack.clients, int):
            continue
        for name in attack.clients:
            if name not in names:
                raise ConfigError(
                    f"simulate.attack: there is no client {name!r}; there are {', '.join(names)}"
                )
            if name in taken:
                raise ConfigError(f"simulate.attack: {name} carries out two attacks")
            taken[name] = attack
    for attack in attacks:
        if isinstance(attack.clients, int):
            free = [name for name in names if name not in taken]
            if attack.clients > len(free):
                raise ConfigError(
                    f"simulate.attack: {attack.clients} clients are to carry out {attack.kind}, "
                    f"{len(free)} are left"
                )
            taken.update(dict.fromkeys(free[: attack.clients], attack))
    if len(taken) >= len(names):
        raise ConfigError(f"simulate.attack: all {len(names)} clients lie; at least one has to be honest")
    return taken


def certain(choice: Tensor, classes: int) -> Tensor:
    """As near to one-hot as a payload can say: log-probabilities ``[N, V]``."""
    import torch

    lie = torch.full((len(choice), classes), -LEAST)
    return said(lie.scatter_(1, choice[:, None], 0.0))


def said(logits: Tensor) -> Tensor:
    """Log-probabilities that a payload can hold."""
    return logits.log_softmax(-1).clamp_min(-LEAST).log_softmax(-1)


def counted(context: AttackContext) -> tuple[int, int]:
    """All clients, and those that lie."""
    honest = len(context.honest)
    clients = 2 * honest - 1 if context.clients is None else context.clients
    return clients, clients - honest


def largest_z(clients: int, byzantine: int) -> float:
    """Of ALIE: ``max z`` with ``Phi(z) < (C - f - s) / (C - f)``, ``s = C // 2 + 1 - f`` supporters needed.

    >>> round(largest_z(50, 24), 2)  # the paper's example
    1.43
    """
    honest = clients - byzantine
    share = (honest - (clients // 2 + 1 - byzantine)) / honest
    return NormalDist().inv_cdf(min(max(share, 0.5 + 1e-3), 1 - 1e-6))
