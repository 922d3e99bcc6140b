"""Where a run starts that prunes a pruned network further: a finished run, or one of its checkpoints."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from prune_cli.checkpoint import describe
from prune_cli.errors import UserError
from prune_cli.experiment import Experiment
from prune_cli.record import Record
from prune_cli.store import canonical

AS_IT_WAS = {"rewind", "scratch_e", "scratch_b"}  # these need the dense network's own coordinates


@dataclass(frozen=True)
class Base:
    """A network to go on with.

    network  its file
    dense    the file of the dense network that it was pruned from; None where only a checkpoint is
             given, the command's own dense network is then the baseline
    """

    network: Path
    dense: Path | None

    @classmethod
    def of(cls, experiment: Experiment) -> "Base":
        """What `experiment.base` names.

        Raises UserError: no finished run, another model or data set than the command's, or a training
        that would need weights the base no longer has.
        """
        path, name, dense = Path(experiment.base), f"base={experiment.base}", None
        if experiment.target != "units":
            raise UserError(f"target={experiment.target}: a run with base removes a ratio of the base's units")
        if path.is_dir():
            record = Record.read(path / "record.json")
            if record.status != "complete":
                raise UserError(f"{name}: this run {record.status}; give a finished one")
            if (dataset := record.config["dataset"]["name"]) != experiment.dataset.name:
                raise UserError(f"{name}: was trained on {dataset}, this command says dataset={experiment.dataset.name}")
            last = record.stage("finetuned") or record.stage("pruned")
            path, dense = path / "checkpoints" / f"{last.stage}.safetensors", path / "checkpoints/dense.safetensors"
        model = describe(path)["model"]
        if canonical(model) != canonical(experiment.model):
            raise UserError(
                f"{name}: is a {model['name']} ({_arguments(model['arguments'])}), this command says "
                f"model={experiment.model.name} ({_arguments(experiment.model.arguments)})"
            )
        _check_recipe(experiment)
        return cls(path, dense)


def digest(path: Path) -> str:
    """Of the file's content: part of the keys of what is made from it."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:24]


def _check_recipe(experiment: Experiment) -> None:
    recipe = experiment.recipe
    for setting, value in [("finetune.start", recipe.finetune.start), *(("controls", c) for c in recipe.controls)]:
        if value in AS_IT_WAS:
            raise UserError(
                f"recipe.{setting}={value}: goes back to the dense network, of which a run with base has the pruned "
                "form only; allowed with base: trained, learning_rate, random"
            )


def _arguments(arguments: dict) -> str:
    return ", ".join(f"{key}={value}" for key, value in arguments.items()) or "no arguments"
