"""Write measured tables into the documents, from committed results.

python docs/build_tables.py                      rewrite the tables between the markers
python docs/build_tables.py --check              list pages whose tables are out of date; exit status 1 if any
python docs/build_tables.py --collect RUN ...    print the results of several runs as one file
python docs/build_tables.py --study STUDY ...    copy the summaries and plots of studies to docs/results
"""

import csv
import json
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
ROWS = {
    "student (feddistill)": lambda m: m["student"],
    "clients, first round (mean)": lambda m: m["clients"]["before"]["mean"],
    "clients, last round (mean)": lambda m: m["clients"]["after"]["mean"],
    "public only, same steps": lambda m: m["public_only"],
    "each client alone (mean)": lambda m: m["local_only"]["mean"],
    "each client alone (best)": lambda m: m["local_only"]["best"],
    "centralized, same steps": lambda m: m["centralized"],
}


def quickstart() -> str:
    """The README's table: mean and standard deviation over the committed seeds."""
    runs = json.loads((RESULTS / "quickstart.json").read_text())["runs"]
    lines = ["| test set, mean ± standard deviation | accuracy | macro-F1 |", "|---|---|---|"]
    for name, of in ROWS.items():
        cells = []
        for metric in ("accuracy", "macro_f1"):
            values = [of(run["metrics"])[metric] for run in runs]
            cells.append(f"{fmean(values):.3f} ± {stdev(values):.3f}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    up, fedavg = (fmean(run["bytes"][key] for run in runs) for key in ("uplink", "fedavg_uplink_same_rounds"))
    seconds = ", ".join(f"{run['seconds']['total']:.0f}" for run in runs)
    e, rounds, seeds = runs[0]["environment"], runs[0]["rounds"], ", ".join(str(r["seed"]) for r in runs)
    note = (
        f"Seeds {seeds}; recipe {runs[0].get('recipe', 1)} of training; {e['threads']} threads, "
        f"{e['precision']}, torch {e['torch']}. All clients "
        f"together upload {up / 1e3:.0f} kB in {rounds} rounds; "
        f"FedAvg of this student would upload {fedavg / 1e6:.0f} MB. "
        f"{seconds} seconds of work, baselines included."
    )
    return "\n".join([*lines, "", note])


def language_model() -> str:
    """The language model example by seed: the student, the server alone, and each client alone."""
    sys.path.insert(0, str(ROOT))
    from feddistill.report import size

    runs = json.loads((RESULTS / "language_model.json").read_text())["runs"]
    of = {
        "student": lambda run: run["metrics"]["student"]["bits_per_byte"],
        "public texts only, same steps": lambda run: run["metrics"]["public_only"]["bits_per_byte"],
        "public texts only, last round": lambda run: [
            r["test_bits_per_byte"] for r in run["by_round"] if r["series"] == "public_only"
        ][-1],
        **{
            f"client {name}, alone": lambda run, name=name: run["metrics"]["local_only"]["clients"][name][
                "bits_per_byte"
            ]
            for name in runs[0]["metrics"]["local_only"]["clients"]
        },
    }
    seeds = [f"seed {run['seed']}" for run in runs]
    lines = [
        f"| mixed test text, bits per byte | {' | '.join(seeds)} | mean ± standard deviation |",
        f"|---|{'--:|' * (len(runs) + 1)}",
    ]
    for name, value in of.items():
        found = [value(run) for run in runs]
        cells = [*(f"{v:.3f}" for v in found), f"{fmean(found):.3f} ± {stdev(found):.3f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    e, bytes_ = runs[0]["environment"], runs[0]["bytes"]
    fedavg, lora = (size(bytes_[f"{name}_uplink_same_rounds"]) for name in ("fedavg", "lora"))
    seconds = ", ".join(f"{run['seconds']['total']:.0f}" for run in runs)
    note = (
        f"{runs[0]['rounds']} rounds; recipe {runs[0].get('recipe', 1)} of training; "
        f"threads: {e['threads']}, {e['precision']}; {seconds} seconds of work, "
        f"baselines included. All clients together upload {size(bytes_['uplink'])} "
        f"({bytes_['a_row']:.1f} B a token) with seed {runs[0]['seed']}; FedAvg of this student would upload "
        f"{fedavg}, federated LoRA {lora}."
    )
    return "\n".join([*lines, "", note])


def kernels() -> str:
    """The README's table of kernels, from ``make bench``."""
    sys.path.insert(0, str(ROOT))
    from bench.tables import readme

    return readme(json.loads((ROOT / "bench" / "results" / "cpu.json").read_text()))


def gpu() -> str:
    """Measurements on GPUs, from the files of ``bench/gpu.sh``; a sentence if there are none."""
    sys.path.insert(0, str(ROOT))
    from bench.tables import of_gpu

    files = [json.loads(path.read_text()) for path in sorted((ROOT / "bench" / "results").glob("gpu-*.json"))]
    if not files:
        return (
            "**Not yet measured on a GPU.** `bench/gpu.sh` measures and writes the result file "
            "from which this table is made."
        )
    return "\n\n".join(of_gpu(found) for found in files)


def resources() -> str:
    """Registers and spills of the GPU kernels, from ``python -m bench.resources``."""
    sys.path.insert(0, str(ROOT))
    from bench.resources import markdown

    return markdown(json.loads((ROOT / "bench" / "results" / "resources.json").read_text())["kernels"])


def rules() -> str:
    """Every rule with the first paragraph of its docstring."""
    sys.path.insert(0, str(ROOT))
    from feddistill.aggregation.rules import RULES

    lines = [
        "| rule | teacher | Byzantine of ten | range | needs | secure sums |",
        "|---|---|---|---|---|---|",
    ]
    for name, kind in RULES.items():
        rule = kind()
        words = " ".join((kind.__doc__ or "").split("\n\n")[0].replace("``", "`").split()).replace("|", "/")
        cells = (
            str(rule.tolerates(10)),
            "yes" if rule.in_range else "",
            ", ".join(sorted(rule.needs())),
            "yes" if rule.secure_sums else "",
        )
        lines.append(f"| `{name}` | {words} | {' | '.join(cells)} |")
    return "\n".join(lines)


def attacks() -> str:
    """Every attack with the first paragraph of its docstring."""
    sys.path.insert(0, str(ROOT))
    from feddistill.aggregation.attacks import ATTACKS

    lines = ["| attack | what is sent |", "|---|---|"]
    for name, kind in ATTACKS.items():
        words = " ".join((kind.__doc__ or "").split("\n\n")[0].replace("``", "`").split())
        lines.append(f"| `{name}` | {words} |")
    return "\n".join(lines)


def robustness() -> str:
    """Rules against attacks, from ``python -m bench.robustness``."""
    sys.path.insert(0, str(ROOT))
    from bench.heatmap import table

    return table(json.loads((ROOT / "bench" / "results" / "robustness.json").read_text()))


def sizes() -> str:
    """Bytes of payloads, from ``python -m bench.payload``."""
    sys.path.insert(0, str(ROOT))
    from bench.payload import table

    return table(json.loads((ROOT / "bench" / "results" / "payload.json").read_text()))


def tokenizers() -> str:
    """Maps and projection between tokenizers, from ``python -m bench.alignment``."""
    sys.path.insert(0, str(ROOT))
    from bench.alignment import table

    return table(json.loads((ROOT / "bench" / "results" / "alignment.json").read_text()))


def merging() -> str:
    """Speed and memory of the server, from ``python -m bench.aggregation``."""
    sys.path.insert(0, str(ROOT))
    from bench.aggregation import table

    return table(json.loads((ROOT / "bench" / "results" / "aggregation.json").read_text()))


def answering() -> str:
    """Speed of a client's predictions, from ``python -m bench.answering``."""
    from bench.answering import table

    return table(json.loads((ROOT / "bench" / "results" / "answering.json").read_text()))


def language() -> str:
    """A language model's step and the server's memory, from ``python -m bench.language``."""
    sys.path.insert(0, str(ROOT))
    from bench.language import table

    return table(json.loads((ROOT / "bench" / "results" / "language.json").read_text()))


def scale() -> str:
    """Cost of one more client, from ``python -m bench.federation``."""
    sys.path.insert(0, str(ROOT))
    from bench.federation import table

    return table(json.loads((ROOT / "bench" / "results" / "federation.json").read_text()))


def faults() -> str:
    """Injected faults and their outcome, from ``python -m tests.engines.faults``."""
    found = json.loads((RESULTS / "faults.json").read_text())
    lines = ["| fault | outcome | seconds |", "|---|---|--:|"]
    lines += [f"| {c['case'].replace('_', ' ')} | {c['outcome']} | {c['seconds']} |" for c in found]
    return "\n".join(lines)


def large() -> str:
    """Peak memory of both sides with large answers, from ``python -m tests.engines.large``."""
    found = json.loads((RESULTS / "large.json").read_text())
    sent = found["uplink_bytes"].values()
    lines = ["| clients | each sends, MB | messages | process | peak memory, MB |", "|--:|--:|--:|---|--:|"]
    for who, name in (
        ("coordinator", "coordinator, up to the teacher"),
        ("with_student", "coordinator, including the student"),
        ("clients", "a client, with its model"),
    ):
        peak = found[f"{who}_peak_bytes"] / 1e6
        lines.append(f"| {len(sent)} | {min(sent) / 1e6:.0f} | {found['messages']} | {name} | {peak:.0f} |")
    return "\n".join(lines)


def study(name: str) -> str:
    """Accuracy in a committed study: every method by the first axis; with several axes, only the student."""
    sys.path.insert(0, str(ROOT))
    from feddistill.config.methods import row_labels
    from feddistill.report import size

    with (RESULTS / name / "summary.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    labels = list(rows[0])[: list(rows[0]).index("who")]
    first, *rest = labels or [""]
    if rest:
        rows = [row for row in rows if row["who"] == "student"]
    sides = [", ".join(row[label] for label in rest) if rest else row_labels()[row["who"]] for row in rows]
    tops = [row[first] if first else "accuracy" for row in rows]
    what, across = ", ".join(rest) if rest else "method", first
    if first and not rest and not all(map(_is_number, tops)):  # names of cases are long: a row each
        sides, tops, what, across = tops, sides, first, ""
    columns = list(dict.fromkeys(tops))
    lines: dict[str, dict[str, dict[str, str]]] = {}
    for side, top, row in zip(sides, tops, rows, strict=True):
        lines.setdefault(side, {})[top] = row
    heads = [f"{across} {column}".strip() for column in columns]
    table = [f"| {what} | {' | '.join(heads)} | uploaded |", f"|---|{'--:|' * (len(heads) + 1)}"]
    for side, found in lines.items():
        cells = [_accuracy(found.get(column)) for column in columns]
        sent = [int(row["uplink"]) for row in found.values() if row["uplink"]]
        said = size(sent[0]) if sent else "–"
        if sent and max(sent) > 1.1 * min(sent):  # the axis changes it
            said = f"{size(min(sent))} to {size(max(sent))}"
        table.append(f"| {side} | {' | '.join(cells)} | {said} |")
    seeds = "/".join(sorted({row["seeds"] for row in rows}))
    of = "one seed" if seeds == "1" else f"mean ± standard deviation of {seeds} seeds"
    whose = "The student's accuracy" if rest else "Accuracy"
    note = f"{whose} on the test set in per cent, {of}."
    if seeds == "1":
        note += f" {chance({row['who'] for row in rows})}"
    made = json.loads((RESULTS / name / "made_by.json").read_text())
    source = f"`docs/results/{name}/summary.csv`, made with commit {made['commit']}, recipe {made['recipe']}"
    return "\n".join([*table, "", f"{note} All other metrics: {source}."])


def chance(methods: set[str]) -> str:
    """The differences that one seed cannot tell from chance: twice the standard deviation of a difference.

    From the seeds of the study of methods, pooled over its alphas: two students as independent runs, the
    student and another method paired by seed.
    """
    with (RESULTS / "methods" / "runs.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found: dict[str, dict[str, list[float]]] = {}
    student = {(row["alpha"], row["seed"]): float(row["accuracy"]) for row in rows if row["who"] == "student"}
    for row in rows:
        apart = 0.0 if row["who"] == "student" else student[row["alpha"], row["seed"]]
        values = found.setdefault(row["who"], {}).setdefault(row["alpha"], [])
        values.append(100 * (float(row["accuracy"]) - apart))
    pooled = {who: fmean(stdev(v) ** 2 for v in values.values()) ** 0.5 for who, values in found.items()}
    limits = [f"{2 * 2**0.5 * pooled['student']:.1f} points between two students"]
    names = {"public_only": "*public only*", "fedavg": "FedAvg", "centralized": "*centralized*"}
    limits += [f"{2 * pooled[who]:.1f} from {name}" for who, name in names.items() if who in methods]
    return (
        f"Within chance are differences of less than {', '.join(limits)}: twice the standard deviation of "
        "a difference between seeds in [methods](methods.md)."
    )


def paired(name: str) -> str:
    """Differences in accuracy between a study's student and the other methods, paired by seed."""
    sys.path.insert(0, str(ROOT))
    from feddistill.config.methods import row_labels

    with (RESULTS / name / "runs.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    axis = next(iter(rows[0]))
    of = {(row["who"], row[axis], row["seed"]): 100 * float(row["accuracy"]) for row in rows}
    values, seeds = (list(dict.fromkeys(row[key] for row in rows)) for key in (axis, "seed"))
    lines = [
        f"| student minus | {' | '.join(f'{axis} {v}' for v in values)} |",
        f"|---|{'--:|' * len(values)}",
    ]
    for who in dict.fromkeys(row["who"] for row in rows):
        if who not in ("student", "clients_before", "clients_after"):
            apart = [[of["student", v, s] - of[who, v, s] for s in seeds] for v in values]
            cells = [f"{fmean(found):+.1f} ± {stdev(found):.1f}" for found in apart]
            lines.append(f"| {row_labels()[who]} | {' | '.join(cells)} |")
    note = (
        "Difference in accuracy in percentage points, paired by seed: "
        f"mean ± standard deviation of {len(seeds)} seeds."
    )
    return "\n".join([*lines, "", note])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _accuracy(row: dict[str, str] | None) -> str:
    if row is None:
        return "–"
    spread = f" ± {100 * float(row['accuracy_std']):.1f}" if row["accuracy_std"] else ""
    return f"{100 * float(row['accuracy']):.1f}{spread}"


def shown(name: str) -> list[str]:
    """Names of the plots of a study that a page shows."""
    pages = [page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").rglob("*.md"))]
    return sorted(set(re.findall(rf"\bresults/{re.escape(name)}/([\w-]+\.svg)\)", "\n".join(pages))))


def take(folders: list[str]) -> None:
    """Copy a study's summaries, and those of its plots that a page shows, to where they are committed."""
    for folder in map(Path, folders):
        to, plots = RESULTS / folder.name, shown(folder.name)
        to.mkdir(parents=True, exist_ok=True)
        for path in (
            folder / "summary.csv",
            folder / "runs.csv",
            *(folder / "figures" / name for name in plots),
        ):
            shutil.copy(path, to)
        if not plots:
            print(f"no page shows a plot of {folder.name}: none was copied")
        result = json.loads(next(folder.rglob("result.json")).read_text())
        git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        made = {"commit": commit, "recipe": result.get("recipe", 1)}
        (to / "made_by.json").write_text(json.dumps(made) + "\n")
        # No absolute path: the base is named relative to the study's file, as the author wrote it.
        text = (folder / "study.yaml").read_text(encoding="utf-8")
        text = re.sub(r"^base: .*/examples/studies/", "base: ", text, flags=re.MULTILINE)
        (to / "study.yaml").write_text(text, encoding="utf-8")


TABLES = {
    "README.md": {"quickstart": quickstart, "kernels": kernels, "gpu": gpu},
    "docs/gpu.md": {"gpu": gpu, "resources": resources},
    "docs/aggregation.md": {"rules": rules, "attacks": attacks, "robustness": robustness, "merging": merging},
    "docs/payload.md": {"sizes": sizes},
    "docs/tokenizers.md": {"tokenizers": tokenizers},
    "docs/language_models.md": {
        "answering": answering,
        "language": language,
        "language_model": language_model,
    },
    "docs/deployment.md": {"scale": scale, "faults": faults, "large": large},
    **{
        str(page.relative_to(ROOT)): {
            "study": partial(study, page.stem),
            **({"paired": partial(paired, page.stem)} if "<!-- table: paired" in page.read_text() else {}),
        }
        for page in sorted((ROOT / "docs" / "studies").glob("*.md"))
    },
}


def main(check: bool) -> int:
    """Rewrite the tables between the markers; with ``check`` only list the pages that differ."""
    stale = []
    for name, tables in TABLES.items():
        path = ROOT / name
        text = new = path.read_text(encoding="utf-8")
        for table, make in tables.items():
            block = f"<!-- table: {table} -->\n{make()}\n<!-- end -->".replace("\\", r"\\")
            new, found = re.subn(rf"<!-- table: {table} -->.*?<!-- end -->", block, new, flags=re.DOTALL)
            if not found:
                raise SystemExit(f"{name} has no place for the table {table!r}")
        if new != text:
            stale.append(name)
            if not check:
                path.write_text(new, encoding="utf-8")
    if stale:
        print(f"{'differ from' if check else 'rewritten from'} the committed results: {', '.join(stale)}")
    return int(check and bool(stale))


def collect(runs: list[str]) -> str:
    """The results of several runs as one file."""
    return json.dumps(
        {"runs": [json.loads((Path(run) / "result.json").read_text()) for run in runs]}, indent=1
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--collect"]:
        print(collect(sys.argv[2:]))
        sys.exit()
    if sys.argv[1:2] == ["--study"]:
        take(sys.argv[2:])
    sys.exit(main("--check" in sys.argv[1:]))
