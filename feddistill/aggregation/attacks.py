"""Attacks: what Byzantine clients send instead of their answers. For simulations and tests.

An attack is a frozen value, as a rule is. It knows its client's honest answers and those of all honest
clients to the same texts, which is the worst case. Importing this module does not import torch.

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
"""Nats: the byte codes of a payload represent log-probabilities down to ``-LEAST``."""


@dataclass(frozen=True, slots=True)
class AttackContext:
    """What an attacker knows. All answers are log-probabilities ``[N, V]``."""

    own: Tensor
    """Its own honest answers."""
    honest: Sequence[Tensor]
    """The answers of each honest client."""
    seed: int = 0
    """Seed of random draws."""
    clients: int | None = None
    """Number of all clients; ``None`` for twice the honest ones less one."""
    before: Tensor | None = None
    """Its answers of the first round; ``None`` in that round."""
    teacher: Tensor | None = None
    """The previous round's teacher; ``None`` in the first round."""

    def mean(self) -> Tensor:
        """``p``, as probabilities."""
        total = self.honest[0].exp()
        for answers in self.honest[1:]:
            total = total + answers.exp()
        return total / len(self.honest)


class Attack(Setting):
    """A way in which some clients falsify their answers."""

    kind: str
    clients: Annotated[int, Field(ge=0)] | tuple[str, ...] = 1
    """Number of attackers, the first clients without another attack; or their names."""

    def __call__(self, context: AttackContext) -> Tensor:
        """The log-probabilities ``[N, V]`` to send."""
        raise NotImplementedError

    def check(self, classes: int) -> None:
        """Raise ``ConfigError`` if the settings name a class that does not exist."""


class RandomOneHot(Attack):
    """One-hot on a class drawn at random for each text: the baseline for other attacks.

    Baruch et al., "A Little Is Enough", NeurIPS 2019, call such noise the weakest attack; here it is as
    strong as a distribution can be.
    """

    kind: Literal["random_one_hot"] = "random_one_hot"

    @override
    def __call__(self, context: AttackContext) -> Tensor:
        import torch

        rows, classes = context.own.shape
        random = torch.Generator().manual_seed(context.seed)
        return one_hot(torch.randint(classes, (rows,), generator=random), classes)


class LeastLikely(Attack):
    """One-hot on the least likely class of ``p``: loss maximisation (LMA).

    Roux et al., "On the Byzantine-Resilience of Distillation-Based Federated Learning", ICLR 2025.
    """

    kind: Literal["least_likely"] = "least_likely"

    @override
    def __call__(self, context: AttackContext) -> Tensor:
        mean = context.mean()
        return one_hot(mean.argmin(-1), mean.shape[1])


class ClassConfusion(Attack):
    """One-hot on the class least similar to the likeliest class of ``p`` (CPA).

    The similarity of two classes is ``sum_n p_nc p_nc'``: how often they are likely together. Roux et al.,
    ICLR 2025 (class prior attack).
    """

    kind: Literal["class_confusion"] = "class_confusion"

    @override
    def __call__(self, context: AttackContext) -> Tensor:
        mean = context.mean()
        least_similar = (mean.T @ mean).fill_diagonal_(float("inf")).argmin(-1)
        return one_hot(least_similar[mean.argmax(-1)], mean.shape[1])


class SecondBest(Attack):
    """One-hot on the second likeliest class of ``p``: wrong, but plausible.

    We know no paper with this attack. It mirrors loss maximisation (Roux et al., ICLR 2025): moving ``p`` to
    the second class takes the least change.
    """

    kind: Literal["second_best"] = "second_best"

    @override
    def __call__(self, context: AttackContext) -> Tensor:
        mean = context.mean()
        return one_hot(mean.topk(2, dim=-1).indices[:, 1], mean.shape[1])


class Hips(Attack):
    """For each text, the honest answer that gives the likeliest class of ``p`` the least probability.

    The result is in the convex hull of the honest answers, so that no distance can detect it: hiding in plain
    sight (Roux et al., ICLR 2025), here with loss maximisation over the corners of the hull.
    """

    kind: Literal["hips"] = "hips"

    @override
    def __call__(self, context: AttackContext) -> Tensor:
        import torch

        honest = torch.stack(list(context.honest))  # [H, N, V]
        top = context.mean().argmax(-1)
        of_top = honest.gather(2, top.expand(len(honest), -1)[..., None])[..., 0]
        worst = of_top.argmin(0)
        return honest.gather(0, worst[None, :, None].expand(1, *context.own.shape))[0]


class ReverseRank(Attack):
    """The attacker's own probabilities in reverse order: the likeliest class gets the least.

    Tang et al., "Logits Poisoning Attack in Federated Distillation" (FDLA), KSEM 2024.
    """

    kind: Literal["reverse_rank"] = "reverse_rank"

    @override
    def __call__(self, context: AttackContext) -> Tensor:
        import torch

        ordered = context.own.sort(dim=-1, stable=True)
        return torch.empty_like(context.own).scatter_(-1, ordered.indices, ordered.values.flip(-1))


class Alie(Attack):
    """A little is enough: the mean of the honest logits, shifted by ``z`` standard deviations per coordinate.

    ``z`` is the largest shift with which enough honest clients are still farther from the mean. Baruch et
    al., "A Little Is Enough: Circumventing Defenses for Distributed Learning", NeurIPS 2019.
    """

    kind: Literal["alie"] = "alie"
    z: float | None = Field(default=None, gt=0)
    """``null`` for the formula of the paper."""

    @override
    def __call__(self, context: AttackContext) -> Tensor:
        import torch

        honest = torch.stack([a.clamp_min(-LEAST) for a in context.honest])
        z = self.z if self.z is not None else largest_z(*client_counts(context))
        top = honest.mean(0).argmax(-1, keepdim=True)
        # Down for the likeliest class and up for the others: down for all would not change a distribution.
        sign = torch.ones_like(honest[0]).scatter_(-1, top, -1.0)
        return clipped(honest.mean(0) + sign * z * honest.std(0, unbiased=False))


class Ipm(Attack):
    """``-scale`` times the mean of the honest centred logits: its inner product with that mean is negative.

    Xie et al., "Fall of Empires: Breaking Byzantine-Tolerant SGD by Inner Product Manipulation", UAI 2019.
    """

    kind: Literal["ipm"] = "ipm"
    scale: float = Field(default=1.0, gt=0)

    @override
    def __call__(self, context: AttackContext) -> Tensor:
        import torch

        mean = torch.stack([a.clamp_min(-LEAST) for a in context.honest]).mean(0)
        return clipped(-self.scale * (mean - mean.mean(-1, keepdim=True)))


class LabelFlip(Attack):
    """The attacker's own answer with class ``c`` as ``V - 1 - c``, as if it had trained on flipped labels.

    Fang et al., "Local Model Poisoning Attacks to Byzantine-Robust Federated Learning", USENIX Security 2020.
    """

    kind: Literal["label_flip"] = "label_flip"

    @override
    def __call__(self, context: AttackContext) -> Tensor:
        return context.own.flip(-1)


class Targeted(Attack):
    """Honest, except one-hot on class ``target`` if the likeliest class of ``p`` is ``source``.

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
        wrong = one_hot(torch.full((rows,), self.target), classes)
        return torch.where((mean.argmax(-1) == self.source)[:, None], wrong, context.own)


class FreeRider(Attack):
    """The previous teacher plus noise, without any training; noise alone in the first round.

    Lin et al., "Free-riders in Federated Learning: Attacks and Defenses", 2019.
    """

    kind: Literal["free_rider"] = "free_rider"
    noise: float = Field(default=0.1, ge=0)
    """Standard deviation of the noise, in nats, which hides that the answer is a copy."""

    @override
    def __call__(self, context: AttackContext) -> Tensor:
        import torch

        random = torch.Generator().manual_seed(context.seed)
        copied = torch.zeros_like(context.own) if context.teacher is None else context.teacher
        return clipped(copied + self.noise * torch.randn(copied.shape, generator=random))


class Stale(Attack):
    """The first round's answers in every round; in the first round, log-probabilities halved.

    Replay by a client that avoids the cost of training.
    """

    kind: Literal["stale"] = "stale"

    @override
    def __call__(self, context: AttackContext) -> Tensor:
        return clipped(0.5 * context.own) if context.before is None else context.before


class PermutedRows(Attack):
    """Honest answers, but in random order: each to a wrong text, by malice or by mistake."""

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
    """The attackers among the clients ``names``, each with its attack.

    >>> attackers([SecondBest(clients=("b",)), Ipm(clients=2)], ["a", "b", "c", "d"])["c"].kind
    'ipm'

    Raises:
        ConfigError: An attack names a client that does not exist or has another attack, or no client is
            left honest.
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
        raise ConfigError(f"simulate.attack: all {len(names)} clients attack; at least one has to be honest")
    return taken


def one_hot(choice: Tensor, classes: int) -> Tensor:
    """Log-probabilities ``[N, V]``, as near to one-hot on ``choice [N]`` as a payload can represent."""
    import torch

    logits = torch.full((len(choice), classes), -LEAST)
    return clipped(logits.scatter_(1, choice[:, None], 0.0))


def clipped(logits: Tensor) -> Tensor:
    """Normalise to log-probabilities that a payload can represent."""
    return logits.log_softmax(-1).clamp_min(-LEAST).log_softmax(-1)


def client_counts(context: AttackContext) -> tuple[int, int]:
    """The numbers of all clients and of attackers."""
    honest = len(context.honest)
    clients = 2 * honest - 1 if context.clients is None else context.clients
    return clients, clients - honest


def largest_z(clients: int, byzantine: int) -> float:
    """ALIE's ``max z`` with ``Phi(z) < (C - f - s) / (C - f)``, where ``s = C // 2 + 1 - f`` is the number of
    honest clients that the attackers need on their side.

    >>> round(largest_z(50, 24), 2)  # the paper's example
    1.43
    """
    honest = clients - byzantine
    share = (honest - (clients // 2 + 1 - byzantine)) / honest
    return NormalDist().inv_cdf(min(max(share, 0.5 + 1e-3), 1 - 1e-6))
