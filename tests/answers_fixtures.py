"""Answers to aggregate, and short ways to do it."""

import torch

from feddistill.aggregation.answers import RoundContext
from feddistill.aggregation.teacher import aggregate
from feddistill_kernels import TopK, topk_compress

CLIENTS, TEXTS, CLASSES = 7, 24, 11


def honest_answers(clients=CLIENTS, texts=TEXTS, classes=CLASSES, spread=1.0, seed=0):
    """Around one truth, each client with noise of its own."""
    torch.manual_seed(seed)
    truth = 2 * torch.randn(texts, classes)
    return [(truth + spread * torch.randn(texts, classes)).log_softmax(-1) for _ in range(clients)]


def labels_of(texts=TEXTS, classes=CLASSES):
    """Every other text has one."""
    labels = torch.arange(texts) % classes
    labels[::2] = -1
    return labels


def kept(answers, k=CLASSES):
    return [topk_compress(answer, k) for answer in answers]


def unequal(answers):
    """With up to two of the least likely entries of each row moved to its tail."""
    found = []
    for client, answer in enumerate(answers):
        rank = answer.log_probs.argsort(-1, descending=True).argsort(-1)
        kept = rank < answer.ids.shape[1] - (torch.arange(len(answer)) + client)[:, None] % 3
        moved = answer.log_probs.masked_fill(kept, -torch.inf).logsumexp(-1)
        found.append(
            TopK(
                answer.ids.masked_fill(~kept, -1),
                answer.log_probs.masked_fill(~kept, torch.nan),  # what is beside -1 is not looked at
                answer.log_tail.logaddexp(moved),
                answer.vocab_size,
            )
        )
    return found


def combine(answers, rule, weights=None, **settings):
    """The teacher."""
    settings.setdefault("context", RoundContext(labels=labels_of(len(answers[0]))))
    answerers = [lambda start, stop, a=a: a[start:stop] for a in answers]
    return aggregate(answerers, len(answers[0]), rule, weights, **settings).teacher


def total_variation(p, q):
    """Of log-probabilities, row by row."""
    return 0.5 * (p.exp() - q.exp()).abs().sum(-1)
