"""`prune-cli bench`: what it measures is only shown to come out, never to be fast."""

import csv

import pytest
import torch
from tiny import randomise
from torch import nn

from prune_cli.checkpoint import save_model
from prune_cli.commands import bench
from prune_cli.errors import UserError
from prune_cli.layers.stripe import StripeConv2d
from prune_cli.models.spec import ModelSpec


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("PRUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("prune_cli.kernels.plan.SCREENING", 0)
    monkeypatch.setattr("prune_cli.kernels.plan.FINAL", 0)


def rows_of(folder) -> list[dict]:
    assert (folder / "speedup.png").stat().st_size > 1000
    with open(folder / "table.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_layers_of_a_network(tmp_path, capsys):
    command = "kernel --networks resnet56 --batches 1 --ratios 0.5,0.9 --seconds 0 --kernel torch --output"
    assert bench.main([*command.split(), str(tmp_path)]) == 0
    rows = rows_of(tmp_path)
    assert len(rows) == 12 and sum(int(row["count"]) for row in rows) == 2 * 55
    assert all(float(row["speedup"]) > 0 and float(row["floor_ms"]) > 0 for row in rows)
    assert {(row["dtype"], row["memory_format"]) for row in rows} == {("float32", "nchw")}
    said = capsys.readouterr().out
    assert "geometric mean" in said and "dense plans" in said and "16-32 @ 32 / 2" in said


def test_a_finished_run(tmp_path, capsys):
    spec = ModelSpec("resnet20", "prune_cli.models.resnet.CifarResNet", {"depth": 20})
    model = randomise(spec.build(3, 8, 10)).eval()
    checkpoints = tmp_path / "run/checkpoints"
    checkpoints.mkdir(parents=True)
    save_model(checkpoints / "dense.safetensors", model, spec, 10)
    for name in ("layer1.0.conv1", "layer3.1.conv2"):
        conv = model.get_submodule(name)
        assert isinstance(conv, nn.Conv2d)
        model.set_submodule(name, StripeConv2d.from_conv(conv, torch.rand(conv.out_channels, 3, 3) < 0.3))
    save_model(checkpoints / "pruned.safetensors", model, spec, 10)
    command = ["model", str(tmp_path / "run"), "--batches", "1,2", "--seconds", "0", "--kernel", "torch"]
    assert bench.main([*command, "--output", str(tmp_path)]) == 0
    assert [(row["layer"], row["batch"]) for row in rows_of(tmp_path)] == [
        (layer, batch) for batch in "12" for layer in ("layer1.0.conv1", "layer3.1.conv2", "the whole network")
    ]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("", "kernel|model"), ("kernel --ratios 1.5", "at least 0 and below 1"), ("kernel --ratios x", "must be a number"),
        ("kernel --batches 0", "at least 1"), ("kernel --networks vgg", "choose from vgg16"), ("kernel --fast", "--fast"),
        ("model", "RUN_DIR"), ("model /nowhere", "/nowhere: no such folder"), ("kernel --kernel cuda", "cuda"),
    ],
)  # fmt: skip
def test_a_wrong_command_is_one_sentence(command, words):
    with pytest.raises(UserError) as problem:
        bench.main(command.split())
    assert words in str(problem.value) and "\n" not in str(problem.value)


def test_it_is_dispatched_before_hydra(monkeypatch, capsys):
    from prune_cli import cli

    monkeypatch.setattr("sys.argv", ["prune-cli", "bench", "kernel", "--batches", "none"])
    assert cli.main() == 2
    assert capsys.readouterr().err.startswith("prune-cli: bench")
    monkeypatch.setattr("sys.argv", ["prune-cli", "bench", "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 0 and "kernel" in capsys.readouterr().out
