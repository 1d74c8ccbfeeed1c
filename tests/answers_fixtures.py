"""Answers to aggregate, and short ways to do it."""

import torch

from feddistill.aggregation.answers import RoundContext
from feddistill.aggregation.teacher import aggregate
from feddistill_kernels import topk_compress

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


def combine(answers, rule, weights=None, **settings):
    """The teacher."""
    settings.setdefault("context", RoundContext(labels=labels_of(len(answers[0]))))
    answerers = [lambda start, stop, a=a: a[start:stop] for a in answers]
    return aggregate(answerers, len(answers[0]), rule, weights, **settings).teacher


def total_variation(p, q):
    """Of log-probabilities, row by row."""
    return 0.5 * (p.exp() - q.exp()).abs().sum(-1)
