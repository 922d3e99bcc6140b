"""A network of the user's own, from the current directory, with its own arguments."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import prune_cli
from prune_cli.build import build
from prune_cli.errors import UserError
from prune_cli.models.spec import ModelSpec
from prune_cli.targets import source_hash
from prune_cli.workshop import Workshop


# Where the network's file is not, and then where it is.
LOADER = """
import os, sys, prune_cli
from prune_cli.errors import UserError
try:
    prune_cli.load(sys.argv[1])
except UserError as problem:
    print(problem)
os.chdir("..")
print(prune_cli.load(sys.argv[1]))
"""


def process(here: Path, *command: str) -> subprocess.CompletedProcess:
    """In a process that has the current directory on no path, as a console script."""
    environment = {**os.environ, "PYTHONPATH": str(Path(prune_cli.__file__).parents[1]), "PYTHONSAFEPATH": "1"}
    return subprocess.run([sys.executable, *command], cwd=here, env=environment, capture_output=True, text=True)


def test_the_worked_example_of_the_readme_runs_and_comes_back(my_net):
    started = (
        "-m", "prune_cli", "model=custom", "model.target=my_net.MyNet", "model.arguments.width=8", "model.name=mine",
        "method=fp", "debug=default", "runtime.latency_seconds=0", f"runtime.store={my_net}/store",
    )  # fmt: skip
    done = process(my_net, *started)
    assert done.returncode == 0, done.stderr
    [run] = (my_net / "outputs/runs/fp-mine-digits-0.5").iterdir()
    assert "model.arguments.width=8" in (run / "overrides.yaml").read_text()
    assert "+model" not in (run / "record.json").read_text()
    (my_net / "elsewhere").mkdir()
    loaded = process(my_net / "elsewhere", "-c", LOADER, f"{run}/checkpoints/pruned.safetensors")
    assert loaded.returncode == 0, loaded.stderr
    lost, found = loaded.stdout.split("\n", 1)
    assert "its network cannot be built: _target_=my_net.MyNet: cannot be imported" in lost
    assert "Conv2d(1, 4," in found


def test_a_sweep_over_its_arguments(my_net, command):
    """Without data, so that each job ends as soon as it has begun, with its settings on record."""
    code, out, err = command(
        "-m", "model=custom", "model.target=my_net.MyNet", "model.arguments.width=2,3",
        "method=fp", "dataset=folder", f"dataset.path={my_net}/none", f"runtime.store={my_net}/store",
    )  # fmt: skip
    assert code == 2, err
    assert "model.arguments.width=3" in out and "+model" not in out
    records = [json.loads(path.read_text()) for path in my_net.rglob("record.json")]
    assert sorted(record["config"]["model"]["arguments"]["width"] for record in records) == [2, 3]


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("model.arguments.widht=8", r"model\.arguments\.widht: there is no such setting; did you mean width\?"),
        ("model.arguments.width=wide", r"model\.arguments\.width=wide: must be a whole number"),
        ("model.arguments.classes=3", r"model\.arguments\.classes: there is no such setting"),
        ("model.arguments=3", r"model\.arguments=3"),
        ("model.width=8", r"model\.width=8: there is no such setting"),
        ("model.target=my_net.YourNet", "_target_=my_net.YourNet: cannot be imported"),
        ("model.target=null", r"model\.target=null: must be the dotted path"),
        ("model.target=my_net.nn", r"must be a class or a function"),
    ],
)
def test_a_wrong_argument_is_a_sentence(my_net, compose, override, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        build(compose("model=custom", "model.target=my_net.MyNet", override))
    assert "\n" not in str(caught.value)


def test_arguments_of_other_models_stay_where_they_are(compose):
    with pytest.raises(UserError, match=r"model\.arguments: there is no such setting; .*depth"):
        build(compose("model=resnet20", "model.arguments.depth=32"))


def test_an_edit_is_another_network(my_net, compose):
    def key() -> dict:
        shop = Workshop(build(compose("model=custom", "model.target=my_net.MyNet")), None, None)
        return shop.common["model"]

    before = key()
    assert before["source"] == source_hash("my_net.MyNet")
    (my_net / "my_net.py").write_text((my_net / "my_net.py").read_text() + "\n# edited\n")
    assert key() != before


FIXED = """
    from torch import nn


    def fixed(width: int = 4):
        return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


    def nothing():
        return [1, 2]


    class Pairs(nn.Module):
        def __init__(self, later: "Later" = None):
            super().__init__()
            self.fc, self.drop = nn.Linear(64, 10), nn.Dropout()

        def forward(self, x):
            return self.fc(x.flatten(1)), x
"""


def test_a_network_of_fixed_size_has_to_fit(my_net, compose):
    (my_net / "fixed.py").write_text(textwrap.dedent(FIXED))
    assert build(compose("model=custom", "model.target=fixed.Pairs")).model.arguments == {}  # nobody reads its annotation
    model = ModelSpec("fixed", "fixed.fixed", {"width": 5}).build(1, 8, 10)
    assert model.training and model(torch.zeros(3, 1, 8, 8)).shape == (3, 10)
    for target, shape, sentence in (
        ("fixed", (3, 8, 10), r"does not read images of shape \(2, 3, 8, 8\) \(mat1 and mat2.*named channels or resolution"),
        ("fixed", (1, 8, 4), r"makes \(2, 10\) of two images, must be \(2, 4\).*named classes"),
        ("Pairs", (1, 8, 10), "makes tuple of two images, must be"),
        ("nothing", (1, 8, 10), "makes a list, must make a torch.nn.Module"),
    ):
        with pytest.raises(UserError, match=sentence) as caught:
            ModelSpec("fixed", f"fixed.{target}").build(*shape)
        assert "\n" not in str(caught.value)
    sys.modules.pop("fixed")
