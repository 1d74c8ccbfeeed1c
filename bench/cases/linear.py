"""Losses on hidden states."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import feddistill_kernels as fk
from bench import baselines
from bench.cases.case import FULL, TEMPERATURE, Case, Setup, always, with_gradient, written_by_hand
from bench.timing import Contender


def linear_distillation_loss(device: str) -> Iterator[Case]:
    """Hidden states, weights and the teacher are read, two gradients are written; three products."""
    rows, width, vocab = 2048 * (4 if device == "cuda" else 1), 768, 50257
    for of in ("logits", "TopK", "labels"):
        counted = 4 * (2 * (rows + vocab) * width + rows * vocab * (of == "logits"))
        shape, make = {"N": rows, "H": width, "V": vocab}, partial(linear, of, rows, width, vocab)
        yield Case("linear_distillation_loss", f"of {of}", FULL, shape, counted, make, floor="products")


def linear(of: str, rows: int, width: int, vocab: int, setup: Setup) -> list[Contender]:
    generator = torch.Generator(setup.device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=setup.device)
    hidden, weight = draw(rows, width), draw(vocab, width) * (3 / math.sqrt(width))
    teacher: Any = hidden @ weight.T + draw(rows, vocab)
    if of == "TopK":
        teacher = fk.topk_compress(teacher, 64, temperature=TEMPERATURE)
    labels = torch.arange(rows, device=setup.device) * 7919 % vocab if of == "labels" else None
    pair = always(hidden.requires_grad_(), weight.requires_grad_())
    kd_weight = 0.0 if of == "labels" else 1.0

    def ours(h: Tensor, w: Tensor) -> Tensor:
        return fk.linear_distillation_loss(
            h, w, teacher, labels, temperature=TEMPERATURE, kd_weight=kd_weight
        )

    found = [
        Contender("ours", with_gradient(ours), pair, list),
        Contender("products", _products, pair, lambda _: [], list, note="its three matrix products alone"),
    ]
    eager = partial(baselines.linear_loss, teacher=teacher, temperature=TEMPERATURE, labels=labels)
    found += written_by_hand(setup, FULL, eager, (hidden, weight), with_gradient, list)
    if of == "labels" and (
        peer := setup.peer("cut_cross_entropy", lambda: baselines.cut_cross_entropy(setup.device))
    ):
        run = with_gradient(lambda h, w: peer(h, w, labels))
        found.append(Contender("cut_cross_entropy", run, pair, list))
    return found


def _products(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        logits = hidden @ weight.T
        return logits @ weight, logits.T @ hidden
