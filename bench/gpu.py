"""The Python part of ``bench/gpu.sh``: list and measure the cases of a step, print the final table.

Needs feddistill_kernels and PyTorch, but not click; a GPU only to measure.
"""

import argparse
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

from bench import record

STEPS = {
    "loss": ("distillation_loss", "softmax_divergence"),
    "compression": ("topk_compress",),
    "linear": ("linear_distillation_loss",),
    "median": ("coordinate_median", "trimmed_mean"),
    "distances": ("geometric_median", "krum", "nearest_neighbour_mixing"),
    "answers": ("aggregate_topk",),
}
"""Step to its operators.  Each step is a process of its own, so that a crash affects no other step."""


def main(arguments: list[str]) -> int:
    """Run a command; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (
        ("cases", "list the cases of every step"),
        ("measure", "measure the cases of one step"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("--quick", action="store_true", help="two cases per operator, briefly")
        if name == "measure":
            command.add_argument("step", choices=STEPS)
            command.add_argument("--out", type=Path, required=True, help="result file to add the cases to")
            command.add_argument("--commit", help="commit to record if the tree is not a clone")
    command = commands.add_parser("note", help="record the outcome of a step")
    command.add_argument("step")
    command.add_argument("status", type=int)
    command.add_argument("seconds", type=float)
    command.add_argument("--said", default="")
    command.add_argument("--out", type=Path, required=True)
    commands.add_parser("name", help="print the name of this machine's result file")
    command = commands.add_parser("bars", help="compare a result file with the required speeds")
    command.add_argument("out", type=Path)
    given = parser.parse_args(arguments)
    if given.command == "note":
        record.note(given.out, given.step, given.status, given.seconds, given.said)
    elif given.command == "name":
        print(file_name())
    elif given.command == "cases":
        for step in STEPS:
            for case in cases(step, given.quick):
                print(f"{step}: {case.name}")
    elif given.command == "bars":
        return bars(given.out)
    else:
        return measure(given.step, given.out, given.quick, given.commit)
    return 0


def cases(step: str, quick: bool) -> list[Any]:
    """The cases that a step measures."""
    from bench.cases import chosen

    return chosen(STEPS[step], "cuda", quick=quick)


def measure(step: str, out: Path, quick: bool, commit: str | None) -> int:
    """Measure a step's cases and add each to ``out``; return 1 if one of ours fails."""
    from bench.cases import Setup
    from bench.names import BACKENDS, FAMILIES
    from bench.run import run

    setup = Setup("cuda", frozenset(FAMILIES) - ({"compile"} if quick else set()))
    before = record.load(out)

    def keep(results: dict[str, Any]) -> None:
        known = {**results, "commit": results["commit"] or commit}
        record.save(out, record.joined(before, known))

    progress = partial(print, flush=True)
    found = run(cases(step, quick), setup, quick=quick, echo=progress, keep=keep, go_on=True)
    failed = [
        f"{case['name']}: {name}: {entry['failed']}"
        for case in found["cases"]
        for name, entry in case["implementations"].items()
        if "failed" in entry and name in ("ours", *BACKENDS)
    ]
    for line in failed:
        print(f"failed: {line}")
    return int(bool(failed))


def bars(out: Path) -> int:
    """Print cases, requirements and steps; return 1 if a step failed or a requirement is missed."""
    from bench.bars import bars as requirements
    from bench.bars import described
    from bench.rivals import medians, rivals

    found = record.load(out)
    if found is None:
        print(f"there is no file {out}")
        return 1
    print(f"{'':66} {'ours':>9} {'native':>9} {'triton':>9} {'% copy':>7}  others, times ours")
    for case in found["cases"]:
        known = medians(case)
        ours = known.get("ours")
        cells = [
            f"{known[name]:9.3g}" if name in known else f"{'-':>9}" for name in ("ours", "native", "triton")
        ]
        share, others = "-", ""
        if ours:
            share = f"{100 * case['counted_bytes'] / ours / 1e6 / case['copy_gb_per_s']:.0f}"
            others = ", ".join(f"{name} {median / ours:.3g}" for name, median in rivals(case).items())
        lost = [
            f"{name}: {entry['failed']}"
            for name, entry in case["implementations"].items()
            if "failed" in entry
        ]
        print(f"{case['name']:66} {' '.join(cells)} {share:>7}  {'; '.join(filter(None, [others, *lost]))}")
    *lines, missed = ["0 missed"] if found.get("quick") else described(requirements(found))
    print(*lines, missed, sep="\n")
    steps = found.get("steps", [])
    for step in steps:
        ended = "ok" if step["status"] == 0 else "FAILED"
        print(f"step {step['step']}: {ended} after {step['seconds']:.0f} s {step.get('said', '')}".rstrip())
    return int(missed != "0 missed" or any(step["status"] for step in steps))


def file_name() -> str:
    """Name of the result file for this GPU, e.g. ``gpu-h100-80gb-hbm3.json``."""
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower().removeprefix("nvidia")).strip("-")
    return f"gpu-{plain}.json"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
