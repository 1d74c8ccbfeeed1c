"""Results as plain text and as Markdown tables."""

import math
from typing import Any

from .bars import GPU
from .rivals import medians, rivals

HEAD = (
    f"{'':20} {'median ms':>10} {'quartiles ms':>19} {'x limit':>8} {'GB/s':>8} {'% copy':>7}"
    f" {'x ours':>8} {'extra MB':>9}"
)


def lines(case: dict[str, Any]) -> str:
    """The case's name and limit, then one line per contender.

    ``x ours`` is its time as a multiple of ours, ``extra MB`` the peak memory that a call adds.
    """
    ours = medians(case).get("ours", math.nan)
    text = [f"{case['name']}: limit {case['limit_ms']:.4g} ms, copy {case['copy_gb_per_s']:.1f} GB/s"]
    for name, found in case["implementations"].items():
        if "failed" in found:
            text.append(f"  {name:18} {found['failed']}")
            continue
        median = found["median_ms"]
        low, high = found["quartiles_ms"]
        speed = case["counted_bytes"] / median / 1e6
        extra = found["peak_extra_bytes"]
        text.append(
            f"  {name:18} {median:10.4g} {f'{low:.4g} - {high:.4g}':>19} {median / case['limit_ms']:8.2f}"
            f" {speed:8.2f} {100 * speed / case['copy_gb_per_s']:7.1f} {median / ours:8.2f}"
            f" {'n/a' if extra is None else f'{extra / 1e6:.1f}':>9}"
        )
    return "\n".join(text)


README = (
    "distillation_loss forward_kl float32 N=256 V=128256",
    "distillation_loss forward_kl bfloat16 N=256 V=128256",
    "distillation_loss forward_kl of TopK float32 N=256 V=128256 K=64",
    "topk_compress float32 N=256 V=128256 K=64",
    "topk_compress bfloat16 N=256 V=128256 K=64",
    "coordinate_median float32 C=8 n=4194304",
    "coordinate_median bfloat16 C=8 n=4194304",
    "trimmed_mean float32 C=8 n=4194304",
)


def readme(results: dict[str, Any]) -> str:
    """The README's table of a few cases: milliseconds, and the multiple of the limit."""
    cases = {case["name"]: case for case in results["cases"]}
    lines = [
        "| | ours, ms | PyTorch, ms | torch.compile, ms | ratio to the faster | × its limit |",
        "|---|---|---|---|---|---|",
    ]
    for name in README:
        case = cases[name]
        ours, others = case["implementations"]["ours"]["median_ms"], rivals(case)
        compiled = f"{others['torch.compile']:.3g}" if "torch.compile" in others else "–"
        quickest = min(others[key] for key in ("PyTorch", "torch.compile") if key in others)
        cells = (f"{ours:.3g}", f"{others['PyTorch']:.3g}", compiled, f"{quickest / ours:.3g}")
        lines.append(f"| {name} | {' | '.join(cells)} | {ours / case['limit_ms']:.3g} |")
    note = f"Medians on {results['machine']['cpu']}, {results['machine']['threads']} threads, {_run(results)}"
    return "\n".join([*lines, "", f"{note} PyTorch is the fastest of the forms measured."])


def of_gpu(results: dict[str, Any]) -> str:
    """A table of the cases with a requirement: ms, share of the copy's bandwidth, competitors' multiples."""
    cases = {case["name"]: case for case in results["cases"]}
    lines = [
        "| | ours, ms | native, ms | Triton, ms | % of copy | × PyTorch | × torch.compile | × Liger |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in GPU:
        found = medians(cases[name]) if name in cases else {}
        cells = [f"{found[key]:.3g}" if key in found else "–" for key in ("ours", "native", "triton")]
        if ours := found.get("ours"):
            case, others = cases[name], rivals(cases[name])
            speed = case["counted_bytes"] / ours / 1e6
            cells.append(f"{100 * speed / case['copy_gb_per_s']:.0f}" if case["floor"] == "copy" else "–")
            for other in ("PyTorch", "torch.compile", "liger"):
                cells.append(f"{others[other] / ours:.3g}" if other in others else "–")
        else:
            cells += ["–"] * 4
        lines.append(f"| {name} | {' | '.join(cells)} |")
    failed = [step["step"] for step in results.get("steps", []) if step["status"]]
    note = (
        f"Medians on {results['machine']['gpu']}, {_run(results)}" if "machine" in results else "Nothing ran."
    )
    return "\n".join([*lines, "", note + (f" Steps that failed: {', '.join(failed)}." if failed else "")])


def _run(results: dict[str, Any]) -> str:
    versions = results["versions"]
    commit = f"commit {results['commit'][:7]}" if results["commit"] else "no commit"
    speed = results["copy_gb_per_s"]
    state = f"{commit}{', changed' if results['dirty'] else ''}"
    return (
        f"torch {versions['torch']}, {state}, {results['date'][:10]}; "
        f"a copy runs at {speed:{'.0f' if speed > 1000 else '.3g'}} GB/s there."
    )
