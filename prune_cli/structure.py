"""What two networks have in common that differ in their weights only."""

from types import FunctionType
from typing import Any

from torch import nn

_SIMPLE = (bool, int, float, str, FunctionType, type(None))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")


def structure(model: nn.Module) -> tuple:
    """Equal for networks through which channels flow in the same way: classes, shapes, ties, hooks and simple attributes
    of all modules, and the input shape. A training layer counts as the layer that it stands for."""
    numbers: dict[nn.Parameter, int] = {}  # tied ones have one number
    described = (_described(name, module, numbers) for name, module in model.named_modules())
    return tuple(described), tuple(model.input_shape)


def _described(name: str, module: nn.Module, numbers: dict[nn.Parameter, int]) -> tuple:
    for parameter in module._parameters.values():
        numbers.setdefault(parameter, len(numbers))
    tied = tuple(numbers[parameter] for parameter in module._parameters.values() if parameter is not None)
    module = module.plain() if hasattr(module, "plain") else module
    held = {**module._parameters, **module._buffers}
    shapes = tuple((n, tuple(t.shape)) for n, t in held.items() if t is not None)
    simple = tuple((n, repr(v)) for n, v in vars(module).items() if n != "training" and _is_simple(v))
    hooks = tuple(repr(hook) for kind in _HOOKS for hook in getattr(module, kind).values())
    return name, type(module), shapes, tied[: len(module._parameters)], simple, hooks, tuple(module._modules.keys())


def _is_simple(value: Any) -> bool:
    """An attribute that may decide what a forward does, and says in its text what it is."""
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, _SIMPLE) or (isinstance(value, (tuple, list)) and all(map(_is_simple, value)))
