"""Content-keyed, crash-safe artifacts, shared by all runs.

    store/<stage>/<key>/            a finished artifact: files and manifest.json
    store/<stage>/<key>.partial     the last finished epoch of a training run in progress
    store/<stage>/<key>.lock        held by the one job that is making the artifact
    store/<stage>/<key>.damaged-N/  set aside: its files are not what its manifest says

The key is a hash of everything that decides the result, the parent's key among it. Finished means
renamed: an artifact is written aside and moved into place, so what exists is complete.
"""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


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
        self.root = Path(root)

    def find(self, stage: str, key: str) -> Artifact | None:
        """The finished artifact, verified; a damaged one is set aside and None is returned."""
        path = self.root / stage / key
        if not path.exists():
            return None
        problem = _problem(path, stage, key)
        if problem is None:
            return Artifact(key, path, json.loads((path / "result.json").read_text()))
        aside = next(p for n in range(1, 10**6) if not (p := path.with_name(f"{key}.damaged-{n}")).exists())
        path.rename(aside)
        log.warning("%s: %s; set aside as %s, made again", path, problem, aside.name)
        return None

    def produce(self, stage: str, key: str, settings: Any, make: "Callable[[Path, Partial], Mapping]") -> tuple[Artifact, bool]:
        """The artifact, and whether it was there already; otherwise `make(folder, partial)` fills a
        folder with its files and returns its result. One job at a time makes it, others wait."""
        if artifact := self.find(stage, key):
            return artifact, True
        (self.root / stage).mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.root / stage / f"{key}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("%s is being made by another job; waiting for it", stage)
            lock.acquire()
        with lock:
            if artifact := self.find(stage, key):  # the job we waited for has made it
                return artifact, True
            partial = Partial(self.root / stage / f"{key}.partial")
            folder = Path(tempfile.mkdtemp(prefix=f"{key}.tmp-", dir=self.root / stage))
            try:
                result = make(folder, partial)
                _write_json(folder / "result.json", result)
                _write_json(folder / MANIFEST, _manifest(folder, stage, key, settings))
                folder.rename(self.root / stage / key)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            partial.remove()
        return Artifact(key, self.root / stage / key, json.loads((self.root / stage / key / "result.json").read_text())), False


class Partial:
    """The state of an unfinished training run: one safetensors file, replaced as a whole."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def save(self, state: Mapping[str, Any]) -> None:
        """Write a nested mapping of tensors and JSON values."""
        tensors: dict[str, Tensor] = {}
        plain = _take_tensors(state, tensors)
        new = self.path.with_name(self.path.name + ".new")
        save_file(tensors, new, metadata={"state": json.dumps(plain)})
        os.replace(new, self.path)

    def load(self) -> dict[str, Any] | None:
        """What was saved last, or None; a damaged file counts as none and is removed."""
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                return _put_tensors(json.loads(file.metadata()["state"]), tensors)
        except (SafetensorError, KeyError, TypeError, ValueError) as problem:
            log.warning("%s is damaged (%s); this stage starts again", self.path, problem)
            self.remove()
            return None

    def remove(self) -> None:
        """Forget it."""
        self.path.unlink(missing_ok=True)


def _problem(path: Path, stage: str, key: str) -> str | None:
    """What is wrong with the artifact at `path`, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if (manifest["stage"], manifest["key"]) != (stage, key):
            return f"foreign: it says it is {manifest['stage']}/{manifest['key']}"
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
