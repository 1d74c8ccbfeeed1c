"""Processes that each hold some columns of a vocabulary, on this machine and without a port."""

import math
import time
from pathlib import Path

import torch
import torch.distributed as dist
from kernels.pairs import pairwise
from torch import multiprocessing

from feddistill_kernels import TopK, distillation_loss, kinds, softmax_divergence, topk_compress
from feddistill_kernels.vocabulary_parallel import _reference

N, V = 6, 29
WIDTHS = {2: [10, 19], 3: [12, 0, 17]}
INF = math.inf
LABELS = torch.tensor([0, V - 1, -100, 11, 12, 5])  # of the first and the last column, either side of a cut


def cases():
    """Name: what is given to the loss, as one process would be given it."""
    found = {}
    for kind, of, dtype, reduction in (
        *pairwise(kinds(), ("dense", "topk"), (torch.float64, torch.float32), ("mean", "none")),
        ("jsd", "dense", torch.float64, "mean"),
        ("jsd", "topk", torch.float64, "mean"),
    ):
        name = f"{kind} {of} {str(dtype)[6:]} {reduction}"
        found[name] = case(name, dtype, of, kind=kind, reduction=reduction, kd_weight=0.6)
    for kind in kinds():
        for of in ("dense", "topk"):
            found |= edges(kind, of)
    for dtype in (torch.bfloat16, torch.float16):
        for of in ("dense", "topk"):
            name = f"{str(dtype)[6:]} {of}"
            found[name] = case(name, dtype, of, kind="jsd", kd_weight=0.6)
    wide = found["jsd dense float64 mean"]
    found["labels alone"] = wide | {"kd_weight": 0.0}
    found["no labels"] = wide | {"labels": None, "kd_weight": 1.0, "reduction": "sum"}
    found["row weights"] = wide | {"row_weight": torch.tensor([0.0, 1.0, 5.0, 2.0, 0.5, 0.0])}
    found["all masked"] = wide | {"row_weight": torch.zeros(N)}
    found["in place"] = wide | {"inplace": True}
    found["without gradient"] = wide | {"grad": False}
    found["divergence"] = wide | {"call": "divergence"}
    found["no rows"] = {
        name: x[:0] if isinstance(x, torch.Tensor) else x for name, x in found["no labels"].items()
    }
    found["small chunks"] = wide | {"chunk": 40}
    found["small chunks of a topk"] = found["jsd topk float64 mean"] | {"chunk": 40}
    padded = torch.cat([wide["student"], torch.full((N, 3), torch.nan, dtype=torch.float64)], dim=1)
    found["pad"] = wide | {"student": padded}
    found["pad of a topk"] = found["jsd topk float64 mean"] | {"student": padded}
    everything = topk_compress(wide["teacher"], V, temperature=2.0)
    found["a topk of everything"] = wide | {"teacher": everything}
    return found


def edges(kind, of):
    """Float32 rows with what is hard in them, without labels."""
    plain = case(f"{kind} {of} edges", torch.float32, "dense", kind=kind, reduction="none", labels=None)
    ordinary = plain["teacher"]

    def changed(name, student, teacher=ordinary):
        given = topk_compress(teacher, 5, temperature=2.0) if of == "topk" else teacher
        return {f"{kind} {of} {name}": plain | {"student": student, "teacher": given}}

    student = plain["student"].clone()
    student[0, 3], student[1, :10], student[2, 12:], student[3, 20] = -INF, -INF, -INF, torch.nan
    found = changed("ruled out by the student", student)
    teacher = ordinary.clone()
    teacher[0, 3], teacher[1, :12], teacher[2, 12:], teacher[3, 20] = -INF, -INF, -INF, torch.nan
    found |= changed("ruled out by the teacher", plain["student"], teacher)
    found |= changed("huge", 1e4 + plain["student"])
    found |= changed("near", ordinary + 4e-4 * torch.randn(N, V, generator=generator("near")))
    if of == "topk":
        sure = torch.zeros(N, V)
        sure[:, [0, 28]] = torch.tensor([60.0, 58.0])  # a tail of 1e-12
        ids = torch.tensor([[28, 0]], dtype=torch.int32).expand(N, 2)
        kept = torch.tensor([[0.2, 0.7]]).log().expand(N, 2)
        tail = TopK(ids, kept, torch.full((N,), 0.1).log(), V)
        found[f"{kind} topk small tail"] = plain | {"student": sure, "teacher": tail}
        short = topk_compress(ordinary, 5, temperature=2.0)
        short.ids[0], short.ids[1, 2:] = -1, -1  # what is beside -1 is not looked at
        short.log_probs[0], short.log_tail[0] = torch.nan, 0.0
        found[f"{kind} topk unequal rows"] = plain | {"teacher": short}
    return found


def generator(name):
    return torch.Generator().manual_seed(sum(name.encode()))


def case(name, dtype, of, labels=LABELS, **settings):
    random = generator(name)
    student, teacher = (3 * torch.randn(2, N, V, generator=random, dtype=torch.float64)).to(dtype)
    given = topk_compress(teacher, 5, temperature=2.0, id_order=False) if of == "topk" else teacher
    whole = {"student": student, "teacher": given, "labels": labels}
    return whole | {"beta": 0.3, "temperature": 2.0} | settings


def run(case, group=None, columns=None):
    """Loss and gradient, of all or of this rank's columns; a ValueError's text instead of the loss."""
    case = {**case}
    chunk = case.pop("chunk", _reference.CHUNK)
    call, grad = case.pop("call", "loss"), case.pop("grad", True)
    leaf = case.pop("student")[:, columns or slice(None)].clone().requires_grad_(grad)
    teacher = case.pop("teacher")
    if columns is not None and isinstance(teacher, torch.Tensor):
        teacher = teacher[:, columns]
    before, _reference.CHUNK = _reference.CHUNK, chunk
    try:
        student = leaf * 1 if case.get("inplace") else leaf
        if call == "divergence":
            settings = {name: case[name] for name in ("kind", "beta", "temperature")}
            loss = softmax_divergence(student, teacher, group=group, **settings)
        else:
            loss = distillation_loss(student, teacher, group=group, **case)
        if not grad:
            return loss, None
        upstream = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
        (gradient,) = torch.autograd.grad(loss, leaf, upstream)
        return loss.detach(), gradient
    except ValueError as error:
        return str(error), None
    finally:
        _reference.CHUNK = before


def refusals(rank):
    """Name: what a rank is given, already cut."""
    widths = WIDTHS[2]
    student, teacher = (torch.zeros(4, widths[rank]) for _ in range(2))
    plain = {"student": student, "teacher": teacher}
    nothing, kept = torch.full_like(teacher, -INF), topk_compress(torch.zeros(4, V), 2)
    stray = kept.ids.clone()
    stray[2, 1] = V
    twice = kept.ids.clone()
    twice[1] = 3
    bad = TopK(stray, kept.log_probs, kept.log_tail, V)
    return {
        "rows": {"student": student[: 4 - rank], "teacher": teacher[: 4 - rank]},
        "dtype": {"student": student.double() if rank else student, "teacher": teacher},
        "label": plain | {"labels": torch.tensor([0, V - 1, V, 0]), "kd_weight": 0.5},
        "id": plain | {"teacher": bad},
        "id twice": plain | {"teacher": TopK(twice, kept.log_probs, kept.log_tail, V)},
        "student": {"student": nothing, "teacher": teacher},
        "teacher": plain | {"teacher": nothing},
        "pad": {"student": torch.zeros(4, 20), "teacher": teacher},
        "teachers": plain | {"teacher": kept if rank else teacher},
        "vocabulary": plain | {"teacher": topk_compress(torch.zeros(4, V + 1), 2)},
        "vocabularies": plain | {"teacher": topk_compress(torch.zeros(4, V - rank), 2)},
        "wider": plain | {"teacher": torch.zeros(4, 20)},
        "native": plain | {"backend": "native"},
    }


def _member(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=max(WIDTHS))
    groups = {world: dist.new_group(list(range(world))) for world in WIDTHS}
    alone = dist.new_group([0])
    answers = {world: {} for world in WIDTHS if rank < world}
    for world, found in answers.items():
        ends = [0, *torch.tensor(WIDTHS[world]).cumsum(0).tolist()]
        for name, given in cases().items():
            last = given["student"].shape[1] if rank == world - 1 else ends[rank + 1]
            found[name] = run(given, groups[world], slice(ends[rank], last))
    if rank < 2:
        for name, given in refusals(rank).items():
            try:
                answers[2][f"refused: {name}"] = run(given, groups[2])[0]
            except RuntimeError as error:
                answers[2][f"refused: {name}"] = str(error)
        answers[2]["refused: member"] = run(refusals(0)["id"], alone)[0]
    torch.save(answers, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def answers_of(folder: Path, seconds: float = 240):
    """By size of the group, what each of its processes found.  One of them imports torch, for all."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(
        ["torch.distributed", "feddistill_kernels"]
    )
    count = max(WIDTHS)
    context = multiprocessing.start_processes(
        _member, (str(folder),), nprocs=count, join=False, start_method="forkserver"
    )
    until = time.monotonic() + seconds
    while not context.join(timeout=1):
        if time.monotonic() > until:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{count} processes took more than {seconds} s")
    found = [torch.load(folder / f"{rank}.pt") for rank in range(count)]
    return {world: [answers[world] for answers in found[:world]] for world in WIDTHS}
