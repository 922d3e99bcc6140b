"""`_target_` strings: dotted paths of importable classes and functions."""

import importlib

from prune_cli.errors import UserError


def resolve(target: str):
    """The object that the dotted path names ("package.module.Name").

    Raises UserError when the module cannot be imported or lacks the name.
    """
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as problem:
        raise UserError(f"_target_={target}: cannot be imported ({problem})") from problem
