"""torchvision, imported here and nowhere else.

PyPI's torchvision is built against PyPI's CUDA torch; beside a CPU-only torch its compiled
operators are missing and the import ends in "operator torchvision::nms does not exist", although
data sets, transforms and models are pure Python. Declaring the two operators is enough.
"""

import functools
import importlib
import sys
from types import ModuleType

import torch

_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
_DECLARED: list[torch.library.Library] = []  # a Library withdraws its operators when it is collected


@functools.cache
def torchvision() -> ModuleType:
    """The module, imported at the first call (about a second): importing this file costs nothing.

    Raises RuntimeError or ImportError when torchvision is missing or broken in another way.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as problem:
        if "operator torchvision::nms does not exist" not in str(problem):
            raise
    library = torch.library.Library("torchvision", "FRAGMENT")
    for operator in ("nms", "qnms"):
        library.define(operator + _SIGNATURE)
    _DECLARED.append(library)
    for half_imported in [name for name in sys.modules if name.startswith("torchvision.")]:
        del sys.modules[half_imported]
    return importlib.import_module("torchvision")
