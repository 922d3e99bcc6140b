"""Content-keyed, crash-safe artifacts, shared by all runs.

    store/<stage>/<key>/            a finished artifact: files and manifest.json
    store/<stage>/<key>.partial     the last finished epoch of a training run in progress
    store/<stage>/<key>.lock        held by the one job that is making the artifact
    store/<stage>/<key>.tmp/        what that job has written so far
    store/<stage>/<key>.damaged-N/  set aside: its files are not what its manifest says

The key is a hash of everything that decides the result, the parent's key among it. Finished means
renamed: an artifact is written aside and moved into place, so what exists is complete.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prune_cli.errors import StageError, UserError

log = logging.getLogger(__name__)

MANIFEST, RESULT = "manifest.json", "result.json"
FULL = (errno.ENOSPC, errno.EDQUOT)  # error numbers of a disk without room

Make = Callable[[Path, "Partial"], Mapping[str, Any]]  # fills a folder, returns the result


def canonical(settings: Any) -> Any:
    """`settings` as plain JSON values in one form; None is dropped, so that a new option which
    defaults to None leaves every older key as it was."""
    if is_dataclass(settings) and not isinstance(settings, type):
        settings = asdict(settings)
    if isinstance(settings, Mapping):
        return {str(k): canonical(v) for k, v in sorted(settings.items()) if v is not None}
    if isinstance(settings, (list, tuple)):
        return [canonical(v) for v in settings]
    return settings


def key_of(stage: str, version: int, settings: Any, parent: str | None = None) -> str:
    """The content key: 24 hex digits of a SHA-256."""
    content = {"stage": stage, "version": version, "settings": canonical(settings), "parent": parent}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Artifact:
    """A finished artifact. `result` is its result.json: what the stage found out."""

    key: str
    path: Path
    result: Mapping[str, Any]

    def file(self, name: str) -> Path:
        """The path of one of its files."""
        return self.path / name


class Store:
    """The folder of artifacts."""

    def __init__(self, root: Path | str) -> None:
        """Raises UserError when `root` can be no folder."""
        self.root = Path(root)
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise UserError(f"runtime.store={root}: cannot be made a folder ({problem.strerror})") from problem

    def find(self, stage: str, key: str) -> Artifact | None:
        """The finished artifact, every file checked against its manifest; None when there is none
        or it is damaged."""
        path = self._path(stage, key)
        if not path.exists() or _problem(path, stage, key):
            return None
        return _artifact(path)

    def produce(self, stage: str, key: str, settings: Any, make: Make) -> tuple[Artifact, bool]:
        """The artifact, and whether it was there already.

        Otherwise `make(folder, partial)` fills a folder with files and returns the result. One job
        at a time makes an artifact; the others wait and take it. Whatever `make` raises, the store
        holds no trace of the attempt but its partial.
        """
        if artifact := self.find(stage, key):
            return artifact, True
        with self._locked(stage, key):
            if artifact := self.find(stage, key):  # the job that we waited for has made it
                return artifact, True
            self._set_aside(stage, key)
            return self._make(stage, key, settings, make), False

    def _make(self, stage: str, key: str, settings: Any, make: Make) -> Artifact:
        path = self._path(stage, key)
        partial = Partial(path.with_name(f"{key}.partial"))
        folder = path.with_name(f"{key}.tmp")
        shutil.rmtree(folder, ignore_errors=True)  # of a job that was killed
        folder.mkdir()
        try:
            result = make(folder, partial)
            _write_json(folder / RESULT, result)
            _write_json(folder / MANIFEST, _manifest(folder, stage, key, settings))
            folder.rename(path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        partial.remove()
        return _artifact(path)

    def _path(self, stage: str, key: str) -> Path:
        return self.root / stage / key

    @contextmanager
    def _locked(self, stage: str, key: str) -> Iterator[None]:
        """Hold the artifact's lock. The system releases it when this process dies, however it does."""
        path = self._path(stage, key).with_name(f"{key}.lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.warning("%s is being made by another job; waiting for it", stage)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def _set_aside(self, stage: str, key: str) -> None:
        """Move what cannot be used out of the way. Only under the lock: without it, the folder that
        was found damaged could by now be the one that another job has made anew."""
        path = self._path(stage, key)
        if not path.exists():
            return
        problem = _problem(path, stage, key)
        names = (path.with_name(f"{key}.damaged-{n}") for n in count(1))
        aside = path.rename(next(name for name in names if not name.exists()))
        log.warning("%s: %s; set aside as %s and made again", path, problem, aside.name)


class Partial:
    """The state of an unfinished training run: one safetensors file, replaced as a whole."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._began, self._earlier = time.perf_counter(), 0.0

    @property
    def seconds(self) -> float:
        """Time spent since this object was made, and before what was loaded into it was saved."""
        return self._earlier + time.perf_counter() - self._began

    def save(self, state: Mapping[str, Any]) -> None:
        """Write a nested mapping of tensors and JSON values. A full disk leaves what was saved
        before as it is."""
        tensors: dict[str, Tensor] = {}
        header = {"state": json.dumps(_take_tensors(state, tensors)), "seconds": json.dumps(self.seconds)}
        new = self.path.with_name(self.path.name + ".new")
        try:
            save_file(tensors, new, metadata=header)
            os.replace(new, self.path)
        finally:
            new.unlink(missing_ok=True)

    def load(self) -> dict[str, Any] | None:
        """What was saved last, or None; a damaged file counts as none and is removed."""
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                header = file.metadata()
            state = _put_tensors(json.loads(header["state"]), tensors)
            self._earlier = float(json.loads(header["seconds"]))
        except (SafetensorError, KeyError, TypeError, ValueError) as problem:
            log.warning("%s is damaged (%s); this stage starts again", self.path, problem)
            self.remove()
            return None
        return state

    def copy(self, path: Path) -> None:
        """Keep the state elsewhere, for another run to `begin_with`."""
        shutil.copyfile(self.path, path)

    def begin_with(self, path: Path) -> None:
        """Let a run that has saved nothing yet go on from a state that `copy` has kept."""
        if not self.path.exists():
            shutil.copyfile(path, self.path)

    def remove(self) -> None:
        """Forget it."""
        self.path.unlink(missing_ok=True)
        self.path.with_name(self.path.name + ".new").unlink(missing_ok=True)


@contextmanager
def full_disk_explained(*folders: Path) -> Iterator[None]:
    """A disk that is full, or a quota used up, while writing to `folders` becomes one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as problem:
        number = getattr(problem, "errno", None)
        if number not in FULL and not any(f"(os error {n})" in str(problem) for n in FULL):
            raise
        listed = " and ".join(map(str, folders))
        raise StageError(
            f"There is no space left to write to {listed}; nothing finished is lost: make room, and the "
            "same command resumes from the last finished epoch"
        ) from problem


def _artifact(path: Path) -> Artifact:
    return Artifact(path.name, path, json.loads((path / RESULT).read_text()))


def _problem(path: Path, stage: str, key: str) -> str | None:
    """What is wrong with the artifact at `path`, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if (manifest["stage"], manifest["key"]) != (stage, key):
            return f"foreign: it says it is {manifest['stage']}/{manifest['key']}"
        if RESULT not in manifest["files"]:
            return f"damaged: its manifest does not list {RESULT}"
        for name, digest in manifest["files"].items():
            if not (path / name).is_file():
                return f"damaged: {name} is missing"
            if _digest(path / name) != digest:
                return f"damaged: {name} has changed"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        return f"damaged: its manifest cannot be read ({problem})"
    return None


def _manifest(folder: Path, stage: str, key: str, settings: Any) -> dict[str, Any]:
    files = {p.name: _digest(p) for p in sorted(folder.iterdir())}
    return {"stage": stage, "key": key, "settings": canonical(settings), "files": files}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, content: Any) -> None:
    with path.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _take_tensors(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` as JSON, its tensors replaced by references and collected."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"pairs": [[k, _take_tensors(v, tensors)] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_take_tensors(v, tensors) for v in value]
    return value


def _put_tensors(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, dict) and "tensor" in value:
        return tensors[value["tensor"]]
    if isinstance(value, dict):
        return {k: _put_tensors(v, tensors) for k, v in value["pairs"]}
    if isinstance(value, list):
        return [_put_tensors(v, tensors) for v in value]
    return value
