"""`_target_` strings: dotted paths of importable classes and functions."""

import hashlib
import importlib
import inspect
import os
import sys
from pathlib import Path

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
    """SHA-256 (16 digits) of the source file that defines what `target` names; None for our own
    code, which is versioned, and for what has no source. So a result made with a user's own network
    is not found again after an edit; what that file imports is not followed."""
    if is_ours(target):
        return None
    found = resolve(target)
    if not (inspect.isclass(found) or inspect.isroutine(found)):
        found = importlib.import_module(target.rpartition(".")[0])
    try:
        source = inspect.getsourcefile(found)
    except TypeError:  # built in
        return None
    return hashlib.sha256(Path(source).read_bytes()).hexdigest()[:16] if source else None
