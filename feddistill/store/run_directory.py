"""The directory of a run, with atomic steps.

A step first writes its files, each under a temporary name that is renamed once the content is on disk, then a
record with their sizes and hashes. A record therefore implies complete files, even after a crash, and
``--resume`` continues with the first step without a record.
"""

import fcntl
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

from feddistill.errors import RunError
from feddistill.store import layout
from feddistill.store.layout import CONFIG, EXECUTION, LOCK

Json = dict[str, Any]


class RunDirectory:
    """An open run directory; holds a lock that keeps other processes from writing to it.

    Raises:
        RunError: From every method, with the path: it exists, is not a run, is in use or damaged, or the
            disk is full.
    """

    def __init__(self, root: Path, lock: TextIO):
        self.root = root
        self._lock = lock

    @classmethod
    def create(cls, root: Path, config: str) -> "RunDirectory":
        """Create a run in a new or empty directory."""
        cls.check_free(root)
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"cannot create {root}: {error.strerror}") from None
        run = cls(root, _lock(root))
        run.write_text(CONFIG, config)
        return run

    @staticmethod
    def check_free(root: Path, instead: str = "go on with --resume, or choose another --out") -> None:
        """Raise unless ``root`` is new or empty; ``instead`` ends the message with what to do."""
        try:
            taken = root.exists() and (not root.is_dir() or not all(map(_is_nothing, root.iterdir())))
        except OSError as error:
            raise RunError(f"cannot read {root}: {error.strerror}") from None
        if taken:
            raise RunError(f"{root} already exists; {instead}")

    @classmethod
    def open(cls, root: Path) -> "RunDirectory":
        """Open an existing run."""
        if not (root / CONFIG).is_file():
            raise RunError(f"{root} is not a run: it has no {CONFIG}")
        run = cls(root, _lock(root))
        for left_over in root.rglob(layout.partial("*")):
            left_over.unlink()
        return run

    def within(self, folder: str) -> "RunDirectory":
        """A folder of this run as a separate run, under the lock of this one."""
        return RunDirectory(self.root / folder, self._lock)

    @property
    def execution(self) -> str:
        """Random identifier of this execution: 16 hexadecimal digits, drawn once per run directory.

        Remote clients use it as a key of their stored state. No result depends on it.
        """
        if not self.path(EXECUTION).exists():
            self.write_text(EXECUTION, secrets.token_hex(8))
        return self.read_bytes(EXECUTION).decode()

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()

    def path(self, name: str) -> Path:
        """Path of the file ``name``, existing or not."""
        return self.root / name

    def write(self, name: str, fill: Callable[[Path], object]) -> Path:
        """Write a file atomically: ``fill`` writes a temporary file, which is synced and then renamed."""
        target = self.path(name)
        partial = target.with_name(layout.partial(target.name))
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            fill(partial)
            with partial.open("rb+") as handle:
                os.fsync(handle.fileno())
            partial.replace(target)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise RunError(f"cannot write {target}: {error.strerror or error}") from None
        return target

    def write_bytes(self, name: str, content: bytes) -> Path:
        """Write bytes atomically."""
        return self.write(name, lambda path: path.write_bytes(content))

    def write_text(self, name: str, content: str) -> Path:
        """Write text atomically, as UTF-8."""
        return self.write_bytes(name, content.encode())

    def write_json(self, name: str, content: Json) -> Path:
        """Write an object atomically, as indented JSON."""
        return self.write_text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def read_bytes(self, name: str) -> bytes:
        """Read a file of this run."""
        return _read(self.path(name))

    def digest(self, name: str) -> str:
        """256-bit BLAKE2b digest of a file in hexadecimal, as ``payload.digest`` computes it."""
        try:
            return _hash(self.path(name), 32)
        except OSError as error:
            raise RunError(f"cannot read {self.path(name)}: {error.strerror}") from None

    def read_json(self, name: str) -> Json:
        """Read a JSON object of this run."""
        return read_object(self.path(name))

    def commit(self, step: str, content: Json, files: Iterable[str] = ()) -> Json:
        """Record ``step`` as done, with its content and the sizes and hashes of its files."""
        hashed = {name: [self.path(name).stat().st_size, _hash(self.path(name))] for name in files}
        self.write_json(_record(step), {"content": content, "files": hashed})
        return self._content(step)  # as a resumed run would read it

    def done(self, step: str, *, verify: bool = True) -> Json | None:
        """The content of ``step``, or ``None`` if it is not done.

        ``verify``: check the sizes and hashes of its files; off if they may have been deleted.
        """
        if not self.path(_record(step)).exists():
            return None
        record = self.read_json(_record(step))
        for name, (size, digest) in record["files"].items() if verify else ():
            path = self.path(name)
            if not path.is_file() or path.stat().st_size != size or _hash(path) != digest:
                raise RunError(f"{path} is missing or damaged: it is not what {step} wrote; start a new run")
        return self._content(step)

    def steps(self, under: str) -> list[str]:
        """The recorded steps in a folder, sorted by name."""
        records = self.root.glob(layout.record(f"{under}/*"))
        return sorted(f"{under}/{path.stem}" for path in records)

    def adopt(self, other: "RunDirectory", step: str) -> None:
        """Copy a step of another run, with those of its files that still exist there.

        Files are hard-linked if the file system supports it: no run modifies a file in place.
        """
        record = other.read_json(_record(step))
        there = {name: hashed for name, hashed in record["files"].items() if other.path(name).exists()}
        for name, (size, digest) in there.items():
            if other.path(name).stat().st_size != size or _hash(other.path(name)) != digest:
                raise RunError(f"{other.path(name)} is damaged: it is not what {step} wrote")
            self.adopt_file(other, name)
        self.write_json(_record(step), {"content": record["content"], "files": there})

    def adopt_file(self, other: "RunDirectory", name: str) -> None:
        """Copy or hard-link one file of another run."""
        self.write(name, lambda partial: _link(other.path(name), partial))

    def _content(self, step: str) -> Json:
        content: Json = self.read_json(_record(step))["content"]
        return content

    def remove(self, name: str) -> None:
        """Delete a file or folder if it exists."""
        path = self.path(name)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def free(path: Path) -> Path:
    """``path``, or the first of ``path-2``, ``path-3``, ... that does not exist."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.name}-{number}")
    return candidate


def read_object(path: Path) -> Json:
    """Read a JSON object from a file.

    Raises:
        RunError: The file cannot be read, or is not a JSON object.
    """
    try:
        content = json.loads(_read(path))
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise RunError(f"{path} is damaged: not a JSON object")
    return content


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from None


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:  # another file system, or no support for hard links
        shutil.copyfile(source, target)


def _is_nothing(path: Path) -> bool:
    """True for files left by a run that was killed before its configuration was written."""
    return path.name == LOCK or path.match(layout.partial("*"))


def _record(step: str) -> str:
    return layout.record(step)


def _hash(path: Path, size: int = 16) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, lambda: hashlib.blake2b(digest_size=size)).hexdigest()


def _lock(root: Path) -> TextIO:
    try:
        handle = (root / LOCK).open("w")
    except OSError as error:
        raise RunError(f"cannot write in {root}: {error.strerror}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        handle.close()
        raise RunError(f"{root} is in use by another process") from None
    return handle
