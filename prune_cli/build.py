"""Plain config -> Experiment: the only place that turns `_target_` into objects.

What needs no torch is checked first, so that a wrong number is answered at once.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prune_cli.errors import UserError
from prune_cli.published import Table, reference
from prune_cli.settings import Count, Natural, Ratio, Recipe, Runtime, Target, checked, shown, typed
from prune_cli.targets import resolve

if TYPE_CHECKING:
    from prune_cli.experiment import Experiment


@dataclass(frozen=True)
class Component:
    """A group option that names an importable class or function and its arguments."""

    name: str
    target: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class _Tree:
    """The whole config."""

    model: dict[str, Any]
    dataset: dict[str, Any]
    method: dict[str, Any]
    recipe: Recipe
    runtime: Runtime
    ratio: Ratio
    target: Target
    seed: Natural
    rounds: Count = 1
    base: str | None = None
    table: Table | None = None
    row: str | None = None


def build(config: Mapping[str, Any]) -> "Experiment":
    """The experiment that a composed config describes.

    Raises UserError with the dotted path of the setting that is wrong, its value and what is allowed.
    """
    tree = _Tree(**typed(_Tree, config))
    place = reference(tree.table, tree.row)
    checkpoint = checked(tree.model.pop("checkpoint", None), str | None, "model.checkpoint")
    model, dataset, method = (_component(group, getattr(tree, group)) for group in ("model", "dataset", "method"))

    # Imported here: torch takes seconds, and everything above answers without it.
    from prune_cli.datasets.dataset import Dataset
    from prune_cli.experiment import Experiment
    from prune_cli.method import PruningMethod

    made = _made("method", method, PruningMethod, method.arguments)
    if made.needs_ratio and made.ratio != tree.ratio:
        raise UserError(f"method.ratio={made.ratio:g}: is the run's ratio, {tree.ratio:g}; set ratio instead")
    return Experiment(
        model=_model(model),
        dataset=_made("dataset", dataset, Dataset, {"name": dataset.name, **dataset.arguments}),
        method=made,
        method_name=method.name,
        recipe=tree.recipe,
        ratio=tree.ratio,
        target=tree.target,
        seed=tree.seed,
        runtime=tree.runtime,
        reference=place,
        checkpoint=checkpoint,
        rounds=tree.rounds,
        base=tree.base,
    )


def _component(group: str, values: Mapping[str, Any]) -> Component:
    target = "target" if "target" in values else "_target_"  # model=custom has it under a name of its own
    for key, form, words in (
        ("name", r"[\w.-]+", "letters, digits, dots and dashes, since folders are named so"),
        (target, r"\w+(\.\w+)+", "the dotted path of an importable class or function, as in my_net.MyNet"),
    ):
        if not re.fullmatch(form, str(values.get(key, ""))):
            raise UserError(f"{group}.{key}={shown(values.get(key, ''))}: must be {words}")
    arguments = {key: value for key, value in values.items() if key not in ("name", "_target_")}
    return Component(str(values["name"]), values["_target_"], arguments)


def _made(group: str, component: Component, base: type, arguments: Mapping[str, Any]) -> Any:
    """An instance of the component's class, which must derive from `base`."""
    kind = resolve(component.target)
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise UserError(f"{group}._target_={component.target}: must be a class derived from {base.__name__}")
    return kind(**typed(kind, arguments, group))


def _model(component: Component) -> Any:
    from prune_cli.experiment import ModelSpec

    network = resolve(component.target)
    if not callable(network):
        raise UserError(f"model._target_={component.target}: must be a class or a function")
    where, given = "model", component.arguments
    if "target" in given:  # the user's own: arguments in a mapping of theirs collide with no setting of ours
        where, given = "model.arguments", checked(given.get("arguments"), dict[str, Any], "model.arguments")
    # The data set says how large the network's input and output are.
    arguments = typed(network, given, where, supplied=("channels", "resolution", "classes"))
    return ModelSpec(component.name, component.target, arguments)
