"""Results as lines of plain text, and as the README's table."""

from typing import Any

from bench.rivals import rivals

HEAD = (
    f"{'':20} {'median ms':>10} {'quartiles ms':>19} {'x limit':>8} {'GB/s':>8} {'% copy':>7}"
    f" {'x ours':>8} {'extra MB':>9}"
)


def lines(case: dict[str, Any]) -> str:
    """The case's name and limit, then one line a contender.

    ``x ours`` is how many times ours' time it takes; ``extra MB`` the most memory that a call adds.
    """
    ours = case["implementations"]["ours"]["median_ms"]
    text = [f"{case['name']}: limit {case['limit_ms']:.4g} ms, copy {case['copy_gb_per_s']:.1f} GB/s"]
    for name, found in case["implementations"].items():
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
    """A table of a few cases: milliseconds, and how far from the limit."""
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
    machine, versions = results["machine"], results["versions"]
    commit = f"commit {results['commit'][:7]}" if results["commit"] else "no commit"
    note = (
        f"Medians on {machine['cpu']}, {machine['threads']} threads, torch {versions['torch']}, "
        f"{commit}{', changed' if results['dirty'] else ''}, {results['date'][:10]}; a copy runs at "
        f"{results['copy_gb_per_s']:.3g} GB/s there. PyTorch is the fastest of the forms measured."
    )
    return "\n".join([*lines, "", note])
