"""Where in a user's own code something happens: what a sentence about their network can point to."""

import os
import sys
import traceback
from pathlib import Path
from types import FrameType

import torch

from prune_cli.errors import one_line

_INSTALLED = Path(torch.__file__).parents[1]
_PACKAGES = tuple(f"{folder}{os.sep}" for folder in (Path(__file__).parent, _INSTALLED / "torch", _INSTALLED / "torch_pruning"))
_STANDARD = f"{Path(os.__file__).parent}{os.sep}"


def running_line(caller: str) -> str:
    """` (FILE, line N)` of the innermost line of a user's code that is being executed now, called from the file
    `caller`; nothing where there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename != caller:
        if _is_users(frame.f_code.co_filename):
            return f" ({Path(frame.f_code.co_filename).name}, line {frame.f_lineno})"
        frame = frame.f_back
    return ""


def what_failed(problem: BaseException) -> str:
    """What an exception says, as part of a sentence, behind `FILE, line N, CODE:` of the innermost line of a user's
    code through which it came, where there is one."""
    for frame in reversed(traceback.extract_tb(problem.__traceback__)):
        if _is_users(frame.filename):
            return f"{Path(frame.filename).name}, line {frame.lineno}, {frame.line}: {one_line(problem)}"
    return one_line(problem)


def _is_users(file: str) -> bool:
    if file.startswith("<") or file.startswith(_PACKAGES):
        return False
    return not file.startswith(_STANDARD) or "site-packages" in file
