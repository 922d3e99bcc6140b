"""A network in training without its training layers."""

import copy

from torch import nn

from prune_cli.modules import replace_module


def plain(model: nn.Module) -> nn.Module:
    """A copy in which every layer that has a `plain()` form is replaced by it."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if hasattr(module, "plain"):
            replace_module(model, name, module.plain())
    return model
