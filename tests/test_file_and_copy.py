"""What is measured is the network in the file that is handed over, and the copy that is timed computes the same."""

import copy
import random
import textwrap

import pytest
import torch
from fitting import workshop_of
from torch import nn

from prune_cli.build import build
from prune_cli.errors import StageError
from prune_cli.inference import for_inference
from prune_cli.metrics.latency import measure
from prune_cli.models.spec import ModelSpec
from prune_cli.stages import train_dense
from prune_cli.targets import source_hash
from tiny import TinyVGG, randomise


class Chance(TinyVGG):
    """A factor that is no part of its state: a file cannot bring it back."""

    def __init__(self, channels: int, resolution: int, classes: int) -> None:
        super().__init__(channels, resolution, classes)
        self.factor = random.random()

    def forward(self, x):
        return super().forward(x) * self.factor


def test_a_file_that_holds_another_network_ends_the_run_before_a_number_is_recorded(compose):
    config = compose("method=fp", "debug=default", "dataset=digits")
    experiment = build(config)
    experiment = experiment.__class__(**{**vars(experiment), "model": ModelSpec("chance", "test_file_and_copy.Chance")})
    with pytest.raises(StageError, match="holds another network than the one that was trained: its answers are off by"):
        train_dense(workshop_of(experiment))


@pytest.mark.parametrize("network", ["InPlaceNorm", "Hooked", "WeightStandardised", "Code", "WeightNormed", "Tied", "Scripted"])
def test_what_computes_something_of_its_own_is_not_folded(network):
    torch.manual_seed(0)
    model = randomise(ModelSpec(network, f"written.odd.{network}").build(3, 8, 4)).eval()
    fast, x = for_inference(model, "torch"), torch.randn(4, 3, 8, 8)
    with torch.inference_mode():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-3, atol=1e-4)


def test_a_subclass_without_a_forward_of_its_own_is_folded():
    class Named(nn.BatchNorm2d):
        pass

    model = randomise(TinyVGG(3, 8, 4)).eval()
    model.features[1].__class__ = Named
    model.input_shape = (3, 8, 8)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in for_inference(model).modules())


def test_another_network_is_not_timed(monkeypatch):
    model = randomise(TinyVGG(3, 8, 4))
    monkeypatch.setattr("prune_cli.metrics.latency.for_inference", lambda model, kernel: randomise(copy.deepcopy(model), seed=5))
    with pytest.raises(StageError, match="dense: the copy made for inference computes something else"):
        measure({"dense": model}, (3, 8, 8), batches=(1,), seconds=0.01)


BLOCKS = "from torch import nn\n\n\ndef block(i, o):\n    return nn.Sequential(nn.Conv2d(i, o, 3), nn.{}())\n"
NET = """
    from torch import nn
    from parts_of_net import blocks


    class Net(nn.Module):
        def __init__(self, channels, classes):
            super().__init__()
            self.first, self.head = blocks.block(channels, 4), nn.Linear(4, classes)
"""


def test_modules_that_a_network_s_file_imports_are_part_of_its_identity(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "parts_of_net").mkdir()
    (tmp_path / "parts_of_net/__init__.py").write_text("")
    (tmp_path / "parts_of_net/blocks.py").write_text(BLOCKS.format("ReLU"))
    (tmp_path / "net_with_parts.py").write_text(textwrap.dedent(NET))
    (tmp_path / "alone.py").write_text("from torch import nn\n\n\nclass Net(nn.Linear):\n    pass\n")
    (tmp_path / "unrelated.py").write_text("x = 1\n")
    before = {name: source_hash(f"{name}.Net") for name in ("net_with_parts", "alone")}
    (tmp_path / "unrelated.py").write_text("x = 2\n")
    assert {name: source_hash(f"{name}.Net") for name in before} == before
    (tmp_path / "parts_of_net/blocks.py").write_text(BLOCKS.format("Sigmoid"))
    assert source_hash("net_with_parts.Net") != before["net_with_parts"]
    assert source_hash("alone.Net") == before["alone"]
