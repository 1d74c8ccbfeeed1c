"""Aggregation of tensors and of compressed answers."""

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

import feddistill_kernels as fk

from .. import baselines
from ..timing import Contender
from .case import DTYPES, FULL, HALF, Case, Setup, always, itemsize, more

REFERENCE = 8192 * 128256  # numbers per client: with 8 clients, a sort in plain PyTorch takes seconds
_LONG = 1 << 22  # 17 MB a client in float32: five of them are more than a last-level cache holds


def coordinate_median(device: str) -> Iterator[Case]:
    """Counted bytes: every client is read, the result is written."""
    long = _LONG * more(device)
    if device == "cuda":
        yield _order_case("coordinate_median", HALF, 8, long, None, True, ("torch.median", "sort", "compile"))
        yield _order_case("coordinate_median", HALF, 8, REFERENCE, None, False, ())
        for dtype, count, size in ((HALF, 5, long), (HALF, 16, long), (FULL, 8, long), (FULL, 5, 1000)):
            yield _order_case("coordinate_median", dtype, count, size, None, False, ("sort",))
        return
    grid = [(dtype, count, long) for dtype in (FULL, HALF) for count in (5, 8, 16)]
    grid += [(FULL, 3, long), (FULL, 32, long // 4), (FULL, 8, long // 4), (FULL, 5, 1000)]
    for dtype, count, size in grid:
        headline = size == long and (count == 8 or (dtype == FULL and count in (5, 16)))
        yield _order_case("coordinate_median", dtype, count, size, None, headline)


def trimmed_mean(device: str) -> Iterator[Case]:
    """Counted bytes: every client is read, the result is written."""
    long = _LONG * more(device)
    if device == "cuda":
        yield _order_case("trimmed_mean", HALF, 8, long, 2, True)
        yield _order_case("trimmed_mean", HALF, 8, REFERENCE, 2, False, ())
        return
    for dtype, (count, size) in product((FULL, HALF), ((8, long), (16, long), (8, 1000))):
        yield _order_case("trimmed_mean", dtype, count, size, count // 4, (count, size) == (8, long))


def _order_case(
    op: str,
    dtype: str,
    count: int,
    size: int,
    trim: int | None,
    headline: bool,
    others: tuple[str, ...] = ("torch.median", "sort"),
) -> Case:
    if trim is None:
        make = partial(median, dtype, count, size, others=others)
    else:
        make = partial(trimmed, dtype, count, size, trim, others=others)
    counted = (count + 1) * size * itemsize(dtype)
    return Case(op, "", dtype, {"C": count, "n": size}, counted, make, headline)


def median(
    dtype: str,
    count: int,
    size: int,
    setup: Setup,
    others: tuple[str, ...] = ("torch.median", "sort"),
) -> list[Contender]:
    xs = _clients(setup, dtype, count, size)
    found = [Contender("ours", partial(fk.coordinate_median, xs))]
    if "torch.median" in others and "eager" in setup.compare:
        lower = None if count % 2 else partial(_lower_median, xs)
        note = "" if count % 2 else "the lower of the middle two"
        plain = partial(baselines.torch_median, xs)
        found.append(Contender("torch.median", plain, expected=lower, note=note))
    if "sort" in others and "eager" in setup.compare:
        found.append(Contender("sort", partial(baselines.sorted_median, xs)))
    if "compile" in others and "compile" in setup.compare:
        found.append(Contender("compile", partial(baselines.compiled(baselines.sorted_median), xs)))
    return found + (_byzfl(setup, "Median", xs) if others else [])


def _lower_median(xs: list[Tensor]) -> list[Tensor]:
    return [torch.stack(xs).sort(0).values[(len(xs) - 1) // 2]]


def trimmed(
    dtype: str, count: int, size: int, trim: int, setup: Setup, others: tuple[str, ...] = ("sort",)
) -> list[Contender]:
    xs = _clients(setup, dtype, count, size)
    found = [Contender("ours", partial(fk.trimmed_mean, xs, trim))]
    if "sort" in others and "eager" in setup.compare:
        found.append(Contender("sort", partial(baselines.trimmed_mean, xs, trim)))
    return found + (_byzfl(setup, "TrMean", xs, trim) if others else [])


def distance_rule(op: str, device: str) -> Iterator[Case]:
    """Counted bytes: clients are read for the distances, and again for the result if rows leave the cache."""
    reads, writes = (1, 1) if op == "geometric_median" else (2, 8 if op == "nearest_neighbour_mixing" else 1)
    grid = list(product((FULL, HALF), ((1024 * more(device), 4096), (32 * more(device), 128256))))
    if device == "cuda":
        grid = [(HALF, (32 * more(device), 128256))]
        if op != "nearest_neighbour_mixing":
            grid.insert(0, (HALF, (8192, 128256)))  # plain PyTorch runs out of memory here
    for dtype, (rows, width) in grid:
        counted = (reads * 8 + writes) * rows * width * itemsize(dtype)
        make = partial(distances, op, dtype, rows, width)
        yield Case(op, "", dtype, {"C": 8, "N": rows, "V": width}, counted, make)


def distances(op: str, dtype: str, rows: int, width: int, setup: Setup) -> list[Contender]:
    xs, byzantine = _clients(setup, dtype, 8, rows, width), 2
    settings = () if op == "geometric_median" else (byzantine,)
    found = [Contender("ours", partial(getattr(fk, op), xs, *settings), value=_flat)]
    if "eager" in setup.compare:
        eager = partial(getattr(baselines, op), xs, *settings)
        # Weiszfeld's iterations stop at different points.
        found.append(Contender("eager", eager, value=_flat, tolerance=1e-2))
    rules = {"krum": "Krum", "nearest_neighbour_mixing": "NNM"}
    return found + (_byzfl(setup, rules[op], xs, byzantine) if op in rules else [])


def _flat(result: Any) -> list[Tensor]:
    return [(result if isinstance(result, Tensor) else torch.stack(result)).flatten()]


def _byzfl(setup: Setup, rule: str, xs: list[Tensor], setting: int | None = None) -> list[Contender]:
    make = partial(baselines.byzfl, rule, setting, len(xs) * xs[0].numel())
    peer = setup.peer("byzfl", make)
    value = (lambda result: [result]) if rule in {"Median", "TrMean"} else _flat
    return [Contender("byzfl", peer, always(xs), value)] if peer else []


def _clients(setup: Setup, dtype: str, count: int, *shape: int) -> list[Tensor]:
    """One tensor plus noise that grows with the client's index; rows have mean 0."""
    generator = torch.Generator(setup.device).manual_seed(0)
    draw = partial(torch.randn, shape, generator=generator, device=setup.device)
    truth = draw()

    def client(index: int) -> Tensor:
        x = truth + (1 + index / 4) * draw()
        return (x - x.mean(-1, keepdim=True)).to(DTYPES[dtype])

    return [client(index) for index in range(count)]


def aggregate_topk(device: str) -> Iterator[Case]:
    """Counted bytes: ids and log-probabilities of all clients are read, at most as many are written."""
    count, rows, vocab, k = 10, 64 if device == "cpu" else 512, 128256, 64  # gigabytes if dense
    for rule in ("median", "mean_probs"):
        shape, counted = {"C": count, "N": rows, "V": vocab, "K": k}, 2 * count * rows * k * 8
        make = partial(answers, rule, count, rows, vocab, k)
        yield Case("aggregate_topk", rule, FULL, shape, counted, make)


def answers(rule: str, count: int, rows: int, vocab: int, k: int, setup: Setup) -> list[Contender]:
    generator = torch.Generator(setup.device).manual_seed(0)
    draw = partial(torch.randn, rows, vocab, generator=generator, device=setup.device)
    truth = draw() * 3
    kept = [fk.topk_compress(truth + draw(), k) for _ in range(count)]
    found = [Contender("ours", partial(fk.aggregate_topk, kept, rule), value=lambda r: [r.expand()])]
    if "eager" in setup.compare:
        found.append(Contender("eager", partial(baselines.aggregate, kept, rule)))
    return found
