"""Losses on hidden states."""

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import feddistill_kernels as fk

from .. import baselines
from ..timing import Contender
from .case import (
    DTYPES,
    FULL,
    HALF,
    ROUGH,
    TEMPERATURE,
    Case,
    Setup,
    always,
    itemsize,
    with_gradient,
    written_by_hand,
)


def linear_distillation_loss(device: str) -> Iterator[Case]:
    """Counted bytes: hidden states, weights and teacher are read, two gradients written.

    The limit is the time of the matrix products: three, or four with a teacher head.
    """
    dtype, rows, width, vocab = FULL, 2048, 768, 50257
    teachers: tuple[str, ...] = ("logits", "TopK", "labels")
    if device == "cuda":
        dtype, rows, width, vocab = HALF, 8192, 4096, 128256
        teachers = ("logits", "TopK", "teacher head", "labels")
    for of in teachers:
        numbers = 2 * (rows + vocab) * width + rows * vocab * (of == "logits")
        counted = itemsize(dtype) * (numbers + (rows + vocab) * width * (of == "teacher head"))
        make = partial(
            linear, of, rows, width, vocab, dtype=dtype, compiler=device == "cuda" and of == "logits"
        )
        shape = {"N": rows, "H": width, "V": vocab}
        yield Case(
            "linear_distillation_loss",
            f"of {of}",
            dtype,
            shape,
            counted,
            make,
            of == "logits" and dtype == HALF,
            "products",
        )


def linear(
    of: str, rows: int, width: int, vocab: int, setup: Setup, dtype: str = FULL, compiler: bool = False
) -> list[Contender]:
    generator = torch.Generator(setup.device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=setup.device)
    hidden, weight = draw(rows, width), draw(vocab, width) * (3 / math.sqrt(width))
    teacher: Any
    if of == "teacher head":
        parts = draw(rows, width), draw(vocab, width) * (3 / math.sqrt(width))
        teacher = fk.TeacherHead(*(x.to(DTYPES[dtype]) for x in parts))
    else:
        teacher = (hidden @ weight.T).add_(draw(rows, vocab)).to(DTYPES[dtype])
    if of == "TopK":
        teacher = fk.topk_compress(teacher, 64, temperature=TEMPERATURE)
    hidden, weight = hidden.to(DTYPES[dtype]), weight.to(DTYPES[dtype])
    labels = torch.arange(rows, device=setup.device) * 7919 % vocab if of == "labels" else None
    pair = always(hidden.requires_grad_(), weight.requires_grad_())
    kd_weight = 0.0 if of == "labels" else 1.0

    def ours(h: Tensor, w: Tensor) -> Tensor:
        return fk.linear_distillation_loss(
            h, w, teacher, labels, temperature=TEMPERATURE, kd_weight=kd_weight
        )

    products = partial(_products, teacher if of == "teacher head" else None)
    note = f"its {'four' if of == 'teacher head' else 'three'} matrix products alone"
    found = [
        Contender("ours", with_gradient(ours), pair, list),
        Contender("products", products, pair, lambda _: [], list, note=note),
    ]
    eager = partial(baselines.linear_loss, teacher=teacher, temperature=TEMPERATURE, labels=labels)
    if dtype == FULL:
        found += written_by_hand(setup, FULL, eager, (hidden, weight), with_gradient, list)
    else:  # products in the inputs' dtype, the loss in float32
        if "eager" in setup.compare:
            found.append(Contender("eager", with_gradient(eager), pair, list))
        if compiler and "compile" in setup.compare:
            found.append(Contender("compile", with_gradient(baselines.compiled(eager)), pair, list))
    if of == "labels" and (
        peer := setup.peer("cut_cross_entropy", lambda: baselines.cut_cross_entropy(setup.device))
    ):
        run = with_gradient(lambda h, w: peer(h, w, labels))
        found.append(Contender("cut_cross_entropy", run, pair, list))
    if of == "teacher head" and (
        peer := setup.peer("liger", lambda: baselines.liger_linear(TEMPERATURE, setup.device))
    ):
        run = with_gradient(lambda h, w: peer(h, w, teacher))
        found.append(Contender("liger", run, pair, list, tolerance=ROUGH.get(dtype)))
    return found


def _products(teacher: fk.TeacherHead | None, hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        if teacher is not None:
            teacher.hidden @ teacher.weight.T
        logits = hidden @ weight.T
        return logits @ weight, logits.T @ hidden
