"""Registers, shared memory and spills of the GPU kernels.

No GPU is needed.  Triton kernels are compiled for each target as the operators would launch them; CUDA C++
kernels are read from the compiled extension.

    python -m bench.resources --out bench/results/resources.json
    python -m bench.resources --one-each --check bench/results/resources.json
"""

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import torch

TARGETS = (80, 90, 100)
SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"


@dataclass(frozen=True)
class Resources:
    """Resources of one specialisation of a kernel for one target."""

    operator: str
    backend: str
    kernel: str
    """Name with the parameters of the specialisation."""
    target: str
    registers: int
    shared_bytes: int
    stack_bytes: int
    """Spilled registers and arrays in local memory; must be 0."""
    warps: int | None = None


def triton_launches() -> Iterator[tuple[str, Any]]:
    """Operator and launch of everything in ``CASES``, without duplicates."""
    from feddistill_kernels._triton import recorded

    seen = set()
    for operator, run in CASES.items():
        with recorded() as launches:
            run()
        for launch in launches:
            key = (operator, *_specialisation(launch))
            if key not in seen:
                seen.add(key)
                yield operator, launch


def _distillation() -> None:
    from feddistill_kernels.distillation import _triton as triton
    from feddistill_kernels.distillation._triton_kinds import KINDS

    settings = {"beta": 0.5, "temperature": 2.0, "kd": 4.0}

    def rows(
        n: int, vocab: int, dtype: torch.dtype, kind: str, kept: int, labels: bool, gradient: bool
    ) -> None:
        student, scale = torch.empty(n, vocab, dtype=dtype), torch.ones(n)
        teacher, ids, tail = student, None, None
        if kept:
            teacher, tail = torch.empty(n, kept), torch.empty(n)
            ids = torch.empty(n, kept, dtype=torch.int32)
        triton.rows(
            student,
            teacher,
            ids,
            tail,
            torch.zeros(n, dtype=torch.int64) if labels else None,
            scale,
            torch.empty_like(student) if gradient else None,
            vocab=vocab,
            kind=kind,
            ce=0.5 if labels else 0.0,
            **settings,
        )

    many = 4096  # enough that a row is not split
    for dtype in DTYPES:
        for kind in KINDS:
            for kept in (0, 64):
                rows(1, 128256, dtype, kind, kept, True, True)
                for gradient in (True, False):
                    rows(many, 4096 + 16, dtype, kind, kept, gradient, gradient)
    rows(many, 4096 + 16, torch.float16, "forward_kl", 0, False, True)
    rows(many, 4096 + 16, torch.bfloat16, "forward_kl", 0, False, True)
    for vocab in (2, 100, 1000, 4099):
        rows(many, vocab, torch.float32, "forward_kl", 0, False, True)
    x = torch.empty(2, 4096)
    triton.scale_into(x, torch.ones(()), x)


DTYPES = (torch.float32, torch.bfloat16)
"""float16 differs from bfloat16 only in how it is widened."""


def _topk() -> None:
    from feddistill_kernels.topk import _triton as triton

    for dtype in DTYPES:
        for vocab, k in ((100, 16), (4000, 64), (128256, 16), (128256, 64), (128256, 128)):
            for rows in (4, 1):  # as a row a program, and as several
                triton.compress(torch.zeros(rows, vocab, dtype=dtype), k, 2.0, True)
    triton.compress(torch.zeros(4, 4000), 64, 2.0, False)
    triton.compress(torch.zeros(4, 128256), 64, 2.0, False)
    triton.compress(torch.zeros(4, 128256, dtype=torch.bfloat16), 1024, 2.0, True)  # as many as it takes


def _aggregation() -> None:
    from feddistill_kernels import rules
    from feddistill_kernels.aggregation import _triton as triton
    from feddistill_kernels.aggregation._rules import Settings

    for clients, kept in ((5, 16), (10, 64)):
        ids = [torch.zeros(2, kept, dtype=torch.int32) for _ in range(clients)]
        log_probs, missing = [torch.zeros(2, kept)] * clients, [torch.zeros(2)] * clients
        for rule in rules():
            for mix in (None, 1):
                settings = Settings(rule, trim=1, keep=2, byzantine=1, mix=mix)
                triton.aggregate(ids, log_probs, missing, 128256, None, kept, settings)


def _order_statistics() -> None:
    from feddistill_kernels.order_statistics import _triton as triton

    for clients in CLIENTS:
        for dtype in DTYPES:
            xs = [torch.zeros(4096, dtype=dtype)] * clients
            for trim in {1, (clients - 1) // 2}:
                triton.trimmed(xs, trim)
            triton.around_median(xs, clients - 1)
    triton.trimmed([torch.zeros(4099)] * 5, 2)
    triton.trimmed([torch.zeros(4096)] * 32, 15)  # as many as it takes
    triton.around_median([torch.zeros(4096)] * 32, 31)  # as many as it takes


def _distances() -> None:
    from feddistill_kernels.distances import _triton as triton

    for clients in CLIENTS:
        for dtype in DTYPES:
            xs = [torch.zeros(4, 128256, dtype=dtype)] * clients
            triton.geometric_median(xs, True, 1e-6, 4)
            triton.krum(xs, (clients - 3) // 2, 1)
            if clients <= 8:
                triton.nearest_neighbour_mixing(xs, 1)


CLIENTS = (5, 8, 16)
CASES: dict[str, Callable[[], None]] = {
    "distillation": _distillation,
    "topk": _topk,
    "aggregation": _aggregation,
    "order_statistics": _order_statistics,
    "distances": _distances,
}


def _specialisation(launch: Any) -> tuple[Any, ...]:
    types = tuple(_type(x) for x in launch.arguments)
    return launch.kernel.fn.__name__, types, tuple(sorted(launch.constants.items())), launch.warps


def _type(argument: Any) -> Any:
    """Triton's name of an argument's type, and whether the value or address is a multiple of 16."""
    if isinstance(argument, tuple):
        return tuple(map(_type, argument))
    if isinstance(argument, torch.Tensor):
        return f"*{_NAMES[argument.dtype]}", True
    if isinstance(argument, float):
        return "fp32", False
    if argument == 1:
        return "constexpr", False
    return ("i32" if -(2**31) <= argument < 2**31 else "i64"), argument % 16 == 0


_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
    torch.float64: "fp64",
}


def compiled(launch: Any, target: int) -> Any:
    """Compile the kernel of ``launch`` for one target, as Triton's launcher would."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = launch.kernel.arg_names
    signature, constants, attributes = {}, dict(launch.constants), {}
    for position, argument in enumerate(launch.arguments):
        signature[names[position]] = _signature(argument)
        for path, one in _leaves(argument, (position,)):
            kind, even = _type(one)
            if kind == "constexpr":
                constants[path] = one
            elif even:
                attributes[path] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(launch.constants, "constexpr")
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": launch.warps, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def _signature(argument: Any) -> Any:
    return tuple(map(_signature, argument)) if isinstance(argument, tuple) else _type(argument)[0]


def _leaves(argument: Any, path: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], Any]]:
    """Leaves of nested tuples, with their paths."""
    if not isinstance(argument, tuple):
        yield path, argument
        return
    for index, part in enumerate(argument):
        yield from _leaves(part, (*path, index))


def of_triton(
    workers: int = 2, targets: tuple[int, ...] = TARGETS, one_each: bool = False
) -> list[Resources]:
    """Resources of every launch of ``CASES``, or of one per kernel, for every target."""
    launches = list(triton_launches())
    if one_each:
        first: dict[str, tuple[str, Any]] = {}  # later ones have more clients and take three times as long
        for operator, launch in launches:
            first.setdefault(launch.kernel.fn.__name__, (operator, launch))
        launches = list(first.values())
    context = multiprocessing.get_context(
        "fork"
    )  # the launches hold tensors and kernels, which are not pickled
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=_remember, initargs=(launches,)
    ) as pool:
        jobs = [(index, target) for index in range(len(launches)) for target in targets]
        return sorted(pool.map(_measured, jobs, chunksize=8), key=_order)


_known: list[tuple[str, Any]] = []


def _remember(launches: list[tuple[str, Any]]) -> None:
    _known[:] = launches
    torch.set_num_threads(1)


def _measured(job: tuple[int, int]) -> Resources:
    operator, launch = _known[job[0]]
    kernel = compiled(launch, job[1])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        (usage,) = usages(Path(file.name))
    return Resources(
        operator,
        "triton",
        _named(launch),
        f"sm_{job[1]}",
        usage.registers,
        kernel.metadata.shared,
        usage.stack_bytes,
        launch.warps,
    )


def _named(launch: Any) -> str:
    """Readable, unique name of a specialisation."""
    leaves = [one for _, one in _leaves(launch.arguments, ())]
    dtypes = dict.fromkeys(_type(x)[0][1:] for x in leaves if isinstance(x, torch.Tensor))
    constants = (f"{name}={value}" for name, value in launch.constants.items())
    uneven = "" if all(_type(x)[1] for x in leaves if isinstance(x, int)) else " uneven"
    return f"{launch.kernel.fn.__name__} {'/'.join(dtypes)} {' '.join(constants)}{uneven}"


def of_cuda() -> list[Resources]:
    """Resources of every kernel in the compiled extension; empty if it was built without CUDA."""
    from feddistill_kernels._native import compiled as extension

    module = extension()
    if isinstance(module, str) or not module.build_info()["cuda"].startswith("yes"):
        return []
    return sorted(usages(Path(module.__file__)), key=_order)


def usages(binary: Path) -> list[Resources]:
    """Resources of the kernels in a binary, read with ``cuobjdump``."""
    report = subprocess.run(
        [tool("cuobjdump"), "-res-usage", binary], capture_output=True, text=True, check=True
    )
    found, target = [], ""
    lines = iter(report.stdout.splitlines())
    for line in lines:
        if match := re.search(r"arch = (sm_\d+)", line) or re.search(r"for arch:? '?(sm_\d+)", line):
            target = match[1]
        elif match := re.match(r" *Function (.+):", line):
            numbers = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", next(lines)))
            stack = int(numbers["STACK"]) + int(numbers["LOCAL"])
            operator, name = _place(match[1])
            found.append(
                Resources(operator, "cuda", name, target, int(numbers["REG"]), int(numbers["SHARED"]), stack)
            )
    return found


def tool(name: str) -> str:
    """Path of a CUDA tool: on the search path, beside nvcc, or in Triton's wheel."""
    homes = [os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin"]
    if triton := find_spec("triton"):
        homes += [f"{home}/backends/nvidia/bin" for home in triton.submodule_search_locations or ()]
    found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(homes))
    if found is None:
        raise FileNotFoundError(f"{name} is neither on the path nor in {', '.join(homes)}")
    return found


def _place(mangled: str) -> tuple[str, str]:
    """Operator and demangled name of a C++ kernel."""
    name = mangled
    if mangled.startswith("_Z") and (filt := shutil.which("c++filt")):
        name = subprocess.run([filt, mangled], capture_output=True, text=True, check=True).stdout.strip()
        name = re.sub(r"\(anonymous namespace\)::|feddistill::|^void ", "", name)
        name = re.sub(r"\((?:[^()<>]|<.*?>)*\)$", "", name)
    kernel = base(name)
    homes = (file.stem for file in SOURCES.glob("*.cu") if re.search(rf"\b{kernel}\(", file.read_text()))
    return next(homes, ""), name


def _order(row: Resources) -> tuple[Any, ...]:
    return row.operator, row.backend, row.kernel, int(row.target[3:])


def differences(known: list[dict[str, Any]]) -> Iterator[str]:
    """One line for each kernel that ``known`` lacks or that no longer exists.  Compiles nothing.

    The extension's kernels are compared only if it was built with CUDA.
    """
    here = {
        ("triton", operator, _named(launch), f"sm_{target}")
        for operator, launch in triton_launches()
        for target in TARGETS
    } | {(row.backend, row.operator, row.kernel, row.target) for row in of_cuda()}
    backends = {backend for backend, *_ in here}
    listed = {
        (row["backend"], row["operator"], row["kernel"], row["target"])
        for row in known
        if row["backend"] in backends
    }
    for problem, those in (
        ("is not listed", here - listed),
        ("is listed, but does not exist", listed - here),
    ):
        for backend, operator, kernel, target in sorted(those):
            yield f"{target} {backend} {operator} {kernel}: {problem}"


def table(rows: list[Resources]) -> Iterator[str]:
    """Lines of text."""
    for row in rows:
        flag = "SPILLS " if row.stack_bytes else ""
        yield (
            f"{flag}{row.target:6} {row.backend:6} {row.registers:3} registers {row.shared_bytes:6} B shared "
            f"{row.stack_bytes:3} B stack  {row.operator} {row.kernel}"
        )


def base(kernel: str) -> str:
    """The name of a kernel without the parameters of the specialisation."""
    return re.split(r"[ <]", kernel, maxsplit=1)[0]


def markdown(rows: list[dict[str, Any]]) -> str:
    """Markdown table: kernels, with the maximum over their specialisations."""
    kernels: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for row in rows:
        kernels.setdefault((row["backend"], row["operator"], base(row["kernel"])), []).append(row)
    targets = [f"sm_{target}" for target in TARGETS]
    head = ["backend", "operator", "kernel", "compiled as", *(f"registers, {t}" for t in targets), "spills"]
    lines = [f"| {' | '.join(head)} |", "|---|---|---|" + "--:|" * (len(head) - 3)]
    for (backend, operator, kernel), found in sorted(kernels.items()):
        of = {t: [row["registers"] for row in found if row["target"] == t] for t in targets}
        count = len({row["kernel"] for row in found})
        spills = sum(row["stack_bytes"] > 0 for row in found)
        cells = [backend, operator, f"`{kernel}`", count, *(max(of[t]) for t in targets), spills]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="JSON file to write.")
@click.option("--workers", default=2, show_default=True)
@click.option("--target", "targets", type=int, multiple=True, default=TARGETS, show_default=True)
@click.option("--one-each", is_flag=True, help="Compile only the first specialisation of each Triton kernel.")
@click.option(
    "--check",
    type=click.Path(exists=True, path_type=Path),
    help="Compare the list of kernels with this JSON file first; fail if it differs.",
)
def main(
    out: Path | None, workers: int, targets: tuple[int, ...], one_each: bool, check: Path | None
) -> None:
    """Compile every GPU kernel for sm_80, sm_90 and sm_100; fail if one spills."""
    if check is not None and (stale := list(differences(json.loads(check.read_text())["kernels"]))):
        raise click.ClickException("\n".join(f"{check}: {line}" for line in stale))
    rows = of_triton(workers, targets, one_each) + of_cuda()
    for line in table(rows):
        click.echo(line)
    spilled = sum(row.stack_bytes > 0 for row in rows)
    click.echo(f"{len(rows)} kernels, {spilled} spill")
    if out is not None:
        out.write_text(as_json(versions(), rows))
    sys.exit(1 if spilled else 0)


def as_json(made_by: dict[str, str], rows: list[Resources]) -> str:
    """JSON with one line per kernel."""
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    return f'{{"versions": {json.dumps(made_by)},\n"kernels": [\n{lines}\n]}}\n'


def versions() -> dict[str, str]:
    """Versions of the compilers."""
    import triton

    from feddistill_kernels import build_info

    return {"triton": triton.__version__, "extension": build_info().get("cuda", "no")}


if __name__ == "__main__":
    main()
