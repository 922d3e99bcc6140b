"""One experiment: everything that decides a result, and the runtime that does not."""

from dataclasses import dataclass

import torch
from torch import nn

from prune_cli.datasets.dataset import Dataset
from prune_cli.method import PruningMethod
from prune_cli.models.spec import ModelSpec
from prune_cli.published import Reference
from prune_cli.seeding import derive, seeded
from prune_cli.settings import Recipe, Runtime, Target


@dataclass(frozen=True)
class Experiment:
    """model x dataset x method x recipe at one ratio (of what `target` says) and seed.

    checkpoint  file with the weights of the dense network, which is not trained then; None trains it
    rounds  how often sparsify, prune and finetune are repeated; `ratio` is removed by all together
    base    run folder or checkpoint whose network is pruned further, None = the dense network
    """

    model: ModelSpec
    dataset: Dataset
    method: PruningMethod
    method_name: str
    recipe: Recipe
    ratio: float
    seed: int
    runtime: Runtime
    target: Target = "units"
    reference: Reference | None = None  # its place in a published table
    checkpoint: str | None = None
    rounds: int = 1
    base: str | None = None

    @property
    def round_ratio(self) -> float:
        """The fraction of what is left that each round removes: 1 - (1 - r)^rounds = ratio."""
        return self.ratio if self.rounds == 1 else 1 - (1 - self.ratio) ** (1 / self.rounds)

    def untrained(
        self, channels: int, resolution: int, classes: int, purpose: str = "initialisation"
    ) -> nn.Module:
        """The network at initialisation, the same for every method and stage of this seed, on the CPU; another
        one for another `purpose`."""
        with seeded(derive(self.seed, purpose), torch.device("cpu")):
            return self.model.build(channels, resolution, classes)

    @property
    def name(self) -> str:
        """`method-model-dataset-ratio`, the folder of its runs; a ratio of something else than units says of what."""
        of = "" if self.target == "units" else f"-{self.target}"
        return f"{self.method_name}-{self.model.name}-{self.dataset.name}-{self.ratio:g}{of}"
