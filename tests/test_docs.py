"""What the documents say is so."""

import importlib.util
import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import click
import pytest
import torch
import yaml
from click.testing import CliRunner
from transformers import AutoTokenizer

from feddistill.cli import COMMANDS, main
from feddistill.config import load, parse
from feddistill.data.sources import read
from feddistill.runs import experiment, study

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])


@pytest.fixture
def tables(monkeypatch):
    """The script that writes the tables."""
    monkeypatch.setattr(sys, "path", [*sys.path])  # it adds to it
    spec = importlib.util.spec_from_file_location("build_tables", ROOT / "docs" / "build_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_those_of_the_committed_results(tables, capsys):
    assert tables.main(check=True) == 0, capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_paths_in_the_pages_exist(page):
    named = set(
        re.findall(
            r"`((?:docs|examples|feddistill|feddistill_kernels|csrc|cli|tests|bench)/[\w./-]*)`",
            page.read_text(),
        )
    )
    missing = {path for path in named if not (ROOT / path).exists()}
    assert not missing


def test_committed_plots_are_those_that_pages_show():
    shown = {
        (page.parent / name).resolve()
        for page in PAGES
        for name in re.findall(r"\]\(([^)\s]+\.svg)\)", page.read_text())
    }
    assert shown == {path for name in ("docs", "bench") for path in (ROOT / name).rglob("*.svg")}


def test_a_study_is_taken_with_the_plots_that_a_page_shows(tables, tmp_path, monkeypatch, capsys):
    page = tmp_path / "docs" / "studies" / "mine.md"
    page.parent.mkdir(parents=True)
    page.write_text("![Accuracy by round](../results/mine/rounds.svg)")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "RESULTS", tmp_path / "docs" / "results")
    for name in ("mine", "other"):
        folder = tmp_path / "runs" / name
        (folder / "figures").mkdir(parents=True)
        for file in ("figures/grid.svg", "figures/rounds.svg", "summary.csv", "runs.csv"):
            (folder / file).write_text("x")
        (folder / "result.json").write_text('{"recipe": 7}')
        (folder / "study.yaml").write_text("base: /somewhere/examples/studies/../quickstart.yaml")
    tables.take([str(tmp_path / "runs" / name) for name in ("mine", "other")])
    taken = {str(path.relative_to(tables.RESULTS)) for path in tables.RESULTS.rglob("*.*")}
    summaries = {
        f"{name}/{file}"
        for name in ("mine", "other")
        for file in ("summary.csv", "runs.csv", "study.yaml", "made_by.json")
    }
    assert taken == {"mine/rounds.svg", *summaries}
    assert (tables.RESULTS / "mine" / "study.yaml").read_text() == "base: ../quickstart.yaml"
    assert json.loads((tables.RESULTS / "mine" / "made_by.json").read_text())["recipe"] == 7
    assert capsys.readouterr().out == "no page shows a plot of other: none was copied\n"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_settings_in_the_pages_are_real(page):
    for line in page.read_text().splitlines():
        overrides = re.findall(r"--set '?([a-z][a-z0-9_.]*=[^\s'`]+)", line)
        if swept := re.search(r"feddistill sweep (\S+\.yaml)", line):
            assert study.cells(study.load(ROOT / swept[1], overrides))
        elif overrides:
            load(None, tuple(overrides))


@pytest.mark.parametrize("path", sorted((ROOT / "examples/studies").glob("*.yaml")), ids=lambda p: p.name)
def test_studies_mean_something(path):
    assert study.load(path).question


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_configurations_in_the_pages_are_real(page):
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), flags=re.DOTALL):
        parse(yaml.safe_load(block))


def test_the_losses_of_the_readme_run():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert blocks
    for block in blocks:
        space = {}
        exec(block, space)
        assert space["student"].grad.isfinite().all()


def test_the_page_of_the_losses_runs(tmp_path, monkeypatch):
    page = ROOT / "docs" / "distillation.md"
    monkeypatch.chdir(tmp_path)
    # The same graphs, without waiting for a C++ compiler.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    text, space = page.read_text(), {"__name__": page.stem}
    for block in re.finditer(r"```python\n(.*?)```", text, flags=re.DOTALL):
        above = text.count("\n", 0, block.start(1))  # so that a failure names the line of the page
        exec(compile("\n" * above + block[1], str(page), "exec"), space)
    assert "compiled" in space


def test_the_files_of_the_page_are_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    page = (ROOT / "docs" / "files.md").read_text()
    examples = re.findall(r"```sh\n(.*?)```\s+```yaml\n(.*?)```", page, flags=re.DOTALL)
    assert len(examples) == page.count("```sh") == 9
    proxies = []
    for shell, settings in examples:
        subprocess.run(["bash", "-c", shell], check=True)
        config = parse(yaml.safe_load(settings)).data
        table = read(config.source, "data.source")
        starts = table.starts or (0, 0)
        assert [text[start:] for text, start in zip(table.texts, starts, strict=True)] == [
            "a cat sat",
            "Zoë ran",
        ]
        assert table.labels in (("animal", "person"), None)
        if config.proxy.source is not None:
            proxies.append(read(config.proxy.source, "data.proxy.source").labels)
        if config.test.source is not None:
            assert read(config.test.source, "data.test.source").labels == ("1", "-1")
        if table.questions:
            assert table.answers == (((0, 5),), ((0, 3),))
        elif table.beside is not None:
            between = "\n" if table.beside == "pair_column" else " "
            assert table.texts == (f"What sat?{between}a cat sat", f"Who ran?{between}Zoë ran")
    assert proxies == [("1", None), (None, "animal", None)]
    assert config.proxy.labelled == "all"


def test_the_conversations_of_the_page_are_learned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "language_models.md").read_text()
    ((shell, settings),) = re.findall(r"```sh\n(.*?)```\s+```yaml\n(.*?)```", page, flags=re.DOTALL)
    subprocess.run(["bash", "-c", shell], check=True)
    (tmp_path / "run.yaml").write_text(settings)

    def feddistill(*arguments):
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 0, done.stderr
        return done.stdout

    feddistill("train", "run.yaml", "--out", "run")
    (text,) = experiment.check(load(tmp_path / "run.yaml"), build=False).test.texts
    assert re.fullmatch(r"<user> What is 1 \+ \d\?\n<assistant> It is \d\.\n", text)
    question, answer = text.split("\n<assistant> ")
    messages = [
        {"role": "user", "content": question.removeprefix("<user> ")},
        {"role": "assistant", "content": answer.strip()},
    ]
    (tmp_path / "one.jsonl").write_text(json.dumps({"messages": messages}))
    own = json.loads(feddistill("evaluate", "run", "--json"))
    command = ("evaluate", "run", "--texts", "one.jsonl", "--messages-column", "messages", "--json")
    assert json.loads(feddistill(*command)) == own
    feddistill("export", "run", "--out", "export")
    template = yaml.safe_load(settings)["language"]["chat_template"]
    tokenizer = AutoTokenizer.from_pretrained("export")
    assert tokenizer.chat_template == template
    assert tokenizer.apply_chat_template(messages, tokenize=False) == text


def commands():
    text = "\n".join(page.read_text() for page in PAGES)
    return sorted(set(re.findall(r"^ *(?:\$ )?feddistill (\w+)", text, flags=re.MULTILINE)))


def test_commands_in_the_pages_exist():
    assert commands()
    assert set(commands()) <= set(COMMANDS)


def command_lines():
    """``(command, options)`` of every command line in a code block or in backticks."""
    text = "\n".join(page.read_text() for page in PAGES)
    lines = re.findall(r"^ *(?:\$ )?feddistill (.+)$", text, flags=re.MULTILINE)
    lines += re.findall(r"`feddistill ([a-z][^`]+)`", text)
    for line in lines:
        words = re.sub(r"\s+#.*|'[^']*'", " ", line).split()
        yield words, {word.partition("=")[0] for word in words if word.startswith("--")}


def test_options_in_the_pages_exist():
    checked = 0
    for words, options in command_lines():
        command = main
        while isinstance(command, click.Group) and words and not words[0].startswith("-"):
            command = command.get_command(click.Context(command), words.pop(0))
            assert command is not None, words
        names = {name for parameter in command.params for name in parameter.opts} | {"--help", "--version"}
        assert options <= names, (words, options - names)
        checked += len(options)
    assert checked > 50


def test_the_tree_of_the_readme_is_that_of_the_package():
    text = (ROOT / "README.md").read_text()
    tree = text[text.index("## File structure") : text.index("## Documentation")]
    inside = tree[tree.index("\nfeddistill/\n") : tree.index("\ncli/")]
    named = set(re.findall(r"^  (\w+)/", inside, flags=re.MULTILINE)) | set(re.findall(r"\w+\.py", inside))
    modules = {path.name for path in (ROOT / "feddistill").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert named == modules - {"__init__.py", "__pycache__", "bench", "cli"}
    tops = set(re.findall(r"^(\w+)/", tree, flags=re.MULTILINE))
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert tops == {line.split("/")[0] for line in tracked.splitlines() if "/" in line} - {".ci"}
    assert len(text.splitlines()) <= 150


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.yaml")), ids=lambda p: p.name)
def test_examples_load(example):
    assert load(example).rounds >= 1
