"""A stored teacher whose rows keep different numbers of ids, and one that keeps an id twice."""

import math
import sys

import torch

from feddistill_kernels import TopK, aggregate_topk, softmax_divergence, use_backend

V = 6
logits = torch.tensor([[0.3, -1.2, 2.0, 0.1, -0.4, 1.1]])
kept = {2: 0.5, 5: 0.2}  # the other 0.3 is the tail
p = logits[0].double().softmax(-1)
tail = 1 - sum(float(p[id]) for id in kept)
right = sum(q * math.log(q / p[id]) for id, q in kept.items()) + 0.3 * math.log(0.3 / tail)


def teacher(pad_id, pad_log_prob):
    ids = torch.tensor([[*kept, pad_id]], dtype=torch.int32)
    log_probs = torch.tensor([[*map(math.log, kept.values()), pad_log_prob]])
    return TopK(ids, log_probs, torch.tensor([math.log(0.3)]), V)


def value(of, *given):
    try:
        return float(of(*given))
    except (ValueError, RuntimeError) as error:
        return str(error)


def loss(given):
    return softmax_divergence(logits, given)


def mean_of_two(given):
    return aggregate_topk([given, given], "mean_probs").expand().exp()[0, 2]


wrong = 0
for backend in ("reference", "native"):
    with use_backend(backend):
        for pad in (-math.inf, 0.0):
            for of, true in ((loss, right), (mean_of_two, 0.5)):
                found = value(of, teacher(-1, pad))
                wrong += not (isinstance(found, float) and abs(found - true) < 1e-5)
                print(f"{backend}, {of.__name__}, id -1 beside {pad}: {found}; right is {true:.6f}")
        for of in (loss, mean_of_two):
            found = value(of, teacher(2, math.log(0.5)))
            wrong += not isinstance(found, str)
            print(f"{backend}, {of.__name__}, id 2 twice: {found}; right is an error")
sys.exit(bool(wrong))
