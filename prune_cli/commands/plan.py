"""`prune-cli plan OVERRIDES`: what a run with these overrides would remove, before any training.

The network is the untrained one, so which filters go is not what training will say; how many go, what
that saves, and what stays whole for which reason depends on shapes alone, except where layers compete
in one global ranking; of a ranking that sparse training has yet to make the plan says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prune_cli.build import build
from prune_cli.compose import composed
from prune_cli.errors import UserError

USAGE = """prune-cli plan [name=value ...]

Prints, before any training, what a run with the same overrides would do: for every layer the group of
layers that share its channels, the units that would go, parameters and MACs before and after, and where it
stays whole the reason.

    prune-cli plan method=fp model=resnet56 dataset=cifar10 ratio=0.4
    prune-cli plan method=fp method.coupled=joint model=torchvision model.name=mobilenet_v2 dataset=cifar10
"""


UNDECIDED = (
    "All layers compete in one ranking, which sparse training has yet to make: how much each of them loses, and "
    "what that saves, is not known before."
)


def main(arguments: Sequence[str]) -> int:
    """Run `prune-cli plan ARGUMENTS` and return the exit code. Raises UserError as a run would."""
    if {"-h", "--help"} & set(arguments):
        print(USAGE, end="")
        return 0
    experiment = build(composed(arguments))
    if experiment.base is not None:
        raise UserError(f"base={experiment.base}: a plan is made of the untrained network, it has no base")
    show(plan_of(experiment), experiment)
    return 0


@dataclass(frozen=True)
class Line:
    """One layer. `group`: the number that it has in common with the layers whose channels it shares;
    `units` as (removed, all), None where it stays whole; `reason`: why it does."""

    layer: str
    shape: str
    group: str
    units: tuple[int, int] | None
    parameters: tuple[int, int]
    macs: tuple[int, int]
    reason: str


@dataclass(frozen=True)
class Plan:
    """`lines`: one per convolution and linear layer, the last for the whole network; `obtained`: the fraction
    of the target that goes, None where it is the units; `notes`: sentences a user should read."""

    lines: list[Line]
    obtained: float | None
    notes: tuple[str, ...]


def plan_of(experiment) -> Plan:
    """What the experiment would remove."""
    from prune_cli import surgery
    from prune_cli.budget import Budget
    from prune_cli.metrics.macs import count_parameters, layer_macs
    from prune_cli.modules import weight_shape
    from prune_cli.prunable import weighted
    from prune_cli.trial import channel_graph

    dense = experiment.untrained(*experiment.dataset.shape(Path(experiment.runtime.data_root)))
    budget = Budget.of(experiment.target, experiment.ratio, dense)
    method = budget.for_training(experiment.method, dense)
    skipped = method.prunable(dense).skipped
    model = method.prepare(dense)
    budget.check(method, model)
    masks = budget.select(method, model)
    masked, small = surgery.masked_and_cut(method.compensate(model, masks), masks, method.constant)
    surgery.verify(masked, small)

    graph, before, after = channel_graph(dense), *(layer_macs(m, dense.input_shape) for m in (dense, small.model))
    groups = [group for group in graph.groups if len(group.producers) > 1]
    shared = {name: str(number) for number, group in enumerate(groups, 1) for name in group.producers}
    found = []
    for name, layer in weighted(dense).items():
        new = small.renamed.get(name, name)
        keep = masks.keep.get(name)
        found.append(
            Line(
                name, _shape(weight_shape(layer)), shared.get(name, ""),
                None if keep is None else (int((~keep).sum()), keep.numel()),
                (count_parameters(layer), count_parameters(small.model.get_submodule(new))),
                (before.get(name, 0), after.get(new, 0)), skipped.get(name, ""),
            )
        )  # fmt: skip
    parameters = count_parameters(dense), count_parameters(small.model)
    units = (masks.total - sum(int(keep.sum()) for keep in masks.keep.values()), masks.total)
    whole = Line("network", "", "", units, parameters, (sum(before.values()), sum(after.values())), "")
    notes = masks.notes
    if method.start is not None:  # what the ranking warns of is for training to say
        notes = (UNDECIDED,) if method.scope == "global" else ()
    obtained = None if budget.target == "units" else budget.removed(small)
    return Plan([*found, whole], obtained, notes)


def show(plan: Plan, experiment) -> None:
    """Print the lines, and what they come to."""
    from rich import box
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    console, table = Console(), Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("layer", "weight", "group"):
        table.add_column(header, no_wrap=True)
    for header in (f"{experiment.method.unit}s that go", "params", "MACs"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("stays whole because", no_wrap=True)
    whole = plan.lines[-1]
    for line in plan.lines:
        if line is whole:
            table.add_section()
        units = "" if line.units is None else f"{line.units[0]:,} of {line.units[1]:,}"
        changes = _change(line.parameters), _change(line.macs)
        table.add_row(line.layer, line.shape, line.group, units, *changes, line.reason)
    console.width = max(console.width, Measurement.get(console, console.options.update(width=500), table).maximum)
    console.print(table)
    units = 100 * whole.units[0] / whole.units[1]
    parameters, macs = (100 * (1 - left / dense) for dense, left in (whole.parameters, whole.macs))
    obtained = "" if plan.obtained is None else f", obtained {100 * plan.obtained:.2f}%"
    smaller = f"{parameters:.2f}% of the parameters and {macs:.2f}% of the MACs"
    if experiment.method.unit == "weight":
        smaller = f"to zero, which makes the tensors {parameters:.2f}% and the MACs {macs:.2f}% smaller"
    print(
        f"{units:.2f}% of the {experiment.method.unit}s go, {smaller}; "
        f"requested {100 * experiment.ratio:.2f}% of the {experiment.target}{obtained}."
    )
    for note in plan.notes:
        print(note)


def _shape(sizes) -> str:
    return "x".join(map(str, sizes))


def _change(pair: tuple[int, int]) -> str:
    return f"{pair[0]:,}" if pair[0] == pair[1] else f"{pair[0]:,} -> {pair[1]:,}"
