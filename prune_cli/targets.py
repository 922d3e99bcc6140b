"""`_target_` strings: dotted paths of importable classes and functions."""

import hashlib
import importlib
import inspect
import os
import sys
from contextlib import suppress
from modulefinder import ModuleFinder
from pathlib import Path
from types import ModuleType

from prune_cli.errors import UserError


def resolve(target: str):
    """The object that the dotted path names ("package.module.Name"), installed or in the current directory.

    Raises UserError when the module cannot be imported or lacks the name.
    """
    module, _, name = target.rpartition(".")
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # a console script has only its own folder there
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as problem:
        raise UserError(f"_target_={target}: cannot be imported ({problem})") from problem


def is_ours(target: str) -> bool:
    """Whether the target is part of this program."""
    return target.startswith("prune_cli.")


def source_hash(target: str) -> str | None:
    """SHA-256 (16 digits) of the source file that defines what `target` names, and of the modules in its folder or the
    current one that it imports, directly or through others; None for our own code, which is versioned, and for what
    has no source. So a result made with a user's own network is not found again after an edit."""
    if is_ours(target):
        return None
    found = resolve(target)
    if not (inspect.isclass(found) or inspect.isroutine(found)):
        found = importlib.import_module(target.rpartition(".")[0])
    try:
        source = inspect.getsourcefile(found)
    except TypeError:  # built in
        return None
    if not source:
        return None
    digest = hashlib.sha256(Path(source).read_bytes())
    for name, file in _imported(Path(source).resolve(), sys.modules[found.__module__]):
        digest.update(b"\0".join([b"", name.encode(), file.read_bytes()]))
    return digest.hexdigest()[:16]


def _imported(source: Path, module: ModuleType) -> list[tuple[str, Path]]:
    """The modules in the folder of `source` or the current one that it imports, and those that they do, by name;
    installed packages are not followed."""
    if "site-packages" in source.parts:
        return []
    top = source.parents[module.__name__.count(".")]
    finder = ModuleFinder(path=[str(top), os.getcwd()], excludes=["prune_cli", "torch", "torchvision"])
    with suppress(SyntaxError, ValueError, ImportError):  # what cannot be imported is told where it is
        finder.import_hook(module.__name__)
    files = {name: Path(found.__file__).resolve() for name, found in finder.modules.items() if found.__file__}
    return sorted((name, file) for name, file in files.items() if file != source)
