"""Apply each mutant of ``mutants.toml`` to a copy of the tree and run the tests of its area.

python -m tests.mutants --only NAME, or --area AREA, or all; docs/testing.md has the areas.
"""

import argparse
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from queue import SimpleQueue
from threading import Lock
from typing import Any

ROOT = Path(__file__).parents[2]
TABLE = Path(__file__).with_name("mutants.toml")
AREAS = ROOT / "docs" / "testing.md"
SLOWER, PATIENCE = 10, 300
"""A mutant's tests may take this many times their time on the unchanged copy, and so many seconds more."""


class Wrong(Exception):
    """A mistake in the table, in the areas or in the tree: one line, and exit status 2."""


@dataclass(frozen=True, slots=True)
class Mutant:
    """One textual change, and what goes wrong with it."""

    name: str
    area: str
    file: str
    old: str
    new: str
    fault: str

    def text(self, tree: Path) -> str:
        """The mutated content of the file."""
        path = tree / self.file
        if not path.is_file():
            raise Wrong(f"mutant {self.name} is stale: there is no {self.file}")
        before = path.read_text()
        if (count := before.count(self.old)) != 1:
            raise Wrong(f"mutant {self.name} is stale: its old text occurs {count} times in {self.file}")
        return before.replace(self.old, self.new)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the tests said: ``by`` is the test that failed, or how the tests ended otherwise."""

    killed: bool
    by: str
    seconds: float


def mutants() -> list[Mutant]:
    """The table, in its order."""
    found = [Mutant(name=name, **entry) for name, entry in tomllib.loads(TABLE.read_text()).items()]
    for mutant in found:
        if mutant.old == mutant.new:
            raise Wrong(f"mutant {mutant.name} changes nothing")
    return found


def areas() -> dict[str, list[str]]:
    """The rows ``| area | `tests/...`, ... |`` of docs/testing.md."""
    rows = re.findall(r"^\| ([\w -]+?) \| (`tests/[^|]*) \|$", AREAS.read_text(), flags=re.MULTILINE)
    return {area: re.findall(r"`(tests/[^`]+)`", files) for area, files in rows}


class Build:
    """The objects of the extension that `make setup` left in the build folder, and how each was compiled."""

    def __init__(self, tree: Path):
        folders = sorted(tree.glob("build/*/build.ninja"), key=lambda path: path.stat().st_mtime)
        if not folders:
            raise Wrong(f"{tree} has no build/*/build.ninja: run make setup")
        self.folder = folders[-1].parent
        self.sources: dict[str, str] = {}
        """Source, relative to the tree, by object."""
        self._values: dict[str, dict[str, str]] = {}
        self._inputs: list[str] = []
        self.module = ""
        text = folders[-1].read_text().replace("$\n", "")
        for out, rule, inputs, body in re.findall(r"^build (.+?): (\S+) (.*)\n((?:  .*\n)*)", text, re.M):
            names = inputs.split(" | ")[0].split(" || ")[0].split()
            values = dict(re.findall(r"^  (\w+) = (.*)$", body, re.M))
            if rule.startswith("CXX_COMPILER_"):
                self._values[out] = values
                self.sources[out] = names[0][names[0].index("/csrc/") + 1 :]
            elif rule.startswith("CXX_MODULE_LIBRARY_LINKER_"):
                self.module, self._inputs, self._values[out] = out, names, values
        missing = [name for name in [self.module, *self._inputs] if not (self.folder / name).is_file()]
        if not self.module or missing:
            raise Wrong(f"{self.folder} is not complete ({', '.join(missing)}): run make setup")
        cache = (self.folder / "CMakeCache.txt").read_text()
        (self._compiler,) = re.findall(r"^CMAKE_CXX_COMPILER:\w+=(.*)$", cache, re.M)

    def objects(self, file: str, tree: Path) -> list[str]:
        """The objects that contain ``file``, a source or a header."""
        changed = {file}
        texts = {path: path.read_text() for path in (tree / "csrc").rglob("*.*")}
        while True:
            users = {
                str(path.relative_to(tree))
                for path, text in texts.items()
                for name in re.findall(r'#include "(.+?)"', text)
                if str((path.parent / name).resolve().relative_to(tree)) in changed
            }
            if users <= changed:
                return [out for out, source in self.sources.items() if source in changed]
            changed |= users

    def make(self, tree: Path, objects: Sequence[str], module: Path, run: Callable[..., str]) -> None:
        """Compile ``objects`` from the sources in ``tree`` and link them with the others."""
        inputs = {name: str(self.folder / name) for name in self._inputs}
        with tempfile.TemporaryDirectory(dir=tree.parent) as scratch:
            for number, out in enumerate(objects):
                values, inputs[out] = self._values[out], f"{scratch}/{number}.o"
                flags = shlex.split(" ".join(values.get(key, "") for key in ("DEFINES", "INCLUDES", "FLAGS")))
                run([self._compiler, *flags, "-o", inputs[out], "-c", str(tree / self.sources[out])])
            values = self._values[self.module]
            flags = shlex.split(
                f"-fPIC -shared {values.get('LANGUAGE_COMPILE_FLAGS', '')} {values['LINK_FLAGS']}"
            )
            libraries = shlex.split(" ".join(values.get(key, "") for key in ("LINK_PATH", "LINK_LIBRARIES")))
            run([self._compiler, *flags, "-o", f"{scratch}/linked.so", *inputs.values(), *libraries])
            module.unlink()  # not in place: a process may have it mapped
            shutil.move(f"{scratch}/linked.so", module)


class Copy:
    """A copy of the tree, with an interpreter that imports the packages from it and the rest as this does.

    The finder of an editable installation is asked before any path. So the copy has a virtual environment of
    its own, with paths and no finder.
    """

    def __init__(self, tree: Path, folder: Path, build: Build):
        self.root, self.build = (folder / "tree").resolve(), build
        self.output = ""
        """Output of the last test run."""
        self._changes = 0
        self._processes: set[subprocess.Popen[bytes]] = set()
        self._closed = False
        names = _git(tree, "ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0")
        for name in filter(None, names):
            if (tree / name).is_file():
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(tree / name, self.root / name)
        for name in ("cli", "bench"):  # where the installation puts them
            (self.root / "feddistill" / name).symlink_to(self.root / name)
        self.module = self.root / "feddistill_kernels" / build.module
        shutil.copy2(build.folder / build.module, self.module)
        bin = self.root / ".venv" / "bin"
        venv.create(self.root / ".venv", symlinks=True)
        (site,) = (self.root / ".venv").glob("lib/python*/site-packages")
        packages = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (site / "mutants.pth").write_text("\n".join([str(self.root), *packages]))
        (bin / "feddistill").write_text(f'#!/bin/sh\nexec {bin}/python -m feddistill.cli "$@"\n')
        (bin / "feddistill").chmod(0o755)
        self._python = str(bin / "python")
        self._temporary = folder / "tmp"
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        self._environment = inherited | {
            "OMP_NUM_THREADS": "1",
            "PATH": f"{bin}:{os.environ['PATH']}",
            "TMPDIR": str(self._temporary),
            "VIRTUAL_ENV": str(self.root / ".venv"),
        }

    def close(self) -> None:
        """End what runs."""
        self._closed = True
        for process in list(self._processes):
            _end(process)

    def _run(self, command: Sequence[str], timeout: float | None = None) -> tuple[int, str]:
        """Exit status and output; ``TimeoutExpired`` once the command and its children were ended."""
        if self._closed:
            raise KeyboardInterrupt
        with tempfile.TemporaryFile(dir=self.root.parent) as log:  # children that stay would hold a pipe open
            process = subprocess.Popen(
                command,
                cwd=self.root,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._processes.add(process)
            try:
                status = process.wait(timeout)
            finally:
                _end(process)
                process.wait()
                self._processes.discard(process)
            log.seek(0)
            return status, log.read().decode(errors="replace")

    def built(self, command: Sequence[str]) -> str:
        """The output of a command that may not fail."""
        status, output = self._run(command)
        if status:
            raise Wrong(f"{shlex.join(command)[:200]}: {output.strip()}")
        return output

    def check_imports(self) -> None:
        """Raise unless tests, the command line and other processes import what is in the copy."""
        names = ("feddistill", "feddistill.cli", "feddistill_kernels", "feddistill_kernels._C")
        code = f"import {', '.join(names)}, sys\nfor name in {names}: print(sys.modules[name].__file__)"
        for path in self.built([self._python, "-c", code]).splitlines():
            if not Path(path).is_relative_to(self.root):
                raise Wrong(f"the copy imports {path}")

    def test(self, files: Sequence[str], timeout: float | None = None) -> Outcome:
        """Run tests until one fails."""
        shutil.rmtree(self._temporary, ignore_errors=True)
        shutil.rmtree(self.root / ".hypothesis", ignore_errors=True)
        self._temporary.mkdir()
        options = ["-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
        start = time.monotonic()
        try:
            status, output = self._run([self._python, "-m", "pytest", *options, *files], timeout)
        except subprocess.TimeoutExpired:
            return Outcome(True, f"more than {timeout:.0f} s", time.monotonic() - start)
        seconds, self.output = time.monotonic() - start, output
        if status == 0:
            return Outcome(False, "", seconds)
        if status in (4, 5):
            raise Wrong(f"pytest found no tests in {', '.join(files)}: {output.strip()[-300:]}")
        failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, flags=re.MULTILINE)
        return Outcome(True, failed[0] if failed else f"pytest ended with status {status}", seconds)

    @contextmanager
    def changed(self, mutant: Mutant) -> Iterator[None]:
        """The copy with a mutant applied; a native one is compiled and linked, and the module put back."""
        path = self.root / mutant.file
        before, times = path.read_text(), path.stat()
        text = mutant.text(self.root)
        native = mutant.file.startswith("csrc/")
        objects = self.build.objects(mutant.file, self.root) if native else []
        if native and not objects:
            raise Wrong(f"mutant {mutant.name}: no object of the extension is made from {mutant.file}")
        path.write_text(text)
        self._changes += 1  # bytecode is taken as current if size and second of the source are as before
        os.utime(path, (times.st_atime, 1_000_000_000 + self._changes))
        try:
            if native:
                self.build.make(self.root, objects, self.module, self.built)
            yield
        finally:
            path.write_text(before)
            os.utime(path, (times.st_atime, times.st_mtime))
            if native:
                self.module.unlink()
                shutil.copy2(self.build.folder / self.build.module, self.module)


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def chosen(only: Sequence[str], area: Sequence[str]) -> list[Mutant]:
    """The mutants of the command line."""
    table = mutants()
    for what, given, known in (
        ("mutant", only, {mutant.name for mutant in table}),
        ("area", area, {mutant.area for mutant in table}),
    ):
        if unknown := set(given) - known:
            raise Wrong(f"there is no {what} {min(unknown)}; there are {', '.join(sorted(known))}")
    if not only and not area:
        return table
    return [mutant for mutant in table if mutant.name in only or mutant.area in area]


def check(table: Sequence[Mutant], tests: dict[str, list[str]], tree: Path) -> None:
    """Raise for a stale mutant, and for an area without tests or whose tests do not exist."""
    for mutant in table:
        mutant.text(tree)
        if not tests.get(mutant.area):
            raise Wrong(f"mutant {mutant.name}: docs/testing.md has no tests of the area {mutant.area}")
        for file in tests[mutant.area]:
            if not (tree / file).is_file():
                raise Wrong(f"docs/testing.md, {mutant.area}: there is no {file}")


def judge(
    table: Sequence[Mutant], tests: dict[str, list[str]], copies: Sequence[Copy], record: "Record"
) -> dict[str, Outcome]:
    """Run the areas on the unchanged copies, then each mutant: print a line for each, record the latter."""
    free: SimpleQueue[Copy] = SimpleQueue()
    for copy in copies:
        free.put(copy)
    printing, writing = Lock(), Lock()

    def say(line: str) -> None:
        with printing:
            print(line, flush=True)

    def unchanged(area: str) -> float:
        copy = free.get()
        try:
            outcome = copy.test(tests[area])
        finally:
            free.put(copy)
        if outcome.killed:
            raise Wrong(f"{area}: {outcome.by} fails without a mutant\n{copy.output[-3000:]}")
        say(f"{area:<24} without a mutant {outcome.seconds:6.0f} s")
        return outcome.seconds

    def mutated(mutant: Mutant) -> Outcome:
        copy = free.get()
        start = time.monotonic()
        try:
            with copy.changed(mutant):
                outcome = copy.test(tests[mutant.area], SLOWER * seconds[mutant.area] + PATIENCE)
        finally:
            free.put(copy)
        outcome = replace(outcome, seconds=round(took := time.monotonic() - start, 1))
        say(f"{mutant.name:<32} {took:6.0f} s  {'killed by ' + outcome.by if outcome.killed else 'SURVIVED'}")
        with writing:
            record.add(mutant.name, outcome)
        return outcome

    with ThreadPoolExecutor(len(copies)) as pool:
        try:
            names = list(dict.fromkeys(mutant.area for mutant in table))
            seconds = dict(zip(names, pool.map(unchanged, names), strict=True))
            outcomes = list(pool.map(mutated, table))
        except BaseException:
            for copy in copies:
                copy.close()
            pool.shutdown(cancel_futures=True)
            raise
    return {mutant.name: outcome for mutant, outcome in zip(table, outcomes, strict=True)}


class Record:
    """The file of ``--out``, written after each mutant; a run of ``some`` keeps what it has of the others."""

    def __init__(self, tree: Path, file: Path | None, *, some: bool):
        self.file = file
        if file is None:
            return
        self._head: dict[str, Any] = {
            "commit": _git(tree, "rev-parse", "HEAD")
            + ("-dirty" if _git(tree, "status", "--porcelain") else ""),
            "versions": {"python": platform.python_version()}
            | {name: version(name) for name in ("torch", "numpy", "pytest", "hypothesis")},
        }
        self._outcomes: dict[str, Any] = {}
        if some and file.exists():
            stored = json.loads(file.read_text())
            if stored["commit"] != self._head["commit"]:
                given, wanted = stored["commit"], self._head["commit"]
                raise Wrong(f"{file} is of commit {given}, this is {wanted}: run all mutants")
            self._outcomes = stored["mutants"]

    def add(self, name: str, outcome: Outcome) -> None:
        """Write the file with one more outcome."""
        if self.file is None:
            return
        self._outcomes[name] = asdict(outcome)
        found = {m.name: self._outcomes[m.name] for m in mutants() if m.name in self._outcomes}
        total = f"{sum(one['killed'] for one in found.values())} of {len(found)}"
        self.file.write_text(json.dumps({**self._head, "score": total, "mutants": found}, indent=2) + "\n")


def _git(tree: Path, *words: str) -> str:
    command = ["git", "-C", str(tree), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def score(outcomes: dict[str, Outcome]) -> str:
    """As ``28 of 30``."""
    return f"{sum(outcome.killed for outcome in outcomes.values())} of {len(outcomes)}"


def lost(outcomes: dict[str, Outcome], before: dict[str, dict[str, object]]) -> list[str]:
    """A line for each mutant that was killed and survives."""
    return [
        f"lost: {name}, which was killed by {before[name]['by']}"
        for name, outcome in outcomes.items()
        if not outcome.killed and before.get(name, {}).get("killed")
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: 0, 1 if a mutant is lost, 2 for a mistake."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="One mutant; repeatable.")
    parser.add_argument("--area", action="append", default=[], help="Those of an area; repeatable.")
    parser.add_argument("--jobs", type=int, default=2, help="Mutants side by side.")
    parser.add_argument("--out", type=Path, help="Write the outcomes there, as JSON.")
    parser.add_argument("--check", type=Path, help="Fail if a mutant that was killed in this file survives.")
    parser.add_argument("--tree", type=Path, default=ROOT, help="Another checkout, with its build folder.")
    options = parser.parse_args(arguments)
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    try:
        table, tests, tree = chosen(options.only, options.area), areas(), options.tree.resolve()
        before = json.loads(options.check.read_text())["mutants"] if options.check else {}
        if gone := set(before) - {mutant.name for mutant in mutants()}:
            raise Wrong(f"{options.check} has the mutant {min(gone)}, which the table does not have")
        check(table, tests, tree)
        record = Record(tree, options.out, some=bool(options.only or options.area))
        start = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
            build = Build(tree)
            copies = []
            for number in range(min(options.jobs, len(table))):
                (place := Path(folder, str(number))).mkdir()
                copies.append(Copy(tree, place, build))
                copies[-1].check_imports()
            outcomes = judge(table, tests, copies, record)
        print(f"killed {score(outcomes)} in {(time.monotonic() - start) / 60:.0f} minutes")
    except Wrong as error:
        print(f"mutants: {error}", file=sys.stderr)
        return 2
    lines = lost(outcomes, before)
    print(*lines, sep="\n", end="\n" if lines else "")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
